//! [`Index`]: what is stored, how much room it takes, what goes first. Pure; [`super::CasActor`] owns the only one.
//!
//! Blobs, their zstd forms and action results are entries of one index, so one order of recency and one limit hold for all.
//!
//! Invariants, held by the model test in `index/model.rs`:
//! - `used + reserved` never exceeds the limit. Bytes of files that are being deleted come on top until
//!   [`Index::deleted`] says that they are gone; whoever got room that such files still take waits for that first
//!   ([`Grant::after_deletions`]), so the disk never holds more than the limit either.
//! - A leased entry is never evicted.
//! - Entries leave in the order of their last use; the end of a lease is a use. In a list of [`EXACT_BELOW`] entries or
//!   more, one that is used while it is among the newest quarter keeps its place: still, three quarters of all entries go
//!   before it. Builds ask for the same blobs again and again, and moving an entry touches three more at random.
//! - Looking up needs no exclusive access ([`Index::renew`], [`Index::lease`], [`Index::release`]): a use is marked in the
//!   entry itself, and an eviction looks at the mark before it removes anything. [`Index::settle`] moves a used entry to the
//!   head of the list later. Until then it stands where it was, but is not evicted.
//!
//! It knows no paths and does no IO, and the time is an argument. Memory: an entry is 144 bytes and a table slot 5, which
//! with the slack of growth stays below 180 bytes for each blob.

pub use words::*;

use gorego_reapi::digest::Digest;
use hashbrown::HashTable;
use std::{
    hash::{BuildHasher as _, Hasher as _, RandomState},
    sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed},
};

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
    leases: AtomicU32,
    /// Seconds since 1970 of the last use that is recorded on disk.
    touched: AtomicU32,
    /// Neighbours in the order of use, newer and older.
    prev: u32,
    next: u32,
    /// [`Index::links`] when it was last put at the head of the list.
    linked_at: u32,
    /// [`Index::links`] when it was last used; one less than `linked_at` while it was not used since then.
    used_at: AtomicU32,
    /// [`Index::condemn`].
    condemned: AtomicBool,
}

impl Entry {
    /// It was used since it was put at the head of the list. The numbers wrap, so they are not compared by size: an entry may not
    /// be used for days, while the others are put there billions of times.
    fn is_unsettled(&self) -> bool {
        self.used_at.load(Relaxed) != self.linked_at.wrapping_sub(1)
    }

