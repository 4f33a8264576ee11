//! [`Line`]: what waits of one peer, and which of it is next.
//!
//! The order, in words:
//! 1. Tasks of one priority are a class. The most urgent class that waits is served first.
//! 2. A class that is due ([`Ranks`]) gets every second turn; of several, the one most overdue. Not all turns, because an old
//!    backlog would otherwise be more urgent than everything new until it is gone.
//! 3. In a class, the build that has the fewest tasks of this class running is next; among equals the one that has waited
//!    longest since it was served, or since it came. So builds share what their class gets, however much each one queues.
//! 4. In a build, tasks go in order of age.
//!
//! Why nobody starves: each turn of a class goes to a build with the least load, and the build moves behind its equals, so
//! that a build without a running task is served within as many turns of its class as there are builds in it. A class is
//! either the most urgent or becomes due, and then at most one turn in two goes elsewhere.

use super::{Build, Place, ranks::Ranks};
use crate::actors::worker::messages::TaskId;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::{Duration, Instant},
};

#[derive(Debug)]
pub(super) struct Line {
    /// Those with waiting tasks.
    classes: BTreeMap<i32, Class>,
    ranks: Ranks,
    /// The last turn went to a class that was due.
    served_due: bool,
}

/// When a build was served last, and what it runs in the class.
#[derive(Debug, Clone, Copy)]
pub(super) struct Turn {
    pub(super) running: usize,
    pub(super) at: u64,
}

/// The task whose turn it is, and why.
pub(super) struct Next {
    pub(super) priority: i32,
    pub(super) build: Build,
    pub(super) task: TaskId,
    is_due: bool,
}

/// The waiting tasks of one priority.
#[derive(Debug, Default)]
struct Class {
    /// A task that several builds wait for is here for each of them.
    tasks: BTreeMap<(TaskId, Build), Instant>,
    builds: HashMap<Build, Waiting>,
    /// (tasks running, turn, build): the least is next.
    order: BTreeSet<(usize, u64, Build)>,
}

/// What waits of one build in one class; never empty.
#[derive(Debug)]
struct Waiting {
    turn: Turn,
    tasks: BTreeSet<TaskId>,
}

impl Line {
    /// An empty line in which a task gains a step of priority for each `step` that it waits.
    pub(super) fn new(step: Duration) -> Self {
        Self { classes: BTreeMap::new(), ranks: Ranks::new(step), served_due: false }
    }

    /// The most urgent priority, and since when the oldest task of it waits; `None` when nothing does.
    pub(super) fn most_urgent(&self) -> Option<(i32, Instant)> {
        let (priority, class) = self.classes.first_key_value()?;
        Some((*priority, class.oldest()?))
    }

    /// Adds a place; whether it is new. The turn is for a build that had nothing waiting.
    pub(super) fn insert(&mut self, place: &Place, turn: Turn) -> bool {
        self.change(place.priority, |class| class.insert(place, turn))
    }

    /// Takes a place out; whether it was there.
    pub(super) fn remove(&mut self, place: &Place) -> bool {
        self.change(place.priority, |class| class.remove(place.owner.build, place.task))
    }

    /// The task whose turn it is.
    pub(super) fn next(&self, now: Instant) -> Option<Next> {
        let due = if self.served_due { None } else { self.ranks.due(now).next() };
        let priority = due.or_else(|| self.ranks.lowest())?;
        let class = self.classes.get(&priority)?;
        let &(_, _, build) = class.order.first()?;
        let &task = class.builds.get(&build)?.tasks.first()?;
        Some(Next { priority, build, task, is_due: due.is_some() })
    }

    /// Takes that task out; its build has had this turn.
    pub(super) fn take(&mut self, next: &Next, turn: Turn) {
        self.served_due = next.is_due;
        self.change(next.priority, |class| {
            class.reorder(next.build, turn.running, Some(turn.at));
            class.remove(next.build, next.task)
        });
    }

    /// A build runs so many tasks of a class now.
    pub(super) fn ended(&mut self, priority: i32, build: Build, running: usize) {
        if let Some(class) = self.classes.get_mut(&priority) {
            class.reorder(build, running, None);
        }
    }

    /// All tasks in the order in which they would be taken now if nothing else came or ended, ageing aside.
    pub(super) fn order(&self) -> Vec<(i32, TaskId)> {
        let mut order = Vec::new();
        for (&priority, class) in &self.classes {
            // With `i` tasks taken before it, a build has `running + i` running, and stands behind those of its equals that
            // were taken from less often, for their last turn is longer ago.
            let waiting = class.builds.values().flat_map(|waiting| {
                let place = |(i, &task)| (waiting.turn.running + i, i, waiting.turn.at, task);
                waiting.tasks.iter().enumerate().map(place)
            });
            let mut waiting: Vec<_> = waiting.collect();
            waiting.sort_unstable();
            order.extend(waiting.into_iter().map(|(_, _, _, task)| (priority, task)));
        }
        order
    }

    /// The builds of a class that run nothing, and how many there are in all.
    #[cfg(test)]
    pub(super) fn idle_builds(&self, priority: i32) -> (Vec<Build>, usize) {
        let Some(class) = self.classes.get(&priority) else { return Default::default() };
        let idle = class.builds.iter().filter(|(_, waiting)| waiting.turn.running == 0);
        (idle.map(|(build, _)| *build).collect(), class.builds.len())
    }

    /// Changes a class, which is made if need be, and keeps the books about it.
    fn change(&mut self, priority: i32, change: impl FnOnce(&mut Class) -> bool) -> bool {
        let class = self.classes.entry(priority).or_default();
        let done = change(class);
        let oldest = class.oldest();
        self.ranks.set(priority, oldest);
        if oldest.is_none() {
            self.classes.remove(&priority);
        }
        done
    }
}

impl Class {
    fn oldest(&self) -> Option<Instant> {
        self.tasks.first_key_value().map(|(_, since)| *since)
    }

    fn insert(&mut self, place: &Place, turn: Turn) -> bool {
        let build = place.owner.build;
        let waiting = self.builds.entry(build).or_insert_with(|| {
            self.order.insert((turn.running, turn.at, build));
            Waiting { turn, tasks: BTreeSet::new() }
        });
        waiting.tasks.insert(place.task);
        self.tasks.insert((place.task, build), place.since).is_none()
    }

    fn remove(&mut self, build: Build, task: TaskId) -> bool {
        let Some(waiting) = self.builds.get_mut(&build) else { return false };
        if !waiting.tasks.remove(&task) {
            return false;
        }
        if waiting.tasks.is_empty() {
            self.order.remove(&(waiting.turn.running, waiting.turn.at, build));
            self.builds.remove(&build);
        }
        self.tasks.remove(&(task, build));
        true
    }

    fn reorder(&mut self, build: Build, running: usize, turn: Option<u64>) {
        let Some(Waiting { turn: last, .. }) = self.builds.get_mut(&build) else { return };
        self.order.remove(&(last.running, last.at, build));
        *last = Turn { running, at: turn.unwrap_or(last.at) };
        self.order.insert((last.running, last.at, build));
    }
}
