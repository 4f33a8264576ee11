//! Tests of the block checksums of large blobs: damage that shows only in the bytes, and stores without checksums.

use super::{
    super::{
        index::{EntryKind, Key},
        lookup::Purpose,
        volume::checksums::BLOCK_BYTES,
    },
    *,
};
use std::{fs, os::unix::fs::FileExt as _};

/// Flips a bit of a stored file in place, and keeps its permission bits. The test has to run as the owner of the file.
pub(super) fn flip(path: &Path, at: u64) {
    use std::os::unix::fs::PermissionsExt as _;
    let before = fs::metadata(path).unwrap().permissions();
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
    let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    fs::set_permissions(path, before).unwrap();
}

/// Makes the store believe that a changed file was verified, as after an error of the disk, which leaves the change
/// time as it is.
async fn hide_change(store: &TestStore, blob: Digest) {
    let found = store.cas.locate(&store.main, &[blob], Purpose::Look).await.unwrap().found.remove(0).unwrap();
    let stamp = store.cas.shared().volume.look(&found.file).unwrap().stamp;
    store.cas.actor().send(Verified { at: found.at, stamp }).await.unwrap();
}

fn checksum_files(store: &TestStore) -> Vec<PathBuf> {
    let directory = store.root.path().join("store/checksums");
    fs::read_dir(directory).into_iter().flatten().map(|entry| entry.unwrap().path()).collect()
}

fn has_checksums(store: &TestStore, blob: Digest) -> bool {
    let key = Key { digest: blob, instance: store.main.id(), kind: EntryKind::Blob };
    let found = store.cas.shared().view.read(None, |look| look.renew(&key)).0.unwrap();
    store.cas.shared().volume.open(&found.file).unwrap().is_checked_when_read()
}

/// Stores a blob in each way that makes a large file: in one piece, as a long upload, and as an output that is adopted.
async fn put_in_every_way(store: &TestStore) -> Vec<Bytes> {
    let all: Vec<Bytes> = (0..3).map(|seed| noise(3 * MB as usize + 17, seed)).collect();
    store.put(all[0].clone()).await;
    let begun = store.cas.begin_upload(&store.main, "uploads/x", digest(&all[1]), 0).await.unwrap();
    let Upload::Writer(mut writer) = begun else { panic!("it is not stored") };
    for at in (0..all[1].len()).step_by(700_001) {
        writer.write(all[1].slice(at..(at + 700_001).min(all[1].len()))).await.unwrap();
    }
    writer.finish().await.unwrap();
    // The directory is next to the store, so that it is on the same file system.
    let directory = store.root.path().join("outputs");
    fs::create_dir_all(&directory).unwrap();
    fs::write(directory.join("o"), &all[2]).unwrap();
    let stored = store.worker(move |cas, main| {
        let mut outputs = cas.begin_outputs(&main, SHA256, 0);
        let file = fs::File::open(directory.join("o")).unwrap();
        let stored = outputs.file(&fs::File::open(&directory).unwrap(), "o", file);
        assert!(!directory.join("o").exists(), "it was adopted");
        outputs.commit().and(stored)
    });
    assert_eq!(stored.await, Ok(digest(&all[2])));
    all
}

/// CAS-22, BS-16: the bytes before a bad block are right, the read ends with an error, the blob is a miss from then on,
/// and an upload restores it.
#[actix::test]
async fn an_error_of_the_disk_that_moves_no_time_ends_the_read() {
    let mut store = TestStore::new().await;
    let all = put_in_every_way(&store).await;
    for restarted in [false, true] {
        if restarted {
            store = store.restart().await;
        }
        for bytes in &all {
            let blob = digest(bytes);
            assert!(has_checksums(&store, blob));
            let reader = store.cas.open(&store.main, blob).await.unwrap();
            assert_eq!(read_all(&reader).await.unwrap(), bytes);
            let bad = 2 * MB + 5;
            flip(&store.file_of(blob), bad);
            if !restarted {
                hide_change(&store, blob).await;
            }
            let reader = store.cas.open(&store.main, blob).await.unwrap();
            let (mut read, error) = (vec![], loop_until_error(&reader).await);
            read.extend_from_slice(&error.0);
            assert!(
                bytes.starts_with(&read) && read.len() as u64 >= bad - bad % BLOCK_BYTES as u64 - 200_000
            );
            assert!(matches!(error.1, Error::Unavailable(_)), "{:?}", error.1);
            assert!(!store.has(blob).await);
            assert!(matches!(store.get(blob).await, Err(Error::NotFound(_))));
            store.put(bytes.clone()).await;
            assert_eq!(store.get(blob).await.unwrap(), bytes);
        }
    }
    let damaged = store.inspect().await.tally.damaged;
    assert_eq!(damaged, all.len() as u64, "since the restart");
}

