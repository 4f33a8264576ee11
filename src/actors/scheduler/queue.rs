//! A queue that is fair between peers and between builds: the tasks that wait for one pool, and which of them is next.
//!
//! What a client says about its work, its priority and its build, is believed only as far as it cannot hurt others. The address
//! that it calls from, its [`Peer`], is a fact. So shares nest: peers share the slots of the pool, builds share those of their
//! peer. The order, in words:
//! 1. A peer's *rank* is the most urgent priority among its waiting tasks, and 0 if that is below 0. Peers of the lowest rank
//!    are served first. So a client may say that its work matters less than that of others, and everybody believes it; that its
//!    work matters more is believed by its own peer alone, in rule 3.
//! 2. Among peers of the lowest rank, the one that has the fewest tasks running in this pool is next; among equals the one that
//!    has waited longest since it was served, or since it came. A rank that is *due*, since its oldest task has waited long
//!    enough to make up for the difference ([`Ranks`]), counts as the lowest: it gets its share, and no more than that.
//! 3. Within a peer, [`Line`] has the order: by priority, then fairly between builds, then by age.
//! 4. Tasks that nobody follows go after all others, in order of age and nothing else.
//!
//! A task that several owners wait for has a place for each of them. It is taken with the first place whose turn comes, and
//! counts as running for that owner; the caller removes the others. So nobody waits longer because somebody else, with a long
//! backlog, wants the same.
//!
//! Why peers come first and priority second: with priority first, a peer that calls everything urgent has the pool for itself,
//! and no range of priorities that is useful within a team would be small enough to prevent that. Why positive priorities count
//! between peers: nightly builds that yield to people are what priorities are used for most, and those run on other machines
//! than people's. Within one address, which may be a whole CI machine or everybody behind a proxy, priorities and builds work as
//! if there were no peers.
//!
//! Why nobody starves: among the peers that compete, one without a running task is served within as many turns as there are
//! such peers, and every peer competes when its oldest task has waited for [`ranks::STEPS_MAX`] steps at the latest.
//!
//! Every operation costs O(log n), and [`Queue::pop`] O(r) more, where `r` is the number of ranks that are due; there are not
//! more of them than peers or than configured priorities. [`Queue::order`] costs O(n log n). It holds places, not tasks, and
//! reads no clock.

mod line;
mod ranks;
#[cfg(test)]
mod tests;

use crate::{actors::worker::messages::TaskId, caller::Peer};
use line::{Line, Turn};
use ranks::Ranks;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque},
    time::{Duration, Instant},
};

#[cfg(test)]
pub use ranks::STEPS_MAX;

/// One run of a build tool in one instance, as a number. All runs of a peer that have no name share as one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Build(pub u64);

/// For whom a task counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Owner {
    /// Where it comes from.
    pub peer: Peer,
    /// What its client says that it belongs to; builds of different peers are different.
    pub build: Build,
}

/// Where a task stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Lower runs sooner.
    pub priority: i32,
    /// For whom it counts.
    pub owner: Owner,
    /// Ids ascend with submission.
    pub task: TaskId,
    /// When it was submitted; ascends with the ids.
    pub since: Instant,
    /// Whether a client waits for it.
    pub followed: bool,
}

/// What a task that was taken counts for, until [`Queue::ended`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Charge {
    /// Its priority.
    pub priority: i32,
    /// For whom it counts.
    pub owner: Owner,
}

/// The tasks that wait for one pool.
#[derive(Debug)]
pub struct Queue {
    step: Duration,
    /// Those with waiting tasks.
    peers: HashMap<Peer, Waiting>,
    /// The same by rank.
    groups: BTreeMap<i32, Group>,
    ranks: Ranks,
    /// Places of tasks that nobody follows, with their priorities.
    unfollowed: BTreeMap<(TaskId, Owner), i32>,
    /// How many places each task has here.
    tasks: HashMap<TaskId, usize>,
    running: HashMap<Charge, usize>,
    running_of: HashMap<Peer, usize>,
    /// Counts turns and arrivals, to tell who was served least recently.
    turns: u64,
}

/// What waits of one peer; never empty between changes.
#[derive(Debug)]
struct Waiting {
    running: usize,
    turn: u64,
    line: Line,
}

/// The peers of one rank.
#[derive(Debug, Default)]
struct Group {
    /// (tasks running, turn, peer): the least is next.
    order: BTreeSet<(usize, u64, Peer)>,
    /// By the oldest of each peer's most urgent tasks.
    oldest: BTreeSet<(Instant, Peer)>,
}

