//! [`Leases`]: the entries that builds have touched, and how long they are kept for them.
//!
//! A lease is not kept for each blob and build. An entry names one *row* of a table, and is leased as long as the row
//! is there. A row belongs to one build and one period, and counts the bytes of its entries. When the build has been
//! quiet for long enough, its rows end, each in constant time, and so do the leases of all entries that name them. A
//! build that has too much loses its oldest row, and in the end its only one ([`Leases::withdraw_one`]). A name is not
//! given to another row, so an entry may keep the name of a row that has ended.
//!
//! An entry that a second build touches moves to a *common* row. Such a row stays until all builds are quiet that were
//! active while it was the newest. If only builds of one peer share its entries, it is charged to this peer, and
//! otherwise to none, so that no peer loses what it shares with another one.
//!
//! A build that returns after its leases are over is another build. Its earlier rows are not charged to it, and end
//! with the next [`Leases::expire`]. The build that stands for all builds without a place keeps its rows until then.
//!
//! Bounds: [`ROWS`] rows, of which [`COMMON_ROWS`] are common, and [`BUILDS`] builds: about 300 KiB. Beyond them,
//! builds of a peer count as one, periods get longer, and what the builds of a peer share is charged to none.
//!
//! Readers take leases while they share the index. Only the owner of the index ends rows, so no row ends while a reader
//! uses it.

mod book;
mod earlier;

use crate::caller::{Build, Owner, Peer};
use book::{BUILDS, Book, CommonRow, LeasingBuild, Payer, SET_WORDS, add_to, set_of};
use std::{
    cmp::Reverse,
    collections::HashMap,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
};

/// Maximum number of rows.
pub(super) const ROWS: usize = 4_096;
/// Maximum number of common rows.
const COMMON_ROWS: usize = 256;
/// Number of common rows that are kept for entries that builds of several peers share.
const COMMON_ROWS_OF_ALL: usize = 64;
/// Maximum number of rows of one build.
const ROWS_OF_BUILD: usize = 64;
/// A build gets a new row when its newest row is this many seconds old.
const PERIOD_SECS: u32 = 600;
/// A build also gets a new row when its newest row has more than this fraction of the budget.
const ROW_PART: u64 = 48;
/// The same fraction for common rows.
const COMMON_ROW_PART: u64 = 16;
/// Number of low bits of a row's name that are its position in the table.
const ROW_BITS: u32 = ROWS.trailing_zeros();
/// The name of no row, which entries without a lease have.
pub(super) const NONE: u32 = 0;

/// How long leases last after the last request of their build, in seconds. 0 means that builds get no leases.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LeaseTimes {
    /// For builds with a name (`tool_invocation_id`).
    pub named: u32,
    /// For requests without the name of a build.
    pub unnamed: u32,
}

/// A build and the rows in which it leases entries now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lessee {
    /// The newest row of the build.
    own: u32,
    /// The newest common row of its peer and that of several peers, or [`NONE`]. The build has joined both.
    common: [u32; 2],
    build: usize,
    peer: Peer,
    now: u32,
}

/// A row that a build has lost because it had more than its share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Withdrawn {
    /// The peer that was charged for it.
    pub peer: Peer,
    /// The build. `None` if several builds of the peer shared its entries.
    pub build: Option<Build>,
    /// The bytes that can be evicted now, unless they are held.
    pub bytes: u64,
}

/// The entries that builds have touched, with the end of their leases.
pub(super) struct Leases {
    times: LeaseTimes,
    /// Bytes that may be leased. Look-ups of results do not lease more.
    pub(super) budget: u64,
    rows: Box<[LeaseRow]>,
    book: Mutex<Book>,
    /// Bytes of all leased entries.
    leased: AtomicU64,
}

#[derive(Default)]
struct LeaseRow {
    /// [`NONE`] if no row is here.
    name: AtomicU32,
    /// Bytes of the entries with its name.
    bytes: AtomicU64,
    /// Bytes of those entries that are held.
    held: AtomicU64,
}

/// The leases that a peer is charged for.
#[derive(Default)]
struct LeaseCharge {
    bytes: u64,
    /// The part of `bytes` that is in common rows.
    common: u64,
    /// The number of builds with rows.
    builds: u64,
}

impl LeaseCharge {
    /// The bytes that each build of the peer may lease, if the peer may lease this many.
    fn part_of_build(&self, share: u64) -> u64 {
        share.saturating_sub(self.common) / self.builds.max(1)
    }
}

/// How many of `room` bytes may be leased.
fn budget_of(room: u64) -> u64 {
    room / 10 * 9
}

impl Leases {
    pub(super) fn new(times: LeaseTimes, limit: u64) -> Self {
        Self {
            times,
            budget: budget_of(limit),
            rows: std::iter::repeat_with(LeaseRow::default).take(ROWS).collect(),
            book: Mutex::new(Book::new(times.named)),
            leased: AtomicU64::new(0),
        }
    }

