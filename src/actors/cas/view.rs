//! [`View`]: the index, readable from every thread.
//!
//! Only [`super::CasActor`] adds, removes or reserves. Look-ups of blobs and results do none of that, so they read the
//! index directly and cost no message. A look-up marks the use or the hold in the entry itself, and an eviction checks
//! this mark before it removes anything. So an entry that was found cannot disappear before it is held.
//!
//! Bounds: a reader holds the lock for at most [`LOOKUPS_PER_HOLD`] entries, so the actor waits about 50 us for it. The
//! actor holds it for about [`CHANGES_PER_HOLD`], except when the index grows. At most [`NOTES_MAX`] notes are kept for
//! the actor. If a note is dropped, the use is still marked in the index; only the order of use after the next start
//! may suffer.

use super::{
    index::{
        ColdBlobs, EntryKind, EntryRef, FileId, FoundEntry, FoundResult, Index, Key, Lessee, NotedUse, Seal,
    },
    numbers::StoreMeasurement,
    settings::{CHANGES_PER_HOLD, LOOKUPS_PER_HOLD, NOTES_BATCH, NOTES_MAX},
    unix_seconds, uptime_seconds,
};
use crate::{
    caller::Owner,
    instance::{Instance, InstanceId},
};
use gorego_reapi::digest::Digest;
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Work that look-ups leave for the actor.
#[derive(Debug, Default)]
struct LookUpNotes {
    /// Entries whose place in the order of use is out of date.
    unsettled: Vec<EntryRef>,
    /// Files whose use is to be written to disk.
    touches: Vec<FoundEntry>,
}

/// The index behind a lock, and the notes of its readers for the actor.
#[derive(Debug)]
pub(crate) struct View {
    index: RwLock<Index>,
    notes: Mutex<LookUpNotes>,
}

impl View {
    pub(super) fn new(index: Index) -> Self {
        Self { index: RwLock::new(index), notes: Mutex::default() }
    }

    /// Changes the index; only the actor may call it. Noted uses are settled first. The lock is released when `change`
    /// returns, so two changes in one expression cannot deadlock.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut Index) -> T) -> T {
        let unsettled = std::mem::take(&mut self.notes().unsettled);
        let mut rest = unsettled.as_slice();
        while let Some((part, after)) = rest.split_at_checked(CHANGES_PER_HOLD) {
            let mut index = self.write();
            part.iter().for_each(|at| index.settle(*at));
            rest = after;
        }
        let mut index = self.write();
        rest.iter().for_each(|at| index.settle(*at));
        change(&mut index)
    }

    /// The numbers of the index. Waits at most for the change of one part.
    pub(super) fn measure(&self) -> StoreMeasurement {
        let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
        StoreMeasurement {
            totals: index.totals(),
            tally: index.tally(),
            oldest_use: index.oldest_use(),
            index_bytes: index.memory() as u64,
            ..StoreMeasurement::default()
        }
    }

    fn write(&self) -> RwLockWriteGuard<'_, Index> {
        // A panic elsewhere leaves the index intact, because its operations do not panic halfway.
        self.index.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs short look-ups under one hold of the lock. Entries that they find are leased to the build, if there is one.
    /// Also returns whether there is work for the actor.
    pub(super) fn read<T>(&self, build: Option<Owner>, look: impl FnOnce(&mut LookUp<'_>) -> T) -> (T, bool) {
        let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
        let now = unix_seconds();
        let lessee = build.and_then(|build| index.enter(build, uptime_seconds()));
        let mut look_up = LookUp { index, now, lessee, notes: LookUpNotes::default() };
        let answer = look(&mut look_up);
        let LookUp { index, notes, .. } = look_up;
        drop(index);
        (answer, self.note(notes))
    }

    /// Ends holds. Returns whether there is work for the actor.
    pub(super) fn release(&self, entries: Vec<EntryRef>) -> bool {
        let mut unsettled = Vec::new();
        for part in entries.chunks(LOOKUPS_PER_HOLD) {
            let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
            unsettled.extend(part.iter().filter(|at| index.release(**at)));
        }
        self.note(LookUpNotes { unsettled, touches: Vec::new() })
    }

    /// Hides an entry whose file is damaged, until the actor removes it.
    pub(super) fn condemn(&self, at: EntryRef) {
        self.index.read().unwrap_or_else(PoisonError::into_inner).condemn(at);
    }

    /// Takes out the files whose use is to be written to disk now.
    pub(super) fn take_touches(&self) -> Vec<FoundEntry> {
        std::mem::take(&mut self.notes().touches)
    }

    /// Keeps notes for the actor. Returns true once per batch.
    fn note(&self, new: LookUpNotes) -> bool {
        if new.unsettled.is_empty() && new.touches.is_empty() {
            return false;
        }
        let mut notes = self.notes();
        append(&mut notes.unsettled, new.unsettled) | append(&mut notes.touches, new.touches)
    }

    fn notes(&self) -> MutexGuard<'_, LookUpNotes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Adds as many notes as there is room for. Returns true if that completes a batch.
fn append<T>(notes: &mut Vec<T>, mut new: Vec<T>) -> bool {
    let before = notes.len();
    new.truncate(NOTES_MAX.saturating_sub(before));
    notes.append(&mut new);
    before / NOTES_BATCH < notes.len() / NOTES_BATCH
}

/// A consistent series of look-ups, made while the lock is held.
pub(super) struct LookUp<'a> {
    index: RwLockReadGuard<'a, Index>,
    now: u32,
    lessee: Option<Lessee>,
    notes: LookUpNotes,
}

