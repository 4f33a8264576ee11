//! A queue that is fair between peers and between builds: the tasks that wait for one pool, and which of them is next.
//! Pure.
//!
//! Clients choose the priority and the build name of their tasks, so these must not give one client an advantage over
//! others. They cannot choose their [`Peer`], which is the address that they call from. So shares nest: peers share the
//! slots of the pool, and builds share the slots of their peer. The order:
//! 1. A peer's *rank* is the most urgent priority among its waiting tasks, or 0 if that is negative. Peers of the
//!    lowest rank are served first. So a client can make its tasks less urgent than those of other peers, but not more
//!    urgent. Among the tasks of its own peer, it can do both (rule 3).
//! 2. Among peers of the lowest rank, the one with the fewest running tasks in this pool is next; among equals, the one
//!    that was served or arrived the longest time ago. A rank is *due* if its oldest task has waited long enough to
//!    make up for the difference ([`Ranks`]). It then counts as the lowest rank: it gets its share, and no more.
//! 3. Within a peer, [`PeerQueue`] defines the order: by priority, then fairly between builds, then by age.
//! 4. Tasks without followers go after all others, in order of age.
//!
//! A task that several owners wait for has an entry for each of them. It is taken with the first entry whose turn
//! comes, and counts as running for that owner; the caller removes the other entries. So an owner does not wait longer
//! because another owner with a long backlog wants the same task.
//!
//! Why peers come before priorities: otherwise a peer that calls everything urgent would get the whole pool, and no
//! range of priorities that is useful within a team is small enough to prevent that. Why positive priorities count
//! between peers: priorities are mostly used for nightly builds that yield to people, and these run on other machines.
//! Within one address, which may be a CI machine or all users behind a proxy, priorities and builds work as if there
//! were no peers.
//!
//! Why no peer starves: among the competing peers, one without a running task is served within as many turns as there
//! are such peers, and every peer competes at the latest when its oldest task has waited for [`ranks::STEPS_MAX`]
//! steps.
//!
//! Every operation costs O(log n), and [`Queue::pop`] O(r) more, where `r` is the number of ranks that are due, which
//! is bounded by the number of peers and of configured priorities. [`Queue::order`] costs O(n log n). The queue holds
//! entries, not tasks.

mod peer_queue;
mod ranks;
#[cfg(test)]
mod tests;

pub(crate) use crate::caller::{Build, Owner};

use crate::{actors::worker::messages::TaskId, caller::Peer};
use peer_queue::{BuildTurn, PeerQueue};
use ranks::Ranks;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque},
    time::{Duration, Instant},
};

#[cfg(test)]
pub(crate) use ranks::STEPS_MAX;

/// A task in a queue, for one of its owners.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct QueueEntry {
    /// Lower values run sooner.
    pub(crate) priority: i32,
    pub(crate) owner: Owner,
    /// Task ids ascend in the order of submission.
    pub(crate) task: TaskId,
    /// The time of the submission, which ascends with the ids.
    pub(crate) since: Instant,
    /// Whether a client follows the task.
    pub(crate) followed: bool,
}

/// The priority and owner for which a task counts from when it is taken until [`Queue::ended`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Charge {
    pub(crate) priority: i32,
    pub(crate) owner: Owner,
}

/// The tasks that wait for one pool.
#[derive(Debug)]
pub(crate) struct Queue {
    step: Duration,
    /// The peers with waiting tasks.
    peers: HashMap<Peer, WaitingPeer>,
    /// The same peers by rank.
    groups: BTreeMap<i32, Group>,
    ranks: Ranks,
    /// The entries of tasks without followers, with their priorities.
    unfollowed: BTreeMap<(TaskId, Owner), i32>,
    /// The number of entries of each task.
    tasks: HashMap<TaskId, usize>,
    running: HashMap<Charge, usize>,
    running_of: HashMap<Peer, usize>,
    /// The number of turns and arrivals so far. It orders peers and builds by when they were served last.
    turns: u64,
}

