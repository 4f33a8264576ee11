//! The pending queue: which task is next, given which pools have a free slot.
//!
//! Tasks that the same pools can take wait in one lane, so that a task nobody can take now never stands in the way of one
//! that somebody can, and finding the next task costs as much as there are lanes, not as there are tasks. Within a lane the
//! order is priority, then age. Whoever wants another order (fairness, ageing) changes [`Place`].
//!
//! It holds places, not tasks, and knows nothing of time.

use crate::actors::worker::messages::TaskId;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

/// The pools that can take a task, as ascending indices.
pub type PoolSet = Arc<[usize]>;

/// Where a task stands; the least is served first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Lower runs sooner.
    pub priority: i32,
    /// Ids ascend with submission: first in, first out among equals, also for a task that comes back.
    pub task: TaskId,
}

/// Places in lanes.
#[derive(Debug, Default)]
pub struct Queue {
    lanes: BTreeMap<PoolSet, BTreeSet<Place>>,
}

impl Queue {
    /// Adds a place to the lane of these pools.
    pub fn insert(&mut self, pools: &PoolSet, place: Place) {
        match self.lanes.get_mut(pools) {
            Some(lane) => {
                lane.insert(place);
            }
            None => {
                self.lanes.insert(pools.clone(), BTreeSet::from([place]));
            }
        }
    }

    /// Takes a place out; whether it was there.
    pub fn remove(&mut self, pools: &PoolSet, place: Place) -> bool {
        let Some(lane) = self.lanes.get_mut(pools) else { return false };
        let found = lane.remove(&place);
        if lane.is_empty() {
            self.lanes.remove(pools);
        }
        found
    }

    /// Takes out the first place of all lanes for which `open` holds.
    pub fn pop(&mut self, open: impl Fn(&PoolSet) -> bool) -> Option<Place> {
        let heads = self.lanes.iter().filter(|(pools, _)| open(pools));
        let (place, pools) = heads.filter_map(|(pools, lane)| Some((*lane.first()?, pools.clone()))).min()?;
        self.remove(&pools, place);
        Some(place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(priority: i32, task: u64) -> Place {
        Place { priority, task: TaskId(task) }
    }

    #[test]
    fn a_task_that_no_free_pool_can_take_does_not_stand_in_the_way() {
        let (both, second): (PoolSet, PoolSet) = ([0, 1].into(), [1].into());
        let mut queue = Queue::default();
        queue.insert(&second, place(-5, 1));
        queue.insert(&both, place(0, 2));
        queue.insert(&both, place(0, 3));
        let first_is_free = |pools: &PoolSet| pools.contains(&0);
        assert_eq!(queue.pop(first_is_free), Some(place(0, 2)));
        assert_eq!(queue.pop(|_| true), Some(place(-5, 1)));
        assert!(queue.remove(&both, place(0, 3)));
        assert!(!queue.remove(&both, place(0, 3)));
        assert_eq!(queue.pop(|_| true), None);
        assert!(queue.lanes.is_empty(), "empty lanes are not kept");
    }
}
