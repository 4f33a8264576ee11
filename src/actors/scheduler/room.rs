//! [`Room`]: what waits and what it weighs, in all, by peer and by build, and whether one more task may come in. [`Places`] is
//! the same for what has no builds and weighs nothing.
//!
//! It owns the bound of the queue. First come, first served would be no bound at all for the second who comes: a build of
//! 50,000 actions would take every place, and take each one that gets free, because it asks most often. So a peer is admitted
//! only while what it has is less than [`SHARE`] times what is free. It need not be known how many peers there are or will be:
//! the more of them take room, the less is free, and the less each may have. One that has nothing gets the last place. In the
//! same way a build may have less than [`SHARE`] times what its peer may still take. Builds are what clients call so: one that
//! gives each of its requests another name has what its peer may have, no more.
//!
//! Pure counting, O(1) each. Nothing is taken away from a peer or a build that has more than its share because others came
//! later; it gets no more until enough of its tasks have run, so that the places which get free go to the others.

use super::{
    queue::Owner,
    settings::{QUEUE_FULL_RETRY, SchedulerSettings},
};
use crate::caller::Peer;
use gorego_reapi::error::{Error, Result};
use std::collections::HashMap;

/// How many times as much as what is free a peer may have, and a build of what is left to its peer. One peer alone fills 8/9
/// of a large queue, so that little of the queue is idle; two fill 8/17 each, and `n` of them leave one part in `8 n + 1`. One
/// build alone fills 64/81. A queue of up to this many places fills completely.
pub const SHARE: usize = 8;

/// What tasks take up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Load {
    /// Tasks that are not running.
    pub waiting: usize,
    /// What the actions weigh, in bytes; those that are running too.
    pub weight: usize,
}

/// See the file's head.
#[derive(Debug, PartialEq, Eq)]
pub struct Room {
    size: usize,
    bytes: usize,
    all: Load,
    /// Those that have something.
    peers: HashMap<Peer, Load>,
    builds: HashMap<Owner, Load>,
}

/// How much a peer may take that has `own` while this much is free: until it has [`SHARE`] times what is free then.
fn left_to_peer(own: usize, free: usize) -> usize {
    free.saturating_mul(SHARE).saturating_sub(own).div_ceil(SHARE + 1)
}

/// Whether a holder that has `own` has its share, while this much is left to all holders.
fn has_share(own: usize, left: usize) -> bool {
    own >= left.saturating_mul(SHARE)
}

impl Room {
    /// Empty, within `queue_size` and `queue_bytes`.
    pub fn new(settings: &SchedulerSettings) -> Self {
        Self {
            size: settings.queue_size,
            bytes: settings.queue_bytes,
            all: Load::default(),
            peers: HashMap::new(),
            builds: HashMap::new(),
        }
    }

    /// What there is in all.
    pub fn all(&self) -> Load {
        self.all
    }

    /// What a build has.
    pub fn of(&self, owner: Owner) -> Load {
        self.builds.get(&owner).copied().unwrap_or_default()
    }

    /// What a peer has.
    pub fn of_peer(&self, peer: Peer) -> Load {
        self.peers.get(&peer).copied().unwrap_or_default()
    }

