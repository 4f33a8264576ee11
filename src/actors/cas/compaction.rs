//! Compaction of the volume: bytes of deleted files are reclaimed by copying the live files among them.
//!
//! The volume chooses and copies ([`Volume::compact`]), and the actor gives the entries of the index their new files.
//! Compaction runs in the background at a bounded rate. If the volume has more dead bytes than it may have, deletions
//! are reported only once enough of them are reclaimed. So writers that need the room wait.
//!
//! Bounds: a job compacts at most [`COMPACTIONS_AT_ONCE`] parts. If that does not reclaim enough, for example because
//! the disk has no room for the copies, nothing more is evicted until it does ([`StoreShared::reclaims_in_vain`]).
//! Evicting would only turn live bytes into dead ones. Writers that need room are refused meanwhile.
//!
//! [`Volume::compact`]: super::volume::Volume::compact

use super::{
    CasActor, LOG, StoreShared,
    index::FileId,
    requests::Relocate,
    settings::{
        CHANGES_PER_HOLD, COMPACTION_PAUSE, COMPACTIONS_AT_ONCE, COMPACTIONS_PER_RELIEF, LOOKUPS_PER_HOLD,
    },
    volume::{Compacted, Moves, Urgency},
};
use crate::{actors::mail::Receive, disk::Space, logging::Event};
use actix::{Addr, AsyncContext as _, Context, MessageResult};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    thread,
};

impl CasActor {
    /// Starts to compact the volume in the background, if this is due and not already under way.
    pub(super) fn compact(&self, ctx: &Context<Self>) {
        if self.shared.volume.wants_compaction().is_none() {
            return;
        }
        let Ok(turn) = self.shared.compaction_turn.clone().try_acquire_owned() else { return };
        let (shared, store) = (self.shared.clone(), ctx.address());
        self.shared.runtime.spawn_blocking(move || {
            reclaim(&shared, &store, COMPACTIONS_AT_ONCE, || shared.volume.wants_compaction().is_some());
            drop(turn);
        });
    }
}

/// Reclaims bytes while writers have to wait for this. Blocks.
pub(super) fn reclaim_for_writers(shared: &Arc<StoreShared>, store: &Addr<CasActor>) {
    let _job = ReclaimJob::begin(&shared.reclaiming);
    reclaim(shared, store, COMPACTIONS_AT_ONCE, || do_writers_wait(shared));
    shared.reclaiming.was_in_vain.store(do_writers_wait(shared), Relaxed);
}

fn do_writers_wait(shared: &StoreShared) -> bool {
    shared.volume.wants_compaction() == Some(Urgency::WritersWait)
}

/// The jobs that reclaim bytes for writers.
#[derive(Debug, Default)]
pub(super) struct Reclaiming {
    jobs: AtomicUsize,
    /// Whether the last job to end left more dead bytes than the volume may have.
    was_in_vain: AtomicBool,
}

/// A running job. It ends with the drop.
struct ReclaimJob<'a>(&'a Reclaiming);

impl<'a> ReclaimJob<'a> {
    fn begin(reclaiming: &'a Reclaiming) -> Self {
        reclaiming.jobs.fetch_add(1, Relaxed);
        Self(reclaiming)
    }
}

impl Drop for ReclaimJob<'_> {
    fn drop(&mut self) {
        self.0.jobs.fetch_sub(1, Relaxed);
    }
}

impl StoreShared {
    /// Whether the volume has more dead bytes than it may have, although all jobs that reclaim them have ended.
    pub(super) fn reclaims_in_vain(&self) -> bool {
        let Reclaiming { jobs, was_in_vain } = &self.reclaiming;
        was_in_vain.load(Relaxed) && jobs.load(Relaxed) == 0 && do_writers_wait(self)
    }
}

/// Reclaims a bounded number of bytes while `is_due` holds for the disk. Blocks.
pub(super) fn reclaim_for_disk(shared: &StoreShared, store: &Addr<CasActor>, is_due: fn(&Space) -> bool) {
    let is_due = || shared.volume.space().is_ok_and(|space| is_due(&space));
    reclaim(shared, store, COMPACTIONS_PER_RELIEF, is_due);
}

/// Compacts at most `parts` parts of the volume, while `is_due` holds and there may be more to gain. Blocks.
fn reclaim(shared: &StoreShared, store: &Addr<CasActor>, parts: usize, is_due: impl Fn() -> bool) {
    for _ in 0..parts {
        if !store.connected() || !is_due() || !step(shared, store) {
            return;
        }
    }
}

/// Compacts one part of the volume. Returns whether there may be more to gain. Blocks.
fn step(shared: &StoreShared, store: &Addr<CasActor>) -> bool {
    let mut relocate = |moves: Moves| {
        let copies = moves.moved.len();
        if shared.volume.wants_compaction() != Some(Urgency::WritersWait) {
            // The pause bounds the rate of background work.
            thread::sleep(COMPACTION_PAUSE);
        }
        let accepted = shared.runtime.block_on(store.send(Relocate(moves)));
        // The store is closing, and its index takes no more changes.
        accepted.unwrap_or_else(|_| vec![false; copies])
    };
    match shared.volume.compact(&|files| may_move(shared, files), &mut relocate) {
        Ok(outcome) => outcome == Compacted::Some,
        Err(error) => {
            Event::warn(LOG, "compaction_failed")
                .with_shown("error", &error)
                .log(format_args!("could not reclaim the disk space of deleted blobs; it is tried again"));
            false
        }
    }
}

/// For each of these files, whether an entry has it and may get another one.
pub(super) fn may_move(shared: &StoreShared, files: &[FileId]) -> Vec<bool> {
    let mut answers = Vec::with_capacity(files.len());
    for part in files.chunks(LOOKUPS_PER_HOLD) {
        // This is no use of the entries, so there is no work for the actor.
        let (of_part, _): (Vec<bool>, bool) =
            shared.view.read(None, |look| part.iter().map(|file| look.may_move(file)).collect());
        answers.extend(of_part);
    }
    answers
}

impl Receive<Relocate> for CasActor {
    type Answer = MessageResult<Relocate>;

    fn receive(&mut self, Relocate(moves): Relocate, ctx: &mut Self::Context) -> Self::Answer {
        let mut accepted = Vec::with_capacity(moves.moved.len());
        for part in moves.moved.chunks(CHANGES_PER_HOLD) {
            self.change(|index| {
                accepted.extend(part.iter().map(|(file, generation)| index.relocate(file, *generation)));
            });
        }
        let lost = self.change(|index| {
            let entries: Vec<_> = moves.lost.iter().filter_map(|file| index.entry_of(file)).collect();
            entries.into_iter().filter_map(|at| index.remove_damaged(at)).collect::<Vec<_>>()
        });
        for victim in &lost {
            Event::warn(LOG, "blob_damaged").with_shown("digest", &victim.file.key.digest).log(format_args!(
                "dropped a stored {:?}: it was found damaged when it was to be moved",
                victim.file.key.kind
            ));
        }
        self.delete(lost, ctx);
        MessageResult(accepted)
    }
}
