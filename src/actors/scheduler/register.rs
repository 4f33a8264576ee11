//! The register of operations: their names, their watch cells, and how long they are remembered.
//!
//! Invariants: an operation is completed exactly once; one that is not completed is never forgotten; an operation is found
//! under its own instance only (GEN-15). Changing a snapshot is what notifies subscribers, so that no update can be missed.
//! Which operations share a task, and why one ends, is the ledger's business.

use super::{
    messages::{ListOperations, OperationPage},
    operation::{OperationId, OperationInfo, Outcome, Snapshot, Stage, Subscription},
    room::Places,
    settings::{Moment, SchedulerSettings},
};
use crate::{actors::worker::messages::TaskId, caller::Peer, instance::Instance};
use gorego_reapi::error::{Error, Result};
use prost::Message as _;
use std::{
    collections::{BTreeMap, HashMap},
    ops::Bound,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::watch;

/// How many operations one page looks at. A filter that matches little gives short pages with a token for the next one
/// instead of one long look that holds up everybody else's mail.
const PAGE_SCAN: usize = 10_000;

/// Every operation that is unfinished or remembered, by submission number.
#[derive(Debug)]
pub struct Register {
    operations: BTreeMap<u64, Operation>,
    numbers: HashMap<OperationId, u64>,
    last_number: u64,
    /// Places of the operations that are not over.
    unfinished: Places,
    worked: Retained,
    cached: Retained,
    unusable: Retained,
}

/// One entry of the register.
#[derive(Debug)]
pub struct Operation {
    /// What never changes.
    pub info: Arc<OperationInfo>,
    /// Lower runs sooner.
    pub priority: i32,
    /// When it was submitted.
    pub queued: Instant,
    state: State,
    snapshot: watch::Sender<Snapshot>,
}

#[derive(Debug)]
enum State {
    /// Waits for a task; since when nobody has been seen to follow it.
    Unfinished { task: TaskId, unfollowed_since: Option<Instant> },
    /// Over.
    Finished { at: Instant, kind: Kind },
}

/// Finished operations of different kinds are remembered under bounds of their own, so that those of one kind, however many
/// there are, push out none of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// It waited for a task.
    Worked,
    /// It was answered from the cache.
    Cached,
    /// Its action could not run, and that was known at once.
    Unusable,
}

impl Operation {
    /// The task that it waits for; `None` once it is over.
    pub fn task(&self) -> Option<TaskId> {
        match self.state {
            State::Unfinished { task, .. } => Some(task),
            State::Finished { .. } => None,
        }
    }

    /// Whether it is unfinished and was followed when last looked at.
    pub fn is_followed(&self) -> bool {
        matches!(self.state, State::Unfinished { unfollowed_since: None, .. })
    }

    /// Looks whether an unfinished operation has lost its last follower since it was looked at last.
    fn notice_loss(&mut self, now: Moment) -> bool {
        let State::Unfinished { unfollowed_since: since @ None, .. } = &mut self.state else { return false };
        let is_lost = self.snapshot.receiver_count() == 0;
        *since = is_lost.then_some(now.at);
        is_lost
    }

    /// Bytes that it holds on to, apart from what all operations do.
    fn weight(&self) -> usize {
        let snapshot = self.snapshot.borrow();
        let outcome = snapshot.outcome.as_ref();
        let result = outcome.and_then(|outcome| outcome.result.as_ref());
        let error = outcome.and_then(|outcome| outcome.error.as_ref());
        let of_outcome = result.map_or(0, |result| result.encoded_len())
            + error.map_or(0, gorego_reapi::error::Error::memory);
        let files = self.info.inline.output_files.iter();
        files.fold(of_outcome, |sum, path| sum.saturating_add(path.len()))
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
            && filter.invocation.as_ref().is_none_or(|wanted| client.tool_invocation_id == *wanted)
            && filter.target.as_ref().is_none_or(|wanted| client.target_id == *wanted)
            && filter.done.is_none_or(|wanted| self.task().is_none() == wanted)
            && filter.stage.is_none_or(|wanted| self.snapshot.borrow().stage == wanted)
            && filter.pool.as_ref().is_none_or(in_pool)
            && filter.worker.as_ref().is_none_or(on_worker)
    }
}

