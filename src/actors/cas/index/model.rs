//! Compares the index with a naive model under random operations.

use super::*;
use crate::instance::InstanceId;
use gorego_reapi::digest::DigestFunction;
use proptest::prelude::*;
use std::collections::HashSet;

pub(super) const LIMIT: u64 = 100;
pub(super) const NOW: u32 = 1_000_000;

#[derive(Debug, Clone)]
enum Op {
    Store {
        name: u8,
        kind: EntryKind,
        bytes: u64,
    },
    Renew {
        name: u8,
        kind: EntryKind,
    },
    Hold {
        name: u8,
        kind: EntryKind,
    },
    Release {
        nth: usize,
    },
    Lose {
        name: u8,
        kind: EntryKind,
    },
    Reserve {
        bytes: u64,
    },
    Unreserve {
        nth: usize,
    },
    Evict {
        bytes: u64,
        entries: u64,
    },
    Repack {
        name: u8,
        part: u64,
    },
    Delete,
    /// The clock of the system is set, forward or back.
    SetClock {
        now: u32,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let kind =
        || prop_oneof![3 => Just(EntryKind::Blob), 1 => Just(EntryKind::Result), 1 => Just(EntryKind::Zstd)];
    let name = || 0u8..12;
    prop_oneof![
        6 => (name(), kind(), 1u64..40).prop_map(|(name, kind, bytes)| Op::Store { name, kind, bytes }),
        3 => (name(), kind()).prop_map(|(name, kind)| Op::Renew { name, kind }),
        3 => (name(), kind()).prop_map(|(name, kind)| Op::Hold { name, kind }),
        3 => (0usize..8).prop_map(|nth| Op::Release { nth }),
        1 => (name(), kind()).prop_map(|(name, kind)| Op::Lose { name, kind }),
        1 => (1u64..30).prop_map(|bytes| Op::Reserve { bytes }),
        1 => (0usize..8).prop_map(|nth| Op::Unreserve { nth }),
        1 => (0u64..60, 0u64..3).prop_map(|(bytes, entries)| Op::Evict { bytes, entries }),
        2 => (name(), 1u64..4).prop_map(|(name, part)| Op::Repack { name, part }),
        2 => Just(Op::Delete),
        1 => any::<u32>().prop_map(|now| Op::SetClock { now }),
    ]
}

pub(super) fn key(name: u8, kind: EntryKind) -> Key {
    Key { digest: DigestFunction::Sha256.digest(&[name]), instance: InstanceId(0), kind }
}

/// The expected state: a vector in the order of use, oldest first.
#[derive(Default)]
struct Model {
    entries: Vec<(FileId, u64, u32)>,
    reservations: Vec<u64>,
    undeleted: u64,
    tally: Tally,
}

impl Model {
    fn position(&self, key: &Key) -> Option<usize> {
        self.entries.iter().position(|(file, ..)| file.key == *key)
    }
    fn used(&self) -> u64 {
        self.entries.iter().map(|(_, bytes, _)| bytes).sum()
    }
    fn held(&self) -> u64 {
        self.entries.iter().filter(|(.., holds)| *holds > 0).map(|(_, bytes, _)| bytes).sum()
    }
    fn reserved(&self) -> u64 {
        self.reservations.iter().sum()
    }
    fn use_at(&mut self, position: usize) {
        let entry = self.entries.remove(position);
        self.entries.push(entry);
    }
    fn remove(&mut self, position: usize) -> Victim {
        let (file, bytes, _) = self.entries.remove(position);
        self.undeleted += bytes;
        Victim { file, bytes }
    }
    fn evict(&mut self, position: usize) -> Victim {
        let victim = self.remove(position);
        self.tally.evicted += 1;
        self.tally.evicted_bytes += victim.bytes;
        victim
    }
    fn reserve(&mut self, wanted: u64) -> Option<Vec<Victim>> {
        if wanted + self.held() + self.reserved() > LIMIT {
            return None;
        }
        let mut victims = vec![];
        while self.used() + self.reserved() + wanted > LIMIT {
            let oldest = self.entries.iter().position(|(.., holds)| *holds == 0)?;
            victims.push(self.evict(oldest));
        }
        Some(victims)
    }
}

/// Settles a use, as the owner of an index does after a look-up.
pub(super) fn settle(index: &mut Index, found: Option<FoundEntry>) {
    if let Some(found) = found.filter(|found| found.settle_due) {
        index.settle(found.at);
    }
}

proptest! {
    /// Only the oldest entries that are not held are evicted, and only when needed. The totals are right and the limit
    /// holds.
    #[test]
    fn the_index_behaves_like_its_model(ops in proptest::collection::vec(op(), 1..200)) {
        let (mut index, mut model) = (Index::new(LIMIT), Model::default());
        let mut holds: Vec<EntryRef> = vec![];
        let (mut generation, mut now) = (0, NOW);
        for op in ops {
            match op {
                Op::Store { name, kind, bytes } => {
                    generation += 1;
                    let file = FileId { key: key(name, kind), generation };
                    let expected = model.reserve(bytes);
                    let got = index.reserve(bytes).ok().map(|grant| grant.victims);
                    prop_assert_eq!(&got, &expected);
                    if got.is_none() { continue }
                    let lost = index.commit(file, bytes, Stamp::new(1, 1), now);
                    let expected = match (model.position(&file.key), kind) {
                        (Some(position), EntryKind::Blob | EntryKind::Zstd) => {
                            model.use_at(position);
                            model.undeleted += bytes;
                            Some(Victim { file, bytes })
                        }
                        (existing, _) => {
                            let old = existing.map(|position| model.remove(position));
                            model.entries.push((file, bytes, 0));
                            old
                        }
                    };
                    prop_assert_eq!(lost, expected);
                }
                Op::Renew { name, kind } => {
                    let position = model.position(&key(name, kind));
                    let found = index.renew(&key(name, kind), now);
                    settle(&mut index, found);
                    let found = found.map(|found| found.file);
                    prop_assert_eq!(found, position.map(|position| model.entries[position].0));
                    if let Some(position) = position { model.use_at(position) }
                }
                Op::Hold { name, kind } => {
                    let position = model.position(&key(name, kind));
                    let found = index.hold(&key(name, kind), now);
                    settle(&mut index, found);
                    prop_assert_eq!(found.is_some(), position.is_some());
                    if let (Some(found), Some(position)) = (found, position) {
                        holds.push(found.at);
                        model.entries[position].2 += 1;
                        model.use_at(position);
                    }
                }
                Op::Release { nth } => {
                    if holds.is_empty() { continue }
                    let at = holds.remove(nth % holds.len());
                    if index.release(at) {
                        index.settle(at);
                    }
                    let found = model.entries.iter().position(|(file, ..)| file.generation == at.generation);
                    if let Some(position) = found {
                        model.entries[position].2 -= 1;
                        if model.entries[position].2 == 0 { model.use_at(position) }
                    }
                }
                Op::Lose { name, kind } => {
                    let position = model.position(&key(name, kind));
                    let at = index.slot_of(&key(name, kind))
                        .map(|slot| EntryRef { slot, generation: index.slab.hot(slot).generation });
                    let lost = at.and_then(|at| index.remove_damaged(at));
                    model.tally.damaged += u64::from(lost.is_some());
                    prop_assert_eq!(lost, position.map(|position| model.remove(position)));
                }
                Op::Reserve { bytes } => {
                    let expected = model.reserve(bytes);
                    let got = index.reserve(bytes).ok();
                    prop_assert_eq!(got.as_ref().map(|grant| &grant.victims), expected.as_ref());
                    let Some(grant) = got else { continue };
                    model.reservations.push(bytes);
                    // The write waits until all reservations fit on the disk.
                    let to_wait = grant.after_deletions.saturating_sub(index.bytes_deleted());
                    let on_disk = model.used() + model.reserved() + model.undeleted - to_wait;
                    prop_assert!(to_wait <= model.undeleted && on_disk <= LIMIT);
                    prop_assert!(to_wait == 0 || on_disk == LIMIT, "and no longer");
                }
                Op::Unreserve { nth } => {
                    if model.reservations.is_empty() { continue }
                    let nth = nth % model.reservations.len();
                    index.unreserve(model.reservations.remove(nth));
                }
                Op::Evict { bytes, entries } => {
                    let (mut expected, mut evicted) = (vec![], 0);
                    while evicted < bytes || (expected.len() as u64) < entries {
                        let oldest = model.entries.iter().position(|(.., holds)| *holds == 0);
                        let Some(oldest) = oldest else { break };
                        expected.push(model.evict(oldest));
                        evicted += expected[expected.len() - 1].bytes;
                    }
                    prop_assert_eq!(index.evict(bytes, entries, &mut { HoldBudget::UNLIMITED }), expected);
                }
                Op::Repack { name, part } => {
                    let Some(position) = model.position(&key(name, EntryKind::Blob)) else { continue };
                    generation += 1;
                    let (file, before, holds) = model.entries[position];
                    let packed = FileId { generation: FileId::packed_generation(generation), ..file };
                    let bytes = before.div_ceil(part);
                    let (old, new) = (Victim { file, bytes: before }, Victim { file: packed, bytes });
                    let is_free = holds == 0;
                    let expected = if is_free { Ok(old) } else { Err(new) };
                    prop_assert_eq!(index.repack(&file, packed.generation, bytes, Stamp::new(2, 2)), expected);
                    let superseded = if is_free { old } else { new };
                    model.undeleted += superseded.bytes;
                    if is_free { model.entries[position] = (packed, bytes, 0) }
                }
                Op::SetClock { now: set } => now = set,
                Op::Delete => {
                    index.deleted(model.undeleted);
                    model.undeleted = 0;
                }
            }
            let totals = index.totals();
            let count = |kind| model.entries.iter().filter(|(file, ..)| file.key.kind == kind).count() as u64;
            let packed = || model.entries.iter().filter(|(file, ..)| file.is_packed());
            prop_assert_eq!(totals, Totals {
                blobs: count(EntryKind::Blob),
                results: count(EntryKind::Result),
                zstd_forms: count(EntryKind::Zstd),
                packed_blobs: packed().count() as u64,
                packed_content: packed().map(|(file, ..)| file.key.digest.size()).sum(),
                packed_used: packed().map(|(_, bytes, _)| bytes).sum(),
                used: model.used(),
                held: model.held(),
                leased: 0,
                pinned: model.held(),
                reserved: model.reserved(),
                deleting: model.undeleted,
                overhead: 0,
                limit: LIMIT,
            });
            prop_assert!(totals.used + totals.reserved <= LIMIT);
            prop_assert_eq!(index.tally(), model.tally);
        }
    }
}

pub(super) fn store(index: &mut Index, name: u8, bytes: u64) -> FileId {
    let file = FileId { key: key(name, EntryKind::Blob), generation: u64::from(name) + 1 };
    index.reserve(bytes).unwrap();
    assert_eq!(index.commit(file, bytes, Stamp::new(1, 1), NOW), None);
    file
}

/// Stores a blob whose digest follows from a number.
pub(super) fn store_numbered(index: &mut Index, number: u64, bytes: u64) -> FileId {
    let digest = DigestFunction::Sha256.digest(&number.to_le_bytes());
    let key = Key { digest, instance: InstanceId(0), kind: EntryKind::Blob };
    let file = FileId { key, generation: number + 1 };
    index.reserve(bytes).unwrap();
    assert_eq!(index.commit(file, bytes, Stamp::new(1, 1), NOW), None);
    file
}

proptest! {
    /// Even if the owner settles look-ups late, out of order or never, it evicts no held entry, and no used entry while
    /// it keeps an unused one.
    #[test]
    fn an_eviction_sees_uses_that_are_not_settled(
        touches in proptest::collection::vec((0u8..20, 0u8..4), 0..60),
        evicted in 1u64..20,
    ) {
        let mut index = Index::new(LIMIT);
        for name in 0..20 {
            store(&mut index, name, 1);
        }
        let (mut used, mut holds, mut notes) = (HashSet::new(), vec![], vec![]);
        for (name, what) in touches {
            let key = key(name, EntryKind::Blob);
            match what {
                0 | 1 => {
                    let found = index.renew(&key, NOW).unwrap();
                    used.insert(key);
                    if what == 0 { notes.push(found.at) }
                }
                2 => holds.push((key, index.hold(&key, NOW).unwrap().at)),
                _ => if let Some(at) = notes.pop() { index.settle(at) },
            }
        }
        let victims = index.evict(evicted, 0, &mut { HoldBudget::UNLIMITED });
        let gone: HashSet<Key> = victims.iter().map(|victim| victim.file.key).collect();
        for (key, _) in &holds {
            prop_assert!(!gone.contains(key), "it was held");
            used.insert(*key);
        }
        let unused = (0..20).map(|name| key(name, EntryKind::Blob)).filter(|key| !used.contains(key));
        let kept_unused = unused.filter(|unused| !gone.contains(unused)).count();
        prop_assert!(kept_unused == 0 || gone.is_disjoint(&used), "{gone:?}");
        for (_, at) in holds {
            index.release(at);
        }
        prop_assert_eq!(index.totals().held, 0);
        prop_assert_eq!(index.evict(LIMIT, 0, &mut { HoldBudget::UNLIMITED }).len() + gone.len(), 20);
    }
}
