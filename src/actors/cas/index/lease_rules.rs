//! Tests of the rules of leases: how long they last, the shares of builds and peers, and the bounds.

use super::{
    lease_model::{BUDGET, LIMIT, START, TIMES, build, ease_all, file, touch},
    leases::ROWS,
    *,
};
use crate::caller::{Owner, Peer, PrincipalId};
use gorego_reapi::error::Error;

/// Stores an entry, if there is room, and leases it.
fn store(index: &mut Index, file: FileId, bytes: u64, owner: Owner, now: u32) -> Option<Vec<Victim>> {
    ease_all(index, bytes, None, now);
    let victims = index.reserve(bytes).ok()?.victims;
    index.commit(file, bytes, Stamp::new(1, 1), now);
    let lessee = index.enter(owner, now).unwrap();
    index.lease_key(&file.key, lessee);
    Some(victims)
}

fn is_there(index: &Index, file: FileId) -> bool {
    index.slot_of(&file.key).is_some()
}

/// A hit at minute 0 is still readable at minute 8, and at the end of a build of 8 hours, whatever others upload
/// meanwhile.
#[test]
fn what_a_build_has_touched_stays_while_it_is_active_and_for_a_time_after() {
    let mut index = Index::with_leases(LIMIT, TIMES, 0);
    let (ours, theirs) = (build(1, 1), build(2, 1));
    let (hit, mut now, mut name) = (file(0), START, 1);
    store(&mut index, hit, 10, ours, now).unwrap();
    for minute in 0..8 * 60 {
        now = START + 60 * minute;
        for _ in 0..3 {
            store(&mut index, file(name), 50, theirs, now).unwrap();
            name += 1;
        }
        // The build asks for something else.
        assert!(!touch(&index, file(999_999), ours, now));
        assert!(is_there(&index, hit), "minute {minute}");
    }
    assert_eq!(index.tally().broken_promises, 0);
    let end = now;
    for minute in 1..400 {
        now = end + 60 * minute;
        index.expire_leases(now);
        store(&mut index, file(name), 50, theirs, now).unwrap();
        name += 1;
        let is_over = now >= end + TIMES.named;
        assert!(is_over || is_there(&index, hit), "minute {minute} after the end");
    }
    assert!(!is_there(&index, hit), "nothing keeps it after that");
}

#[test]
fn requests_without_a_build_lease_for_a_shorter_time() {
    let mut index = Index::with_leases(LIMIT, TIMES, 0);
    store(&mut index, file(0), 10, build(1, 0), START).unwrap();
    store(&mut index, file(1), 10, build(1, 1), START).unwrap();
    index.expire_leases(START + TIMES.unnamed - 1);
    assert_eq!(index.totals().leased, 20);
    index.expire_leases(START + TIMES.unnamed);
    assert_eq!(index.totals().leased, 10);
    index.expire_leases(START + TIMES.named);
    assert_eq!(index.totals().leased, 0);
    assert_eq!(Index::new(LIMIT).enter(build(1, 1), START), None);
}

/// The rule about shares: a build that takes all it can get loses its own oldest leases, and another build keeps all of
/// its leases.
#[test]
fn who_has_more_than_its_share_loses_its_own_oldest_leases() {
    // Principals count like addresses.
    let [ci, dev] = ["token:ci", "token:dev"].map(|name| Peer::Principal(PrincipalId::of(name)));
    let of = |peer, build| Owner { peer, build };
    let (named, unnamed) = (build(1, 1).build, build(1, 0).build);
    for (hog, other) in [
        (build(1, 1), build(2, 1)),
        (build(1, 1), build(1, 2)),
        (build(1, 0), build(1, 1)),
        (of(ci, named), of(dev, named)),
        (of(ci, unnamed), of(dev, named)),
        (of(ci, named), of(ci, unnamed)),
        (of(ci, named), build(1, 1)),
        (build(1, 1), of(ci, named)),
    ] {
        let mut index = Index::with_leases(LIMIT, TIMES, 0);
        for name in 0..10 {
            store(&mut index, file(1_000 + name), 20, other, START).unwrap();
        }
        for name in 0..500 {
            store(&mut index, file(name), 20, hog, START).unwrap();
        }
        assert!((0..10).all(|name| is_there(&index, file(1_000 + name))), "{hog:?}");
        assert!(index.tally().withdrawn_leases > 0);
        assert_eq!(index.tally().broken_promises, 0);
        let kept: Vec<u64> = (0..500).filter(|name| is_there(&index, file(*name))).collect();
        assert!(kept.len() > 30, "{}", kept.len());
        assert_eq!(kept, (500 - kept.len() as u64..500).collect::<Vec<_>>(), "the newest are left");
    }
}

