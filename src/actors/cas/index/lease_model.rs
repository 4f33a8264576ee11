//! Leases: a comparison with a naive model that keeps a set of builds for each entry, and the rules about shares and bounds.

use super::{leases::ROWS, *};
use crate::{
    caller::{Build, Owner, Peer},
    instance::InstanceId,
};
use gorego_reapi::digest::DigestFunction;
use proptest::prelude::*;
use std::{
    collections::{HashMap, HashSet},
    net::Ipv4Addr,
};

const LIMIT: u64 = 1_000;
const BUDGET: u64 = 900;
const START: u32 = 1_000_000;
const TIMES: LeaseTimes = LeaseTimes { named: 10_800, unnamed: 900 };

fn file(name: u64) -> FileId {
    let digest = DigestFunction::Sha256.digest(&name.to_le_bytes());
    let key = Key { digest, instance: InstanceId(0), kind: EntryKind::Blob };
    FileId { key, generation: name + 1 }
}

/// A build of a peer. Number 0 is the build without a name.
fn build(peer: u8, number: u64) -> Owner {
    let build = if number == 0 { Build::UNNAMED } else { Build(number + 100) };
    Owner { peer: Peer::V4(Ipv4Addr::new(127, 0, 0, peer)), build }
}

fn lasts(owner: Owner) -> u32 {
    if owner.build.is_named() { TIMES.named } else { TIMES.unnamed }
}

/// Stores an entry, if there is room, and leases it.
fn store(index: &mut Index, file: FileId, bytes: u64, owner: Owner, now: u32) -> Option<Vec<Victim>> {
    index.ease_leases(bytes, None, now);
    let victims = index.reserve(bytes).ok()?.victims;
    index.commit(file, bytes, Stamp::new(1, 1), now);
    let lessee = index.enter(owner, now).unwrap();
    index.lease_key(&file.key, lessee);
    Some(victims)
}

/// Looks an entry up for a build, as FindMissingBlobs does. Returns whether the entry is stored.
fn touch(index: &Index, file: FileId, owner: Owner, now: u32) -> bool {
    let lessee = index.enter(owner, now).unwrap();
    let found = index.note_use(&file.key, now);
    if let Some(found) = found {
        index.lease(found.at, lessee);
    }
    found.is_some()
}

fn is_there(index: &Index, file: FileId) -> bool {
    index.slot_of(&file.key).is_some()
}

#[derive(Debug, Clone)]
enum Op {
    Store { name: u64, bytes: u64, owner: Owner },
    Touch { name: u64, owner: Owner },
    Hold { name: u64 },
    Release { nth: usize },
    Wait { seconds: u32 },
    Expire,
    Ease { wanted: u64, owner: Owner },
    Reserve { bytes: u64 },
    Evict { bytes: u64 },
    Lose { name: u64 },
}

fn op() -> impl Strategy<Value = Op> {
    let name = || 0u64..40;
    let owner = || (1u8..4, 0u64..3).prop_map(|(peer, number)| build(peer, number));
    prop_oneof![
        6 => (name(), 1u64..60, owner()).prop_map(|(name, bytes, owner)| Op::Store { name, bytes, owner }),
        6 => (name(), owner()).prop_map(|(name, owner)| Op::Touch { name, owner }),
        2 => name().prop_map(|name| Op::Hold { name }),
        2 => (0usize..8).prop_map(|nth| Op::Release { nth }),
        2 => (1u32..4_000).prop_map(|seconds| Op::Wait { seconds }),
        1 => Just(Op::Expire),
        1 => (1u64..300, owner()).prop_map(|(wanted, owner)| Op::Ease { wanted, owner }),
        2 => (1u64..400).prop_map(|bytes| Op::Reserve { bytes }),
        1 => (1u64..400).prop_map(|bytes| Op::Evict { bytes }),
        1 => name().prop_map(|name| Op::Lose { name }),
    ]
}

/// The builds that have touched each entry, and the time of their last request.
#[derive(Default)]
struct Model {
    now: u32,
    entries: HashMap<FileId, (u64, HashSet<Owner>)>,
    /// For each entry, the peers of the builds that have touched it, since the peer last had no leases.
    touched: HashMap<FileId, HashSet<Peer>>,
    active: HashMap<Owner, u32>,
    /// Builds that may have lost leases because they had too much. Entries that only they have touched may be evicted.
    withdrawn: HashSet<Owner>,
}

impl Model {
    fn enter(&mut self, owner: Owner) {
        self.forget_quiet();
        self.active.insert(owner, self.now);
    }

    /// Removes the builds that have been quiet for too long, because their leases have ended.
    fn forget_quiet(&mut self) {
        let now = self.now;
        let over: Vec<Owner> = self
            .active
            .iter()
            .filter(|(owner, at)| now >= **at + lasts(**owner))
            .map(|(owner, _)| *owner)
            .collect();
        for owner in over {
            self.active.remove(&owner);
            self.withdrawn.remove(&owner);
            self.entries.values_mut().for_each(|(_, builds)| _ = builds.remove(&owner));
        }
        let active: HashSet<Peer> = self.active.keys().map(|owner| owner.peer).collect();
        self.touched.values_mut().for_each(|peers| peers.retain(|peer| active.contains(peer)));
    }

