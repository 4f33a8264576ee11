//! Tests of the segments on a real directory: reads, deletions, compaction and recovery, against a trivial model.

use super::*;
use crate::actors::cas::{
    index::{EntryKind, Key, Victim},
    volume::{Compacted, Moves, Recovered, is_lost, read_all},
};
use bytes::Bytes;
use gorego_reapi::digest::DigestFunction;
use std::{cell::RefCell, collections::HashMap, fs::OpenOptions, os::unix::fs::FileExt as _};
use tempfile::TempDir;

mod compaction;
mod deletion;
mod model;

const SIZES: Sizes = Sizes { largest_file: 64 << 10, segment: 20 << 10, waste: 8 << 10 };

fn names() -> Vec<String> {
    vec!["=".into(), "=other".into(), "=+private".into()]
}

fn open_at(root: &Path) -> Segments {
    open_with(root, SyncPolicy::Never)
}

fn open_with(root: &Path, policy: SyncPolicy) -> Segments {
    Segments::open(root, names(), SIZES, Arc::new(AtomicU64::new(1)), policy).unwrap()
}

fn key_of(kind: EntryKind, name: &[u8]) -> Key {
    Key { digest: DigestFunction::Sha256.digest(name), instance: InstanceId(0), kind }
}

fn content(length: usize, seed: u8) -> Bytes {
    (0..length).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed)).collect::<Vec<u8>>().into()
}

/// A blob whose content follows from its seed.
fn blob(length: usize, seed: u8) -> (Key, Bytes) {
    let bytes = content(length, seed);
    (key_of(EntryKind::Blob, &bytes), bytes)
}

/// Segments with a trivial index of the stored files.
struct Store {
    root: TempDir,
    segments: Segments,
    index: HashMap<Key, WrittenFile>,
}

/// The directory as a kill at this moment would leave it.
fn copy_of(store: &Store) -> TempDir {
    let copied = TempDir::new().unwrap();
    fs::create_dir(copied.path().join("segments")).unwrap();
    for entry in fs::read_dir(store.root.path().join("segments")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, copied.path().join("segments").join(path.file_name().unwrap())).unwrap();
    }
    copied
}

/// The records that a start finds.
fn found_in(segments: &Segments) -> Vec<Recovered> {
    let found = Mutex::default();
    segments.recover(&|records| Vec::extend(&mut found.lock().unwrap(), records));
    found.into_inner().unwrap()
}

impl Store {
    fn new() -> Self {
        let root = TempDir::new().unwrap();
        let segments = open_at(root.path());
        Self { root, segments, index: HashMap::new() }
    }

    fn write(&mut self, files: &[(Key, Bytes)]) {
        let pieces: Vec<[Bytes; 1]> = files.iter().map(|(_, bytes)| [bytes.clone()]).collect();
        let new: Vec<NewFile<'_>> =
            files.iter().zip(&pieces).map(|((key, _), pieces)| NewFile { key: *key, pieces }).collect();
        for written in self.segments.write(&new, 1_000) {
            let written = written.unwrap();
            if let Some(old) = self.index.insert(written.file.key, written) {
                self.drop_file(&old);
            }
        }
    }

    fn drop_file(&self, old: &WrittenFile) {
        let at = Location::of(&old.file).unwrap();
        let failures = self.segments.delete(&[(at, Victim { file: old.file, bytes: old.bytes })]);
        assert!(failures.is_empty(), "{failures:?}");
    }

    fn delete(&mut self, key: &Key) {
        if let Some(old) = self.index.remove(key) {
            self.drop_file(&old);
        }
    }

    fn read(&self, key: &Key) -> io::Result<Bytes> {
        let file = self.index.get(key).ok_or(io::ErrorKind::NotFound)?.file;
        let stored = self.segments.read(Location::of(&file).unwrap(), &file)?;
        read_all(&*stored, 1 << 20).map(Bytes::from)
    }

