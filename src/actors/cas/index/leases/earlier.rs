//! Leases that were granted before the start of the server.
//!
//! Leases are kept in memory, but the last use of each entry is on disk, to within an hour. So at the start, the
//! entries that were used within the time that leases last, and within the hour before that, are leased to one build
//! that sends no requests ([`EARLIER`]). Like any other build, it loses its oldest leases first if it has more than its
//! share, and all of them when it was quiet for long enough.
//!
//! When a build of this run touches such an entry, the entry moves to a common row, as always. This row is charged to
//! the peer of the build, because the earlier build may well be the same one.

use super::{LeaseRow, Leases, NONE, ROWS_OF_BUILD, row_of};
use crate::{
    actors::cas::index::{EntryKind, Index, entry::with_lease},
    caller::{Build, Owner, Peer},
};
use std::sync::PoisonError;

/// The build of all leases that were granted before the start.
pub(super) const EARLIER: Owner = Owner { peer: Peer::Unknown, build: Build::BEFORE_START };
/// The number of rows that these leases are spread over, by their age.
const EARLIER_ROWS: u32 = 32;
/// A row with more than this fraction of the budget is followed by another one, whatever its age. Otherwise the leases
/// of a short burst would be one row, which could only be withdrawn as a whole. All rows together are fewer than
/// [`ROWS_OF_BUILD`].
const EARLIER_ROW_PART: u64 = 24;

impl Leases {
    fn is_full_earlier_row(&self, name: u32) -> bool {
        self.bytes_in(name) > self.budget / EARLIER_ROW_PART
    }

    /// Adds a row for earlier leases that is older than the rows added so far. `None` if no row is left.
    fn add_earlier_row(&mut self, now: u32) -> Option<u32> {
        let book = self.book.get_mut().unwrap_or_else(PoisonError::into_inner);
        let place = book.place_of(EARLIER, self.times.named, now);
        let build = book.builds.get_mut(place)?.as_mut()?;
        if build.rows.len() >= ROWS_OF_BUILD {
            return None;
        }
        let name = book.free.pop_front()?;
        build.active = now;
        build.rows.push_front((name, now));
        book.build_of[row_of(name)] = place as u16;
        self.rows[row_of(name)] = LeaseRow { name: name.into(), ..LeaseRow::default() };
        Some(name)
    }
}

