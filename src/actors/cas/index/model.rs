//! Compares the index with a naive model under random operations.

use super::*;
use crate::instance::InstanceId;
use gorego_reapi::digest::DigestFunction;
use proptest::prelude::*;
use std::collections::HashSet;

const LIMIT: u64 = 100;
const NOW: u32 = 1_000_000;

/// Of two files, the one with the greater generation is newer.
fn later(one: &FileId, other: &FileId) -> bool {
    one.generation > other.generation
}

#[derive(Debug, Clone)]
enum Op {
    Store { name: u8, kind: EntryKind, bytes: u64 },
    Renew { name: u8, kind: EntryKind },
    Hold { name: u8, kind: EntryKind },
    Release { nth: usize },
    Lose { name: u8, kind: EntryKind },
    Reserve { bytes: u64 },
    Unreserve { nth: usize },
    Evict { bytes: u64, entries: u64 },
    Repack { name: u8, part: u64 },
    Delete,
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
    ]
}

fn key(name: u8, kind: EntryKind) -> Key {
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

/// Settles a use as the owner of an index does after a look-up.
fn settle(index: &mut Index, found: Option<FoundEntry>) {
    if let Some(found) = found.filter(|found| found.settle_due) {
        index.settle(found.at);
    }
}

proptest! {
    /// Only the oldest entries that are not held are evicted, and only when needed. The totals are right and the limit holds.
    #[test]
    fn the_index_behaves_like_its_model(ops in proptest::collection::vec(op(), 1..200)) {
        let (mut index, mut model) = (Index::new(LIMIT), Model::default());
        let mut holds: Vec<EntryRef> = vec![];
        let mut generation = 0;
        for op in ops {
            match op {
                Op::Store { name, kind, bytes } => {
                    generation += 1;
                    let file = FileId { key: key(name, kind), generation };
                    let expected = model.reserve(bytes);
                    let got = index.reserve(bytes).ok().map(|grant| grant.victims);
                    prop_assert_eq!(&got, &expected);
                    if got.is_none() { continue }
                    let lost = index.commit(file, bytes, Stamp::new(1, 1), NOW);
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
                    let found = index.renew(&key(name, kind), NOW);
                    settle(&mut index, found);
                    let found = found.map(|found| found.file);
                    prop_assert_eq!(found, position.map(|position| model.entries[position].0));
                    if let Some(position) = position { model.use_at(position) }
                }
                Op::Hold { name, kind } => {
                    let position = model.position(&key(name, kind));
                    let found = index.hold(&key(name, kind), NOW);
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
                    let got = index.reserve(bytes).ok().map(|grant| grant.victims);
                    prop_assert_eq!(&got, &expected);
                    if got.is_some() { model.reservations.push(bytes) }
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
                    prop_assert_eq!(index.evict(bytes, entries, usize::MAX), expected);
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

fn store(index: &mut Index, name: u8, bytes: u64) -> FileId {
    let file = FileId { key: key(name, EntryKind::Blob), generation: u64::from(name) + 1 };
    index.reserve(bytes).unwrap();
    assert_eq!(index.commit(file, bytes, Stamp::new(1, 1), NOW), None);
    file
}

/// Stores a blob whose digest follows from a number.
fn store_numbered(index: &mut Index, number: u64, bytes: u64) -> FileId {
    let digest = DigestFunction::Sha256.digest(&number.to_le_bytes());
    let key = Key { digest, instance: InstanceId(0), kind: EntryKind::Blob };
    let file = FileId { key, generation: number + 1 };
    index.reserve(bytes).unwrap();
    assert_eq!(index.commit(file, bytes, Stamp::new(1, 1), NOW), None);
    file
}

proptest! {
    /// The owner settles look-ups late, out of order or never. It must still not evict a held entry, nor a used entry while
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
        let victims = index.evict(evicted, 0, usize::MAX);
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
        prop_assert_eq!(index.evict(LIMIT, 0, usize::MAX).len() + gone.len(), 20);
    }
}

/// Running actions hold their inputs, so nearly all of a small store may be held for hours.
#[test]
fn evictions_look_at_each_held_entry_once() {
    const HELD: u64 = 20_000;
    let mut index = Index::new(HELD + 10);
    let file = |n: u64| {
        let digest = DigestFunction::Sha256.digest(&n.to_le_bytes());
        FileId { key: Key { digest, instance: InstanceId(0), kind: EntryKind::Blob }, generation: n + 1 }
    };
    let store = |index: &mut Index, n| {
        let victims = index.reserve(1).unwrap().victims;
        assert_eq!(index.commit(file(n), 1, Stamp::new(1, 1), NOW), None);
        victims
    };
    let holds: Vec<_> = (0..HELD)
        .map(|n| {
            store(&mut index, n);
            index.hold(&file(n).key, NOW).unwrap().at
        })
        .collect();
    let mut victims = Vec::new();
    for n in HELD..2 * HELD {
        victims.extend(store(&mut index, n));
    }
    assert!(victims.iter().all(|victim| victim.file.generation > HELD));
    assert_eq!(victims.len() as u64, HELD - 10);
    assert!(index.order.looks <= 2 * HELD, "{} looks", index.order.looks);
    // They are evicted in the order in which their holds ended, settled or not, after entries that were used before.
    for (number, at) in holds.into_iter().enumerate() {
        assert!(index.release(at), "it has to return to the list");
        if number % 2 == 0 {
            index.settle(at);
        }
    }
    let victims = index.evict(10, 0, usize::MAX);
    assert!(victims.iter().all(|victim| victim.file.generation > HELD), "they were used last");
    assert_eq!(index.evict(u64::MAX, 0, usize::MAX).len() as u64, HELD);
    assert_eq!(index.totals().used, 0);
}

/// A form is used before its blob, so it is evicted first, although the blob was the newer entry before.
#[test]
fn entries_that_are_used_together_are_evicted_in_the_order_of_their_use() {
    let mut index = Index::new(LIMIT);
    let (form, blob) = (store(&mut index, 0, 1), store(&mut index, 1, 1));
    let notes = [form, blob].map(|file| index.renew(&file.key, NOW).unwrap());
    for found in notes {
        settle(&mut index, Some(found));
    }
    let order: Vec<_> = index.evict(2, 0, usize::MAX).into_iter().map(|victim| victim.file).collect();
    assert_eq!(order, [form, blob]);
}

/// In a long list, a use of an entry that many others have passed is marked, except when the clock of the list has wrapped since.
#[test]
fn a_use_counts_however_many_epochs_ago_the_previous_use_was() {
    for epochs in [15, 16, 1 << 10, 1 << 15, u16::MAX] {
        let count = 2 * EXACT_BELOW as u64;
        let mut index = Index::new(count);
        let files: Vec<_> = (0..count).map(|n| store_numbered(&mut index, n, 1)).collect();
        index.order.pass_epochs(epochs);
        let found = index.renew(&files[0].key, NOW).unwrap();
        assert!(found.settle_due, "{epochs}");
        if epochs % 2 == 0 {
            index.settle(found.at);
        }
        let victims = index.evict(count - 1, 0, usize::MAX);
        assert!(victims.iter().all(|victim| victim.file != files[0]), "{epochs}");
        assert_eq!(index.evict(1, 0, usize::MAX).len(), 1);
    }
}

#[test]
fn a_writer_waits_for_the_deletion_of_what_it_evicted() {
    let mut index = Index::new(LIMIT);
    store(&mut index, 0, 60);
    let grant = index.reserve(50).unwrap();
    assert_eq!(grant.victims.len(), 1);
    assert!(index.bytes_deleted() < grant.after_deletions);
    index.deleted(60);
    assert!(index.bytes_deleted() >= grant.after_deletions);
}

#[test]
fn a_shortage_names_its_numbers_and_evicts_nothing() {
    let mut index = Index::new(LIMIT);
    let held = store(&mut index, 0, 60);
    store(&mut index, 1, 20);
    index.hold(&held.key, NOW).unwrap();
    let shortage = index.reserve(50).unwrap_err();
    assert_eq!(shortage, Shortage { wanted: 50, held: 60, leased: 0, reserved: 0, limit: LIMIT });
    assert_eq!(index.totals().blobs, 2);
}

#[test]
fn recovery_restores_the_order_of_use_and_keeps_the_later_of_two_files() {
    let mut index = Index::new(LIMIT);
    let file = |name, generation| FileId { key: key(name, EntryKind::Blob), generation };
    assert_eq!(index.recover(file(0, 1), 30, 300, &later), None);
    assert_eq!(index.recover(file(1, 2), 30, 100, &later), None);
    assert_eq!(index.recover(file(2, 4), 30, 200, &later), None);
    assert_eq!(index.recover(file(2, 3), 30, 900, &later), Some(Victim { file: file(2, 3), bytes: 30 }));
    index.finish_recovery();
    let order: Vec<_> = index.reserve(LIMIT).unwrap().victims.into_iter().map(|v| v.file).collect();
    assert_eq!(order, [file(1, 2), file(2, 4), file(0, 1)]);
}

/// In a list that is not kept in exact order, a use still protects an entry from the next three quarters of evictions.
#[test]
fn a_used_entry_outlives_three_quarters_of_a_long_list() {
    let count = 4 * EXACT_BELOW as u64;
    let mut index = Index::new(count);
    let file = |n: u64| {
        let digest = DigestFunction::Sha256.digest(&n.to_le_bytes());
        FileId { key: Key { digest, instance: InstanceId(0), kind: EntryKind::Blob }, generation: n + 1 }
    };
    for n in 0..count {
        index.reserve(1).unwrap();
        index.commit(file(n), 1, Stamp::new(1, 1), NOW);
    }
    for used in [0, count / 2, count - count / 4, count - 2] {
        index.renew(&file(used).key, NOW).unwrap();
    }
    let victims = index.reserve(count * 3 / 4 - 4).unwrap().victims;
    for used in [0, count / 2, count - count / 4, count - 2] {
        assert!(victims.iter().all(|victim| victim.file != file(used)), "{used}");
    }
}

#[test]
fn recency_is_written_down_at_most_once_an_hour() {
    let mut index = Index::new(LIMIT);
    let file = store(&mut index, 0, 1);
    let due = |now| index.renew(&file.key, now).unwrap().touch_due;
    assert!(!due(NOW + 60));
    assert!(due(NOW + Index::TOUCH_AFTER_SECS + 1));
    assert!(!due(NOW + Index::TOUCH_AFTER_SECS + 2));
}

#[test]
fn a_large_store_is_trimmed_from_the_high_to_the_low_water_mark() {
    let mut index = Index::new(WATERMARKS_FROM_BYTES);
    let part = WATERMARKS_FROM_BYTES / 100;
    for name in 0..98 {
        store(&mut index, name, part);
    }
    assert!(index.trim(10).is_empty(), "the high-water mark is reached but not passed");
    store(&mut index, 98, part);
    assert_eq!(index.trim(3).len(), 3);
    assert_eq!(index.trim(3).len(), 1);
    assert!(index.trim(3).is_empty());
}

/// Whatever the number of blobs, and thus the load of the hash tables.
#[test]
fn a_sha256_blob_takes_at_most_100_bytes_of_memory() {
    const COUNT: u64 = 1_000_000;
    assert_eq!(size_of::<entry::Hot>() + size_of::<entry::Cold>(), 88);
    let mut index = Index::new(u64::MAX);
    let empty = index.memory() as u64;
    assert!(empty < 1 << 20, "{empty} bytes without blobs");
    let mut worst = 0;
    for generation in 1..=COUNT {
        let digest = DigestFunction::Sha256.digest(&generation.to_le_bytes());
        let key = Key { digest, instance: InstanceId(0), kind: EntryKind::Blob };
        index.recover(FileId { key, generation }, 4_096, NOW, &later);
        if generation >= COUNT / 4 && generation % 8_192 == 0 {
            worst = worst.max(index.memory() as u64 * 100 / generation);
        }
    }
    assert!(worst <= 100 * 100, "{}.{:02} bytes each", worst / 100, worst % 100);
}

/// Long hashes and large sizes lie elsewhere, and everything is found as it was stored.
#[test]
fn any_key_is_found_as_it_was_stored() {
    let sizes = [0, 1, u64::from(u32::MAX), 1 << 32, (1 << 40) - 1, 1 << 40, i64::MAX as u64];
    let mut index = Index::new(1 << 30);
    let mut stored = Vec::new();
    for function in DigestFunction::ALL {
        for size in sizes {
            for kind in EntryKind::ALL {
                let hash = function.digest(&size.to_le_bytes()).hash_hex();
                let digest = Digest::parse(*function, &hash, size as i64).unwrap();
                let instance = InstanceId(u16::MAX - stored.len() as u16);
                let file =
                    FileId { key: Key { digest, instance, kind }, generation: stored.len() as u64 + 1 };
                index.reserve(1).unwrap();
                assert_eq!(index.commit(file, 1, Stamp::UNTRUSTED, NOW), None);
                stored.push(file);
            }
        }
    }
    for file in &stored {
        assert_eq!(index.renew(&file.key, NOW).map(|found| found.file), Some(*file));
        let other = Key { instance: InstanceId(0), ..file.key };
        assert!(index.renew(&other, NOW).is_none());
    }
    let victims = index.evict(u64::MAX, 0, usize::MAX);
    assert_eq!(victims.len(), stored.len());
    assert!(victims.iter().all(|victim| stored.contains(&victim.file)));
    let memory = index.memory();
    for file in stored {
        index.recover(file, 1, NOW, &later);
    }
    assert_eq!(index.memory(), memory, "what was free is used again");
}

/// AC-03: whatever takes a blob, its results go in the same step, and others stay.
#[test]
fn a_result_goes_in_the_same_step_as_its_blob() {
    type Loss = fn(&mut Index, EntryRef);
    let losses: [Loss; 3] = [
        |index, _| _ = index.evict(1, 0, 1),
        |index, at| _ = index.remove_damaged(at),
        |index, _| _ = index.reserve(LIMIT - 4).unwrap(),
    ];
    for lose in losses {
        let mut index = Index::with_leases(LIMIT, LeaseTimes::default(), 1 << 20);
        let blobs = [1, 2, 3].map(|name| store(&mut index, name, 1));
        let [bad, good] = [4, 5].map(|name| {
            let file = FileId { key: key(name, EntryKind::Result), generation: u64::from(name) + 1 };
            index.reserve(1).unwrap();
            index.commit(file, 1, Stamp::new(1, 1), NOW);
            file
        });
        let at = |index: &Index, file: FileId| index.renew(&file.key, NOW).unwrap().at;
        let [bad_at, good_at] = [bad, good].map(|file| at(&index, file));
        let places = blobs.map(|blob| at(&index, blob));
        index.link(bad_at, &places[..2]);
        index.link(good_at, &places[1..]);
        assert_eq!(index.linked(good_at).unwrap().len(), 2);
        for file in [blobs[1], blobs[2], bad, good] {
            let found = index.renew(&file.key, NOW);
            settle(&mut index, found);
        }
        let lost = at(&index, blobs[0]);
        index.slab.hot_mut(lost.slot).clear(entry::USED);
        lose(&mut index, lost);
        assert!(index.renew(&bad.key, NOW).is_none() && index.linked(bad_at).is_none());
        assert_eq!(index.take_followed(), [Victim { file: bad, bytes: 1 }]);
        assert!(index.renew(&good.key, NOW).is_some() && index.linked(good_at).is_some());
        assert_eq!((index.totals().results, index.totals().used), (1, 3));
        assert_eq!((index.tally().followed, index.links.results(good_at.slot)), (1, vec![]));
        index.link(good_at, &places[..1]);
        assert_eq!(index.linked(good_at).unwrap().len(), 2, "a blob that is not stored changes nothing");
        index.remove(good_at);
        assert_eq!(index.link_bytes(), 0);
    }
}

/// HTTP clients refer to an entry by its hash alone.
#[test]
fn an_entry_is_found_without_its_size_and_results_that_differ_only_in_size_are_few() {
    let sized = |size: i64, kind| {
        let hash = key(1, kind).digest.hash_hex();
        let digest = Digest::parse(DigestFunction::Sha256, &hash, size).unwrap();
        Key { digest, ..key(1, kind) }
    };
    let mut index = Index::new(1 << 30);
    let mut crowded_out = 0;
    for size in 1..=20 {
        let file = FileId { key: sized(size, EntryKind::Result), generation: size.unsigned_abs() };
        index.reserve(1).unwrap();
        crowded_out += usize::from(index.commit(file, 1, Stamp::UNTRUSTED, NOW).is_some());
    }
    assert_eq!((index.totals().results as usize, crowded_out), (MAX_ALIKE, 20 - MAX_ALIKE));
    assert_eq!(
        index.find_by_hash(&sized(0, EntryKind::Result)),
        Some(sized(20, EntryKind::Result).digest),
        "the newest one is found"
    );
    assert_eq!(index.find_by_hash(&sized(0, EntryKind::Blob)), None);
    assert_eq!(index.find_by_hash(&Key { instance: InstanceId(1), ..sized(0, EntryKind::Result) }), None);
}
