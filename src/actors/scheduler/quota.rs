//! [`QueueQuota`]: counts tasks and their memory, in total, by peer and by build, and decides whether one more task may
//! be admitted. [`PeerQuota`] is the simpler form for one number that is counted only by peer. Pure.
//!
//! The quota bounds the queue. Without shares, a build of 50,000 actions would take every free place, because it asks
//! most often. So a peer is admitted only while it has less than [`SHARE`] times the free places. The number of peers
//! need not be known: the more places are taken, the less each peer may have. A peer that has nothing gets the last
//! place. In the same way, a build may have less than [`SHARE`] times what its peer may still take. Clients name their
//! builds, so a client that gives each request another build name gets the share of its peer, and no more.
//!
//! Each operation costs O(1). A peer or a build that has more than its share because others came later keeps its
//! places. It is not admitted until enough of its tasks have run, so that freed places go to the others.

use super::{
    queue::Owner,
    settings::{QUEUE_FULL_RETRY, SchedulerSettings},
};
use crate::caller::Peer;
use gorego_reapi::error::{Error, Result};
use std::collections::HashMap;

/// A peer may have this many times the free places, and a build this many times what is left to its peer. One peer
/// alone fills 8/9 of a large queue, so little of the queue is unused. Two peers fill 8/17 each, and `n` peers leave
/// one part in `8 n + 1` free. One build alone fills 64/81. A queue with up to this many places fills completely.
pub(crate) const SHARE: usize = 8;

/// Part of the queue that tasks take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Load {
    /// The number of tasks that are not running.
    pub(crate) waiting: usize,
    /// The memory of the actions in bytes, including those that are running.
    pub(crate) weight: usize,
}

/// The bound of the queue and its use; see the top of this file.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct QueueQuota {
    size: usize,
    bytes: usize,
    all: Load,
    /// The peers that have at least one task.
    peers: HashMap<Peer, Load>,
    builds: HashMap<Owner, Load>,
}

/// How much more a peer may take if it has `own` and this much is free. It stops at [`SHARE`] times what is then free.
fn left_to_peer(own: usize, free: usize) -> usize {
    free.saturating_mul(SHARE).saturating_sub(own).div_ceil(SHARE + 1)
}

/// Whether a holder of `own` has its full share if this much is left.
fn has_share(own: usize, left: usize) -> bool {
    own >= left.saturating_mul(SHARE)
}

impl QueueQuota {
    /// An empty queue that is bounded by `queue_size` and `queue_bytes`.
    pub(crate) fn new(settings: &SchedulerSettings) -> Self {
        Self {
            size: settings.queue_size,
            bytes: settings.queue_bytes,
            all: Load::default(),
            peers: HashMap::new(),
            builds: HashMap::new(),
        }
    }

    /// The load of all tasks.
    pub(crate) fn all(&self) -> Load {
        self.all
    }

    /// The load of one build of a peer.
    pub(crate) fn of(&self, owner: Owner) -> Load {
        self.builds.get(&owner).copied().unwrap_or_default()
    }

    /// The load of all builds of a peer.
    pub(crate) fn of_peer(&self, peer: Peer) -> Load {
        self.peers.get(&peer).copied().unwrap_or_default()
    }

