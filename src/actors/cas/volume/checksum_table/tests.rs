//! Tests of [`ChecksumTable`] on a real directory.

use super::*;
use crate::{
    actors::cas::index::{EntryKind, Key},
    instance::InstanceId,
};
use gorego_reapi::digest::DigestFunction;
use std::collections::BTreeMap;
use tempfile::TempDir;

/// The file of a blob whose name is a number.
fn file(generation: u64, name: u64) -> FileId {
    let digest = DigestFunction::Sha256.digest(&name.to_le_bytes());
    FileId { key: Key { digest, instance: InstanceId(0), kind: EntryKind::Blob }, generation }
}

/// Checksums of a file with this many blocks.
fn sums(seed: u32, blocks: u32) -> Checksums {
    let size = u64::from(blocks) * super::super::checksums::BLOCK_BYTES as u64 - 1;
    Checksums::new(size, (0..blocks).map(|block| seed.wrapping_mul(31).wrapping_add(block)).collect())
        .unwrap()
}

fn reopen(root: &TempDir, live: impl IntoIterator<Item = u64>) -> ChecksumTable {
    let table = ChecksumTable::open(root.path()).unwrap();
    live.into_iter().for_each(|generation| table.claim(generation));
    table.end_recovery();
    table
}

fn table_files(root: &TempDir) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> =
        fs::read_dir(root.path().join("checksums")).unwrap().map(|entry| entry.unwrap().path()).collect();
    found.sort();
    found
}

#[test]
fn checksums_are_found_until_they_are_removed_also_after_a_restart() {
    let root = TempDir::new().unwrap();
    let mut table = reopen(&root, []);
    for n in 1..=9 {
        table.add(&file(n, n), &sums(n as u32, n as u32)).unwrap();
    }
    table.remove(3);
    let mut live: Vec<u64> = (1..=9).filter(|n| *n != 3).collect();
    for _ in 0..3 {
        for n in 1..=9 {
            let expected = live.contains(&n).then(|| sums(n as u32, n as u32));
            assert_eq!(table.get(&file(n, n)).unwrap(), expected, "{n}");
        }
        assert_eq!(table.get(&file(1, 2)).unwrap(), None, "another blob has the generation of an old one");
        live.retain(|n| *n != 1);
        // This file is gone after a restart, as after a kill between two deletions.
        live.pop();
        drop(table);
        table = reopen(&root, live.clone());
        assert_eq!(table.last_generation(), 9);
        assert_eq!(table_files(&root).len(), 1, "what was begun is continued");
    }
}

/// A damaged record counts as absent. It never yields wrong checksums, and never hides another record.
#[test]
fn any_changed_byte_costs_at_most_one_record() {
    let root = TempDir::new().unwrap();
    let table = reopen(&root, []);
    (1..=3).for_each(|n| table.add(&file(n, n), &sums(n as u32, 3)).unwrap());
    drop(table);
    let path = table_files(&root).remove(0);
    let bytes = fs::read(&path).unwrap();
    for at in HEAD_BYTES..bytes.len() {
        let mut changed = bytes.clone();
        changed[at] ^= 0x10;
        fs::write(&path, &changed).unwrap();
        let table = reopen(&root, 1..=3);
        let found: Vec<_> = (1..=3).map(|n| (n, table.get(&file(n, n)).unwrap())).collect();
        assert!(found.iter().filter(|(_, found)| found.is_none()).count() <= 1, "{at}: {found:?}");
        assert!(
            found.iter().all(|(n, found)| found.as_ref().is_none_or(|found| *found == sums(*n as u32, 3)))
        );
        fs::write(&path, &bytes).unwrap();
    }
    for at in 0..HEAD_BYTES - 8 {
        let mut changed = bytes.clone();
        changed[at] ^= 0x10;
        fs::write(&path, &changed).unwrap();
        let table = reopen(&root, 1..=3);
        assert!((1..=3).all(|n| table.get(&file(n, n)).unwrap().is_none()), "{at}");
        fs::write(&path, &bytes).unwrap();
    }
    // A record that a kill has cut off does not hide the next one.
    for end in 0..bytes.len() {
        fs::write(&path, &bytes[..end]).unwrap();
        let table = reopen(&root, 1..=3);
        table.add(&file(4, 4), &sums(4, 2)).unwrap();
        drop(table);
        let table = reopen(&root, 1..=4);
        assert_eq!(table.get(&file(4, 4)).unwrap(), Some(sums(4, 2)), "cut at {end}");
        drop(table);
        table_files(&root).into_iter().for_each(|path| fs::remove_file(path).unwrap());
    }
}

/// Compares random additions, removals and restarts with a trivial model, and checks that the table files stay small.
#[test]
fn the_table_keeps_what_lives_and_little_else() {
    let root = TempDir::new().unwrap();
    let mut table = reopen(&root, []);
    let mut model: BTreeMap<u64, u32> = BTreeMap::new();
    let (mut random, mut next) = (1u64, 1u64);
    for step in 0..6_000u32 {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let choice = random >> 33;
        if choice % 100 < 52 || model.is_empty() {
            // Blobs of 1 GiB, so that files of the table are soon full.
            let seed = choice as u32;
            table.add(&file(next, next), &sums(seed, 16_384)).unwrap();
            model.insert(next, seed);
            next += 1;
        } else {
            let (&victim, _) = model.range(choice % next..).next().or(model.iter().next()).unwrap();
            model.remove(&victim);
            table.remove(victim);
        }
        while model.len() > 60 {
            let (oldest, _) = model.pop_first().unwrap();
            table.remove(oldest);
        }
        if step % 1_500 == 1_499 {
            drop(table);
            table = reopen(&root, model.keys().copied());
        }
    }
    for (generation, seed) in &model {
        assert_eq!(table.get(&file(*generation, *generation)).unwrap(), Some(sums(*seed, 16_384)));
    }
    let on_disk: u64 = table_files(&root).iter().map(|path| path.metadata().unwrap().len()).sum();
    assert_eq!(table.disk_bytes(), on_disk);
    let live = model.len() as u64 * 65_600;
    assert!(on_disk < 4 * live + 3 * MAX_FILE_BYTES, "{on_disk} bytes for {live} live ones");
}

/// Something else in the place of a table file blocks no call.
#[test]
fn a_table_file_that_was_replaced_or_removed_is_done_without() {
    let root = TempDir::new().unwrap();
    let table = reopen(&root, []);
    table.add(&file(1, 1), &sums(1, 1)).unwrap();
    drop(table);
    let path = table_files(&root).remove(0);
    fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
    let table = reopen(&root, [1]);
    assert_eq!(table.get(&file(1, 1)).unwrap(), None);
    table.add(&file(1, 1), &sums(1, 1)).unwrap();
    assert_eq!(table.get(&file(1, 1)).unwrap(), Some(sums(1, 1)));
    for path in table_files(&root) {
        fs::remove_file(path).unwrap();
    }
    // The file that is being appended to is open.
    assert_eq!(table.get(&file(1, 1)).unwrap(), Some(sums(1, 1)));
    drop(table);
    assert_eq!(reopen(&root, [1]).get(&file(1, 1)).unwrap(), None);
}
