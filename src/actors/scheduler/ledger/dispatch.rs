//! The way of a task: inputs checked, a slot, a run, and what its end means.

use super::{Ledger, Outcome, Run, Step, Task};
use crate::{
    action::Action,
    actors::{
        scheduler::{
            operation::Stage,
            room::{Load, SHARE},
            settings::Moment,
            slots::PoolId,
            transition::{Event, Transition},
        },
        worker::{
            cancel::CancelToken,
            messages::{RunFailure, RunReport, RunStage, SlotId, StageReached, TaskId},
        },
    },
    caller::Peer,
    instance::Instance,
};
use gorego_reapi::{
    digest::Digest,
    error::{Error, Result},
};
use std::{sync::Arc, time::SystemTime};

/// A decision: ask the CAS whether the inputs of this task are all there.
#[derive(Debug)]
pub struct Check {
    /// Whose inputs.
    pub task: TaskId,
    /// Where they are.
    pub instance: Instance,
    /// Digest of the root Directory.
    pub root: Digest,
    /// Whose turn it was.
    pub peer: Peer,
}

/// A decision: run this task on this slot.
#[derive(Debug)]
pub struct Assignment {
    /// The work.
    pub task: TaskId,
    /// The pool.
    pub pool: PoolId,
    /// The slot in the pool.
    pub slot: SlotId,
    /// What to run.
    pub action: Arc<Action>,
    /// Whose turn it was.
    pub peer: Peer,
    /// When the task was taken in.
    pub queued_at: SystemTime,
    /// The tool invocation that brought the task in.
    pub tool_invocation_id: String,
    /// How the run is told to stop.
    pub cancel: CancelToken,
}

/// A fact: how a run ended.
#[derive(Debug)]
pub enum RunEnd {
    /// The worker says so.
    Reported(RunReport),
    /// The worker will never say.
    Lost {
        /// The pool takes no more mail, for good.
        pool_closed: bool,
    },
}

impl Ledger {
    /// The next task whose inputs are to be checked, in the order of a pool's queue; `None` while enough checks are out, or the
    /// peer or build whose turn it is has its share of them. Each one must be answered by [`Ledger::inputs_checked`], whatever happens.
    pub fn next_check(&mut self, now: Moment) -> Option<Check> {
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
        for place in task.places(id) {
            self.unchecked.remove(&place);
        }
        task.step = Step::Checking;
        Some(Check {
            task: id,
            instance: task.action.instance.clone(),
            root: task.action.input_root,
            peer: charge.owner.peer,
        })
    }

    /// The CAS has looked at a task's inputs. Whatever is wrong with them ends the task before it takes a slot.
    pub fn inputs_checked(&mut self, id: TaskId, result: Result<()>, now: Moment) {
        if let Some(charge) = self.checks.remove(&id) {
            self.unchecked.ended(charge);
        }
        let Some(task) = self.tasks.get_mut(&id).filter(|task| task.step == Step::Checking) else { return };
        match result {
            Ok(()) => {
                task.step = Step::Ready;
                self.enter_queues(id);
            }
            Err(error) => self.end_task(id, Outcome::failed(error), now),
        }
    }

    /// The next task to run, and where; `None` when no ready task has a free slot, in which case runs that nobody follows
    /// are told to make way for tasks that are followed. Pools choose in order of preference, so that a task goes to the
    /// best one that is free. Each assignment must be answered by [`Ledger::finish`], whatever happens.
    pub fn assign(&mut self, now: Moment) -> Option<Assignment> {
        let Some((pool, id, charge)) = self.next_ready(now) else {
            self.make_way(now);
            return None;
        };
        let place = self.slots.take(pool)?;
        let task = self.tasks.get_mut(&id)?;
        task.step = Step::Running;
        self.unfollowed.note(id, task);
        // Should it come back, it stands somewhere else.
        task.position = None;
        task.attempts = task.attempts.saturating_add(1);
        self.room.remove(task.owner, Load::TURN);
        let limits = &self.settings;
        let bound = [task.action.timeout, limits.transfer_timeout, limits.transfer_timeout, limits.run_slack]
            .into_iter()
            .fold(std::time::Duration::ZERO, std::time::Duration::saturating_add);
        let run = Run {
            pool,
            place: place.clone(),
            charge,
            cancel: CancelToken::new(),
            started: now.at,
            deadline: now.after(bound),
            // That is what a worker begins with, and it says nothing of it.
            reached: Some((RunStage::Fetching, now.wall)),
            logs: None,
            stuck: false,
            evicted: false,
        };
        let assignment = Assignment {
            task: id,
            pool,
            slot: place.slot,
            action: task.action.clone(),
            peer: charge.owner.peer,
            queued_at: task.queued_at,
            tool_invocation_id: task.first.client.tool_invocation_id.clone(),
            cancel: run.cancel.clone(),
        };
        for number in task.numbers() {
            let executing = |snapshot: &mut super::Snapshot| {
                snapshot.stage = Stage::Executing;
                snapshot.place = Some(place.clone());
                snapshot.run_stage = run.reached;
            };
            let Some(operation) = self.register.update(number, executing) else { continue };
            let event = Event::Executing {
                place: run.place.clone(),
                queued_for: now.since(operation.queued),
                attempt: task.attempts,
            };
            let (info, priority) = (operation.info.clone(), operation.priority);
            self.transitions.push(Transition { info, priority, event });
        }
        self.runs.insert(id, run);
        Some(assignment)
    }

