//! [`Index`]: what is stored, how much room it takes, what goes first. Pure; [`super::CasActor`] owns the only one.
//!
//! Blobs, their zstd forms and action results are entries of one index, so one order of recency and one limit hold for all.
//!
//! Invariants, held by the model test in `index/model.rs`:
//! - `used + reserved` never exceeds the limit. Bytes of files that are being deleted come on top until
//!   [`Index::deleted`] says that they are gone; whoever got room that such files still take waits for that first
//!   ([`Grant::after_deletions`]), so the disk never holds more than the limit either.
//! - A leased entry is not in the list of candidates and is never evicted.
//! - Entries leave in the order of their last use; the end of a lease is a use. In a list of [`EXACT_BELOW`] entries or
//!   more, one that is used while it is among the newest quarter keeps its place: still, three quarters of all entries go
//!   before it. Builds ask for the same blobs again and again, and moving an entry touches three more at random.
//!
//! It knows no paths and does no IO, and the time is an argument. Memory: an entry is 136 bytes and a table slot 5, which
//! with the slack of growth stays below 180 bytes for each blob.

pub use words::*;

use gorego_reapi::digest::Digest;
use hashbrown::HashTable;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};

#[cfg(test)]
mod model;
mod words;

/// End of a list.
const NIL: u32 = u32::MAX;
/// Entries are added to the slab in steps of a quarter of its length, at least this many; it never doubles.
const MIN_GROWTH: usize = 1_024;
/// Lists shorter than this are kept in the exact order of use.
const EXACT_BELOW: usize = 1_024;
/// Results that may differ in nothing but the size of their action; all the same hash of a real Action has one size. The
/// table is hashed without sizes so that an entry can be found by hash alone, and more alike would make its lookups slow.
const MAX_ALIKE: usize = 8;
/// Stores below this size evict only what each write needs: in a small one, room kept free is room lost.
const WATERMARKS_FROM_BYTES: u64 = 64 << 20;

struct Entry {
    key: Key,
    /// 0 for a free slot, whose `next` then leads to the next free one.
    generation: u64,
    stamp: Stamp,
    bytes: u64,
    leases: u32,
    /// Seconds since 1970 of the last use that is recorded on disk.
    touched: u32,
    /// Neighbours in the list of candidates, newer and older; NIL for a leased entry.
    prev: u32,
    next: u32,
    /// [`Index::links`] when it was last put at the head of the list.
    linked_at: u32,
}

/// The index; see the top of this file.
pub struct Index {
    entries: Vec<Entry>,
    free: u32,
    table: HashTable<u32>,
    hasher: RandomState,
    newest: u32,
    oldest: u32,
    /// How often an entry was put at the head of the list; wraps, which at worst forgets one use.
    links: u32,
    totals: Totals,
    high_water: u64,
    low_water: u64,
    trimming: bool,
    evicted_ever: u64,
    deleted_ever: u64,
}

impl Index {
    /// How stale recency on disk may be, in seconds, before a use is written down again.
    pub const TOUCH_AFTER_SECS: u32 = 3_600;

    /// An empty index with a limit in bytes.
    pub fn new(limit: u64) -> Self {
        let marks = limit >= WATERMARKS_FROM_BYTES;
        Self {
            entries: Vec::new(),
            free: NIL,
            table: HashTable::new(),
            hasher: RandomState::new(),
            newest: NIL,
            oldest: NIL,
            links: 0,
            totals: Totals { limit, ..Totals::default() },
            high_water: if marks { limit - limit / 50 } else { limit },
            low_water: if marks { limit - limit / 20 } else { limit },
            trimming: false,
            evicted_ever: 0,
            deleted_ever: 0,
        }
    }

    /// The sums.
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// Bytes of files that the index has let go since the start.
    pub fn bytes_evicted(&self) -> u64 {
        self.evicted_ever
    }

    /// Bytes deleted since the start.
    pub fn bytes_deleted(&self) -> u64 {
        self.deleted_ever
    }

    /// Looks an entry up and counts it as used at `now` (seconds since 1970).
    pub fn renew(&mut self, key: &Key, now: u32) -> Option<Found> {
        let slot = self.slot_of(key)?;
        Some(self.renew_slot(slot, now))
    }

