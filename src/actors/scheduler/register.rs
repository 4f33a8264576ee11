//! The register of operations: their names, their watch cells, and how long they are remembered.
//!
//! Invariants: an operation is completed exactly once. An unfinished operation is never forgotten. An operation is
//! found only under its own instance (GEN-15). Changing a snapshot notifies its subscribers, so that no update can be
//! missed. The ledger decides which operations share a task, and when one ends.

use super::{
    messages::{ListOperations, OperationPage},
    operation::{OperationId, OperationInfo, Outcome, Snapshot, Stage, Subscription},
    operation_loads::OperationLoads,
    quota::PeerQuota,
    settings::{ClockReading, SchedulerSettings},
};
use crate::{actors::worker::messages::TaskId, instance::Instance, quotas::OperationLimits};
use gorego_reapi::error::{Error, Result};
use std::{
    collections::{BTreeMap, HashMap},
    ops::Bound,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::watch;

/// How many operations are examined for one page. A filter that matches few operations gives short pages. Without this
/// limit, one long search would delay all other messages.
const PAGE_SCAN: usize = 10_000;

/// Every operation that is unfinished or remembered, by submission number.
#[derive(Debug)]
pub(crate) struct Register {
    operations: BTreeMap<u64, Operation>,
    numbers: HashMap<OperationId, u64>,
    last_number: u64,
    /// The unfinished operations of each peer.
    unfinished: PeerQuota,
    /// The memory of the unfinished operations, in bytes.
    unfinished_bytes: PeerQuota,
    /// The number of unfinished operations of each peer in each instance.
    loads: OperationLoads,
    worked: Retained,
    cached: Retained,
    unusable: Retained,
}

#[derive(Debug)]
pub(crate) struct Operation {
    pub(crate) info: Arc<OperationInfo>,
    /// Lower values run sooner.
    pub(crate) priority: i32,
    /// The time of the submission.
    pub(crate) queued: Instant,
    state: OperationState,
    snapshot: watch::Sender<Snapshot>,
}

#[derive(Debug)]
enum OperationState {
    /// It waits for a task. `unfollowed_since` is the time at which the register noticed that it has no followers.
    Unfinished { task: TaskId, unfollowed_since: Option<Instant> },
    /// It ended at this time, in this way.
    Finished { at: Instant, kind: FinishedKind },
}

/// The kinds of finished operations. Each has its own bounds, so that many operations of one kind do not displace
/// operations of another kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FinishedKind {
    /// It waited for a task.
    Worked,
    /// Its result was in the action cache.
    Cached,
    /// Its action cannot run, which was known when it was admitted.
    Unusable,
}

impl Operation {
    /// The task that it waits for; `None` if it has ended.
    pub(crate) fn task(&self) -> Option<TaskId> {
        match self.state {
            OperationState::Unfinished { task, .. } => Some(task),
            OperationState::Finished { .. } => None,
        }
    }

    /// Whether it is unfinished and had followers when it was last examined.
    pub(crate) fn is_followed(&self) -> bool {
        matches!(self.state, OperationState::Unfinished { unfollowed_since: None, .. })
    }

    /// Whether an unfinished operation has lost its last follower since it was last examined.
    fn has_lost_followers(&mut self, now: ClockReading) -> bool {
        let OperationState::Unfinished { unfollowed_since: since @ None, .. } = &mut self.state else {
            return false;
        };
        let is_lost = self.snapshot.receiver_count() == 0;
        *since = is_lost.then_some(now.at);
        is_lost
    }

    /// Approximate memory in bytes, beyond the fixed size of an operation.
    fn weight(&self) -> usize {
        let snapshot = self.snapshot.borrow();
        let outcome = snapshot.outcome.as_ref().map_or(0, |outcome| outcome.memory());
        outcome.saturating_add(self.info.memory())
    }