    /// Whether one more task, of this weight, may come in for this owner.
    ///
    /// # Errors
    /// `Exhausted`, which says whether there is no room or who has its share of it (GEN-21).
    pub fn check(&self, owner: Owner, weight: usize) -> Result<()> {
        let (all, peer, build) = (self.all, self.of_peer(owner.peer), self.of(owner));
        let places = self.size.saturating_sub(all.waiting);
        let bytes = self.bytes.saturating_sub(all.weight);
        let (own_places, own_bytes) = (left_to_peer(peer.waiting, places), left_to_peer(peer.weight, bytes));
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
                "your address has its share of the queue: {} of its actions wait for a worker; the {places} places that \
                 are free, of {} (execution.queue_size), are for others",
                peer.waiting, self.size
            )
        } else if has_share(peer.weight, bytes) {
            format!(
                "your address has its share of the queue: its actions take {} bytes of memory; the {bytes} that are free, \
                 of {}, are for others",
                peer.weight, self.bytes
            )
        } else if has_share(build.waiting, own_places) {
            format!(
                "this build has its share of the queue: {} of its actions wait for a worker; the {own_places} places that \
                 are left to your address, of {} (execution.queue_size), are for other builds",
                build.waiting, self.size
            )
        } else if has_share(build.weight, own_bytes) {
            format!(
                "this build has its share of the queue: its actions take {} bytes of memory; the {own_bytes} that are left \
                 to your address, of {}, are for other builds",
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

    /// Counts for an owner. What was admitted once, and waits again or counts for somebody else now, may exceed the bounds.
    pub fn add(&mut self, owner: Owner, load: Load) {
        self.all.add(load);
        self.peers.entry(owner.peer).or_default().add(load);
        self.builds.entry(owner).or_default().add(load);
    }

    /// Counts it no more.
    pub fn remove(&mut self, owner: Owner, load: Load) {
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
    /// One task that waits, of which the weight is already counted, or goes on to be.
    pub const TURN: Self = Self { waiting: 1, weight: 0 };

    fn add(&mut self, other: Self) {
        self.waiting = self.waiting.saturating_add(other.waiting);
        self.weight = self.weight.saturating_add(other.weight);
    }

    fn remove(&mut self, other: Self) {
        self.waiting = self.waiting.saturating_sub(other.waiting);
        self.weight = self.weight.saturating_sub(other.weight);
    }
}

/// A number of places that peers share.
#[derive(Debug)]
pub struct Places {
    /// What they are for, for messages.
    what: &'static str,
    size: usize,
    taken: usize,
    /// Those that have some.
    peers: HashMap<Peer, usize>,
}

impl Places {
    /// All free.
    pub fn new(what: &'static str, size: usize) -> Self {
        Self { what, size, taken: 0, peers: HashMap::new() }
    }

    /// How many are taken.
    #[cfg(test)]
    pub fn taken(&self) -> usize {
        self.taken
    }

    /// Whether a peer may take one more.
    ///
    /// # Errors
    /// `Exhausted`, which says whether there is none or the peer has its share.
    pub fn check(&self, peer: Peer) -> Result<()> {
        let (free, own) = (self.size.saturating_sub(self.taken), self.peers.get(&peer).copied().unwrap_or(0));
        if !has_share(own, free) {
            return Ok(());
        }
        let (what, size) = (self.what, self.size);
        let refusal = if free == 0 {
            format!("there are {size} {what}, the most that this server takes")
        } else {
            format!("your address has its share of the {size} {what} that this server takes: {own}")
        };
        Err(Error::Exhausted {
            message: format!("{refusal}; try again in {} s", QUEUE_FULL_RETRY.as_secs()),
            retry_after: Some(QUEUE_FULL_RETRY),
        })
    }

    /// Takes one for a peer.
    pub fn take(&mut self, peer: Peer) {
        self.taken = self.taken.saturating_add(1);
        *self.peers.entry(peer).or_default() += 1;
    }

    /// Gives it back.
    pub fn give_back(&mut self, peer: Peer) {
        let Some(own) = self.peers.get_mut(&peer) else { return };
        self.taken = self.taken.saturating_sub(1);
        *own = own.saturating_sub(1);
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

    fn room(queue_size: usize, queue_bytes: usize) -> Room {
        Room::new(&SchedulerSettings { queue_size, queue_bytes, ..SchedulerSettings::default() })
    }

    fn peer(number: u8) -> Peer {
        Peer::V4(Ipv4Addr::new(127, 0, 0, number))
    }

    /// A build of a peer.
    fn owner(peer_number: u8, build: u64) -> Owner {
        Owner { peer: peer(peer_number), build: Build(build) }
    }

    /// How many more tasks come in, each for the next of these owners.
    fn fill_in_turn(room: &mut Room, owners: impl IntoIterator<Item = Owner>) -> usize {
        let admit = |owner: &Owner| {
            let is_admitted = room.check(*owner, ONE.weight).is_ok();
            if is_admitted {
                room.add(*owner, ONE);
            }
            is_admitted
        };
        owners.into_iter().take_while(admit).count()
    }

    fn fill(room: &mut Room, owner: Owner) -> usize {
        fill_in_turn(room, std::iter::repeat(owner))
    }

    /// A peer that calls each of its actions a build of its own.
    fn fill_with_builds(room: &mut Room, peer: u8) -> usize {
        fill_in_turn(room, (0..).map(|build| owner(peer, build)))
    }

    fn refusal(room: &Room, owner: Owner) -> String {
        let refusal = room.check(owner, ONE.weight).unwrap_err();
        assert!(matches!(refusal, Error::Exhausted { retry_after: Some(QUEUE_FULL_RETRY), .. }));
        refusal.to_string()
    }

    /// GEN-21. Whatever it calls its builds.
    #[test]
    fn a_peer_alone_fills_eight_ninths_and_others_find_room() {
        let mut room = room(9_000, usize::MAX);
        assert_eq!(fill_with_builds(&mut room, 1), 8_000);
        let message = refusal(&room, owner(1, 9_999));
        assert!(
            message.contains("your address has its share") && message.contains("1000 places"),
            "{message}"
        );
        let others = [2, 3, 4, 5, 6].map(|peer| fill_with_builds(&mut room, peer));
        assert_eq!(others, [889, 99, 11, 1, 0], "each finds 8/9 of what is left, whatever it brings");
        assert!(refusal(&room, owner(6, 1)).contains("the queue is full"));
        room.remove(owner(1, 0), ONE);
        assert_eq!(
            [1, 6].map(|peer| fill_with_builds(&mut room, peer)),
            [0, 1],
            "who has its share does not take it back"
        );
    }

    #[test]
    fn a_build_alone_leaves_room_to_other_builds_of_its_peer_and_more_to_other_peers() {
        let mut room = room(8_100, usize::MAX);
        assert_eq!(fill(&mut room, owner(1, 1)), 6_400, "64/81");
        let message = refusal(&room, owner(1, 1));
        assert!(message.contains("this build has its share") && message.contains("800 places"), "{message}");
        assert_eq!([2, 3].map(|build| fill(&mut room, owner(1, build))), [712, 79]);
        assert_eq!(fill_with_builds(&mut room, 2), 808, "8/9 of the 909 that are free");
    }

    #[test]
    fn large_builds_that_come_together_get_the_same() {
        for builds in [[owner(1, 1), owner(2, 1)], [owner(1, 1), owner(1, 2)]] {
            let mut room = room(17_000, usize::MAX);
            for _ in 0..17_000 {
                for build in builds {
                    if room.check(build, ONE.weight).is_ok() {
                        room.add(build, ONE);
                    }
                }
            }
            let [one, other] = builds.map(|build| room.of(build).waiting);
            assert_eq!(one, other);
            assert!(one + other > 14_000, "{one}");
            assert!(fill(&mut room, owner(1, 3)) >= 5);
        }
    }

    #[test]
    fn small_queues_fill_completely() {
        for size in 0..=SHARE {
            assert_eq!(fill(&mut room(size, usize::MAX), owner(1, 1)), size);
        }
        assert_eq!(fill_with_builds(&mut room(SHARE + 1, usize::MAX), 1), SHARE);
    }

    #[test]
    fn room_that_is_given_back_is_free_for_the_same_build_too() {
        let mut room = room(81, usize::MAX);
        assert_eq!(fill(&mut room, owner(1, 1)), 64);
        room.remove(owner(1, 1), Load::TURN);
        assert_eq!(fill(&mut room, owner(1, 1)), 1, "one has begun to run");
        for _ in 0..65 {
            room.remove(owner(1, 1), ONE);
        }
        assert_eq!((room.all(), room.of(owner(1, 1)).waiting), (Load::default(), 0));
        assert!(room.builds.is_empty() && room.peers.is_empty(), "what is over is forgotten");
    }

    /// A task that waits again exceeds the bound; nothing wraps, and nobody gets in by that.
    #[test]
    fn what_waits_again_may_exceed_the_bound() {
        let mut room = room(2, usize::MAX);
        fill(&mut room, owner(1, 1));
        room.add(owner(1, 1), Load::TURN);
        assert!(refusal(&room, owner(2, 2)).contains("the queue is full: 3 actions"));
    }

    #[test]
    fn bytes_are_shared_like_places() {
        let mut room = room(usize::MAX, 8_100);
        assert_eq!(fill(&mut room, owner(1, 1)), 640);
        assert!(refusal(&room, owner(1, 1)).contains("6400 bytes of memory"));
        assert!(fill(&mut room, owner(1, 2)) >= 5);
        for build in 3..20 {
            fill(&mut room, owner(1, build));
        }
        assert!(refusal(&room, owner(1, 99)).contains("your address"));
        assert!(fill(&mut room, owner(2, 2)) >= 5);
        let heavy = room.check(owner(3, 4), 8_000).unwrap_err().to_string();
        assert!(heavy.contains("the queue is full"), "{heavy}");
    }

    #[test]
    fn places_without_builds_are_shared_between_peers() {
        let mut places = Places::new("things", 9);
        let fill = |places: &mut Places, number| {
            let mut count = 0;
            while places.check(peer(number)).is_ok() {
                places.take(peer(number));
                count += 1;
            }
            count
        };
        assert_eq!(fill(&mut places, 1), 8);
        assert!(places.check(peer(1)).unwrap_err().to_string().contains("your address has its share"));
        assert_eq!(fill(&mut places, 2), 1);
        assert!(places.check(peer(3)).unwrap_err().to_string().contains("there are 9 things"));
        places.give_back(peer(2));
        places.give_back(peer(2));
        assert_eq!((places.taken(), places.peers.len()), (8, 1));
    }
}
