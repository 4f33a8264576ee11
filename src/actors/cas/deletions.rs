//! [`Deletions`]: the files of evicted and replaced entries, and the jobs that delete them.
//!
//! Deleting takes longer than evicting: each file or journal is a call of the file system, and the space of small files
//! is reclaimed by copying others. So victims wait in a queue, and a few jobs take many of them at a time. Room is
//! given back as files are deleted, so a writer waits only for its own part of the queue.
//!
//! Bounds: [`DELETERS`] jobs. The queue is bounded by what was stored, because a writer gets room that depends on
//! deletions only after them.

use super::{
    CasActor, LOG, StoreShared, compaction,
    index::{FileId, Victim},
    requests::Deleted,
    settings::{DELETERS, DELETIONS_AT_ONCE},
};
use crate::logging::Event;
use actix::Addr;
use std::{
    collections::{HashSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::sync::oneshot;

/// Victims that were handed over together.
#[derive(Debug)]
struct DeletionOrder {
    victims: Vec<Victim>,
    /// Receives the files that could not be deleted.
    tell: oneshot::Sender<Vec<FileId>>,
}

#[derive(Debug, Default)]
struct DeletionQueue {
    waiting: VecDeque<DeletionOrder>,
    jobs: usize,
}

/// See the module documentation.
#[derive(Debug, Default)]
pub(super) struct Deletions(Mutex<DeletionQueue>);

/// The place of a job among [`DELETERS`].
struct DeletionJob {
    shared: Arc<StoreShared>,
    store: Addr<CasActor>,
}

/// Bytes that are being deleted. They count as deleted when this is dropped, even if the job panics.
struct BeingDeleted<'a> {
    bytes: u64,
    store: &'a Addr<CasActor>,
}

impl Deletions {
    fn queue(&self) -> MutexGuard<'_, DeletionQueue> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the orders at the front of the queue, as many as one job deletes at a time.
    fn take(&self) -> Vec<DeletionOrder> {
        let (mut queue, mut taken, mut victims) = (self.queue(), Vec::new(), 0);
        while victims < DELETIONS_AT_ONCE
            && let Some(order) = queue.waiting.pop_front()
        {
            victims += order.victims.len();
            taken.push(order);
        }
        if taken.is_empty() {
            queue.jobs -= 1;
        }
        taken
    }
}

/// Deletes files in the background. The returned receiver gets the files that could not be deleted, once the others
/// are.
pub(super) fn delete(
    shared: &Arc<StoreShared>,
    store: Addr<CasActor>,
    victims: Vec<Victim>,
) -> oneshot::Receiver<Vec<FileId>> {
    let (tell, told) = oneshot::channel();
    let mut queue = shared.deletions.queue();
    queue.waiting.push_back(DeletionOrder { victims, tell });
    let is_due = queue.jobs < DELETERS;
    queue.jobs += usize::from(is_due);
    drop(queue);
    if is_due {
        let job = DeletionJob { shared: shared.clone(), store };
        shared.runtime.spawn_blocking(move || job.run());
    }
    told
}

impl DeletionJob {
    /// Deletes files until none is waiting. Blocks.
    fn run(self) {
        let mut guard = JobGuard { deletions: &self.shared.deletions, is_over: false };
        loop {
            let orders = self.shared.deletions.take();
            if orders.is_empty() {
                guard.is_over = true;
                return;
            }
            self.carry_out(orders);
        }
    }

    fn carry_out(&self, orders: Vec<DeletionOrder>) {
        let victims: Vec<Victim> = orders.iter().flat_map(|order| &order.victims).copied().collect();
        let bytes = victims.iter().map(|victim| victim.bytes).sum();
        let being_deleted = BeingDeleted { bytes, store: &self.store };
        let failures = self.shared.volume.delete(&victims);
        if let Some((_, first)) = failures.first() {
            // These files stay on disk until the next start, which adds them to the index again.
            Event::error(LOG, "delete_failed")
                .with("entries", failures.len())
                .with_shown("error", first)
                .log(format_args!(
                    "could not delete the files of evicted entries; check the permissions of the store's directory"
                ));
        }
        // Until they are reclaimed, the bytes of deleted records still take room.
        compaction::reclaim_for_writers(&self.shared, &self.store);
        drop(being_deleted);
        let failed: HashSet<FileId> = failures.into_iter().map(|(file, _)| file).collect();
        for DeletionOrder { victims, tell } in orders {
            let files = victims.into_iter().map(|victim| victim.file);
            // Few callers wait for the answer.
            let _ = tell.send(files.filter(|file| failed.contains(file)).collect());
        }
    }
}

/// Gives the place of a job back if it panics.
struct JobGuard<'a> {
    deletions: &'a Deletions,
    is_over: bool,
}

impl Drop for JobGuard<'_> {
    fn drop(&mut self) {
        if !self.is_over {
            self.deletions.queue().jobs -= 1;
        }
    }
}

impl Drop for BeingDeleted<'_> {
    fn drop(&mut self) {
        self.store.do_send(Deleted(self.bytes));
    }
}