    fn matches(&self, query: &ListOperations, waits_for_pool: impl Fn(TaskId) -> bool) -> bool {
        let (client, filter) = (&self.info.client, &query.filter);
        let in_pool = |wanted: &String| match (&self.snapshot.borrow().place, self.task()) {
            (Some(place), _) => *place.pool == **wanted,
            (None, Some(task)) => waits_for_pool(task),
            (None, None) => false,
        };
        let on_worker = |wanted: &String| {
            self.snapshot.borrow().place.as_ref().is_some_and(|place| *place.worker == **wanted)
        };
        self.info.instance == query.instance
            && filter.operation.is_none_or(|wanted| self.info.id == wanted)
            && filter.owner.as_ref().is_none_or(|wanted| self.info.principal.is_same(wanted))
            && filter.invocation.as_ref().is_none_or(|wanted| client.tool_invocation_id == *wanted)
            && filter.target.as_ref().is_none_or(|wanted| client.target_id == *wanted)
            && filter.done.is_none_or(|wanted| self.task().is_none() == wanted)
            && filter.stage.is_none_or(|wanted| self.snapshot.borrow().stage == wanted)
            && filter.pool.as_ref().is_none_or(in_pool)
            && filter.worker.as_ref().is_none_or(on_worker)
    }
}

impl Register {
    /// An empty register. The settings bound how much it remembers.
    pub(crate) fn new(settings: &SchedulerSettings) -> Self {
        Self {
            operations: BTreeMap::new(),
            numbers: HashMap::new(),
            last_number: 0,
            unfinished: PeerQuota::new("unfinished operations", settings.unfinished_operations),
            unfinished_bytes: PeerQuota::new("bytes of unfinished operations", settings.unfinished_bytes),
            loads: OperationLoads::default(),
            worked: Retained {
                limit: settings.retained_operations,
                limit_bytes: settings.retained_bytes,
                age: settings.retention,
                ..Retained::default()
            },
            cached: Retained::at_birth(settings),
            unusable: Retained::at_birth(settings),
        }
    }

    /// The submission number of the next operation. Numbers start at 1 and ascend.
    pub(crate) fn next_number(&self) -> u64 {
        self.last_number + 1
    }

    /// Adds an operation that waits for a task.
    pub(crate) fn enter(
        &mut self,
        info: Arc<OperationInfo>,
        priority: i32,
        task: TaskId,
        snapshot: Snapshot,
        now: ClockReading,
    ) -> (u64, Subscription) {
        self.unfinished.take(info.peer, 1);
        self.unfinished_bytes.take(info.peer, info.memory());
        self.loads.enter(&info, snapshot.stage);
        let state = OperationState::Unfinished { task, unfollowed_since: None };
        let (snapshot, snapshots) = watch::channel(snapshot);
        let subscription = Subscription { info: info.clone(), snapshots };
        let number = self.insert(Operation { info, priority, queued: now.at, state, snapshot });
        (number, subscription)
    }

    /// Adds an operation that has already ended.
    pub(crate) fn enter_finished(
        &mut self,
        info: Arc<OperationInfo>,
        priority: i32,
        kind: FinishedKind,
        snapshot: watch::Sender<Snapshot>,
        now: ClockReading,
    ) {
        let state = OperationState::Finished { at: now.at, kind };
        let number = self.insert(Operation { info, priority, queued: now.at, state, snapshot });
        self.retain(number, kind, now);
    }

    /// Ends an operation and notifies its subscribers; `None` if it had already ended.
    pub(crate) fn complete(
        &mut self,
        number: u64,
        outcome: Arc<Outcome>,
        now: ClockReading,
    ) -> Option<CompletedOperation> {
        let operation = self.operations.get_mut(&number)?;
        operation.task()?;
        let kind = FinishedKind::Worked;
        operation.state = OperationState::Finished { at: now.at, kind };
        self.loads.leave(&operation.info, operation.snapshot.borrow().stage);
        operation.snapshot.send_modify(|snapshot| {
            snapshot.stage = Stage::Completed;
            snapshot.run_stage = None;
            snapshot.outcome = Some(outcome);
        });
        let completed = CompletedOperation {
            info: operation.info.clone(),
            priority: operation.priority,
            queued: operation.queued,
        };
        self.unfinished.give_back(completed.info.peer, 1);
        self.unfinished_bytes.give_back(completed.info.peer, completed.info.memory());
        self.retain(number, kind, now);
        Some(completed)
    }

