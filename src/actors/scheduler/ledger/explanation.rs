//! Explains why an operation waits.
//!
//! Positions in the queues are not updated while tasks come and go. They are computed for all tasks at once when a
//! client asks and the last ones are too old. So the cost of the answers is bounded, however many clients ask.

use super::{Ledger, Task, TaskStep};
use crate::{
    actors::scheduler::{
        operation::{OperationId, QueueStatus},
        settings::ClockReading,
        slots::PoolId,
    },
    instance::Instance,
};
use std::time::{Duration, Instant};

/// How long computed positions are used. It is short, so that a new task soon has a position.
const POSITIONS_MAX_AGE: Duration = Duration::from_millis(100);

/// The additional time for each task that has a position. It is more than a hundred times the cost of a task (0.2 us
/// were measured), so the computation takes at most about one per cent of the scheduler's time.
const POSITIONS_AGE_PER_TASK: Duration = Duration::from_micros(50);

/// When positions were computed last, and for how many tasks.
#[derive(Debug, Default)]
pub(super) struct QueuePositions {
    made: Option<Instant>,
    tasks: u32,
}

impl QueuePositions {
    fn is_fresh(&self, now: ClockReading) -> bool {
        let age = POSITIONS_MAX_AGE.saturating_add(POSITIONS_AGE_PER_TASK.saturating_mul(self.tasks));
        self.made.is_some_and(|made| now.since(made) < age)
    }
}

impl Ledger {
    /// Why an operation waits; `None` if it does not wait or is unknown.
    pub(crate) fn explain(
        &mut self,
        instance: &Instance,
        id: OperationId,
        now: ClockReading,
    ) -> Option<QueueStatus> {
        let number = self.register.find(instance, id).ok()?;
        let id = self.register.get(number)?.task()?;
        if self.tasks.get(&id)?.step == TaskStep::Running {
            return None;
        }
        if !self.positions.is_fresh(now) {
            self.compute_positions(now);
        }
        let task = self.tasks.get(&id)?;
        let (pool, position) = self.best_place(task)?;
        let waiting = self.ready.get(&pool).map_or(0, |queue| queue.len());
        let (busy, slots) = self.slots.count(pool);
        let others = task.pools.iter().filter(|other| **other != pool && self.slots.is_open(**other));
        Some(QueueStatus {
            pool: self.pool_name(pool).to_string(),
            other_pools: others.map(|&other| self.pool_name(other).to_string()).collect(),
            // The positions may be older than the count.
            position: position.map(|position| position.min(waiting)),
            waiting,
            busy,
            slots,
            reason: self.reason_to_wait(task, pool),
        })
    }

    /// The pool in whose queue a task is closest to the front, and its position there. A task that is in no queue, or
    /// only in queues whose positions are not known, has a pool but no position.
    fn best_place(&self, task: &Task) -> Option<(PoolId, Option<usize>)> {
        let known =
            task.position.filter(|(pool, _)| task.step == TaskStep::Ready && self.slots.is_open(*pool));
        if let Some((pool, position)) = known {
            return Some((pool, Some(position)));
        }
        let open = task.pools.iter().find(|pool| self.slots.is_open(**pool));
        Some((*open.or(task.pools.first())?, None))
    }

    /// Describes what a task waits for. `pool` is the pool that will probably run it.
    fn reason_to_wait(&self, task: &Task, pool: PoolId) -> String {
        let mut reason = match task.step {
            TaskStep::Unchecked | TaskStep::Checking => "its inputs are being looked up".to_owned(),
            TaskStep::AwaitingImage => "its container image is being fetched".to_owned(),
            TaskStep::Ready | TaskStep::Running => self.reason_without_slot(task, pool),
        };
        if task.failures() > 0 {
            let (attempt, of) = (task.failures().saturating_add(1), self.settings.max_attempts);
            reason.push_str(&format!("; its worker failed, this is try {attempt} of {of}"));
        }
        reason
    }

    /// Why a ready task has no slot.
    fn reason_without_slot(&self, task: &Task, pool: PoolId) -> String {
        if !self.slots.is_served(&task.pools) {
            let pool = self.pool_name(pool);
            return format!("pool \"{pool}\" takes no more actions, and no other pool suits it");
        }
        if let Some((need, left)) = self.slots.shortage(pool, &task.action) {
            let pool = self.pool_name(pool);
            return format!("it needs {need}, of which pool \"{pool}\" has {left} free");
        }
        let (mut busy, mut slots) = (0usize, 0usize);
        for &pool in &*task.pools {
            let (busy_here, slots_here) = self.slots.count(pool);
            busy = busy.saturating_add(busy_here);
            slots = slots.saturating_add(slots_here);
        }
        let open = task.pools.iter().filter(|pool| self.slots.is_open(**pool));
        let names: Vec<_> = open.map(|&pool| format!("\"{}\"", self.pool_name(pool))).collect();
        let pools = if names.len() == 1 { "pool" } else { "pools" };
        format!("{busy} of {slots} slots of {pools} {} are busy", names.join(", "))
    }

    /// Computes the positions of all tasks.
    fn compute_positions(&mut self, now: ClockReading) {
        for task in self.tasks.values_mut() {
            task.position = None;
        }
        let mut count = 0u32;
        for pool in self.slots.order().iter().copied().filter(|pool| self.slots.is_open(*pool)) {
            let Some(queue) = self.ready.get(&pool) else { continue };
            for (ahead, id) in queue.order().into_iter().enumerate() {
                count = count.saturating_add(1);
                let Some(task) = self.tasks.get_mut(&id) else { continue };
                let position = ahead + 1;
                if task.position.is_none_or(|(_, best)| position < best) {
                    task.position = Some((pool, position));
                }
            }
        }
        self.positions = QueuePositions { made: Some(now.at), tasks: count };
    }
}
