//! Room: reservations, the evictions that make room for them, and the bytes that are still being deleted.

use super::{Grant, HoldBudget, Index, Shortage, StoreLimit, Totals, Victim};

/// Stores below this size have no watermarks and evict only what each write needs, so that all of a small store is
/// used.
pub(super) const WATERMARKS_FROM_BYTES: u64 = 64 << 20;
/// When less than this part of a store is free, entries are evicted ahead of need.
const HIGH_WATER_PART: u64 = 50;
/// Evictions ahead of need end when this part of a store is free.
const LOW_WATER_PART: u64 = 20;
/// While less than this part is free on disk, large writes wait for deletions.
const KEPT_FOR_SMALL_PART: u64 = 80;

impl Index {
    /// Bytes of files that were evicted or replaced since the start.
    pub(in super::super) fn bytes_evicted(&self) -> u64 {
        self.evicted_ever
    }

    /// Bytes deleted since the start.
    pub(in super::super) fn bytes_deleted(&self) -> u64 {
        self.deleted_ever
    }

    /// Reserves `wanted` bytes for a small write and evicts what is needed for them.
    ///
    /// # Errors
    /// [`Shortage`] when holds and other reservations leave too little room. Nothing is evicted then.
    pub(in super::super) fn reserve(&mut self, wanted: u64) -> Result<Grant, Shortage> {
        self.reserve_beside(wanted, false)
    }

    /// Like [`Index::reserve`], for a write that may be large. A large write leaves [`KEPT_FOR_SMALL_PART`] of the
    /// store free on disk and waits for deletions until then. A small write does not. So a large write into a full
    /// store waits for the deletions that it causes, and small writes do not wait for them.
    ///
    /// # Errors
    /// As [`Index::reserve`].
    pub(in super::super) fn reserve_beside(
        &mut self,
        wanted: u64,
        is_large: bool,
    ) -> Result<Grant, Shortage> {
        self.check_fit(wanted, 0)?;
        let Totals { used, reserved, .. } = self.totals;
        let mut victims = Vec::new();
        // No hold or lease can be taken meanwhile, and all other entries can be evicted, so this always frees enough.
        let target = self.room().saturating_sub(reserved).saturating_sub(wanted);
        if used > target {
            self.evict_down_to(target, &mut { HoldBudget::UNLIMITED }, &mut victims);
        }
        self.totals.reserved += wanted;
        let kept = if is_large && self.has_marks() { self.room() / KEPT_FOR_SMALL_PART } else { 0 };
        Ok(Grant { victims, after_deletions: self.free_after(kept) })
    }

    /// The count of deleted bytes at which all reservations and `kept` more bytes fit on the disk beside the files that
    /// are being deleted.
    fn free_after(&self, kept: u64) -> u64 {
        let Totals { used, reserved, deleting, .. } = self.totals;
        let on_disk = used.saturating_add(reserved).saturating_add(deleting);
        let lacking = on_disk.saturating_add(kept).saturating_sub(self.room());
        self.deleted_ever + lacking.min(deleting)
    }

    /// Whether entries are evicted ahead of need.
    fn has_marks(&self) -> bool {
        self.totals.limit >= WATERMARKS_FROM_BYTES
    }

    /// Evicts the entries that [`Index::reserve`] would evict, as far as the budget goes.
    pub(in super::super) fn evict_for(&mut self, wanted: u64, budget: &mut HoldBudget) -> Vec<Victim> {
        let target = self.room().saturating_sub(self.totals.reserved).saturating_sub(wanted);
        let mut victims = Vec::new();
        self.evict_down_to(target, budget, &mut victims);
        victims
    }

    /// Whether `wanted` bytes are free without evicting anything.
    pub(in super::super) fn has_room(&self, wanted: u64) -> bool {
        let Totals { used, reserved, .. } = self.totals;
        self.room().saturating_sub(used).saturating_sub(reserved) >= wanted
    }

    /// Whether entries and reservations take more than they may.
    pub(in super::super) fn exceeds_room(&self) -> bool {
        let Totals { used, reserved, .. } = self.totals;
        used.saturating_add(reserved) > self.room()
    }

    /// Checks that `wanted` bytes could be freed by evicting everything that is not held and by revoking `revocable`
    /// bytes of earlier reservations. Reserves and evicts nothing.
    ///
    /// # Errors
    /// [`Shortage`] if they could not.
    pub(in super::super) fn check_fit(&self, wanted: u64, revocable: u64) -> Result<(), Shortage> {
        let Totals { held, leased, pinned, reserved, overhead, limit, .. } = self.totals();
        let free = self.room().saturating_sub(pinned).saturating_sub(reserved.saturating_sub(revocable));
        if free >= wanted {
            Ok(())
        } else {
            Err(Shortage { wanted, held, leased, reserved, overhead, limit, most: self.most })
        }
    }