    /// Records that a build touches a stored entry.
    fn touch(&mut self, file: FileId, owner: Owner) {
        if let Some((_, builds)) = self.entries.get_mut(&file) {
            builds.insert(owner);
            self.touched.entry(file).or_default().insert(owner.peer);
        }
    }

    /// The largest charge of a peer: the bytes of the entries that it has touched, except for those that it shares with another
    /// peer.
    fn most_of(&self, peer: Peer) -> u64 {
        let may_be_charged = |file: &FileId, builds: &HashSet<Owner>| {
            let mut peers = builds.difference(&self.withdrawn).map(|owner| owner.peer);
            let is_shared = peers.next().is_some_and(|first| peers.any(|other| other != first));
            !is_shared && self.touched.get(file).is_some_and(|peers| peers.contains(&peer))
        };
        let charged = self.entries.iter().filter(|(file, (_, builds))| may_be_charged(file, builds));
        charged.map(|(_, (bytes, _))| bytes).sum()
    }

    /// Whether a promise protects the entry.
    fn is_promised(&self, file: &FileId) -> bool {
        self.entries.get(file).is_some_and(|(_, builds)| !builds.is_subset(&self.withdrawn))
    }

    fn gone(&mut self, victims: &[Victim]) -> std::result::Result<(), TestCaseError> {
        self.forget_quiet();
        for victim in victims {
            prop_assert!(!self.is_promised(&victim.file), "{:?} was promised", victim.file.generation);
            self.entries.remove(&victim.file);
        }
        Ok(())
    }

    /// Records that leases were taken from these builds.
    fn lost(
        &mut self,
        withdrawn: &[Withdrawn],
        asker: Option<Owner>,
    ) -> std::result::Result<(), TestCaseError> {
        let peers = self.active.keys().map(|owner| owner.peer).collect::<HashSet<_>>().len() as u64;
        for Withdrawn { peer, build, .. } in withdrawn {
            let of_peer =
                |owner: &Owner| owner.peer == *peer && build.is_none_or(|build| build == owner.build);
            let most = self.most_of(*peer);
            let is_askers = asker.is_some_and(|asker| asker.peer == *peer);
            prop_assert!(is_askers || most > BUDGET / (peers + 1), "{peer} had {most} of {peers} shares");
            prop_assert!(
                asker.is_none_or(|asker| !(of_peer(&asker) && build.is_some())),
                "not from the asker"
            );
            self.withdrawn.extend(self.active.keys().filter(|owner| of_peer(owner)).copied());
        }
        Ok(())
    }
}

