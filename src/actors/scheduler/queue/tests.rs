//! The queue against a model that knows the rules and nothing else, and the promises that follow from them.

use super::*;
use proptest::{collection::vec, prelude::*};

const STEP: Duration = Duration::from_secs(100);

/// The rules by the letter: everything is looked at every time.
#[derive(Default)]
struct Model {
    waiting: Vec<Place>,
    running: Vec<Charge>,
    turns: HashMap<Charge, u64>,
    turn: u64,
    served_due: bool,
}

impl Model {
    fn insert(&mut self, place: Place) {
        self.turn += 1;
        if !self.waiting.iter().any(|other| charge(other) == charge(&place)) {
            self.turns.insert(charge(&place), self.turn);
        }
        self.waiting.push(place);
    }

    fn pop(&mut self, seconds: i128, start: Instant) -> Option<TaskId> {
        let urgent = self.waiting.iter().map(|place| place.priority).min()?;
        let step = i128::from(STEP.as_secs());
        let age = |place: &Place| {
            (i128::from((place.since - start).as_secs()) + i128::from(place.priority) * step, place.priority)
        };
        let others = || self.waiting.iter().filter(|place| place.priority != urgent);
        let came = |place: &Place| (i128::from((place.since - start).as_secs()), place.priority);
        let longest = i128::from(STEPS_MAX) * step;
        let due = others().map(came).min().filter(|(since, _)| seconds - since >= longest);
        let due = due.or_else(|| {
            others().map(age).min().filter(|(age, _)| *age <= seconds + i128::from(urgent) * step)
        });
        let due = due.filter(|_| !self.served_due);
        self.served_due = due.is_some();
        let class = due.map_or(urgent, |(_, priority)| priority);
        let load = |build| self.running.iter().filter(|charge| **charge == (class, build)).count();
        let in_class = self.waiting.iter().filter(|place| place.priority == class);
        let next =
            in_class.min_by_key(|place| (load(place.build), self.turns[&charge(place)], place.task))?;
        let next = *next;
        self.turn += 1;
        self.turns.insert(charge(&next), self.turn);
        self.running.push(charge(&next));
        self.waiting.retain(|place| place.task != next.task);
        Some(next.task)
    }
}

fn charge(place: &Place) -> Charge {
    (place.priority, place.build)
}

fn place(priority: i32, build: u64, task: u64, since: Instant) -> Place {
    Place { priority, build: Build(build), task: TaskId(task), since, followed: true }
}

#[derive(Debug, Clone)]
enum Step {
    Insert {
        priority: i32,
        build: u64,
    },
    Remove(usize),
    /// A task is joined by one that wants it sooner, or loses it.
    Move {
        which: usize,
        priority: i32,
        build: u64,
    },
    Pop,
    End(usize),
    Wait(u64),
}