    /// Ends a reservation or a part of one.
    pub(in super::super) fn unreserve(&mut self, bytes: u64) {
        self.totals.reserved = self.totals.reserved.saturating_sub(bytes);
    }

    /// Reserves bytes that files take on disk beyond what was reserved for them, whether or not there is room.
    pub(in super::super) fn overdraw(&mut self, bytes: u64) {
        self.totals.reserved += bytes;
    }

    /// Ends a reservation whose bytes are already on disk and are going to be deleted.
    pub(in super::super) fn forfeit(&mut self, bytes: u64) {
        self.unreserve(bytes);
        self.count_evicted(bytes);
    }

    /// Sets the bytes that the volume needs besides those of the entries. Entries have to be evicted if they grow.
    pub(in super::super) fn set_overhead(&mut self, bytes: u64) {
        self.totals.overhead = bytes;
        // Otherwise leases could fill the room that is left, and none of them would end when an upload needs some of
        // it.
        self.leases.set_budget(self.room());
    }

    /// Sets the bytes that the store may take. Entries have to be evicted if there are fewer than before.
    pub(in super::super) fn set_limit(&mut self, limit: StoreLimit) {
        (self.totals.limit, self.most) = (limit.bytes, limit.most);
        self.leases.set_budget(self.room());
    }

    /// Bytes that entries and reservations may take.
    fn room(&self) -> u64 {
        self.totals.limit.saturating_sub(self.totals.overhead)
    }

    /// Evicts ahead of need: once the high-water mark is passed, down to the low-water mark, as far as
    /// the budget goes.
    pub(in super::super) fn trim(&mut self, budget: &mut HoldBudget) -> Vec<Victim> {
        let Totals { used, reserved, .. } = self.totals;
        let room = self.room();
        let (high, low) = match self.has_marks() {
            true => (room - room / HIGH_WATER_PART, room - room / LOW_WATER_PART),
            false => (room, room),
        };
        self.trimming |= used.saturating_add(reserved) > high;
        let mut victims = Vec::new();
        if self.trimming {
            self.evict_down_to(low.saturating_sub(reserved), budget, &mut victims);
            self.trimming = budget.is_used_up();
        }
        victims
    }

    /// Evicts the least recently used entries until at least `bytes` bytes and `entries` entries are evicted, as
    /// far as the budget goes.
    pub(in super::super) fn evict(
        &mut self,
        bytes: u64,
        entries: u64,
        budget: &mut HoldBudget,
    ) -> Vec<Victim> {
        let (mut victims, mut evicted) = (Vec::new(), 0u64);
        while (evicted < bytes || (victims.len() as u64) < entries)
            && let Some(oldest) = self.oldest_evictable(budget)
            && let Some(victim) = self.evict_slot(oldest, budget)
        {
            evicted = evicted.saturating_add(victim.bytes);
            victims.push(victim);
        }
        victims
    }

    /// Records that evicted or replaced files of this many bytes are deleted.
    pub(in super::super) fn deleted(&mut self, bytes: u64) {
        self.totals.deleting = self.totals.deleting.saturating_sub(bytes);
        self.deleted_ever += bytes;
    }

    fn evict_down_to(&mut self, target: u64, budget: &mut HoldBudget, victims: &mut Vec<Victim>) {
        while self.totals.used > target
            && let Some(oldest) = self.oldest_evictable(budget)
            && let Some(victim) = self.evict_slot(oldest, budget)
        {
            victims.push(victim);
        }
    }

    /// Evicts an entry after all results that need it, of which there may be any number. `None` if the budget does not
    /// suffice for these: the entry stays, and the next part goes on with its remaining results.
    fn evict_slot(&mut self, slot: u32, budget: &mut HoldBudget) -> Option<Victim> {
        while let Some(result) = self.links.newest_result(slot) {
            if budget.entries == 0 {
                return None;
            }
            budget.entries -= 1;
            self.remove_follower(result);
        }
        budget.entries = budget.entries.saturating_sub(1);
        let victim = self.remove_slot(slot);
        self.tally.evicted += 1;
        self.tally.evicted_bytes += victim.bytes;
        Some(victim)
    }

    pub(super) fn count_evicted(&mut self, bytes: u64) {
        self.totals.deleting += bytes;
        self.evicted_ever += bytes;
    }
}
