//! [`Leases`]: what builds have touched, and until when it stays.
//!
//! A lease is not kept for each blob and build. An entry names one *row* of a table, and is leased as long as the row is there. A
//! row belongs to one build and one period, and counts the bytes of its entries. When the build has been quiet for long enough, its
//! rows end, each in constant time, and so do the leases of all entries that name them. A build that has too much loses its oldest
//! row ([`Leases::withdraw_one`]). Names of rows are never used again, so an entry may keep the name of a row that is gone.
//!
//! An entry that a second build touches moves to a *common* row. It stays until the last build is quiet that touched one of its
//! entries, and is charged to no build, so that no build loses what it shares with another one.
//!
//! Bounds: [`ROWS`] rows, of which [`COMMON_ROWS`] are common, and [`BUILDS`] builds: about 300 KiB. Beyond them, builds of a peer
//! count as one, and periods get longer.
//!
//! Readers take leases while they share the index. Only its owner ends rows, so a row that a reader has found stays meanwhile.

mod earlier;

use crate::caller::{Build, Owner, Peer};
use earlier::EARLIER;
use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
};

/// Rows that there are at most.
pub(super) const ROWS: usize = 4_096;
/// The part of them that is common.
const COMMON_ROWS: usize = 64;
/// Builds that have leases at the same time. Others count as one build of their peer.
const BUILDS: usize = 1_024;
/// Rows that one build has at most.
const ROWS_OF_BUILD: usize = 64;
/// A build gets a new row after this many seconds,
const PERIOD_SECS: u32 = 600;
/// or when its newest row has this part of all bytes that may be leased.
const ROW_PART: u64 = 48;
/// There is a new common row when the newest one has this part of them.
const COMMON_ROW_PART: u64 = 16;
/// Bits of the name of a row that say where it is.
const ROW_BITS: u32 = ROWS.trailing_zeros();
/// The first and the last name of an entry without a lease.
pub(super) const NONE: u32 = 0;
/// Words of a set of builds.
const SET_WORDS: usize = BUILDS / 64;
/// The build that all others count as when there are too many peers.
const REST: usize = 0;
/// A peer may have this many times as many builds as there are places left.
const SHARE: usize = 8;

/// How long leases last, in seconds, after the last request of their build. 0 means that there are none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LeaseTimes {
    /// Of a build that says which one it is.
    pub named: u32,
    /// Of requests that do not.
    pub unnamed: u32,
}

/// The rows in which a build leases entries now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lessee {
    /// The newest row of the build.
    own: u32,
    /// The newest common row.
    common: u32,
    build: usize,
}

/// A lease that a build has lost because it had more than its share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Withdrawn {
    /// Whose lease it was. The build is `None` if several builds of the peer had it.
    pub peer: Peer,
    pub build: Option<Build>,
    /// The bytes that can be evicted now, unless they are held.
    pub bytes: u64,
}

/// See the module documentation.
pub(super) struct Leases {
    times: LeaseTimes,
    /// Bytes that may be leased before look-ups of results stop to add to them.
    pub(super) budget: u64,
    rows: Box<[LeaseRow]>,
    book: Mutex<Book>,
    /// Bytes of all leased entries.
    leased: AtomicU64,
}

#[derive(Default)]
struct LeaseRow {
    /// [`NONE`] if there is no such row now.
    name: AtomicU32,
    /// Bytes of the entries that name it,
    bytes: AtomicU64,
    /// and of those among them that are held.
    held: AtomicU64,
}

/// Which builds and rows there are.
struct Book {
    places: HashMap<Owner, usize>,
    builds: Vec<Option<LeasingBuild>>,
    /// How many of its builds each peer has here.
    peers: HashMap<Peer, usize>,
    /// The rows that are free, with the names that they get next. The one that was used last comes last.
    free: VecDeque<u32>,
    free_common: VecDeque<u32>,
    /// The common rows, the newest one last.
    common: VecDeque<CommonRow>,
    /// The build of each row that is not common.
    build_of: Vec<u16>,
}

