//! The [`Ledger`]: the scheduler's mind. Facts and the time go in, decisions come out; it does nothing itself.
//!
//! It owns the operations, the tasks that they wait for, the queue and the slots. Its invariants:
//! - An unfinished operation waits for exactly one task, and a task without operations does not exist.
//! - A task is waiting (unchecked, checking or ready, in that order) or running; only ready tasks are given a slot.
//! - A ready task stands in the queue of each pool that can take it, and one that is running in none.
//! - A task that no client follows waits behind all that are followed, and gives its slot up when one of those needs it.
//! - A task has a place in the queues for each owner that waits for it, counts for one of them in the [`Room`] that there is
//!   for tasks, and for the one whose turn it was while it runs.
//! - A slot belongs to one run from [`Ledger::assign`] until [`Ledger::finish`], whatever becomes of the task meanwhile: a
//!   run that was told to stop, or was given up, holds its slot until its worker answers.
//! - Every state has a deadline that [`Ledger::tick`] enforces, so that every operation ends, exactly once.
//!
//! This file has what clients ask for; `ledger/dispatch.rs` has the way of a task through checks, slots and runs,
//! `ledger/waiting.rs` where tasks wait and why, `ledger/followers.rs` what becomes of work that no client follows,
//! `ledger/pools.rs` pools that come and go, `ledger/deadlines.rs` the clock, `ledger/task.rs` what tasks and runs are.
//! What happened is kept as [`Transition`]s until [`Ledger::take_transitions`].

mod deadlines;
mod dispatch;
#[cfg(test)]
pub(super) mod fixtures;
mod followers;
mod pools;
#[cfg(test)]
mod simulation;
mod task;
#[cfg(test)]
mod tests;
mod waiting;

use super::{
    messages::{Inspection, ListOperations, OperationPage, Submit},
    operation::{OperationId, OperationInfo, Outcome, Snapshot, Stage, Subscription},
    queue::{Charge, Queue},
    register::Register,
    room::Room,
    settings::{Moment, SchedulerSettings},
    slots::{PoolId, PoolSpec, Slots},
    transition::{Event, Transition},
};
use crate::{
    action::Action,
    actors::{cas::resolve::Resolution, worker::messages::TaskId},
    instance::Instance,
};
use gorego_reapi::error::{Error, Result};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    hash::RandomState,
    sync::Arc,
    time::Duration,
};

pub use dispatch::{Assignment, Check, RunEnd};
use followers::Unfollowed;
use task::{Key, Run, Step, Task, key};
use waiting::Board;

/// All work that is known here. See the file's head.
#[derive(Debug)]
pub struct Ledger {
    settings: SchedulerSettings,
    register: Register,
    slots: Slots,
    tasks: BTreeMap<TaskId, Task>,
    /// The task that an identical action joins.
    joinable: HashMap<Key, TaskId>,
    runs: BTreeMap<TaskId, Run>,
    unchecked: Queue,
    /// The queue of each pool.
    ready: BTreeMap<PoolId, Queue>,
    board: Board,
    unfollowed: Unfollowed,
    /// Names builds. Keyed at random, so that nobody can choose names that fall together.
    names: RandomState,
    /// What the tasks take up, for their owners.
    room: Room,
    /// Checks at the CAS, of tasks that were cancelled meanwhile too.
    checks: BTreeMap<TaskId, Charge>,
    draining: bool,
    transitions: Vec<Transition>,
}

impl Outcome {
    fn failed(error: Error) -> Self {
        Self {
            result: None,
            cached: false,
            error: Some(error),
            message: String::new(),
            server_logs: Vec::new(),
        }
    }
}

impl Ledger {
    /// An empty ledger over these pools, whose ids ascend in the order of the list.
    pub fn new(settings: SchedulerSettings, pools: Vec<PoolSpec>) -> Self {
        let queue = || Queue::new(settings.priority_ageing);
        let slots = Slots::new(pools, settings.unknown_properties);
        Self {
            register: Register::new(&settings),
            ready: slots.order().iter().map(|pool| (*pool, queue())).collect(),
            unchecked: queue(),
            slots,
            room: Room::new(&settings),
            settings,
            board: Board::default(),
            unfollowed: Unfollowed::default(),
            names: RandomState::new(),
            tasks: BTreeMap::new(),
            joinable: HashMap::new(),
            runs: BTreeMap::new(),
            checks: BTreeMap::new(),
            draining: false,
            transitions: Vec::new(),
        }
    }

