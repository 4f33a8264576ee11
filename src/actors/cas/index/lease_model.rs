//! Leases, compared with a naive model that keeps a set of builds for each entry.

use super::*;
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

pub(super) const LIMIT: u64 = 1_000;
pub(super) const BUDGET: u64 = 900;
pub(super) const START: u32 = 1_000_000;
pub(super) const TIMES: LeaseTimes = LeaseTimes { named: 10_800, unnamed: 900 };

pub(super) fn file(name: u64) -> FileId {
    let digest = DigestFunction::Sha256.digest(&name.to_le_bytes());
    let key = Key { digest, instance: InstanceId(0), kind: EntryKind::Blob };
    FileId { key, generation: name + 1 }
}

/// A build of a peer. Number 0 is the build without a name.
pub(super) fn build(peer: u8, number: u64) -> Owner {
    let build = if number == 0 { Build::UNNAMED } else { Build(number + 100) };
    Owner { peer: Peer::V4(Ipv4Addr::new(127, 0, 0, peer)), build }
}

fn lasts(owner: Owner) -> u32 {
    if owner.build.is_named() { TIMES.named } else { TIMES.unnamed }
}

/// Looks an entry up for a build, as FindMissingBlobs does. Returns whether the entry is stored.
pub(super) fn touch(index: &Index, file: FileId, owner: Owner, now: u32) -> bool {
    let lessee = index.enter(owner, now).unwrap();
    let found = index.note_use(&file.key, now);
    if let Some(found) = found {
        index.lease(found.at, lessee);
    }
    found.is_some()
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

    /// The largest charge of a peer: the bytes of the entries that it has touched, except for those that it shares with
    /// another peer.
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

/// Takes leases from builds until there is room, or nothing more can be taken.
pub(super) fn ease_all(index: &mut Index, wanted: u64, asker: Option<Owner>, now: u32) -> Vec<Withdrawn> {
    std::iter::from_fn(|| index.ease_leases(wanted, asker, now)).collect()
}

proptest! {
    /// No entry that was promised to a build is evicted, whatever other builds do. Only builds with more than their
    /// share lose leases. When all builds are quiet, nothing is leased.
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
                    let withdrawn = ease_all(&mut index, bytes, None, model.now);
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
                    let withdrawn = ease_all(&mut index, wanted, Some(owner), model.now);
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
                Op::Evict { bytes } => model.gone(&index.evict(bytes, 0, &mut { HoldBudget::UNLIMITED }))?,
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
        index.evict(LIMIT, 0, &mut { HoldBudget::UNLIMITED });
        prop_assert_eq!(index.totals().used, 0);
    }
}
