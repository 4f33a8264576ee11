//! The order of use: a list of entries, the most recently used first.
//!
//! A held entry needs no place in the list. An eviction that finds one sets it aside, so later evictions do not look at
//! it again, however many entries are held. The end of its last hold is a use and returns it to the head of the list.
//! [`Index::settle`] does this for the entries that readers report to the actor. Readers need not report all of them:
//! they also put each such entry on a stack, which is emptied before the next eviction.
//!
//! An eviction that finds a leased entry moves it to a list of its row. When the row ends, the whole list becomes the
//! end of the list of all entries, in constant time. So leased entries, too, cost one look each. A lease that moves to
//! another row leaves the entry in the list of the earlier row. If an eviction finds nothing in the list of all entries
//! although some entries are neither held nor leased, it examines the lists of all rows again.
//!
//! Each list is a ring that is closed by a link of its own, so an entry can be taken out of its list without knowing
//! which it is.

use super::{
    EXACT_BELOW, EntryRef, HoldBudget, Index,
    entry::{ASIDE, Hot, USED},
    leases::ROWS,
};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

/// No slot: the end of a list.
pub(super) const NIL: u32 = u32::MAX;
/// The entry is not on the stack of released entries.
const NOT_RELEASED: u32 = NIL - 1;
/// The link that closes the list of all entries. Slots are smaller than the links of all lists, because memory ends
/// long before.
const ALL: u32 = NIL - 2;
/// The number of lists.
const LISTS: usize = ROWS + 1;

/// An epoch ends when this part of all entries was put at the head of the list.
const EPOCHS_PER_LIST: usize = 64;
/// An entry that was put at the head in one of the last epochs is recent: less than a quarter of all entries are newer.
const RECENT_EPOCHS: u16 = 15;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct ListEnds {
    newest: u32,
    oldest: u32,
}

/// The ends of the lists, and the clock of the head of the list of all entries.
#[derive(Debug)]
pub(super) struct UseOrder {
    /// The list of all entries, followed by the lists of the rows.
    ends: Vec<ListEnds>,
    /// The number of the epoch. It wraps around. At worst, this loses one use of an entry that was not used while a
    /// thousand times as many entries as the list has were put at the head.
    epoch: u16,
    /// Number of entries that were put at the head of the list in this epoch.
    in_epoch: usize,
    /// The top of the stack of entries that were set aside and are not held any more. Readers push entries while they
    /// share the index, and its owner takes all of them.
    released: AtomicU32,
    /// Number of entries that evictions have examined.
    #[cfg(test)]
    pub(super) looks: u64,
}

impl UseOrder {
    pub(super) fn new() -> Self {
        let empty = |list: usize| ListEnds { newest: link_of(list), oldest: link_of(list) };
        Self {
            ends: (0..LISTS).map(empty).collect(),
            epoch: 0,
            in_epoch: 0,
            released: AtomicU32::new(NIL),
            #[cfg(test)]
            looks: 0,
        }
    }

    /// Memory that it takes, in bytes.
    pub(super) fn memory(&self) -> usize {
        self.ends.capacity() * size_of::<ListEnds>()
    }

    fn all(&self) -> ListEnds {
        self.ends[0]
    }

    #[cfg(test)]
    pub(super) fn pass_epochs(&mut self, epochs: u16) {
        self.epoch = self.epoch.wrapping_add(epochs);
    }
}

/// The link that closes a list.
fn link_of(list: usize) -> u32 {
    ALL - list as u32
}

/// The list that a link closes; `None` for a slot.
fn list_of(link: u32) -> Option<usize> {
    let list = ALL.wrapping_sub(link) as usize;
    (list < LISTS).then_some(list)
}

impl Index {
    /// Moves a used entry to the head of the list, unless that is already done.
    pub(in super::super) fn settle(&mut self, at: EntryRef) {
        let Some(entry) = self.live(at) else { return };
        if entry.has(ASIDE) {
            self.put_back_released();
        } else if entry.has(USED) {
            self.move_to_head(at.slot);
        }
    }

    /// The entry that would probably be evicted first. No entry is moved to find out.
    pub(super) fn oldest(&self) -> Option<&Hot> {
        let ListEnds { oldest, .. } = self.order.all();
        (oldest != ALL).then(|| self.slab.hot(oldest))
    }

    /// Records the end of the last hold of an entry. Returns whether the entry needs [`Index::settle`].
    pub(super) fn mark_released(&self, slot: u32, entry: &Hot) -> bool {
        if !entry.has(ASIDE) {
            return self.mark_used(entry);
        }
        let (top, link) = (&self.order.released, &self.slab.cold(slot).prev);
        let mut below = top.load(Relaxed);
        // It may already be on the stack from an earlier hold.
        if link.compare_exchange(NOT_RELEASED, below, Relaxed, Relaxed).is_ok() {
            while let Err(changed) = top.compare_exchange_weak(below, slot, Relaxed, Relaxed) {
                below = changed;
                link.store(below, Relaxed);
            }
        }
        true
    }

