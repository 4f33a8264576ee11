//! The end of a run: its task ends or is tried again.

use super::{Ledger, Outcome, Snapshot, Task, TaskRun, TaskStep, dispatch::RunEnd};
use crate::actors::{
    scheduler::{
        operation::Stage,
        quota::Load,
        settings::ClockReading,
        slots::PoolId,
        transition::{OperationEvent, Transition},
    },
    worker::messages::{Account, RunFailure, RunResult, TaskId},
};
use gorego_reapi::error::Error;

impl RunEnd {
    /// Whether the failure is caused by the slot and not by the action.
    fn is_failure_of_slot(&self) -> bool {
        match self {
            Self::Reported(Ok(_)) => false,
            Self::Reported(Err(failure)) => failure.retryable,
            Self::Lost { .. } => true,
        }
    }

    fn account(&self) -> Option<&Account> {
        match self {
            Self::Reported(Ok(report)) => Some(&report.account),
            Self::Reported(Err(failure)) => Some(&failure.account),
            Self::Lost { .. } => None,
        }
    }
}

impl Ledger {
    /// A run has ended. Its slot is free, and its task ends or is tried again (EXE-62). A report about a run that is no
    /// longer known is ignored.
    pub(crate) fn finish(&mut self, id: TaskId, attempt: u32, end: RunEnd, now: ClockReading) {
        let Some(run) = self.runs.get(&id).filter(|run| run.attempt == attempt) else { return };
        let pool = run.pool;
        let is_closed = matches!(end, RunEnd::Lost { pool_closed: true });
        // This comes first, so that a task without another pool is not queued again.
        if is_closed {
            self.slots.close(pool);
            self.move_demand(pool);
        }
        let has_failed = end.is_failure_of_slot();
        if let Some(task) = self.tasks.get_mut(&id) {
            task.keep_log(end.account().and_then(|account| account.log));
        }
        // The run is still known meanwhile: the operations of the task report where it ran.
        self.conclude(id, end, now);
        if let Some(run) = self.runs.remove(&id) {
            self.free_slot(run, has_failed);
        }
        if is_closed {
            self.end_unserved(now);
        }
    }

    /// Ends the task of a run, or tries it again.
    fn conclude(&mut self, id: TaskId, end: RunEnd, now: ClockReading) {
        let Some(run) = self.runs.get(&id) else { return };
        let (pool, place, is_evicted) = (run.pool, run.place.clone(), run.evicted);
        match end {
            RunEnd::Reported(Ok(report)) => self.conclude_result(id, pool, *report, now),
            RunEnd::Reported(Err(RunFailure { error: Error::Cancelled(_), .. })) | RunEnd::Lost { .. }
                if is_evicted =>
            {
                let error = format!("pool \"{}\" was removed while the action ran", place.pool);
                self.retry_evicted(id, error, now);
            }
            RunEnd::Reported(Err(failure)) if failure.retryable => self.retry(id, failure.error, now),
            RunEnd::Reported(Err(failure)) => {
                let message = failure.account.message;
                let outcome = Outcome { result: failure.partial, message, ..Outcome::failed(failure.error) };
                self.end_task(id, outcome, now);
            }
            RunEnd::Lost { .. } => {
                let error = format!("the worker on slot {} of pool \"{}\" died", place.slot.0, place.pool);
                self.retry(id, Error::Unavailable(error), now);
            }
        }
    }

    /// Ends a task that has a result, unless it ran out of memory and can be tried where it gets more.
    fn conclude_result(&mut self, id: TaskId, pool: PoolId, report: RunResult, now: ClockReading) {
        self.note_memory(id, pool, &report.account);
        if report.account.out_of_memory && self.retry_with_more_memory(id, pool, now) {
            return;
        }
        let outcome = Outcome {
            result: Some(report.result),
            cached: false,
            error: None,
            message: report.account.message,
            server_logs: Vec::new(),
        };
        self.end_task(id, outcome, now);
    }

    /// Releases the slot and the room of a run.
    fn free_slot(&mut self, run: TaskRun, has_failed: bool) {
        self.slots.release(run.pool, run.place.slot, &run.room, has_failed);
        if run.stuck {
            self.slots.unstick(run.pool);
        }
        if let Some(queue) = self.ready.get_mut(&run.pool) {
            queue.ended(run.charge);
        }
    }

    /// Queues a task again whose pool was removed. This is not a failure of the action, so it does not count as an
    /// attempt.
    pub(super) fn retry_evicted(&mut self, id: TaskId, reason: String, now: ClockReading) {
        if let Some(task) = self.tasks.get_mut(&id) {
            task.evictions = task.evictions.saturating_add(1);
        }
        self.retry(id, Error::Unavailable(reason), now);
    }

    /// Records how much memory this kind of action used.
    fn note_memory(&mut self, id: TaskId, pool: PoolId, account: &Account) {
        let Some(task) = self.tasks.get(&id) else { return };
        let Some(key) = self.peak_key(&task.first) else { return };
        let limit = self.slots.memory(pool, &task.action);
        // The action would have used more than its limit.
        let bytes = if account.out_of_memory { limit.saturating_add(1) } else { account.memory };
        if bytes > 0 {
            self.peaks.note(key, bytes);
        }
    }

    /// Tries a task that ran out of memory again in pools that give it more memory. Returns false if there is no such
    /// pool, or if it was tried often enough.
    fn retry_with_more_memory(&mut self, id: TaskId, pool: PoolId, now: ClockReading) -> bool {
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

    /// Queues a task again after its worker failed. The task keeps its original age. Ends it if it was tried often
    /// enough or no pool is left.
    fn retry(&mut self, id: TaskId, reason: Error, now: ClockReading) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        if task.failures() >= self.settings.max_attempts {
            let error = Error::Unavailable(format!(
                "action {} was given up after {} tries: {reason}",
                task.action.digest, task.attempts
            ));
            return self.end_task(id, Outcome::failed(error), now);
        }
        if !self.slots.may_wait(&task.pools) && !self.accept_less_memory(id) {
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
            let requeue = |snapshot: &mut Snapshot| {
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

    /// Makes a task that ran out of memory wait for all suitable pools again, because the pools that would give it more
    /// memory are gone. The result of its next run is final, even if it runs out of memory again. Returns false if that
    /// does not help.
    fn accept_less_memory(&mut self, id: TaskId) -> bool {
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
            if self.accept_less_memory(id) {
                continue;
            }
            let Some(action) = self.tasks.get(&id).map(|task| task.action.clone()) else { continue };
            let error = self.slots.unserved(&action);
            self.end_task(id, Outcome::failed(error), now);
        }
    }
}