/// Mostly close to each other, now and then as far apart as can be.
fn priority() -> impl Strategy<Value = i32> {
    prop_oneof![8 => -1..3, 1 => Just(i32::MIN), 1 => Just(i32::MAX)]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (priority(), 0..4u64).prop_map(|(priority, build)| Step::Insert { priority, build }),
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
                Step::Insert { priority, build } => {
                    let place = place(priority, build, task as u64, now);
                    queue.insert(place);
                    model.insert(place);
                }
                Step::Remove(which) if !model.waiting.is_empty() => {
                    let place = model.waiting.remove(which % model.waiting.len());
                    prop_assert!(queue.remove(&place));
                    prop_assert!(!queue.remove(&place));
                }
                Step::Move { which, priority, build } if !model.waiting.is_empty() => {
                    let before = model.waiting.remove(which % model.waiting.len());
                    let after = Place { priority, build: Build(build), ..before };
                    queue.remove(&before);
                    queue.insert(after);
                    model.insert(after);
                }
                Step::End(which) if !model.running.is_empty() => {
                    queue.ended(model.running.swap_remove(which % model.running.len()));
                }
                Step::Pop => {
                    let popped = queue.pop(now);
                    prop_assert_eq!(popped.map(|(task, _)| task), model.pop(seconds.into(), start));
                    prop_assert_eq!(popped.map(|(_, charge)| charge), popped.and(model.running.last().copied()));
                }
                Step::Wait(more) => seconds += more,
                _ => {}
            }
            prop_assert_eq!(queue.len(), model.waiting.len());
        }
        while let Some((task, charge)) = queue.pop(start) {
            model.waiting.retain(|place| place.task != task);
            model.running.push(charge);
        }
        prop_assert_eq!(model.waiting, []);
        for charge in model.running {
            queue.ended(charge);
        }
        prop_assert!(queue.classes.is_empty() && queue.ages.is_empty() && queue.running.is_empty(), "{queue:?}");
    }

    #[test]
    fn the_order_that_is_told_is_the_order_in_which_tasks_go(
        places in vec((0..3, 0..5u64), 0..40), popped in 0..10usize, ended in vec(any::<bool>(), 10),
    ) {
        // No step is ever made up for, so that age does not come into it.
        let (start, mut queue) = (Instant::now(), Queue::new(Duration::from_secs(1_000_000)));
        for (task, (priority, build)) in places.into_iter().enumerate() {
            queue.insert(place(priority, build, task as u64, start));
        }
        for ended in &ended[..popped] {
            if let Some((_, charge)) = queue.pop(start).filter(|_| *ended) {
                queue.ended(charge);
            }
        }
        let told = queue.order();
        let taken: Vec<_> = std::iter::from_fn(|| queue.pop(start)).map(|(task, _)| task).collect();
        prop_assert_eq!(told, taken);
    }

    /// However loads differ and runs end: a build with nothing running waits for each other build at most once.
    #[test]
    fn a_build_that_runs_nothing_is_served_within_as_many_turns_as_there_are_builds(
        steps in vec((0..6u64, any::<bool>(), any::<usize>()), 1..200),
    ) {
        let (start, mut queue) = (Instant::now(), Queue::new(STEP));
        let mut running: Vec<Charge> = Vec::new();
        // For each build that waits and runs nothing: how many turns it may yet be passed over.
        let mut patience: BTreeMap<Build, usize> = BTreeMap::new();
        for (task, (build, pops, which)) in steps.into_iter().enumerate() {
            if pops {
                if let Some((_, charge)) = queue.pop(start) {
                    patience.remove(&charge.1);
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
                queue.insert(place(0, build, task as u64, start));
            }
            let Some(class) = queue.classes.get(&0) else { continue };
            let idle = class.builds.iter().filter(|(_, waiting)| waiting.running == 0);
            for (build, _) in idle {
                patience.entry(*build).or_insert(class.builds.len() - 1);
            }
        }
    }

    /// The flood never ends; the others come through once their age makes up for it, at every second turn at least.
    #[test]
    fn no_priority_starves(
        late in vec((1..20i32, 0..3u64), 1..20), flood in 1..4u64,
    ) {
        let (start, mut queue, mut task) = (Instant::now(), Queue::new(STEP), 1000);
        for (task, (priority, build)) in late.iter().enumerate() {
            queue.insert(place(*priority, *build, task as u64, start));
        }
        let slowest = late.iter().map(|(priority, _)| *priority).max().unwrap_or(0);
        let before = start + STEP * (slowest as u32) - Duration::from_secs(1);
        let mut left: BTreeSet<u64> = (0..late.len() as u64).collect();
        let mut turn = |queue: &mut Queue, now: Instant| {
            for build in 0..flood {
                task += 1;
                queue.insert(place(0, 100 + build, task, now));
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

/// However far apart priorities are, and with everything else due as well.
#[test]
fn no_difference_of_priority_is_too_large_to_be_made_up_for() {
    let (start, mut queue) = (Instant::now(), Queue::new(STEP));
    queue.insert(place(i32::MAX, 0, 0, start));
    let mut served_at = |now: Instant, task: u64| {
        queue.insert(place(i32::MIN, 1, 10 + 2 * task, now - STEP));
        queue.insert(place(i32::MIN + 1, 1, 11 + 2 * task, now - STEP));
        (0..2).any(|_| queue.pop(now).is_some_and(|(task, _)| task == TaskId(0)))
    };
    assert!(!served_at(start + STEP * (STEPS_MAX - 1), 0));
    assert!(served_at(start + STEP * STEPS_MAX, 1));
}

/// The gain of a build does not depend on how much it queues: with equal run times the slots are shared evenly, one more or
/// less, as soon as what ran when the last build came is over.
#[test]
fn builds_share_the_slots_evenly() {
    let start = Instant::now();
    let mut queue = Queue::new(STEP);
    let mut task = 0;
    let mut add = |queue: &mut Queue, build, count| {
        for _ in 0..count {
            task += 1;
            queue.insert(place(0, build, task, start));
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
            .map(|build| running.iter().filter(|charge| charge.1 == Build(build)).count())
            .collect();
        let (least, most) = (loads.iter().min().unwrap(), loads.iter().max().unwrap());
        assert!(most - least <= 1, "{loads:?}");
    }
}
