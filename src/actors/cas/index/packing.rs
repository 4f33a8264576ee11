//! The index's part of compression at rest: it selects the blobs to compress, and changes the entry of a compressed
//! blob.

use super::{EntryKind, EntryRef, FileId, FoundEntry, Index, Stamp, Victim, entry::INCOMPRESSIBLE};
use std::sync::atomic::Ordering::Relaxed;

/// Which blobs are worth compressing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ColdBlobs {
    /// The latest recorded use that they may have, in seconds since 1970.
    pub(crate) used_until: u32,
    /// Minimum size of the blobs.
    pub(crate) min_bytes: u64,
}

impl Index {
    /// The blobs to compress in at most `max` slots from `from` on. This does not count as a use. Also returns the slot
    /// to continue from; `None` at the end.
    pub(in super::super) fn cold_from(
        &self,
        cold: ColdBlobs,
        from: u32,
        max: usize,
    ) -> (Vec<FoundEntry>, Option<u32>) {
        let start = (from as usize).min(self.slab.len());
        let end = start.saturating_add(max).min(self.slab.len());
        let found = (start as u32..end as u32).filter(|slot| self.is_cold(*slot, cold));
        let found =
            found.filter_map(|slot| self.at(EntryRef { slot, generation: self.slab.hot(slot).generation }));
        (found.collect(), (end < self.slab.len()).then_some(end as u32))
    }

    fn is_cold(&self, slot: u32, cold: ColdBlobs) -> bool {
        let entry = self.slab.hot(slot);
        entry.generation != 0
            && entry.kind() == EntryKind::Blob
            && entry.touched.load(Relaxed) <= cold.used_until
            && !entry.is_held()
            && !entry.has(super::CONDEMNED | INCOMPRESSIBLE)
            && self.file_at(slot).is_plain()
            && self.slab.key(slot).digest.size() >= cold.min_bytes
    }

    /// The last use of an entry that is recorded, in seconds since 1970, if the entry is still there.
    pub(in super::super) fn last_use(&self, at: EntryRef) -> Option<u32> {
        Some(self.live(at)?.touched.load(Relaxed))
    }

    /// Records that a blob does not get smaller. [`Index::cold_from`] skips it from now on.
    pub(in super::super) fn mark_incompressible(&self, at: EntryRef) {
        if let Some(entry) = self.live(at) {
            entry.set(INCOMPRESSIBLE);
        }
    }

    /// Gives a blob another file, which takes `bytes` and was verified at this stamp. Its place in the order of use and
    /// its leases stay. Returns the old file, which has to be deleted. If the blob is held or has another file by now,
    /// the error is the new file, which has to be deleted instead.
    pub(in super::super) fn repack(
        &mut self,
        from: &FileId,
        to: u64,
        bytes: u64,
        stamp: Stamp,
    ) -> Result<Victim, Victim> {
        let at = self.entry_of(from).filter(|at| !self.slab.hot(at.slot).is_held());
        let Some(EntryRef { slot, .. }) = at else {
            self.count_evicted(bytes);
            return Err(Victim { file: FileId { generation: to, ..*from }, bytes });
        };
        let old = Victim { file: *from, bytes: self.slab.cold(slot).bytes };
        self.count_packed(slot, false);
        let lease = self.slab.hot(slot).lease();
        self.leases.moved(lease, super::leases::NONE, old.bytes, false, &self.unleased_held);
        self.leases.moved(super::leases::NONE, lease, bytes, false, &self.unleased_held);
        self.slab.hot_mut(slot).generation = to;
        let cold = self.slab.cold_mut(slot);
        (cold.bytes, cold.seal) = (bytes, stamp.seal());
        self.totals.used = self.totals.used.saturating_sub(old.bytes).saturating_add(bytes);
        self.count_packed(slot, true);
        self.count_evicted(old.bytes);
        Ok(old)
    }

    /// Adds a packed entry to the totals, or takes it out of them. Does nothing for others.
    pub(super) fn count_packed(&mut self, slot: u32, is_there: bool) {
        if !FileId::is_packed_generation(self.slab.hot(slot).generation) {
            return;
        }
        let (content, used) = (self.slab.key(slot).digest.size(), self.slab.cold(slot).bytes);
        let totals = &mut self.totals;
        for (total, amount) in [
            (&mut totals.packed_blobs, 1),
            (&mut totals.packed_content, content),
            (&mut totals.packed_used, used),
        ] {
            *total = if is_there { total.saturating_add(amount) } else { total.saturating_sub(amount) };
        }
    }
}