/// The lease of an entry moves to another row, but the entry stays in the list of the earlier row. When only the later
/// row ends, the entry can be evicted.
#[test]
fn an_entry_whose_lease_moved_is_evicted_when_its_later_lease_ends() {
    let mut index = Index::with_leases(3_000, TIMES, 0);
    for name in 0..2_000 {
        store(&mut index, file(name), 1, build(2 + (name % 200) as u8, 1), START).unwrap();
    }
    for name in 2_000..2_500 {
        store(&mut index, file(name), 1, build(1, 1), START).unwrap();
    }
    // An eviction puts all leased entries into the lists of their rows.
    index.commit(file(9_999), 1, Stamp::new(1, 1), START);
    let victims = index.reserve(500).unwrap().victims;
    assert_eq!(victims.len(), 1);
    index.unreserve(500);
    // These entries are so recent that the order of use stays as it is. The other builds are over, but their leases
    // have not ended yet.
    for name in 2_000..2_500 {
        assert!(touch(&index, file(name), build(1, 2), START + TIMES.named + 1));
    }
    let is_of_first_peer = |victim: &Victim| (2_000..2_500).any(|name| file(name).key == victim.file.key);
    let victims = index.evict_even_leased(1, 0, &mut { HoldBudget::UNLIMITED });
    assert!(victims.len() == 1 && victims.iter().all(is_of_first_peer), "{victims:?}");
    let Totals { used, leased, .. } = index.totals();
    let unleased = used - leased;
    assert!(unleased > 10);
    let grant = index.reserve(3_000 - used + unleased).unwrap();
    assert_eq!(grant.victims.len() as u64, unleased);
    assert!(grant.victims.iter().all(is_of_first_peer));
    assert_eq!(index.totals().used, leased);
}

/// A result is not served if its leases would exceed nine tenths of the store, unless another build has more than its
/// share.
#[test]
fn a_build_does_not_lose_its_leases_for_results_that_it_asks_for() {
    let mut index = Index::with_leases(LIMIT, TIMES, 0);
    for name in 0..44 {
        store(&mut index, file(name), 20, build(1, 1), START).unwrap();
    }
    assert_eq!(ease_all(&mut index, 40, Some(build(1, 1)), START), []);
    assert!(!index.can_lease(40) && index.can_lease(20));
    let withdrawn = ease_all(&mut index, 40, Some(build(2, 1)), START);
    assert!(index.can_lease(40));
    assert!(
        withdrawn.iter().all(|lost| lost.peer == build(1, 1).peer && lost.build == Some(build(1, 1).build))
    );
}

/// Entries that two builds share stay when the first build has lost its leases or has ended.
#[test]
fn what_builds_share_is_charged_to_none_and_stays_until_the_last_is_quiet() {
    let mut index = Index::with_leases(LIMIT, TIMES, 0);
    let shared = file(5_000);
    store(&mut index, shared, 20, build(1, 1), START).unwrap();
    assert!(touch(&index, shared, build(2, 1), START + 10));
    for name in 0..200 {
        store(&mut index, file(name), 20, build(1, 1), START + 10).unwrap();
    }
    assert!(is_there(&index, shared), "although its first build has lost its oldest leases");
    for minutes in [60, 120, 170, 230] {
        assert!(touch(&index, file(5_000), build(2, 1), START + 60 * minutes));
    }
    let end = START + 60 * 230 + TIMES.named;
    index.expire_leases(end - 1);
    assert_eq!(index.totals().leased, 20);
    index.expire_leases(end);
    assert_eq!(index.totals().leased, 0);
}

/// Builds that are over still have leases. If each has a single large entry, all of them have more than their share,
/// and none has an older lease to lose first.
#[test]
fn builds_that_are_over_make_room_for_later_ones_and_the_first_ones_do_so_first() {
    let of_one_peer = |number: u64| build(1, number + 1);
    let of_many_peers = |number: u64| build(number as u8 + 1, 1);
    for owner in [of_one_peer as fn(u64) -> Owner, of_many_peers] {
        for bytes in [50, 51, 60, 90] {
            let mut index = Index::with_leases(LIMIT, TIMES, 0);
            for name in 0..100 {
                let stored = store(&mut index, file(name), bytes, owner(name), START + name as u32);
                assert!(stored.is_some(), "{name} of {bytes} bytes is refused");
                assert!(is_there(&index, file(name)), "{name}");
            }
            let kept: Vec<u64> = (0..100).filter(|name| is_there(&index, file(*name))).collect();
            assert!(kept.len() as u64 >= BUDGET / bytes, "{kept:?}");
            assert_eq!(kept, (100 - kept.len() as u64..100).collect::<Vec<_>>(), "the last ones are left");
            assert_eq!(index.tally().broken_promises, 0);
        }
    }
}

