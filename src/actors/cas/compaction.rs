//! Compaction of the volume: bytes of deleted files are reclaimed by copying the live files among them.
//!
//! The volume chooses and copies ([`Volume::compact`]), and the actor gives the entries of the index their new files.
//! Compaction runs in the background at a bounded rate. If the volume has more dead bytes than it may have, deletions
//! are reported only once enough of them are reclaimed. So writers that need the room wait.
//!
//! Bounds: a job compacts at most [`COMPACTIONS_AT_ONCE`] parts. A job for writers may reclaim nothing, for example
//! because the disk has no room for the copies. Then nothing is evicted for writers until something is reclaimed
//! ([`StoreShared::reclaims_in_vain`]), because that would only turn live bytes into dead ones. Writers that find no
//! room are refused meanwhile.
//!
//! [`Volume::compact`]: super::volume::Volume::compact

use super::{
    CasActor, LOG, StoreShared,
    index::FileId,
    settings::{
        CHANGES_PER_HOLD, COMPACTION_FAILURES, COMPACTION_PAUSE, COMPACTIONS_AT_ONCE, COMPACTIONS_PER_RELIEF,
        LOOKUPS_PER_HOLD,
    },
    volume::{Compacted, Moves, Urgency},
};
use crate::{actors::mail::Receive, disk::Space, logging::Event};
use actix::{Addr, AsyncContext as _, Context, Message, MessageResult};
use std::{
    io,
    sync::{Arc, atomic::Ordering::Relaxed},
    thread,
};

/// Fact: compaction has copied files. The answer says for each copy whether it took the place of its original.
/// Originals that turned out to be damaged are dropped.
#[derive(Message)]
#[rtype(result = "Vec<bool>")]
pub(super) struct Relocate(pub Moves);

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
    let has_reclaimed = reclaim(shared, store, COMPACTIONS_AT_ONCE, || do_writers_wait(shared));
    if !has_reclaimed && do_writers_wait(shared) {
        shared.reclaims_nothing.store(true, Relaxed);
    }
}

fn do_writers_wait(shared: &StoreShared) -> bool {
    shared.volume.wants_compaction() == Some(Urgency::WritersWait)
}

impl StoreShared {
    /// Whether the volume has more dead bytes than it may have, and the last job for writers has reclaimed nothing.
    pub(super) fn reclaims_in_vain(&self) -> bool {
        self.reclaims_nothing.load(Relaxed) && do_writers_wait(self)
    }
}

/// Reclaims a bounded number of bytes while `is_due` holds for the disk. Blocks.
pub(super) fn reclaim_for_disk(shared: &StoreShared, store: &Addr<CasActor>, is_due: fn(&Space) -> bool) {
    let is_due = || shared.volume.space().is_ok_and(|space| is_due(&space));
    reclaim(shared, store, COMPACTIONS_PER_RELIEF, is_due);
}

/// Compacts at most `parts` parts of the volume, while `is_due` holds and there may be more to gain. Returns whether it
/// has reclaimed any. Blocks.
fn reclaim(shared: &StoreShared, store: &Addr<CasActor>, parts: usize, is_due: impl Fn() -> bool) -> bool {
    let (mut has_reclaimed, mut failures) = (false, 0);
    for _ in 0..parts {
        if !store.connected() || failures == COMPACTION_FAILURES {
            break;
        }
        if !is_due() {
            break;
        }
        match step(shared, store) {
            Ok(Compacted::Reclaimed) => {
                has_reclaimed = true;
                shared.reclaims_nothing.store(false, Relaxed);
            }
            Ok(Compacted::Kept) => {}
            Ok(Compacted::NothingToGain) => break,
            Err(error) => {
                failures += 1;
                Event::warn(LOG, "compaction_failed").with_shown("error", &error).log(format_args!(
                    "could not reclaim the disk space of deleted blobs; it is tried again"
                ));
            }
        }
    }
    if !do_writers_wait(shared) {
        shared.reclaims_nothing.store(false, Relaxed);
    }
    has_reclaimed
}

/// Compacts one part of the volume. Blocks.
///
/// # Errors
/// The errors of the file system.
fn step(shared: &StoreShared, store: &Addr<CasActor>) -> io::Result<Compacted> {
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
    shared.volume.compact(&|files| may_move(shared, files), &mut relocate)
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
