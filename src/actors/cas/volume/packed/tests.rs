//! Tests of packed files without a store: reads and damage.

use super::{
    super::{SyncPolicy, Volume as _, files::Files, read_all},
    *,
};
use crate::{
    actors::cas::index::{EntryKind, FileId},
    instance::{InstanceId, Instances},
};
use gorego_reapi::{
    compression::{Encoder, decode_all},
    digest::DigestFunction,
};
use proptest::prelude::*;
use std::{fs, path::PathBuf, sync::Arc};
use tempfile::TempDir;

/// The volume of a new store.
fn files() -> (TempDir, Files) {
    let root = TempDir::new().unwrap();
    let files = Files::open(root.path(), &Instances::new([""]).unwrap(), SyncPolicy::Never).unwrap();
    (root, files)
}

/// A blob of several parts, each with its own kind of content: runs, text and noise.
fn content(parts: &[(u8, usize)]) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    let mut bytes = vec![];
    for (kind, length) in parts {
        bytes.extend((0..*length).map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            match kind {
                0 => 7,
                1 => b"the quick fox"[(state % 13) as usize],
                _ => state as u8,
            }
        }));
    }
    bytes
}

fn pack(files: &Files, plain: &[u8]) -> FileId {
    let digest = DigestFunction::Sha256.digest(plain);
    let key = Key { digest, instance: InstanceId(0), kind: EntryKind::Blob };
    let mut packing = Packing::new(files.packed_draft(1_000).unwrap(), key);
    let mut encoder = Encoder::new(3).unwrap();
    for chunk in plain.chunks(CHUNK_BYTES) {
        let mut frame = vec![];
        encoder.frames(chunk, &mut frame).unwrap();
        let expected = packing.length_with(frame.len());
        packing.push(chunk.len(), &frame).unwrap();
        assert_eq!(packing.table.sizes().1 + end_bytes(digest, packing.table.count()) as u64, expected);
    }
    let written = packing.finish().unwrap();
    let metadata = fs::metadata(files.path(&written.file)).unwrap();
    assert_eq!(written.bytes, files.paths.taken(&metadata));
    written.file
}

/// All bytes of a file that is open, in reads of at most this many bytes.
fn read_in_steps(file: &dyn Stored, step: usize) -> io::Result<Vec<u8>> {
    let (mut bytes, mut buffer) = (vec![], vec![0; step]);
    loop {
        match file.read_at(&mut buffer, bytes.len() as u64)? {
            0 => return Ok(bytes),
            read => bytes.extend_from_slice(&buffer[..read]),
        }
    }
}