/// The rank of a peer whose most urgent task has this priority.
fn rank(priority: i32) -> i32 {
    priority.max(0)
}

impl Queue {
    /// An empty queue in which a task gains a step of priority for each `step` that it waits.
    pub fn new(step: Duration) -> Self {
        Self {
            step,
            peers: HashMap::new(),
            groups: BTreeMap::new(),
            ranks: Ranks::new(step),
            unfollowed: BTreeMap::new(),
            tasks: HashMap::new(),
            running: HashMap::new(),
            running_of: HashMap::new(),
            turns: 0,
        }
    }

    /// How many tasks wait.
    pub fn len(&self) -> usize {
        self.tasks.len()
    }

    /// How many tasks that were taken from here run.
    #[cfg(test)]
    pub fn running(&self) -> usize {
        self.running.values().sum()
    }

    /// Adds a place. A peer, or a build within its peer, that had nothing waiting goes behind its equals.
    pub fn insert(&mut self, place: Place) {
        let charge = Charge { priority: place.priority, owner: place.owner };
        *self.tasks.entry(place.task).or_default() += 1;
        if !place.followed {
            self.unfollowed.insert((place.task, place.owner), place.priority);
            return;
        }
        self.turns += 1;
        let turn = self.turns;
        let running = self.running.get(&charge).copied().unwrap_or(0);
        let running_of = self.running_of.get(&place.owner.peer).copied().unwrap_or(0);
        self.peers.entry(place.owner.peer).or_insert_with(|| Waiting {
            running: running_of,
            turn,
            line: Line::new(self.step),
        });
        self.change(place.owner.peer, |peer| peer.line.insert(&place, Turn { running, at: turn }));
    }

    /// Takes a place out; whether it was there.
    pub fn remove(&mut self, place: &Place) -> bool {
        let removed = if place.followed {
            self.change(place.owner.peer, |peer| peer.line.remove(place)) == Some(true)
        } else {
            self.unfollowed.remove(&(place.task, place.owner)).is_some()
        };
        if removed {
            self.forget_place(place.task);
        }
        removed
    }

    fn forget_place(&mut self, task: TaskId) {
        let Some(places) = self.tasks.get_mut(&task) else { return };
        *places -= 1;
        if *places == 0 {
            self.tasks.remove(&task);
        }
    }

    /// The task whose turn it is, and whether it was put here as followed.
    pub fn peek(&self, now: Instant) -> Option<(TaskId, bool)> {
        match self.next_peer(now) {
            Some(peer) => Some((self.peers.get(&peer)?.line.next(now)?.task, true)),
            None => self.unfollowed.first_key_value().map(|((task, _), _)| (*task, false)),
        }
    }

    /// How many tasks that were taken from here run for the peer whose turn it is, and how many for its build whose turn it is,
    /// of the same priority.
    pub fn running_of_next(&self, now: Instant) -> (usize, usize) {
        let next = match self.next_peer(now) {
            Some(peer) => self
                .peers
                .get(&peer)
                .and_then(|waiting| waiting.line.next(now))
                .map(|next| Charge { priority: next.priority, owner: Owner { peer, build: next.build } }),
            None => {
                let first = self.unfollowed.first_key_value();
                first.map(|((_, owner), priority)| Charge { priority: *priority, owner: *owner })
            }
        };
        let Some(next) = next else { return (0, 0) };
        let of_peer = self.running_of.get(&next.owner.peer).copied().unwrap_or(0);
        (of_peer, self.running.get(&next).copied().unwrap_or(0))
    }

    /// Takes out the place whose turn it is. Its task counts as running until [`Queue::ended`] is told so.
    pub fn pop(&mut self, now: Instant) -> Option<(TaskId, Charge)> {
        let (task, charge) = match self.next_peer(now) {
            Some(peer) => {
                let next = self.peers.get(&peer)?.line.next(now)?;
                let charge = Charge { priority: next.priority, owner: Owner { peer, build: next.build } };
                self.turns += 1;
                let (turn, running) = (self.turns, self.charge(charge));
                self.change(peer, |peer| {
                    peer.running += 1;
                    peer.turn = turn;
                    peer.line.take(&next, Turn { running, at: turn });
                });
                (next.task, charge)
            }
            None => {
                let ((task, owner), priority) = self.unfollowed.pop_first()?;
                let charge = Charge { priority, owner };
                self.charge(charge);
                (task, charge)
            }
        };
        self.forget_place(task);
        Some((task, charge))
    }

