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
    Lease { name: u8, kind: EntryKind },
    Release { nth: usize },
    Lose { name: u8, kind: EntryKind },
    Hold { bytes: u64 },
    LetGo { nth: usize },
    Evict { bytes: u64, entries: u64 },
    Delete,
}

fn op() -> impl Strategy<Value = Op> {
    let kind =
        || prop_oneof![3 => Just(EntryKind::Blob), 1 => Just(EntryKind::Result), 1 => Just(EntryKind::Zstd)];
    let name = || 0u8..12;
    prop_oneof![
        6 => (name(), kind(), 1u64..40).prop_map(|(name, kind, bytes)| Op::Store { name, kind, bytes }),
        3 => (name(), kind()).prop_map(|(name, kind)| Op::Renew { name, kind }),
        3 => (name(), kind()).prop_map(|(name, kind)| Op::Lease { name, kind }),
        3 => (0usize..8).prop_map(|nth| Op::Release { nth }),
        1 => (name(), kind()).prop_map(|(name, kind)| Op::Lose { name, kind }),
        1 => (1u64..30).prop_map(|bytes| Op::Hold { bytes }),
        1 => (0usize..8).prop_map(|nth| Op::LetGo { nth }),
        1 => (0u64..60, 0u64..3).prop_map(|(bytes, entries)| Op::Evict { bytes, entries }),
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
    held: Vec<u64>,
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
    fn leased(&self) -> u64 {
        self.entries.iter().filter(|(.., leases)| *leases > 0).map(|(_, bytes, _)| bytes).sum()
    }
    fn reserved(&self) -> u64 {
        self.held.iter().sum()
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
        if wanted + self.leased() + self.reserved() > LIMIT {
            return None;
        }
        let mut victims = vec![];
        while self.used() + self.reserved() + wanted > LIMIT {
            let oldest = self.entries.iter().position(|(.., leases)| *leases == 0)?;
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
    /// Only the oldest unleased entries are evicted, and only when needed. The totals are right and the limit holds.
    #[test]
    fn the_index_behaves_like_its_model(ops in proptest::collection::vec(op(), 1..200)) {
        let (mut index, mut model) = (Index::new(LIMIT), Model::default());
        let mut leases: Vec<EntryRef> = vec![];
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
                Op::Lease { name, kind } => {
                    let position = model.position(&key(name, kind));
                    let found = index.lease(&key(name, kind), NOW);
                    settle(&mut index, found);
                    prop_assert_eq!(found.is_some(), position.is_some());
                    if let (Some(found), Some(position)) = (found, position) {
                        leases.push(found.at);
                        model.entries[position].2 += 1;
                        model.use_at(position);
                    }
                }
                Op::Release { nth } => {
                    if leases.is_empty() { continue }
                    let at = leases.remove(nth % leases.len());
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
                        .map(|slot| EntryRef { slot, generation: index.entries[slot as usize].generation });
                    let lost = at.and_then(|at| index.remove_damaged(at));
                    model.tally.damaged += u64::from(lost.is_some());
                    prop_assert_eq!(lost, position.map(|position| model.remove(position)));
                }
                Op::Hold { bytes } => {
                    let expected = model.reserve(bytes);
                    let got = index.reserve(bytes).ok().map(|grant| grant.victims);
                    prop_assert_eq!(&got, &expected);
                    if got.is_some() { model.held.push(bytes) }
                }
                Op::LetGo { nth } => {
                    if model.held.is_empty() { continue }
                    let nth = nth % model.held.len();
                    index.unreserve(model.held.remove(nth));
                }
                Op::Evict { bytes, entries } => {
                    let (mut expected, mut evicted) = (vec![], 0);
                    while evicted < bytes || (expected.len() as u64) < entries {
                        let oldest = model.entries.iter().position(|(.., leases)| *leases == 0);
                        let Some(oldest) = oldest else { break };
                        expected.push(model.evict(oldest));
                        evicted += expected[expected.len() - 1].bytes;
                    }
                    prop_assert_eq!(index.evict(bytes, entries, usize::MAX), expected);
                }
                Op::Delete => {
                    index.deleted(model.undeleted);
                    model.undeleted = 0;
                }
            }
            let totals = index.totals();
            let count = |kind| model.entries.iter().filter(|(file, ..)| file.key.kind == kind).count() as u64;
            prop_assert_eq!(totals, Totals {
                blobs: count(EntryKind::Blob),
                results: count(EntryKind::Result),
                zstd_forms: count(EntryKind::Zstd),
                used: model.used(),
                leased: model.leased(),
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

proptest! {
    /// The owner settles look-ups late, out of order or never. It must still not evict a leased entry, nor a used entry while
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
        let (mut used, mut leases, mut notes) = (HashSet::new(), vec![], vec![]);
        for (name, what) in touches {
            let key = key(name, EntryKind::Blob);
            match what {
                0 | 1 => {
                    let found = index.renew(&key, NOW).unwrap();
                    used.insert(key);
                    if what == 0 { notes.push(found.at) }
                }
                2 => leases.push((key, index.lease(&key, NOW).unwrap().at)),
                _ => if let Some(at) = notes.pop() { index.settle(at) },
            }
        }
        let victims = index.evict(evicted, 0, usize::MAX);
        let gone: HashSet<Key> = victims.iter().map(|victim| victim.file.key).collect();
        for (key, _) in &leases {
            prop_assert!(!gone.contains(key), "it was leased");
            used.insert(*key);
        }
        let unused = (0..20).map(|name| key(name, EntryKind::Blob)).filter(|key| !used.contains(key));
        let kept_unused = unused.filter(|unused| !gone.contains(unused)).count();
        prop_assert!(kept_unused == 0 || gone.is_disjoint(&used), "{gone:?}");
        for (_, at) in leases {
            index.release(at);
        }
        prop_assert_eq!(index.totals().leased, 0);
        prop_assert_eq!(index.evict(LIMIT, 0, usize::MAX).len() + gone.len(), 20);
    }
}

/// Running actions hold leases, so nearly all of a small store may be leased for hours.
#[test]
fn evictions_look_at_each_leased_entry_once() {
    const LEASED: u64 = 20_000;
    let mut index = Index::new(LEASED + 10);
    let file = |n: u64| {
        let digest = DigestFunction::Sha256.digest(&n.to_le_bytes());
        FileId { key: Key { digest, instance: InstanceId(0), kind: EntryKind::Blob }, generation: n + 1 }
    };
    let store = |index: &mut Index, n| {
        let victims = index.reserve(1).unwrap().victims;
        assert_eq!(index.commit(file(n), 1, Stamp::new(1, 1), NOW), None);
        victims
    };
    let leases: Vec<_> = (0..LEASED)
        .map(|n| {
            store(&mut index, n);
            index.lease(&file(n).key, NOW).unwrap().at
        })
        .collect();
    let mut victims = Vec::new();
    for n in LEASED..2 * LEASED {
        victims.extend(store(&mut index, n));
    }
    assert!(victims.iter().all(|victim| victim.file.generation > LEASED));
    assert_eq!(victims.len() as u64, LEASED - 10);
    assert!(index.looks <= 2 * LEASED, "{} looks", index.looks);
    // They are evicted in the order in which their leases ended, settled or not, after entries that were used before.
    for (number, at) in leases.into_iter().enumerate() {
        assert!(index.release(at), "it has to return to the list");
        if number % 2 == 0 {
            index.settle(at);
        }
    }
    let victims = index.evict(10, 0, usize::MAX);
    assert!(victims.iter().all(|victim| victim.file.generation > LEASED), "they were used last");
    assert_eq!(index.evict(u64::MAX, 0, usize::MAX).len() as u64, LEASED);
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

/// The counter of list moves may wrap any number of times between two uses.
#[test]
fn a_use_counts_however_long_ago_the_previous_use_was() {
    let mut index = Index::new(LIMIT);
    for (number, links) in [0, 1, 1 << 30, 1 << 31, (1 << 31) + 1, u32::MAX - 1, 1].into_iter().enumerate() {
        let first = 4 * number as u8;
        let files = [first, first + 1, first + 2].map(|name| store(&mut index, name, 1));
        index.links = index.links.wrapping_add(links);
        let found = index.renew(&files[0].key, NOW).unwrap();
        assert!(found.settle_due);
        if number % 2 == 0 {
            index.settle(found.at);
        }
        let victims = index.evict(2, 0, usize::MAX);
        assert_eq!(victims.iter().map(|victim| victim.file).collect::<Vec<_>>(), files[1..], "{links}");
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
    let leased = store(&mut index, 0, 60);
    store(&mut index, 1, 20);
    index.lease(&leased.key, NOW).unwrap();
    let shortage = index.reserve(50).unwrap_err();
    assert_eq!(shortage, Shortage { wanted: 50, leased: 60, reserved: 0, limit: LIMIT });
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

#[test]
fn blobs_take_less_than_200_bytes_of_memory_each() {
    let mut index = Index::new(u64::MAX);
    for generation in 1..=100_000u64 {
        let digest = DigestFunction::Sha256.digest(&generation.to_le_bytes());
        let key = Key { digest, instance: InstanceId(0), kind: EntryKind::Blob };
        index.recover(FileId { key, generation }, 4_096, NOW, &later);
    }
    assert!(index.memory() < 200 * 100_000, "{} bytes each", index.memory() / 100_000);
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
