//! [`Index`]: the stored entries, the room that they take, and the order of eviction. Pure. [`super::CasActor`] owns
//! the only one.
//!
//! Blobs, their zstd forms and action results are entries of one index, so one order of use and one limit apply to all
//! of them.
//!
//! Invariants, checked by the model test in `index/model.rs`:
//! - `used + reserved` never exceeds the limit, less the overhead of the volume when they were last reserved. Files
//!   that are being deleted are not counted in `used`. A writer whose room depends on their deletion waits for it
//!   ([`Grant::after_deletions`], [`Index::deleted`]), so the bytes on disk never exceed the limit either.
//! - An entry that is held or leased is never evicted.
//! - Entries are evicted in the order of their last use; the end of a hold is a use. In a list of [`EXACT_BELOW`]
//!   entries or more, using an entry among the newest quarter does not move it. At least three quarters of all entries
//!   are still evicted before it. Builds ask for the same blobs again and again, and moving an entry touches three
//!   others at random places in memory.
//! - A look-up needs no exclusive access ([`Index::renew`], [`Index::hold`], [`Index::release`]): it marks the use in
//!   the entry itself, and an eviction checks the mark before it removes the entry. [`Index::settle`] moves a used
//!   entry to the head of the list later. Until then the entry keeps its place, but is not evicted.
//!
//! The index knows no paths, does no IO, and takes the time as an argument. An entry takes 88 bytes, whatever its kind,
//! and 40 more if its hash has more than 32 bytes or its size has more than 40 bits. With the hash tables at their
//! emptiest, this is less than 100 bytes for a SHA-256 blob; a test holds this.

pub(in crate::actors::cas) use hold_budget::HoldBudget;
pub use leases::LeaseTimes;
pub(crate) use leases::{Lessee, Withdrawn};
pub(crate) use packing::ColdBlobs;
pub(super) use recovery::Recovery;
pub use types::*;

use entry::{CONDEMNED, holds_of, lease_of};
use gorego_reapi::digest::Digest;
use leases::Leases;
use links::Links;
use order::UseOrder;
use slab::Slab;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
pub(crate) use table::RunJobs;
use table::SlotTable;

mod entry;
mod hold_budget;
#[cfg(test)]
mod lease_model;
#[cfg(test)]
mod lease_rules;
mod leases;
mod links;
mod look_ups;
#[cfg(test)]
mod model;
mod order;
mod packing;
mod pins;
mod recovery;
mod room;
mod slab;
mod table;
#[cfg(test)]
mod tests;
mod types;

/// Lists shorter than this are kept in the exact order of use.
const EXACT_BELOW: usize = 1_024;
/// Maximum number of results whose keys differ only in the size of their action. Real Actions with the same hash have
/// the same size. The table is hashed without sizes so that an entry can be found by hash alone, and many such entries
/// would make its look-ups slow.
const MAX_ALIKE: usize = 8;

/// The index of the store; see the module documentation.
pub(super) struct Index {
    slab: Slab,
    table: SlotTable,
    order: UseOrder,
    leases: Leases,
    links: Links,
    /// Results that were dropped because one of their blobs was removed.
    followed: Vec<Victim>,
    /// The totals, except for the held and leased bytes.
    totals: Totals,
    /// Bytes of entries that are held.
    held: AtomicU64,
    /// Bytes of entries that are held and not leased.
    unleased_held: AtomicU64,
    /// The highest limit that the file system could allow.
    most: u64,
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

