//! The life of a task: the check of its inputs, the order of its image, the assignment to a slot, the run, and the conclusion
//! from its end.

use super::{Ledger, Outcome, Task, TaskRun, TaskStep};
use crate::{
    action::Action,
    actors::{
        scheduler::{
            operation::Stage,
            quota::{Load, SHARE},
            settings::ClockReading,
            slots::PoolId,
            transition::{OperationEvent, Transition},
        },
        worker::{
            cancel::CancelToken,
            messages::{Account, RunFailure, RunReport, RunStage, SlotId, StageReached, TaskId},
        },
    },
    caller::Peer,
    instance::Instance,
    platform::wanted_image,
};
use gorego_reapi::{
    digest::Digest,
    error::{Error, Result},
};
use std::{convert::Infallible, sync::Arc, time::SystemTime};
use tokio::sync::oneshot;

/// A decision: check whether the inputs of a task are stored.
#[derive(Debug)]
pub(crate) struct Check {
    pub(crate) task: TaskId,
    pub(crate) instance: Instance,
    /// The digest of the input root.
    pub(crate) root: Digest,
    /// The peer whose turn it was.
    pub(crate) peer: Peer,
}

/// A decision: bring the container image that a task names.
#[derive(Debug)]
pub(crate) struct ImageOrder {
    pub(crate) task: TaskId,
    pub(crate) name: String,
    /// The peer for which the task counts.
    pub(crate) peer: Peer,
    /// Closed when the task does not wait any more.
    pub(crate) left: oneshot::Receiver<Infallible>,
}

/// A decision: run a task on a slot.
#[derive(Debug)]
pub(crate) struct Assignment {
    pub(crate) task: TaskId,
    /// The number of the attempt, from 1.
    pub(crate) attempt: u32,
    pub(crate) pool: PoolId,
    pub(crate) slot: SlotId,
    pub(crate) action: Arc<Action>,
    /// The peer whose turn it was.
    pub(crate) peer: Peer,
    /// The time of the submission.
    pub(crate) queued_at: SystemTime,
    /// The tool invocation of the first operation.
    pub(crate) tool_invocation_id: String,
    /// The name of the principal of the first operation.
    pub(crate) principal: String,
    /// Tells the run to stop.
    pub(crate) cancel: CancelToken,
}

/// A fact: how a run ended.
#[derive(Debug)]
pub(crate) enum RunEnd {
    /// The worker has reported the end.
    Reported(RunReport),
    /// The worker died without a report.
    Lost {
        /// Whether all workers of the pool are gone.
        pool_closed: bool,
    },
}

impl Ledger {
    /// The next task whose inputs are to be checked, in the order of a queue; `None` while enough checks are running, or the peer
    /// or build that is next has its share of them. Each check must be answered by [`Ledger::inputs_checked`], whatever happens.
    pub(crate) fn next_check(&mut self, now: ClockReading) -> Option<Check> {
        let left = self.settings.concurrent_checks.checked_sub(self.checks.len() + 1)?;
        let (of_peer, of_build) = self.unchecked.running_of_next(now.at);
        // How many more its peer may have after this one.
        let left_to_peer = left.saturating_mul(SHARE).saturating_sub(of_peer + 1) / (SHARE + 1);
        if of_peer > 0 && of_peer >= left.saturating_mul(SHARE)
            || of_build > 0 && of_build >= left_to_peer.saturating_mul(SHARE)
        {
            return None;
        }
        let (id, charge) = self.unchecked.pop(now.at)?;
        self.checks.insert(id, charge);
        let task = self.tasks.get_mut(&id)?;
        for entry in task.entries(id) {
            self.unchecked.remove(&entry);
        }
        task.step = TaskStep::Checking;
        Some(Check {
            task: id,
            instance: task.action.instance.clone(),
            root: task.action.input_root,
            peer: charge.owner.peer,
        })
    }

    /// The store has checked the inputs of a task. An error ends the task before it takes a slot.
    pub(crate) fn inputs_checked(&mut self, id: TaskId, result: Result<()>, now: ClockReading) {
        if let Some(charge) = self.checks.remove(&id) {
            self.unchecked.ended(charge);
        }
        let Some(task) = self.tasks.get_mut(&id).filter(|task| task.step == TaskStep::Checking) else {
            return;
        };
        match result {
            Ok(()) if self.brings_images && !matches!(wanted_image(&task.action.platform), Ok(None)) => {
                task.step = TaskStep::AwaitingImage;
                self.image_orders.push_back(id);
            }
            Ok(()) => self.make_ready(id),
            Err(error) => self.end_task(id, Outcome::failed(error), now),
        }
    }

