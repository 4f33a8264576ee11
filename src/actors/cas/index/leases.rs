//! [`Leases`]: what builds have touched, and until when it stays.
//!
//! A lease is not kept for each blob and build. An entry names one *row* of a table, and is leased as long as the row is there. A
//! row belongs to one build and one period, and counts the bytes of its entries. When the build has been quiet for long enough, its
//! rows end, each in constant time, and so do the leases of all entries that name them. A build that has too much loses its oldest
//! row ([`Leases::withdraw_one`]). Names of rows are never used again, so an entry may keep the name of a row that is gone.
//!
//! An entry that a second build touches moves to a *common* row. Such a row stays until all builds are quiet that were active
//! while it was the newest. If only builds of one peer share its entries, it is charged to this peer, and otherwise to none, so that
//! no peer loses what it shares with another one.
//!
//! A build that returns after its leases are over is another build. Its earlier rows are not charged to it, and end with the next
//! [`Leases::expire`].
//!
//! Bounds: [`ROWS`] rows, of which [`COMMON_ROWS`] are common, and [`BUILDS`] builds: about 300 KiB. Beyond them, builds of a peer
//! count as one, periods get longer, and what the builds of a peer share is charged to none.
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
/// The part of them that is common,
const COMMON_ROWS: usize = 256;
/// and the part of those that is kept for what builds of several peers share.
const COMMON_ROWS_OF_ALL: usize = 64;
/// Builds that have leases at the same time. Others count as one build of their peer.
const BUILDS: usize = 1_024;
/// Rows that one build has at most.
const ROWS_OF_BUILD: usize = 64;
/// A build gets a new row after this many seconds,
const PERIOD_SECS: u32 = 600;
/// or when its newest row has this part of all bytes that may be leased.
const ROW_PART: u64 = 48;
/// There is a new common row when the newest one of its kind has this part of them.
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
    /// The newest common rows that the build has joined: the one of its peer, and the one of several peers. [`NONE`] if there is none.
    common: [u32; 2],
    build: usize,
    peer: Peer,
    now: u32,
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
    /// The common rows by their places, how many there have been,
    common: Vec<Option<CommonRow>>,
    common_begun: u64,
    /// and the place of the newest one of each payer.
    newest_common: HashMap<Payer, usize>,
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

/// The peer that a common row is charged to; `None` if builds of several peers share its entries.
type Payer = Option<Peer>;

struct CommonRow {
    name: u32,
    payer: Payer,
    since: u32,
    /// How many common rows began before it.
    number: u64,
    /// The builds that may have touched one of its entries, as a set of bits.
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
            common: std::iter::repeat_with(|| None).take(COMMON_ROWS).collect(),
            common_begun: 0,
            newest_common: HashMap::new(),
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
        let build = book.place_of(owner, lasts, now);
        let own = self.own_row(&mut book, build, now);
        let payers = [Some(owner.peer), None];
        let common = payers.map(|payer| match own.is_none() || book.newest_common.contains_key(&payer) {
            true => self.join(&mut book, build, payer, now).unwrap_or(NONE),
            false => NONE,
        });
        let own = own.or_else(|| common.into_iter().find(|name| *name != NONE))?;
        Some(Lessee { own, common, build, peer: owner.peer, now })
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

    /// The newest common row with this payer, which a build joins; a new one if it is full or old, or if its builds are all quiet.
    fn join(&self, book: &mut Book, build: usize, payer: Payer, now: u32) -> Option<u32> {
        let newest = book.newest_common.get(&payer).and_then(|place| book.common[*place].as_ref());
        let wants_new = newest.is_none_or(|row| {
            let bytes = self.bytes_in(row.name);
            let is_full = bytes > self.budget / COMMON_ROW_PART;
            let is_old = now.saturating_sub(row.since) >= PERIOD_SECS;
            bytes > 0 && (is_full || is_old || !book.is_any_active(&row.builds, now))
        });
        let kept = if payer.is_some() { COMMON_ROWS_OF_ALL } else { 0 };
        if wants_new
            && book.free_common.len() > kept
            && let Some(name) = book.free_common.pop_front()
        {
            let (place, number) = (row_of(name), book.common_begun);
            self.rows[place].name.store(name, Relaxed);
            book.common[place] = Some(CommonRow { name, payer, since: now, number, builds: [0; SET_WORDS] });
            book.common_begun += 1;
            book.newest_common.insert(payer, place);
        }
        let place = *book.newest_common.get(&payer)?;
        let row = book.common[place].as_mut()?;
        add_to(&mut row.builds, &set_of(build));
        Some(row.name)
    }

