//! The [`Ledger`]: all decisions of the scheduler. Pure. Facts and the time go in, and decisions come out.
//!
//! It owns the operations, the tasks that they wait for, the queues and the slots. Its invariants:
//! - An unfinished operation waits for exactly one task, and a task without operations does not exist.
//! - A task is waiting (unchecked, checking, awaiting its image if it names one, or ready, in that order) or running.
//!   Only ready tasks are given a slot.
//! - A ready task is in the queue of each pool that can run it. A running task is in no queue.
//! - Tasks without followers wait behind all tasks with followers, and give up their slots if these need them.
//! - A task has an entry in its queues for each owner that waits for it. It counts for one of them in the
//!   [`QueueQuota`] and, while it runs, for the owner whose turn it was.
//! - A slot belongs to one run from [`Ledger::assign`] until [`Ledger::finish`], even if the task ends earlier: a run
//!   that was told to stop, or was given up, holds its slot until its worker answers.
//! - Every state has a deadline that [`Ledger::tick`] enforces, so every operation ends exactly once.
//!
//! This file handles the requests of clients. `ledger/dispatch.rs` handles input checks and slots,
//! `ledger/conclusion.rs` the end of runs, `ledger/waiting.rs` the queues, `ledger/explanation.rs` why an operation
//! waits, `ledger/followers.rs` tasks without followers, `ledger/active_builds.rs` the builds whose leases have to be
//! kept, `ledger/peaks.rs` the memory use of earlier actions,
//! `ledger/staging.rs` the staging of inputs during the wait, `ledger/pools.rs` the changes of pools, and
//! `ledger/deadlines.rs` the deadlines. `ledger/task.rs` defines tasks and runs. Each step of an operation is recorded
//! as a [`Transition`] until [`Ledger::take_transitions`].

mod active_builds;
mod conclusion;
mod deadlines;
mod demand;
mod dispatch;
mod explanation;
#[cfg(test)]
pub(super) mod fixtures;
mod followers;
mod peaks;
mod pools;
#[cfg(test)]
mod simulation;
mod staging;
mod task;
#[cfg(test)]
mod tests;
mod waiting;

use super::{
    messages::{Inspection, ListOperations, OperationPage, Submit},
    operation::{FinishedOperation, OperationId, OperationInfo, Outcome, Snapshot, Stage, Subscription},
    queue::{Charge, Queue},
    quota::QueueQuota,
    register::{FinishedKind, Register},
    settings::{ClockReading, SchedulerSettings},
    slots::{PoolId, PoolSpec, Slots},
    transition::{OperationEvent, Transition},
};
use crate::{
    action::Action,
    actors::{cas::resolve::Resolution, worker::messages::TaskId},
    instance::Instance,
};
use gorego_reapi::error::{Error, Result};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    hash::{BuildHasher as _, RandomState},
    sync::Arc,
    time::Duration,
};

use demand::Demand;
pub(crate) use dispatch::{Assignment, Check, ImageOrder, RunEnd};
use explanation::QueuePositions;
use followers::Unfollowed;
use peaks::{PeakKey, Peaks};
pub(crate) use staging::StagingOrder;
use task::{Task, TaskKey, TaskRun, TaskStep, key};

/// All operations, tasks and pools; see the top of this file.
#[derive(Debug)]
pub(crate) struct Ledger {
    settings: SchedulerSettings,
    register: Register,
    slots: Slots,
    tasks: BTreeMap<TaskId, Task>,
    /// The tasks that identical actions join.
    joinable: HashMap<TaskKey, TaskId>,
    runs: BTreeMap<TaskId, TaskRun>,
    unchecked: Queue,
    ready: BTreeMap<PoolId, Queue>,
    positions: QueuePositions,
    unfollowed: Unfollowed,
    /// The memory that earlier actions used.
    peaks: Peaks,
    demand: Demand,
    /// Hashes the names of builds. It is randomly keyed, so clients cannot force collisions.
    names: RandomState,
    /// The part of the queue that each owner uses.
    quota: QueueQuota,
    /// The running input checks, including those of tasks that have ended meanwhile.
    checks: BTreeMap<TaskId, Charge>,
    /// Whether the container images of tasks are pulled. Otherwise the names of images have no meaning here.
    brings_images: bool,
    /// Tasks whose images were not ordered yet.
    image_orders: VecDeque<TaskId>,
    /// The pools that can stage the inputs of waiting tasks, and whether each is doing so.
    staging: BTreeMap<PoolId, bool>,
    /// The last task that [`Ledger::active_builds`] has examined.
    examined: Option<TaskId>,
    draining: bool,
    transitions: Vec<Transition>,
}