/// The bytes that could be read, and the error after them.
async fn loop_until_error(reader: &BlobReader) -> (Vec<u8>, Error) {
    let mut read = vec![];
    loop {
        match reader.read_at(read.len() as u64, 128 * 1024).await {
            Ok(bytes) => {
                assert!(!bytes.is_empty(), "a short read must not look like the end");
                read.extend_from_slice(&bytes);
            }
            Err(error) => return (read, error),
        }
    }
}

/// The first byte of a large blob is served at once after a restart: only what is read is checked.
#[actix::test]
async fn after_a_restart_a_blob_is_not_read_before_it_is_served() {
    let store = TestStore::new().await;
    let bytes = noise(3 * MB as usize, 1);
    let blob = store.put(bytes.clone()).await;
    flip(&store.file_of(blob), 3 * MB - 1);
    let store = store.restart().await;
    let reader = store.cas.open(&store.main, blob).await.unwrap();
    assert_eq!(reader.read_at(0, 1_000).await.unwrap(), bytes[..1_000], "its end was not looked at");
    drop(reader);
    // A blob with damage at its start is a miss before anything is sent (BS-08).
    store.put(bytes.clone()).await;
    let store = store.restart().await;
    flip(&store.file_of(blob), 7);
    assert!(matches!(store.cas.open(&store.main, blob).await, Err(Error::NotFound(_))));
    assert!(!store.has(blob).await);
}

/// A store of an earlier version has no checksums: its blobs are hashed at their first read, and then have checksums.
/// The same applies after checksums are lost or damaged.
#[actix::test]
async fn a_blob_without_checksums_is_hashed_and_gets_them() {
    let mut store = TestStore::new().await;
    let bytes = noise(3 * MB as usize, 1);
    let blob = store.put(bytes.clone()).await;
    for round in 0..4 {
        let files = checksum_files(&store);
        assert_eq!(files.len(), 1, "{files:?}");
        let TestStore { root, cas, max_bytes, .. } = store;
        cas.actor().send(CloseStore).await.unwrap();
        drop(cas);
        match round {
            0 => {
                fs::remove_dir_all(root.path().join("store/checksums")).unwrap();
                fs::write(root.path().join("store/format"), "gorego store 2\n").unwrap();
            }
            1 => overwrite(&files[0], |bytes| bytes.truncate(60)),
            2 => overwrite(&files[0], |bytes| *bytes.last_mut().unwrap() ^= 1),
            _ => fs::write(&files[0], "").unwrap(),
        }
        store = TestStore::at(root, max_bytes).await;
        assert!(!has_checksums(&store, blob), "{round}");
        assert_eq!(store.get(blob).await.unwrap(), bytes, "{round}");
        assert!(has_checksums(&store, blob), "{round}");
        assert_eq!(store.inspect().await.tally.damaged, 0);
    }
    // Without checksums, damage is found before the first byte.
    for file in checksum_files(&store) {
        fs::remove_file(file).unwrap();
    }
    let store = store.restart().await;
    flip(&store.file_of(blob), 3 * MB - 1);
    assert!(matches!(store.cas.open(&store.main, blob).await, Err(Error::NotFound(_))));
}

/// The checksums of deleted blobs are deleted, too.
#[actix::test]
async fn checksums_are_bounded_by_what_is_stored() {
    let store = TestStore::with_limit(20 * MB).await;
    for seed in 0..120 {
        store.put(noise(LARGE, seed)).await;
    }
    let totals = store.inspect().await.totals;
    assert!(totals.overhead < 100_000, "{totals:?}");
    let bytes: u64 = checksum_files(&store).iter().map(|path| path.metadata().unwrap().len()).sum();
    assert_eq!(store.cas.shared().volume.overhead(), bytes);
}