    /// Changes the snapshot of an unfinished operation and notifies its subscribers.
    pub(crate) fn update(&mut self, number: u64, change: impl FnOnce(&mut Snapshot)) -> Option<&Operation> {
        let operation = self.operations.get(&number)?;
        operation.task()?;
        let before = operation.snapshot.borrow().stage;
        operation.snapshot.send_modify(change);
        self.loads.turn(&operation.info, before, operation.snapshot.borrow().stage);
        Some(operation)
    }

    /// The number of an operation.
    ///
    /// # Errors
    /// `NotFound` if there is no operation with this name in this instance (EXE-13, GEN-15).
    pub(crate) fn find(&self, instance: &Instance, id: OperationId) -> Result<u64> {
        let number = self.numbers.get(&id).copied();
        let found = number.filter(|n| self.operations.get(n).is_some_and(|o| o.info.instance == *instance));
        found.ok_or_else(|| {
            Error::NotFound(format!(
                "operation {} is unknown or was forgotten; execute the action again",
                instance.qualify(&format!("operations/{id}"))
            ))
        })
    }

    pub(crate) fn get(&self, number: u64) -> Option<&Operation> {
        self.operations.get(&number)
    }

    /// Subscribes to an operation. The second value is its task, if the operation is unfinished and was known to have
    /// no followers.
    pub(crate) fn subscribe(&mut self, number: u64) -> Option<(Subscription, Option<TaskId>)> {
        let operation = self.operations.get_mut(&number)?;
        let gained = match &mut operation.state {
            OperationState::Unfinished { task, unfollowed_since } => unfollowed_since.take().map(|_| *task),
            OperationState::Finished { .. } => None,
        };
        let snapshots = operation.snapshot.subscribe();
        Some((Subscription { info: operation.info.clone(), snapshots }, gained))
    }

    /// Forgets a finished operation, and returns whether there was one.
    pub(crate) fn forget(&mut self, number: u64) -> bool {
        let Some(&OperationState::Finished { at, kind }) = self.operations.get(&number).map(|o| &o.state)
        else {
            return false;
        };
        self.retained(kind).remove(at, number);
        self.remove(number);
        true
    }

    /// Forgets operations whose retention has passed.
    pub(crate) fn expire(&mut self, now: ClockReading) {
        for kind in [FinishedKind::Worked, FinishedKind::Cached, FinishedKind::Unusable] {
            while let Some(number) = self.retained(kind).pop_expired(now) {
                self.remove(number);
            }
        }
    }

    /// Whether an operation has lost its last follower since it was last examined.
    pub(crate) fn has_lost_followers(&mut self, number: u64, now: ClockReading) -> bool {
        self.operations.get_mut(&number).is_some_and(|operation| operation.has_lost_followers(now))
    }

    /// The tasks of all operations that have lost their last followers since they were last examined.
    pub(crate) fn find_unfollowed(&mut self, now: ClockReading) -> Vec<TaskId> {
        let lost = self.operations.values_mut().filter_map(|operation| {
            let task = operation.task()?;
            operation.has_lost_followers(now).then_some(task)
        });
        lost.collect()
    }

    /// Unfinished operations that have had no followers for `grace`.
    pub(crate) fn abandoned(&self, grace: Duration, now: ClockReading) -> Vec<u64> {
        let is_abandoned = |operation: &Operation| match operation.state {
            OperationState::Unfinished { unfollowed_since: Some(since), .. } => now.since(since) >= grace,
            _ => false,
        };
        self.operations
            .iter()
            .filter(|(_, operation)| is_abandoned(operation))
            .map(|(number, _)| *number)
            .collect()
    }

    /// A page of an instance's operations, oldest first. `waits_for_pool` returns whether a task waits for the pool in
    /// the filter.
    pub(crate) fn page(
        &self,
        query: &ListOperations,
        waits_for_pool: impl Fn(TaskId) -> bool,
    ) -> OperationPage {
        let &ListOperations { after, limit, .. } = query;
        let mut operations = Vec::new();
        let mut last = after;
        let rest = self.operations.range((Bound::Excluded(after), Bound::Unbounded));
        for (examined, (&number, operation)) in rest.enumerate() {
            if examined == PAGE_SCAN {
                return OperationPage { operations, next: Some(last) };
            }
            if operation.matches(query, &waits_for_pool) {
                if operations.len() >= limit.max(1) {
                    return OperationPage { operations, next: Some(last) };
                }
                operations.push((operation.info.clone(), operation.snapshot.borrow().clone()));
            }
            last = number;
        }
        OperationPage { operations, next: None }
    }