/// If most entries are shared, no build has more than its share, and none loses leases.
#[test]
fn nobody_loses_leases_within_its_share() {
    let mut index = Index::with_leases(LIMIT, TIMES, 0);
    for name in 0..35 {
        store(&mut index, file(name), 20, build(1, 1), START).unwrap();
        touch(&index, file(name), build(2, 1), START);
    }
    for (name, peer) in [(50, 1), (51, 1), (52, 2), (53, 2)] {
        store(&mut index, file(name), 30, build(peer, 1), START).unwrap();
    }
    assert_eq!(index.totals().leased, 820);
    for asker in [Some(build(3, 1)), None] {
        assert_eq!(ease_all(&mut index, 100, asker, START), []);
    }
    assert!(!index.can_lease(100));
    assert!(index.reserve(300).is_err(), "uploads are refused if even that does not fit");
    // The common rows of a single peer count as its own.
    let mut index = Index::with_leases(LIMIT, TIMES, 0);
    for name in 0..40 {
        let now = START + 60 * name as u32;
        store(&mut index, file(name), 20, build(1, 1), now).unwrap();
        touch(&index, file(name), build(1, 2), now);
    }
    let withdrawn = ease_all(&mut index, 200, Some(build(2, 1)), START + 3_600);
    assert!(index.can_lease(200) && withdrawn.iter().all(|lost| lost.build.is_none()), "{withdrawn:?}");
    index.evict(LIMIT, 0, &mut { HoldBudget::UNLIMITED });
    assert!(!is_there(&index, file(0)) && is_there(&index, file(39)), "the oldest are lost");
    assert_eq!(index.tally().broken_promises, 0);
}

/// Dead records and files beside the store leave less room for entries. Leases are bounded by that room, so uploads of
/// a build that has filled it go on.
#[test]
fn leases_do_not_fill_the_room_that_other_bytes_leave() {
    let mut index = Index::with_leases(LIMIT, TIMES, 0);
    index.set_overhead(400);
    for name in 0..100 {
        let now = START + 60 * name as u32;
        assert!(store(&mut index, file(name), 20, build(1, 1), now).is_some(), "{name}");
        assert!(index.totals().leased <= 560, "nine tenths, and the entry that exceeded them");
    }
    assert!(index.tally().withdrawn_leases > 0 && index.tally().broken_promises == 0);
}

/// The disk may have less room than before, because other programs have filled a part of it.
#[test]
fn a_lower_limit_leaves_less_room_to_leases() {
    let mut index = Index::with_leases(LIMIT, TIMES, 0);
    for name in 0..40 {
        store(&mut index, file(name), 20, build(1, 1), START).unwrap();
    }
    index.set_limit(StoreLimit { bytes: LIMIT / 2, most: LIMIT });
    assert!(!index.can_lease(0));
    ease_all(&mut index, 0, None, START);
    while !index.trim(&mut { HoldBudget::UNLIMITED }).is_empty() {}
    let Totals { used, leased, .. } = index.totals();
    assert!(leased <= LIMIT / 20 * 9 && used <= LIMIT / 2, "{leased} of {used}");
    assert!(is_there(&index, file(39)) && !is_there(&index, file(0)));
    let tally = index.tally();
    assert!(tally.withdrawn_leases > 0 && tally.broken_promises == 0, "{tally:?}");
    let [for_now, for_ever] =
        [LIMIT, LIMIT + 1].map(|wanted| Error::from(index.reserve(wanted).unwrap_err()));
    assert!(matches!(for_now, Error::Exhausted { retry_after: Some(_), .. }), "{for_now}");
    assert!(matches!(for_ever, Error::Exhausted { retry_after: None, .. }), "{for_ever}");
}

/// Expired leases are charged to no build, even before they are ended.
#[test]
fn a_build_is_charged_for_nothing_that_was_leased_before_it_returned() {
    let times = LeaseTimes { named: 60, unnamed: 60 };
    let returned = START + times.named;
    let stored_by = |builds: &[Owner]| {
        let mut index = Index::with_leases(LIMIT, times, 0);
        for name in 0..40 {
            store(&mut index, file(name), 20, build(1, 1), START).unwrap();
            for owner in builds {
                touch(&index, file(name), *owner, START);
            }
        }
        index
    };
    // Its own rows and the common rows of its peer end.
    let mut index = stored_by(&[build(1, 2)]);
    for number in [1, 2] {
        assert!(touch(&index, file(0), build(1, number), returned));
    }
    index.expire_leases(returned);
    assert_eq!(index.totals().leased, 20);
    // A build shares nothing with builds that are quiet.
    let mut index = stored_by(&[]);
    for name in 0..40 {
        assert!(touch(&index, file(name), build(2, 1), returned));
    }
    let withdrawn = ease_all(&mut index, 200, Some(build(3, 1)), returned);
    assert!(index.can_lease(200) && withdrawn.iter().all(|lost| lost.peer == build(2, 1).peer));
}

