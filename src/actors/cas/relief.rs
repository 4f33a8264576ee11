//! Relief of a full disk: what was used least recently goes when actions find no room, or uploads soon would, although the
//! store is within its own limit. [`crate::disk::Space::relief`] says how much.
//!
//! Bounds: one relief at a time, [`settings::RELIEF_BATCH`] entries each, a wait of [`settings::RELIEF_WAIT`]. A disk that
//! others fill is not the store's to mend: when half of what it has would not help, it gives nothing.

use super::{
    CasActor, LOG,
    client::Cas,
    index::Totals,
    reply::Reply,
    settings::{self, FULL_DISK_LOG_INTERVAL},
};
use crate::{
    actors::mail::Receive,
    disk::{Evictable, Space},
    logging::Event,
};
use actix::{Context, Message};
use std::time::Instant;

/// Evict what this disk needs. The answer comes when the files are gone.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Relieve(pub Space);

impl Cas {
    /// Makes room on the disk of the store after an action failed for lack of it, from a worker thread. Blocks until the room
    /// is there or the action is cancelled, for a bounded time.
    pub fn relieve_disk(&self, is_cancelled: &dyn Fn() -> bool) {
        self.block_on(async |cas| {
            let cancelled = async {
                while !is_cancelled() {
                    tokio::time::sleep(settings::RELIEF_POLL).await;
                }
            };
            tokio::select! {
                () = cas.relieve(|_| true) => {}
                () = cancelled => {}
            }
        });
    }

    /// Makes room on the disk of the store if there is little.
    pub(super) async fn relieve_low_disk(&self) {
        self.relieve(Space::is_low).await;
    }

    async fn relieve(&self, is_due: impl Fn(&Space) -> bool) {
        let relieved = async {
            // Whoever comes second looks at what the first has left to do.
            let _turn = self.shared().relief_turn.lock().await;
            let cas = self.clone();
            let looked = self.blocking(move || cas.shared().volume.space()).await;
            let Ok(Ok(space)) = looked else { return };
            if is_due(&space) {
                let _ = self.ask(Relieve(space)).await;
            }
        };
        // What is not deleted by then is deleted later.
        let _ = tokio::time::timeout(settings::RELIEF_WAIT, relieved).await;
    }
}

impl Receive<Relieve> for CasActor {
    type Answer = Reply<()>;

    fn receive(&mut self, Relieve(space): Relieve, ctx: &mut Context<Self>) -> Self::Answer {
        let Totals { used, leased, deleting, blobs, results, zstd_forms, .. } = self.index().totals();
        let store = Evictable {
            bytes: used.saturating_sub(leased),
            entries: blobs.saturating_add(results).saturating_add(zstd_forms),
            deleting,
        };
        let Some(relief) = space.relief(&store) else {
            self.log_full_disk(&space);
            return Reply::Now(());
        };
        let victims = self.index().evict(relief.bytes, relief.entries, settings::RELIEF_BATCH);
        Event::warn(LOG, "disk_relieved")
            .with("entries", victims.len())
            .with("bytes", victims.iter().map(|victim| victim.bytes).sum::<u64>())
            .with("free_bytes", space.free_bytes)
            .log(format_args!(
                "the disk of the store is nearly full; evicted the least recently used entries"
            ));
        self.delete(victims, ctx);
        // A statement of its own: the index is locked until its end.
        let evicted = self.index().bytes_evicted();
        Reply::when(self.deletions(evicted), ())
    }
}

impl CasActor {
    /// Logs, at most once a minute, that the disk is full and the store cannot help.
    fn log_full_disk(&mut self, space: &Space) {
        let is_due = self.full_disk_logged.is_none_or(|at| at.elapsed() >= FULL_DISK_LOG_INTERVAL);
        if space.is_exhausted() && is_due {
            self.full_disk_logged = Some(Instant::now());
            Event::warn(LOG, "disk_full").with("free_bytes", space.free_bytes).log(format_args!(
                "the disk of the store is full, and the store cannot make room: something else fills it"
            ));
        }
    }
}
