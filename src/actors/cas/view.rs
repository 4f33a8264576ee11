//! [`View`]: the index as every thread may read it.
//!
//! [`super::CasActor`] is the only one that adds, removes or promises anything. Look-ups of blobs and results need none of
//! that, so they read the index where they are and cost no message. What a look-up finds is counted as used, or leased, in
//! the entry itself; an eviction checks that before it removes anything, so nothing goes between "it is stored" and its lease.
//!
//! Bounds: a reader holds the lock for [`LOOKUPS_PER_HOLD`] entries, so the actor waits some 50 us for it at most.
//! [`NOTES_MAX`] notes are kept for the actor; of those that find no room, a use keeps its mark in the index, and a recency
//! that is not written down costs a place in the order after the next start.

use super::{
    index::{EntryRef, Found, Index, Key, Kind, Stamp},
    settings::{LOOKUPS_PER_HOLD, NOTES_BATCH, NOTES_MAX},
    unix_seconds,
};
use crate::instance::InstanceId;
use gorego_reapi::digest::Digest;
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

/// What look-ups leave for the actor to do.
#[derive(Debug, Default)]
struct Notes {
    /// Entries whose place in the order of use is out of date.
    unsettled: Vec<EntryRef>,
    /// Files whose use is to be written down.
    touches: Vec<Found>,
}

/// The index, shared by its owner with those who look things up.
#[derive(Debug)]
pub(crate) struct View {
    index: RwLock<Index>,
    notes: Mutex<Notes>,
}

impl View {
    pub(super) fn new(index: Index) -> Self {
        Self { index: RwLock::new(index), notes: Mutex::default() }
    }

    /// Changes the index; for the actor alone. Uses are settled first. The lock is held by `change` and by nothing after it, so that
    /// no two changes can meet in one expression.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut Index) -> T) -> T {
        // A panic elsewhere leaves the index whole: its operations do not panic halfway.
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        let unsettled = std::mem::take(&mut self.notes().unsettled);
        for at in unsettled {
            index.settle(at);
        }
        change(&mut index)
    }

    /// Looks up what takes moments, under one hold of the lock. Returns also whether there is work for the actor.
    pub(super) fn read<T>(&self, look: impl FnOnce(&mut LookUp<'_>) -> T) -> (T, bool) {
        let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
        let mut look_up = LookUp { index, now: unix_seconds(), notes: Notes::default() };
        let answer = look(&mut look_up);
        let LookUp { index, notes, .. } = look_up;
        drop(index);
        (answer, self.note(notes))
    }

    /// Ends leases. Returns whether there is work for the actor.
    pub(super) fn release(&self, entries: Vec<EntryRef>) -> bool {
        let mut unsettled = Vec::new();
        for part in entries.chunks(LOOKUPS_PER_HOLD) {
            let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
            unsettled.extend(part.iter().filter(|at| index.release(**at)));
        }
        self.note(Notes { unsettled, touches: Vec::new() })
    }

    /// Hides an entry whose file is not what it should be, until the actor removes it.
    pub(super) fn condemn(&self, at: EntryRef) {
        self.index.read().unwrap_or_else(PoisonError::into_inner).condemn(at);
    }

    /// Files whose use is to be written down now.
    pub(super) fn take_touches(&self) -> Vec<Found> {
        std::mem::take(&mut self.notes().touches)
    }

    /// Keeps notes for the actor. True once for each batch of them.
    fn note(&self, new: Notes) -> bool {
        if new.unsettled.is_empty() && new.touches.is_empty() {
            return false;
        }
        let mut notes = self.notes();
        append(&mut notes.unsettled, new.unsettled) | append(&mut notes.touches, new.touches)
    }

    fn notes(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Adds what there is room for. True if that completes a batch.
fn append<T>(notes: &mut Vec<T>, mut new: Vec<T>) -> bool {
    let before = notes.len();
    new.truncate(NOTES_MAX.saturating_sub(before));
    notes.append(&mut new);
    before / NOTES_BATCH < notes.len() / NOTES_BATCH
}

/// A few questions to the index, at one moment.
pub(super) struct LookUp<'a> {
    index: RwLockReadGuard<'a, Index>,
    now: u32,
    notes: Notes,
}

impl LookUp<'_> {
    /// Looks an entry up and counts it as used now.
    pub(super) fn renew(&mut self, key: &Key) -> Option<Found> {
        let found = self.index.renew(key, self.now)?;
        Some(self.noted(found))
    }

    /// [`LookUp::renew`] of a blob.
    pub(super) fn renew_blob(&mut self, instance: InstanceId, digest: Digest) -> Option<Found> {
        self.renew(&Key { digest, instance, kind: Kind::Blob })
    }

    /// Looks an entry up, counts it as used now, and keeps it from eviction until [`View::release`].
    pub(super) fn lease(&mut self, key: &Key) -> Option<Found> {
        let found = self.index.lease(key, self.now)?;
        Some(self.noted(found))
    }

    /// The stamp of an entry that is still there.
    pub(super) fn stamp(&self, at: EntryRef) -> Option<Stamp> {
        self.index.stamp(at)
    }

    /// [`Index::find_by_hash`].
    pub(super) fn find_by_hash(&self, like: &Key) -> Option<Digest> {
        self.index.find_by_hash(like)
    }

    fn noted(&mut self, found: Found) -> Found {
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
    use crate::actors::cas::index::FileId;
    use gorego_reapi::digest::DigestFunction;
    use std::{
        sync::atomic::{AtomicBool, Ordering},
        thread,
    };

    /// Look-ups on two threads against an owner that evicts as fast as it can: what was leased is there until it is released, and
    /// the sums come out even.
    #[test]
    fn what_is_leased_beside_a_busy_owner_stays() {
        const ENTRIES: u64 = 64;
        let key = |name: u64| Key {
            digest: DigestFunction::Sha256.digest(&name.to_le_bytes()),
            instance: InstanceId(0),
            kind: Kind::Blob,
        };
        let view = View::new(Index::new(ENTRIES));
        let (view, is_over) = (&view, &AtomicBool::new(false));
        thread::scope(|scope| {
            for reader in 0..2u64 {
                scope.spawn(move || {
                    for round in 0..20_000u64 {
                        let name = (round * 7 + reader * 13) % (2 * ENTRIES);
                        let (found, _) = view.read(|look| look.lease(&key(name)));
                        let Some(found) = found else { continue };
                        let (stamp, _) = view.read(|look| look.stamp(found.at));
                        assert_eq!(stamp, Some(found.stamp), "a leased entry is still there");
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
        assert_eq!((totals.leased, totals.used <= ENTRIES), (0, true), "{totals:?}");
    }
}