    /// Bounds the leases to nine tenths of the room that the store has for entries now.
    pub(super) fn set_budget(&mut self, room: u64) {
        self.budget = budget_of(room);
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        // A panic elsewhere leaves the book intact, because its changes do not panic halfway.
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of all leased entries.
    pub(super) fn leased(&self) -> u64 {
        self.leased.load(Relaxed)
    }

    /// Returns the position of the row with this name, if it has not ended. Entries with its name are leased.
    pub(super) fn row(&self, name: u32) -> Option<usize> {
        let row = row_of(name);
        (name != NONE && self.rows[row].name.load(Relaxed) == name).then_some(row)
    }

    /// Records a request of a build, which extends its leases. Returns `None` if builds get no leases.
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

    /// Returns the newest row of a build, and begins a new one if that is full or old.
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

    /// Adds a build to the newest common row with this payer, and begins a new row if that is full or old, or if the
    /// leases of all its builds are over. Returns the name of the row, or `None` if there is no row for this payer and
    /// none is free.
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

    /// Returns the row to which an entry in the row `from` moves when the lessee touches it, or `None` if it stays.
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

    /// Counts an entry that moved between rows. Either may have ended or be [`NONE`].
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

    /// Counts the beginning of the first hold of an entry in this row. Returns false if the row has ended.
    pub(super) fn hold(&self, name: u32, bytes: u64) -> bool {
        let row = self.row(name);
        row.is_some_and(|row| {
            self.rows[row].held.fetch_add(bytes, Relaxed);
            true
        })
    }

    /// Counts the end of the last hold of an entry in this row. Returns false if the row has ended.
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

    /// Ends the leases of builds that have been quiet for long enough. Returns the rows that have ended.
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

    /// Ends one row if `wanted` more bytes for the asker would exceed the budget, and if a peer has more than its
    /// share. All peers with leases have equal shares. The builds of a peer have equal parts of what its share leaves
    /// beside the entries that they have in common. The asker's rows stay.
    ///
    /// The peer that is charged with the most bytes loses the oldest row of its build with the most bytes, if this
    /// build has more than its part and other rows. Otherwise the peer loses the oldest row that only its builds share.
    /// If no peer can lose such a row, the build that has been quiet for longest among those with more than their part
    /// loses its only row, because most of these builds are over. The build that was active last keeps it.
    pub(super) fn withdraw_one(
        &mut self,
        wanted: u64,
        asker: Option<Owner>,
    ) -> Option<(Withdrawn, EndedRow)> {
        if self.leased().saturating_add(wanted) <= self.budget {
            return None;
        }
        let book = self.book();
        let mut charges: HashMap<Peer, LeaseCharge> = HashMap::new();
        for build in book.builds.iter().flatten().filter(|build| !build.rows.is_empty()) {
            let charge = charges.entry(build.owner.peer).or_default();
            (charge.bytes, charge.builds) = (charge.bytes + self.bytes_of(build), charge.builds + 1);
        }
        for row in book.common.iter().flatten() {
            if let Some(peer) = row.payer {
                let (charge, bytes) = (charges.entry(peer).or_default(), self.bytes_in(row.name));
                (charge.bytes, charge.common) = (charge.bytes + bytes, charge.common + bytes);
            }
        }
        if let Some(asker) = asker {
            charges.entry(asker.peer).or_default().bytes += wanted;
        }
        let share = self.budget / (charges.len() as u64).max(1);
        charges.retain(|_, charge| charge.bytes > share);
        let has_too_much = |build: &&LeasingBuild| {
            let charge = charges.get(&build.owner.peer);
            charge.is_some_and(|charge| self.bytes_of(build) > charge.part_of_build(share))
                && asker.is_none_or(|asker| build.owner != asker)
        };
        let losers: Vec<&LeasingBuild> = book.builds.iter().flatten().filter(has_too_much).collect();
        let mut peers: Vec<Peer> = charges.keys().copied().collect();
        peers.sort_by_key(|peer| Reverse(charges[peer].bytes));
        let older = peers.iter().find_map(|peer| {
            let with_others = losers.iter().filter(|build| build.owner.peer == *peer && build.rows.len() > 1);
            match with_others.max_by_key(|build| self.bytes_of(build)) {
                Some(build) => Some((build.rows.front()?.0, *peer, Some(build.owner.build))),
                None => book.older_common(*peer, asker).map(|name| (name, *peer, None)),
            }
        });
        let (name, peer, build) = older.or_else(|| {
            let last = book.builds.iter().flatten().map(|build| build.active).max();
            let quiet = losers.iter().filter(|build| !build.rows.is_empty() && Some(build.active) != last);
            let build = quiet.min_by_key(|build| build.active)?;
            Some((build.rows.front()?.0, build.owner.peer, Some(build.owner.build)))
        })?;
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
                let payer = ended.and_then(|ended| ended.payer);
                if book.newest_common.get(&payer) == Some(&row) {
                    book.newest_common.remove(&payer);
                }
                book.free_common.push_back(next);
            }
            None => book.free.push_back(next),
        }
        EndedRow { row, held }
    }

    /// The number of builds and rows.
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

/// A row that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct EndedRow {
    /// Its position in the table.
    pub(super) row: usize,
    /// The bytes of its entries that are held.
    pub(super) held: u64,
}

/// The position of the row with this name.
fn row_of(name: u32) -> usize {
    name as usize % ROWS
}
