//! What must be true of the queues at any time, of the task that is served, by the rules of [`Queue`], and of the work that
//! nobody follows.

use super::{
    super::{Run, Step, Task, followers::Unfollowed},
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
    is_followed: bool,
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
            let is_followed = task.numbers().any(|number| {
                let id = ledger.register.get(number).expect("a waiter is an operation").info.id;
                // The operation that is being submitted is not known yet.
                self.known.get(&id).is_none_or(|known| known.subscription.is_some())
            });
            Waiting { place, pools: task.pools.clone(), loads, is_followed }
        };
        ledger.tasks.iter().filter(|(_, task)| task.step == Step::Ready).map(waiting).collect()
    }

    /// What must be true of whoever was served: see the rules of [`Queue`].
    pub(super) fn check_turn(&mut self, before: &[Waiting], served: TaskId, pool: usize) {
        let rivals: Vec<_> = before.iter().filter(|waiting| waiting.pools.contains(&pool)).collect();
        let served =
            rivals.iter().find(|waiting| waiting.place.task == served).expect("only what is ready runs");
        let place = served.place;
        if !served.is_followed {
            assert!(rivals.iter().all(|rival| !rival.is_followed), "followed work goes first");
            let oldest = rivals.iter().map(|rival| rival.place.task).min();
            assert_eq!(oldest, Some(place.task), "work that nobody follows goes in order of age");
            self.seen.insert("unfollowed run");
            return;
        }
        let (rivals, unfollowed): (Vec<&Waiting>, Vec<&Waiting>) =
            rivals.iter().copied().partition(|rival| rival.is_followed);
        if unfollowed.iter().any(|rival| rival.place.task < place.task) {
            self.seen.insert("overtaken");
        }
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

    /// The runs that were told to stop and will.
    pub(super) fn stopping(&self) -> usize {
        let ledger = &self.ledger;
        let stops = |(id, run): &(&TaskId, &Run)| !run.stuck && !ledger.tasks.contains_key(id);
        ledger.runs.iter().filter(stops).filter(|(_, run)| ledger.slots.is_open(run.pool)).count()
    }

    /// After a look for a task to run that found none: as many runs have to make way as are needed, and no more.
    pub(super) fn check_way_made(&self, stopping_before: usize) {
        let ledger = &self.ledger;
        let rivals = |pool: Option<usize>| {
            let waits = |task: &&Task| task.step == Step::Ready && task.unfollowed_since.is_none();
            let suits = |task: &&Task| pool.is_none_or(|pool| task.pools.contains(&pool));
            ledger.tasks.values().filter(waits).filter(suits).count()
        };
        let stopping = self.stopping();
        assert!(stopping - stopping_before <= rivals(None), "no more make way than others wait");
        for &(since, id) in &ledger.unfollowed.runs {
            let is_due = self.now.since(since) >= ledger.settings.contended_abandon_grace;
            let pool = ledger.runs[&id].pool;
            assert!(!is_due || rivals(Some(pool)) <= stopping, "a slot is kept from those who wait for it");
        }
    }

    /// What is counted about followers is what there is.
    pub(super) fn check_followers(&self) {
        let ledger = &self.ledger;
        let mut expected = Unfollowed::default();
        for (&id, task) in &ledger.tasks {
            let is_followed = |number: &u64| ledger.register.get(*number).is_some_and(|o| o.is_followed());
            assert_eq!(task.followers, task.numbers().filter(is_followed).count());
            assert_eq!(task.followers == 0, task.unfollowed_since.is_some());
            match task.step {
                Step::Running => expected.note(id, task),
                Step::Ready if task.followers > 0 => expected.rivals.add(&task.pools),
                _ => {}
            }
        }
        assert_eq!(ledger.unfollowed.runs, expected.runs);
        assert_eq!(ledger.unfollowed.rivals, expected.rivals);
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