    /// The digest of the newest entry that has this key but for the size of its digest. It does not count as a use.
    pub fn find_by_hash(&self, like: &Key) -> Option<Digest> {
        self.alike(like).max_by_key(|entry| entry.generation).map(|entry| entry.key.digest)
    }

    /// Looks an entry up, counts it as used, and keeps it from eviction until [`Index::release`].
    pub fn lease(&mut self, key: &Key, now: u32) -> Option<Found> {
        let slot = self.slot_of(key)?;
        let found = self.renew_slot(slot, now);
        if self.entries[slot as usize].leases == 0 {
            self.unlink(slot);
            self.totals.leased += self.entries[slot as usize].bytes;
        }
        self.entries[slot as usize].leases += 1;
        Some(found)
    }

    /// Ends a lease. An entry that was lost meanwhile is passed over.
    pub fn release(&mut self, at: EntryRef) {
        let Some(entry) = self.live(at).filter(|entry| entry.leases > 0) else { return };
        entry.leases -= 1;
        if entry.leases == 0 {
            self.totals.leased -= self.entries[at.slot as usize].bytes;
            self.link_newest(at.slot);
        }
    }

    /// Promises `wanted` bytes to a write, evicting what is needed for it.
    ///
    /// # Errors
    /// [`Shortage`] when leases and other promises leave too little; nothing is evicted then.
    pub fn reserve(&mut self, wanted: u64) -> Result<Grant, Shortage> {
        self.check_fit(wanted, 0)?;
        let Totals { used, reserved, limit, .. } = self.totals;
        let mut victims = Vec::new();
        // All that is not leased can go, so this ends with enough room.
        let target = limit - reserved - wanted;
        if used > target {
            self.evict_down_to(target, usize::MAX, &mut victims);
        }
        self.totals.reserved += wanted;
        // Files that are on their way out from before count too: together they are what the room is made of.
        Ok(Grant { victims, after_deletions: self.evicted_ever })
    }

    /// Whether `wanted` bytes are free without evicting anything.
    pub fn has_room(&self, wanted: u64) -> bool {
        let Totals { used, reserved, limit, .. } = self.totals;
        limit.saturating_sub(used).saturating_sub(reserved) >= wanted
    }

    /// Makes sure that `wanted` bytes could be made free by evicting all that can be, and by taking back `revocable` bytes of
    /// earlier promises. Nothing is promised or evicted.
    ///
    /// # Errors
    /// [`Shortage`] otherwise.
    pub fn check_fit(&self, wanted: u64, revocable: u64) -> Result<(), Shortage> {
        let Totals { leased, reserved, limit, .. } = self.totals;
        let free = limit.saturating_sub(leased).saturating_sub(reserved.saturating_sub(revocable));
        if free >= wanted { Ok(()) } else { Err(Shortage { wanted, leased, reserved, limit }) }
    }

    /// Takes back what is left of a promise.
    pub fn unreserve(&mut self, bytes: u64) {
        self.totals.reserved = self.totals.reserved.saturating_sub(bytes);
    }

    /// Takes back a promise whose bytes are on disk already and are going to be deleted.
    pub fn forfeit(&mut self, bytes: u64) {
        self.unreserve(bytes);
        self.count_evicted(bytes);
    }

