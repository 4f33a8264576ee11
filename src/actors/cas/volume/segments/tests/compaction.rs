//! Compaction: what it moves, what it reclaims, and what a crash in the middle of it leaves.

use super::*;
use crate::actors::cas::volume::{durable::sync_file_system, simulation::SimulatedDisk};
use std::collections::HashSet;

/// Answers which files are stored now.
fn stored_now(store: &Store) -> impl Fn(&[FileId]) -> Vec<bool> + use<> {
    let stored: HashSet<FileId> = store.index.values().map(|written| written.file).collect();
    move |files| files.iter().map(|file| stored.contains(file)).collect()
}

#[test]
fn compaction_moves_what_is_live_and_frees_the_rest() {
    let mut store = Store::new();
    let files: Vec<(Key, Bytes)> = (0..40).map(|seed| blob(4_000, seed)).collect();
    files.iter().for_each(|file| store.write(std::slice::from_ref(file)));
    let before = store.files("segment").len();
    for (key, _) in files.iter().step_by(2) {
        store.delete(key);
    }
    while store.compact() != Compacted::NothingToGain {}
    assert!(store.files("segment").len() < before * 2 / 3, "{before} {:?}", store.files("segment"));
    for restarted in [false, true] {
        if restarted {
            store = store.crash();
        }
        for (at, (key, bytes)) in files.iter().enumerate() {
            match store.read(key) {
                Ok(read) => assert_eq!((at % 2, &read), (1, bytes)),
                Err(error) => assert!(at % 2 == 0 && is_lost(&error), "{at} {error}"),
            }
        }
        store.check_counts();
    }
}

/// A record that is being read stays in place, and so does its segment.
#[test]
fn a_record_that_may_not_move_keeps_its_segment_and_nothing_else_in_it() {
    let mut store = Store::new();
    let files: Vec<(Key, Bytes)> = (0..4).map(|seed| blob(4_000, seed)).collect();
    store.write(&files);
    (10..20).for_each(|seed| store.write(&[blob(4_000, seed)]));
    store.delete(&files[0].0);
    let held = store.index[&files[1].0].file;
    let may_move = stored_now(&store);
    let index = &mut store.index;
    let mut refused = 0;
    store
        .segments
        .compact(&may_move, &mut |moves: Moves| {
            let mut relocate = |(file, generation): (FileId, u64)| {
                if file == held {
                    refused += 1;
                    return false;
                }
                index.get_mut(&file.key).unwrap().file.generation = generation;
                true
            };
            moves.moved.into_iter().map(&mut relocate).collect()
        })
        .unwrap();
    assert_eq!(refused, 1);
    store.check_counts();
    for (key, bytes) in &files[1..] {
        assert_eq!(store.read(key).unwrap(), bytes);
    }
    // The originals of deleted copies do not come back.
    store.delete(&files[2].0);
    let store = store.crash();
    assert!(store.read(&files[2].0).is_err());
    assert_eq!(store.read(&files[1].0).unwrap(), files[1].1);
    assert_eq!(store.read(&files[3].0).unwrap(), files[3].1);
}

/// If a record is deleted while it is copied, neither the record nor the copy comes back.
#[test]
fn a_deletion_during_compaction_holds_after_a_crash_at_any_step() {
    for delete_before in [true, false] {
        let mut store = Store::new();
        let files: Vec<(Key, Bytes)> = (0..4).map(|seed| blob(4_000, seed)).collect();
        store.write(&files);
        (10..20).for_each(|seed| store.write(&[blob(4_000, seed)]));
        store.delete(&files[0].0);
        let victim = store.index[&files[1].0];
        let mut copied = None;
        let (may_move, segments) = (stored_now(&store), &store.segments);
        let _ = segments.compact(&may_move, &mut |moves: Moves| {
            let mut accepted = vec![true; moves.moved.len()];
            let at = moves.moved.iter().position(|(file, _)| *file == victim.file).unwrap();
            let mut deleted = victim;
            if delete_before {
                accepted[at] = false;
            } else {
                deleted.file.generation = moves.moved[at].1;
            }
            let place = Location::of(&deleted.file).unwrap();
            segments.delete(&[(place, Victim { file: deleted.file, bytes: deleted.bytes })]);
            // The process dies here, right after the deletion was reported.
            copied = Some(copy_of(&store));
            accepted
        });
        let store = Store::reopen(copied.unwrap());
        assert!(store.read(&files[1].0).is_err(), "{delete_before}");
        for (key, bytes) in &files[2..] {
            assert_eq!(store.read(key).unwrap(), bytes);
        }
        store.check_counts();
    }
}

