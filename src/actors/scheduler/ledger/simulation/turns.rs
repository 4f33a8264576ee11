//! The invariants of the queues, of the task that is served (the rules of [`Queue`]), and of work without followers.

use super::{
    super::{Task, TaskRun, TaskStep, demand::Demand, followers::Unfollowed},
    World,
};
use crate::{
    actors::{
        scheduler::{
            queue::{Charge, QueueEntry, STEPS_MAX},
            slots::{PoolId, PoolSet},
        },
        worker::messages::TaskId,
    },
    caller::Peer,
};
use std::{
    collections::{HashMap, HashSet},
    time::Instant,
};

/// A ready task from the point of view of the world.
pub(super) struct WaitingTask {
    pub(super) entry: QueueEntry,
    pub(super) pools: PoolSet,
    /// The platform properties of its action.
    pub(super) platform: Vec<(String, String)>,
    /// The number of running tasks of its owner and priority, and of its peer, by pool.
    loads: HashMap<PoolId, usize>,
    peer_loads: HashMap<PoolId, usize>,
    is_followed: bool,
}

impl World {
    /// The entries of the ready tasks, with the number of running tasks of its owner and priority, and of its peer, in
    /// each pool.
    pub(super) fn waiting(&self) -> Vec<WaitingTask> {
        let ledger = &self.ledger;
        let waiting = |task: &Task, entry: QueueEntry| {
            let own = Charge { priority: entry.priority, owner: entry.owner };
            let count = |pool, counts: &dyn Fn(&Charge) -> bool| {
                ledger.runs.values().filter(|run| run.pool == pool && counts(&run.charge)).count()
            };
            let is_followed = task.numbers().any(|number| {
                let id = ledger.register.get(number).expect("a waiter is an operation").info.id;
                self.known.get(&id).is_some_and(|known| known.subscription.is_some())
            });
            WaitingTask {
                entry,
                pools: task.pools.clone(),
                platform: task.action.platform.clone(),
                loads: task
                    .pools
                    .iter()
                    .map(|pool| (*pool, count(*pool, &|charge| *charge == own)))
                    .collect(),
                peer_loads: task
                    .pools
                    .iter()
                    .map(|pool| (*pool, count(*pool, &|charge| charge.owner.peer == entry.owner.peer)))
                    .collect(),
                is_followed,
            }
        };
        let ready = ledger.tasks.iter().filter(|(_, task)| task.step == TaskStep::Ready);
        let entries =
            ready.flat_map(|(id, task)| task.entries(*id).into_iter().map(move |entry| (task, entry)));
        entries.map(|(task, entry)| waiting(task, entry)).collect()
    }

    /// Checks the task that was served against the rules of [`Queue`]. Followers whose loss the ledger has not noticed
    /// yet count as followers here, so not every rule can be checked then.
    pub(super) fn check_turn(
        &mut self,
        before: &[WaitingTask],
        served: TaskId,
        pool: PoolId,
        is_exact: bool,
    ) {
        let rivals: Vec<_> = before.iter().filter(|waiting| waiting.pools.contains(&pool)).collect();
        let charge = self.ledger.runs[&served].charge;
        let is_served = |entry: QueueEntry| entry.task == served && entry.owner == charge.owner;
        let served = rivals.iter().find(|waiting| is_served(waiting.entry)).expect("only what is ready runs");
        let entry = served.entry;
        if !served.is_followed {
            assert!(rivals.iter().all(|rival| !rival.is_followed), "followed work goes first");
            let oldest = rivals.iter().map(|rival| rival.entry.task).min();
            assert_eq!(oldest, Some(entry.task), "work that nobody follows goes in order of age");
            self.seen.insert("unfollowed run");
            return;
        }
        let (rivals, unfollowed): (Vec<&WaitingTask>, Vec<&WaitingTask>) =
            rivals.iter().copied().partition(|rival| rival.is_followed);
        if unfollowed.iter().any(|rival| rival.entry.task < entry.task) {
            self.seen.insert("overtaken");
        }
        if pool != served.pools[0] {
            self.seen.insert("in a later pool");
        }
        if is_exact {
            self.check_peer(&rivals, served, pool);
        }
        let own: Vec<_> = rivals.iter().filter(|rival| rival.entry.owner.peer == entry.owner.peer).collect();
        let urgent = own.iter().map(|rival| rival.entry.priority).min().unwrap();
        let class: Vec<_> = own.iter().filter(|rival| rival.entry.priority == entry.priority).collect();
        if urgent != entry.priority {
            let oldest = class.iter().map(|rival| rival.entry.since).min().unwrap();
            assert!(
                self.makes_up(oldest, entry.priority - urgent),
                "less urgent work goes first only when its age makes up for that"
            );
            self.seen.insert("due");
        }
        let least = class.iter().map(|rival| rival.loads[&pool]).min().unwrap();
        assert_eq!(served.loads[&pool], least, "the build with the least running is next");
        let of_build = class.iter().filter(|rival| rival.entry.owner == entry.owner);
        assert_eq!(of_build.map(|rival| rival.entry.task).min(), Some(entry.task), "in a build, age decides");
        if class.iter().any(|rival| rival.entry.task < entry.task) {
            self.seen.insert("out of turn");
        }
    }

    /// Whether a task that has waited since then makes up for this difference of priority.
    fn makes_up(&self, since: Instant, steps: i32) -> bool {
        self.now.since(since) >= self.ledger.settings.priority_ageing * (steps as u32).min(STEPS_MAX)
    }

