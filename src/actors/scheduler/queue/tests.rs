//! Tests of the queue against a simple model of its rules, and of the guarantees that follow from them.

use super::*;
use proptest::{collection::vec, prelude::*};
use std::collections::HashSet;

const STEP: Duration = Duration::from_secs(100);

/// The rules in a simple form: each query examines all entries.
#[derive(Default)]
struct Model {
    waiting: Vec<QueueEntry>,
    running: Vec<Charge>,
    turns: HashMap<Charge, u64>,
    peer_turns: HashMap<Peer, u64>,
    turn: u64,
    /// The peers that were served out of the order of their priorities in the last turn.
    served_due: HashSet<Peer>,
}

impl Model {
    fn insert(&mut self, entry: QueueEntry) {
        self.turn += 1;
        if !self.waiting.iter().any(|other| charge(other) == charge(&entry)) {
            self.turns.insert(charge(&entry), self.turn);
        }
        if !self.waiting.iter().any(|other| other.owner.peer == entry.owner.peer) {
            self.peer_turns.insert(entry.owner.peer, self.turn);
        }
        self.waiting.push(entry);
    }

    fn remove(&mut self, which: usize) -> QueueEntry {
        let entry = self.waiting.remove(which);
        if !self.waiting.iter().any(|other| other.owner.peer == entry.owner.peer) {
            self.served_due.remove(&entry.owner.peer);
        }
        entry
    }

    fn pop(&mut self, now: Instant) -> Option<TaskId> {
        let peer = self.next_peer(now)?;
        let own = || self.waiting.iter().filter(|entry| entry.owner.peer == peer);
        let urgent = own().map(|entry| entry.priority).min()?;
        let others = || own().filter(|entry| entry.priority != urgent);
        let longest = STEP * STEPS_MAX;
        let old = others().map(|entry| (entry.since, entry.priority)).min();
        let old = old.filter(|(since, _)| now.saturating_duration_since(*since) >= longest);
        let overdue = others().filter(|entry| makes_up(entry.since, entry.priority, urgent, now));
        let score = |entry: &&QueueEntry| {
            let waited = now.saturating_duration_since(entry.since).as_nanos() as i128;
            (i128::from(entry.priority) * STEP.as_nanos() as i128 - waited, entry.priority)
        };
        let overdue = overdue.min_by_key(score).map(|entry| entry.priority);
        let due = old.map(|(_, priority)| priority).or(overdue);
        let due = due.filter(|_| !self.served_due.contains(&peer));
        let class = due.unwrap_or(urgent);
        let load = |entry: &QueueEntry| self.running.iter().filter(|run| **run == charge(entry)).count();
        let in_class = own().filter(|entry| entry.priority == class);
        let next = *in_class.min_by_key(|entry| (load(entry), self.turns[&charge(entry)], entry.task))?;
        self.turn += 1;
        self.turns.insert(charge(&next), self.turn);
        self.peer_turns.insert(peer, self.turn);
        if due.is_some() {
            self.served_due.insert(peer)
        } else {
            self.served_due.remove(&peer)
        };
        self.running.push(charge(&next));
        let which = self.waiting.iter().position(|entry| entry.task == next.task)?;
        Some(self.remove(which).task)
    }

    fn next_peer(&self, now: Instant) -> Option<Peer> {
        let own = |peer: Peer| self.waiting.iter().filter(move |entry| entry.owner.peer == peer);
        let urgent = |peer| own(peer).map(|entry| entry.priority).min().unwrap_or(i32::MAX);
        let peers: HashSet<Peer> = self.waiting.iter().map(|entry| entry.owner.peer).collect();
        let lowest = peers.iter().map(|peer| urgent(*peer).max(0)).min()?;
        let competes = |peer: &&Peer| {
            let rank = urgent(**peer).max(0);
            let mut equals = peers.iter().filter(|other| urgent(**other).max(0) == rank);
            rank == lowest
                || equals.any(|equal| {
                    let mut most_urgent = own(*equal).filter(|entry| entry.priority == urgent(*equal));
                    most_urgent.any(|entry| makes_up(entry.since, rank, lowest, now))
                })
        };
        let load = |peer: Peer| self.running.iter().filter(|run| run.owner.peer == peer).count();
        peers.iter().filter(competes).min_by_key(|peer| (load(**peer), self.peer_turns[*peer])).copied()
    }
}

fn makes_up(since: Instant, priority: i32, urgent: i32, now: Instant) -> bool {
    let steps = i128::from(priority) - i128::from(urgent);
    let steps = u32::try_from(steps).unwrap_or(u32::MAX).min(STEPS_MAX);
    now.saturating_duration_since(since) >= STEP * steps
}

