//! The order of eviction, room, memory and keys of the index.

use super::{
    model::{LIMIT, NOW, key, settle, store, store_numbered},
    room::WATERMARKS_FROM_BYTES,
    *,
};
use crate::instance::InstanceId;
use gorego_reapi::digest::DigestFunction;

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
    // The entries are evicted in the order in which their holds ended, whether that was settled or not, and after
    // entries that were used earlier.
    for (number, at) in holds.into_iter().enumerate() {
        assert!(index.release(at), "it has to return to the list");
        if number % 2 == 0 {
            index.settle(at);
        }
    }
    let victims = index.evict(10, 0, &mut { HoldBudget::UNLIMITED });
    assert!(victims.iter().all(|victim| victim.file.generation > HELD), "they were used last");
    assert_eq!(index.evict(u64::MAX, 0, &mut { HoldBudget::UNLIMITED }).len() as u64, HELD);
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
    let order: Vec<_> =
        index.evict(2, 0, &mut { HoldBudget::UNLIMITED }).into_iter().map(|victim| victim.file).collect();
    assert_eq!(order, [form, blob]);
}

/// In a long list, a use of an entry that many others have passed is marked, except when the clock of the list has
/// wrapped since.
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
        let victims = index.evict(count - 1, 0, &mut { HoldBudget::UNLIMITED });
        assert!(victims.iter().all(|victim| victim.file != files[0]), "{epochs}");
        assert_eq!(index.evict(1, 0, &mut { HoldBudget::UNLIMITED }).len(), 1);
    }
}

/// The bytes on disk never exceed the limit, and no write waits longer than this requires.
#[test]
fn a_writer_waits_until_its_bytes_fit_on_disk_beside_what_is_being_deleted() {
    let mut index = Index::new(LIMIT);
    store(&mut index, 0, 30);
    store(&mut index, 1, 30);
    let is_free = |index: &Index, grant: &Grant| index.bytes_deleted() >= grant.after_deletions;
    let first = index.reserve(70).unwrap();
    assert_eq!(first.victims.len(), 1);
    assert!(!is_free(&index, &first));
    let second = index.reserve(20).unwrap();
    index.deleted(30);
    assert!(is_free(&index, &first) && !is_free(&index, &second), "each waits for its part");
    index.deleted(30);
    assert!(is_free(&index, &second));
    index.unreserve(90);
    let third = index.reserve(50).unwrap();
    assert!(third.victims.is_empty() && is_free(&index, &third));
}

/// While a large write into a full store waits for its deletions, it takes no room from small writes.
#[test]
fn a_large_write_waits_for_deletions_while_small_ones_do_not() {
    let mut index = Index::new(WATERMARKS_FROM_BYTES);
    let part = WATERMARKS_FROM_BYTES / 200;
    for number in 0..199 {
        store_numbered(&mut index, number, part);
    }
    let trimmed = index.trim(&mut { HoldBudget::UNLIMITED });
    let bytes: u64 = trimmed.iter().map(|victim| victim.bytes).sum();
    index.deleted(bytes / 9);
    let large = index.reserve_beside(part, true).unwrap();
    assert!(index.bytes_deleted() < large.after_deletions);
    let small = index.reserve_beside(part, false).unwrap();
    assert!(index.bytes_deleted() >= small.after_deletions, "although it came later");
    index.deleted(bytes - bytes / 9);
    assert!(index.bytes_deleted() >= large.after_deletions);
}

#[test]
fn a_shortage_names_its_numbers_and_evicts_nothing() {
    let mut index = Index::new(LIMIT);
    let held = store(&mut index, 0, 60);
    store(&mut index, 1, 20);
    index.hold(&held.key, NOW).unwrap();
    let shortage = index.reserve(50).unwrap_err();
    assert_eq!(
        shortage,
        Shortage { wanted: 50, held: 60, leased: 0, reserved: 0, overhead: 0, limit: LIMIT, most: LIMIT }
    );
    assert_eq!(index.totals().blobs, 2);
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
    assert!(index.trim(&mut HoldBudget::new(10)).is_empty(), "the high-water mark is reached but not passed");
    store(&mut index, 98, part);
    assert_eq!(index.trim(&mut HoldBudget::new(3)).len(), 3);
    assert_eq!(index.trim(&mut HoldBudget::new(3)).len(), 1);
    assert!(index.trim(&mut HoldBudget::new(3)).is_empty());
}

/// This holds for any number of blobs, and thus for any load of the hash tables.
#[test]
fn a_sha256_blob_takes_at_most_100_bytes_of_memory() {
    const COUNT: u64 = 1_000_000;
    assert_eq!(size_of::<entry::Hot>() + size_of::<entry::Cold>(), 88);
    let mut index = Index::new(u64::MAX);
    let empty = index.memory() as u64;
    assert!(empty < 1 << 20, "{empty} bytes without blobs");
    let mut worst = 0;
    for count in 1..=COUNT {
        store_numbered(&mut index, count, 4_096);
        if count >= COUNT / 4 && count % 8_192 == 0 {
            worst = worst.max(index.memory() as u64 * 100 / count);
        }
    }
    assert!(worst <= 100 * 100, "{}.{:02} bytes each", worst / 100, worst % 100);
}

/// Long hashes and large sizes are kept in key tails. Every entry is found as it was stored.
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
    let victims = index.evict(u64::MAX, 0, &mut { HoldBudget::UNLIMITED });
    assert_eq!(victims.len(), stored.len());
    assert!(victims.iter().all(|victim| stored.contains(&victim.file)));
    let memory = index.memory();
    for file in stored {
        index.reserve(1).unwrap();
        index.commit(file, 1, Stamp::UNTRUSTED, NOW);
    }
    assert_eq!(index.memory(), memory, "what was free is used again");
}

/// AC-03: when a blob is removed for any reason, its results are removed in the same step, and other results stay.
#[test]
fn a_result_goes_in_the_same_step_as_its_blob() {
    type Loss = fn(&mut Index, EntryRef);
    let losses: [Loss; 3] = [
        |index, _| _ = index.evict(1, 0, &mut HoldBudget::new(1)),
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

/// Any number of results may need one blob, and look-ups wait while the index is changed.
#[test]
fn the_results_of_an_evicted_blob_are_removed_in_parts_and_before_it() {
    let mut index = Index::with_leases(1 << 30, LeaseTimes::default(), 1 << 20);
    let blob = store(&mut index, 0, 1);
    let blob_at = index.renew(&blob.key, NOW).unwrap().at;
    for name in 1..=100 {
        let file = FileId { key: key(name, EntryKind::Result), generation: name.into() };
        index.reserve(1).unwrap();
        index.commit(file, 1, Stamp::new(1, 1), NOW);
        let at = index.renew(&file.key, NOW).unwrap().at;
        index.link(at, &[blob_at]);
    }
    index.slab.hot_mut(blob_at.slot).clear(entry::USED);
    let (mut parts, mut followed) = (0, 0);
    loop {
        let mut budget = HoldBudget::new(10);
        let victims = index.evict(1, 0, &mut budget);
        let results = index.take_followed().len();
        assert!(results <= 10, "{results} results at once");
        (parts, followed) = (parts + 1, followed + results);
        if !victims.is_empty() {
            assert_eq!(victims[0].file, blob);
            break;
        }
        assert!(budget.is_used_up() && index.renew(&blob.key, NOW).is_some());
        index.slab.hot_mut(blob_at.slot).clear(entry::USED);
    }
    assert_eq!((parts, followed, index.totals().used), (10, 100, 0));
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