struct LeasingBuild {
    owner: Owner,
    lasts: u32,
    /// When its last request came.
    active: u32,
    /// Its rows with the times when they began, the newest one last.
    rows: VecDeque<(u32, u32)>,
}

struct CommonRow {
    name: u32,
    since: u32,
    /// The builds that have touched one of its entries, as a set of bits.
    builds: [u64; SET_WORDS],
}

impl Leases {
    pub(super) fn new(times: LeaseTimes, limit: u64) -> Self {
        let first = |row: usize| (1 << ROW_BITS) | row as u32;
        let rest =
            LeasingBuild { owner: Owner::default(), lasts: times.named, active: 0, rows: VecDeque::new() };
        let book = Book {
            places: HashMap::new(),
            builds: vec![Some(rest)],
            peers: HashMap::new(),
            free: (COMMON_ROWS..ROWS).map(first).collect(),
            free_common: (0..COMMON_ROWS).map(first).collect(),
            common: VecDeque::new(),
            build_of: vec![0; ROWS],
        };
        Self {
            times,
            budget: limit / 10 * 9,
            rows: std::iter::repeat_with(LeaseRow::default).take(ROWS).collect(),
            book: Mutex::new(book),
            leased: AtomicU64::new(0),
        }
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        // A panic elsewhere leaves the book intact, because its changes do not panic halfway.
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of all leased entries.
    pub(super) fn leased(&self) -> u64 {
        self.leased.load(Relaxed)
    }

    /// The list of the row with this name, if the row is there: entries that name it are leased.
    pub(super) fn row(&self, name: u32) -> Option<usize> {
        let row = row_of(name);
        (name != NONE && self.rows[row].name.load(Relaxed) == name).then_some(row)
    }

    /// Records a request of a build, whose leases last longer by that. `None` if builds have no leases.
    pub(super) fn enter(&self, owner: Owner, now: u32) -> Option<Lessee> {
        let lasts = if owner.build.is_named() { self.times.named } else { self.times.unnamed };
        if lasts == 0 {
            return None;
        }
        let mut book = self.book();
        let build = book.place_of(owner, lasts);
        let common = self.common_row(&mut book, build, now)?;
        let own = self.own_row(&mut book, build, now).unwrap_or(common);
        Some(Lessee { own, common, build })
    }

    /// The newest row of a build; a new one if it is full or old.
    fn own_row(&self, book: &mut Book, build: usize, now: u32) -> Option<u32> {
        let places_left = book.free.len().saturating_sub(BUILDS - book.places.len());
        let it = book.builds.get_mut(build)?.as_mut()?;
        it.active = it.active.max(now);
        let wants_new = match it.rows.back() {
            None => !book.free.is_empty(),
            Some((name, since)) => {
                let is_full = self.rows[row_of(*name)].bytes.load(Relaxed) > self.budget / ROW_PART;
                let is_old = now.saturating_sub(*since) >= PERIOD_SECS && it.rows.len() < ROWS_OF_BUILD / 2;
                (is_full || is_old) && it.rows.len() < ROWS_OF_BUILD && places_left > 0
            }
        };
        if wants_new && let Some(name) = book.free.pop_front() {
            self.rows[row_of(name)].name.store(name, Relaxed);
            book.build_of[row_of(name)] = build as u16;
            it.rows.push_back((name, now));
        }
        it.rows.back().map(|(name, _)| *name)
    }

    /// The newest common row, which a build joins; a new one if it is full or old.
    fn common_row(&self, book: &mut Book, build: usize, now: u32) -> Option<u32> {
        let wants_next = |row: &CommonRow| {
            let is_full = self.bytes_in(row.name) > self.budget / COMMON_ROW_PART;
            is_full || now.saturating_sub(row.since) >= PERIOD_SECS
        };
        if book.common.back().is_none_or(wants_next)
            && let Some(name) = book.free_common.pop_front()
        {
            self.rows[row_of(name)].name.store(name, Relaxed);
            book.common.push_back(CommonRow { name, since: now, builds: [0; SET_WORDS] });
        }
        let newest = book.common.back_mut()?;
        newest.builds[build / 64] |= 1 << (build % 64);
        Some(newest.name)
    }

    /// The row to which an entry in the row `from` moves when the lessee touches it; `None` if it stays.
    pub(super) fn target(&self, from: u32, lessee: Lessee) -> Option<u32> {
        let Lessee { own, common, build } = lessee;
        if from == own || from == common {
            return None;
        }
        let Some(row) = self.row(from) else { return Some(own) };
        let mut book = self.book();
        let joined = match book.common.iter().find(|row| row.name == from) {
            Some(older) => older.builds,
            None if usize::from(book.build_of[row]) == build => return Some(own),
            None => set_of(book.build_of[row].into()),
        };
        // The lessee may have got its rows a moment ago.
        if let Some(target) = book.common.iter_mut().find(|row| row.name == common) {
            target.builds.iter_mut().zip(joined).for_each(|(set, more)| *set |= more);
        }
        Some(common)
    }

    /// Counts an entry that moved between rows. Either may be gone, or none.
    pub(super) fn moved(&self, from: u32, to: u32, bytes: u64, is_held: bool, unleased_held: &AtomicU64) {
        let held = if is_held { bytes } else { 0 };
        match self.row(from) {
            Some(row) => {
                self.rows[row].bytes.fetch_sub(bytes, Relaxed);
                self.rows[row].held.fetch_sub(held, Relaxed);
                self.leased.fetch_sub(bytes, Relaxed);
            }
            None => _ = unleased_held.fetch_sub(held, Relaxed),
        }
        match self.row(to) {
            Some(row) => {
                self.rows[row].bytes.fetch_add(bytes, Relaxed);
                self.rows[row].held.fetch_add(held, Relaxed);
                self.leased.fetch_add(bytes, Relaxed);
            }
            None => _ = unleased_held.fetch_add(held, Relaxed),
        }
    }

    /// Counts the begin of the first hold of an entry in this row; the answer is false if there is no such row.
    pub(super) fn hold(&self, name: u32, bytes: u64) -> bool {
        let row = self.row(name);
        row.is_some_and(|row| {
            self.rows[row].held.fetch_add(bytes, Relaxed);
            true
        })
    }

    /// Counts the end of the last hold of an entry in this row; the answer is false if there is no such row.
    pub(super) fn release(&self, name: u32, bytes: u64) -> bool {
        let row = self.row(name);
        row.is_some_and(|row| {
            self.rows[row].held.fetch_sub(bytes, Relaxed);
            true
        })
    }

    /// Counts an entry that is removed.
    pub(super) fn removed(&self, name: u32, bytes: u64, is_held: bool, unleased_held: &mut AtomicU64) {
        self.moved(name, NONE, bytes, is_held, unleased_held);
        if is_held {
            *unleased_held.get_mut() -= bytes;
        }
    }

    /// Ends the leases of builds that have been quiet for long enough. Returns the rows that are gone.
    pub(super) fn expire(&mut self, now: u32) -> Vec<EndedRow> {
        let book = self.book.get_mut().unwrap_or_else(PoisonError::into_inner);
        let mut over = Vec::new();
        for place in 0..book.builds.len() {
            let is_over = |build: &LeasingBuild| now >= build.active.saturating_add(build.lasts);
            if book.builds[place].as_ref().is_some_and(is_over) {
                over.extend(book.leave(place));
            }
        }
        let names: Vec<u32> =
            book.common.iter().filter(|row| row.builds == [0; SET_WORDS]).map(|row| row.name).collect();
        book.common.retain(|row| row.builds != [0; SET_WORDS]);
        over.extend(names);
        over.into_iter().map(|name| self.end(name)).collect()
    }

    /// Ends the oldest row of whoever has more than its share, if `wanted` more bytes are leased to the asker and that would be more
    /// than the budget. Shares are equal: those of all peers with leases, and those of the builds of one peer. The peer with the
    /// most is the one, and of its builds the one with the most; if it has nothing of its own, the oldest row that only builds of
    /// this peer share. A newest row stays, and so does what the asker itself has.
    pub(super) fn withdraw_one(
        &mut self,
        wanted: u64,
        asker: Option<Owner>,
    ) -> Option<(Withdrawn, EndedRow)> {
        if self.leased().saturating_add(wanted) <= self.budget {
            return None;
        }
        let book = self.book();
        let mut charges: HashMap<Peer, (u64, u64)> = HashMap::new();
        for build in book.builds.iter().flatten().filter(|build| !build.rows.is_empty()) {
            let (charge, builds) = charges.entry(build.owner.peer).or_default();
            (*charge, *builds) = (*charge + self.bytes_of(build), *builds + 1);
        }
        for row in &book.common {
            if let Some(peer) = book.only_peer(row) {
                charges.entry(peer).or_default().0 += self.bytes_in(row.name);
            }
        }
        if let Some(asker) = asker {
            charges.entry(asker.peer).or_default().0 += wanted;
        }
        let share = self.budget / (charges.len() as u64).max(1);
        let (&peer, &(charge, builds)) = charges.iter().max_by_key(|(_, (charge, _))| *charge)?;
        if charge <= share {
            return None;
        }
        let can_lose = |build: &&LeasingBuild| {
            let is_due = asker
                .is_none_or(|asker| build.owner != asker && self.bytes_of(build) > share / builds.max(1));
            build.owner.peer == peer && build.rows.len() > 1 && is_due
        };
        let losing = book.builds.iter().flatten().filter(can_lose).max_by_key(|build| self.bytes_of(build));
        let (name, build) = match losing {
            Some(build) => (build.rows.front()?.0, Some(build.owner.build)),
            None => {
                let newest = book.common.back().map(|row| row.name);
                let older = book.common.iter().filter(|row| Some(row.name) != newest);
                let oldest = older.filter(|_| asker.is_none_or(|asker| asker.peer != peer));
                (oldest.into_iter().find(|row| book.only_peer(row) == Some(peer))?.name, None)
            }
        };
        let bytes = self.bytes_in(name);
        drop(book);
        Some((Withdrawn { peer, build, bytes }, self.take(name)))
    }

    /// Ends the oldest row of the build that has most, or the oldest common row if no build has any bytes of its own.
    pub(super) fn end_oldest_of_largest(&mut self) -> Option<EndedRow> {
        let book = self.book();
        let with_bytes = book.builds.iter().flatten().filter(|build| self.bytes_of(build) > 0);
        let name = match with_bytes.max_by_key(|build| self.bytes_of(build)) {
            Some(build) => build.rows.front()?.0,
            None => book.common.iter().find(|row| self.bytes_in(row.name) > 0)?.name,
        };
        drop(book);
        Some(self.take(name))
    }

    /// Ends a row that is in the book.
    fn take(&mut self, name: u32) -> EndedRow {
        let book = self.book.get_mut().unwrap_or_else(PoisonError::into_inner);
        book.common.retain(|row| row.name != name);
        for build in book.builds.iter_mut().flatten() {
            build.rows.retain(|(row, _)| *row != name);
        }
        self.end(name)
    }

    fn bytes_in(&self, name: u32) -> u64 {
        self.row(name).map_or(0, |row| self.rows[row].bytes.load(Relaxed))
    }

    fn bytes_of(&self, build: &LeasingBuild) -> u64 {
        build.rows.iter().map(|(name, _)| self.bytes_in(*name)).sum()
    }

    /// Ends a row that is in no list of the book any more.
    fn end(&mut self, name: u32) -> EndedRow {
        let row = row_of(name);
        let it = &mut self.rows[row];
        (*self.leased.get_mut()) -= *it.bytes.get_mut();
        let held = std::mem::take(it.held.get_mut());
        (*it.name.get_mut(), *it.bytes.get_mut()) = (NONE, 0);
        let book = self.book.get_mut().unwrap_or_else(PoisonError::into_inner);
        // The names of one row are used again after a million others.
        let next = name.checked_add(1 << ROW_BITS).unwrap_or((1 << ROW_BITS) | row as u32);
        let free = if row < COMMON_ROWS { &mut book.free_common } else { &mut book.free };
        free.push_back(next);
        EndedRow { row, held }
    }

    /// The builds and rows that there are.
    #[cfg(test)]
    pub(super) fn counts(&self) -> (usize, usize) {
        let book = self.book();
        (book.places.len(), ROWS - book.free.len() - book.free_common.len())
    }

    /// Memory that it takes, in bytes.
    pub(super) fn memory(&self) -> usize {
        let book = self.book();
        let builds = book.builds.capacity() * size_of::<Option<LeasingBuild>>()
            + book.places.capacity() * size_of::<(Owner, usize)>()
            + book.peers.capacity() * size_of::<(Peer, usize)>();
        let rows = ROWS * size_of::<LeaseRow>() + book.build_of.len() * size_of::<u16>();
        let names = (book.free.capacity() + book.free_common.capacity()) * size_of::<u32>();
        builds + rows + names + book.common.capacity() * size_of::<CommonRow>()
    }
}

/// A row that is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct EndedRow {
    /// Which one it was.
    pub(super) row: usize,
    /// The bytes of its entries that are held.
    pub(super) held: u64,
}

