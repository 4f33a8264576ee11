//! The deadlines of the ledger.

use super::{Ledger, Outcome, TaskStep};
use crate::actors::{
    scheduler::{
        settings::{ClockReading, QUEUE_FULL_RETRY},
        slots::SlotName,
    },
    worker::messages::TaskId,
};
use gorego_reapi::error::Error;
use std::sync::Arc;

impl Ledger {
    /// Enforces every deadline. It is called about once a second. Returns the slots that are now out of service because
    /// their runs neither end nor stop. These slots return to service when their workers answer.
    pub(crate) fn tick(&mut self, now: ClockReading) -> Vec<Arc<SlotName>> {
        self.end_overdue_waits(now);
        let stuck = self.give_up_overdue_runs(now);
        self.find_unfollowed(now);
        if self.draining {
            self.end_unfollowed(now);
        }
        for number in self.register.abandoned(self.settings.abandon_grace, now) {
            self.leave(number, Error::Cancelled("nobody follows the operation any more".into()), now);
        }
        self.register.expire(now);
        stuck
    }

    fn end_overdue_waits(&mut self, now: ClockReading) {
        let limit = self.settings.queue_timeout;
        let is_overdue =
            |task: &super::Task| task.step != TaskStep::Running && now.since(task.waiting_since) >= limit;
        let overdue: Vec<TaskId> =
            self.tasks.iter().filter(|(_, task)| is_overdue(task)).map(|(id, _)| *id).collect();
        for id in overdue {
            // Not DeadlineExceeded, which means that the command itself timed out (EXE-45).
            let error = Error::Exhausted {
                message: format!("no worker was free for {} s (execution.queue_timeout)", limit.as_secs()),
                retry_after: Some(QUEUE_FULL_RETRY),
            };
            self.end_task(id, Outcome::failed(error), now);
        }
    }

    fn give_up_overdue_runs(&mut self, now: ClockReading) -> Vec<Arc<SlotName>> {
        let overdue: Vec<TaskId> = self
            .runs
            .iter()
            .filter(|(_, run)| !run.stuck && now.at >= run.deadline)
            .map(|(id, _)| *id)
            .collect();
        let mut stuck = Vec::with_capacity(overdue.len());
        for id in overdue {
            let Some(run) = self.runs.get_mut(&id) else { continue };
            if run.evicted {
                self.give_up_evicted(id, now);
                continue;
            }
            run.stuck = true;
            run.cancel.cancel();
            self.slots.stick(run.pool);
            let error = Error::Unavailable(format!(
                "the worker on slot {} of pool \"{}\" did not answer for {} s and was given up; try again",
                run.place.slot.0,
                run.place.pool,
                now.since(run.started).as_secs()
            ));
            stuck.push(run.place.clone());
            self.end_task(id, Outcome::failed(error), now);
        }
        stuck
    }

    /// Forgets a run whose pool is gone and that has not stopped in time. No slot depends on its worker, so its task
    /// continues.
    fn give_up_evicted(&mut self, id: TaskId, now: ClockReading) {
        let Some(pool) = self.runs.get(&id).map(|run| run.place.pool.clone()) else { return };
        let reason = format!("pool \"{pool}\" was removed while the action ran, and the run did not stop");
        self.retry_evicted(id, reason, now);
        self.runs.remove(&id);
    }
}
