//! [`Demand`]: the waiting tasks, by the pool in which each of them would run if every pool had a free slot.
//!
//! This is the most preferred pool of the task that takes tasks or, if none does, the most preferred pool. Each waiting
//! task is counted once, whether its inputs were checked or not, although it is in the queue of every pool that can run
//! it. So the numbers of all pools add up, and an autoscaler that follows them starts no slot twice.
//!
//! A change costs O(log n). Draining a pool costs O(log n) for each task that was counted for it.

use super::{Ledger, TaskStep};
use crate::actors::{
    scheduler::{
        messages::PoolMeasurement,
        settings::ClockReading,
        slots::{PoolId, PoolSet, PoolStatus},
    },
    worker::messages::TaskId,
};
use std::{collections::BTreeMap, time::Instant};

/// The waiting tasks of each pool with their submission times, which ascend with their ids.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Demand(BTreeMap<PoolId, BTreeMap<TaskId, Instant>>);

impl Demand {
    pub(super) fn add(&mut self, pool: PoolId, id: TaskId, since: Instant) {
        self.0.entry(pool).or_default().insert(id, since);
    }

    pub(super) fn remove(&mut self, pool: PoolId, id: TaskId) {
        let Some(tasks) = self.0.get_mut(&pool) else { return };
        tasks.remove(&id);
        if tasks.is_empty() {
            self.0.remove(&pool);
        }
    }

    /// The number of tasks that wait for a pool, and the submission time of the oldest.
    fn of(&self, pool: PoolId) -> (usize, Option<Instant>) {
        let Some(tasks) = self.0.get(&pool) else { return (0, None) };
        (tasks.len(), tasks.first_key_value().map(|(_, since)| *since))
    }

    fn tasks(&self, pool: PoolId) -> Vec<TaskId> {
        self.0.get(&pool).into_iter().flat_map(|tasks| tasks.keys().copied()).collect()
    }
}

impl Ledger {
    /// The pool in which a task with these pools would run if all of them had a free slot.
    pub(super) fn home(&self, pools: &PoolSet) -> Option<PoolId> {
        let open = pools.iter().find(|pool| self.slots.is_open(**pool));
        open.or(pools.first()).copied()
    }

    /// Counts a waiting task for the pool in which it would run now, and for no other pool.
    pub(super) fn count_demand(&mut self, id: TaskId) {
        let Some(task) = self.tasks.get(&id) else { return };
        let home = (task.step != TaskStep::Running).then(|| self.home(&task.pools)).flatten();
        let (before, since) = (task.home, task.queued);
        if before == home {
            return;
        }
        if let Some(before) = before {
            self.demand.remove(before, id);
        }
        if let Some(home) = home {
            self.demand.add(home, id, since);
        }
        if let Some(task) = self.tasks.get_mut(&id) {
            task.home = home;
        }
    }

    /// Handles a pool that takes no more tasks: the tasks that wait for it may count for another pool.
    pub(super) fn move_demand(&mut self, pool: PoolId) {
        for id in self.demand.tasks(pool) {
            self.count_demand(id);
        }
    }

    /// The measurements of each pool, in order of preference. Costs O(pools), however many tasks there are.
    pub(crate) fn measure(&self, now: ClockReading) -> Vec<PoolMeasurement> {
        let measure = |status: PoolStatus| {
            let (waiting, oldest) = self.demand.of(status.id);
            PoolMeasurement {
                waiting,
                oldest: oldest.map(|since| now.since(since)),
                desired: waiting.saturating_add(status.busy.saturating_sub(status.stuck)),
                status,
            }
        };
        self.slots.status().into_iter().map(measure).collect()
    }
}