fn parts() -> impl Strategy<Value = Vec<(u8, usize)>> {
    proptest::collection::vec((0u8..3, 1usize..400_000), 1..5)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// A read of any range of any content returns the bytes of the blob. The frames are a zstd stream of the blob.
    #[test]
    fn a_packed_file_reads_like_its_blob(
        parts in parts(),
        reads in proptest::collection::vec((any::<prop::sample::Index>(), 0usize..600_000), 1..20),
        step in 1_000usize..600_000,
    ) {
        let (_root, files) = files();
        let plain = content(&parts);
        let id = pack(&files, &plain);
        let file = files.open(&id).unwrap();
        prop_assert_eq!(file.look().unwrap().size, plain.len() as u64);
        prop_assert_eq!(files.look(&id).unwrap(), file.look().unwrap());
        for (at, length) in reads {
            let at = at.index(plain.len() + 1);
            let mut buffer = vec![0; length];
            let read = file.read_at(&mut buffer, at as u64).unwrap();
            prop_assert_eq!(read == 0, length == 0 || at == plain.len(), "a read gets something, unless there is nothing");
            prop_assert_eq!(&buffer[..read], &plain[at..at + read]);
            // The rest of a frame is available without blocking, and has the same bytes.
            let mut cached = Vec::with_capacity(1_000);
            if file.read_cached(&mut cached, (at + read) as u64).is_ok() {
                prop_assert_eq!(&cached[..], &plain[at + read..at + read + cached.len()]);
            }
        }
        prop_assert_eq!(&read_in_steps(&*file, step).unwrap(), &plain);
        let frames = file.frames().unwrap();
        let (mut stream, mut buffer) = (vec![], vec![0; step]);
        loop {
            match frames.read_at(&mut buffer, stream.len() as u64).unwrap() {
                0 => break,
                read => stream.extend_from_slice(&buffer[..read]),
            }
        }
        prop_assert_eq!(decode_all(&stream, plain.len() as u64).unwrap(), &plain[..]);
        let whole = fs::read(files.path(&id)).unwrap();
        prop_assert_eq!(zstd::decode_all(&whole[..]).unwrap(), plain, "any decoder reads the file");
    }

    /// After damage at any position, a read returns an error or the right bytes, both as content and as frames.
    #[test]
    fn damage_is_an_error_and_never_content(
        parts in parts(),
        at in any::<prop::sample::Index>(),
        bit in 0u8..8,
        cut in any::<bool>(),
        step in 10_000usize..600_000,
    ) {
        let (_root, files) = files();
        let plain = content(&parts);
        let id = pack(&files, &plain);
        let path = files.path(&id);
        let mut bytes = fs::read(&path).unwrap();
        let sound = bytes.clone();
        let at = at.index(bytes.len());
        if cut { bytes.truncate(at) } else { bytes[at] ^= 1 << bit }
        replace(&path, &bytes);
        let Ok(file) = files.open(&id) else { return Ok(()) };
        prop_assert!(!cut, "a file that is cut short is not opened");
        let lost = read_in_steps(&*file, step).unwrap_err();
        prop_assert_eq!(lost.kind(), io::ErrorKind::InvalidData);
        let frames = file.frames().unwrap();
        let mut stream = vec![];
        let outcome = loop {
            let mut buffer = vec![0; step];
            match frames.read_at(&mut buffer, stream.len() as u64) {
                Ok(read) => stream.extend_from_slice(&buffer[..read]),
                Err(error) => break error,
            }
        };
        prop_assert_eq!(outcome.kind(), io::ErrorKind::InvalidData);
        prop_assert_eq!(&stream[..], &sound[..stream.len()]);
    }
}

/// Replaces a file that is not writable.
fn replace(path: &PathBuf, bytes: &[u8]) {
    fs::remove_file(path).unwrap();
    fs::write(path, bytes).unwrap();
}

#[test]
fn the_file_of_another_blob_is_noticed() {
    let (_root, files) = files();
    let one = pack(&files, &content(&[(1, 300_000)]));
    let other = pack(&files, &content(&[(0, 1), (1, 299_999)]));
    let bytes = fs::read(files.path(&other)).unwrap();
    replace(&files.path(&one), &bytes);
    assert_eq!(files.open(&one).unwrap_err().kind(), io::ErrorKind::InvalidData);
    assert!(files.open(&other).is_ok());
}

#[test]
fn the_recorded_use_is_that_of_the_plain_file_and_the_name_says_that_it_is_packed() {
    use std::os::unix::fs::MetadataExt as _;
    let (_root, files) = files();
    let plain = content(&[(1, 300_000)]);
    let id = pack(&files, &plain);
    assert!(id.is_packed() && FileId::SEQUENCES.contains(&id.sequence()));
    assert!(files.path(&id).to_string_lossy().contains("/v1/packed/"));
    assert_eq!(fs::metadata(files.path(&id)).unwrap().atime(), 1_000);
    let found = Mutex::new(vec![]);
    files.recover(&|_| true, &|recovered| found.lock().unwrap().extend(recovered));
    let found = found.into_inner().unwrap();
    assert_eq!(found.iter().map(|found| (found.file, found.touched)).collect::<Vec<_>>(), [(id, 1_000)]);
    assert!(found[0].bytes < plain.len() as u64 / 3 * 2);
    assert_eq!(read_all(&*files.open(&found[0].file).unwrap(), 1 << 20).unwrap(), plain);
    assert!(files.next_generation() > id.sequence());
}

#[test]
fn the_frames_that_all_open_files_keep_are_bounded() {
    let decoders = Arc::new(FrameDecoders::default());
    let keep = |number| decoders.keep(FramePart::Plain(number), vec![0; CHUNK_BYTES]);
    let kept: Vec<_> = (0..).map_while(keep).collect();
    assert_eq!(kept.len() * CHUNK_BYTES, KEPT_BYTES_MAX);
    drop(kept);
    assert!(keep(0).is_some());
}