fn charge(entry: &QueueEntry) -> Charge {
    Charge { priority: entry.priority, owner: entry.owner }
}

fn peer(number: u8) -> Peer {
    Peer::V4(std::net::Ipv4Addr::new(127, 0, 0, number))
}

fn place_of(from: u8, priority: i32, build: u64, task: u64, since: Instant) -> QueueEntry {
    let owner = Owner { peer: peer(from), build: Build(build) };
    QueueEntry { priority, owner, task: TaskId(task), since, followed: true }
}

/// An entry of a single peer.
fn entry(priority: i32, build: u64, task: u64, since: Instant) -> QueueEntry {
    place_of(1, priority, build, task, since)
}

#[derive(Debug, Clone)]
enum Step {
    Insert {
        from: u8,
        priority: i32,
        build: u64,
    },
    Remove(usize),
    /// A task gains or loses an entry of a more urgent owner.
    Move {
        which: usize,
        priority: i32,
        build: u64,
    },
    Pop,
    End(usize),
    Wait(u64),
}

/// The priorities are mostly close to each other, and sometimes as far apart as possible.
fn priority() -> impl Strategy<Value = i32> {
    prop_oneof![8 => -1..3, 1 => Just(i32::MIN), 1 => Just(i32::MAX)]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..3u8, priority(), 0..4u64)
            .prop_map(|(from, priority, build)| Step::Insert { from, priority, build }),
        1 => any::<usize>().prop_map(Step::Remove),
        1 => (any::<usize>(), -2..3, 0..4u64)
            .prop_map(|(which, priority, build)| Step::Move { which, priority, build }),
        3 => Just(Step::Pop),
        2 => any::<usize>().prop_map(Step::End),
        1 => (0..150u64).prop_map(Step::Wait),
        1 => (0..2 * STEP.as_secs() * u64::from(STEPS_MAX)).prop_map(Step::Wait),
    ]
}