/// When something else fills the disk, leases of the build that has most are broken as necessary, and this is counted.
#[test]
fn leases_give_way_to_a_full_disk_and_that_breaks_promises() {
    let mut index = Index::with_leases(LIMIT, TIMES, 0);
    for name in 0..20 {
        store(&mut index, file(name), 20, build(1, 1), START).unwrap();
    }
    store(&mut index, file(50), 20, build(2, 1), START).unwrap();
    touch(&index, file(0), build(2, 1), START);
    assert_eq!(index.evict(100, 0, &mut { HoldBudget::UNLIMITED }), []);
    assert_eq!(index.evict_even_leased(100, 0, &mut { HoldBudget::UNLIMITED }).len(), 5);
    assert_eq!(index.tally().broken_promises, 5);
    assert!(is_there(&index, file(50)) && is_there(&index, file(0)));
    assert_eq!(index.evict_even_leased(LIMIT, 0, &mut { HoldBudget::UNLIMITED }).len(), 16);
    assert_eq!((index.totals().used, index.totals().leased), (0, 0));
}

/// Nearly all of a store may be leased for hours.
#[test]
fn evictions_look_at_each_leased_entry_once() {
    const LEASED: u64 = 20_000;
    let mut index = Index::with_leases(2 * LEASED, TIMES, 0);
    for name in 0..LEASED {
        store(&mut index, file(name), 1, build(1, 1), START).unwrap();
    }
    let mut victims = 0;
    for name in LEASED..4 * LEASED {
        victims += index.reserve(1).unwrap().victims.len() as u64;
        index.commit(file(name), 1, Stamp::new(1, 1), START);
    }
    assert_eq!(victims, 2 * LEASED);
    assert!((0..LEASED).all(|name| is_there(&index, file(name))));
    assert!(index.order.looks <= 4 * LEASED, "{} looks", index.order.looks);
    // When the leases have ended, these entries are the least recently used.
    index.expire_leases(START + TIMES.named);
    let victims = index.evict(LEASED, 0, &mut { HoldBudget::UNLIMITED });
    assert!(victims.iter().all(|victim| victim.file.generation <= LEASED));
}

/// Look-ups wait while the index is changed, and nearly all of a large store may be leased.
#[test]
fn an_eviction_looks_at_a_bounded_number_of_leased_entries_at_a_time() {
    const LEASED: u64 = 5_000;
    let mut index = Index::with_leases(2 * LEASED, TIMES, 0);
    for name in 0..LEASED {
        store(&mut index, file(name), 1, build(1, 1), START).unwrap();
    }
    index.reserve(1).unwrap();
    index.commit(file(LEASED), 1, Stamp::new(1, 1), START);
    let mut parts = 0;
    let victims = loop {
        let (looks, mut budget) = (index.order.looks, HoldBudget::new(10));
        let victims = index.evict(1, 0, &mut budget);
        parts += 1;
        assert!(index.order.looks - looks <= 200, "{} looks at once", index.order.looks - looks);
        if !victims.is_empty() || !budget.is_used_up() {
            break victims;
        }
    };
    assert_eq!(victims.iter().map(|victim| victim.file).collect::<Vec<_>>(), [file(LEASED)]);
    assert!(parts > 10, "{parts}");
}

/// A client that names another build in each request gets a bounded number of rows, and other clients still have
/// leases.
#[test]
fn the_memory_of_leases_is_bounded() {
    let mut index = Index::with_leases(1 << 40, TIMES, 0);
    for name in 0..10_000 {
        let now = START + name as u32 / 10;
        store(&mut index, file(name), 1 << 20, build(1, name), now).unwrap();
    }
    let (builds, rows) = index.leases.counts();
    assert!(builds < 1_024 && rows <= ROWS, "{builds} builds, {rows} rows");
    assert_eq!(index.totals().leased, 10_000 << 20, "all of it is leased nevertheless");
    for peer in 2..=255 {
        for number in 1..4 {
            let name = 20_000 + u64::from(peer) * 8 + number;
            store(&mut index, file(name), 1, build(peer, number), START + 1_000).unwrap();
        }
    }
    let (builds, rows) = index.leases.counts();
    assert!(builds < 1_024 && rows <= ROWS, "{builds} builds, {rows} rows");
    assert!(index.leases.memory() + index.order.memory() < 400_000, "{}", index.leases.memory());
    index.expire_leases(START + 1_000 + TIMES.named);
    assert_eq!((index.totals().leased, index.leases.counts()), (0, (0, 0)));
}
