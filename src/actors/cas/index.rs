//! [`Index`]: what is stored, how much room it takes, and the order of eviction. It is pure, and [`super::CasActor`] owns the
//! only one.
//!
//! Blobs, their zstd forms and action results are entries of one index, so one order of use and one limit apply to all of them.
//!
//! Invariants, checked by the model test in `index/model.rs`:
//! - `used + reserved` never exceeds the limit, less the overhead of the volume when they were last reserved. Files that are being deleted are not counted in `used`. A writer whose room
//!   depends on their deletion waits for it ([`Grant::after_deletions`], [`Index::deleted`]), so the bytes on disk never exceed
//!   the limit either.
//! - An entry that is held or leased is never evicted.
//! - Entries are evicted in the order of their last use; the end of a hold is a use. In a list of [`EXACT_BELOW`] entries or
//!   more, using an entry among the newest quarter does not move it. At least three quarters of all entries are still evicted
//!   before it. Builds ask for the same blobs again and again, and moving an entry touches three others at random places in
//!   memory.
//! - A look-up needs no exclusive access ([`Index::renew`], [`Index::hold`], [`Index::release`]): it marks the use in the
//!   entry itself, and an eviction checks the mark before it removes the entry. [`Index::settle`] moves a used entry to the
//!   head of the list later. Until then the entry keeps its place, but is not evicted.
//!
//! The index knows no paths, does no IO, and takes the time as an argument. An entry takes 88 bytes, whatever its kind, and 40
//! more if its hash has more than 32 bytes or its size has more than 40 bits. With the hash tables at their emptiest, this is
//! less than 100 bytes for a SHA-256 blob; a test holds this.

pub use leases::LeaseTimes;
pub(crate) use leases::{Lessee, Withdrawn};
pub(crate) use packing::ColdBlobs;
pub use words::*;

use crate::instance::InstanceId;
use entry::{CONDEMNED, Hot, holds_of, lease_of};
use gorego_reapi::digest::Digest;
use leases::Leases;
use links::Links;
use order::UseOrder;
use slab::Slab;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use table::SlotTable;

mod entry;
#[cfg(test)]
mod lease_model;
mod leases;
mod links;
#[cfg(test)]
mod model;
mod order;
mod packing;
mod pins;
mod slab;
mod table;
mod words;

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
    slab: Slab,
    table: SlotTable,
    order: UseOrder,
    leases: Leases,
    links: Links,
    /// Results that went because one of their blobs went.
    followed: Vec<Victim>,
    /// The totals, except for what is held and leased.
    totals: Totals,
    /// Bytes of entries that are held,
    held: AtomicU64,
    /// and of those among them that are not leased.
    unleased_held: AtomicU64,
    trimming: bool,
    evicted_ever: u64,
    deleted_ever: u64,
    tally: Tally,
}

impl Index {
    /// A use is written to disk if the last recorded one is older than this, in seconds.
    pub(super) const TOUCH_AFTER_SECS: u32 = 3_600;

    /// An empty index with a limit in bytes, without leases.
    #[cfg(test)]
    pub(super) fn new(limit: u64) -> Self {
        Self::with_leases(limit, LeaseTimes::default(), 0)
    }

    /// An empty index with a limit in bytes, whose leases last this long. Links of results to blobs take `links` bytes of memory.
    pub(super) fn with_leases(limit: u64, times: LeaseTimes, links: u64) -> Self {
        Self {
            slab: Slab::new(),
            table: SlotTable::new(),
            order: UseOrder::new(),
            leases: Leases::new(times, limit),
            links: Links::new(links),
            followed: Vec::new(),
            totals: Totals { limit, ..Totals::default() },
            held: AtomicU64::new(0),
            unleased_held: AtomicU64::new(0),
            trimming: false,
            evicted_ever: 0,
            deleted_ever: 0,
            tally: Tally::default(),
        }
    }

    /// The current totals.
    pub(super) fn totals(&self) -> Totals {
        let (held, leased) = (self.held.load(Relaxed), self.leases.leased());
        let pinned = leased.saturating_add(self.unleased_held.load(Relaxed));
        Totals { held, leased, pinned, ..self.totals }
    }

    /// What has happened since the start.
    pub(super) fn tally(&self) -> Tally {
        self.tally
    }

