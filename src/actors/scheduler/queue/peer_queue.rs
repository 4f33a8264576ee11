//! [`PeerQueue`]: the waiting tasks of one peer, and which of them is next.
//!
//! The order:
//! 1. Tasks of one priority are a class. The most urgent class is served first.
//! 2. A class that is due ([`Ranks`]) gets every second turn; of several due classes, the most overdue one. It does not
//!    get all turns, because otherwise an old backlog would delay everything new until it is gone.
//! 3. In a class, the build with the fewest running tasks of this class is next; among equals, the one that was served
//!    or arrived the longest time ago. So builds share the turns of their class, however many tasks each one queues.
//! 4. In a build, tasks go in order of age.
//!
//! Why no build starves: each turn of a class goes to a build with the least load, which then moves behind its equals.
//! So a build without a running task is served within as many turns of its class as there are builds in it. A class is
//! either the most urgent one or becomes due, and then at most every second turn goes to another class.

use super::{Build, QueueEntry, ranks::Ranks};
use crate::actors::worker::messages::TaskId;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::{Duration, Instant},
};

#[derive(Debug)]
pub(super) struct PeerQueue {
    /// The classes with waiting tasks.
    classes: BTreeMap<i32, Class>,
    ranks: Ranks,
    /// Whether the last turn went to a class that was due.
    served_due: bool,
}

/// When a build was served last, and how many of its tasks run in the class.
#[derive(Debug, Clone, Copy)]
pub(super) struct BuildTurn {
    pub(super) running: usize,
    pub(super) at: u64,
}

/// The task that is next, and whether it is next because its class is due.
pub(super) struct Next {
    pub(super) priority: i32,
    pub(super) build: Build,
    pub(super) task: TaskId,
    is_due: bool,
}

/// The waiting tasks of one priority.
#[derive(Debug, Default)]
struct Class {
    /// A task that several builds wait for is listed for each of them.
    tasks: BTreeMap<(TaskId, Build), Instant>,
    builds: HashMap<Build, WaitingBuild>,
    /// The builds by number of running tasks, then by turn. The first one is next.
    order: BTreeSet<(usize, u64, Build)>,
}

/// The waiting tasks of one build in one class; never empty.
#[derive(Debug)]
struct WaitingBuild {
    turn: BuildTurn,
    tasks: BTreeSet<TaskId>,
}

impl PeerQueue {
    /// An empty queue in which a task gains a step of priority for each `step` that it waits.
    pub(super) fn new(step: Duration) -> Self {
        Self { classes: BTreeMap::new(), ranks: Ranks::new(step), served_due: false }
    }

    /// The most urgent priority and the submission time of its oldest task; `None` if no task waits.
    pub(super) fn most_urgent(&self) -> Option<(i32, Instant)> {
        let (priority, class) = self.classes.first_key_value()?;
        Some((*priority, class.oldest()?))
    }

    /// Adds an entry, and returns whether it is new. `turn` is the turn of a build that had no waiting task.
    pub(super) fn insert(&mut self, entry: &QueueEntry, turn: BuildTurn) -> bool {
        self.change(entry.priority, |class| class.insert(entry, turn))
    }

    /// Removes an entry, and returns whether it was there.
    pub(super) fn remove(&mut self, entry: &QueueEntry) -> bool {
        self.change(entry.priority, |class| class.remove(entry.owner.build, entry.task))
    }

    /// The task that is next.
    pub(super) fn next(&self, now: Instant) -> Option<Next> {
        let due = if self.served_due { None } else { self.ranks.due(now).next() };
        let priority = due.or_else(|| self.ranks.lowest())?;
        let class = self.classes.get(&priority)?;
        let &(_, _, build) = class.order.first()?;
        let &task = class.builds.get(&build)?.tasks.first()?;
        Some(Next { priority, build, task, is_due: due.is_some() })
    }

    /// Takes this task and gives its build a new turn.
    pub(super) fn take(&mut self, next: &Next, turn: BuildTurn) {
        self.served_due = next.is_due;
        self.change(next.priority, |class| {
            class.reorder(next.build, turn.running, Some(turn.at));
            class.remove(next.build, next.task)
        });
    }

    /// Sets the number of running tasks of a build in a class.
    pub(super) fn ended(&mut self, priority: i32, build: Build, running: usize) {
        if let Some(class) = self.classes.get_mut(&priority) {
            class.reorder(build, running, None);
        }
    }

    /// The first `count` tasks in the order in which they would be taken if none arrived or ended; ageing is not
    /// considered.
    pub(super) fn first(&self, count: usize) -> Vec<(i32, TaskId)> {
        let mut order = Vec::new();
        for (&priority, class) in &self.classes {
            let left = count - order.len();
            if left == 0 {
                break;
            }
            // After `i` of its tasks, a build has `running + i` running tasks. It is behind equals of which fewer tasks
            // were taken, because their last turn is longer ago.
            let first = class.order.iter().take(left);
            let builds = first.filter_map(|(_, _, build)| class.builds.get(build));
            let waiting = builds.flat_map(|waiting| {
                let entry = |(i, &task)| (waiting.turn.running + i, i, waiting.turn.at, task);
                waiting.tasks.iter().take(left).enumerate().map(entry)
            });
            let mut waiting: Vec<_> = waiting.collect();
            waiting.sort_unstable();
            waiting.truncate(left);
            order.extend(waiting.into_iter().map(|(_, _, _, task)| (priority, task)));
        }
        order
    }

    /// The builds of a class without running tasks, and the number of all its builds.
    #[cfg(test)]
    pub(super) fn idle_builds(&self, priority: i32) -> (Vec<Build>, usize) {
        let Some(class) = self.classes.get(&priority) else { return Default::default() };
        let idle = class.builds.iter().filter(|(_, waiting)| waiting.turn.running == 0);
        (idle.map(|(build, _)| *build).collect(), class.builds.len())
    }

    /// Changes a class, which is created if necessary, and updates the ranks.
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

    fn insert(&mut self, entry: &QueueEntry, turn: BuildTurn) -> bool {
        let build = entry.owner.build;
        let waiting = self.builds.entry(build).or_insert_with(|| {
            self.order.insert((turn.running, turn.at, build));
            WaitingBuild { turn, tasks: BTreeSet::new() }
        });
        waiting.tasks.insert(entry.task);
        self.tasks.insert((entry.task, build), entry.since).is_none()
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
        let Some(WaitingBuild { turn: last, .. }) = self.builds.get_mut(&build) else { return };
        self.order.remove(&(last.running, last.at, build));
        *last = BuildTurn { running, at: turn.unwrap_or(last.at) };
        self.order.insert((last.running, last.at, build));
    }
}
