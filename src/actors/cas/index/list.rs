//! The entries of the index, and the list that keeps them in the order of use.

use super::{FileId, Index, Key, Stamp};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};

/// End of a list.
pub(super) const NIL: u32 = u32::MAX;
/// The slab grows by a quarter of its length and by at least this many entries. It never doubles.
pub(super) const MIN_GROWTH: usize = 1_024;
/// Lists shorter than this are kept in the exact order of use.
pub(super) const EXACT_BELOW: usize = 1_024;

/// One entry of the index.
pub(super) struct Entry {
    pub(super) key: Key,
    /// 0 for a free slot, whose `next` is then the next free slot.
    pub(super) generation: u64,
    pub(super) stamp: Stamp,
    pub(super) bytes: u64,
    pub(super) leases: AtomicU32,
    /// Seconds since 1970 of the last use that is recorded on disk.
    pub(super) touched: AtomicU32,
    /// Neighbours in the order of use, newer and older.
    pub(super) prev: u32,
    pub(super) next: u32,
    /// [`Index::links`] when it was last put at the head of the list.
    pub(super) linked_at: u32,
    /// [`Index::links`] when it was last used; `linked_at - 1` if it was not used since then.
    pub(super) used_at: AtomicU32,
    /// Set by [`Index::condemn`]: look-ups no longer find the entry.
    pub(super) condemned: AtomicBool,
}

impl Entry {
    /// An entry that is not in the list yet.
    pub(super) fn new(file: FileId, bytes: u64, stamp: Stamp, touched: u32) -> Self {
        let FileId { key, generation } = file;
        Self {
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
        }
    }

    /// Whether it was used since it was put at the head of the list. The counters wrap: while one entry is not used for days,
    /// others may be moved to the head billions of times. So they are compared for equality only.
    pub(super) fn is_unsettled(&self) -> bool {
        self.used_at.load(Relaxed) != self.linked_at.wrapping_sub(1)
    }

    pub(super) fn is_leased(&self) -> bool {
        self.leases.load(Relaxed) > 0
    }
}

impl Index {
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

    pub(super) fn move_to_head(&mut self, slot: u32) {
        self.unlink(slot);
        self.link_newest(slot);
    }

    pub(super) fn unlink(&mut self, slot: u32) {
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
}