    /// Checks whether one more task of this weight may be admitted for an owner.
    ///
    /// # Errors
    /// `Exhausted`, which says whether the queue is full, or whether the peer or the build has its share (GEN-21).
    pub(crate) fn check(&self, owner: Owner, weight: usize) -> Result<()> {
        let (all, peer, build) = (self.all, self.of_peer(owner.peer), self.of(owner));
        let places = self.size.saturating_sub(all.waiting);
        let bytes = self.bytes.saturating_sub(all.weight);
        let (own_places, own_bytes) = (left_to_peer(peer.waiting, places), left_to_peer(peer.weight, bytes));
        let yours = owner.peer.own_name();
        let refusal = if places == 0 {
            format!("the queue is full: {} actions wait for a worker (execution.queue_size)", all.waiting)
        } else if weight > bytes {
            format!(
                "the queue is full: its actions would take {} bytes of memory, more than {}",
                all.weight.saturating_add(weight),
                self.bytes
            )
        } else if has_share(peer.waiting, places) {
            format!(
                "{yours} has its share of the queue: {} of its actions wait for a worker; the {places} places that \
                 are free, of {} (execution.queue_size), are for others",
                peer.waiting, self.size
            )
        } else if has_share(peer.weight, bytes) {
            format!(
                "{yours} has its share of the queue: its actions take {} bytes of memory; the {bytes} that are free, \
                 of {}, are for others",
                peer.weight, self.bytes
            )
        } else if has_share(build.waiting, own_places) {
            format!(
                "this build has its share of the queue: {} of its actions wait for a worker; the {own_places} places that \
                 are left to {yours}, of {} (execution.queue_size), are for other builds",
                build.waiting, self.size
            )
        } else if has_share(build.weight, own_bytes) {
            format!(
                "this build has its share of the queue: its actions take {} bytes of memory; the {own_bytes} that are left \
                 to {yours}, of {}, are for other builds",
                build.weight, self.bytes
            )
        } else {
            return Ok(());
        };
        Err(Error::Exhausted {
            message: format!("{refusal}; try again in {} s", QUEUE_FULL_RETRY.as_secs()),
            retry_after: Some(QUEUE_FULL_RETRY),
        })
    }

    /// Adds a load to an owner. Tasks that were admitted before, and wait again or have a new owner, may exceed the
    /// bounds.
    pub(crate) fn add(&mut self, owner: Owner, load: Load) {
        self.all.add(load);
        self.peers.entry(owner.peer).or_default().add(load);
        self.builds.entry(owner).or_default().add(load);
    }

    /// Removes a load that was added to an owner.
    pub(crate) fn remove(&mut self, owner: Owner, load: Load) {
        self.all.remove(load);
        if let Some(peer) = self.peers.get_mut(&owner.peer) {
            peer.remove(load);
            if *peer == Load::default() {
                self.peers.remove(&owner.peer);
            }
        }
        if let Some(build) = self.builds.get_mut(&owner) {
            build.remove(load);
            if *build == Load::default() {
                self.builds.remove(&owner);
            }
        }
    }
}

impl Load {
    /// The change of the load when a task starts or stops waiting. Its weight is counted separately.
    pub(crate) const TURN: Self = Self { waiting: 1, weight: 0 };

    fn add(&mut self, other: Self) {
        self.waiting = self.waiting.saturating_add(other.waiting);
        self.weight = self.weight.saturating_add(other.weight);
    }

    fn remove(&mut self, other: Self) {
        self.waiting = self.waiting.saturating_sub(other.waiting);
        self.weight = self.weight.saturating_sub(other.weight);
    }
}

/// A number of things that peers share, and how many of them each peer has.
#[derive(Debug)]
pub(crate) struct PeerQuota {
    /// What is counted, for messages.
    what: &'static str,
    size: usize,
    taken: usize,
    /// The peers that have at least one of them.
    peers: HashMap<Peer, usize>,
}

impl PeerQuota {
    pub(crate) fn new(what: &'static str, size: usize) -> Self {
        Self { what, size, taken: 0, peers: HashMap::new() }
    }

    /// The number that all peers have together.
    #[cfg(test)]
    pub(crate) fn taken(&self) -> usize {
        self.taken
    }

    /// Checks whether a peer may take one more.
    ///
    /// # Errors
    /// `Exhausted`, which says whether none is left or the peer has its share.
    pub(crate) fn check(&self, peer: Peer) -> Result<()> {
        let (free, own) = (self.size.saturating_sub(self.taken), self.peers.get(&peer).copied().unwrap_or(0));
        if !has_share(own, free) {
            return Ok(());
        }
        let (what, size) = (self.what, self.size);
        let refusal = if free == 0 {
            format!("there are {size} {what}, the most that this server takes")
        } else {
            let yours = peer.own_name();
            format!("{yours} has its share of the {size} {what} that this server takes: {own}")
        };
        Err(Error::Exhausted {
            message: format!("{refusal}; try again in {} s", QUEUE_FULL_RETRY.as_secs()),
            retry_after: Some(QUEUE_FULL_RETRY),
        })
    }

