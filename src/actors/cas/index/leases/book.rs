//! [`Book`]: the builds that have leases, and their rows. Pure.
//!
//! A build has a *place*, which is its index in a list and its bit in the sets of builds.

use super::{COMMON_ROWS, ROW_BITS, ROWS, earlier::EARLIER, row_of};
use crate::caller::{Build, Owner, Peer};
use std::collections::{HashMap, VecDeque};

/// Maximum number of builds with leases. Further builds of a peer count as one.
pub(super) const BUILDS: usize = 1_024;
/// Number of words in a set of builds.
pub(super) const SET_WORDS: usize = BUILDS / 64;
/// Place of the build that stands for all builds without a place.
const REST: usize = 0;
/// A peer may have this many times as many builds as there are free places.
const SHARE: usize = 8;

/// The builds and the rows that exist.
pub(super) struct Book {
    /// The places of the builds whose leases last.
    pub(super) places: HashMap<Owner, usize>,
    /// The builds by place.
    pub(super) builds: Vec<Option<LeasingBuild>>,
    /// The number of builds of each peer.
    pub(super) peers: HashMap<Peer, usize>,
    /// The next names of the free rows. The row that was freed last comes last.
    pub(super) free: VecDeque<u32>,
    /// The same for the free common rows.
    pub(super) free_common: VecDeque<u32>,
    /// The common rows, by their position in the table of rows.
    pub(super) common: Vec<Option<CommonRow>>,
    /// The number of common rows that have begun so far.
    pub(super) common_begun: u64,
    /// The position of the newest common row of each payer.
    pub(super) newest_common: HashMap<Payer, usize>,
    /// The place of the build of each row that is not common.
    pub(super) build_of: Vec<u16>,
}

/// A build that has leases.
pub(super) struct LeasingBuild {
    pub(super) owner: Owner,
    /// How long its leases last after its last request, in seconds.
    pub(super) lasts: u32,
    /// The time of its last request.
    pub(super) active: u32,
    /// The names of its rows and the times of their beginning, the newest row last.
    pub(super) rows: VecDeque<(u32, u32)>,
}

/// The peer that a common row is charged to; `None` if builds of several peers share its entries.
pub(super) type Payer = Option<Peer>;

/// A row whose entries several builds have touched.
pub(super) struct CommonRow {
    pub(super) name: u32,
    pub(super) payer: Payer,
    /// The time of its beginning.
    pub(super) since: u32,
    /// The number of common rows that began before it.
    pub(super) number: u64,
    /// The builds that may have touched one of its entries, as a set of bits.
    pub(super) builds: [u64; SET_WORDS],
}

impl Book {
    /// Creates a book that contains only the build at [`REST`], whose leases last `lasts` seconds.
    pub(super) fn new(lasts: u32) -> Self {
        let first = |row: usize| (1 << ROW_BITS) | row as u32;
        let rest = LeasingBuild { owner: Owner::default(), lasts, active: 0, rows: VecDeque::new() };
        Self {
            places: HashMap::new(),
            builds: vec![Some(rest)],
            peers: HashMap::new(),
            free: (COMMON_ROWS..ROWS).map(first).collect(),
            free_common: (0..COMMON_ROWS).map(first).collect(),
            common: std::iter::repeat_with(|| None).take(COMMON_ROWS).collect(),
            common_begun: 0,
            newest_common: HashMap::new(),
            build_of: vec![0; ROWS],
        }
    }

    /// The name of the oldest row that only builds of this peer share. The newest one stays, and so do all of them if
    /// the peer itself asks.
    pub(super) fn older_common(&self, peer: Peer, asker: Option<Owner>) -> Option<u32> {
        if asker.is_some_and(|asker| asker.peer == peer) {
            return None;
        }
        let newest = self.newest_common.get(&Some(peer)).copied();
        let of_peer = self.common.iter().flatten().filter(|row| row.payer == Some(peer));
        let older = of_peer.filter(|row| Some(row_of(row.name)) != newest);
        Some(older.min_by_key(|row| row.number)?.name)
    }