    fn compact(&mut self) -> Compacted {
        let index = RefCell::new(&mut self.index);
        let mut lost = Vec::new();
        let has = |file: &FileId| index.borrow().get(&file.key).is_some_and(|entry| entry.file == *file);
        let outcome = self.segments.compact(&|files| files.iter().map(has).collect(), &mut |moves: Moves| {
            lost.extend(moves.lost);
            let relocate = |(file, generation): (FileId, u64)| {
                let is_there = has(&file);
                if is_there && let Some(entry) = index.borrow_mut().get_mut(&file.key) {
                    entry.file.generation = generation;
                }
                is_there
            };
            moves.moved.into_iter().map(relocate).collect()
        });
        for file in lost {
            if self.index.get(&file.key).is_some_and(|entry| entry.file == file) {
                self.delete(&file.key);
            }
        }
        outcome.unwrap()
    }

    /// Opens the directory again, as after the death of the process.
    fn crash(self) -> Self {
        let Self { root, segments, .. } = self;
        drop(segments);
        Self::reopen(root)
    }

    fn reopen(root: TempDir) -> Self {
        let segments = open_at(root.path());
        let (mut index, mut losers): (HashMap<Key, WrittenFile>, _) = (HashMap::new(), vec![]);
        for Recovered { file, bytes, .. } in found_in(&segments) {
            let written = WrittenFile { file, bytes, stamp: content::STAMP };
            let at = |file: &FileId| Location::of(file).unwrap();
            let known = index.get(&file.key).copied();
            let is_older =
                known.is_some_and(|known| segments.sequence(at(&known.file)) > segments.sequence(at(&file)));
            let loser = if is_older { Some(written) } else { index.insert(file.key, written) };
            losers.extend(loser.map(|WrittenFile { file, bytes, .. }| (at(&file), Victim { file, bytes })));
        }
        segments.delete(&losers);
        Self { root, segments, index }
    }

    fn files(&self, kind: &str) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.root.path().join("segments")).unwrap();
        let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
        files.retain(|path| path.extension().is_some_and(|own| own == kind));
        files.sort();
        files
    }

    /// Checks the counts against the stored files and the disk.
    fn check_counts(&self) {
        let takes = self.segments.takes_now();
        let live: u64 = self.index.values().map(|written| written.bytes).sum();
        assert_eq!(takes.live, live);
        let of_kind = |kind| self.files(kind).iter().map(|path| path.metadata().unwrap().len()).sum::<u64>();
        let disk = of_kind("segment") + of_kind("journal");
        assert!(takes.disk >= disk, "{takes:?} {disk}");
        assert!(live + self.segments.overhead() >= disk);
    }
}

#[test]
fn a_batch_is_read_back_before_and_after_a_crash() {
    let mut store = Store::new();
    let files: Vec<(Key, Bytes)> =
        [0, 1, 15, 16, 4_096, 5_000, 65_536].map(|length| blob(length, 7)).to_vec();
    store.write(&files);
    let result = (key_of(EntryKind::Result, b"action"), content(9_000, 3));
    store.write(std::slice::from_ref(&result));
    for restarted in [false, true, true] {
        if restarted {
            store = store.crash();
        }
        for (key, bytes) in files.iter().chain([&result]) {
            assert_eq!(store.read(key).unwrap(), bytes, "{restarted}");
        }
        assert_eq!(store.index.len(), 8);
        store.check_counts();
    }
}

#[test]
fn a_segment_without_live_records_is_removed_and_a_deleted_record_does_not_come_back() {
    let mut store = Store::new();
    let files: Vec<(Key, Bytes)> = (0..20).map(|seed| blob(4_000, seed)).collect();
    files.chunks(2).for_each(|batch| store.write(batch));
    assert!(store.files("segment").len() > 3);
    for (key, _) in &files[..15] {
        store.delete(key);
    }
    store.check_counts();
    let mut store = store.crash();
    assert_eq!(store.index.len(), 5);
    store.check_counts();
    for (key, _) in &files[15..] {
        store.delete(key);
    }
    let store = store.crash();
    assert!(store.files("segment").is_empty() && store.files("journal").is_empty());
    assert_eq!(store.segments.takes_now(), Takes::default());
}

