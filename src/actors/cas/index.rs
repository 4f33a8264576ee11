//! [`Index`]: what is stored, how much room it takes, and the order of eviction. It is pure, and [`super::CasActor`] owns the
//! only one.
//!
//! Blobs, their zstd forms and action results are entries of one index, so one order of use and one limit apply to all of them.
//!
//! Invariants, checked by the model test in `index/model.rs`:
//! - `used + reserved` never exceeds the limit, less the overhead of the volume when they were last reserved. Files that are being deleted are not counted in `used`. A writer whose room
//!   depends on their deletion waits for it ([`Grant::after_deletions`], [`Index::deleted`]), so the bytes on disk never exceed
//!   the limit either.
//! - A leased entry is never evicted.
//! - Entries are evicted in the order of their last use; the end of a lease is a use. In a list of [`EXACT_BELOW`] entries or
//!   more, using an entry among the newest quarter does not move it. At least three quarters of all entries are still evicted
//!   before it. Builds ask for the same blobs again and again, and moving an entry touches three others at random places in
//!   memory.
//! - A look-up needs no exclusive access ([`Index::renew`], [`Index::lease`], [`Index::release`]): it marks the use in the
//!   entry itself, and an eviction checks the mark before it removes the entry. [`Index::settle`] moves a used entry to the
//!   head of the list later. Until then the entry keeps its place, but is not evicted.
//!
//! The index knows no paths, does no IO, and takes the time as an argument. An entry takes 144 bytes and a table slot 5. With
//! the slack of growth, this stays below 180 bytes per blob.

pub use words::*;