    /// The row to which an entry in the row `from` moves when the lessee touches it; `None` if it stays.
    pub(super) fn target(&self, from: u32, lessee: Lessee) -> Option<u32> {
        let Lessee { own, common, build, peer, now } = lessee;
        if from != NONE && (from == own || common.contains(&from)) {
            return None;
        }
        let Some(row) = self.row(from) else { return Some(own) };
        let mut book = self.book();
        let of = usize::from(book.build_of[row]);
        let (payer, joined) = match book.common.get(row) {
            Some(older) => older.as_ref().map(|older| (older.payer, older.builds))?,
            None if of == build => return Some(own),
            None => (book.payer_of(of, peer), set_of(of)),
        };
        if !book.is_any_active(&joined, now) {
            return Some(own);
        }
        let payer = payer.filter(|payer| *payer == peer);
        let target = match self.join(&mut book, build, payer, now) {
            Some(target) => target,
            None => self.join(&mut book, build, None, now)?,
        };
        if let Some(row) = book.common[row_of(target)].as_mut() {
            add_to(&mut row.builds, &joined);
        }
        (target != from).then_some(target)
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
        let is_over = |row: &&CommonRow| row.builds == [0; SET_WORDS];
        over.extend(book.common.iter().flatten().filter(is_over).map(|row| row.name));
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
        for row in book.common.iter().flatten() {
            if let Some(peer) = row.payer {
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
                let newest = book.newest_common.get(&Some(peer)).copied();
                let older = book
                    .common
                    .iter()
                    .flatten()
                    .filter(|row| row.payer == Some(peer) && Some(row_of(row.name)) != newest);
                let older = older.filter(|_| asker.is_none_or(|asker| asker.peer != peer));
                (older.min_by_key(|row| row.number)?.name, None)
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
            None => {
                let rows = book.common.iter().flatten().filter(|row| self.bytes_in(row.name) > 0);
                rows.min_by_key(|row| row.number)?.name
            }
        };
        drop(book);
        Some(self.take(name))
    }

    /// Ends a row that is in the book.
    fn take(&mut self, name: u32) -> EndedRow {
        let book = self.book.get_mut().unwrap_or_else(PoisonError::into_inner);
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

    /// Ends a row that no build has any more.
    fn end(&mut self, name: u32) -> EndedRow {
        let row = row_of(name);
        let it = &mut self.rows[row];
        (*self.leased.get_mut()) -= *it.bytes.get_mut();
        let held = std::mem::take(it.held.get_mut());
        (*it.name.get_mut(), *it.bytes.get_mut()) = (NONE, 0);
        let book = self.book.get_mut().unwrap_or_else(PoisonError::into_inner);
        // The names of one row are used again after a million others.
        let next = name.checked_add(1 << ROW_BITS).unwrap_or((1 << ROW_BITS) | row as u32);
        match book.common.get_mut(row) {
            Some(common) => {
                let ended = common.take();
                let payer = ended.map_or(None, |ended| ended.payer);
                if book.newest_common.get(&payer) == Some(&row) {
                    book.newest_common.remove(&payer);
                }
                book.free_common.push_back(next);
            }
            None => book.free.push_back(next),
        }
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
        let common = book.common.capacity() * size_of::<Option<CommonRow>>()
            + book.newest_common.capacity() * size_of::<(Payer, usize)>();
        builds + rows + names + common
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
    fn place_of(&mut self, owner: Owner, lasts: u32, now: u32) -> usize {
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

    /// The place of a build that is here. One whose leases are over keeps its place until they are ended, but is not found any more.
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

    fn is_any_active(&self, builds: &[u64; SET_WORDS], now: u32) -> bool {
        let mut places = (0..self.builds.len()).filter(|place| builds[place / 64] & 1 << (place % 64) != 0);
        places.any(|place| self.is_active(place, now))
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

    /// Who pays for what the build at this place has touched, once a build of the peer `other` has touched it too. What was leased
    /// before the start may well be the other's own.
    fn payer_of(&self, place: usize, other: Peer) -> Payer {
        let owner = self.builds.get(place).and_then(Option::as_ref)?.owner;
        Some(if owner == EARLIER { other } else { owner.peer })
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

fn add_to(set: &mut [u64; SET_WORDS], more: &[u64; SET_WORDS]) {
    set.iter_mut().zip(more).for_each(|(set, more)| *set |= more);
}
