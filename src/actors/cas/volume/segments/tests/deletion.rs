//! Deletions: what they note, and what comes back if they fail.

use super::{
    punch::{HOLE_BYTES, punch},
    segment::Addition,
    *,
};
use std::{os::unix::fs::MetadataExt as _, thread};

/// On a full disk, the note that records are dead can only use the space of these records.
#[test]
fn the_blocks_of_dead_records_are_given_back_without_harm_to_their_neighbours() {
    let mut store = Store::new();
    let blobs: Vec<_> = (0..5).map(|seed| blob(3_700, seed)).collect();
    store.write(&blobs);
    let dead: Vec<WrittenFile> = blobs[1..4].iter().map(|(key, _)| store.index[key]).collect();
    let ranges = dead.iter().map(|dead| {
        let start = Location::of(&dead.file).unwrap().offset();
        start..start + dead.bytes
    });
    let path = store.files("segment").remove(0);
    let blocks = || fs::metadata(&path).unwrap().blocks();
    let before = blocks();
    punch(&path, ranges.collect()).unwrap();
    assert!(blocks() <= before - 2 * HOLE_BYTES / 512, "three adjacent records have two whole blocks here");
    blobs[1..4].iter().for_each(|(key, _)| store.delete(key));
    let store = store.crash();
    assert_eq!(store.index.len(), 2);
    for (key, bytes) in [&blobs[0], &blobs[4]] {
        assert_eq!(store.read(key).unwrap(), bytes);
    }
}

/// The disk may be full, or the journal may not be writable for a while.
#[test]
fn a_deletion_that_could_not_be_noted_is_noted_later() {
    let mut store = Store::new();
    let purged = (key_of(EntryKind::Result, b"purged"), content(500, 1));
    store.write(&[purged.clone(), blob(100, 2)]);
    let file = store.index.remove(&purged.0).unwrap();
    let victim = Victim { file: file.file, bytes: file.bytes };
    let journal = store.segments.journal_path(Location::of(&file.file).unwrap().segment);
    fs::create_dir(&journal).unwrap();
    assert_eq!(store.segments.delete(&[(Location::of(&file.file).unwrap(), victim)]).len(), 1);
    store.segments.note_again();
    fs::remove_dir(&journal).unwrap();
    store.segments.note_again();
    let store = store.crash();
    assert!(store.index.len() == 1 && store.index.contains_key(&blob(100, 2).0));
}

fn result(name: &[u8], seed: u8) -> (Key, Bytes) {
    (key_of(EntryKind::Result, name), content(500, seed))
}

fn victim(file: &WrittenFile) -> (Location, Victim) {
    (Location::of(&file.file).unwrap(), Victim { file: file.file, bytes: file.bytes })
}

/// Several threads delete and use records of one segment, so often that the journal is rewritten several times.
#[test]
fn deletions_at_the_same_time_are_all_noted() {
    let mut store = Store::new();
    // Three of eight records are deleted. So the segment is not removed, and its journal decides.
    let files: Vec<(Key, Bytes)> = (0..240).map(|seed| blob(16 + usize::from(seed), seed)).collect();
    store.write(&files);
    let victims: Vec<_> = files.iter().map(|(key, _)| victim(&store.index[key])).collect();
    let used: Vec<Location> = victims.iter().map(|(at, _)| *at).collect();
    thread::scope(|scope| {
        for thread in 0..3 {
            let (store, victims, used) = (&store, &victims, &used);
            scope.spawn(move || {
                for victim in victims.iter().skip(thread).step_by(8) {
                    assert!(store.segments.delete(&[*victim]).is_empty());
                    store.segments.touch(used.clone(), 1_000);
                }
            });
        }
    });
    let store = store.crash();
    for (at, (key, _)) in files.iter().enumerate() {
        assert_eq!(store.index.contains_key(key), at % 8 >= 3, "{at}");
    }
}

/// The removal of a file can fail, for example because it is immutable.
#[test]
fn deleted_records_do_not_come_back_if_their_segment_cannot_be_removed() {
    let mut store = Store::new();
    let files = [blob(100, 1), blob(100, 2), result(b"purged", 3)];
    store.write(&files);
    // Fills the segment, so that it is complete.
    (10..14).for_each(|seed| store.write(&[blob(9_000, seed)]));
    let segment = store.files("segment").remove(0);
    let (number, aside) =
        (Location::of(&store.index[&files[0].0].file).unwrap().segment, segment.with_extension("x"));
    let doomed: Vec<Key> = store
        .index
        .values()
        .map(|written| written.file)
        .filter(|file| Location::of(file).unwrap().segment == number)
        .map(|file| file.key)
        .collect();
    assert!(doomed.len() >= files.len());
    store.delete(&doomed[0]);
    fs::rename(&segment, &aside).unwrap();
    fs::create_dir(&segment).unwrap();
    doomed[1..].iter().for_each(|key| store.delete(key));
    fs::remove_dir(&segment).unwrap();
    fs::rename(&aside, &segment).unwrap();
    let store = store.crash();
    assert!(doomed.iter().all(|key| !store.index.contains_key(key)));
    assert!(!segment.exists(), "this start could remove it");
}

/// A write may fail after some of its records are complete on disk.
#[test]
fn records_of_a_failed_write_are_not_found_by_the_next_start() {
    let mut store = Store::new();
    store.write(&[blob(100, 1)]);
    let (key, bytes) = result(b"never acknowledged", 2);
    let pieces = [bytes];
    let additions = [Addition {
        kind: key.kind,
        digest: key.digest,
        instance: 0,
        pieces: &pieces,
        length: 500,
        touched: 1,
        sequence: 100,
    }];
    let failed = store.segments.append(&additions, |locations| {
        let segment = store.segments.find(locations[0].segment).unwrap();
        let file = OpenOptions::new().write(true).open(store.files("segment").remove(0)).unwrap();
        segment.write(&file, locations[0].offset(), &additions).unwrap();
        Err(io::Error::from_raw_os_error(libc::ENOSPC))
    });
    assert!(failed.is_err());
    let store = store.crash();
    assert!(store.index.len() == 1 && store.index.contains_key(&blob(100, 1).0));
}

/// The older result was replaced by the newer one, and then the newer one was purged.
#[test]
fn a_result_is_not_deleted_while_an_older_one_of_its_action_may_come_back() {
    let mut store = Store::new();
    let (older, newer) = (result(b"action", 1), result(b"action", 2));
    store.write(std::slice::from_ref(&older));
    let replaced = store.index[&older.0];
    (10..14).for_each(|seed| store.write(&[blob(9_000, seed)]));
    store.index.remove(&older.0);
    store.write(std::slice::from_ref(&newer));
    let purged = store.index.remove(&newer.0).unwrap();
    let [older_at, newer_at] = [replaced, purged].map(|file| Location::of(&file.file).unwrap().segment);
    assert_ne!(older_at, newer_at);
    let journal = store.segments.journal_path(older_at);
    fs::create_dir(&journal).unwrap();
    assert_eq!(store.segments.delete(&[victim(&replaced)]).len(), 1);
    assert_eq!(store.segments.delete(&[victim(&purged)]).len(), 1, "the older one is not noted yet");
    fs::remove_dir(&journal).unwrap();
    let copied = copy_of(&store);
    let killed = Store::reopen(copied);
    assert_eq!(
        killed.read(&newer.0).unwrap(),
        newer.1,
        "its deletion has failed, and the older one stays hidden"
    );
    store.segments.note_again();
    assert!(!store.crash().index.contains_key(&newer.0));
}