    /// A worker has entered a step of a run. Late or repeated news changes nothing.
    pub fn stage_reached(&mut self, fact: StageReached) {
        let Some(run) = self.runs.get_mut(&fact.task) else { return };
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

    /// A run is over: its slot is free, and its task is done, tried again, or given up (EXE-62).
    pub fn finish(&mut self, id: TaskId, end: RunEnd, now: Moment) {
        let Some(run) = self.runs.get(&id) else { return };
        let (pool, place, charge, evicted) = (run.pool, run.place.clone(), run.charge, run.evicted);
        let closed = matches!(end, RunEnd::Lost { pool_closed: true });
        // Before the task is judged: a task that no pool is left for must not be queued again.
        if closed {
            self.slots.close(pool);
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
        match end {
            RunEnd::Reported(Ok(report)) => {
                let outcome = Outcome {
                    result: Some(Arc::new(report.result)),
                    cached: false,
                    error: None,
                    message: report.account.message,
                    server_logs: Vec::new(),
                };
                self.end_task(id, outcome, now);
            }
            RunEnd::Reported(Err(failure)) if failure.retryable => self.retry(id, failure.error, now),
            RunEnd::Reported(Err(RunFailure { error: Error::Cancelled(_), .. })) if evicted => {
                let error = format!("pool \"{}\" was removed while the action ran", place.pool);
                self.retry(id, Error::Unavailable(error), now);
            }
            RunEnd::Reported(Err(failure)) => {
                let result = failure.partial.map(|partial| Arc::new(*partial));
                let message = failure.account.message;
                self.end_task(id, Outcome { result, message, ..Outcome::failed(failure.error) }, now);
            }
            RunEnd::Lost { .. } => {
                let error = format!("the worker on slot {} of pool \"{}\" died", place.slot.0, place.pool);
                self.retry(id, Error::Unavailable(error), now);
            }
        }
        self.runs.remove(&id);
        self.slots.release(pool, place.slot, failed);
        if let Some(queue) = self.ready.get_mut(&pool) {
            queue.ended(charge);
        }
        if closed {
            self.end_unserved(now);
        }
    }

    /// Queues a task again after a fault of its worker, in its old place; gives it up when it was tried often enough or has
    /// nowhere to go.
    fn retry(&mut self, id: TaskId, reason: Error, now: Moment) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        if task.attempts >= self.settings.max_attempts {
            let error = Error::Unavailable(format!(
                "action {} was given up after {} tries: {reason}",
                task.action.digest, task.attempts
            ));
            return self.end_task(id, Outcome::failed(error), now);
        }
        if !self.slots.may_wait(&task.pools) {
            let error = self.slots.unserved(&task.action);
            return self.end_task(id, Outcome::failed(error), now);
        }
        // Its inputs were checked when it came in; if some have gone since, its next run will say so.
        self.unfollowed.forget(id, task);
        task.step = Step::Ready;
        task.waiting_since = now.at;
        self.room.add(task.owner, Load::TURN);
        self.enter_queues(id);
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
            let event = Event::Requeued { reason: reason.clone(), attempt: task.attempts };
            self.transitions.push(Transition { info, priority, event });
        }
    }

    /// Ends the waiting tasks that no pool is left for.
    pub(super) fn end_unserved(&mut self, now: Moment) {
        let unserved = |task: &Task| task.step != Step::Running && !self.slots.may_wait(&task.pools);
        let unserved: Vec<_> =
            self.tasks.iter().filter(|(_, task)| unserved(task)).map(|(id, _)| *id).collect();
        for id in unserved {
            let Some(action) = self.tasks.get(&id).map(|task| task.action.clone()) else { continue };
            let error = self.slots.unserved(&action);
            self.end_task(id, Outcome::failed(error), now);
        }
    }
}
