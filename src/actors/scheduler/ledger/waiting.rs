//! Where tasks wait, and why: the queues of the pools, and the answer to the question.
//!
//! A ready task stands in the queue of each pool that can take it; the first pool to have a free slot for it takes it out of
//! all. In each queue it has a place for each owner that waits for it. Positions are not kept up to date while tasks come and
//! go. They are worked out for all tasks at once when somebody asks and the last picture, the *board*, is too old: so the price
//! of telling any number of clients is bounded.

use super::{Ledger, Step, Task};
use crate::{
    actors::{
        scheduler::{
            operation::{OperationId, OperationInfo, QueueStatus},
            queue::{Build, Charge, Owner, Queue},
            settings::Moment,
            slots::{PoolId, PoolSet},
        },
        worker::messages::TaskId,
    },
    instance::Instance,
};
use std::{
    hash::BuildHasher as _,
    time::{Duration, Instant},
};

/// How long a board is good for; so short that what came a second ago is on it.
const BOARD_AGE: Duration = Duration::from_millis(100);

/// How much longer for each task on it: some hundred times what it costs to put a task there (0.2 us were measured), so that
/// boards never take more than about one per cent of the scheduler's time.
const BOARD_AGE_PER_TASK: Duration = Duration::from_micros(50);

/// When positions were worked out last.
#[derive(Debug, Default)]
pub(super) struct Board {
    made: Option<Instant>,
    tasks: u32,
}

impl Board {
    fn is_fresh(&self, now: Moment) -> bool {
        let age = BOARD_AGE.saturating_add(BOARD_AGE_PER_TASK.saturating_mul(self.tasks));
        self.made.is_some_and(|made| now.since(made) < age)
    }
}

impl Ledger {
    /// For whom an operation counts. Two builds that fall together, which is next to impossible, share as one.
    pub(super) fn owner(&self, info: &OperationInfo) -> Owner {
        let build = Build(self.names.hash_one((info.instance.id(), &info.client.tool_invocation_id)));
        Owner { peer: info.peer, build }
    }

    /// Has a task wait in the queues that are right for its step.
    pub(super) fn enter_queues(&mut self, id: TaskId) {
        let Some(task) = self.tasks.get(&id) else { return };
        let (places, step, pools) = (task.places(id), task.step, task.pools.clone());
        if step == Step::Ready && task.unfollowed_since.is_none() {
            self.unfollowed.rivals.add(&pools);
        }
        self.each_queue(step, &pools, |queue| places.iter().for_each(|place| queue.insert(*place)));
    }

    /// Takes a task out of the queues that it stands in.
    pub(super) fn leave_queues(&mut self, id: TaskId, task: &Task) {
        let places = task.places(id);
        if task.step == Step::Ready && task.unfollowed_since.is_none() {
            self.unfollowed.rivals.remove(&task.pools);
        }
        self.each_queue(task.step, &task.pools, |queue| {
            for place in &places {
                queue.remove(place);
            }
        });
    }

    /// An operation waits for a task from now on, and gives it a place for its owner.
    pub(super) fn add_waiter(&mut self, id: TaskId, owner: Owner, waiter: (i32, u64)) {
        self.change_place(id, owner, |task| {
            task.waiters.entry(owner).or_default().insert(waiter);
        });
    }