/// A replaced or purged result does not come back, although the crash comes before the old record is gone.
#[test]
fn the_newer_of_two_results_wins_after_a_crash_wherever_they_lie() {
    let mut store = Store::new();
    let key = key_of(EntryKind::Result, b"action");
    store.write(&[(key, content(3_000, 1))]);
    let old = store.index.remove(&key).unwrap();
    (0..10).for_each(|seed| store.write(&[blob(4_000, seed)]));
    store.write(&[(key, content(3_000, 2))]);
    let new = store.index[&key];
    // The old record was not deleted before the crash.
    let mut store = store.crash();
    assert_eq!(store.read(&key).unwrap(), content(3_000, 2));
    // A copy of the new one keeps its age.
    (0..10).for_each(|seed| store.delete(&blob(4_000, seed).0));
    while store.compact() != Compacted::NothingToGain {}
    assert!(Location::of(&old.file).is_some() && Location::of(&new.file).is_some());
    let store = store.crash();
    assert_eq!(store.read(&key).unwrap(), content(3_000, 2));
    store.check_counts();
}

/// CAS-22: after any change to a file of the store, a read returns what was written, or an error that marks the file
/// as lost.
#[test]
fn no_bit_of_any_file_can_make_a_read_wrong() {
    let mut store = Store::new();
    let files: Vec<(Key, Bytes)> = (0..3).map(|seed| blob(100, seed)).collect();
    store.write(&files);
    store.write(&[blob(16_000, 9)]);
    store.write(&[blob(4_000, 10)]);
    let (sealed, all) = (store.files("segment").remove(0), store.index.clone());
    let good = fs::read(&sealed).unwrap();
    let reopened = |bytes: &[u8]| {
        let root = TempDir::new().unwrap();
        fs::create_dir(root.path().join("segments")).unwrap();
        for path in store.files("segment").into_iter().filter(|path| *path != sealed) {
            fs::copy(&path, root.path().join("segments").join(path.file_name().unwrap())).unwrap();
        }
        fs::write(root.path().join("segments").join(sealed.file_name().unwrap()), bytes).unwrap();
        Store::reopen(root)
    };
    let check = |store: &Store, what: &str| {
        let mut readable = 0;
        for (key, bytes) in files.iter().chain([&blob(16_000, 9), &blob(4_000, 10)]) {
            match store.read(key) {
                Ok(read) => {
                    assert_eq!(read, bytes, "{what}");
                    readable += 1;
                }
                Err(error) => assert!(is_lost(&error), "{what}: {error}"),
            }
        }
        readable
    };
    assert_eq!(check(&reopened(&good), "nothing"), all.len());
    let interesting = (0..600).chain(good.len() - 400..good.len());
    for at in interesting {
        let mut flipped = good.clone();
        flipped[at] ^= 1 << (at % 8);
        // At most the record with the changed bit is lost.
        assert!(check(&reopened(&flipped), &format!("bit of byte {at}")) >= all.len() - 1, "{at}");
    }
    for end in (0..good.len()).step_by(97) {
        check(&reopened(&good[..end]), &format!("cut at {end}"));
    }
}

/// Nothing that was acknowledged is lost when the process dies while others write.
#[test]
fn a_hole_in_front_of_whole_records_is_skipped() {
    let mut store = Store::new();
    let files: Vec<(Key, Bytes)> = (0..3).map(|seed| blob(1_000, seed)).collect();
    files.iter().for_each(|file| store.write(std::slice::from_ref(file)));
    let first = Location::of(&store.index[&files[0].0].file).unwrap();
    let path = store.files("segment").remove(0);
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&vec![0; record::record_bytes(1_000) as usize], first.offset()).unwrap();
    let store = store.crash();
    assert!(store.read(&files[0].0).is_err());
    assert_eq!(store.read(&files[1].0).unwrap(), files[1].1);
    assert_eq!(store.read(&files[2].0).unwrap(), files[2].1);
    store.check_counts();
    assert_eq!(store.crash().index.len(), 2);
}

/// Another program may make the last segment as long as it likes. To read all of it would delay the start for minutes.
#[test]
fn a_start_reads_only_the_part_of_a_long_file_that_may_have_records() {
    let mut store = Store::new();
    let files: Vec<(Key, Bytes)> = (0..3).map(|seed| blob(1_000, seed)).collect();
    store.write(&files);
    let path = store.files("segment").remove(0);
    OpenOptions::new().write(true).open(&path).unwrap().set_len(1 << 43).unwrap();
    let (started, start) = std::sync::mpsc::channel();
    std::thread::spawn(move || drop(started.send(store.crash())));
    let store = start.recv_timeout(std::time::Duration::from_secs(60)).expect("the start reads too much");
    for (key, bytes) in &files {
        assert_eq!(store.read(key).unwrap(), bytes);
    }
    store.check_counts();
    assert!(path.metadata().unwrap().len() < 100_000, "the rest is cut off");
}