    /// Marks an entry as used, unless it is recent enough in the list. Returns whether the mark is new.
    pub(super) fn mark_used(&self, entry: &Hot) -> bool {
        // In a short list, even the newest entry is marked, because entries that were used earlier may be about to move
        // ahead of it.
        let is_recent =
            self.table.len() >= EXACT_BELOW && self.order.epoch.wrapping_sub(entry.linked_in) < RECENT_EPOCHS;
        !is_recent && entry.set(USED)
    }

    /// The least recently used entry that is neither held nor leased. Older entries that are held or leased are set
    /// aside, and older entries whose use is not settled yet move to the head of the list. So each hold and each use
    /// costs one look, and one pass sees every candidate. `None` also means that the budget has no looks left.
    pub(super) fn oldest_evictable(&mut self, budget: &mut HoldBudget) -> Option<u32> {
        self.put_back_released();
        if self.totals.used == self.totals().pinned {
            return None;
        }
        let mut has_put_rows_back = false;
        loop {
            let slot = self.order.all().oldest;
            if budget.is_used_up() || (slot == ALL && has_put_rows_back) {
                return None;
            }
            if slot == ALL {
                has_put_rows_back = true;
                (0..ROWS).for_each(|row| self.put_row_back(row));
                continue;
            }
            budget.looks -= 1;
            #[cfg(test)]
            (self.order.looks += 1);
            let entry = self.slab.hot(slot);
            if entry.is_held() {
                self.set_aside(slot);
            } else if let Some(row) = self.leases.row(entry.lease()) {
                self.set_aside_in(row, slot);
            } else if entry.has(USED) {
                self.move_to_head(slot);
            } else {
                return Some(slot);
            }
        }
    }

    /// Removes an entry from the order of use before it is removed from the index.
    pub(super) fn forget(&mut self, slot: u32) {
        if self.slab.hot(slot).has(ASIDE) && *self.slab.cold_mut(slot).prev.get_mut() != NOT_RELEASED {
            self.put_back_released();
        }
        if !self.slab.hot(slot).has(ASIDE) {
            self.unlink(slot);
        }
    }

    /// Puts an entry at the head of the list.
    pub(super) fn link_newest(&mut self, slot: u32) {
        self.order.in_epoch += 1;
        if self.order.in_epoch * EPOCHS_PER_LIST >= self.table.len() {
            (self.order.epoch, self.order.in_epoch) = (self.order.epoch.wrapping_add(1), 0);
        }
        let (epoch, newest) = (self.order.epoch, self.order.all().newest);
        let entry = self.slab.hot_mut(slot);
        entry.linked_in = epoch;
        entry.clear(USED);
        self.join(slot, newest);
        self.join(ALL, slot);
    }

    /// Empties the stack of released entries. They return to the list in the order in which they were released, except
    /// those that are held again.
    fn put_back_released(&mut self) {
        let (mut slot, mut first) = (std::mem::replace(self.order.released.get_mut(), NIL), NIL);
        while slot != NIL {
            let below = std::mem::replace(self.slab.cold_mut(slot).prev.get_mut(), first);
            (first, slot) = (slot, below);
        }
        while first != NIL {
            let next = std::mem::replace(self.slab.cold_mut(first).prev.get_mut(), NOT_RELEASED);
            let entry = self.slab.hot_mut(first);
            if !entry.is_held() {
                entry.clear(ASIDE);
                self.link_newest(first);
            }
            first = next;
        }
    }

    /// Takes a held entry out of the list.
    fn set_aside(&mut self, slot: u32) {
        self.unlink(slot);
        self.slab.hot(slot).set(ASIDE);
        *self.slab.cold_mut(slot).prev.get_mut() = NOT_RELEASED;
    }

    /// Moves a leased entry from the list of all entries to the list of its row, in which it becomes the newest one.
    fn set_aside_in(&mut self, row: usize, slot: u32) {
        self.unlink(slot);
        let newest = self.order.ends[row + 1].newest;
        self.join(slot, newest);
        self.join(link_of(row + 1), slot);
    }

    /// Moves the list of a row to the end of the list of all entries, which were all used later.
    pub(super) fn put_row_back(&mut self, row: usize) {
        let link = link_of(row + 1);
        let ListEnds { newest, oldest } =
            std::mem::replace(&mut self.order.ends[row + 1], ListEnds { newest: link, oldest: link });
        if newest != link {
            let end = self.order.all().oldest;
            self.join(end, newest);
            self.join(oldest, ALL);
        }
    }

    fn move_to_head(&mut self, slot: u32) {
        self.unlink(slot);
        self.link_newest(slot);
    }

    fn unlink(&mut self, slot: u32) {
        let cold = self.slab.cold_mut(slot);
        let (newer, older) = (*cold.prev.get_mut(), cold.next);
        self.join(newer, older);
    }

    /// Makes two entries neighbours.
    fn join(&mut self, newer: u32, older: u32) {
        match list_of(newer) {
            Some(list) => self.order.ends[list].newest = older,
            None => self.slab.cold_mut(newer).next = older,
        }
        match list_of(older) {
            Some(list) => self.order.ends[list].oldest = newer,
            None => *self.slab.cold_mut(older).prev.get_mut() = newer,
        }
    }
}
