//! A queue that is fair between builds and lets nobody starve: the tasks that wait for one pool, and which of them is next.
//!
//! The order, in words:
//! 1. Tasks of one priority are a class. The most urgent class that waits is served first.
//! 2. A task gains one step of priority for every interval (`step`) that it waits. Once that makes up for the difference to
//!    the most urgent class, its class is *due* and gets every second turn; of several, the one most overdue. No difference
//!    counts for more than [`STEPS_MAX`] steps, and what has waited that long goes before all else that is due, the oldest
//!    first: priorities are 32-bit numbers of strangers, and most of their differences are longer than a life.
//! 3. In a class, the build that has the fewest tasks of this class running is next; among equals the one that has waited
//!    longest since it was served, or since it came. So builds share what their class gets, however much each one queues.
//! 4. In a build, tasks go in order of age.
//! 5. Tasks that nobody follows go after all others, in order of age and nothing else.
//!
//! Rule 2 needs no clock that moves tasks about. A task of priority `p` that was queued at `t` is as urgent as a new one of
//! priority `b` when `p - (now - t) / step <= b`, which is `t + p * step <= now + b * step`: the left side never changes, so
//! classes can be kept in order of the left side of their oldest task. Due work gets every second turn and not all of them,
//! because an old backlog would otherwise be more urgent than everything new until it is gone.
//!
//! Why nobody starves: each turn of a class goes to a build with the least load, and the build moves behind its equals, so
//! that a build without a running task is served within as many turns of its class as there are builds in it. A class is
//! either the most urgent or becomes due, and then at most one turn in two goes elsewhere.
//!
//! Every operation costs O(log n) but [`Queue::order`]. It holds places, not tasks, and reads no clock.

use crate::actors::worker::messages::TaskId;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::{Duration, Instant},
};

/// Most steps of priority that a task has to make up for. By default a step is a minute, and this an hour: far more than builds
/// that know of each other need to tell their work apart, and far less than a task may wait in all.
const STEPS_MAX: u32 = 60;

/// Who shares with whom: one run of a build tool in one instance, as a number. All that do not name their run share as one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Build(pub u64);

/// Where a task stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Lower runs sooner.
    pub priority: i32,
    /// The build that it counts for.
    pub build: Build,
    /// Ids ascend with submission.
    pub task: TaskId,
    /// When it was submitted; ascends with the ids.
    pub since: Instant,
    /// Whether a client waits for it.
    pub followed: bool,
}

/// What a task that was taken counts for, until [`Queue::ended`].
pub type Charge = (i32, Build);

/// The tasks that wait for one pool.
#[derive(Debug)]
pub struct Queue {
    step: Duration,
    /// What the instants in `ages` are counted from: that of the first place.
    origin: Option<Instant>,
    /// Those with waiting tasks.
    classes: BTreeMap<i32, Class>,
    /// The same by what their oldest task has of age and urgency together; the least is the most overdue.
    ages: BTreeSet<(i128, i32)>,
    /// The same by when their oldest task came.
    arrivals: BTreeSet<(Instant, i32)>,
    /// Tasks that nobody follows.
    unfollowed: BTreeMap<TaskId, Charge>,
    running: HashMap<Charge, usize>,
    /// Counts turns and arrivals, to tell who was served least recently.
    turns: u64,
    /// The last turn went to a class that was due.
    served_due: bool,
    len: usize,
}

/// Whose turn it is, and why.
struct Next {
    priority: i32,
    due: bool,
    build: Build,
    task: TaskId,
}

/// The waiting tasks of one priority.
#[derive(Debug, Default)]
struct Class {
    tasks: BTreeMap<TaskId, Instant>,
    builds: HashMap<Build, Waiting>,
    /// (tasks running, turn, build): the least is next.
    order: BTreeSet<(usize, u64, Build)>,
}

/// What waits of one build in one class; never empty.
#[derive(Debug)]
struct Waiting {
    running: usize,
    turn: u64,
    tasks: BTreeSet<TaskId>,
}