impl Register {
    /// Nothing in it; the settings say how much is remembered.
    pub fn new(settings: &SchedulerSettings) -> Self {
        Self {
            operations: BTreeMap::new(),
            numbers: HashMap::new(),
            last_number: 0,
            unfinished: Places::new("unfinished operations", settings.unfinished_operations),
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

    /// The number that the next operation gets; they start at 1 and ascend.
    pub fn next_number(&self) -> u64 {
        self.last_number + 1
    }

    /// Enters an operation that waits for a task.
    pub fn enter(
        &mut self,
        info: Arc<OperationInfo>,
        priority: i32,
        task: TaskId,
        snapshot: Snapshot,
        now: Moment,
    ) -> (u64, Subscription) {
        self.unfinished.take(info.peer);
        let state = State::Unfinished { task, unfollowed_since: None };
        self.insert(Operation {
            info,
            priority,
            queued: now.at,
            state,
            snapshot: watch::Sender::new(snapshot),
        })
    }

    /// Enters an operation that is over already.
    pub fn enter_finished(
        &mut self,
        info: Arc<OperationInfo>,
        priority: i32,
        outcome: Arc<Outcome>,
        now: Moment,
    ) -> Subscription {
        let kind = if outcome.cached { Kind::Cached } else { Kind::Unusable };
        let snapshot =
            Snapshot { stage: Stage::Completed, outcome: Some(outcome), ..Snapshot::queued(now.wall) };
        let state = State::Finished { at: now.at, kind };
        let snapshot = watch::Sender::new(snapshot);
        let (number, subscription) =
            self.insert(Operation { info, priority, queued: now.at, state, snapshot });
        self.retain(number, kind, now);
        subscription
    }

    /// Ends an operation and tells its subscribers; `None` when it was over before.
    pub fn complete(
        &mut self,
        number: u64,
        outcome: Arc<Outcome>,
        now: Moment,
    ) -> Option<CompletedOperation> {
        let operation = self.operations.get_mut(&number)?;
        operation.task()?;
        let kind = Kind::Worked;
        operation.state = State::Finished { at: now.at, kind };
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
        self.unfinished.give_back(completed.info.peer);
        self.retain(number, kind, now);
        Some(completed)
    }

    /// Changes what subscribers of an unfinished operation see.
    pub fn update(&self, number: u64, change: impl FnOnce(&mut Snapshot)) -> Option<&Operation> {
        let operation = self.operations.get(&number)?;
        operation.task()?;
        operation.snapshot.send_modify(change);
        Some(operation)
    }

    /// The number of an operation.
    ///
    /// # Errors
    /// `NotFound` when there is none of this name in this instance (EXE-13, GEN-15).
    pub fn find(&self, instance: &Instance, id: OperationId) -> Result<u64> {
        let number = self.numbers.get(&id).copied();
        let found = number.filter(|n| self.operations.get(n).is_some_and(|o| o.info.instance == *instance));
        found.ok_or_else(|| {
            Error::NotFound(format!(
                "operation {} is unknown or was forgotten; execute the action again",
                instance.qualify(&format!("operations/{id}"))
            ))
        })
    }

    /// The operation of this number.
    pub fn get(&self, number: u64) -> Option<&Operation> {
        self.operations.get(&number)
    }

    /// Follows an operation. Besides, the task that has gained a follower by that: an operation that is not over and that
    /// nobody was known to follow.
    pub fn subscribe(&mut self, number: u64) -> Option<(Subscription, Option<TaskId>)> {
        let operation = self.operations.get_mut(&number)?;
        let gained = match &mut operation.state {
            State::Unfinished { task, unfollowed_since } => unfollowed_since.take().map(|_| *task),
            State::Finished { .. } => None,
        };
        let snapshots = operation.snapshot.subscribe();
        Some((Subscription { info: operation.info.clone(), snapshots }, gained))
    }

    /// Forgets a finished operation; whether there was one.
    pub fn forget(&mut self, number: u64) -> bool {
        let Some(&State::Finished { at, kind }) = self.operations.get(&number).map(|o| &o.state) else {
            return false;
        };
        self.retained(kind).remove(at, number);
        self.remove(number);
        true
    }

    /// Forgets what has been remembered long enough.
    pub fn expire(&mut self, now: Moment) {
        for kind in [Kind::Worked, Kind::Cached, Kind::Unusable] {
            while let Some(number) = self.retained(kind).pop_expired(now) {
                self.remove(number);
            }
        }
    }

    /// Whether an operation has lost its last follower since it was looked at last.
    pub fn notice_loss(&mut self, number: u64, now: Moment) -> bool {
        self.operations.get_mut(&number).is_some_and(|operation| operation.notice_loss(now))
    }

    /// The same of all operations: the task of each that has.
    pub fn notice_losses(&mut self, now: Moment) -> Vec<TaskId> {
        let lost = self.operations.values_mut().filter_map(|operation| {
            let task = operation.task()?;
            operation.notice_loss(now).then_some(task)
        });
        lost.collect()
    }

    /// Unfinished operations that nobody has been seen to follow for `grace`.
    pub fn abandoned(&self, grace: Duration, now: Moment) -> Vec<u64> {
        let is_abandoned = |operation: &Operation| match operation.state {
            State::Unfinished { unfollowed_since: Some(since), .. } => now.since(since) >= grace,
            _ => false,
        };
        self.operations
            .iter()
            .filter(|(_, operation)| is_abandoned(operation))
            .map(|(number, _)| *number)
            .collect()
    }

    /// A page of an instance's operations, oldest first, from after the given number. Whether the task of a waiting
    /// operation waits for the pool that the filter names is for the caller to say.
    pub fn page(&self, query: &ListOperations, waits_for_pool: impl Fn(TaskId) -> bool) -> OperationPage {
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

    /// How many operations there are, remembered ones included.
    pub fn len(&self) -> usize {
        self.operations.len()
    }

    /// How many of them are not over.
    #[cfg(test)]
    pub fn unfinished(&self) -> usize {
        self.unfinished.taken()
    }

    /// Whether a peer may have one more unfinished operation.
    ///
    /// # Errors
    /// `Exhausted` when there are too many, or the peer has its share of them.
    pub fn check_place(&self, peer: Peer) -> Result<()> {
        self.unfinished.check(peer)
    }

    fn insert(&mut self, operation: Operation) -> (u64, Subscription) {
        self.last_number += 1;
        let number = self.last_number;
        let subscription =
            Subscription { info: operation.info.clone(), snapshots: operation.snapshot.subscribe() };
        self.numbers.insert(operation.info.id, number);
        self.operations.insert(number, operation);
        (number, subscription)
    }

    fn remove(&mut self, number: u64) {
        if let Some(operation) = self.operations.remove(&number) {
            self.numbers.remove(&operation.info.id);
        }
    }

    fn retain(&mut self, number: u64, kind: Kind, now: Moment) {
        let weight = self.operations.get(&number).map_or(0, Operation::weight);
        self.retained(kind).insert(now.at, number, weight);
        while let Some(oldest) = self.retained(kind).pop_excess() {
            self.remove(oldest);
        }
    }

    fn retained(&mut self, kind: Kind) -> &mut Retained {
        match kind {
            Kind::Worked => &mut self.worked,
            Kind::Cached => &mut self.cached,
            Kind::Unusable => &mut self.unusable,
        }
    }
}

/// What is left to tell about an operation that has just ended; the register may have forgotten it already.
#[derive(Debug)]
pub struct CompletedOperation {
    /// What never changed.
    pub info: Arc<OperationInfo>,
    /// Its priority.
    pub priority: i32,
    /// When it was submitted.
    pub queued: Instant,
}

/// Finished operations in the order in which they ended, bounded in number, bytes and age.
#[derive(Debug, Default)]
struct Retained {
    limit: usize,
    limit_bytes: usize,
    age: Duration,
    /// With what each of them weighs.
    by_end: BTreeMap<(Instant, u64), usize>,
    bytes: usize,
}

impl Retained {
    /// For operations that were over when they came.
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
        // The latest stays, whatever it weighs: whoever lost its stream comes back for it.
        let too_heavy = self.bytes > self.limit_bytes && self.by_end.len() > 1;
        if self.by_end.len() > self.limit || too_heavy { self.pop() } else { None }
    }

    fn pop_expired(&mut self, now: Moment) -> Option<u64> {
        let ((at, _), _) = self.by_end.first_key_value()?;
        if now.since(*at) < self.age { None } else { self.pop() }
    }

    fn pop(&mut self) -> Option<u64> {
        let ((_, number), weight) = self.by_end.pop_first()?;
        self.bytes = self.bytes.saturating_sub(weight);
        Some(number)
    }
}