    /// The next task whose image is to be brought. Each order should be answered by [`Ledger::image_brought`], unless the task
    /// has left. There is no bound but that of the queue: who orders only waits, and shares the pulls with all others.
    pub(crate) fn next_image(&mut self, now: ClockReading) -> Option<ImageOrder> {
        while let Some(id) = self.image_orders.pop_front() {
            let Some(task) = self.tasks.get_mut(&id) else { continue };
            match wanted_image(&task.action.platform) {
                Ok(Some(name)) => {
                    let (order, left) = oneshot::channel();
                    task.image_order = Some(order);
                    return Some(ImageOrder { task: id, name: name.to_owned(), peer: task.owner.peer, left });
                }
                Ok(None) => self.make_ready(id),
                Err(problem) => self.end_task(id, Outcome::failed(Error::Invalid(problem)), now),
            }
        }
        None
    }

    /// The image of a task is there, so the task may have a slot. An error ends the task before it takes one. If the disk has no
    /// room for the image, the task takes its slot, where room is made for what runs next.
    pub(crate) fn image_brought(&mut self, id: TaskId, result: Result<()>, now: ClockReading) {
        let Some(task) = self.tasks.get_mut(&id).filter(|task| task.step == TaskStep::AwaitingImage) else {
            return;
        };
        task.image_order = None;
        match result {
            Ok(()) | Err(Error::DiskFull(_)) => self.make_ready(id),
            Err(error) => self.end_task(id, Outcome::failed(error), now),
        }
    }