proptest! {
    #[test]
    fn the_next_task_is_the_one_that_the_rules_say(steps in vec(step(), 1..120)) {
        let start = Instant::now();
        let (mut queue, mut model, mut seconds) = (Queue::new(STEP), Model::default(), 0);
        for (task, step) in steps.into_iter().enumerate() {
            let now = start + Duration::from_secs(seconds);
            match step {
                Step::Insert { from, priority, build } => {
                    let entry = place_of(from, priority, build, task as u64, now);
                    queue.insert(entry);
                    model.insert(entry);
                }
                Step::Remove(which) if !model.waiting.is_empty() => {
                    let entry = model.remove(which % model.waiting.len());
                    prop_assert!(queue.remove(&entry));
                    prop_assert!(!queue.remove(&entry));
                }
                Step::Move { which, priority, build } if !model.waiting.is_empty() => {
                    let before = model.remove(which % model.waiting.len());
                    let owner = Owner { build: Build(build), ..before.owner };
                    let after = QueueEntry { priority, owner, ..before };
                    queue.remove(&before);
                    queue.insert(after);
                    model.insert(after);
                }
                Step::End(which) if !model.running.is_empty() => {
                    queue.ended(model.running.swap_remove(which % model.running.len()));
                }
                Step::Pop => {
                    let popped = queue.pop(now);
                    prop_assert_eq!(popped.map(|(task, _)| task), model.pop(now));
                    prop_assert_eq!(popped.map(|(_, charge)| charge), popped.and(model.running.last().copied()));
                }
                Step::Wait(more) => seconds += more,
                _ => {}
            }
            prop_assert_eq!(queue.len(), model.waiting.len());
        }
        while let Some((task, charge)) = queue.pop(start) {
            model.waiting.retain(|entry| entry.task != task);
            model.running.push(charge);
        }
        prop_assert_eq!(model.waiting, []);
        for charge in model.running {
            queue.ended(charge);
        }
        let is_empty = queue.peers.is_empty() && queue.groups.is_empty() && queue.ranks.is_empty();
        let is_idle = queue.running.is_empty() && queue.running_of.is_empty() && queue.tasks.is_empty();
        prop_assert!(is_empty && is_idle, "{queue:?}");
    }

    #[test]
    fn the_order_that_is_told_is_the_order_in_which_tasks_go(
        entries in vec((0..3u8, -1..3, 0..3u64), 0..40), popped in 0..10usize, ended in vec(any::<bool>(), 10),
    ) {
        // The step is so long that age never makes up for a difference.
        let (start, mut queue) = (Instant::now(), Queue::new(Duration::from_secs(1_000_000)));
        for (task, (from, priority, build)) in entries.into_iter().enumerate() {
            queue.insert(place_of(from, priority, build, task as u64, start));
        }
        for ended in &ended[..popped] {
            if let Some((_, charge)) = queue.pop(start).filter(|_| *ended) {
                queue.ended(charge);
            }
        }
        let told = queue.order();
        for count in 0..=told.len() + 1 {
            prop_assert_eq!(&queue.first(count)[..], &told[..count.min(told.len())]);
        }
        let taken: Vec<_> = std::iter::from_fn(|| queue.pop(start)).map(|(task, _)| task).collect();
        prop_assert_eq!(told, taken);
    }

    /// A build without running tasks waits for each other build at most once, whatever the loads are.
    #[test]
    fn a_build_that_runs_nothing_is_served_within_as_many_turns_as_there_are_builds(
        steps in vec((0..6u64, any::<bool>(), any::<usize>()), 1..200),
    ) {
        let (start, mut queue) = (Instant::now(), Queue::new(STEP));
        let mut running: Vec<Charge> = Vec::new();
        // For each waiting build without running tasks: how many more turns may go to other builds.
        let mut patience: BTreeMap<Build, usize> = BTreeMap::new();
        for (task, (build, pops, which)) in steps.into_iter().enumerate() {
            if pops {
                if let Some((_, charge)) = queue.pop(start) {
                    patience.remove(&charge.owner.build);
                    for (build, turns) in &mut patience {
                        prop_assert!(*turns > 0, "{build:?} starves");
                        *turns -= 1;
                    }
                    running.push(charge);
                }
                if which % 3 > 0 && !running.is_empty() {
                    queue.ended(running.swap_remove(which % running.len()));
                }
            } else {
                queue.insert(entry(0, build, task as u64, start));
            }
            let Some(waiting) = queue.peers.get(&peer(1)) else { continue };
            let (idle, builds) = waiting.queue.idle_builds(0);
            for build in idle {
                patience.entry(build).or_insert(builds - 1);
            }
        }
    }

    /// The flood never ends. The other tasks are served once their age makes up for the difference, at least in every
    /// second turn.
    #[test]
    fn no_priority_starves(
        late in vec((1..20i32, 0..3u64), 1..20), flood in 1..4u64,
    ) {
        let (start, mut queue, mut task) = (Instant::now(), Queue::new(STEP), 1000);
        for (task, (priority, build)) in late.iter().enumerate() {
            queue.insert(entry(*priority, *build, task as u64, start));
        }
        let slowest = late.iter().map(|(priority, _)| *priority).max().unwrap_or(0);
        let before = start + STEP * (slowest as u32) - Duration::from_secs(1);
        let mut left: BTreeSet<u64> = (0..late.len() as u64).collect();
        let mut turn = |queue: &mut Queue, now: Instant| {
            for build in 0..flood {
                task += 1;
                queue.insert(entry(0, 100 + build, task, now));
            }
            let (task, charge) = queue.pop(now).expect("there is always something");
            queue.ended(charge);
            task.0
        };
        for _ in 0..3 * late.len() {
            left.remove(&turn(&mut queue, before));
        }
        prop_assert!(left.iter().all(|task| late[*task as usize].0 == slowest), "what is due goes");
        prop_assert_eq!(left.len(), late.iter().filter(|(priority, _)| *priority == slowest).count(), "what is not waits");
        for _ in 0..2 * left.len() {
            left.remove(&turn(&mut queue, start + STEP * (slowest as u32)));
        }
        prop_assert!(left.is_empty(), "{left:?} starve");
    }
}

/// This holds for any two priorities, even if all other tasks are due as well.
#[test]
fn no_difference_of_priority_is_too_large_to_be_made_up_for() {
    let (start, mut queue) = (Instant::now(), Queue::new(STEP));
    queue.insert(entry(i32::MAX, 0, 0, start));
    let mut served_at = |now: Instant, task: u64| {
        queue.insert(entry(i32::MIN, 1, 10 + 2 * task, now - STEP));
        queue.insert(entry(i32::MIN + 1, 1, 11 + 2 * task, now - STEP));
        (0..2).any(|_| queue.pop(now).is_some_and(|(task, _)| task == TaskId(0)))
    };
    assert!(!served_at(start + STEP * (STEPS_MAX - 1), 0));
    assert!(served_at(start + STEP * STEPS_MAX, 1));
}