impl Book {
    /// The place of a build. If there are too many, the one of all other builds of its peer, or of everybody.
    fn place_of(&mut self, owner: Owner, lasts: u32) -> usize {
        let others = Owner { build: Build::OTHERS, ..owner };
        let known = |book: &Self, owner| book.places.get(&owner).copied();
        if let Some(place) = known(self, owner) {
            return place;
        }
        let (free, own) = (BUILDS - 1 - self.places.len(), self.peers.get(&owner.peer).copied().unwrap_or(0));
        if own < free.saturating_mul(SHARE) {
            return self.add(owner, lasts);
        }
        match known(self, others) {
            Some(place) => place,
            None if free > 0 => self.add(others, lasts),
            None => REST,
        }
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

    /// Forgets a build, which leaves the common rows. Returns the names of its own.
    fn leave(&mut self, place: usize) -> Vec<u32> {
        for row in &mut self.common {
            row.builds[place / 64] &= !(1 << (place % 64));
        }
        let Some(build) = self.builds.get_mut(place) else { return Vec::new() };
        if place == REST {
            let rows = build.as_mut().map(|build| std::mem::take(&mut build.rows));
            return rows.into_iter().flatten().map(|(name, _)| name).collect();
        }
        let Some(build) = build.take() else { return Vec::new() };
        self.places.remove(&build.owner);
        if let Some(count) = self.peers.get_mut(&build.owner.peer) {
            *count -= 1;
            if *count == 0 {
                self.peers.remove(&build.owner.peer);
            }
        }
        build.rows.into_iter().map(|(name, _)| name).collect()
    }

    /// The peer of all builds that have touched entries of a common row, if it is one.
    fn only_peer(&self, row: &CommonRow) -> Option<Peer> {
        let is_in = |place: usize| row.builds[place / 64] & 1 << (place % 64) != 0;
        let builds = self.builds.iter().enumerate().filter(|(place, _)| is_in(*place));
        let owners = builds.filter_map(|(_, build)| Some(build.as_ref()?.owner));
        let mut peers = owners.filter(|owner| *owner != EARLIER).map(|owner| owner.peer);
        let first = peers.next()?;
        peers.all(|peer| peer == first).then_some(first)
    }
}

/// Where the row of this name is.
fn row_of(name: u32) -> usize {
    name as usize % ROWS
}

fn set_of(place: usize) -> [u64; SET_WORDS] {
    let mut set = [0; SET_WORDS];
    set[place / 64] = 1 << (place % 64);
    set
}
