//! The staging of inputs in the simulation: which tasks it is ordered for, and when it ends.

use super::{super::staging::MAX_STAGED_AHEAD, *};

impl World {
    /// Makes a new pool stage the inputs of waiting tasks, or not.
    pub(super) fn may_stage_in(&mut self, pool: PoolId) {
        if self.random.chance(70) {
            self.ledger.stage_ahead_in(pool);
        }
    }

    /// Takes all orders that there are, as the actor does.
    pub(super) fn send_stagings(&mut self) {
        while let Some(order) = self.ledger.next_staging() {
            assert!(self.pools.is_open(order.pool), "only a pool that takes tasks");
            assert!(self.stagings.iter().all(|other| other.pool != order.pool), "one at a time in each pool");
            assert!(!order.cancel.is_stopped());
            let task = &self.ledger.tasks[&order.task];
            assert!(
                task.step == TaskStep::Ready && task.pools.contains(&order.pool),
                "only what waits for it"
            );
            assert!(task.unfollowed_since.is_none(), "a task without followers is left out");
            assert!(self.staged.insert(order.task, task.attempts).is_none(), "once for each task");
            self.seen.insert("staged ahead");
            if let Some(front) = self.front(order.pool) {
                let at = front.iter().position(|id| *id == order.task).expect("it is near the front");
                assert!(front[..at].iter().all(|id| !self.wants_staging(*id)), "the first of them");
                if at > 0 {
                    self.seen.insert("staged behind the first");
                }
            }
            self.stagings.push(order);
        }
        for pool in self.pools.order() {
            let is_busy = self.stagings.iter().any(|order| order.pool == *pool);
            let can = self.ledger.staging.contains_key(pool) && self.pools.is_open(*pool) && !is_busy;
            if let Some(front) = self.front(*pool).filter(|_| can) {
                assert!(
                    !front.into_iter().any(|id| self.wants_staging(id)),
                    "none near the front is left out"
                );
            }
        }
    }

    /// The tasks near the front of a queue. `None` if the queue has tasks of several owners, whose order is only
    /// approximate.
    fn front(&self, pool: PoolId) -> Option<Vec<TaskId>> {
        let order = self.ledger.ready[&pool].order();
        let has_one_owner = |id: &TaskId| self.ledger.tasks[id].waiters.len() == 1;
        let near = self.pools.slots(pool).min(MAX_STAGED_AHEAD);
        order.iter().all(has_one_owner).then(|| order.into_iter().take(near).collect())
    }

    fn wants_staging(&self, id: TaskId) -> bool {
        !self.staged.contains_key(&id) && self.ledger.tasks[&id].unfollowed_since.is_none()
    }

    pub(super) fn answer_staging(&mut self) {
        if self.stagings.is_empty() {
            return;
        }
        let order = self.stagings.swap_remove(self.random.below(self.stagings.len()));
        if !self.pools.contains(order.pool) {
            self.seen.insert("staged for a removed pool");
        }
        self.ledger.staging_ended(order.pool);
    }

    pub(super) fn check_stagings(&mut self) {
        for order in &self.stagings {
            let task = self.ledger.tasks.get(&order.task);
            assert_eq!(
                order.cancel.is_cancelled(),
                task.is_none(),
                "an order is cancelled when its task ends"
            );
            let has_run = task.is_none_or(|task| task.attempts > self.staged[&order.task]);
            assert_eq!(order.cancel.is_stopped(), has_run, "and stopped when its task gets a slot");
            self.seen.insert(match task {
                None => "left while its inputs were staged",
                Some(_) if has_run => "ran while its inputs were staged",
                Some(_) => continue,
            });
        }
    }
}