/// The waiting tasks of one peer; never empty between changes.
#[derive(Debug)]
struct WaitingPeer {
    running: usize,
    turn: u64,
    queue: PeerQueue,
}

/// The peers of one rank.
#[derive(Debug, Default)]
struct Group {
    /// The peers by number of running tasks, then by turn. The first one is next.
    order: BTreeSet<(usize, u64, Peer)>,
    /// The peers by the submission time of the oldest of their most urgent tasks.
    oldest: BTreeSet<(Instant, Peer)>,
}

/// The rank of a peer whose most urgent task has this priority.
fn rank(priority: i32) -> i32 {
    priority.max(0)
}

impl Queue {
    /// An empty queue in which a task gains a step of priority for each `step` that it waits.
    pub(crate) fn new(step: Duration) -> Self {
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

    /// The number of waiting tasks.
    pub(crate) fn len(&self) -> usize {
        self.tasks.len()
    }

    /// The number of running tasks that were taken from this queue.
    #[cfg(test)]
    pub(crate) fn running(&self) -> usize {
        self.running.values().sum()
    }

    /// Adds an entry. A peer that had no waiting task goes behind its equals, and so does a build within its peer.
    pub(crate) fn insert(&mut self, entry: QueueEntry) {
        let charge = Charge { priority: entry.priority, owner: entry.owner };
        *self.tasks.entry(entry.task).or_default() += 1;
        if !entry.followed {
            self.unfollowed.insert((entry.task, entry.owner), entry.priority);
            return;
        }
        self.turns += 1;
        let turn = self.turns;
        let running = self.running.get(&charge).copied().unwrap_or(0);
        let running_of = self.running_of.get(&entry.owner.peer).copied().unwrap_or(0);
        self.peers.entry(entry.owner.peer).or_insert_with(|| WaitingPeer {
            running: running_of,
            turn,
            queue: PeerQueue::new(self.step),
        });
        self.change(entry.owner.peer, |peer| peer.queue.insert(&entry, BuildTurn { running, at: turn }));
    }

    /// Removes an entry, and returns whether it was there.
    pub(crate) fn remove(&mut self, entry: &QueueEntry) -> bool {
        let removed = if entry.followed {
            self.change(entry.owner.peer, |peer| peer.queue.remove(entry)) == Some(true)
        } else {
            self.unfollowed.remove(&(entry.task, entry.owner)).is_some()
        };
        if removed {
            self.forget_entry(entry.task);
        }
        removed
    }

    fn forget_entry(&mut self, task: TaskId) {
        let Some(entries) = self.tasks.get_mut(&task) else { return };
        *entries -= 1;
        if *entries == 0 {
            self.tasks.remove(&task);
        }
    }

    /// The task that is next, and whether its entry says that it is followed.
    pub(crate) fn peek(&self, now: Instant) -> Option<(TaskId, bool)> {
        match self.next_peer(now) {
            Some(peer) => Some((self.peers.get(&peer)?.queue.next(now)?.task, true)),
            None => self.unfollowed.first_key_value().map(|((task, _), _)| (*task, false)),
        }
    }

    /// The numbers of running tasks of the peer that is next, and of its build and priority that are next.
    pub(crate) fn running_of_next(&self, now: Instant) -> (usize, usize) {
        let next = match self.next_peer(now) {
            Some(peer) => self
                .peers
                .get(&peer)
                .and_then(|waiting| waiting.queue.next(now))
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

    /// Takes the next entry. Its task counts as running until [`Queue::ended`].
    pub(crate) fn pop(&mut self, now: Instant) -> Option<(TaskId, Charge)> {
        let (task, charge) = match self.next_peer(now) {
            Some(peer) => {
                let next = self.peers.get(&peer)?.queue.next(now)?;
                let charge = Charge { priority: next.priority, owner: Owner { peer, build: next.build } };
                self.turns += 1;
                let (turn, running) = (self.turns, self.charge(charge));
                self.change(peer, |peer| {
                    peer.running += 1;
                    peer.turn = turn;
                    peer.queue.take(&next, BuildTurn { running, at: turn });
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
        self.forget_entry(task);
        Some((task, charge))
    }

    /// Counts a task that was taken from this queue as no longer running.
    pub(crate) fn ended(&mut self, charge: Charge) {
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
            peer.queue.ended(charge.priority, charge.owner.build, left);
        });
    }

    /// All tasks in the order of [`Queue::first`]. Costs O(n log n).
    pub(crate) fn order(&self) -> Vec<TaskId> {
        self.first(usize::MAX)
    }

    /// The first `count` tasks in the order in which they would be taken if no task arrived or ended. Ageing is not
    /// considered. For tasks of several owners, the order is only approximate, and some may be left out. The cost
    /// depends on `count` and not on the length of the queue.
    pub(crate) fn first(&self, count: usize) -> Vec<TaskId> {
        let mut order = Vec::with_capacity(count.min(self.len()));
        let mut seen = HashSet::with_capacity(count.min(self.len()));
        // Each of these peers has its turn before those that come after them.
        let mut next: BTreeSet<(i32, usize, u64, Peer)> = (self.groups.iter())
            .flat_map(|(rank, group)| {
                group.order.iter().map(|&(running, turn, peer)| (*rank, running, turn, peer))
            })
            .take(count)
            .collect();
        let line = |peer: &Peer| Some((*peer, self.peers.get(peer)?.queue.first(count).into()));
        let mut lines: HashMap<Peer, VecDeque<(i32, TaskId)>> =
            next.iter().filter_map(|(_, _, _, peer)| line(peer)).collect();
        let mut turns = self.turns;
        while order.len() < count
            && let Some((_, running, turn, peer)) = next.pop_first()
        {
            let Some(line) = lines.get_mut(&peer) else { continue };
            let Some((_, task)) = line.pop_front() else { continue };
            // A task that was taken with another entry takes no turn of this peer.
            let is_taken = seen.insert(task);
            order.extend(is_taken.then_some(task));
            turns += u64::from(is_taken);
            let (running, turn) = if is_taken { (running + 1, turns) } else { (running, turn) };
            next.extend(line.front().map(|(priority, _)| (rank(*priority), running, turn, peer)));
        }
        let unfollowed = self.unfollowed.keys().map(|(task, _)| *task).filter(|task| seen.insert(*task));
        order.extend(unfollowed.take(count - order.len()));
        order
    }

    /// The next peer to be served.
    fn next_peer(&self, now: Instant) -> Option<Peer> {
        let lowest = self.ranks.lowest()?;
        let competing = std::iter::once(lowest).chain(self.ranks.due(now));
        let first = |rank| self.groups.get(&rank).and_then(|group| group.order.first());
        competing.filter_map(first).min().map(|(_, _, peer)| *peer)
    }

    /// Counts a task that was taken, and returns how many tasks of its priority and owner run.
    fn charge(&mut self, charge: Charge) -> usize {
        *self.running_of.entry(charge.owner.peer).or_default() += 1;
        let running = self.running.entry(charge).or_default();
        *running += 1;
        *running
    }

    /// Changes the waiting tasks of a peer, if it has any, and updates the groups accordingly.
    fn change<T>(&mut self, peer: Peer, change: impl FnOnce(&mut WaitingPeer) -> T) -> Option<T> {
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

impl WaitingPeer {
    /// Its rank, its order within the rank, and the submission time of the oldest of its most urgent tasks.
    fn standing(&self) -> Option<(i32, (usize, u64), Instant)> {
        let (priority, oldest) = self.queue.most_urgent()?;
        Some((rank(priority), (self.running, self.turn), oldest))
    }
}