#[test]
fn swapped_or_missing_segments_are_misses() {
    let mut store = Store::new();
    let files: Vec<(Key, Bytes)> = (0..12).map(|seed| blob(4_000, seed)).collect();
    files.iter().for_each(|file| store.write(std::slice::from_ref(file)));
    let paths = store.files("segment");
    let other = store.root.path().join("other");
    fs::rename(&paths[0], &other).unwrap();
    fs::rename(&paths[1], &paths[0]).unwrap();
    fs::rename(&other, &paths[1]).unwrap();
    fs::remove_file(&paths[2]).unwrap();
    // Descriptors that are open keep reading the right files.
    for restarted in [false, true] {
        if restarted {
            store = store.crash();
        }
        for (key, bytes) in &files {
            match store.read(key) {
                Ok(read) => assert_eq!(read, bytes),
                Err(error) => assert!(is_lost(&error), "{error}"),
            }
        }
    }
    assert!(store.index.is_empty());
    store.write(&files);
    assert_eq!(store.crash().index.len(), 12);
}

/// Otherwise the copies of a segment could take more room than dead records may.
#[test]
fn no_segment_is_larger_than_its_bound_whatever_is_written_at_once() {
    let mut store = Store::new();
    let files: Vec<(Key, Bytes)> = (0..60).map(|seed| blob(1 + usize::from(seed) * 97, seed)).collect();
    for count in [1, 7, 52] {
        store.write(&files[..count]);
    }
    store.write(&[blob(30_000, 99)]);
    let sizes: Vec<u64> = store
        .segments
        .all
        .read()
        .unwrap()
        .values()
        .map(|segment| segment.growth().takes())
        .map(|takes| takes.live + takes.dead)
        .collect();
    let larger = sizes.iter().filter(|bytes| **bytes > SIZES.segment).count();
    assert!(larger == 1 && sizes.len() > 8, "only the segment of the large blob: {sizes:?}");
}

/// Writes to a file that was removed by hand would be lost.
#[test]
fn a_removed_segment_is_not_appended_to() {
    let mut store = Store::new();
    store.write(&[blob(100, 1)]);
    fs::remove_file(store.files("segment").remove(0)).unwrap();
    store.write(&[blob(100, 2)]);
    let store = store.crash();
    assert_eq!(store.read(&blob(100, 2).0).unwrap(), blob(100, 2).1);
}

/// The number of a segment is a part of the locations of its records, which have 37 bits for it.
#[test]
fn a_file_that_is_named_like_a_segment_with_a_huge_number_leaves_numbers_for_new_segments() {
    let mut store = Store::new();
    store.write(&[blob(100, 1)]);
    for number in [Location::MAX_FOUND + 1, u64::MAX] {
        fs::write(store.segments.segment_path(number), "strange").unwrap();
    }
    let mut store = store.crash();
    store.write(&[blob(100, 2)]);
    assert_eq!(store.read(&blob(100, 2).0).unwrap(), blob(100, 2).1);
    let store = store.crash();
    assert!(store.index.len() == 2 && store.read(&blob(100, 1).0).unwrap() == blob(100, 1).1);
}

/// A blob whose deletion is forgotten may come back, a result may not.
#[test]
fn results_stay_misses_if_the_journal_that_may_purge_them_cannot_be_read_for_a_while() {
    let mut store = Store::new();
    let purged = (key_of(EntryKind::Result, b"purged"), content(500, 1));
    let kept = (key_of(EntryKind::Result, b"kept"), content(500, 2));
    store.write(&[purged.clone(), kept, blob(100, 3), blob(100, 4)]);
    store.delete(&purged.0);
    let journal = store.files("journal").remove(0);
    let file = OpenOptions::new().write(true).open(&journal).unwrap();
    let bytes = file.metadata().unwrap().len();
    file.set_len(journal::MAX_BYTES + 1).unwrap();
    let store = store.crash();
    let check = |store: &Store| {
        assert!(store.index.len() == 2 && store.index.keys().all(|key| key.kind == EntryKind::Blob));
        assert_eq!(store.read(&blob(100, 3).0).unwrap(), content(100, 3));
    };
    check(&store);
    file.set_len(bytes).unwrap();
    check(&store.crash());
}