impl LookUp<'_> {
    /// Looks an entry up and counts it as used now.
    pub(super) fn renew(&mut self, key: &Key) -> Option<FoundEntry> {
        let found = self.index.renew(key, self.now)?;
        Some(self.noted(found))
    }

    /// Whether a blob is stored; if so, counts it as used now.
    pub(super) fn has_blob(&mut self, instance: InstanceId, digest: Digest) -> bool {
        let key = Key { digest, instance, kind: EntryKind::Blob };
        let Some(NotedUse { at, touch_due, settle_due }) = self.index.note_use(&key, self.now) else {
            return false;
        };
        self.lease(at);
        if settle_due {
            self.notes.unsettled.push(at);
        }
        if touch_due {
            self.notes.touches.extend(self.index.at(at));
        }
        true
    }

    /// Like [`LookUp::renew`], for a blob.
    pub(super) fn renew_blob(&mut self, instance: InstanceId, digest: Digest) -> Option<FoundEntry> {
        self.renew(&Key { digest, instance, kind: EntryKind::Blob })
    }

    /// Looks an entry up, counts it as used now, and keeps it from eviction until [`View::release`].
    pub(super) fn hold(&mut self, key: &Key) -> Option<FoundEntry> {
        let found = self.index.hold(key, self.now)?;
        Some(self.noted(found))
    }

    /// Whether there is an entry with this key. This does not count as a use.
    pub(super) fn has(&self, key: &Key) -> bool {
        self.index.place_of(key).is_some()
    }

    /// Finds a blob. This does not count as a use.
    pub(super) fn place_of_blob(&self, instance: InstanceId, digest: Digest) -> Option<EntryRef> {
        let key = Key { digest, instance, kind: EntryKind::Blob };
        self.index.place_of(&key)
    }

    /// The entry that has this file. This does not count as a use.
    pub(super) fn entry_of(&self, file: &FileId) -> Option<FoundEntry> {
        self.index.at(self.index.entry_of(file)?)
    }

    /// See [`Index::may_move`].
    pub(super) fn may_move(&self, file: &FileId) -> bool {
        self.index.may_move(file)
    }

    /// See [`Index::linked`].
    pub(super) fn linked(&self, at: EntryRef) -> Option<Vec<Digest>> {
        self.index.linked(at)
    }

    /// See [`Index::can_lease`].
    pub(super) fn can_lease(&self, bytes: u64) -> bool {
        self.index.can_lease(bytes)
    }

    /// Whether builds have leases and this many more bytes cannot be leased.
    pub(super) fn lacks_leases(&self, bytes: u64) -> bool {
        self.lessee.is_some() && !self.can_lease(bytes)
    }

    /// See [`Index::unleased_bytes`].
    pub(super) fn unleased_bytes(&self, instance: InstanceId, blobs: &[Digest]) -> u64 {
        self.index.unleased_bytes(blobs.iter().map(|&digest| Key { digest, instance, kind: EntryKind::Blob }))
    }

    /// See [`Index::results_from`].
    pub(super) fn results_from(&self, instance: &Instance, from: u32) -> (Vec<FoundResult>, Option<u32>) {
        let private = instance.private_results().unwrap_or(instance.id());
        self.index.results_from([instance.id(), private], from, LOOKUPS_PER_HOLD)
    }

    /// The result that has the key of this file now. This does not count as a use.
    pub(super) fn result_of(&self, file: &FileId) -> Option<FoundResult> {
        self.index.result_of(file)
    }

    /// See [`Index::cold_from`].
    pub(super) fn cold_from(&self, cold: ColdBlobs, from: u32) -> (Vec<FoundEntry>, Option<u32>) {
        self.index.cold_from(cold, from, LOOKUPS_PER_HOLD)
    }

    /// See [`Index::last_use`].
    pub(super) fn last_use(&self, at: EntryRef) -> Option<u32> {
        self.index.last_use(at)
    }

    /// See [`Index::mark_incompressible`].
    pub(super) fn mark_incompressible(&self, at: EntryRef) {
        self.index.mark_incompressible(at);
    }

    /// Whether this many bytes can be stored without evicting anything.
    pub(super) fn has_room(&self, bytes: u64) -> bool {
        self.index.has_room(bytes)
    }

    /// The stamp of an entry, if it is still there.
    pub(super) fn stamp(&self, at: EntryRef) -> Option<Seal> {
        self.index.stamp(at)
    }

    /// See [`Index::find_by_hash`].
    pub(super) fn find_by_hash(&self, like: &Key) -> Option<Digest> {
        self.index.find_by_hash(like)
    }

    fn lease(&self, at: EntryRef) {
        if let Some(lessee) = self.lessee {
            self.index.lease(at, lessee);
        }
    }

    fn noted(&mut self, found: FoundEntry) -> FoundEntry {
        self.lease(found.at);
        if found.settle_due {
            self.notes.unsettled.push(found.at);
        }
        if found.touch_due {
            self.notes.touches.push(found);
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::actors::cas::index::{FileId, Stamp};
    use gorego_reapi::digest::DigestFunction;
    use std::{
        sync::atomic::{AtomicBool, Ordering},
        thread,
    };

    /// Two threads look entries up while the owner evicts as fast as it can. A held entry stays until it is released,
    /// and the totals balance at the end.
    #[test]
    fn a_held_entry_stays_while_the_owner_evicts() {
        const ENTRIES: u64 = 64;
        let key = |name: u64| Key {
            digest: DigestFunction::Sha256.digest(&name.to_le_bytes()),
            instance: InstanceId(0),
            kind: EntryKind::Blob,
        };
        let view = View::new(Index::new(ENTRIES));
        let (view, is_over) = (&view, &AtomicBool::new(false));
        thread::scope(|scope| {
            for reader in 0..2u64 {
                scope.spawn(move || {
                    for round in 0..20_000u64 {
                        let name = (round * 7 + reader * 13) % (2 * ENTRIES);
                        let (found, _) = view.read(None, |look| look.hold(&key(name)));
                        let Some(found) = found else { continue };
                        let (stamp, _) = view.read(None, |look| look.stamp(found.at));
                        assert_eq!(stamp, Some(found.stamp), "a held entry is still there");
                        view.release(vec![found.at]);
                    }
                    is_over.store(true, Ordering::Relaxed);
                });
            }
            let mut generation = 0;
            while !is_over.load(Ordering::Relaxed) {
                generation += 1;
                view.change(|index| {
                    if index.reserve(1).is_ok() {
                        let file = FileId { key: key(generation % (2 * ENTRIES)), generation };
                        let superfluous = index.commit(file, 1, Stamp::new(generation, 0), 0);
                        index.deleted(u64::from(superfluous.is_some()));
                    }
                });
            }
        });
        let totals = view.change(|index| index.totals());
        assert_eq!((totals.held, totals.used <= ENTRIES), (0, true), "{totals:?}");
    }
}
