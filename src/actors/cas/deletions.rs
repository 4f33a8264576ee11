//! [`Deletions`]: the files of evicted and replaced entries, and the jobs that delete them.
//!
//! Deleting takes longer than evicting: each file or journal is a call of the file system, and the space of small files
//! is reclaimed by copying others. So victims wait in a queue, and a few jobs take many of them at a time. Room is
//! given back as files are deleted, so a writer waits only for its own part of the queue.
//!
//! Of two results of an action, the older one is deleted first. Otherwise a crash between the two deletions would bring
//! it back. So one job at a time deletes results, in the order in which they were handed over, and no two of one action
//! together.
//!
//! Bounds: [`DELETERS`] jobs. The queue is bounded by what was stored, because a writer gets room that depends on
//! deletions only after them.

use super::{
    CasActor, LOG, StoreShared, compaction,
    index::{EntryKind, FileId, Key, Victim},
    settings::{DELETERS, DELETIONS_AT_ONCE},
};
use crate::logging::Event;
use actix::{Addr, Message};
use std::{
    collections::{HashSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::sync::oneshot;

/// Fact: this many bytes of evicted or replaced files are deleted from disk.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Deleted(pub u64);

/// Victims that were handed over together.
#[derive(Debug)]
struct DeletionOrder {
    victims: Vec<Victim>,
    /// Receives the files that could not be deleted.
    tell: oneshot::Sender<Vec<FileId>>,
}

#[derive(Debug, Default)]
struct DeletionQueue {
    /// Orders with at least one result.
    results: VecDeque<DeletionOrder>,
    others: VecDeque<DeletionOrder>,
    /// Whether a job deletes results now.
    are_results_taken: bool,
    jobs: usize,
}

/// What one job deletes at a time.
#[derive(Debug, Default)]
struct DeletionBatch {
    orders: Vec<DeletionOrder>,
    has_results: bool,
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

    /// Takes the next orders. If there are none, the job ends.
    fn take(&self) -> DeletionBatch {
        let mut queue = self.queue();
        let batch = queue.take();
        if batch.orders.is_empty() {
            queue.jobs -= 1;
        }
        batch
    }
}

impl DeletionQueue {
    fn add(&mut self, order: DeletionOrder) {
        let has_results = order.results().next().is_some();
        if has_results { &mut self.results } else { &mut self.others }.push_back(order);
    }

    /// Takes the orders at the front, as many as one job deletes at a time.
    fn take(&mut self) -> DeletionBatch {
        let has_results = !self.are_results_taken && !self.results.is_empty();
        let waiting = if has_results { &mut self.results } else { &mut self.others };
        self.are_results_taken |= has_results;
        let (mut orders, mut victims, mut results) = (Vec::new(), 0, HashSet::new());
        while victims < DELETIONS_AT_ONCE
            && let Some(order) = waiting.pop_front()
        {
            if order.results().any(|key| results.contains(key)) {
                waiting.push_front(order);
                break;
            }
            results.extend(order.results().copied());
            victims += order.victims.len();
            orders.push(order);
        }
        DeletionBatch { orders, has_results }
    }
}

impl DeletionOrder {
    /// The keys of the results among the victims.
    fn results(&self) -> impl Iterator<Item = &Key> {
        self.victims.iter().map(|victim| &victim.file.key).filter(|key| key.kind == EntryKind::Result)
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
    queue.add(DeletionOrder { victims, tell });
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
        let mut guard = JobGuard { deletions: &self.shared.deletions, is_over: false, has_results: false };
        loop {
            let DeletionBatch { orders, has_results } = self.shared.deletions.take();
            if orders.is_empty() {
                guard.is_over = true;
                return;
            }
            guard.has_results = has_results;
            self.carry_out(orders);
            guard.give_back_results();
        }
    }

    fn carry_out(&self, orders: Vec<DeletionOrder>) {
        let victims: Vec<Victim> = orders.iter().flat_map(|order| &order.victims).copied().collect();
        let bytes = victims.iter().map(|victim| victim.bytes).sum();
        let being_deleted = BeingDeleted { bytes, store: &self.store };
        let failures = self.shared.volume.delete(&victims);
        if let Some((_, first)) = failures.first() {
            // Until it works, the next start adds these files to the index again.
            Event::error(LOG, "delete_failed")
                .with("entries", failures.len())
                .with_shown("error", first)
                .log(format_args!(
                    "could not delete the files of evicted entries; unless a later try succeeds, they come back with the next \
                     start"
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

/// Gives back what a job has taken, even if it panics.
struct JobGuard<'a> {
    deletions: &'a Deletions,
    /// Whether the job has given its place back.
    is_over: bool,
    /// Whether the job deletes results now.
    has_results: bool,
}

impl JobGuard<'_> {
    fn give_back_results(&mut self) {
        if std::mem::take(&mut self.has_results) {
            self.deletions.queue().are_results_taken = false;
        }
    }
}

impl Drop for JobGuard<'_> {
    fn drop(&mut self) {
        self.give_back_results();
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instance::InstanceId;
    use gorego_reapi::digest::DigestFunction;

    fn order(names: &[(EntryKind, &str)]) -> DeletionOrder {
        let victim = |&(kind, name): &(EntryKind, &str)| {
            let digest = DigestFunction::Sha256.digest(name.as_bytes());
            let key = Key { digest, instance: InstanceId(0), kind };
            Victim { file: FileId { key, generation: 0 }, bytes: 1 }
        };
        DeletionOrder { victims: names.iter().map(victim).collect(), tell: oneshot::channel().0 }
    }

    fn victims(batch: &DeletionBatch) -> usize {
        batch.orders.iter().map(|order| order.victims.len()).sum()
    }

    /// AC-08.
    #[test]
    fn an_older_result_is_deleted_before_a_newer_one_and_blobs_wait_for_neither() {
        let result = |name| (EntryKind::Result, name);
        let blob = |name| (EntryKind::Blob, name);
        let mut queue = DeletionQueue::default();
        queue.add(order(&[result("a"), blob("x")]));
        queue.add(order(&[result("b")]));
        queue.add(order(&[blob("y")]));
        queue.add(order(&[result("a")]));
        let first = queue.take();
        assert!(first.has_results && victims(&first) == 3, "the second result of an action waits");
        let other = queue.take();
        assert!(!other.has_results && victims(&other) == 1, "{other:?}");
        assert!(queue.take().orders.is_empty(), "the first job has not ended");
        queue.are_results_taken = false;
        let last = queue.take();
        assert!(last.has_results && victims(&last) == 1);
        assert!(queue.take().orders.is_empty());
    }
}