/// The copies are new, and the records are not. Without `durability = "disk"`, only what is new may be lost.
#[test]
fn a_power_cut_does_not_lose_old_records_because_they_were_moved() {
    for seed in 0..20 {
        let root = TempDir::new().unwrap();
        let disk = SimulatedDisk::new(root.path(), seed);
        let mut store = Store { segments: open_at(root.path()), root, index: HashMap::new() };
        let files: Vec<(Key, Bytes)> = (0..40).map(|seed| blob(4_000, seed)).collect();
        files.iter().for_each(|file| store.write(std::slice::from_ref(file)));
        sync_file_system(store.root.path()).unwrap();
        files.iter().step_by(2).for_each(|(key, _)| store.delete(key));
        let before = store.files("segment");
        while store.compact() != Compacted::NothingToGain {}
        assert!(before.iter().any(|segment| !segment.exists()));
        let store = Store::reopen(disk.cut_power());
        for (key, bytes) in files.iter().skip(1).step_by(2) {
            assert_eq!(store.read(key).unwrap(), bytes, "{seed}");
        }
    }
}

/// Their bytes count as dead then, and a later compaction reclaims them.
#[test]
fn copies_that_cannot_be_synced_do_not_replace_their_records() {
    let root = TempDir::new().unwrap();
    let disk = SimulatedDisk::new(root.path(), 1);
    let segments = open_with(root.path(), SyncPolicy::BeforeAnswer);
    let mut store = Store { segments, root, index: HashMap::new() };
    // The open segment has room for the copies of another one.
    let files: Vec<(Key, Bytes)> = (0..13).map(|seed| blob(4_000, seed)).collect();
    files.iter().for_each(|file| store.write(std::slice::from_ref(file)));
    files.iter().step_by(2).for_each(|(key, _)| store.delete(key));
    let dead = store.segments.takes_now().dead;
    disk.fail_syncs(true);
    let may_move = stored_now(&store);
    store.segments.compact(&may_move, &mut |moves| panic!("{moves:?}")).unwrap_err();
    assert!(store.segments.takes_now().dead > dead, "no copy was made");
    store.check_counts();
    disk.fail_syncs(false);
    while store.compact() != Compacted::NothingToGain {}
    assert!(store.segments.takes_now().dead < dead);
    store.check_counts();
    for (key, bytes) in files.iter().skip(1).step_by(2) {
        assert_eq!(store.read(key).unwrap(), bytes);
    }
}

#[test]
fn uses_are_recorded_and_survive_compaction() {
    let mut store = Store::new();
    let files: Vec<(Key, Bytes)> = (0..8).map(|seed| blob(4_000, seed)).collect();
    files.iter().for_each(|file| store.write(std::slice::from_ref(file)));
    let place = |store: &Store, at: usize| Location::of(&store.index[&files[at].0].file).unwrap();
    store.segments.touch(vec![place(&store, 1), place(&store, 2)], 5_000);
    store.delete(&files[0].0);
    store.delete(&files[3].0);
    assert_eq!(store.compact(), Compacted::Reclaimed);
    let Store { root, segments, .. } = store;
    drop(segments);
    let segments = open_at(root.path());
    let touched: HashMap<Key, u32> =
        found_in(&segments).into_iter().map(|recovered| (recovered.file.key, recovered.touched)).collect();
    let of = |at: usize| touched.get(&files[at].0).copied();
    assert_eq!([0, 1, 2, 3, 4].map(of), [None, Some(5_000), Some(5_000), None, Some(1_000)]);
}

/// Without the notes about deleted records, dead records are not copied as if they were live, so all of them are
/// reclaimed.
#[test]
fn dead_records_are_reclaimed_although_the_journals_lose_their_notes() {
    let mut store = Store::new();
    let files: Vec<(Key, Bytes)> = (0..40).map(|seed| blob(4_000, seed)).collect();
    files.iter().for_each(|file| store.write(std::slice::from_ref(file)));
    for (key, _) in files.iter().step_by(2) {
        store.delete(key);
    }
    let mut steps = 0;
    loop {
        for journal in store.files("journal") {
            fs::remove_file(journal).unwrap();
        }
        if store.compact() == Compacted::NothingToGain {
            break;
        }
        steps += 1;
        assert!(steps < 30, "it does not end: {:?}", store.segments.takes_now());
    }
    let takes = store.segments.takes_now();
    assert!(takes.dead < SIZES.segment, "{takes:?}");
    for (key, bytes) in files.iter().skip(1).step_by(2) {
        assert_eq!(store.read(key).unwrap(), bytes);
    }
    store.check_counts();
}

/// Each segment has too few dead bytes to be worth the copies, until all of them together are too many.
#[test]
fn bytes_that_are_dead_in_many_segments_are_reclaimed_once_they_are_too_many() {
    let mut store = Store::new();
    let files: Vec<_> = (0..600).map(|at| blob(700 + at % 50, at as u8)).collect();
    for file in &files {
        store.write(std::slice::from_ref(file));
    }
    let mut deleted = 0;
    while store.segments.verdict() != Verdict::Urgent {
        store.delete(&files[deleted * 21].0);
        deleted += 1;
        assert!(store.segments.takes_now().dead > 0);
    }
    while store.compact() != Compacted::NothingToGain {}
    assert_ne!(store.segments.verdict(), Verdict::Urgent);
    store.check_counts();
}
