//! Tasks without followers: they continue for a while, and make way for tasks with followers.
//!
//! A client that lost its connection reconnects within seconds and finds its operation; a client that was interrupted
//! never does. The server cannot tell them apart, so work without followers continues as long as it delays no other
//! work:
//! - An operation without followers ends after `abandon_grace`, and a task ends with its last operation.
//! - A waiting task without followers is behind all tasks with followers.
//! - A running task that has had no followers for `contended_abandon_grace` ends if a task with followers waits for its
//!   slot. Tasks that lost their followers first end first, and no more of them than tasks wait.
//! - When the server stops, every task that has had no followers for `contended_abandon_grace` ends.
//!
//! The loss of a follower is noticed by [`Ledger::tick`], or when the task is about to get a slot. A new follower is
//! known at once. Each task counts its followers, so a change costs O(log n) for each owner of the task. Only
//! [`Ledger::free_slots_for_followed`] examines all runs, and only if one of them may have to end.

use super::{Ledger, Outcome, Task, TaskStep};
use crate::actors::{
    scheduler::{
        settings::ClockReading,
        slots::{PoolId, PoolSet},
    },
    worker::messages::TaskId,
};
use gorego_reapi::error::Error;
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

/// The runs that may have to make way, and the tasks for which they would do so.
#[derive(Debug, Default)]
pub(super) struct Unfollowed {
    /// Running tasks without followers, by the time at which they lost the last one.
    pub(super) runs: BTreeSet<(Instant, TaskId)>,
    /// Ready tasks with followers.
    pub(super) waiting_counts: WaitingCounts,
}

impl Unfollowed {
    /// Records that a task was given a slot.
    pub(super) fn note(&mut self, id: TaskId, task: &Task) {
        self.runs.extend(task.unfollowed_since.map(|since| (since, id)));
    }

    /// Records that a task no longer has a slot.
    pub(super) fn forget(&mut self, id: TaskId, task: &Task) {
        if let Some(since) = task.unfollowed_since {
            self.runs.remove(&(since, id));
        }
    }
}

/// The number of tasks with followers that wait for a slot, by the pools that can run them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct WaitingCounts(BTreeMap<PoolSet, usize>);

impl WaitingCounts {
    pub(super) fn add(&mut self, pools: &PoolSet) {
        *self.0.entry(pools.clone()).or_default() += 1;
    }

    pub(super) fn remove(&mut self, pools: &PoolSet) {
        let Some(count) = self.0.get_mut(pools) else { return };
        *count = count.saturating_sub(1);
        if *count == 0 {
            self.0.remove(pools);
        }
    }

    /// Assigns a slot of this pool to the rival with the fewest suitable pools. Returns false if none can use it.
    fn serve(&mut self, pool: PoolId) -> bool {
        let suited = self.0.keys().filter(|pools| pools.contains(&pool));
        let Some(pools) = suited.min_by_key(|pools| pools.len()).cloned() else { return false };
        self.remove(&pools);
        true
    }
}

impl Ledger {
    /// Counts a follower: an operation of this task has a follower again, or a followed operation has joined it.
    pub(super) fn gain_follower(&mut self, id: TaskId) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        task.followers = task.followers.saturating_add(1);
        self.set_unfollowed(id, None);
    }

    /// Counts the loss of a follower: an operation of this task has lost its last follower, or a followed operation has
    /// left it.
    pub(super) fn lose_follower(&mut self, id: TaskId, now: ClockReading) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        task.followers = task.followers.saturating_sub(1);
        if task.followers == 0 {
            self.set_unfollowed(id, Some(now.at));
        }
    }

    fn set_unfollowed(&mut self, id: TaskId, since: Option<Instant>) {
        let Some(task) =
            self.tasks.get_mut(&id).filter(|task| task.unfollowed_since.is_some() != since.is_some())
        else {
            return;
        };
        let before = task.entries(id);
        if task.step == TaskStep::Running {
            self.unfollowed.forget(id, task);
        }
        task.unfollowed_since = since;
        if task.step == TaskStep::Running {
            self.unfollowed.note(id, task);
        }
        let (step, pools, after) = (task.step, task.pools.clone(), task.entries(id));
        if step == TaskStep::Ready {
            let waiting_counts = &mut self.unfollowed.waiting_counts;
            if since.is_none() { waiting_counts.add(&pools) } else { waiting_counts.remove(&pools) }
        }
        self.each_queue(step, &pools, |queue| {
            for (before, after) in before.iter().zip(&after) {
                if queue.remove(before) {
                    queue.insert(*after);
                }
            }
        });
    }

    /// Finds operations that have lost their followers.
    pub(super) fn find_unfollowed(&mut self, now: ClockReading) {
        for task in self.register.find_unfollowed(now) {
            self.lose_follower(task, now);
        }
    }

    /// Whether a task has followers at this moment.
    pub(super) fn is_followed(&mut self, id: TaskId, now: ClockReading) -> bool {
        let Some(task) = self.tasks.get(&id) else { return false };
        let mut lost = 0;
        for number in task.numbers() {
            if self.register.has_lost_followers(number, now) {
                lost += 1;
            } else if self.register.get(number).is_some_and(|operation| operation.is_followed()) {
                break;
            }
        }
        for _ in 0..lost {
            self.lose_follower(id, now);
        }
        self.tasks.get(&id).is_some_and(|task| task.followers > 0)
    }

    /// Ends runs without followers if tasks with followers wait for their slots. Slots of runs that were already told
    /// to stop are taken into account.
    pub(super) fn free_slots_for_followed(&mut self, now: ClockReading) {
        let grace = self.settings.contended_abandon_grace;
        let is_due = |since: Instant| now.since(since) >= grace;
        let none_due = self.unfollowed.runs.first().is_none_or(|(since, _)| !is_due(*since));
        if none_due || self.unfollowed.waiting_counts.0.is_empty() {
            return;
        }
        let mut waiting_counts = self.unfollowed.waiting_counts.clone();
        let stopping = self.runs.iter().filter(|(id, run)| !run.stuck && !self.tasks.contains_key(id));
        for (_, run) in stopping.filter(|(_, run)| self.slots.is_open(run.pool)) {
            waiting_counts.serve(run.pool);
        }
        let due = self.unfollowed.runs.iter().take_while(|(since, _)| is_due(*since));
        let pool_of =
            |id: TaskId| self.runs.get(&id).map(|run| run.pool).filter(|pool| self.slots.is_open(*pool));
        let ended: Vec<TaskId> = due
            .filter(|(_, id)| pool_of(*id).is_some_and(|pool| waiting_counts.serve(pool)))
            .map(|(_, id)| *id)
            .collect();
        for id in ended {
            let error = Error::Unavailable(format!(
                "no client followed the operation for {grace:?} and others waited for its slot \
                 (execution.contended_abandon_grace); execute the action again"
            ));
            self.end_task(id, Outcome::failed(error), now);
            self.stop_run(id, now);
        }
    }

    /// Ends all tasks that have been without followers for long enough to make way.
    pub(super) fn end_unfollowed(&mut self, now: ClockReading) {
        let grace = self.settings.contended_abandon_grace;
        let is_due = |task: &Task| task.unfollowed_since.is_some_and(|since| now.since(since) >= grace);
        let due: Vec<TaskId> =
            self.tasks.iter().filter(|(_, task)| is_due(task)).map(|(id, _)| *id).collect();
        for id in due {
            self.end_for_shutdown(id, now);
        }
    }
}