    /// A task that was taken from here runs no more.
    pub fn ended(&mut self, charge: Charge) {
        let Some(running) = self.running.get_mut(&charge) else { return };
        *running -= 1;
        let left = *running;
        if left == 0 {
            self.running.remove(&charge);
        }
        let peer = charge.owner.peer;
        if let Some(running) = self.running_of.get_mut(&peer) {
            *running -= 1;
            if *running == 0 {
                self.running_of.remove(&peer);
            }
        }
        self.change(peer, |peer| {
            peer.running -= 1;
            peer.line.ended(charge.priority, charge.owner.build, left);
        });
    }

    /// All tasks in the order in which they would be taken now if nothing else came or ended, ageing aside; nearly so for
    /// tasks of several owners. Costs O(n log n).
    pub fn order(&self) -> Vec<TaskId> {
        let mut order = Vec::with_capacity(self.len());
        let mut left: HashSet<TaskId> = self.tasks.keys().copied().collect();
        let mut lines: HashMap<Peer, VecDeque<(i32, TaskId)>> =
            self.peers.iter().map(|(peer, waiting)| (*peer, waiting.line.order().into())).collect();
        let mut next: BTreeSet<(i32, usize, u64, Peer)> = (self.groups.iter())
            .flat_map(|(rank, group)| {
                group.order.iter().map(|&(running, turn, peer)| (*rank, running, turn, peer))
            })
            .collect();
        let mut turns = self.turns;
        while let Some((_, running, turn, peer)) = next.pop_first() {
            let Some(line) = lines.get_mut(&peer) else { continue };
            let Some((_, task)) = line.pop_front() else { continue };
            // What was taken with another place takes no turn of this peer.
            let is_taken = left.remove(&task);
            order.extend(is_taken.then_some(task));
            turns += u64::from(is_taken);
            let (running, turn) = if is_taken { (running + 1, turns) } else { (running, turn) };
            next.extend(line.front().map(|(priority, _)| (rank(*priority), running, turn, peer)));
        }
        order.extend(self.unfollowed.keys().map(|(task, _)| *task).filter(|task| left.remove(task)));
        order
    }

    /// The peer whose turn it is.
    fn next_peer(&self, now: Instant) -> Option<Peer> {
        let lowest = self.ranks.lowest()?;
        let competing = std::iter::once(lowest).chain(self.ranks.due(now));
        let first = |rank| self.groups.get(&rank).and_then(|group| group.order.first());
        competing.filter_map(first).min().map(|(_, _, peer)| *peer)
    }

    /// Counts a task that was taken; how many of its kind run.
    fn charge(&mut self, charge: Charge) -> usize {
        *self.running_of.entry(charge.owner.peer).or_default() += 1;
        let running = self.running.entry(charge).or_default();
        *running += 1;
        *running
    }

    /// Changes what waits of a peer, if something does, and keeps the books about it.
    fn change<T>(&mut self, peer: Peer, change: impl FnOnce(&mut Waiting) -> T) -> Option<T> {
        let waiting = self.peers.get_mut(&peer)?;
        let before = waiting.standing();
        let changed = change(waiting);
        let after = waiting.standing();
        if after.is_none() {
            self.peers.remove(&peer);
        }
        if before != after {
            if let Some((rank, order, oldest)) = before {
                self.leave_group(rank, (order.0, order.1, peer), (oldest, peer));
            }
            if let Some((rank, order, oldest)) = after {
                let group = self.groups.entry(rank).or_default();
                group.order.insert((order.0, order.1, peer));
                group.oldest.insert((oldest, peer));
                self.ranks.set(rank, group.oldest.first().map(|(since, _)| *since));
            }
        }
        Some(changed)
    }

    fn leave_group(&mut self, rank: i32, order: (usize, u64, Peer), oldest: (Instant, Peer)) {
        let Some(group) = self.groups.get_mut(&rank) else { return };
        group.order.remove(&order);
        group.oldest.remove(&oldest);
        self.ranks.set(rank, group.oldest.first().map(|(since, _)| *since));
        if group.order.is_empty() {
            self.groups.remove(&rank);
        }
    }
}

impl Waiting {
    /// Its rank, its order in that, and the time since when the oldest of its most urgent tasks waits.
    fn standing(&self) -> Option<(i32, (usize, u64), Instant)> {
        let (priority, oldest) = self.line.most_urgent()?;
        Some((rank(priority), (self.running, self.turn), oldest))
    }
}