impl Index {
    /// Leases the entries that were used shortly before the start, as far as the budget of leases allows. `by_use`
    /// contains the last recorded use and the slot of every entry, the oldest first. `now` is in seconds since 1970,
    /// and `uptime` is the clock of leases.
    pub(in super::super) fn lease_earlier(&mut self, by_use: &[(u32, u32)], now: u32, uptime: u32) {
        if self.leases.times.named == 0 {
            return;
        }
        let window = self.leases.times.named.saturating_add(Self::TOUCH_AFTER_SECS);
        let period = (window / EARLIER_ROWS).max(1);
        let (mut row, mut left) = (None, self.leases.budget);
        for &(touched, slot) in by_use.iter().rev() {
            // A recorded use may be in the future if the clock was set back.
            let age = now.saturating_sub(touched);
            if age > window {
                break;
            }
            if self.slab.hot(slot).kind() == EntryKind::Zstd {
                continue;
            }
            let bytes = self.slab.cold(slot).bytes;
            let Some(rest) = left.checked_sub(bytes) else { break };
            left = rest;
            let name = match row {
                Some((of, name)) if of == age / period && !self.leases.is_full_earlier_row(name) => name,
                _ => {
                    let Some(name) = self.leases.add_earlier_row(uptime) else { break };
                    row = Some((age / period, name));
                    name
                }
            };
            let pin = self.slab.hot_mut(slot).pin.get_mut();
            *pin = with_lease(*pin, name);
            self.leases.moved(NONE, name, bytes, false, &self.unleased_held);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        actors::cas::index::{
            FileId, HoldBudget, Key, LeaseTimes, Recovered, Recovery, Stamp, lease_model::ease_all,
            recovery::tests::in_turn,
        },
        instance::InstanceId,
    };
    use gorego_reapi::digest::DigestFunction;
    use proptest::prelude::*;
    use std::{collections::HashMap, net::Ipv4Addr};

    const LIMIT: u64 = 1_000;
    const TIMES: LeaseTimes = LeaseTimes { named: 10_800, unnamed: 900 };
    const START: u32 = 1_000_000;

    fn file(name: u64) -> FileId {
        let digest = DigestFunction::Sha256.digest(&name.to_le_bytes());
        FileId { key: Key { digest, instance: InstanceId(0), kind: EntryKind::Blob }, generation: name + 1 }
    }

    fn build(peer: u8) -> Owner {
        Owner { peer: Peer::V4(Ipv4Addr::new(127, 0, 0, peer)), build: Build(100) }
    }

    fn is_there(index: &Index, name: u64) -> bool {
        index.place_of(&file(name).key).is_some()
    }

    /// Touches an entry for a build. Returns whether that use has to be recorded on disk.
    fn touch(index: &Index, name: u64, owner: Owner, now: u32) -> bool {
        let lessee = index.enter(owner, now).unwrap();
        let found = index.note_use(&file(name).key, now).unwrap();
        index.lease(found.at, lessee);
        found.touch_due
    }

    /// An index that starts with these entries, given their bytes and their last recorded use.
    fn started(recorded: &HashMap<u64, (u64, u32)>, now: u32) -> Index {
        let found = Recovery::new(LIMIT, TIMES, 0);
        let of = |(name, (bytes, touched)): (&u64, &(u64, u32))| Recovered {
            file: file(*name),
            bytes: *bytes,
            touched: *touched,
        };
        found.add(&mut recorded.iter().map(of));
        let (index, losers) = found.finish(&in_turn, &|_, _| true, now, 0);
        assert!(losers.is_empty());
        index
    }

    proptest! {
        /// Entries that a build has touched within the time of its leases are not evicted after a restart, either,
        /// until this time has passed since the start. Entries that were not touched for longer are not leased.
        #[test]
        fn what_was_touched_shortly_before_a_restart_is_leased_after_it(
            touches in proptest::collection::vec((0u64..40, 1u8..4, 0u32..2_000), 1..60),
            pause in 0u32..20_000,
        ) {
            let mut now = START;
            let mut index = Index::with_leases(LIMIT, TIMES, 0);
            let mut recorded: HashMap<u64, (u64, u32)> = HashMap::new();
            let mut touched: HashMap<u64, u32> = HashMap::new();
            for (name, peer, seconds) in touches {
                now += seconds;
                if is_there(&index, name) {
                    if touch(&index, name, build(peer), now) {
                        recorded.get_mut(&name).unwrap().1 = now;
                    }
                } else {
                    index.reserve(20).unwrap();
                    index.commit(file(name), 20, Stamp::new(1, 1), now);
                    recorded.insert(name, (20, now));
                    touch(&index, name, build(peer), now);
                }
                touched.insert(name, now);
            }
            now += pause;
            let mut index = started(&recorded, now);
            let is_promised = |name: &u64| touched[name] + TIMES.named > now;
            index.expire_leases(TIMES.named - 1);
            index.evict(LIMIT, 0, &mut { HoldBudget::UNLIMITED });
            for (name, last) in &touched {
                prop_assert!(!is_promised(name) || is_there(&index, *name), "{name} was promised");
                let is_old = last + TIMES.named + Index::TOUCH_AFTER_SECS < now;
                prop_assert!(!is_old || !is_there(&index, *name), "nothing keeps {name}");
            }
            let totals = index.totals();
            prop_assert_eq!((totals.leased, totals.pinned), (totals.used, totals.used));
            index.expire_leases(TIMES.named);
            index.evict(LIMIT, 0, &mut { HoldBudget::UNLIMITED });
            prop_assert_eq!((index.totals().used, index.totals().leased), (0, 0));
            prop_assert_eq!(index.tally().broken_promises, 0);
        }
    }

    /// If not all entries can be leased, the newest ones are, and never more than the budget allows.
    #[test]
    fn leases_from_before_the_start_stay_within_the_budget() {
        let recorded = (0..50).map(|name| (name, (20, START + name as u32))).collect();
        let index = started(&recorded, START + 100);
        assert_eq!((index.totals().used, index.totals().leased), (1_000, 900));
        let mut index = index;
        index.evict(LIMIT, 0, &mut { HoldBudget::UNLIMITED });
        assert!((0..5).all(|name| !is_there(&index, name)) && (5..50).all(|name| is_there(&index, name)));
    }

    /// The recorded uses are in system time, so a clock that was changed before the restart changes what is leased. The
    /// leases never last longer than usual.
    #[test]
    fn a_clock_that_was_set_back_or_ahead_before_the_start_bounds_leases_all_the_same() {
        const DAYS: u32 = 10 * 86_400;
        let recorded = (0..40).map(|name| (name, (20, START))).collect();
        for (now, leased) in [(START - DAYS, 800), (START, 800), (START + DAYS, 0)] {
            let mut index = started(&recorded, now);
            assert_eq!(index.totals().leased, leased, "{now}");
            index.expire_leases(TIMES.named - 1);
            assert_eq!(index.totals().leased, leased, "{now}");
            index.expire_leases(TIMES.named);
            assert_eq!(index.totals().leased, 0, "{now}");
        }
    }

    /// What was used in one burst before the restart does not keep other builds from uploading for hours.
    #[test]
    fn leases_of_a_burst_before_the_start_give_way_to_uploads() {
        let recorded = (0..50).map(|name| (name, (20, START))).collect();
        let mut index = started(&recorded, START);
        for name in 100..300 {
            ease_all(&mut index, 20, None, 0);
            index.reserve(20).unwrap_or_else(|shortage| panic!("{name}: {shortage:?}"));
            index.commit(file(name), 20, Stamp::new(1, 1), 0);
            touch(&index, name, build(1), 0);
        }
        assert_eq!(index.tally().broken_promises, 0);
    }

    /// A single build that continues after a restart can fill the store, although it touched most entries before the
    /// restart.
    #[test]
    fn a_build_that_goes_on_after_a_restart_finds_room_for_what_it_uploads() {
        let recorded = (0..45).map(|name| (name, (20, START + name as u32))).collect();
        let mut index = started(&recorded, START + 100);
        for name in 0..45 {
            touch(&index, name, build(1), name as u32);
        }
        for name in 100..300 {
            let now = 1_000 + name as u32;
            ease_all(&mut index, 20, None, now);
            index.reserve(20).unwrap_or_else(|shortage| panic!("{name}: {shortage:?}"));
            index.commit(file(name), 20, Stamp::new(1, 1), now);
            touch(&index, name, build(1), now);
        }
        assert_eq!(index.tally().broken_promises, 0);
    }
}