impl Queue {
    /// An empty queue in which a task gains a step of priority for each `step` that it waits.
    pub fn new(step: Duration) -> Self {
        Self {
            step,
            origin: None,
            classes: BTreeMap::new(),
            ages: BTreeSet::new(),
            arrivals: BTreeSet::new(),
            unfollowed: BTreeMap::new(),
            running: HashMap::new(),
            turns: 0,
            served_due: false,
            len: 0,
        }
    }

    /// How many tasks wait.
    pub fn len(&self) -> usize {
        self.len
    }

    /// How many tasks that were taken from here run.
    #[cfg(test)]
    pub fn running(&self) -> usize {
        self.running.values().sum()
    }

    /// Adds a place. A build that had nothing waiting goes behind its equals.
    pub fn insert(&mut self, place: Place) {
        if !place.followed {
            let added = self.unfollowed.insert(place.task, (place.priority, place.build)).is_none();
            self.len += usize::from(added);
            return;
        }
        self.origin.get_or_insert(place.since);
        let running = self.running.get(&(place.priority, place.build)).copied().unwrap_or(0);
        self.turns += 1;
        let turn = self.turns;
        let added = self.change(place.priority, |class| class.insert(place, running, turn));
        self.len += usize::from(added);
    }

    /// Takes a place out; whether it was there.
    pub fn remove(&mut self, place: &Place) -> bool {
        let removed = if place.followed {
            self.change(place.priority, |class| class.remove(place.build, place.task))
        } else {
            self.unfollowed.remove(&place.task).is_some()
        };
        self.len -= usize::from(removed);
        removed
    }

    /// The task whose turn it is, and whether it was put here as followed.
    pub fn peek(&self, now: Instant) -> Option<(TaskId, bool)> {
        match self.next(now) {
            Some(next) => Some((next.task, true)),
            None => self.unfollowed.first_key_value().map(|(task, _)| (*task, false)),
        }
    }

    /// Takes out the task whose turn it is. It counts as running until [`Queue::ended`] is told so.
    pub fn pop(&mut self, now: Instant) -> Option<(TaskId, Charge)> {
        let Some(Next { priority, due, build, task }) = self.next(now) else {
            let (task, charge) = self.unfollowed.pop_first()?;
            *self.running.entry(charge).or_default() += 1;
            self.len -= 1;
            return Some((task, charge));
        };
        self.served_due = due;
        self.turns += 1;
        let turn = self.turns;
        let running = self.running.entry((priority, build)).or_default();
        *running += 1;
        let running = *running;
        self.change(priority, |class| {
            class.reorder(build, running, Some(turn));
            class.remove(build, task)
        });
        self.len -= 1;
        Some((task, (priority, build)))
    }

    /// The followed task whose turn it is.
    fn next(&self, now: Instant) -> Option<Next> {
        let (priority, due) = self.next_class(now)?;
        let class = self.classes.get(&priority)?;
        let &(_, _, build) = class.order.first()?;
        let &task = class.builds.get(&build)?.tasks.first()?;
        Some(Next { priority, due, build, task })
    }

    /// A task that was taken from here runs no more.
    pub fn ended(&mut self, charge: Charge) {
        let Some(running) = self.running.get_mut(&charge) else { return };
        *running -= 1;
        let left = *running;
        if left == 0 {
            self.running.remove(&charge);
        }
        if let Some(class) = self.classes.get_mut(&charge.0) {
            class.reorder(charge.1, left, None);
        }
    }

