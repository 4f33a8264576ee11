//! Relief of a full disk: the store evicts its least recently used entries when actions find no disk space, or uploads
//! soon would not, even if it is within its own limit. [`crate::disk::Space::relief`] says how much to evict. Data that
//! other modules keep on disk only for speed is removed first ([`Cas::relieve_first`]), and then the remaining bytes of
//! deleted blobs are reclaimed.
//!
//! Leases of builds do not withstand a full disk: the build that has most loses its oldest leases first. An evicted
//! entry that was leased counts as a broken promise.
//!
//! Bounds: one relief at a time, at most [`settings::RELIEF_BATCH`] entries, a wait of at most
//! [`settings::RELIEF_WAIT`]. If evicting half of the store would not help, because other data fills the disk, nothing
//! is evicted.

use super::{
    CasActor, LOG, client::Cas, compaction, index::Totals, reply::StoreReply, settings, upkeep::in_parts,
};
use crate::{
    actors::mail::Receive,
    disk::{Evictable, Space},
    logging::Event,
};
use actix::{Context, Message};
use std::sync::OnceLock;

/// Evicts as much as the disk needs. The answer comes when the files are deleted.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Relieve(pub Space);

/// The action that frees disk space before the store evicts.
#[derive(Default)]
pub(super) struct RelievedFirst(OnceLock<Box<dyn Fn() + Send + Sync>>);

impl std::fmt::Debug for RelievedFirst {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("RelievedFirst").field(&self.0.get().is_some()).finish()
    }
}

impl Cas {
    /// Frees disk space after an action failed for lack of it. Called from a worker thread. Blocks until the space is
    /// free or the action is cancelled, for a bounded time.
    pub fn relieve_disk(&self, is_cancelled: &dyn Fn() -> bool) {
        // This handle does the file work on a blocking thread. On this thread, the work could neither wait for the
        // actor nor be cut short.
        self.shared().runtime.block_on(async {
            let cancelled = async {
                while !is_cancelled() {
                    tokio::time::sleep(settings::RELIEF_POLL).await;
                }
            };
            tokio::select! {
                () = self.relieve(|_| true) => {}
                () = cancelled => {}
            }
        });
    }

    /// Sets the action that frees disk space before the store evicts anything. It may block, and is called while the
    /// disk is low. Only the first call has an effect.
    pub fn relieve_first(&self, others: impl Fn() + Send + Sync + 'static) {
        let _ = self.shared().relieved_first.0.set(Box::new(others));
    }

    /// Frees disk space if there is little left.
    pub(super) async fn relieve_low_disk(&self) {
        self.relieve(Space::is_low).await;
    }

    async fn relieve(&self, is_due: fn(&Space) -> bool) {
        let relieved = async {
            // A second caller waits here and then re-checks the disk.
            let turn = self.shared().relief_turn.clone().lock_owned().await;
            let cas = self.clone();
            let look = move || {
                let space = cas.shared().volume.space()?;
                if !is_due(&space) {
                    return Ok(space);
                }
                if let Some(others) = cas.shared().relieved_first.0.get() {
                    others();
                }
                compaction::reclaim_for_disk(cas.shared(), cas.actor(), is_due);
                cas.shared().volume.space()
            };
            // The turn lasts until this work ends, also if the caller does not wait for it.
            let looked = self.blocking_with(turn, look).await;
            let Ok((Ok(space), _turn)) = looked else { return };
            if is_due(&space) {
                let _ = self.ask(Relieve(space)).await;
            }
        };
        // Deletions that are not done by then continue in the background.
        let _ = tokio::time::timeout(settings::RELIEF_WAIT, relieved).await;
    }
}

impl Receive<Relieve> for CasActor {
    type Answer = StoreReply<()>;

    fn receive(&mut self, Relieve(space): Relieve, ctx: &mut Context<Self>) -> Self::Answer {
        if space.is_exhausted() {
            // The clients of broken uploads start again, which costs less than losing stored entries.
            while let Some(partial) = self.uploads.pop_for_room() {
                self.discard(partial, ctx);
            }
        }
        let Totals { used, held, deleting, blobs, results, zstd_forms, .. } =
            self.change(|index| index.totals());
        let store = Evictable {
            bytes: used.saturating_sub(held),
            // Files in segments take no inodes of their own.
            entries: (blobs.saturating_add(results).saturating_add(zstd_forms))
                .saturating_sub(self.shared.volume.packed_together()),
            deleting,
        };
        let Some(relief) = space.relief(&store) else {
            return StoreReply::Now(());
        };
        let (mut bytes, mut entries, mut left) = (relief.bytes, relief.entries, settings::RELIEF_BATCH);
        let victims = in_parts(|budget| {
            if left == 0 {
                return Vec::new();
            }
            let part = self.change(|index| index.evict_even_leased(bytes, entries, budget));
            bytes = bytes.saturating_sub(part.iter().map(|victim| victim.bytes).sum());
            entries = entries.saturating_sub(part.len() as u64);
            left = left.saturating_sub(part.len());
            part
        });
        Event::warn(LOG, "disk_relieved")
            .with("entries", victims.len())
            .with("bytes", victims.iter().map(|victim| victim.bytes).sum::<u64>())
            .with("free_bytes", space.free_bytes)
            .log(format_args!(
                "the disk of the store is nearly full; evicted the least recently used entries"
            ));
        self.delete(victims, ctx);
        let evicted = self.change(|index| index.bytes_evicted());
        StoreReply::when(self.deletions(evicted), ())
    }
}