    /// Checks that the served peer has the fewest running tasks among the competing peers.
    fn check_peer(&mut self, rivals: &[&WaitingTask], served: &WaitingTask, pool: PoolId) {
        let peers: HashSet<Peer> = rivals.iter().map(|rival| rival.entry.owner.peer).collect();
        let most_urgent = |peer: Peer| {
            let own = || rivals.iter().filter(move |rival| rival.entry.owner.peer == peer);
            let priority = own().map(|rival| rival.entry.priority).min().unwrap();
            let since = own().filter(|rival| rival.entry.priority == priority).map(|rival| rival.entry.since);
            (priority.max(0), since.min().unwrap())
        };
        let standings: Vec<_> = peers.iter().map(|peer| (*peer, most_urgent(*peer))).collect();
        let lowest = standings.iter().map(|(_, (rank, _))| *rank).min().unwrap();
        let is_due = |rank: i32| {
            let mut group = standings.iter().filter(|(_, (other, _))| *other == rank);
            rank == lowest || group.any(|(_, (_, since))| self.makes_up(*since, rank - lowest))
        };
        let competing: HashSet<Peer> =
            standings.iter().filter(|(_, (rank, _))| is_due(*rank)).map(|(peer, _)| *peer).collect();
        assert!(competing.contains(&served.entry.owner.peer), "a peer that yields waits");
        let competitors = rivals.iter().filter(|rival| competing.contains(&rival.entry.owner.peer));
        let least = competitors.map(|rival| rival.peer_loads[&pool]).min().unwrap();
        assert_eq!(served.peer_loads[&pool], least, "the peer with the least running is next");
        if competing.len() > 1 {
            self.seen.insert("peers");
        }
        if most_urgent(served.entry.owner.peer).0 > lowest {
            self.seen.insert("peer due");
        }
    }

    /// The number of runs that were told to stop and have not stopped yet.
    pub(super) fn stopping(&self) -> usize {
        let ledger = &self.ledger;
        let stops = |(id, run): &(&TaskId, &TaskRun)| !run.stuck && !ledger.tasks.contains_key(id);
        ledger.runs.iter().filter(stops).filter(|(_, run)| ledger.slots.is_open(run.pool)).count()
    }

    /// Checks the stopped runs after the ledger found no task to run: as many runs make way as are needed, and no more.
    pub(super) fn check_way_made(&self, stopping_before: usize) {
        let ledger = &self.ledger;
        let rivals = |pool: Option<PoolId>| {
            let waits = |task: &&Task| task.step == TaskStep::Ready && task.unfollowed_since.is_none();
            let suits = |task: &&Task| pool.is_none_or(|pool| task.pools.contains(&pool));
            ledger.tasks.values().filter(waits).filter(suits).count()
        };
        let stopping = self.stopping();
        assert!(stopping - stopping_before <= rivals(None), "no more make way than others wait");
        for &(since, id) in &ledger.unfollowed.runs {
            let is_due = self.now.since(since) >= ledger.settings.contended_abandon_grace;
            let pool = ledger.runs[&id].pool;
            let is_open = ledger.slots.is_open(pool);
            assert!(
                !is_due || !is_open || rivals(Some(pool)) <= stopping,
                "a slot is kept from those who wait for it"
            );
        }
    }

    /// Checks that the follower counts agree with the register.
    pub(super) fn check_followers(&self) {
        let ledger = &self.ledger;
        let mut expected = Unfollowed::default();
        for (&id, task) in &ledger.tasks {
            let is_followed = |number: &u64| ledger.register.get(*number).is_some_and(|o| o.is_followed());
            assert_eq!(task.followers, task.numbers().filter(is_followed).count());
            assert_eq!(task.followers == 0, task.unfollowed_since.is_some());
            match task.step {
                TaskStep::Running => expected.note(id, task),
                TaskStep::Ready if task.followers > 0 => expected.waiting_counts.add(&task.pools),
                _ => {}
            }
        }
        assert_eq!(ledger.unfollowed.runs, expected.runs);
        assert_eq!(ledger.unfollowed.waiting_counts, expected.waiting_counts);
    }

    pub(super) fn check_queues(&self) {
        let ledger = &self.ledger;
        for (&pool, queue) in &ledger.ready {
            let ready = ledger.tasks.values().filter(|task| task.step == TaskStep::Ready);
            let expected = ready.filter(|task| task.pools.contains(&pool)).count();
            assert_eq!(
                queue.len(),
                expected,
                "a ready task stands in the queue of each pool that can take it"
            );
            let out = self.runs.keys().filter(|(of, _)| *of == pool).count();
            assert_eq!(queue.running(), out, "what runs is charged to its queue, and nothing else");
            assert!(out <= self.pools.slots(pool));
        }
    }

    /// Checks that each waiting task is counted once, for the first of its pools that takes tasks.
    pub(super) fn check_demand(&self) {
        let ledger = &self.ledger;
        let mut expected = Demand::default();
        for (&id, task) in ledger.tasks.iter().filter(|(_, task)| task.step != TaskStep::Running) {
            let open = task.pools.iter().find(|pool| self.pools.is_open(**pool));
            if let Some(home) = open.or(task.pools.first()) {
                expected.add(*home, id, task.queued);
            }
        }
        assert_eq!(ledger.demand, expected);
        let measured = ledger.measure(self.now);
        let waiting: usize = measured.iter().map(|pool| pool.waiting).sum();
        assert_eq!(waiting, ledger.inspect().queued, "each waiting task counts once");
        for pool in measured {
            let runs = ledger.runs.values().filter(|run| run.pool == pool.status.id);
            let (stuck, working): (Vec<_>, Vec<_>) = runs.partition(|run| run.stuck);
            assert_eq!(pool.status.stuck, stuck.len());
            assert_eq!(pool.desired, pool.waiting + working.len());
            assert_eq!(pool.oldest.is_some(), pool.waiting > 0);
        }
    }
}