/// A build gains nothing by queueing more tasks: with equal run times, the slots are shared evenly (up to one slot) as
/// soon as the tasks that ran when the last build arrived have ended.
#[test]
fn builds_share_the_slots_evenly() {
    let start = Instant::now();
    let mut queue = Queue::new(STEP);
    let mut task = 0;
    let mut add = |queue: &mut Queue, build, count| {
        for _ in 0..count {
            task += 1;
            queue.insert(entry(0, build, task, start));
        }
    };
    const SLOTS: usize = 12;
    let mut running = std::collections::VecDeque::new();
    for build in 1..=5u64 {
        add(&mut queue, build, 10usize.pow(6 - build as u32).max(60));
        for _ in 0..2 * SLOTS {
            if running.len() == SLOTS {
                queue.ended(running.pop_front().unwrap());
            }
            running.push_back(queue.pop(start).unwrap().1);
        }
        let loads: Vec<_> = (1..=build)
            .map(|build| running.iter().filter(|charge| charge.owner.build == Build(build)).count())
            .collect();
        let (least, most) = (loads.iter().min().unwrap(), loads.iter().max().unwrap());
        assert!(most - least <= 1, "{loads:?}");
    }
}

proptest! {
    /// This holds for any priorities and builds of the other peers, and however long their tasks have waited.
    #[test]
    fn a_peer_that_runs_nothing_is_served_within_as_many_turns_as_there_are_peers(
        hostile in vec((2..6u8, any::<i32>(), any::<u64>(), 0..10_000u64), 1..100), ended in any::<u64>(),
    ) {
        let (start, mut queue) = (Instant::now(), Queue::new(STEP));
        let now = start + Duration::from_secs(10_000);
        let (before, after) = hostile.split_at(hostile.len() / 2);
        let insert = |queue: &mut Queue, entries: &[(u8, i32, u64, u64)], first: u64| {
            for (task, (from, priority, build, seconds)) in (first..).zip(entries) {
                queue.insert(place_of(*from, *priority, *build, task, start + Duration::from_secs(*seconds)));
            }
        };
        insert(&mut queue, before, 1);
        let mut charges: Vec<Charge> = (0..ended % 8).filter_map(|_| queue.pop(now)).map(|(_, charge)| charge).collect();
        charges.into_iter().skip(ended as usize % 3).for_each(|charge| queue.ended(charge));
        let others = queue.peers.len();
        queue.insert(entry(0, 0, 0, now));
        insert(&mut queue, after, 1000);
        charges = Vec::new();
        for _ in 0..=others {
            let (task, charge) = queue.pop(now).unwrap();
            charges.push(charge);
            if task == TaskId(0) {
                break;
            }
            queue.ended(charge);
        }
        prop_assert_eq!(charges.last().unwrap().owner.peer, peer(1), "it waits for {} others", others);
    }
}

/// The shares of peers in this number of turns, on this number of slots that are always busy.
fn shares(queue: &mut Queue, now: Instant, slots: usize, turns: usize) -> HashMap<Peer, usize> {
    let (mut running, mut shares) = (VecDeque::new(), HashMap::new());
    for _ in 0..turns {
        if running.len() == slots {
            queue.ended(running.pop_front().unwrap());
        }
        let (_, charge) = queue.pop(now).unwrap();
        *shares.entry(charge.owner.peer).or_default() += 1;
        running.push_back(charge);
    }
    running.into_iter().for_each(|charge| queue.ended(charge));
    shares
}

#[test]
fn a_peer_can_make_its_tasks_less_urgent_than_those_of_others_but_not_more() {
    let (start, mut queue) = (Instant::now(), Queue::new(STEP));
    for task in 0..100 {
        queue.insert(place_of(1, -100, task, task, start));
        queue.insert(place_of(2, 0, 0, 1000 + task, start));
        queue.insert(place_of(3, 5, 0, 2000 + task, start));
    }
    assert_eq!(shares(&mut queue, start, 4, 40), HashMap::from([(peer(1), 20), (peer(2), 20)]));
    let late = start + STEP * 5;
    let shares = shares(&mut queue, late, 6, 60);
    assert_eq!(
        shares,
        HashMap::from([(peer(1), 20), (peer(2), 20), (peer(3), 20)]),
        "age makes it an equal, no more"
    );
}

/// An action that a large backlog also contains does not wait behind that backlog.
#[test]
fn a_task_of_several_owners_is_taken_when_the_turn_of_the_first_of_them_comes() {
    let (start, mut queue) = (Instant::now(), Queue::new(STEP));
    for task in 0..100 {
        queue.insert(place_of(1, 0, 0, task, start));
    }
    let shared = place_of(2, 0, 0, 99, start);
    queue.insert(shared);
    assert_eq!((queue.len(), queue.order().len(), queue.order()[1]), (100, 100, TaskId(99)));
    assert_eq!(queue.pop(start).unwrap().0, TaskId(0));
    assert_eq!(queue.pop(start).unwrap(), (TaskId(99), charge(&shared)));
    assert!(queue.remove(&place_of(1, 0, 0, 99, start)) && !queue.remove(&shared));
    assert_eq!(queue.len(), 98);
}
