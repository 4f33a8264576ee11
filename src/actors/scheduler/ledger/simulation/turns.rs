//! What must be true of the queues at any time, and of whoever is served, by the rules of [`Queue`].

use super::{
    super::{Run, Step, Task},
    POOLS, World,
};
use crate::actors::{
    scheduler::{queue::Place, slots::PoolSet},
    worker::messages::TaskId,
};

/// A ready task as the world sees it.
pub(super) struct Waiting {
    pub(super) place: Place,
    pub(super) pools: PoolSet,
    loads: [usize; 3],
}

impl World {
    /// The ready tasks, and how many of its build and priority each pool runs.
    pub(super) fn waiting(&self) -> Vec<Waiting> {
        let ledger = &self.ledger;
        let waiting = |(id, task): (&TaskId, &Task)| {
            let place = task.place(*id);
            let loads = std::array::from_fn(|pool| {
                let counts = |run: &&Run| run.pool == pool && run.charge == (place.priority, place.build);
                ledger.runs.values().filter(counts).count()
            });
            Waiting { place, pools: task.pools.clone(), loads }
        };
        ledger.tasks.iter().filter(|(_, task)| task.step == Step::Ready).map(waiting).collect()
    }

    /// What must be true of whoever was served: see the rules of [`Queue`].
    pub(super) fn check_turn(&mut self, before: &[Waiting], served: TaskId, pool: usize) {
        let rivals: Vec<_> = before.iter().filter(|waiting| waiting.pools.contains(&pool)).collect();
        let served =
            rivals.iter().find(|waiting| waiting.place.task == served).expect("only what is ready runs");
        let place = served.place;
        if pool != served.pools[0] {
            self.seen.insert("in a later pool");
        }
        let urgent = rivals.iter().map(|rival| rival.place.priority).min().unwrap();
        let class: Vec<_> = rivals.iter().filter(|rival| rival.place.priority == place.priority).collect();
        if urgent != place.priority {
            let oldest = class.iter().map(|rival| rival.place.since).min().unwrap();
            let steps = (place.priority - urgent) as u32;
            let made_up = self.now.since(oldest) >= self.ledger.settings.priority_ageing * steps;
            assert!(made_up, "less urgent work goes first only when its age makes up for that");
            self.seen.insert("due");
        }
        let least = class.iter().map(|rival| rival.loads[pool]).min().unwrap();
        assert_eq!(served.loads[pool], least, "the build with the least running is next");
        let of_build = class.iter().filter(|rival| rival.place.build == place.build);
        assert_eq!(of_build.map(|rival| rival.place.task).min(), Some(place.task), "in a build, age decides");
        if class.iter().any(|rival| rival.place.task < place.task) {
            self.seen.insert("out of turn");
        }
    }

    pub(super) fn check_queues(&self) {
        let ledger = &self.ledger;
        for (pool, queue) in ledger.ready.iter().enumerate() {
            let ready = ledger.tasks.values().filter(|task| task.step == Step::Ready);
            let expected = ready.filter(|task| task.pools.contains(&pool)).count();
            assert_eq!(
                queue.len(),
                expected,
                "a ready task stands in the queue of each pool that can take it"
            );
            let out = self.runs.keys().filter(|(of, _)| *of == pool).count();
            assert_eq!(queue.running(), out, "what runs is charged to its queue, and nothing else");
            assert!(out <= POOLS[pool]);
        }
    }
}