    /// All tasks in the order in which they would be taken now if nothing else came or ended, ageing aside. Costs
    /// O(n log n).
    pub fn order(&self) -> Vec<TaskId> {
        let mut order = Vec::with_capacity(self.len);
        for class in self.classes.values() {
            // With `i` tasks taken before it, a build has `running + i` running, and stands behind those of its equals that
            // were taken from less often, for their last turn is longer ago.
            let waiting = class.builds.values().flat_map(|waiting| {
                let place = |(i, &task)| (waiting.running + i, i, waiting.turn, task);
                waiting.tasks.iter().enumerate().map(place)
            });
            let mut waiting: Vec<_> = waiting.collect();
            waiting.sort_unstable();
            order.extend(waiting.into_iter().map(|(_, _, _, task)| task));
        }
        order.extend(self.unfollowed.keys());
        order
    }

    /// The class whose turn it is, and whether that is because it is due.
    fn next_class(&self, now: Instant) -> Option<(i32, bool)> {
        let &urgent = self.classes.keys().next()?;
        if self.served_due {
            return Some((urgent, false));
        }
        let longest = self.step.saturating_mul(STEPS_MAX);
        let mut arrivals = self.arrivals.iter().filter(|(_, priority)| *priority != urgent);
        let oldest = arrivals.next().filter(|(since, _)| now.saturating_duration_since(*since) >= longest);
        if let Some(&(_, priority)) = oldest {
            return Some((priority, true));
        }
        let limit = self.age(now, urgent);
        let due = self.ages.iter().find(|(_, priority)| *priority != urgent).filter(|(age, _)| *age <= limit);
        Some(due.map_or((urgent, false), |(_, priority)| (*priority, true)))
    }

    /// `at + priority * step`, in nanoseconds.
    fn age(&self, at: Instant, priority: i32) -> i128 {
        let origin = self.origin.unwrap_or(at);
        // At most one of them is not zero. No time that a clock can show comes near to overflowing.
        let after = at.saturating_duration_since(origin).as_nanos() as i128;
        let before = origin.saturating_duration_since(at).as_nanos() as i128;
        let steps = i128::from(priority).saturating_mul(self.step.as_nanos() as i128);
        (after - before).saturating_add(steps)
    }

    /// Changes a class, which is made if need be, and keeps the books about it.
    fn change(&mut self, priority: i32, change: impl FnOnce(&mut Class) -> bool) -> bool {
        let class = self.classes.entry(priority).or_default();
        let before = class.oldest();
        let done = change(class);
        let after = class.oldest();
        if before != after {
            if let Some(before) = before {
                let age = self.age(before, priority);
                self.ages.remove(&(age, priority));
                self.arrivals.remove(&(before, priority));
            }
            if let Some(after) = after {
                let age = self.age(after, priority);
                self.ages.insert((age, priority));
                self.arrivals.insert((after, priority));
            }
        }
        if after.is_none() {
            self.classes.remove(&priority);
        }
        done
    }
}

impl Class {
    fn oldest(&self) -> Option<Instant> {
        self.tasks.first_key_value().map(|(_, since)| *since)
    }

    fn insert(&mut self, place: Place, running: usize, turn: u64) -> bool {
        let waiting = self.builds.entry(place.build).or_insert_with(|| {
            self.order.insert((running, turn, place.build));
            Waiting { running, turn, tasks: BTreeSet::new() }
        });
        waiting.tasks.insert(place.task);
        self.tasks.insert(place.task, place.since).is_none()
    }

    fn remove(&mut self, build: Build, task: TaskId) -> bool {
        let Some(waiting) = self.builds.get_mut(&build) else { return false };
        if !waiting.tasks.remove(&task) {
            return false;
        }
        if waiting.tasks.is_empty() {
            self.order.remove(&(waiting.running, waiting.turn, build));
            self.builds.remove(&build);
        }
        self.tasks.remove(&task);
        true
    }

    fn reorder(&mut self, build: Build, running: usize, turn: Option<u64>) {
        let Some(waiting) = self.builds.get_mut(&build) else { return };
        self.order.remove(&(waiting.running, waiting.turn, build));
        waiting.running = running;
        waiting.turn = turn.unwrap_or(waiting.turn);
        self.order.insert((waiting.running, waiting.turn, build));
    }
}

#[cfg(test)]
mod tests;