    /// Takes an action in, once the store has said what there is to do about it. A hit is completed at birth, and so is what
    /// cannot run, so that its name is known like any other (EXE-02). Other work joins the identical task in flight, also when
    /// the client asked to skip the cache (EXE-17), or is queued.
    ///
    /// # Errors
    /// `Unavailable` while draining; `Exhausted` when the queue is full, or this peer or build has its share of it;
    /// `Precondition` when no pool suits (EXE-31).
    pub fn admit(
        &mut self,
        submit: Submit,
        resolution: Resolution,
        id: OperationId,
        now: Moment,
    ) -> Result<Subscription> {
        if self.draining {
            return Err(Error::Unavailable("this server is shutting down; try again".into()));
        }
        let Submit { instance, action: digest, priority, inline, client, caller, .. } = submit;
        let peer = caller.peer;
        let priority = self.settings.priorities.nearest(priority);
        let info = Arc::new(OperationInfo { id, instance, action: digest, inline, client, peer });
        match resolution {
            Resolution::Cached(result) => {
                let outcome = Outcome {
                    result: Some(result),
                    cached: true,
                    error: None,
                    message: String::new(),
                    server_logs: Vec::new(),
                };
                Ok(self.complete_at_birth(info, priority, outcome, now))
            }
            Resolution::Unusable(error) => {
                Ok(self.complete_at_birth(info, priority, Outcome::failed(error), now))
            }
            Resolution::Run(action) => {
                self.register.check_place(peer)?;
                match key(&action).and_then(|key| self.joinable.get(&key).copied()) {
                    Some(task) => Ok(self.join(task, info, priority, now)),
                    None => self.enqueue(action, info, priority, now),
                }
            }
        }
    }

    /// Enters an operation that waits for nothing.
    fn complete_at_birth(
        &mut self,
        info: Arc<OperationInfo>,
        priority: i32,
        outcome: Outcome,
        now: Moment,
    ) -> Subscription {
        let outcome = Arc::new(outcome);
        let event = Event::Completed { outcome: outcome.clone(), place: None, queued_for: None };
        self.transitions.push(Transition { info: info.clone(), priority, event });
        self.register.enter_finished(info, priority, outcome, now)
    }

    fn join(&mut self, task: TaskId, info: Arc<OperationInfo>, priority: i32, now: Moment) -> Subscription {
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
            Some(run) => Event::Executing { place: run.place.clone(), queued_for: Duration::ZERO, attempt },
            None => Event::Queued { joined: true },
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
        now: Moment,
    ) -> Result<Subscription> {
        let pools = self.slots.suitable(&action)?;
        let owner = self.owner(&info);
        let weight = action.weight();
        self.room.check(owner, weight)?;
        let id = TaskId(self.register.next_number());
        let snapshot = Snapshot::queued(now.wall);
        let (number, subscription) = self.register.enter(info.clone(), priority, id, snapshot, now);
        let task = Task {
            action,
            weight,
            pools,
            first: info.clone(),
            queued_at: now.wall,
            queued: now.at,
            waiting_since: now.at,
            attempts: 0,
            waiters: BTreeMap::from([(owner, BTreeSet::from([(priority, number)]))]),
            owner,
            followers: 1,
            unfollowed_since: None,
            step: Step::Unchecked,
            server_logs: Vec::new(),
            position: None,
        };
        if let Some(key) = task.key() {
            self.joinable.insert(key, id);
        }
        self.room.add(owner, task.load());
        self.tasks.insert(id, task);
        self.enter_queues(id);
        self.transitions.push(Transition { info, priority, event: Event::Queued { joined: false } });
        Ok(subscription)
    }

    /// Follows an operation (EXE-12); one that was about to be given up for want of followers goes on.
    ///
    /// # Errors
    /// `NotFound` (EXE-13).
    pub fn watch(&mut self, instance: &Instance, id: OperationId) -> Result<Subscription> {
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

    /// Ends an operation as cancelled, and its task with its last operation (OPS-03, OPS-04). No harm to a finished one.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn cancel(&mut self, instance: &Instance, id: OperationId, now: Moment) -> Result<()> {
        let number = self.register.find(instance, id)?;
        self.leave(number, Error::Cancelled("the operation was cancelled by a client".into()), now);
        Ok(())
    }