    fn make_ready(&mut self, id: TaskId) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        task.step = TaskStep::Ready;
        self.enter_queues(id);
    }

    /// The next task to run, with its slot. It is `None` if there is no free slot for a ready task; runs without followers are
    /// then told to make way for tasks with followers. Pools choose in order of preference, so a task goes to the most preferred
    /// pool that is free. Each assignment must be answered by [`Ledger::finish`], whatever happens.
    pub(crate) fn assign(&mut self, now: ClockReading) -> Option<Assignment> {
        let Some((pool, id, charge)) = self.next_ready(now) else {
            self.make_way(now);
            return None;
        };
        let task = self.tasks.get_mut(&id)?;
        let (place, room) = self.slots.take(pool, &task.action)?;
        task.step = TaskStep::Running;
        self.unfollowed.note(id, task);
        // If it is queued again, its position is another one.
        task.position = None;
        task.attempts = task.attempts.saturating_add(1);
        self.quota.remove(task.owner, Load::TURN);
        let limits = &self.settings;
        let bound = [task.action.timeout, limits.transfer_timeout, limits.transfer_timeout, limits.run_slack]
            .into_iter()
            .fold(std::time::Duration::ZERO, std::time::Duration::saturating_add);
        let run = TaskRun {
            attempt: task.attempts,
            pool,
            place: place.clone(),
            room,
            charge,
            cancel: CancelToken::new(),
            started: now.at,
            deadline: now.after(bound),
            // A worker does not report its first stage.
            reached: Some((RunStage::Fetching, now.wall)),
            logs: None,
            stuck: false,
            evicted: false,
        };
        let assignment = Assignment {
            task: id,
            attempt: task.attempts,
            pool,
            slot: place.slot,
            action: task.action.clone(),
            peer: charge.owner.peer,
            queued_at: task.queued_at,
            tool_invocation_id: task.first.client.tool_invocation_id.clone(),
            principal: task.first.principal.name().to_owned(),
            cancel: run.cancel.clone(),
        };
        for number in task.numbers() {
            let executing = |snapshot: &mut super::Snapshot| {
                snapshot.stage = Stage::Executing;
                snapshot.place = Some(place.clone());
                snapshot.run_stage = run.reached;
            };
            let Some(operation) = self.register.update(number, executing) else { continue };
            let event = OperationEvent::Executing {
                place: run.place.clone(),
                queued_for: now.since(operation.queued),
                attempt: task.attempts,
            };
            let (info, priority) = (operation.info.clone(), operation.priority);
            self.transitions.push(Transition { info, priority, event });
        }
        self.runs.insert(id, run);
        self.count_demand(id);
        Some(assignment)
    }

    /// A worker has entered a stage of a run. Late or repeated reports are ignored.
    pub(crate) fn stage_reached(&mut self, fact: StageReached) {
        let run = self.runs.get_mut(&fact.task).filter(|run| run.attempt == fact.attempt);
        let Some(run) = run else { return };
        if run.reached.is_some_and(|(stage, _)| stage >= fact.stage) {
            return;
        }
        run.reached = Some((fact.stage, fact.at));
        run.logs = fact.logs.or(run.logs);
        let logs = run.logs;
        let Some(task) = self.tasks.get(&fact.task) else { return };
        for number in task.numbers() {
            self.register.update(number, |snapshot| {
                snapshot.run_stage = Some((fact.stage, fact.at));
                snapshot.logs = logs;
            });
        }
    }

    /// A run has ended. Its slot is free, and its task ends or is tried again (EXE-62). A report about a run that is no longer
    /// known is ignored.
    pub(crate) fn finish(&mut self, id: TaskId, attempt: u32, end: RunEnd, now: ClockReading) {
        let Some(run) = self.runs.get(&id).filter(|run| run.attempt == attempt) else { return };
        let (pool, place, charge, evicted) = (run.pool, run.place.clone(), run.charge, run.evicted);
        let (room, was_stuck) = (run.room, run.stuck);
        let closed = matches!(end, RunEnd::Lost { pool_closed: true });
        // This comes first, so that a task without another pool is not queued again.
        if closed {
            self.slots.close(pool);
            self.move_demand(pool);
        }
        let failed = match &end {
            RunEnd::Reported(Ok(_)) => false,
            RunEnd::Reported(Err(failure)) => failure.retryable,
            RunEnd::Lost { .. } => true,
        };
        let log = match &end {
            RunEnd::Reported(Ok(report)) => report.account.log,
            RunEnd::Reported(Err(failure)) => failure.account.log,
            RunEnd::Lost { .. } => None,
        };
        if let Some(task) = self.tasks.get_mut(&id) {
            task.keep_log(log);
        }
        if let RunEnd::Reported(Ok(report)) = &end {
            self.note_memory(id, pool, &report.account);
        }
        match end {
            RunEnd::Reported(Ok(report)) if report.account.out_of_memory && self.move_up(id, pool, now) => {}
            RunEnd::Reported(Ok(report)) => {
                let outcome = Outcome {
                    result: Some(report.result),
                    cached: false,
                    error: None,
                    message: report.account.message,
                    server_logs: Vec::new(),
                };
                self.end_task(id, outcome, now);
            }
            RunEnd::Reported(Err(RunFailure { error: Error::Cancelled(_), .. })) | RunEnd::Lost { .. }
                if evicted =>
            {
                let error = format!("pool \"{}\" was removed while the action ran", place.pool);
                self.retry_evicted(id, error, now);
            }
            RunEnd::Reported(Err(failure)) if failure.retryable => self.retry(id, failure.error, now),
            RunEnd::Reported(Err(failure)) => {
                let message = failure.account.message;
                self.end_task(
                    id,
                    Outcome { result: failure.partial, message, ..Outcome::failed(failure.error) },
                    now,
                );
            }
            RunEnd::Lost { .. } => {
                let error = format!("the worker on slot {} of pool \"{}\" died", place.slot.0, place.pool);
                self.retry(id, Error::Unavailable(error), now);
            }
        }
        self.runs.remove(&id);
        self.slots.release(pool, place.slot, &room, failed);
        if was_stuck {
            self.slots.unstick(pool);
        }
        if let Some(queue) = self.ready.get_mut(&pool) {
            queue.ended(charge);
        }
        if closed {
            self.end_unserved(now);
        }
    }

    /// Queues a task again whose pool was removed. This is no failure of the action, so it does not count as an attempt.
    pub(super) fn retry_evicted(&mut self, id: TaskId, reason: String, now: ClockReading) {
        if let Some(task) = self.tasks.get_mut(&id) {
            task.evictions = task.evictions.saturating_add(1);
        }
        self.retry(id, Error::Unavailable(reason), now);
    }

    /// Learns from a run how much memory its kind of action takes.
    fn note_memory(&mut self, id: TaskId, pool: PoolId, account: &Account) {
        let Some(task) = self.tasks.get(&id) else { return };
        let Some(key) = self.peak_key(&task.first) else { return };
        let limit = self.slots.memory(pool, &task.action);
        // It would have taken more than it got.
        let bytes = if account.out_of_memory { limit.saturating_add(1) } else { account.memory };
        if bytes > 0 {
            self.peaks.note(key, bytes);
        }
    }

    /// Tries a task that ran out of memory again where it gets more; false if there is no such pool or it was tried often enough.
    fn move_up(&mut self, id: TaskId, pool: PoolId, now: ClockReading) -> bool {
        let Some(task) = self.tasks.get(&id) else { return false };
        let (action, pools, failures) = (task.action.clone(), task.pools.clone(), task.failures());
        let memory = self.slots.memory(pool, &action);
        let larger = self.slots.with_more_memory(&pools, memory, &action);
        if larger.is_empty() || failures >= self.settings.max_attempts {
            return false;
        }
        if let Some(task) = self.tasks.get_mut(&id) {
            task.more_than = Some(memory);
        }
        self.set_pools(id, larger);
        let name = self.slots.name(pool);
        let reason = format!("the action ran out of memory in pool \"{name}\", and others give it more");
        self.retry(id, Error::Unavailable(reason), now);
        true
    }

    /// Queues a task again, with its old age, after its worker failed. Ends it if it was tried often enough or no pool is left.
    fn retry(&mut self, id: TaskId, reason: Error, now: ClockReading) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        if task.failures() >= self.settings.max_attempts {
            let error = Error::Unavailable(format!(
                "action {} was given up after {} tries: {reason}",
                task.action.digest, task.attempts
            ));
            return self.end_task(id, Outcome::failed(error), now);
        }
        if !self.slots.may_wait(&task.pools) && !self.settle_for_less(id) {
            let Some(task) = self.tasks.get(&id) else { return };
            let error = self.slots.unserved(&task.action);
            return self.end_task(id, Outcome::failed(error), now);
        }
        let Some(task) = self.tasks.get_mut(&id) else { return };
        // Its inputs were checked before. If some are missing now, the next run reports them.
        self.unfollowed.forget(id, task);
        task.step = TaskStep::Ready;
        task.waiting_since = now.at;
        self.quota.add(task.owner, Load::TURN);
        self.enter_queues(id);
        self.count_demand(id);
        let Some(task) = self.tasks.get(&id) else { return };
        for number in task.numbers() {
            let requeue = |snapshot: &mut super::Snapshot| {
                snapshot.stage = Stage::Queued;
                snapshot.place = None;
                snapshot.run_stage = None;
                snapshot.logs = None;
            };
            let Some(operation) = self.register.update(number, requeue) else { continue };
            let (info, priority) = (operation.info.clone(), operation.priority);
            let event = OperationEvent::Requeued { reason: reason.clone(), attempt: task.attempts };
            self.transitions.push(Transition { info, priority, event });
        }
    }

    /// Has a task that ran out of memory wait for all pools that suit it, because those that would give it more are gone. Its next
    /// run may end as the last one did, which is then its result. False if that does not help.
    fn settle_for_less(&mut self, id: TaskId) -> bool {
        let Some(task) = self.tasks.get_mut(&id) else { return false };
        if task.more_than.take().is_none() {
            return false;
        }
        let action = task.action.clone();
        let Ok(pools) = self.slots.matching(&action) else { return false };
        let helps = self.slots.may_wait(&pools);
        self.set_pools(id, pools);
        helps
    }

    /// Ends the waiting tasks for which no pool is left.
    pub(super) fn end_unserved(&mut self, now: ClockReading) {
        let unserved = |task: &Task| task.step != TaskStep::Running && !self.slots.may_wait(&task.pools);
        let unserved: Vec<_> =
            self.tasks.iter().filter(|(_, task)| unserved(task)).map(|(id, _)| *id).collect();
        for id in unserved {
            if self.settle_for_less(id) {
                continue;
            }
            let Some(action) = self.tasks.get(&id).map(|task| task.action.clone()) else { continue };
            let error = self.slots.unserved(&action);
            self.end_task(id, Outcome::failed(error), now);
        }
    }
}
