//! Pools that come and go while tasks wait and run.
//!
//! A pool is added, drained and removed. Waiting tasks that a new pool suits enter its queue too. While a pool drains, it takes
//! no more tasks, and those that it runs go on; a task that waits for this pool only waits on, so that the pool can be
//! replaced. When a pool is removed, its runs are told to stop and their tasks are tried again in other pools, and waiting
//! tasks that no other pool suits end.
//!
//! A change looks at each task once, at a cost of O(log n) for each task that is affected. Pools change when people or
//! machines come and go, which is rare.

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
    /// Adds a pool. Tasks that wait and that it suits wait for it too from now on.
    ///
    /// # Errors
    /// `Precondition` when there are too many pools, or one with this name that is not draining.
    pub(crate) fn add_pool(&mut self, spec: PoolSpec) -> Result<PoolId> {
        let id = self.slots.add(spec)?;
        self.ready.insert(id, Queue::new(self.settings.priority_ageing));
        self.offer_pool(id);
        Ok(id)
    }

    /// Has a pool take no more tasks. Those that it runs go on: see [`Ledger::runs_in`].
    ///
    /// # Errors
    /// `NotFound`.
    pub(crate) fn drain_pool(&mut self, id: PoolId) -> Result<()> {
        self.slots.drain(id)?;
        self.move_demand(id);
        Ok(())
    }

    /// Removes a pool, drained or not. What it still runs is told to stop and tried again in another pool; tasks that only this
    /// pool could run end.
    ///
    /// # Errors
    /// `NotFound`.
    pub(crate) fn remove_pool(&mut self, id: PoolId, now: ClockReading) -> Result<()> {
        self.slots.remove(id)?;
        self.ready.remove(&id);
        let grace = self.settings.stop_grace;
        for run in self.runs.values_mut().filter(|run| run.pool == id) {
            run.evicted = true;
            run.cancel.cancel();
            run.deadline = run.deadline.min(now.after(grace));
        }
        self.withdraw_pool(id, now);
        Ok(())
    }

    /// All pools, in order of preference.
    pub(crate) fn pools(&self) -> Vec<PoolStatus> {
        self.slots.status()
    }

    /// The name of a pool; empty when there is none.
    pub(crate) fn pool_name(&self, id: PoolId) -> Arc<str> {
        self.slots.name(id)
    }

    /// How many runs of a pool are still waited for.
    pub(crate) fn runs_in(&self, id: PoolId) -> usize {
        self.runs.values().filter(|run| run.pool == id && !run.stuck).count()
    }

    /// A new pool is in the sets of all tasks that it suits, unless a task has run out of as much memory as the pool gives it. A task keeps the other pools of its set, for which it was admitted,
    /// even if the new pool has made one of the task's properties known.
    fn offer_pool(&mut self, id: PoolId) {
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

    /// No task is in the queue of a removed pool. Those that wait and have no other pool end.
    fn withdraw_pool(&mut self, id: PoolId, now: ClockReading) {
        let affected = self.tasks.iter().filter(|(_, task)| task.pools.contains(&id));
        let affected: Vec<_> = affected.map(|(id, task)| (*id, task.pools.clone())).collect();
        for (task, before) in affected {
            let pools = self.slots.without(&before, id);
            self.set_pools(task, pools);
        }
        self.end_unserved(now);
    }

    /// From now on, a task can run in these pools and no others.
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
            self.unfollowed.rivals.remove(&before);
            self.unfollowed.rivals.add(&pools);
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