    /// An operation, which is not the last, waits for a task no more.
    pub(super) fn remove_waiter(&mut self, id: TaskId, owner: Owner, waiter: (i32, u64)) {
        self.change_place(id, owner, |task| {
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
            self.room.remove(task.owner, load);
            self.room.add(heir, load);
            task.owner = heir;
        }
    }

    /// Changes who waits for a task on behalf of one owner, and with that its place for this owner.
    fn change_place(&mut self, id: TaskId, owner: Owner, change: impl FnOnce(&mut Task)) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        let before = task.place(id, owner);
        change(task);
        let after = task.place(id, owner);
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

    pub(super) fn each_queue(&mut self, step: Step, pools: &PoolSet, mut visit: impl FnMut(&mut Queue)) {
        match step {
            Step::Unchecked => visit(&mut self.unchecked),
            Step::Ready => {
                for &pool in &**pools {
                    self.ready.get_mut(&pool).map(&mut visit);
                }
            }
            Step::Checking | Step::Running => {}
        }
    }

    /// The next pool with a free slot and a task for it; the task is in no queue any more.
    pub(super) fn next_ready(&mut self, now: Moment) -> Option<(PoolId, TaskId, Charge)> {
        let mut at = 0;
        let pool = loop {
            let pool = *self.slots.order().get(at)?;
            if self.slots.has_free(pool) && self.has_next(pool, now) {
                break pool;
            }
            at += 1;
        };
        let (id, charge) = self.ready.get_mut(&pool)?.pop(now.at)?;
        let task = self.tasks.get(&id)?;
        if task.unfollowed_since.is_none() {
            self.unfollowed.rivals.remove(&task.pools);
        }
        let places = task.places(id);
        for &pool in &*task.pools {
            if let Some(queue) = self.ready.get_mut(&pool) {
                // It has none any more where it was taken.
                for place in &places {
                    queue.remove(place);
                }
            }
        }
        Some((pool, id, charge))
    }

    /// Whether a task is next in the queue of a pool. One whose followers have just gone is put behind those that are
    /// followed first.
    fn has_next(&mut self, pool: PoolId, now: Moment) -> bool {
        while let Some((id, followed)) = self.ready.get(&pool).and_then(|queue| queue.peek(now.at)) {
            if !followed || self.is_followed(id, now) {
                return true;
            }
        }
        false
    }

    /// Why an operation waits; `None` when it does not, or there is none of this name.
    pub fn explain(&mut self, instance: &Instance, id: OperationId, now: Moment) -> Option<QueueStatus> {
        let number = self.register.find(instance, id).ok()?;
        let id = self.register.get(number)?.task()?;
        if self.tasks.get(&id)?.step == Step::Running {
            return None;
        }
        if !self.board.is_fresh(now) {
            self.make_board(now);
        }
        let task = self.tasks.get(&id)?;
        let known = task.position.filter(|(pool, _)| task.step == Step::Ready && self.slots.is_open(*pool));
        let (pool, position) = match known {
            Some((pool, position)) => (pool, Some(position)),
            None => {
                let open = task.pools.iter().find(|pool| self.slots.is_open(**pool));
                (*open.or(task.pools.first())?, None)
            }
        };
        let waiting = self.ready.get(&pool).map_or(0, |queue| queue.len());
        let (busy, slots) = self.slots.count(pool);
        let name = |pool: PoolId| self.slots.name(pool).to_string();
        let mut reason = match task.step {
            Step::Unchecked | Step::Checking => "its inputs are being looked up".to_owned(),
            Step::Ready | Step::Running if !self.slots.is_served(&task.pools) => {
                format!("pool \"{}\" takes no more actions, and no other pool suits it", name(pool))
            }
            Step::Ready | Step::Running => {
                let (busy, slots) = task
                    .pools
                    .iter()
                    .map(|&pool| self.slots.count(pool))
                    .fold((0, 0), |(busy, slots): (usize, usize), (b, s)| {
                        (busy.saturating_add(b), slots.saturating_add(s))
                    });
                let open = task.pools.iter().filter(|pool| self.slots.is_open(**pool));
                let names: Vec<_> = open.map(|&pool| format!("\"{}\"", name(pool))).collect();
                let pools = if names.len() == 1 { "pool" } else { "pools" };
                format!("{busy} of {slots} slots of {pools} {} are busy", names.join(", "))
            }
        };
        if task.attempts > 0 {
            reason.push_str(&format!(
                "; its worker failed, this is try {} of {}",
                task.attempts.saturating_add(1),
                self.settings.max_attempts
            ));
        }
        Some(QueueStatus {
            pool: name(pool),
            other_pools: task
                .pools
                .iter()
                .filter(|other| **other != pool && self.slots.is_open(**other))
                .map(|&other| name(other))
                .collect(),
            // The board is older than the count.
            position: position.map(|position| position.min(waiting)),
            waiting,
            busy,
            slots,
            reason,
        })
    }

    fn make_board(&mut self, now: Moment) {
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
        self.board = Board { made: Some(now.at), tasks: count };
    }
}