    fn is_leased(&self) -> bool {
        self.leases.load(Relaxed) > 0
    }
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
    /// All but the leased bytes.
    totals: Totals,
    leased: AtomicU64,
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
            leased: AtomicU64::new(0),
            high_water: if marks { limit - limit / 50 } else { limit },
            low_water: if marks { limit - limit / 20 } else { limit },
            trimming: false,
            evicted_ever: 0,
            deleted_ever: 0,
        }
    }

    /// The sums.
    pub fn totals(&self) -> Totals {
        Totals { leased: self.leased.load(Relaxed), ..self.totals }
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
    pub fn renew(&self, key: &Key, now: u32) -> Option<Found> {
        self.slot_of(key).map(|slot| self.renew_slot(slot, now))
    }

    /// The digest of the newest entry that has this key but for the size of its digest. It does not count as a use.
    pub fn find_by_hash(&self, like: &Key) -> Option<Digest> {
        self.alike(like).max_by_key(|entry| entry.generation).map(|entry| entry.key.digest)
    }

    /// Looks an entry up, counts it as used, and keeps it from eviction until [`Index::release`].
    pub fn lease(&self, key: &Key, now: u32) -> Option<Found> {
        let slot = self.slot_of(key)?;
        let entry = &self.entries[slot as usize];
        if entry.leases.fetch_add(1, Relaxed) == 0 {
            self.leased.fetch_add(entry.bytes, Relaxed);
        }
        Some(self.renew_slot(slot, now))
    }

    /// Ends a lease, which is a use if it was the last one. An entry that was lost meanwhile is passed over. Returns whether the
    /// entry is to be settled.
    pub fn release(&self, at: EntryRef) -> bool {
        let Some(entry) = self.live(at) else { return false };
        match entry.leases.fetch_update(Relaxed, Relaxed, |leases| leases.checked_sub(1)) {
            Ok(1) => {
                self.leased.fetch_sub(entry.bytes, Relaxed);
                self.mark_used(entry)
            }
            _ => false,
        }
    }

    /// Moves an entry that was used to the head of the list, unless that was done already.
    pub fn settle(&mut self, at: EntryRef) {
        if self.live(at).is_some_and(Entry::is_unsettled) {
            self.move_to_head(at.slot);
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
        // Nobody can take a lease meanwhile, and all that is not leased can go, so this ends with enough room.
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
        let Totals { leased, reserved, limit, .. } = self.totals();
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
                let found = self.renew_slot(slot, now);
                self.settle(found.at);
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
        order
            .extend(self.table.iter().map(|&slot| (self.entries[slot as usize].touched.load(Relaxed), slot)));
        order.sort_unstable();
        (self.newest, self.oldest) = (NIL, NIL);
        for (_, slot) in order {
            self.link_newest(slot);
        }
    }

    /// Records that the content of a file is known to be right.
    pub fn trust(&mut self, at: EntryRef, stamp: Stamp) {
        if let Some(entry) = self.live_mut(at) {
            entry.stamp = stamp;
        }
    }

    /// The stamp of an entry that is still there.
    pub fn stamp(&self, at: EntryRef) -> Option<Stamp> {
        self.live(at).map(|entry| entry.stamp)
    }

    /// Follows a file through a change that did not touch its content. Nothing happens if its stamp is not `before` any more.
    pub fn follow(&mut self, at: EntryRef, before: Stamp, after: Stamp) {
        if let Some(entry) = self.live_mut(at).filter(|entry| entry.stamp == before) {
            entry.stamp = after;
        }
    }

    /// Hides an entry whose file turned out to be damaged or gone. Whoever has found that out may rely on it at once;
    /// [`Index::remove`] has to follow.
    pub fn condemn(&self, at: EntryRef) {
        if let Some(entry) = self.live(at) {
            entry.condemned.store(true, Relaxed);
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
            && victims.len() < max
            && let Some(oldest) = self.oldest_evictable()
        {
            let victim = self.remove_slot(oldest);
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
        while self.totals.used > target
            && victims.len() < max
            && let Some(oldest) = self.oldest_evictable()
        {
            victims.push(self.remove_slot(oldest));
        }
    }

    /// The least recently used entry that is not leased. Those before it in the list that are leased, or whose use was not
    /// settled yet, move to the head; so a look at each entry, and at the first once more, sees all.
    fn oldest_evictable(&mut self) -> Option<u32> {
        if self.totals.used == self.leased.load(Relaxed) {
            return None;
        }
        for _ in 0..=self.table.len() {
            let slot = self.oldest;
            let entry = self.entries.get(slot as usize)?;
            if !entry.is_leased() && !entry.is_unsettled() {
                return Some(slot);
            }
            self.move_to_head(slot);
        }
        None
    }

    fn move_to_head(&mut self, slot: u32) {
        self.unlink(slot);
        self.link_newest(slot);
    }

    /// Entries that have this key but for the size of its digest.
    fn alike(&self, like: &Key) -> impl Iterator<Item = &Entry> {
        let same = move |key: &Key| {
            (key.kind, key.instance, key.digest.function(), key.digest.hash())
                == (like.kind, like.instance, like.digest.function(), like.digest.hash())
        };
        let entries = self.table.iter_hash(self.hash(like)).map(|&slot| &self.entries[slot as usize]);
        entries.filter(move |entry| same(&entry.key) && !entry.condemned.load(Relaxed))
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

    fn renew_slot(&self, slot: u32, now: u32) -> Found {
        let entry = &self.entries[slot as usize];
        let settle_due = self.mark_used(entry);
        let touched = entry.touched.load(Relaxed);
        let touch_due = now.saturating_sub(touched) > Self::TOUCH_AFTER_SECS
            && entry.touched.compare_exchange(touched, now, Relaxed, Relaxed).is_ok();
        let (generation, key, stamp) = (entry.generation, entry.key, entry.stamp);
        let at = EntryRef { slot, generation };
        Found { at, file: FileId { key, generation }, stamp, touch_due, settle_due }
    }

    /// Marks an entry as used, unless its place in the list says so already. Returns whether the mark is new.
    fn mark_used(&self, entry: &Entry) -> bool {
        // So many entries at most are newer. Even the newest is marked in a short list: others that were used before it may be
        // about to move past it.
        let behind = self.links.wrapping_sub(entry.linked_at) as usize;
        let is_new = self.table.len() >= EXACT_BELOW && behind < self.table.len() / 4;
        if is_new || entry.used_at.load(Relaxed) == self.links {
            return false;
        }
        entry.used_at.store(self.links, Relaxed);
        true
    }

    fn insert(&mut self, file: FileId, bytes: u64, stamp: Stamp, touched: u32) {
        let FileId { key, generation } = file;
        let entry = Entry {
            key,
            generation,
            stamp,
            bytes,
            leases: AtomicU32::new(0),
            touched: AtomicU32::new(touched),
            prev: NIL,
            next: NIL,
            linked_at: 0,
            used_at: AtomicU32::new(0),
            condemned: AtomicBool::new(false),
        };
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
        self.unlink(slot);
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
        *entry.used_at.get_mut() = self.links.wrapping_sub(1);
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
        f.debug_struct("Index").field("totals", &self.totals()).finish_non_exhaustive()
    }
}
