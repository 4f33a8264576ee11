//! The queues in which tasks wait.
//!
//! A ready task is in the queue of each pool that can run it. The first pool with a free slot for it takes it out of
//! all queues. In each queue, the task has an entry for each owner that waits for it.

use super::{Ledger, Task, TaskStep};
use crate::actors::{
    scheduler::{
        operation::OperationInfo,
        queue::{Build, Charge, Owner, Queue},
        settings::ClockReading,
        slots::{PoolId, PoolSet},
    },
    worker::messages::TaskId,
};
use std::hash::BuildHasher as _;

impl Ledger {
    /// The owner of an operation. Builds whose hashes collide, which is very unlikely, count as one build.
    pub(super) fn owner(&self, info: &OperationInfo) -> Owner {
        let build = Build(self.names.hash_one((info.instance.id(), &info.client.tool_invocation_id)));
        Owner { peer: info.peer, build }
    }

    /// Adds a task to the queues in which it waits at its current step.
    pub(super) fn enter_queues(&mut self, id: TaskId) {
        let Some(task) = self.tasks.get(&id) else { return };
        let (entries, step, pools) = (task.entries(id), task.step, task.pools.clone());
        if step == TaskStep::Ready && task.unfollowed_since.is_none() {
            self.unfollowed.waiting_counts.add(&pools);
        }
        self.each_queue(step, &pools, |queue| entries.iter().for_each(|entry| queue.insert(*entry)));
    }

    /// Removes a task from the queues in which it waits.
    pub(super) fn leave_queues(&mut self, id: TaskId, task: &Task) {
        let entries = task.entries(id);
        if task.step == TaskStep::Ready && task.unfollowed_since.is_none() {
            self.unfollowed.waiting_counts.remove(&task.pools);
        }
        self.each_queue(task.step, &task.pools, |queue| {
            for entry in &entries {
                queue.remove(entry);
            }
        });
    }

    /// Adds an operation that waits for a task, and the queue entry for its owner.
    pub(super) fn add_waiter(&mut self, id: TaskId, owner: Owner, waiter: (i32, u64)) {
        self.change_entry(id, owner, |task| {
            task.waiters.entry(owner).or_default().insert(waiter);
        });
    }

    /// Removes an operation, which is not the last one, from those that wait for a task.
    pub(super) fn remove_waiter(&mut self, id: TaskId, owner: Owner, waiter: (i32, u64)) {
        self.change_entry(id, owner, |task| {
            let Some(own) = task.waiters.get_mut(&owner) else { return };
            own.remove(&waiter);
            if own.is_empty() {
                task.waiters.remove(&owner);
            }
        });
        let Some(task) = self.tasks.get_mut(&id) else { return };
        if !task.waiters.contains_key(&task.owner)
            && let Some((&heir, _)) = task.waiters.first_key_value()
        {
            let load = task.load();
            self.quota.remove(task.owner, load);
            self.quota.add(heir, load);
            task.owner = heir;
        }
    }

    /// Changes the operations of one owner that wait for a task, and updates the queue entry for this owner.
    fn change_entry(&mut self, id: TaskId, owner: Owner, change: impl FnOnce(&mut Task)) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        let before = task.entry(id, owner);
        change(task);
        let after = task.entry(id, owner);
        if before == after {
            return;
        }
        let (step, pools) = (task.step, task.pools.clone());
        self.each_queue(step, &pools, |queue| {
            if let Some(before) = &before {
                queue.remove(before);
            }
            if let Some(after) = after {
                queue.insert(after);
            }
        });
    }

    pub(super) fn each_queue(&mut self, step: TaskStep, pools: &PoolSet, mut visit: impl FnMut(&mut Queue)) {
        match step {
            TaskStep::Unchecked => visit(&mut self.unchecked),
            TaskStep::Ready => {
                for &pool in &**pools {
                    self.ready.get_mut(&pool).map(&mut visit);
                }
            }
            TaskStep::Checking | TaskStep::AwaitingImage | TaskStep::Running => {}
        }
    }

    /// The next pool with a free slot and a task for it. The task is removed from all queues.
    ///
    /// If a pool lacks the room for its next task, it runs no other task before: freed room is reserved for
    /// that task. Which task is next may change when another peer has fewer running tasks. No task starves: once the
    /// running tasks of its peer have ended, its peer has its turn.
    pub(super) fn next_ready(&mut self, now: ClockReading) -> Option<(PoolId, TaskId, Charge)> {
        let mut at = 0;
        let (pool, next) = loop {
            let pool = *self.slots.order().get(at)?;
            if let Some(next) = self.next_runnable(pool, now) {
                break (pool, next);
            }
            at += 1;
        };
        let pool = self.pool_with_more_memory(pool, next, at, now).unwrap_or(pool);
        let (id, charge) = self.ready.get_mut(&pool)?.pop(now.at)?;
        let task = self.tasks.get(&id)?;
        if task.unfollowed_since.is_none() {
            self.unfollowed.waiting_counts.remove(&task.pools);
        }
        let entries = task.entries(id);
        for &pool in &*task.pools {
            if let Some(queue) = self.ready.get_mut(&pool) {
                // The entry with which it was taken is already gone.
                for entry in &entries {
                    queue.remove(entry);
                }
            }
        }
        Some((pool, id, charge))
    }

    /// The task that a pool could run now.
    fn next_runnable(&mut self, pool: PoolId, now: ClockReading) -> Option<TaskId> {
        let next = self.slots.has_free(pool).then(|| self.next_in(pool, now))??;
        let task = self.tasks.get(&next)?;
        self.slots.has_room(pool, &task.action).then_some(next)
    }

    /// Another pool that could run the same task now and gives it the memory that this kind of action used before. Only
    /// for a pool, at this position of the order, that gives it less. The queues do not change, so the task stays the
    /// next one of its pool.
    fn pool_with_more_memory(
        &self,
        pool: PoolId,
        id: TaskId,
        at: usize,
        now: ClockReading,
    ) -> Option<PoolId> {
        let task = self.tasks.get(&id)?;
        let (action, key) = (task.action.clone(), self.peak_key(&task.first)?);
        let needed = self.peaks.of(key).filter(|needed| *needed > self.slots.memory(pool, &action))?;
        let others: Vec<_> = self.slots.order().iter().skip(at + 1).copied().collect();
        others.into_iter().find(|other| {
            self.slots.memory(*other, &action) >= needed
                && self.slots.has_free(*other)
                && self.slots.has_room(*other, &action)
                && self
                    .ready
                    .get(other)
                    .and_then(|queue| queue.peek(now.at))
                    .is_some_and(|(next, _)| next == id)
        })
    }

    /// The next task in the queue of a pool. A task that has just lost its followers is first moved behind those with
    /// followers.
    fn next_in(&mut self, pool: PoolId, now: ClockReading) -> Option<TaskId> {
        while let Some((id, followed)) = self.ready.get(&pool).and_then(|queue| queue.peek(now.at)) {
            if !followed || self.is_followed(id, now) {
                return Some(id);
            }
        }
        None
    }
}