    /// The last recorded use of the entry that would be evicted first, in seconds since 1970. It may be up to
    /// [`Index::TOUCH_AFTER_SECS`] older than the last use.
    pub(super) fn oldest_use(&self) -> Option<u32> {
        self.oldest().map(|entry| entry.touched.load(Relaxed))
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

    /// Like [`Index::renew`], for a caller that needs to know only whether the entry is there.
    pub(super) fn note_use(&self, key: &Key, now: u32) -> Option<NotedUse> {
        self.slot_of(key).map(|slot| self.use_slot(slot, self.slab.hot(slot), now))
    }

    /// Where an entry is. This does not count as a use.
    pub(super) fn place_of(&self, key: &Key) -> Option<EntryRef> {
        let slot = self.slot_of(key)?;
        Some(EntryRef { slot, generation: self.slab.hot(slot).generation })
    }

    /// The entry at a place, if it is still there. This does not count as a use.
    pub(super) fn at(&self, at: EntryRef) -> Option<FoundEntry> {
        self.live(at)?;
        Some(self.found(NotedUse { at, touch_due: false, settle_due: false }))
    }

    /// The digest of the newest entry whose key equals `like` apart from the size. This does not count as a use.
    pub(super) fn find_by_hash(&self, like: &Key) -> Option<Digest> {
        let newest = self.alike(like).max_by_key(|slot| self.slab.hot(*slot).generation)?;
        Some(self.slab.key(newest).digest)
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
        let start = (from as usize).min(self.slab.len());
        let end = start.saturating_add(max).min(self.slab.len());
        let is_one = |slot: &u32| {
            let entry = self.slab.hot(*slot);
            entry.generation != 0
                && entry.kind() == EntryKind::Result
                && instances.contains(&entry.instance())
                && !entry.has(CONDEMNED)
        };
        let found = (start as u32..end as u32).filter(is_one).map(|slot| {
            let file = self.file_at(slot);
            FoundResult { at: EntryRef { slot, generation: file.generation }, file }
        });
        (found.collect(), (end < self.slab.len()).then_some(end as u32))
    }

    /// Reserves `wanted` bytes for a write and evicts what is needed for them.
    ///
    /// # Errors
    /// [`Shortage`] when holds and other reservations leave too little room. Nothing is evicted then.
    pub(super) fn reserve(&mut self, wanted: u64) -> Result<Grant, Shortage> {
        self.check_fit(wanted, 0)?;
        let Totals { used, reserved, .. } = self.totals;
        let mut victims = Vec::new();
        // No hold or lease can be taken meanwhile, and everything else can be evicted, so this always frees enough.
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

    /// Checks that `wanted` bytes could be freed by evicting everything that is not held and by revoking `revocable` bytes of
    /// earlier reservations. Reserves and evicts nothing.
    ///
    /// # Errors
    /// [`Shortage`] if they could not.
    pub(super) fn check_fit(&self, wanted: u64, revocable: u64) -> Result<(), Shortage> {
        let Totals { held, leased, pinned, reserved, .. } = self.totals();
        let limit = self.room();
        let free = limit.saturating_sub(pinned).saturating_sub(reserved.saturating_sub(revocable));
        if free >= wanted { Ok(()) } else { Err(Shortage { wanted, held, leased, reserved, limit }) }
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
        let entry = self.slab.hot_mut(slot);
        let is_free = entry.generation == from.generation && !entry.is_held();
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
        order.extend(self.table.iter().map(|slot| (self.slab.hot(slot).touched.load(Relaxed), slot)));
        order.sort_unstable();
        self.clear_order();
        for (_, slot) in order {
            self.link_newest(slot);
        }
    }

    /// Records the stamp at which the content of a file was verified.
    pub(super) fn trust(&mut self, at: EntryRef, stamp: Stamp) {
        if self.live(at).is_some() {
            self.slab.cold_mut(at.slot).seal = stamp.seal();
        }
    }

    /// The stamp of an entry that is still there.
    pub(super) fn stamp(&self, at: EntryRef) -> Option<Seal> {
        self.live(at).map(|_| self.slab.cold(at.slot).seal)
    }

    /// Updates a stamp after a change that left the file's content as it was. Does nothing if the stamp is no longer `before`.
    pub(super) fn follow(&mut self, at: EntryRef, before: Stamp, after: Stamp) {
        if self.stamp(at).is_some_and(|stamp| stamp == before) {
            self.slab.cold_mut(at.slot).seal = after.seal();
        }
    }

    /// Hides an entry whose file turned out to be damaged or gone: look-ups no longer find it. [`Index::remove`] has to follow.
    pub(super) fn condemn(&self, at: EntryRef) {
        if let Some(entry) = self.live(at) {
            entry.set(CONDEMNED);
        }
    }

    /// Drops an entry whose file turned out to be damaged or gone, held or not. If it was leased, that breaks a promise.
    pub(super) fn remove_damaged(&mut self, at: EntryRef) -> Option<Victim> {
        let removed = self.remove_promised(at)?;
        self.tally.damaged += 1;
        Some(removed)
    }

    /// Drops an entry, held or not. If it was leased, that breaks a promise.
    pub(super) fn remove_promised(&mut self, at: EntryRef) -> Option<Victim> {
        let is_leased = self.leases.row(self.live(at)?.lease()).is_some();
        self.tally.broken_promises += u64::from(is_leased);
        Some(self.remove_slot(at.slot))
    }

    /// Records which blobs a result needs, each given once. When one of them goes, the result goes in the same step. Does nothing
    /// if the result or one of the blobs has gone meanwhile.
    pub(super) fn link(&mut self, at: EntryRef, blobs: &[EntryRef]) {
        if self.live(at).is_some() && blobs.iter().all(|blob| self.live(*blob).is_some()) {
            let slots: Vec<u32> = blobs.iter().map(|blob| blob.slot).collect();
            self.links.add(at.slot, &slots);
        }
    }

    /// The blobs that a result needs, if that is recorded. They are all stored.
    pub(super) fn linked(&self, at: EntryRef) -> Option<Vec<Digest>> {
        self.live(at)?;
        Some(self.links.blobs(at.slot)?.map(|slot| self.slab.key(slot).digest).collect())
    }

    /// Memory that the links of results take, in bytes.
    #[cfg(test)]
    pub(super) fn link_bytes(&self) -> u64 {
        self.links.bytes()
    }

    /// The files of results that went because one of their blobs went. The caller deletes them.
    pub(super) fn take_followed(&mut self) -> Vec<Victim> {
        std::mem::take(&mut self.followed)
    }

    /// Drops an entry that is of no use any more, held or leased or not.
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
        self.slab.memory() + self.table.memory() + self.order.memory() + self.leases.memory()
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

    /// The slots of entries whose key equals `like` apart from the size of the digest.
    fn alike(&self, like: &Key) -> impl Iterator<Item = u32> {
        let is_one = |slot: &u32| {
            let entry = self.slab.hot(*slot);
            entry.is_like(like, &self.slab.tails) && !entry.has(CONDEMNED)
        };
        self.table.like(like).filter(is_one)
    }

    /// Removes the oldest of [`MAX_ALIKE`] entries that differ only in size. Blobs are exempt: their content is verified, so
    /// more than one would need a hash collision.
    fn drop_oldest_alike(&mut self, key: &Key) -> Option<Victim> {
        if key.kind == EntryKind::Blob || self.alike(key).count() < MAX_ALIKE {
            return None;
        }
        let oldest = self.alike(key).min_by_key(|slot| self.slab.hot(*slot).generation)?;
        Some(self.remove_slot(oldest))
    }

    fn slot_of(&self, key: &Key) -> Option<u32> {
        self.table.find(key, |slot| {
            let entry = self.slab.hot(slot);
            entry.is(key, &self.slab.tails) && !entry.has(CONDEMNED)
        })
    }

    fn live(&self, at: EntryRef) -> Option<&Hot> {
        self.slab.get(at.slot).filter(|entry| entry.generation == at.generation)
    }

    fn file_at(&self, slot: u32) -> FileId {
        FileId { key: self.slab.key(slot), generation: self.slab.hot(slot).generation }
    }

    fn renew_slot(&self, slot: u32, now: u32) -> FoundEntry {
        self.found(self.use_slot(slot, self.slab.hot(slot), now))
    }

    fn use_slot(&self, slot: u32, entry: &Hot, now: u32) -> NotedUse {
        let settle_due = self.mark_used(entry);
        let touched = entry.touched.load(Relaxed);
        let touch_due = now.saturating_sub(touched) > Self::TOUCH_AFTER_SECS
            && entry.touched.compare_exchange(touched, now, Relaxed, Relaxed).is_ok();
        NotedUse { at: EntryRef { slot, generation: entry.generation }, touch_due, settle_due }
    }

    /// What was found by a use of an entry that is there.
    fn found(&self, NotedUse { at, touch_due, settle_due }: NotedUse) -> FoundEntry {
        let stamp = self.slab.cold(at.slot).seal;
        FoundEntry { at, file: self.file_at(at.slot), stamp, touch_due, settle_due }
    }

    fn insert(&mut self, file: FileId, bytes: u64, stamp: Stamp, touched: u32) {
        let slot = self.slab.add(file, bytes, stamp, touched);
        let slab = &self.slab;
        self.table.insert(&file.key, slot, |slot| slab.key(slot));
        self.totals.used += bytes;
        *self.count_of(file.key.kind) += 1;
        self.count_packed(slot, true);
        self.link_newest(slot);
    }

    /// Removes an entry, and the results that need it.
    fn remove_slot(&mut self, slot: u32) -> Victim {
        for result in self.links.results(slot) {
            let followed = self.remove_alone(result);
            self.tally.followed += 1;
            self.followed.push(followed);
        }
        self.remove_alone(slot)
    }

    fn remove_alone(&mut self, slot: u32) -> Victim {
        self.links.remove(slot);
        self.count_packed(slot, false);
        let file = self.file_at(slot);
        self.table.remove(&file.key, slot);
        self.forget(slot);
        let bytes = self.slab.cold(slot).bytes;
        let pin = std::mem::take(self.slab.hot_mut(slot).pin.get_mut());
        if holds_of(pin) > 0 {
            *self.held.get_mut() -= bytes;
        }
        self.leases.removed(lease_of(pin), bytes, holds_of(pin) > 0, &mut self.unleased_held);
        self.slab.free(slot);
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

impl std::fmt::Debug for Index {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Index").field("totals", &self.totals()).finish_non_exhaustive()
    }
}
