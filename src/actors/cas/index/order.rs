//! The order of use: a list of entries, the most recently used first.
//!
//! A leased entry needs no place in the list. An eviction that finds one sets it aside, so later evictions do not look at it
//! again, however many entries are leased. The end of its last lease is a use and returns it to the head of the list.
//! [`Index::settle`] does this for the entries that readers report to the actor. Readers need not report all of them: they also
//! put each such entry on a stack, which is emptied before the next eviction.

use super::{EXACT_BELOW, Entry, EntryRef, Index, NIL};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

/// The entry is not on the stack of released entries.
const NOT_RELEASED: u32 = NIL - 1;

/// The state of an entry that is not in the list.
#[derive(Debug)]
pub(super) struct Aside {
    /// Whether an eviction has set it aside because it was leased. Only the owner of the index changes this.
    is_aside: bool,
    /// The next entry on the stack of released entries, [`NIL`] for the last one.
    below: AtomicU32,
}

impl Default for Aside {
    fn default() -> Self {
        Self { is_aside: false, below: AtomicU32::new(NOT_RELEASED) }
    }
}

/// The top of the stack of released entries. Readers push entries while they share the index, and its owner takes all of them.
#[derive(Debug)]
pub(super) struct Released(AtomicU32);

impl Default for Released {
    fn default() -> Self {
        Self(AtomicU32::new(NIL))
    }
}

impl Index {
    /// Moves a used entry to the head of the list, unless that is already done.
    pub(in super::super) fn settle(&mut self, at: EntryRef) {
        let Some(entry) = self.live(at) else { return };
        if entry.aside.is_aside {
            self.put_back(at.slot);
        } else if entry.is_unsettled() {
            self.move_to_head(at.slot);
        }
    }

    /// Records the end of the last lease of an entry. Returns whether the entry needs [`Index::settle`].
    pub(super) fn mark_released(&self, slot: u32, entry: &Entry) -> bool {
        if !entry.aside.is_aside {
            return self.mark_used(entry);
        }
        let Released(top) = &self.released;
        let mut below = top.load(Relaxed);
        // It may already be on the stack from an earlier lease.
        if entry.aside.below.compare_exchange(NOT_RELEASED, below, Relaxed, Relaxed).is_ok() {
            while let Err(changed) = top.compare_exchange_weak(below, slot, Relaxed, Relaxed) {
                below = changed;
                entry.aside.below.store(below, Relaxed);
            }
        }
        true
    }

    /// Marks an entry as used, unless it is recent enough in the list. Returns whether the mark is new.
    pub(super) fn mark_used(&self, entry: &Entry) -> bool {
        // At most `behind` entries are newer. In a short list even the newest entry is marked, because others that were used
        // before it may be about to move ahead of it.
        let behind = self.links.wrapping_sub(entry.linked_at) as usize;
        let is_new = self.table.len() >= EXACT_BELOW && behind < self.table.len() / 4;
        if is_new || entry.used_at.load(Relaxed) == self.links {
            return false;
        }
        entry.used_at.store(self.links, Relaxed);
        true
    }

    /// The least recently used entry that is not leased. Older entries that are leased are set aside, and those whose use is not
    /// settled yet move to the head of the list. So each lease and each use costs one look, and one pass sees every candidate.
    pub(super) fn oldest_evictable(&mut self) -> Option<u32> {
        self.put_back_released();
        if self.totals.used == self.leased.load(Relaxed) {
            return None;
        }
        for _ in 0..=self.table.len() {
            let slot = self.oldest;
            let entry = self.entries.get(slot as usize)?;
            #[cfg(test)]
            (self.looks += 1);
            if entry.is_leased() {
                self.unlink(slot);
                self.entries[slot as usize].aside.is_aside = true;
            } else if entry.is_unsettled() {
                self.move_to_head(slot);
            } else {
                return Some(slot);
            }
        }
        None
    }

    /// Removes an entry from the order of use before it is removed from the index.
    pub(super) fn forget(&mut self, slot: u32) {
        let aside = &self.entries[slot as usize].aside;
        if aside.below.load(Relaxed) != NOT_RELEASED {
            self.put_back_released();
        }
        if !self.entries[slot as usize].aside.is_aside {
            self.unlink(slot);
        }
    }

    /// Puts an entry at the head of the list.
    pub(super) fn link_newest(&mut self, slot: u32) {
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

    /// Empties the stack of released entries.
    fn put_back_released(&mut self) {
        let mut slot = std::mem::replace(self.released.0.get_mut(), NIL);
        while slot != NIL {
            let below = self.entries[slot as usize].aside.below.get_mut();
            let next = std::mem::replace(below, NOT_RELEASED);
            self.put_back(slot);
            slot = next;
        }
    }

    /// Returns an entry that was set aside to the list, unless it is leased.
    fn put_back(&mut self, slot: u32) {
        let entry = &mut self.entries[slot as usize];
        if entry.aside.is_aside && !entry.is_leased() {
            entry.aside.is_aside = false;
            self.link_newest(slot);
        }
    }

    fn move_to_head(&mut self, slot: u32) {
        self.unlink(slot);
        self.link_newest(slot);
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
}