    /// The number of operations, including finished ones that are remembered.
    pub(crate) fn len(&self) -> usize {
        self.operations.len()
    }

    /// The number of unfinished operations.
    #[cfg(test)]
    pub(crate) fn unfinished(&self) -> usize {
        self.unfinished.taken()
    }

    /// Checks whether a peer may have one more unfinished operation.
    ///
    /// # Errors
    /// `Exhausted` if there are too many, if they take too much memory, or if the peer has its share; `OverQuota` if it
    /// has as many as its quota allows.
    pub(crate) fn check_place(&self, info: &OperationInfo, limits: OperationLimits) -> Result<()> {
        self.unfinished.check(info.peer)?;
        self.unfinished_bytes.check(info.peer)?;
        self.loads.check(info, limits)
    }

    fn insert(&mut self, operation: Operation) -> u64 {
        self.last_number += 1;
        let number = self.last_number;
        self.numbers.insert(operation.info.id, number);
        self.operations.insert(number, operation);
        number
    }

    fn remove(&mut self, number: u64) {
        if let Some(operation) = self.operations.remove(&number) {
            self.numbers.remove(&operation.info.id);
        }
    }

    fn retain(&mut self, number: u64, kind: FinishedKind, now: ClockReading) {
        let weight = self.operations.get(&number).map_or(0, Operation::weight);
        self.retained(kind).insert(now.at, number, weight);
        while let Some(oldest) = self.retained(kind).pop_excess() {
            self.remove(oldest);
        }
    }

    fn retained(&mut self, kind: FinishedKind) -> &mut Retained {
        match kind {
            FinishedKind::Worked => &mut self.worked,
            FinishedKind::Cached => &mut self.cached,
            FinishedKind::Unusable => &mut self.unusable,
        }
    }
}

/// An operation that has just ended. The register may already have forgotten it.
#[derive(Debug)]
pub(crate) struct CompletedOperation {
    pub(crate) info: Arc<OperationInfo>,
    /// Lower values run sooner.
    pub(crate) priority: i32,
    /// The time of the submission.
    pub(crate) queued: Instant,
}

/// Finished operations in the order in which they ended, bounded in number, bytes and age.
#[derive(Debug, Default)]
struct Retained {
    limit: usize,
    limit_bytes: usize,
    age: Duration,
    /// The weight of each operation, by its end and number.
    by_end: BTreeMap<(Instant, u64), usize>,
    bytes: usize,
}

impl Retained {
    /// The bounds of operations that had ended when they were admitted.
    fn at_birth(settings: &SchedulerSettings) -> Self {
        Self {
            limit: settings.retained_cached,
            limit_bytes: settings.retained_cached_bytes,
            age: settings.cached_retention,
            ..Self::default()
        }
    }

    fn insert(&mut self, at: Instant, number: u64, weight: usize) {
        self.by_end.insert((at, number), weight);
        self.bytes = self.bytes.saturating_add(weight);
    }

    fn remove(&mut self, at: Instant, number: u64) {
        let weight = self.by_end.remove(&(at, number)).unwrap_or(0);
        self.bytes = self.bytes.saturating_sub(weight);
    }

    fn pop_excess(&mut self) -> Option<u64> {
        // The latest operation stays, whatever its weight, because its client may have lost the stream and may ask for
        // it.
        let too_heavy = self.bytes > self.limit_bytes && self.by_end.len() > 1;
        if self.by_end.len() > self.limit || too_heavy { self.pop() } else { None }
    }

    fn pop_expired(&mut self, now: ClockReading) -> Option<u64> {
        let ((at, _), _) = self.by_end.first_key_value()?;
        if now.since(*at) < self.age { None } else { self.pop() }
    }

    fn pop(&mut self) -> Option<u64> {
        let ((_, number), weight) = self.by_end.pop_first()?;
        self.bytes = self.bytes.saturating_sub(weight);
        Some(number)
    }
}