    /// Returns the place of a build. If there are too many builds, it is the place of the other builds of its peer, or
    /// [`REST`].
    pub(super) fn place_of(&mut self, owner: Owner, lasts: u32, now: u32) -> usize {
        if let Some(place) = self.known_place(owner, now) {
            return place;
        }
        let free = BUILDS.saturating_sub(self.builds.iter().flatten().count());
        let own = self.peers.get(&owner.peer).copied().unwrap_or(0);
        if own < free.saturating_mul(SHARE) {
            return self.add(owner, lasts);
        }
        let others = Owner { build: Build::OTHERS, ..owner };
        match self.known_place(others, now) {
            Some(place) => place,
            None if free > 0 => self.add(others, lasts),
            None => REST,
        }
    }

    /// Returns the place of a build whose leases last. A build whose leases are over keeps its place until they are
    /// ended, but it is not found any more.
    fn known_place(&mut self, owner: Owner, now: u32) -> Option<usize> {
        let place = *self.places.get(&owner)?;
        if self.is_active(place, now) {
            return Some(place);
        }
        self.places.remove(&owner);
        None
    }

    /// Whether the leases of the build at this place last.
    fn is_active(&self, place: usize, now: u32) -> bool {
        let build = self.builds.get(place).and_then(Option::as_ref);
        build.is_some_and(|build| now < build.active.saturating_add(build.lasts))
    }

    /// Whether the leases of one of these builds last.
    pub(super) fn is_any_active(&self, builds: &[u64; SET_WORDS], now: u32) -> bool {
        let places = |(at, word): (usize, &u64)| {
            let mut left = *word;
            std::iter::from_fn(move || {
                let bit = (left != 0).then(|| left.trailing_zeros() as usize)?;
                left &= left - 1;
                Some(at * 64 + bit)
            })
        };
        builds.iter().enumerate().flat_map(places).any(|place| self.is_active(place, now))
    }

    fn add(&mut self, owner: Owner, lasts: u32) -> usize {
        let build = LeasingBuild { owner, lasts, active: 0, rows: VecDeque::new() };
        let place = self.builds.iter().position(Option::is_none).unwrap_or(self.builds.len());
        match self.builds.get_mut(place) {
            Some(free) => *free = Some(build),
            None => self.builds.push(Some(build)),
        }
        self.places.insert(owner, place);
        *self.peers.entry(owner.peer).or_default() += 1;
        place
    }

    /// Removes a build, also from the common rows. Returns the names of its own rows.
    pub(super) fn leave(&mut self, place: usize) -> Vec<u32> {
        for row in self.common.iter_mut().flatten() {
            row.builds[place / 64] &= !(1 << (place % 64));
        }
        let Some(build) = self.builds.get_mut(place) else { return Vec::new() };
        if place == REST {
            let rows = build.as_mut().map(|build| std::mem::take(&mut build.rows));
            return rows.into_iter().flatten().map(|(name, _)| name).collect();
        }
        let Some(build) = build.take() else { return Vec::new() };
        if self.places.get(&build.owner) == Some(&place) {
            self.places.remove(&build.owner);
        }
        if let Some(count) = self.peers.get_mut(&build.owner.peer) {
            *count -= 1;
            if *count == 0 {
                self.peers.remove(&build.owner.peer);
            }
        }
        build.rows.into_iter().map(|(name, _)| name).collect()
    }

    /// Returns who pays for an entry of the build at this place when a build of the peer `other` touches it too. An
    /// entry that was leased before the start is charged to `other`, which may well have leased it.
    pub(super) fn payer_of(&self, place: usize, other: Peer) -> Payer {
        let owner = self.builds.get(place).and_then(Option::as_ref)?.owner;
        Some(if owner == EARLIER { other } else { owner.peer })
    }
}

/// The set that contains only this place.
pub(super) fn set_of(place: usize) -> [u64; SET_WORDS] {
    let mut set = [0; SET_WORDS];
    set[place / 64] = 1 << (place % 64);
    set
}

/// Adds the places of `more` to a set.
pub(super) fn add_to(set: &mut [u64; SET_WORDS], more: &[u64; SET_WORDS]) {
    set.iter_mut().zip(more).for_each(|(set, more)| *set |= more);
}
