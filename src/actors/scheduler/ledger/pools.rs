//! Adding, draining and removing pools while tasks wait and run.
//!
//! When a pool is added, waiting tasks that it suits enter its queue too. A draining pool takes no more tasks, and its
//! running tasks continue. A task that can only run in this pool keeps waiting, because the pool may be replaced. When
//! a pool is removed, its runs are stopped and their tasks are tried again in other pools; waiting tasks that no other
//! pool suits end.
//!
//! A change looks at each task once, and costs O(log n) for each affected task. Changes of pools are rare.

use super::{Ledger, Task, TaskStep};
use crate::actors::{
    scheduler::{
        queue::Queue,
        settings::ClockReading,
        slots::{PoolId, PoolSet, PoolSpec, PoolStatus},
    },
    worker::messages::TaskId,
};
use gorego_reapi::error::Result;
use std::sync::Arc;

impl Ledger {
    /// Adds a pool. Waiting tasks that it suits wait for it too from now on. The caller then drains the pool that it
    /// replaces.
    ///
    /// # Errors
    /// `Precondition` if there are too many pools, or another pool with this name that is not draining.
    pub(crate) fn add_pool(&mut self, spec: PoolSpec, replaces: Option<PoolId>) -> Result<PoolId> {
        let id = self.slots.add(spec, replaces)?;
        self.ready.insert(id, Queue::new(self.settings.priority_ageing));
        self.add_to_tasks(id);
        Ok(id)
    }

    /// Stops a pool from taking tasks. Its running tasks continue: see [`Ledger::runs_in`]. Returns whether it took
    /// tasks before.
    ///
    /// # Errors
    /// `NotFound`.
    pub(crate) fn drain_pool(&mut self, id: PoolId) -> Result<bool> {
        let took_tasks = self.slots.drain(id)?;
        self.move_demand(id);
        Ok(took_tasks)
    }

    /// Removes a pool, drained or not. Its runs are stopped and tried again in another pool. Tasks that only this pool
    /// could run end.
    ///
    /// # Errors
    /// `NotFound`.
    pub(crate) fn remove_pool(&mut self, id: PoolId, now: ClockReading) -> Result<()> {
        self.slots.remove(id)?;
        self.ready.remove(&id);
        self.staging.remove(&id);
        let grace = self.settings.stop_grace;
        for run in self.runs.values_mut().filter(|run| run.pool == id) {
            run.evicted = true;
            run.cancel.cancel();
            run.deadline = run.deadline.min(now.after(grace));
        }
        self.remove_from_tasks(id, now);
        Ok(())
    }

    /// All pools, in order of preference.
    pub(crate) fn pools(&self) -> Vec<PoolStatus> {
        self.slots.status()
    }

    /// The name of a pool; empty if there is none.
    pub(crate) fn pool_name(&self, id: PoolId) -> Arc<str> {
        self.slots.name(id)
    }

    /// The number of runs of a pool that have not ended.
    pub(crate) fn runs_in(&self, id: PoolId) -> usize {
        self.runs.values().filter(|run| run.pool == id && !run.stuck).count()
    }

    /// Adds a new pool to the sets of all tasks that it suits, except tasks that ran out of as much memory as the pool
    /// gives them. A task keeps the other pools of its set, even if the new pool has made one of the task's properties
    /// known.
    fn add_to_tasks(&mut self, id: PoolId) {
        let gives_more =
            |task: &Task| task.more_than.is_none_or(|memory| self.slots.memory(id, &task.action) > memory);
        let suited = self.tasks.iter();
        let suited = suited.filter(|(_, task)| self.slots.suits(id, &task.action) && gives_more(task));
        let suited: Vec<_> = suited.map(|(task, _)| *task).collect();
        for task in suited {
            let Some(before) = self.tasks.get(&task).map(|task| task.pools.clone()) else { continue };
            let pools = self.slots.with(&before, id);
            self.set_pools(task, pools);
        }
    }

    /// Removes a removed pool from the sets of all tasks. Waiting tasks without another pool end.
    fn remove_from_tasks(&mut self, id: PoolId, now: ClockReading) {
        let affected = self.tasks.iter().filter(|(_, task)| task.pools.contains(&id));
        let affected: Vec<_> = affected.map(|(id, task)| (*id, task.pools.clone())).collect();
        for (task, before) in affected {
            let pools = self.slots.without(&before, id);
            self.set_pools(task, pools);
        }
        self.end_unserved(now);
    }

    /// Restricts a task to these pools.
    pub(super) fn set_pools(&mut self, id: TaskId, pools: PoolSet) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        task.position = None;
        let before = std::mem::replace(&mut task.pools, pools.clone());
        self.count_demand(id);
        let Some(task) = self.tasks.get(&id) else { return };
        if task.step != TaskStep::Ready {
            return;
        }
        if task.unfollowed_since.is_none() {
            self.unfollowed.waiting_counts.remove(&before);
            self.unfollowed.waiting_counts.add(&pools);
        }
        let entries = task.entries(id);
        let without = |pools: &PoolSet, others: &PoolSet| -> PoolSet {
            Arc::from_iter(pools.iter().copied().filter(|pool| !others.contains(pool)))
        };
        self.each_queue(TaskStep::Ready, &without(&before, &pools), |queue| {
            for entry in &entries {
                queue.remove(entry);
            }
        });
        self.each_queue(TaskStep::Ready, &without(&pools, &before), |queue| {
            entries.iter().for_each(|entry| queue.insert(*entry));
        });
    }
}