use crate::instance::InstanceId;
use entry::{Entry, NIL};
use gorego_reapi::digest::Digest;
use hashbrown::HashTable;
use order::Released;
use std::{
    hash::{BuildHasher as _, Hasher as _, RandomState},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

mod entry;
#[cfg(test)]
mod model;
mod order;
mod words;

/// The slab grows by a quarter of its length and by at least this many entries. It never doubles.
const MIN_GROWTH: usize = 1_024;
/// Lists shorter than this are kept in the exact order of use.
const EXACT_BELOW: usize = 1_024;
/// Maximum number of results whose keys differ only in the size of their action. Real Actions with the same hash have the same
/// size. The table is hashed without sizes so that an entry can be found by hash alone, and many such entries would make its
/// look-ups slow.
const MAX_ALIKE: usize = 8;
/// Stores below this size have no watermarks and evict only what each write needs, so that all of a small store is used.
const WATERMARKS_FROM_BYTES: u64 = 64 << 20;

/// The index of the store; see the module documentation.
pub(super) struct Index {
    entries: Vec<Entry>,
    free: u32,
    table: HashTable<u32>,
    hasher: RandomState,
    newest: u32,
    oldest: u32,
    /// How often an entry was put at the head of the list. It wraps, which at worst loses one use.
    links: u32,
    /// Entries that were set aside and are not leased any more.
    released: Released,
    /// How many entries evictions have looked at.
    #[cfg(test)]
    looks: u64,
    /// The totals, except for the leased bytes.
    totals: Totals,
    leased: AtomicU64,
    trimming: bool,
    evicted_ever: u64,
    deleted_ever: u64,
    tally: Tally,
}

impl Index {
    /// A use is written to disk if the last recorded one is older than this, in seconds.
    pub(super) const TOUCH_AFTER_SECS: u32 = 3_600;

    /// An empty index with a limit in bytes.
    pub(super) fn new(limit: u64) -> Self {
        Self {
            entries: Vec::new(),
            free: NIL,
            table: HashTable::new(),
            hasher: RandomState::new(),
            newest: NIL,
            oldest: NIL,
            links: 0,
            released: Released::default(),
            #[cfg(test)]
            looks: 0,
            totals: Totals { limit, ..Totals::default() },
            leased: AtomicU64::new(0),
            trimming: false,
            evicted_ever: 0,
            deleted_ever: 0,
            tally: Tally::default(),
        }
    }

    /// The current totals.
    pub(super) fn totals(&self) -> Totals {
        Totals { leased: self.leased.load(Relaxed), ..self.totals }
    }

    /// What has happened since the start.
    pub(super) fn tally(&self) -> Tally {
        self.tally
    }

    /// The last recorded use of the entry that would be evicted first, in seconds since 1970. It may be up to
    /// [`Index::TOUCH_AFTER_SECS`] older than the last use.
    pub(super) fn oldest_use(&self) -> Option<u32> {
        self.entries.get(self.oldest as usize).map(|entry| entry.touched.load(Relaxed))
    }

    /// Bytes of files that were evicted or replaced since the start.
    pub(super) fn bytes_evicted(&self) -> u64 {
        self.evicted_ever
    }

    /// Bytes deleted since the start.
    pub(super) fn bytes_deleted(&self) -> u64 {
        self.deleted_ever
    }

    /// Looks an entry up and counts it as used at `now` (seconds since 1970).
    pub(super) fn renew(&self, key: &Key, now: u32) -> Option<FoundEntry> {
        self.slot_of(key).map(|slot| self.renew_slot(slot, now))
    }

    /// The digest of the newest entry whose key equals `like` apart from the size. This does not count as a use.
    pub(super) fn find_by_hash(&self, like: &Key) -> Option<Digest> {
        self.alike(like).max_by_key(|entry| entry.generation).map(|entry| entry.key.digest)
    }

    /// The results of these namespaces in a part of the slots, without counting this as a use: those from `from` on, at most
    /// `max` slots. Also returns the slot to go on from; `None` at the end. An entry keeps its slot until it is removed, and the
    /// result that replaces it has the same slot.
    pub(super) fn results_from(
        &self,
        instances: [InstanceId; 2],
        from: u32,
        max: usize,
    ) -> (Vec<FoundResult>, Option<u32>) {
        let start = (from as usize).min(self.entries.len());
        let end = start.saturating_add(max).min(self.entries.len());
        let slots = (start as u32..).zip(self.entries.get(start..end).unwrap_or_default());
        let is_one = |(_, entry): &(u32, &Entry)| {
            let Key { instance: of, kind, .. } = entry.key;
            entry.generation != 0
                && kind == EntryKind::Result
                && instances.contains(&of)
                && !entry.condemned.load(Relaxed)
        };
        let found = slots.filter(is_one).map(|(slot, entry)| {
            let generation = entry.generation;
            FoundResult { at: EntryRef { slot, generation }, file: FileId { key: entry.key, generation } }
        });
        (found.collect(), (end < self.entries.len()).then_some(end as u32))
    }

    /// Looks an entry up, counts it as used, and keeps it from eviction until [`Index::release`].
    pub(super) fn lease(&self, key: &Key, now: u32) -> Option<FoundEntry> {
        let slot = self.slot_of(key)?;
        let entry = &self.entries[slot as usize];
        if entry.leases.fetch_add(1, Relaxed) == 0 {
            self.leased.fetch_add(entry.bytes, Relaxed);
        }
        Some(self.renew_slot(slot, now))
    }

    /// Ends a lease. The end of an entry's last lease is a use. Does nothing if the entry was removed meanwhile. Returns
    /// whether the entry needs [`Index::settle`].
    pub(super) fn release(&self, at: EntryRef) -> bool {
        let Some(entry) = self.live(at) else { return false };
        match entry.leases.fetch_update(Relaxed, Relaxed, |leases| leases.checked_sub(1)) {
            Ok(1) => {
                self.leased.fetch_sub(entry.bytes, Relaxed);
                self.mark_released(at.slot, entry)
            }
            _ => false,
        }
    }

    /// Reserves `wanted` bytes for a write and evicts what is needed for them.
    ///
    /// # Errors
    /// [`Shortage`] when leases and other reservations leave too little room. Nothing is evicted then.
    pub(super) fn reserve(&mut self, wanted: u64) -> Result<Grant, Shortage> {
        self.check_fit(wanted, 0)?;
        let Totals { used, reserved, .. } = self.totals;
        let mut victims = Vec::new();
        // No lease can be taken meanwhile, and everything else can be evicted, so this always frees enough.
        let target = self.room().saturating_sub(reserved).saturating_sub(wanted);
        if used > target {
            self.evict_down_to(target, usize::MAX, &mut victims);
        }
        self.totals.reserved += wanted;
        // The room also includes files that were evicted earlier and are still being deleted, so their deletion counts too.
        Ok(Grant { victims, after_deletions: self.evicted_ever })
    }

    /// Evicts at most `max` entries of those that [`Index::reserve`] would evict.
    pub(super) fn evict_for(&mut self, wanted: u64, max: usize) -> Vec<Victim> {
        let reserved = self.totals.reserved;
        let mut victims = Vec::new();
        self.evict_down_to(self.room().saturating_sub(reserved).saturating_sub(wanted), max, &mut victims);
        victims
    }

    /// Whether `wanted` bytes are free without evicting anything.
    pub(super) fn has_room(&self, wanted: u64) -> bool {
        let Totals { used, reserved, .. } = self.totals;
        self.room().saturating_sub(used).saturating_sub(reserved) >= wanted
    }

    /// Checks that `wanted` bytes could be freed by evicting everything that is not leased and by revoking `revocable` bytes of
    /// earlier reservations. Reserves and evicts nothing.
    ///
    /// # Errors
    /// [`Shortage`] if they could not.
    pub(super) fn check_fit(&self, wanted: u64, revocable: u64) -> Result<(), Shortage> {
        let Totals { leased, reserved, .. } = self.totals();
        let limit = self.room();
        let free = limit.saturating_sub(leased).saturating_sub(reserved.saturating_sub(revocable));
        if free >= wanted { Ok(()) } else { Err(Shortage { wanted, leased, reserved, limit }) }
    }

    /// Ends a reservation, or what is left of one.
    pub(super) fn unreserve(&mut self, bytes: u64) {
        self.totals.reserved = self.totals.reserved.saturating_sub(bytes);
    }

    /// Ends a reservation whose bytes are already on disk and are going to be deleted.
    pub(super) fn forfeit(&mut self, bytes: u64) {
        self.unreserve(bytes);
        self.count_evicted(bytes);
    }

    /// Makes a file visible that was written under a reservation of at least `bytes`. A result replaces an earlier one (AC-08).
    /// If the blob or form is already stored, the new file is superfluous (BS-28). The caller deletes the file that is
    /// returned.
    pub(super) fn commit(&mut self, file: FileId, bytes: u64, stamp: Stamp, now: u32) -> Option<Victim> {
        self.unreserve(bytes);
        let existing = self.slot_of(&file.key);
        match (existing, file.key.kind) {
            (Some(slot), EntryKind::Blob | EntryKind::Zstd) => {
                let found = self.renew_slot(slot, now);
                self.settle(found.at);
                self.count_evicted(bytes);
                Some(Victim { file, bytes })
            }
            (Some(slot), EntryKind::Result) => {
                let old = self.remove_slot(slot);
                self.insert(file, bytes, stamp, now);
                Some(old)
            }
            (None, _) => {
                let crowded = self.drop_oldest_alike(&file.key);
                self.insert(file, bytes, stamp, now);
                crowded
            }
        }
    }

    /// Sets the bytes that the volume needs besides those of the entries. Entries have to be evicted if they grow.
    pub(super) fn set_overhead(&mut self, bytes: u64) {
        self.totals.overhead = bytes;
    }

    /// Bytes that entries and reservations may take.
    fn room(&self) -> u64 {
        self.totals.limit.saturating_sub(self.totals.overhead)
    }

    /// Gives an entry another file with the same content. Refused if the entry has another file by now or somebody reads it.
    pub(super) fn relocate(&mut self, from: &FileId, generation: u64) -> bool {
        let Some(slot) = self.slot_of(&from.key) else { return false };
        let entry = &mut self.entries[slot as usize];
        let is_free = entry.generation == from.generation && !entry.is_leased();
        if is_free {
            entry.generation = generation;
        }
        is_free
    }

    /// The entry that has this file.
    pub(super) fn entry_of(&self, file: &FileId) -> Option<EntryRef> {
        let at = EntryRef { slot: self.slot_of(&file.key)?, generation: file.generation };
        self.live(at).map(|_| at)
    }

    /// Adds a file that was found at start. If there are two files for one entry, the newer one stays and the other is
    /// returned. `is_newer` says whether its first argument is newer than the second.
    pub(super) fn recover(
        &mut self,
        file: FileId,
        bytes: u64,
        touched: u32,
        is_newer: &dyn Fn(&FileId, &FileId) -> bool,
    ) -> Option<Victim> {
        let loser = match self.slot_of(&file.key) {
            Some(slot) if is_newer(&self.file_at(slot), &file) => {
                self.count_evicted(bytes);
                return Some(Victim { file, bytes });
            }
            Some(slot) => Some(self.remove_slot(slot)),
            None => self.drop_oldest_alike(&file.key),
        };
        self.insert(file, bytes, Stamp::UNTRUSTED, touched);
        loser
    }

    /// Sorts recovered entries by their recorded use.
    pub(super) fn finish_recovery(&mut self) {
        let mut order: Vec<(u32, u32)> = Vec::with_capacity(self.table.len());
        order
            .extend(self.table.iter().map(|&slot| (self.entries[slot as usize].touched.load(Relaxed), slot)));
        order.sort_unstable();
        (self.newest, self.oldest) = (NIL, NIL);
        for (_, slot) in order {
            self.link_newest(slot);
        }
    }

    /// Records the stamp at which the content of a file was verified.
    pub(super) fn trust(&mut self, at: EntryRef, stamp: Stamp) {
        if let Some(entry) = self.live_mut(at) {
            entry.stamp = stamp;
        }
    }

    /// The stamp of an entry that is still there.
    pub(super) fn stamp(&self, at: EntryRef) -> Option<Stamp> {
        self.live(at).map(|entry| entry.stamp)
    }

    /// Updates a stamp after a change that left the file's content as it was. Does nothing if the stamp is no longer `before`.
    pub(super) fn follow(&mut self, at: EntryRef, before: Stamp, after: Stamp) {
        if let Some(entry) = self.live_mut(at).filter(|entry| entry.stamp == before) {
            entry.stamp = after;
        }
    }

    /// Hides an entry whose file turned out to be damaged or gone: look-ups no longer find it. [`Index::remove`] has to follow.
    pub(super) fn condemn(&self, at: EntryRef) {
        if let Some(entry) = self.live(at) {
            entry.condemned.store(true, Relaxed);
        }
    }

    /// Drops an entry whose file turned out to be damaged or gone, leased or not.
    pub(super) fn remove_damaged(&mut self, at: EntryRef) -> Option<Victim> {
        let removed = self.remove(at)?;
        self.tally.damaged += 1;
        Some(removed)
    }

    /// Drops an entry, leased or not.
    pub(super) fn remove(&mut self, at: EntryRef) -> Option<Victim> {
        self.live(at)?;
        Some(self.remove_slot(at.slot))
    }

    /// Evicts ahead of need: once the high-water mark is passed, down to the low-water mark, at most `max` entries per call.
    /// Call it again until it returns nothing.
    pub(super) fn trim(&mut self, max: usize) -> Vec<Victim> {
        let Totals { used, reserved, .. } = self.totals;
        let room = self.room();
        let has_marks = self.totals.limit >= WATERMARKS_FROM_BYTES;
        let (high, low) = if has_marks { (room - room / 50, room - room / 20) } else { (room, room) };
        self.trimming |= used.saturating_add(reserved) > high;
        let mut victims = Vec::new();
        if self.trimming {
            self.evict_down_to(low.saturating_sub(reserved), max, &mut victims);
            self.trimming = victims.len() == max;
        }
        victims
    }

    /// Evicts the least recently used entries until at least `bytes` bytes and `entries` entries are evicted, at most `max`
    /// entries.
    pub(super) fn evict(&mut self, bytes: u64, entries: u64, max: usize) -> Vec<Victim> {
        let (mut victims, mut evicted) = (Vec::new(), 0u64);
        while (evicted < bytes || (victims.len() as u64) < entries)
            && victims.len() < max
            && let Some(oldest) = self.oldest_evictable()
        {
            let victim = self.evict_slot(oldest);
            evicted = evicted.saturating_add(victim.bytes);
            victims.push(victim);
        }
        victims
    }

    /// Records that evicted or replaced files of this many bytes are deleted.
    pub(super) fn deleted(&mut self, bytes: u64) {
        self.totals.deleting = self.totals.deleting.saturating_sub(bytes);
        self.deleted_ever += bytes;
    }

    /// Memory that the index takes, in bytes.
    #[cfg(test)]
    pub fn memory(&self) -> usize {
        self.entries.capacity() * size_of::<Entry>() + self.table.allocation_size()
    }

    fn evict_down_to(&mut self, target: u64, max: usize, victims: &mut Vec<Victim>) {
        while self.totals.used > target
            && victims.len() < max
            && let Some(oldest) = self.oldest_evictable()
        {
            victims.push(self.evict_slot(oldest));
        }
    }

    fn evict_slot(&mut self, slot: u32) -> Victim {
        let victim = self.remove_slot(slot);
        self.tally.evicted += 1;
        self.tally.evicted_bytes += victim.bytes;
        victim
    }

    /// Entries whose key equals `like` apart from the size of the digest.
    fn alike(&self, like: &Key) -> impl Iterator<Item = &Entry> {
        let same = move |key: &Key| {
            (key.kind, key.instance, key.digest.function(), key.digest.hash())
                == (like.kind, like.instance, like.digest.function(), like.digest.hash())
        };
        let entries = self.table.iter_hash(self.hash(like)).map(|&slot| &self.entries[slot as usize]);
        entries.filter(move |entry| same(&entry.key) && !entry.condemned.load(Relaxed))
    }

    /// Removes the oldest of [`MAX_ALIKE`] entries that differ only in size. Blobs are exempt: their content is verified, so
    /// more than one would need a hash collision.
    fn drop_oldest_alike(&mut self, key: &Key) -> Option<Victim> {
        if key.kind == EntryKind::Blob || self.alike(key).count() < MAX_ALIKE {
            return None;
        }
        let oldest = self.alike(key).min_by_key(|entry| entry.generation).map(|entry| entry.key)?;
        self.slot_of(&oldest).map(|slot| self.remove_slot(slot))
    }

    fn hash(&self, key: &Key) -> u64 {
        hash_without_size(&self.hasher, key)
    }

    fn slot_of(&self, key: &Key) -> Option<u32> {
        let is_it = |&slot: &u32| {
            let entry = &self.entries[slot as usize];
            entry.key == *key && !entry.condemned.load(Relaxed)
        };
        self.table.find(self.hash(key), is_it).copied()
    }

    fn live(&self, at: EntryRef) -> Option<&Entry> {
        self.entries.get(at.slot as usize).filter(|entry| entry.generation == at.generation)
    }

    fn live_mut(&mut self, at: EntryRef) -> Option<&mut Entry> {
        self.entries.get_mut(at.slot as usize).filter(|entry| entry.generation == at.generation)
    }

    fn file_at(&self, slot: u32) -> FileId {
        let entry = &self.entries[slot as usize];
        FileId { key: entry.key, generation: entry.generation }
    }

    fn renew_slot(&self, slot: u32, now: u32) -> FoundEntry {
        let entry = &self.entries[slot as usize];
        let settle_due = self.mark_used(entry);
        let touched = entry.touched.load(Relaxed);
        let touch_due = now.saturating_sub(touched) > Self::TOUCH_AFTER_SECS
            && entry.touched.compare_exchange(touched, now, Relaxed, Relaxed).is_ok();
        let (generation, key, stamp) = (entry.generation, entry.key, entry.stamp);
        let at = EntryRef { slot, generation };
        FoundEntry { at, file: FileId { key, generation }, stamp, touch_due, settle_due }
    }

    fn insert(&mut self, file: FileId, bytes: u64, stamp: Stamp, touched: u32) {
        let key = file.key;
        let entry = Entry::new(file, bytes, stamp, touched);
        let slot = if self.free == NIL {
            if self.entries.len() == self.entries.capacity() {
                self.entries.reserve_exact(MIN_GROWTH.max(self.entries.len() / 4));
            }
            self.entries.push(entry);
            (self.entries.len() - 1) as u32
        } else {
            let slot = self.free;
            self.free = self.entries[slot as usize].next;
            self.entries[slot as usize] = entry;
            slot
        };
        let (entries, hasher) = (&self.entries, &self.hasher);
        self.table.insert_unique(hash_without_size(hasher, &key), slot, |&slot| {
            hash_without_size(hasher, &entries[slot as usize].key)
        });
        self.totals.used += bytes;
        *self.count_of(key.kind) += 1;
        self.link_newest(slot);
    }

    fn remove_slot(&mut self, slot: u32) -> Victim {
        let file = self.file_at(slot);
        let hash = self.hash(&file.key);
        if let Ok(found) = self.table.find_entry(hash, |&candidate| candidate == slot) {
            found.remove();
        }
        self.forget(slot);
        let entry = &mut self.entries[slot as usize];
        let bytes = entry.bytes;
        if std::mem::take(entry.leases.get_mut()) > 0 {
            *self.leased.get_mut() -= bytes;
        }
        (entry.generation, entry.next) = (0, self.free);
        self.free = slot;
        self.totals.used -= bytes;
        *self.count_of(file.key.kind) -= 1;
        self.count_evicted(bytes);
        Victim { file, bytes }
    }

    fn count_evicted(&mut self, bytes: u64) {
        self.totals.deleting += bytes;
        self.evicted_ever += bytes;
    }

    fn count_of(&mut self, kind: EntryKind) -> &mut u64 {
        match kind {
            EntryKind::Blob => &mut self.totals.blobs,
            EntryKind::Result => &mut self.totals.results,
            EntryKind::Zstd => &mut self.totals.zstd_forms,
        }
    }
}

/// The hash of a key in the table. The size is left out, so that an entry can be found by its hash alone.
fn hash_without_size(hasher: &RandomState, key: &Key) -> u64 {
    let Key { digest, instance, kind } = key;
    let mut state = hasher.build_hasher();
    state.write(digest.hash());
    state.write_u32(u32::from(instance.0) << 16 | (*kind as u32) << 8 | digest.function() as u32);
    state.finish()
}

impl std::fmt::Debug for Index {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Index").field("totals", &self.totals()).finish_non_exhaustive()
    }
}