    /// Forgets a finished operation.
    ///
    /// # Errors
    /// `NotFound`; `Precondition` when it is not finished.
    pub fn forget(&mut self, instance: &Instance, id: OperationId) -> Result<()> {
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
    /// `Invalid` when the filter names a pool that there is not.
    pub fn list(&self, query: &ListOperations) -> Result<OperationPage> {
        let named = query.filter.pool.as_deref().map(|name| self.slots.named(name)).transpose()?;
        let named = named.unwrap_or_default();
        // An operation that waits is in no pool yet, but in the queues of some.
        let waits_for_pool = |task| {
            let task = self.tasks.get(&task);
            task.is_some_and(|task| task.pools.iter().any(|pool| named.contains(pool)))
        };
        Ok(self.register.page(query, waits_for_pool))
    }

    /// Counts, for people and health checks.
    pub fn inspect(&self) -> Inspection {
        let stuck = self.runs.values().filter(|run| run.stuck && self.slots.is_open(run.pool)).count();
        Inspection {
            operations: self.register.len(),
            queued: self.room.all().waiting,
            running: self.runs.len(),
            slots: self.slots.in_service().saturating_sub(stuck),
        }
    }

    /// Admits nothing from now on, and ends what nobody follows; with `cancel`, ends everything. Both with a status that
    /// clients retry.
    pub fn drain(&mut self, cancel: bool, now: Moment) {
        self.draining = true;
        if !cancel {
            self.notice_losses(now);
            self.end_unfollowed(now);
            return;
        }
        for id in self.tasks.keys().copied().collect::<Vec<_>>() {
            self.end_for_shutdown(id, now);
        }
    }

    fn end_for_shutdown(&mut self, id: TaskId, now: Moment) {
        let error = Error::Unavailable("this server is shutting down; try again".into());
        self.end_task(id, Outcome::failed(error), now);
        self.stop_run(id, now);
    }

    /// Whether nothing is left to wait for: no task, and no run but those that were given up.
    pub fn is_idle(&self) -> bool {
        self.tasks.is_empty() && self.runs.values().all(|run| run.stuck)
    }

    /// What happened since the last call, in order.
    pub fn take_transitions(&mut self) -> Vec<Transition> {
        std::mem::take(&mut self.transitions)
    }

    /// Ends one operation; its task stops when it was the last.
    fn leave(&mut self, number: u64, error: Error, now: Moment) {
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

    /// Ends a task and all its operations. A run of it, if there still is one, is the caller's to stop.
    fn end_task(&mut self, id: TaskId, outcome: Outcome, now: Moment) {
        let Some(mut task) = self.remove_task(id) else { return };
        let server_logs = std::mem::take(&mut task.server_logs);
        let outcome = Arc::new(Outcome { server_logs, ..outcome });
        for number in task.numbers() {
            self.complete(number, id, outcome.clone(), now);
        }
    }

    fn complete(&mut self, number: u64, task: TaskId, outcome: Arc<Outcome>, now: Moment) {
        let Some(operation) = self.register.complete(number, outcome.clone(), now) else { return };
        let run = self.runs.get(&task);
        let waited_until = run.map_or(now.at, |run| run.started);
        let event = Event::Completed {
            outcome,
            place: run.map(|run| run.place.clone()),
            queued_for: Some(waited_until.saturating_duration_since(operation.queued)),
        };
        self.transitions.push(Transition { info: operation.info, priority: operation.priority, event });
    }

    /// Takes a task off the books: nobody can join it, it gets no slot.
    fn remove_task(&mut self, id: TaskId) -> Option<Task> {
        let task = self.tasks.remove(&id)?;
        self.room.remove(task.owner, task.load());
        if let Some(key) = task.key() {
            self.joinable.remove(&key);
        }
        self.leave_queues(id, &task);
        self.unfollowed.forget(id, &task);
        Some(task)
    }

    /// Tells a run to stop. Its slot stays taken until the worker reports.
    fn stop_run(&mut self, id: TaskId, now: Moment) {
        if let Some(run) = self.runs.get_mut(&id) {
            run.cancel.cancel();
            run.deadline = run.deadline.min(now.after(self.settings.stop_grace));
        }
    }
}