    /// Makes a file visible that was written under a promise of at least `bytes`. A result replaces an earlier one
    /// (AC-08); of a blob or a form that is stored already, the new file is the one to go (BS-28). Either way what comes back
    /// is to be deleted.
    pub fn commit(&mut self, file: FileId, bytes: u64, stamp: Stamp, now: u32) -> Option<Victim> {
        self.unreserve(bytes);
        let existing = self.slot_of(&file.key);
        match (existing, file.key.kind) {
            (Some(slot), Kind::Blob | Kind::Zstd) => {
                self.renew_slot(slot, now);
                self.count_evicted(bytes);
                Some(Victim { file, bytes })
            }
            (Some(slot), Kind::Result) => {
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

    /// Takes in a file that was found at start. Of two files of one entry the later one stays; the other comes back.
    pub fn recover(&mut self, file: FileId, bytes: u64, touched: u32) -> Option<Victim> {
        let loser = match self.slot_of(&file.key) {
            Some(slot) if self.entries[slot as usize].generation > file.generation => {
                self.count_evicted(bytes);
                return Some(Victim { file, bytes });
            }
            Some(slot) => Some(self.remove_slot(slot)),
            None => self.drop_oldest_alike(&file.key),
        };
        self.insert(file, bytes, Stamp::UNTRUSTED, touched);
        loser
    }

    /// Puts recovered entries in the order of their recorded use.
    pub fn finish_recovery(&mut self) {
        let mut order: Vec<(u32, u32)> = Vec::with_capacity(self.table.len());
        order.extend(self.table.iter().map(|&slot| (self.entries[slot as usize].touched, slot)));
        order.sort_unstable();
        (self.newest, self.oldest) = (NIL, NIL);
        for (_, slot) in order {
            self.link_newest(slot);
        }
    }

    /// Records that the content of a file is known to be right.
    pub fn trust(&mut self, at: EntryRef, stamp: Stamp) {
        if let Some(entry) = self.live(at) {
            entry.stamp = stamp;
        }
    }

    /// The stamp of an entry that is still there.
    pub fn stamp(&mut self, at: EntryRef) -> Option<Stamp> {
        self.live(at).map(|entry| entry.stamp)
    }

    /// Follows a file through a change that did not touch its content. Nothing happens if its stamp is not `before` any more.
    pub fn follow(&mut self, at: EntryRef, before: Stamp, after: Stamp) {
        if let Some(entry) = self.live(at).filter(|entry| entry.stamp == before) {
            entry.stamp = after;
        }
    }

    /// Drops an entry whose file turned out to be damaged or gone, leased or not.
    pub fn remove(&mut self, at: EntryRef) -> Option<Victim> {
        self.live(at)?;
        Some(self.remove_slot(at.slot))
    }

    /// Evicts ahead of need, at most `max` entries: once the high-water mark is passed, until the low-water mark. Call
    /// again until it returns nothing.
    pub fn trim(&mut self, max: usize) -> Vec<Victim> {
        let Totals { used, reserved, .. } = self.totals;
        self.trimming |= used.saturating_add(reserved) > self.high_water;
        let mut victims = Vec::new();
        if self.trimming {
            self.evict_down_to(self.low_water.saturating_sub(reserved), max, &mut victims);
            self.trimming = victims.len() == max;
        }
        victims
    }

    /// Evicts the least recently used entries: at least so many bytes and so many entries, as far as there are any and at
    /// most `max` entries.
    pub fn evict(&mut self, bytes: u64, entries: u64, max: usize) -> Vec<Victim> {
        let (mut victims, mut evicted) = (Vec::new(), 0u64);
        while (evicted < bytes || (victims.len() as u64) < entries)
            && self.oldest != NIL
            && victims.len() < max
        {
            let victim = self.remove_slot(self.oldest);
            evicted = evicted.saturating_add(victim.bytes);
            victims.push(victim);
        }
        victims
    }

    /// Records that files which the index let go are gone.
    pub fn deleted(&mut self, bytes: u64) {
        self.totals.deleting = self.totals.deleting.saturating_sub(bytes);
        self.deleted_ever += bytes;
    }

    /// Memory that the index takes, in bytes.
    #[cfg(test)]
    pub fn memory(&self) -> usize {
        self.entries.capacity() * size_of::<Entry>() + self.table.allocation_size()
    }

    fn evict_down_to(&mut self, target: u64, max: usize, victims: &mut Vec<Victim>) {
        while self.totals.used > target && self.oldest != NIL && victims.len() < max {
            victims.push(self.remove_slot(self.oldest));
        }
    }

    /// Entries that have this key but for the size of its digest.
    fn alike(&self, like: &Key) -> impl Iterator<Item = &Entry> {
        let same = move |key: &Key| {
            (key.kind, key.instance, key.digest.function(), key.digest.hash())
                == (like.kind, like.instance, like.digest.function(), like.digest.hash())
        };
        let entries = self.table.iter_hash(self.hash(like)).map(|&slot| &self.entries[slot as usize]);
        entries.filter(move |entry| same(&entry.key))
    }

    /// Makes room among entries that are alike. Blobs are not limited: the content of each was checked, so there are as many as
    /// somebody has found collisions.
    fn drop_oldest_alike(&mut self, key: &Key) -> Option<Victim> {
        if key.kind == Kind::Blob || self.alike(key).count() < MAX_ALIKE {
            return None;
        }
        let oldest = self.alike(key).min_by_key(|entry| entry.generation).map(|entry| entry.key)?;
        self.slot_of(&oldest).map(|slot| self.remove_slot(slot))
    }

    fn hash(&self, key: &Key) -> u64 {
        hash_without_size(&self.hasher, key)
    }

    fn slot_of(&self, key: &Key) -> Option<u32> {
        self.table.find(self.hash(key), |&slot| self.entries[slot as usize].key == *key).copied()
    }

    fn live(&mut self, at: EntryRef) -> Option<&mut Entry> {
        self.entries.get_mut(at.slot as usize).filter(|entry| entry.generation == at.generation)
    }

    fn file_at(&self, slot: u32) -> FileId {
        let entry = &self.entries[slot as usize];
        FileId { key: entry.key, generation: entry.generation }
    }

    fn renew_slot(&mut self, slot: u32, now: u32) -> Found {
        let behind = self.links.wrapping_sub(self.entries[slot as usize].linked_at) as usize;
        // So many entries at most are newer.
        let is_new = behind == 0 || (self.table.len() >= EXACT_BELOW && behind < self.table.len() / 4);
        if self.entries[slot as usize].leases == 0 && !is_new {
            self.unlink(slot);
            self.link_newest(slot);
        }
        let entry = &mut self.entries[slot as usize];
        let touch_due = now.saturating_sub(entry.touched) > Self::TOUCH_AFTER_SECS;
        if touch_due {
            entry.touched = now;
        }
        let (generation, key, stamp) = (entry.generation, entry.key, entry.stamp);
        Found { at: EntryRef { slot, generation }, file: FileId { key, generation }, stamp, touch_due }
    }

    fn insert(&mut self, file: FileId, bytes: u64, stamp: Stamp, touched: u32) {
        let FileId { key, generation } = file;
        let entry =
            Entry { key, generation, stamp, bytes, leases: 0, touched, prev: NIL, next: NIL, linked_at: 0 };
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
        let Entry { bytes, leases, .. } = self.entries[slot as usize];
        if leases == 0 {
            self.unlink(slot);
        } else {
            self.totals.leased -= bytes;
        }
        let entry = &mut self.entries[slot as usize];
        (entry.generation, entry.leases, entry.next) = (0, 0, self.free);
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

    fn count_of(&mut self, kind: Kind) -> &mut u64 {
        match kind {
            Kind::Blob => &mut self.totals.blobs,
            Kind::Result => &mut self.totals.results,
            Kind::Zstd => &mut self.totals.zstd_forms,
        }
    }

    fn unlink(&mut self, slot: u32) {
        let Entry { prev, next, .. } = self.entries[slot as usize];
        match prev {
            NIL => self.newest = next,
            _ => self.entries[prev as usize].next = next,
        }
        match next {
            NIL => self.oldest = prev,
            _ => self.entries[next as usize].prev = prev,
        }
    }

    fn link_newest(&mut self, slot: u32) {
        let old = self.newest;
        self.links = self.links.wrapping_add(1);
        let entry = &mut self.entries[slot as usize];
        (entry.prev, entry.next, entry.linked_at) = (NIL, old, self.links);
        match old {
            NIL => self.oldest = slot,
            _ => self.entries[old as usize].prev = slot,
        }
        self.newest = slot;
    }
}

/// The hash of a key in the table. The size adds nothing to a hash, so nothing is lost without it.
fn hash_without_size(hasher: &RandomState, key: &Key) -> u64 {
    let Key { digest, instance, kind } = key;
    let mut state = hasher.build_hasher();
    state.write(digest.hash());
    state.write_u32(u32::from(instance.0) << 16 | (*kind as u32) << 8 | digest.function() as u32);
    state.finish()
}

impl std::fmt::Debug for Index {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Index").field("totals", &self.totals).finish_non_exhaustive()
    }
}