impl Ledger {
    /// An empty ledger over these pools, whose ids ascend in the order of the list.
    pub(crate) fn new(settings: SchedulerSettings, pools: Vec<PoolSpec>) -> Self {
        let queue = || Queue::new(settings.priority_ageing);
        let slots = Slots::new(pools, settings.unknown_properties);
        Self {
            register: Register::new(&settings),
            ready: slots.order().iter().map(|pool| (*pool, queue())).collect(),
            unchecked: queue(),
            slots,
            quota: QueueQuota::new(&settings),
            settings,
            positions: QueuePositions::default(),
            unfollowed: Unfollowed::default(),
            peaks: Peaks::default(),
            demand: Demand::default(),
            names: RandomState::new(),
            tasks: BTreeMap::new(),
            joinable: HashMap::new(),
            runs: BTreeMap::new(),
            checks: BTreeMap::new(),
            brings_images: false,
            image_orders: VecDeque::new(),
            staging: BTreeMap::new(),
            examined: None,
            draining: false,
            transitions: Vec::new(),
        }
    }

    /// From now on, tasks wait for the container images that they name. See [`Ledger::next_image`].
    pub(crate) fn bring_images(&mut self) {
        self.brings_images = true;
    }

    /// Admits an action that was looked up in the store. An action that has a cached result or cannot run becomes an
    /// operation that has already ended, so that its name is known like any other (EXE-02). Any other action joins a
    /// task of the identical action, even if the client asked to skip the cache (EXE-17), or is queued.
    ///
    /// # Errors
    /// `Unavailable` during a shutdown, or if no suitable pool takes tasks; `Exhausted` if the queue is full, or this
    /// peer or build has its share; `OverQuota` if its quota is used up; `Precondition` if no pool is suitable
    /// (EXE-31).
    pub(crate) fn admit(
        &mut self,
        submit: Submit,
        resolution: Resolution,
        id: OperationId,
        now: ClockReading,
    ) -> Result<Subscription> {
        if self.draining {
            return Err(Error::Unavailable("this server is shutting down; try again".into()));
        }
        let limits = submit.limits;
        let (info, priority) = submit.into_info(id);
        let over = |outcome, info, priority| FinishedOperation::new(info, priority, outcome, now.wall);
        match resolution {
            Resolution::Cached(result) => Ok(self.record(over(Outcome::cached(result), info, priority), now)),
            Resolution::Unusable(error) => Ok(self.record(over(Outcome::failed(error), info, priority), now)),
            Resolution::Run(action) => {
                let priority = self.settings.priorities.nearest(priority);
                self.register.check_place(&info, limits)?;
                match key(&action).and_then(|key| self.joinable.get(&key).copied()) {
                    Some(task) => Ok(self.join(task, info, priority, now)),
                    None => self.enqueue(action, info, priority, now),
                }
            }
        }
    }

    /// Adds an operation that has already ended. This also works during a shutdown, because the client may already have
    /// the answer.
    pub(crate) fn record(&mut self, operation: FinishedOperation, now: ClockReading) -> Subscription {
        let subscription = operation.subscribe();
        let FinishedOperation { info, priority, outcome, snapshot } = operation;
        let priority = self.settings.priorities.nearest(priority);
        let kind = if outcome.cached { FinishedKind::Cached } else { FinishedKind::Unusable };
        self.register.enter_finished(info.clone(), priority, kind, snapshot, now);
        let event = OperationEvent::Completed { outcome, place: None, queued_for: None };
        self.transitions.push(Transition { info, priority, event });
        subscription
    }

    fn join(
        &mut self,
        task: TaskId,
        info: Arc<OperationInfo>,
        priority: i32,
        now: ClockReading,
    ) -> Subscription {
        let run = self.runs.get(&task);
        let snapshot = Snapshot {
            stage: if run.is_some() { Stage::Executing } else { Stage::Queued },
            place: run.map(|run| run.place.clone()),
            run_stage: run.and_then(|run| run.reached),
            logs: run.and_then(|run| run.logs),
            ..Snapshot::queued(now.wall)
        };
        let attempt = self.tasks.get(&task).map_or(0, |task| task.attempts);
        let event = match run {
            Some(run) => {
                OperationEvent::Executing { place: run.place.clone(), queued_for: Duration::ZERO, attempt }
            }
            None => OperationEvent::Queued { joined: true },
        };
        self.transitions.push(Transition { info: info.clone(), priority, event });
        let owner = self.owner(&info);
        let (number, subscription) = self.register.enter(info, priority, task, snapshot, now);
        self.add_waiter(task, owner, (priority, number));
        self.gain_follower(task);
        subscription
    }

