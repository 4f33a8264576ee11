//! Pins, which keep an entry from eviction: holds of readers and running actions, and leases of builds.

use super::{
    EntryKind, EntryRef, FoundEntry, HoldBudget, Index, Key, Lessee, Victim, Withdrawn,
    entry::{holds_of, lease_of, with_lease},
    leases::EndedRow,
};
use crate::caller::Owner;
use std::sync::atomic::Ordering::Relaxed;

impl Index {
    /// Looks an entry up, counts it as used, and keeps it from eviction until [`Index::release`].
    pub(in super::super) fn hold(&self, key: &Key, now: u32) -> Option<FoundEntry> {
        let slot = self.slot_of(key)?;
        let before = self.slab.hot(slot).pin.fetch_add(1, Relaxed);
        if holds_of(before) == 0 {
            let bytes = self.slab.cold(slot).bytes;
            self.held.fetch_add(bytes, Relaxed);
            if !self.leases.hold(lease_of(before), bytes) {
                self.unleased_held.fetch_add(bytes, Relaxed);
            }
        }
        Some(self.renew_slot(slot, now))
    }

    /// Ends a hold. The end of an entry's last hold is a use. Does nothing if the entry was removed meanwhile. Returns
    /// whether the entry needs [`Index::settle`].
    pub(in super::super) fn release(&self, at: EntryRef) -> bool {
        let Some(entry) = self.live(at) else { return false };
        let one_less = |pin: u64| (holds_of(pin) > 0).then(|| pin - 1);
        match entry.pin.fetch_update(Relaxed, Relaxed, one_less) {
            Ok(before) if holds_of(before) == 1 => {
                let bytes = self.slab.cold(at.slot).bytes;
                self.held.fetch_sub(bytes, Relaxed);
                if !self.leases.release(lease_of(before), bytes) {
                    self.unleased_held.fetch_sub(bytes, Relaxed);
                }
                self.mark_released(at.slot, entry)
            }
            _ => false,
        }
    }

    /// Records a request of a build, which extends its leases. `None` if builds have no leases.
    pub(in super::super) fn enter(&self, owner: Owner, now: u32) -> Option<Lessee> {
        self.leases.enter(owner, now)
    }

    /// Leases an entry to a build. Zstd forms are not leased: they only save work. Does nothing if the entry was
    /// removed meanwhile.
    pub(in super::super) fn lease(&self, at: EntryRef, lessee: Lessee) {
        let Some(entry) = self.live(at).filter(|entry| entry.kind() != EntryKind::Zstd) else { return };
        let mut pin = entry.pin.load(Relaxed);
        while let Some(to) = self.leases.target(lease_of(pin), lessee) {
            match entry.pin.compare_exchange_weak(pin, with_lease(pin, to), Relaxed, Relaxed) {
                Ok(_) => {
                    let (bytes, is_held) = (self.slab.cold(at.slot).bytes, holds_of(pin) > 0);
                    self.leases.moved(lease_of(pin), to, bytes, is_held, &self.unleased_held);
                    return;
                }
                Err(changed) => pin = changed,
            }
        }
    }

    /// Like [`Index::lease`], for the entry with this key.
    pub(in super::super) fn lease_key(&self, key: &Key, lessee: Lessee) {
        if let Some(at) = self.place_of(key) {
            self.lease(at, lessee);
        }
    }

    /// The bytes of those of these blobs that are stored and not leased.
    pub(in super::super) fn unleased_bytes(&self, blobs: impl Iterator<Item = Key>) -> u64 {
        let unleased = |slot: &u32| self.leases.row(self.slab.hot(*slot).lease()).is_none();
        let slots = blobs.filter_map(|key| self.slot_of(&key)).filter(unleased);
        slots.map(|slot| self.slab.cold(slot).bytes).sum()
    }

    /// Whether this many more bytes can be leased.
    pub(in super::super) fn can_lease(&self, bytes: u64) -> bool {
        self.leases.leased().saturating_add(bytes) <= self.leases.budget
    }

    /// Counts a result that was not served, because its blobs would have to be leased and there is no room for that.
    pub(in super::super) fn count_refused_result(&mut self) {
        self.tally.refused_results += 1;
    }

    /// Ends the leases of builds that have been quiet for long enough.
    pub(in super::super) fn expire_leases(&mut self, now: u32) {
        for ended in self.leases.expire(now) {
            self.end_row(ended);
        }
    }

    /// Takes a step to make room for leases of `wanted` bytes: ends expired leases, and takes the oldest leases from
    /// one build that has more than its share. The leases of the asker itself are not taken. `None` means that nothing
    /// more can be done, or need be.
    pub(in super::super) fn ease_leases(
        &mut self,
        wanted: u64,
        asker: Option<Owner>,
        now: u32,
    ) -> Option<Withdrawn> {
        if self.can_lease(wanted) {
            return None;
        }
        self.expire_leases(now);
        let (withdrawn, ended) = self.leases.withdraw_one(wanted, asker)?;
        self.end_row(ended);
        self.tally.withdrawn_leases += 1;
        Some(withdrawn)
    }

    /// Like [`Index::evict`], for a disk that is filled by something else. When nothing else is left to evict, leases
    /// end: the build that has most loses its oldest ones first. To evict an entry that was leased breaks a promise.
    pub(in super::super) fn evict_even_leased(
        &mut self,
        bytes: u64,
        entries: u64,
        budget: &mut HoldBudget,
    ) -> Vec<Victim> {
        let mut victims = self.evict(bytes, entries, budget);
        let mut evicted: u64 = victims.iter().map(|victim| victim.bytes).sum();
        while (evicted < bytes || (victims.len() as u64) < entries)
            && !budget.is_used_up()
            && let Some(ended) = self.leases.end_oldest_of_largest()
        {
            self.end_row(ended);
            self.tally.withdrawn_leases += 1;
            let left = (bytes.saturating_sub(evicted), entries.saturating_sub(victims.len() as u64));
            let more = self.evict(left.0, left.1, budget);
            self.tally.broken_promises += more.len() as u64;
            evicted += more.iter().map(|victim| victim.bytes).sum::<u64>();
            victims.extend(more);
        }
        victims
    }

    /// Puts the entries of a row that has ended back into the order of use.
    fn end_row(&mut self, ended: EndedRow) {
        *self.unleased_held.get_mut() += ended.held;
        self.put_row_back(ended.row);
    }
}