    /// An empty index with a limit in bytes, whose leases last this long. Links of results to blobs take at most
    /// `links` bytes of memory.
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
            most: limit,
            trimming: false,
            evicted_ever: 0,
            deleted_ever: 0,
            tally: Tally::default(),
        }
    }

    pub(super) fn totals(&self) -> Totals {
        let (held, leased) = (self.held.load(Relaxed), self.leases.leased());
        let pinned = leased.saturating_add(self.unleased_held.load(Relaxed));
        Totals { held, leased, pinned, ..self.totals }
    }

    /// The counts of events since the start.
    pub(super) fn tally(&self) -> Tally {
        self.tally
    }

    /// The last recorded use of the entry that would be evicted first, in seconds since 1970. It may be up to
    /// [`Index::TOUCH_AFTER_SECS`] older than the last use.
    pub(super) fn oldest_use(&self) -> Option<u32> {
        self.oldest().map(|entry| entry.touched.load(Relaxed))
    }

    /// Makes a file visible that was written under a reservation of at least `bytes`. A result replaces an earlier one
    /// (AC-08). If the blob or form is already stored, the new file is superfluous (BS-28). The caller deletes the file
    /// that is returned.
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
                let crowded = self.oldest_of_too_many(&file.key).map(|oldest| self.remove_slot(oldest));
                self.insert(file, bytes, stamp, now);
                crowded
            }
        }
    }

    /// Gives an entry another file with the same content. Refused if the entry has another file by now or is being
    /// read.
    pub(super) fn relocate(&mut self, from: &FileId, generation: u64) -> bool {
        let movable = self.movable(from);
        if let Some(slot) = movable {
            self.slab.hot_mut(slot).generation = generation;
        }
        movable.is_some()
    }

    /// Whether [`Index::relocate`] would give the entry of this file another one.
    pub(super) fn may_move(&self, file: &FileId) -> bool {
        self.movable(file).is_some()
    }

    fn movable(&self, file: &FileId) -> Option<u32> {
        let slot = self.slot_of(&file.key)?;
        let entry = self.slab.hot(slot);
        (entry.generation == file.generation && !entry.is_held()).then_some(slot)
    }

    /// Records the stamp at which the content of a file was verified.
    pub(super) fn trust(&mut self, at: EntryRef, stamp: Stamp) {
        if self.live(at).is_some() {
            self.slab.cold_mut(at.slot).seal = stamp.seal();
        }
    }

    /// Updates a stamp after a change that left the file's content as it was. Does nothing if the stamp is no longer
    /// `before`.
    pub(super) fn follow(&mut self, at: EntryRef, before: Stamp, after: Stamp) {
        if self.stamp(at).is_some_and(|stamp| stamp == before) {
            self.slab.cold_mut(at.slot).seal = after.seal();
        }
    }

    /// Hides an entry whose file is damaged or gone: look-ups no longer find it. [`Index::remove`] has to follow.
    pub(super) fn condemn(&self, at: EntryRef) {
        if let Some(entry) = self.live(at) {
            entry.set(CONDEMNED);
        }
    }

    /// Drops an entry whose file is damaged or gone, even if it is held. If it was leased, this counts as a broken
    /// promise.
    pub(super) fn remove_damaged(&mut self, at: EntryRef) -> Option<Victim> {
        let removed = self.remove_promised(at)?;
        self.tally.damaged += 1;
        Some(removed)
    }

    /// Drops an entry, even if it is held. If it was leased, this counts as a broken promise.
    pub(super) fn remove_promised(&mut self, at: EntryRef) -> Option<Victim> {
        let is_leased = self.leases.row(self.live(at)?.lease()).is_some();
        self.tally.broken_promises += u64::from(is_leased);
        Some(self.remove_slot(at.slot))
    }

    /// Records which blobs a result needs, each given once. When one of them is removed, the result is removed in the
    /// same step. Does nothing if the result or one of the blobs was removed meanwhile.
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

    /// Takes the files of results that were dropped because one of their blobs was removed. The caller deletes them.
    pub(super) fn take_followed(&mut self) -> Vec<Victim> {
        std::mem::take(&mut self.followed)
    }

    /// Drops an entry that is not needed any more, even if it is held or leased.
    pub(super) fn remove(&mut self, at: EntryRef) -> Option<Victim> {
        self.live(at)?;
        Some(self.remove_slot(at.slot))
    }

    /// Memory that the index takes without the links of results, in bytes.
    pub(super) fn memory(&self) -> usize {
        self.slab.memory() + self.table.memory() + self.order.memory() + self.leases.memory()
    }

    /// The oldest of [`MAX_ALIKE`] entries that differ only in size. Blobs are exempt: their content is verified, so
    /// more than one would need a hash collision.
    fn oldest_of_too_many(&self, key: &Key) -> Option<u32> {
        if key.kind == EntryKind::Blob || self.alike(key).count() < MAX_ALIKE {
            return None;
        }
        self.alike(key).min_by_key(|slot| self.slab.hot(*slot).generation)
    }

    fn insert(&mut self, file: FileId, bytes: u64, stamp: Stamp, touched: u32) {
        let slot = self.slab.add(file, bytes, stamp, touched);
        self.table.insert(slot, &self.slab);
        self.totals.used += bytes;
        *self.count_of(file.key.kind) += 1;
        self.count_packed(slot, true);
        self.link_newest(slot);
    }

    /// Removes an entry, and the results that need it.
    fn remove_slot(&mut self, slot: u32) -> Victim {
        for result in self.links.results(slot) {
            self.remove_follower(result);
        }
        self.remove_alone(slot)
    }

    /// Removes a result because one of its blobs is removed.
    fn remove_follower(&mut self, result: u32) {
        let followed = self.remove_alone(result);
        self.tally.followed += 1;
        self.followed.push(followed);
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