    fn enqueue(
        &mut self,
        action: Arc<Action>,
        info: Arc<OperationInfo>,
        priority: i32,
        now: ClockReading,
    ) -> Result<Subscription> {
        let pools = self.slots.suitable(&action)?;
        let owner = self.owner(&info);
        let weight = action.weight();
        self.quota.check(owner, weight)?;
        let id = TaskId(self.register.next_number());
        let snapshot = Snapshot::queued(now.wall);
        let (number, subscription) = self.register.enter(info.clone(), priority, id, snapshot, now);
        let task = Task {
            action,
            weight,
            pools,
            more_than: None,
            first: info.clone(),
            queued_at: now.wall,
            queued: now.at,
            waiting_since: now.at,
            attempts: 0,
            evictions: 0,
            waiters: BTreeMap::from([(owner, BTreeSet::from([(priority, number)]))]),
            owner,
            followers: 1,
            unfollowed_since: None,
            step: TaskStep::Unchecked,
            image_order: None,
            staging: None,
            server_logs: Vec::new(),
            position: None,
            home: None,
        };
        if let Some(key) = task.key() {
            self.joinable.insert(key, id);
        }
        self.quota.add(owner, task.load());
        self.tasks.insert(id, task);
        self.enter_queues(id);
        self.count_demand(id);
        self.transitions.push(Transition { info, priority, event: OperationEvent::Queued { joined: false } });
        Ok(subscription)
    }

    /// Subscribes to an operation (EXE-12). An operation without followers is followed again.
    ///
    /// # Errors
    /// `NotFound` (EXE-13).
    pub(crate) fn watch(&mut self, instance: &Instance, id: OperationId) -> Result<Subscription> {
        let number = self.register.find(instance, id)?;
        let (subscription, gained) = self
            .register
            .subscribe(number)
            .ok_or_else(|| Error::internal("an operation vanished while it was asked for"))?;
        if let Some(task) = gained {
            self.gain_follower(task);
        }
        Ok(subscription)
    }

    /// Ends an operation as cancelled. Its task ends with its last operation (OPS-03, OPS-04). A finished operation is
    /// not changed.
    ///
    /// # Errors
    /// `NotFound`.
    pub(crate) fn cancel(&mut self, instance: &Instance, id: OperationId, now: ClockReading) -> Result<()> {
        let number = self.register.find(instance, id)?;
        self.leave(number, Error::Cancelled("the operation was cancelled by a client".into()), now);
        Ok(())
    }

    /// Removes a finished operation from the register.
    ///
    /// # Errors
    /// `NotFound`; `Precondition` when it is not finished.
    pub(crate) fn forget(&mut self, instance: &Instance, id: OperationId) -> Result<()> {
        let number = self.register.find(instance, id)?;
        if self.register.forget(number) {
            return Ok(());
        }
        Err(Error::Precondition(format!(
            "operation {} is not finished; cancel it before deleting it",
            instance.qualify(&format!("operations/{id}"))
        )))
    }

    /// A page of operations, oldest first.
    ///
    /// # Errors
    /// `Invalid` when the filter names an unknown pool.
    pub(crate) fn list(&self, query: &ListOperations) -> Result<OperationPage> {
        let named = query.filter.pool.as_deref().map(|name| self.slots.named(name)).transpose()?;
        let named = named.unwrap_or_default();
        // A waiting operation is in no pool yet, but it is in the queues of some.
        let waits_for_pool = |task| {
            let task = self.tasks.get(&task);
            task.is_some_and(|task| task.pools.iter().any(|pool| named.contains(pool)))
        };
        Ok(self.register.page(query, waits_for_pool))
    }

    /// The numbers of operations, tasks and slots.
    pub(crate) fn inspect(&self) -> Inspection {
        Inspection {
            operations: self.register.len(),
            queued: self.quota.all().waiting,
            running: self.runs.len(),
            slots: self.slots.in_service(),
        }
    }