proptest! {
    /// No entry that was promised to a build is evicted, whatever other builds do. Only builds with more than their share lose
    /// leases. When all builds are quiet, nothing is leased.
    #[test]
    fn leases_behave_like_their_model(ops in proptest::collection::vec(op(), 1..250)) {
        let mut index = Index::with_leases(LIMIT, TIMES, 0);
        let mut model = Model { now: START, ..Model::default() };
        let (mut holds, mut generation, mut broken) = (Vec::<EntryRef>::new(), 0, 0);
        let mut files: HashMap<u64, FileId> = HashMap::new();
        for op in ops {
            match op {
                Op::Store { name, bytes, owner } => {
                    generation += 1;
                    let new = FileId { generation, ..file(name) };
                    let withdrawn = index.ease_leases(bytes, None, model.now);
                    model.lost(&withdrawn, None)?;
                    let Ok(grant) = index.reserve(bytes) else { continue };
                    model.gone(&grant.victims)?;
                    index.commit(new, bytes, Stamp::new(1, 1), model.now);
                    let stored = index.renew(&new.key, model.now).unwrap();
                    files.insert(name, stored.file);
                    let lessee = index.enter(owner, model.now).unwrap();
                    index.lease(stored.at, lessee);
                    model.enter(owner);
                    model.entries.entry(stored.file).or_insert((bytes, HashSet::new()));
                    model.touch(stored.file, owner);
                }
                Op::Touch { name, owner } => {
                    let Some(known) = files.get(&name) else { continue };
                    let found = touch(&index, *known, owner, model.now);
                    model.enter(owner);
                    prop_assert!(found || !model.entries.contains_key(known));
                    model.touch(*known, owner);
                }
                Op::Hold { name } => {
                    holds.extend(index.hold(&file(name).key, model.now).map(|found| found.at));
                }
                Op::Release { nth } => {
                    if holds.is_empty() { continue }
                    let at = holds.remove(nth % holds.len());
                    if index.release(at) {
                        index.settle(at);
                    }
                }
                Op::Wait { seconds } => model.now += seconds,
                Op::Expire => {
                    index.expire_leases(model.now);
                    model.forget_quiet();
                }
                Op::Ease { wanted, owner } => {
                    let withdrawn = index.ease_leases(wanted, Some(owner), model.now);
                    model.forget_quiet();
                    model.lost(&withdrawn, Some(owner))?;
                }
                Op::Reserve { bytes } => {
                    let before = index.totals().used;
                    match index.reserve(bytes) {
                        Ok(grant) => {
                            model.gone(&grant.victims)?;
                            index.unreserve(bytes);
                        }
                        Err(_) => prop_assert_eq!(index.totals().used, before, "a shortage evicts nothing"),
                    }
                }
                Op::Evict { bytes } => model.gone(&index.evict(bytes, 0, usize::MAX))?,
                Op::Lose { name } => {
                    let Some(found) = index.note_use(&file(name).key, model.now) else { continue };
                    let lost = index.at(found.at).unwrap().file;
                    model.forget_quiet();
                    let was_promised = model.is_promised(&lost);
                    let before = index.tally().broken_promises;
                    index.remove_damaged(found.at);
                    broken += index.tally().broken_promises - before;
                    prop_assert!(!was_promised || index.tally().broken_promises > before);
                    model.entries.remove(&lost);
                }
            }
            let totals = index.totals();
            let promised: u64 = model.entries.iter()
                .filter(|(file, _)| model.is_promised(file))
                .filter(|(_, (_, builds))| builds.iter().any(|owner|
                    !model.withdrawn.contains(owner) && model.now < model.active[owner] + lasts(*owner)))
                .map(|(_, (bytes, _))| bytes).sum();
            prop_assert!(totals.leased >= promised, "{totals:?}, {promised} promised");
            prop_assert!(totals.leased <= totals.pinned && totals.held <= totals.pinned);
            prop_assert!(totals.pinned <= totals.leased + totals.held && totals.pinned <= totals.used);
            prop_assert!(totals.used + totals.reserved <= LIMIT);
            prop_assert_eq!(index.tally().broken_promises, broken, "nothing else breaks a promise");
        }
        index.expire_leases(model.now + TIMES.named);
        let totals = index.totals();
        prop_assert_eq!((totals.leased, totals.pinned), (0, totals.held));
        prop_assert_eq!(index.leases.counts(), (0, 0));
        for at in holds {
            index.release(at);
        }
        prop_assert_eq!(index.totals().pinned, 0);
        index.evict(LIMIT, 0, usize::MAX);
        prop_assert_eq!(index.totals().used, 0);
    }
}

/// A hit at minute 0 is still readable at minute 8, and at the end of a build of 8 hours, whatever others upload meanwhile.
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

/// The rule about shares: a build that takes all it can get loses its own oldest leases, and another build keeps all of its
/// leases.
#[test]
fn who_has_more_than_its_share_loses_its_own_oldest_leases() {
    for (hog, other) in [(build(1, 1), build(2, 1)), (build(1, 1), build(1, 2)), (build(1, 0), build(1, 1))] {
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

/// A result is not served if its leases would exceed nine tenths of the store, unless another build has more than its share.
#[test]
fn a_build_does_not_lose_its_leases_for_results_that_it_asks_for() {
    let mut index = Index::with_leases(LIMIT, TIMES, 0);
    for name in 0..44 {
        store(&mut index, file(name), 20, build(1, 1), START).unwrap();
    }
    assert_eq!(index.ease_leases(40, Some(build(1, 1)), START), []);
    assert!(!index.can_lease(40) && index.can_lease(20));
    let withdrawn = index.ease_leases(40, Some(build(2, 1)), START);
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
        assert_eq!(index.ease_leases(100, asker, START), []);
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
    let withdrawn = index.ease_leases(200, Some(build(2, 1)), START + 3_600);
    assert!(index.can_lease(200) && withdrawn.iter().all(|lost| lost.build.is_none()), "{withdrawn:?}");
    index.evict(LIMIT, 0, usize::MAX);
    assert!(!is_there(&index, file(0)) && is_there(&index, file(39)), "the oldest are lost");
    assert_eq!(index.tally().broken_promises, 0);
}

/// Dead records and files beside the store leave less room for entries. Leases are bounded by that room, so uploads of a build that
/// has filled it go on.
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
    let withdrawn = index.ease_leases(200, Some(build(3, 1)), returned);
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
    assert_eq!(index.evict(100, 0, usize::MAX), []);
    assert_eq!(index.evict_even_leased(100, 0, usize::MAX).len(), 5);
    assert_eq!(index.tally().broken_promises, 5);
    assert!(is_there(&index, file(50)) && is_there(&index, file(0)));
    assert_eq!(index.evict_even_leased(LIMIT, 0, usize::MAX).len(), 16);
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
    let victims = index.evict(LEASED, 0, usize::MAX);
    assert!(victims.iter().all(|victim| victim.file.generation <= LEASED));
}

/// A client that names another build in each request gets a bounded number of rows, and other clients still have leases.
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