    /// Adds to the number of a peer. The total may exceed the bound.
    pub(crate) fn take(&mut self, peer: Peer, more: usize) {
        if more > 0 {
            self.taken = self.taken.saturating_add(more);
            let own = self.peers.entry(peer).or_default();
            *own = own.saturating_add(more);
        }
    }

    /// Subtracts from the number of a peer.
    pub(crate) fn give_back(&mut self, peer: Peer, less: usize) {
        let Some(own) = self.peers.get_mut(&peer) else { return };
        let less = less.min(*own);
        self.taken = self.taken.saturating_sub(less);
        *own -= less;
        if *own == 0 {
            self.peers.remove(&peer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::queue::Build, *};
    use std::net::Ipv4Addr;

    const ONE: Load = Load { waiting: 1, weight: 10 };

    fn quota(queue_size: usize, queue_bytes: usize) -> QueueQuota {
        QueueQuota::new(&SchedulerSettings { queue_size, queue_bytes, ..SchedulerSettings::default() })
    }

    fn peer(number: u8) -> Peer {
        Peer::V4(Ipv4Addr::new(127, 0, 0, number))
    }

    fn owner(peer_number: u8, build: u64) -> Owner {
        Owner { peer: peer(peer_number), build: Build(build) }
    }

    /// Adds tasks, each for the next of these owners, until one is refused. Returns how many were added.
    fn fill_in_turn(quota: &mut QueueQuota, owners: impl IntoIterator<Item = Owner>) -> usize {
        let admit = |owner: &Owner| {
            let is_admitted = quota.check(*owner, ONE.weight).is_ok();
            if is_admitted {
                quota.add(*owner, ONE);
            }
            is_admitted
        };
        owners.into_iter().take_while(admit).count()
    }

    fn fill(quota: &mut QueueQuota, owner: Owner) -> usize {
        fill_in_turn(quota, std::iter::repeat(owner))
    }

    /// Adds tasks of a peer that names another build for each task.
    fn fill_with_builds(quota: &mut QueueQuota, peer: u8) -> usize {
        fill_in_turn(quota, (0..).map(|build| owner(peer, build)))
    }

    fn refusal(quota: &QueueQuota, owner: Owner) -> String {
        let refusal = quota.check(owner, ONE.weight).unwrap_err();
        assert!(matches!(refusal, Error::Exhausted { retry_after: Some(QUEUE_FULL_RETRY), .. }));
        refusal.to_string()
    }

    /// GEN-21. The names of the builds make no difference.
    #[test]
    fn a_peer_alone_fills_eight_ninths_and_others_find_room() {
        let mut quota = quota(9_000, usize::MAX);
        assert_eq!(fill_with_builds(&mut quota, 1), 8_000);
        let message = refusal(&quota, owner(1, 9_999));
        assert!(
            message.contains("your address has its share") && message.contains("1000 places"),
            "{message}"
        );
        let others = [2, 3, 4, 5, 6].map(|peer| fill_with_builds(&mut quota, peer));
        assert_eq!(others, [889, 99, 11, 1, 0], "each finds 8/9 of what is left, whatever it brings");
        assert!(refusal(&quota, owner(6, 1)).contains("the queue is full"));
        quota.remove(owner(1, 0), ONE);
        assert_eq!(
            [1, 6].map(|peer| fill_with_builds(&mut quota, peer)),
            [0, 1],
            "who has its share does not take it back"
        );
    }

    #[test]
    fn a_build_alone_leaves_room_to_other_builds_of_its_peer_and_more_to_other_peers() {
        let mut quota = quota(8_100, usize::MAX);
        assert_eq!(fill(&mut quota, owner(1, 1)), 6_400, "64/81");
        let message = refusal(&quota, owner(1, 1));
        assert!(message.contains("this build has its share") && message.contains("800 places"), "{message}");
        assert_eq!([2, 3].map(|build| fill(&mut quota, owner(1, build))), [712, 79]);
        assert_eq!(fill_with_builds(&mut quota, 2), 808, "8/9 of the 909 that are free");
    }

    #[test]
    fn large_builds_that_come_together_get_the_same() {
        for builds in [[owner(1, 1), owner(2, 1)], [owner(1, 1), owner(1, 2)]] {
            let mut quota = quota(17_000, usize::MAX);
            for _ in 0..17_000 {
                for build in builds {
                    if quota.check(build, ONE.weight).is_ok() {
                        quota.add(build, ONE);
                    }
                }
            }
            let [one, other] = builds.map(|build| quota.of(build).waiting);
            assert_eq!(one, other);
            assert!(one + other > 14_000, "{one}");
            assert!(fill(&mut quota, owner(1, 3)) >= 5);
        }
    }

    #[test]
    fn small_queues_fill_completely() {
        for size in 0..=SHARE {
            assert_eq!(fill(&mut quota(size, usize::MAX), owner(1, 1)), size);
        }
        assert_eq!(fill_with_builds(&mut quota(SHARE + 1, usize::MAX), 1), SHARE);
    }

    #[test]
    fn room_that_is_given_back_is_free_for_the_same_build_too() {
        let mut quota = quota(81, usize::MAX);
        assert_eq!(fill(&mut quota, owner(1, 1)), 64);
        quota.remove(owner(1, 1), Load::TURN);
        assert_eq!(fill(&mut quota, owner(1, 1)), 1, "one has begun to run");
        for _ in 0..65 {
            quota.remove(owner(1, 1), ONE);
        }
        assert_eq!((quota.all(), quota.of(owner(1, 1)).waiting), (Load::default(), 0));
        assert!(quota.builds.is_empty() && quota.peers.is_empty(), "what is over is forgotten");
    }

    /// A task that waits again may exceed the bound. No counter wraps, and no further task is admitted because of it.
    #[test]
    fn requeued_tasks_may_exceed_the_bound() {
        let mut quota = quota(2, usize::MAX);
        fill(&mut quota, owner(1, 1));
        quota.add(owner(1, 1), Load::TURN);
        assert!(refusal(&quota, owner(2, 2)).contains("the queue is full: 3 actions"));
    }

    #[test]
    fn bytes_are_shared_like_places() {
        let mut quota = quota(usize::MAX, 8_100);
        assert_eq!(fill(&mut quota, owner(1, 1)), 640);
        assert!(refusal(&quota, owner(1, 1)).contains("6400 bytes of memory"));
        assert!(fill(&mut quota, owner(1, 2)) >= 5);
        for build in 3..20 {
            fill(&mut quota, owner(1, build));
        }
        assert!(refusal(&quota, owner(1, 99)).contains("your address"));
        assert!(fill(&mut quota, owner(2, 2)) >= 5);
        let heavy = quota.check(owner(3, 4), 8_000).unwrap_err().to_string();
        assert!(heavy.contains("the queue is full"), "{heavy}");
    }

    #[test]
    fn places_without_builds_are_shared_between_peers() {
        let mut places = PeerQuota::new("things", 9);
        let fill = |places: &mut PeerQuota, number| {
            let mut count = 0;
            while places.check(peer(number)).is_ok() {
                places.take(peer(number), 1);
                count += 1;
            }
            count
        };
        assert_eq!(fill(&mut places, 1), 8);
        assert!(places.check(peer(1)).unwrap_err().to_string().contains("your address has its share"));
        assert_eq!(fill(&mut places, 2), 1);
        assert!(places.check(peer(3)).unwrap_err().to_string().contains("there are 9 things"));
        places.give_back(peer(2), 1);
        places.give_back(peer(2), 1);
        assert_eq!((places.taken(), places.peers.len()), (8, 1));
    }
}
