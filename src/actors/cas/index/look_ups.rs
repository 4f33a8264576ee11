//! Look-ups. None of them needs exclusive access.

use super::{
    EntryKind, EntryRef, FileId, FoundEntry, FoundResult, Index, Key, NotedUse, Seal,
    entry::{CONDEMNED, Hot},
};
use crate::instance::InstanceId;
use gorego_reapi::digest::Digest;
use std::sync::atomic::Ordering::Relaxed;

impl Index {
    /// Looks an entry up and counts it as used at `now` (seconds since 1970).
    pub(in super::super) fn renew(&self, key: &Key, now: u32) -> Option<FoundEntry> {
        self.slot_of(key).map(|slot| self.renew_slot(slot, now))
    }

    /// Like [`Index::renew`], for a caller that needs to know only whether the entry is there.
    pub(in super::super) fn note_use(&self, key: &Key, now: u32) -> Option<NotedUse> {
        self.slot_of(key).map(|slot| self.use_slot(slot, self.slab.hot(slot), now))
    }

    /// Finds an entry. This does not count as a use.
    pub(in super::super) fn place_of(&self, key: &Key) -> Option<EntryRef> {
        let slot = self.slot_of(key)?;
        Some(EntryRef { slot, generation: self.slab.hot(slot).generation })
    }

    /// The entry at a place, if it is still there. This does not count as a use.
    pub(in super::super) fn at(&self, at: EntryRef) -> Option<FoundEntry> {
        self.live(at)?;
        Some(self.found(NotedUse { at, touch_due: false, settle_due: false }))
    }

    /// The digest of the newest entry whose key equals `like` apart from the size. This does not count as a use.
    pub(in super::super) fn find_by_hash(&self, like: &Key) -> Option<Digest> {
        let newest = self.alike(like).max_by_key(|slot| self.slab.hot(*slot).generation)?;
        Some(self.slab.key(newest).digest)
    }

    /// The results of these namespaces in at most `max` slots from `from` on. This does not count as a use. Also
    /// returns the slot to continue from; `None` at the end. An entry keeps its slot until it is removed, and the
    /// result that replaces it has the same slot.
    pub(in super::super) fn results_from(
        &self,
        instances: [InstanceId; 2],
        from: u32,
        max: usize,
    ) -> (Vec<FoundResult>, Option<u32>) {
        let start = (from as usize).min(self.slab.len());
        let end = start.saturating_add(max).min(self.slab.len());
        let is_one = |slot: &u32| {
            let entry = self.slab.hot(*slot);
            entry.generation != 0
                && entry.kind() == EntryKind::Result
                && instances.contains(&entry.instance())
                && !entry.has(CONDEMNED)
        };
        let found = (start as u32..end as u32).filter(is_one).map(|slot| {
            let file = self.file_at(slot);
            FoundResult { at: EntryRef { slot, generation: file.generation }, file }
        });
        (found.collect(), (end < self.slab.len()).then_some(end as u32))
    }

    /// The result that has the key of this file now, in the same file or in another one. This does not count as a use.
    pub(in super::super) fn result_of(&self, file: &FileId) -> Option<FoundResult> {
        let slot = self.slot_of(&file.key)?;
        let file = self.file_at(slot);
        Some(FoundResult { at: EntryRef { slot, generation: file.generation }, file })
    }

    pub(in super::super) fn entry_of(&self, file: &FileId) -> Option<EntryRef> {
        let at = EntryRef { slot: self.slot_of(&file.key)?, generation: file.generation };
        self.live(at).map(|_| at)
    }

    /// The stamp of an entry that is still there.
    pub(in super::super) fn stamp(&self, at: EntryRef) -> Option<Seal> {
        self.live(at).map(|_| self.slab.cold(at.slot).seal)
    }

    /// The slots of entries whose key equals `like` apart from the size of the digest.
    pub(super) fn alike(&self, like: &Key) -> impl Iterator<Item = u32> {
        let is_one = |slot: &u32| {
            let entry = self.slab.hot(*slot);
            entry.is_like(like, &self.slab.tails) && !entry.has(CONDEMNED)
        };
        self.table.like(like).filter(is_one)
    }

    pub(super) fn slot_of(&self, key: &Key) -> Option<u32> {
        self.table.find(key, |slot| {
            let entry = self.slab.hot(slot);
            entry.is(key, &self.slab.tails) && !entry.has(CONDEMNED)
        })
    }

    pub(super) fn live(&self, at: EntryRef) -> Option<&Hot> {
        self.slab.get(at.slot).filter(|entry| entry.generation == at.generation)
    }

    pub(super) fn file_at(&self, slot: u32) -> FileId {
        FileId { key: self.slab.key(slot), generation: self.slab.hot(slot).generation }
    }

    pub(super) fn renew_slot(&self, slot: u32, now: u32) -> FoundEntry {
        self.found(self.use_slot(slot, self.slab.hot(slot), now))
    }

    pub(super) fn use_slot(&self, slot: u32, entry: &Hot, now: u32) -> NotedUse {
        let settle_due = self.mark_used(entry);
        let touched = entry.touched.load(Relaxed);
        let touch_due = now.saturating_sub(touched) > Self::TOUCH_AFTER_SECS
            && entry.touched.compare_exchange(touched, now, Relaxed, Relaxed).is_ok();
        NotedUse { at: EntryRef { slot, generation: entry.generation }, touch_due, settle_due }
    }

    /// The entry that a look-up has used.
    pub(super) fn found(&self, NotedUse { at, touch_due, settle_due }: NotedUse) -> FoundEntry {
        let stamp = self.slab.cold(at.slot).seal;
        FoundEntry { at, file: self.file_at(at.slot), stamp, touch_due, settle_due }
    }
}