    /// Admits no more actions, and ends tasks without followers. If `cancel` is set, ends all tasks. Both end with a
    /// status that clients retry.
    pub(crate) fn drain(&mut self, cancel: bool, now: ClockReading) {
        self.draining = true;
        if !cancel {
            self.find_unfollowed(now);
            self.end_unfollowed(now);
            return;
        }
        for id in self.tasks.keys().copied().collect::<Vec<_>>() {
            self.end_for_shutdown(id, now);
        }
    }

    fn end_for_shutdown(&mut self, id: TaskId, now: ClockReading) {
        let error = Error::Unavailable("this server is shutting down; try again".into());
        self.end_task(id, Outcome::failed(error), now);
        self.stop_run(id, now);
    }

    /// Whether there are no tasks, and no runs other than those that were given up.
    pub(crate) fn is_idle(&self) -> bool {
        self.tasks.is_empty() && self.runs.values().all(|run| run.stuck)
    }

    /// The transitions since the last call, in order.
    pub(crate) fn take_transitions(&mut self) -> Vec<Transition> {
        std::mem::take(&mut self.transitions)
    }

    /// Ends one operation, and stops its task if that was its last operation.
    fn leave(&mut self, number: u64, error: Error, now: ClockReading) {
        let Some(operation) = self.register.get(number) else { return };
        let (Some(task), priority) = (operation.task(), operation.priority) else { return };
        let (was_followed, owner) = (operation.is_followed(), self.owner(&operation.info));
        self.complete(number, task, Arc::new(Outcome::failed(error)), now);
        let is_last = self.tasks.get(&task).is_some_and(|task| task.has_one_waiter());
        if is_last {
            self.remove_task(task);
            self.stop_run(task, now);
        } else {
            self.remove_waiter(task, owner, (priority, number));
            if was_followed {
                self.lose_follower(task, now);
            }
        }
    }

    /// Ends a task and all its operations. The caller stops the run of the task, if there is one.
    fn end_task(&mut self, id: TaskId, outcome: Outcome, now: ClockReading) {
        let Some(mut task) = self.remove_task(id) else { return };
        let server_logs = std::mem::take(&mut task.server_logs);
        let outcome = Arc::new(Outcome { server_logs, ..outcome });
        for number in task.numbers() {
            self.complete(number, id, outcome.clone(), now);
        }
    }

    fn complete(&mut self, number: u64, task: TaskId, outcome: Arc<Outcome>, now: ClockReading) {
        let Some(operation) = self.register.complete(number, outcome.clone(), now) else { return };
        let run = self.runs.get(&task);
        let waited_until = run.map_or(now.at, |run| run.started);
        let event = OperationEvent::Completed {
            outcome,
            place: run.map(|run| run.place.clone()),
            queued_for: Some(waited_until.saturating_duration_since(operation.queued)),
        };
        self.transitions.push(Transition { info: operation.info, priority: operation.priority, event });
    }

    /// Removes a task, so that it cannot be joined and gets no slot.
    fn remove_task(&mut self, id: TaskId) -> Option<Task> {
        let task = self.tasks.remove(&id)?;
        self.quota.remove(task.owner, task.load());
        if let Some(key) = task.key() {
            self.joinable.remove(&key);
        }
        self.leave_queues(id, &task);
        self.unfollowed.forget(id, &task);
        if let Some(home) = task.home {
            self.demand.remove(home, id);
        }
        if let Some(staging) = &task.staging {
            staging.cancel();
        }
        Some(task)
    }

    /// The key under which the memory of an action is recorded; `None` if its client does not name a target or
    /// mnemonic.
    fn peak_key(&self, info: &OperationInfo) -> Option<PeakKey> {
        let (target, mnemonic) = (&info.client.target_id, &info.client.action_mnemonic);
        let is_named = !target.is_empty() || !mnemonic.is_empty();
        is_named.then(|| PeakKey(self.names.hash_one((info.instance.id(), target, mnemonic))))
    }

    /// Tells a run to stop. Its slot stays busy until the worker reports.
    fn stop_run(&mut self, id: TaskId, now: ClockReading) {
        if let Some(run) = self.runs.get_mut(&id) {
            run.cancel.cancel();
            run.deadline = run.deadline.min(now.after(self.settings.stop_grace));
        }
    }
}