/// Without the notes of its journal, a segment could bring back a purged result.
#[test]
fn a_segment_is_left_out_while_its_journal_can_neither_be_read_nor_replaced() {
    let mut store = Store::new();
    let purged = (key_of(EntryKind::Result, b"purged"), content(500, 1));
    let replaced = key_of(EntryKind::Result, b"replaced");
    store.write(&[purged.clone(), blob(100, 3), (replaced, content(500, 6))]);
    store.delete(&purged.0);
    let journal = store.files("journal").remove(0);
    let aside = journal.with_extension("aside");
    fs::rename(&journal, &aside).unwrap();
    fs::create_dir_all(journal.join("not empty")).unwrap();
    let mut store = store.crash();
    assert!(store.index.is_empty());
    let takes = fs::metadata(store.files("segment").remove(0)).unwrap().len();
    assert!(store.segments.overhead() >= takes, "its bytes count");
    assert_eq!(store.segments.recover(&|_| ()).unreadable, 1);
    store.write(&[blob(100, 5), (replaced, content(500, 7))]);
    fs::remove_dir_all(&journal).unwrap();
    fs::rename(&aside, &journal).unwrap();
    let store = store.crash();
    let expected = [blob(100, 3).0, blob(100, 5).0, replaced];
    assert!(store.index.len() == 3 && expected.iter().all(|key| store.index.contains_key(key)));
    assert_eq!(store.read(&replaced).unwrap(), content(500, 7), "the newer one");
}

#[test]
fn records_of_an_instance_that_is_not_served_any_more_are_dropped() {
    let mut store = Store::new();
    let (mut key, bytes) = blob(100, 1);
    let main = key;
    key.instance = InstanceId(1);
    store.write(&[(main, bytes.clone()), (key, bytes.clone())]);
    let Store { root, segments, .. } = store;
    drop(segments);
    let now = vec!["=new".into(), "=".into()];
    let segments =
        Segments::open(root.path(), now, SIZES, Arc::new(AtomicU64::new(1)), SyncPolicy::Never).unwrap();
    let found: Vec<FileId> = found_in(&segments).into_iter().map(|recovered| recovered.file).collect();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].key, Key { instance: InstanceId(1), ..main }, "the instance has another number now");
    let read = segments.read(Location::of(&found[0]).unwrap(), &found[0]).unwrap();
    assert_eq!(read.whole().unwrap(), bytes);
}

/// Many threads write, and each batch is one piece of the file.
#[test]
fn writers_do_not_disturb_each_other() {
    let store = Store::new();
    let segments = &store.segments;
    let all: Vec<(FileId, Bytes)> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4u8)
            .map(|thread| {
                scope.spawn(move || {
                    let mut written = Vec::new();
                    for round in 0..50usize {
                        let files: Vec<(Key, Bytes)> =
                            (0..4).map(|at| blob(round * 17 + at, thread * 50 + at as u8)).collect();
                        let pieces: Vec<[Bytes; 1]> =
                            files.iter().map(|(_, bytes)| [bytes.clone()]).collect();
                        let new: Vec<NewFile<'_>> = (files.iter().zip(&pieces))
                            .map(|((key, _), pieces)| NewFile { key: *key, pieces })
                            .collect();
                        let outcomes = segments.write(&new, 1);
                        written.extend(
                            outcomes
                                .into_iter()
                                .zip(files)
                                .map(|(outcome, (_, bytes))| (outcome.unwrap().file, bytes)),
                        );
                    }
                    written
                })
            })
            .collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(all.len(), 800);
    for (file, bytes) in all {
        let stored = segments.read(Location::of(&file).unwrap(), &file).unwrap();
        assert_eq!(stored.whole().unwrap(), bytes);
    }
}
