//! [`Entry`]: what the index keeps of one stored file.

use super::{FileId, Key, Stamp, order::Aside};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};

/// End of a list.
pub(super) const NIL: u32 = u32::MAX;

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
    pub(super) aside: Aside,
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
            aside: Aside::default(),
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
