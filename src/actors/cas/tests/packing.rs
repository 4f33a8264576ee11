//! Tests of compression at rest: whatever happens to the files, every reader gets the same bytes as before,
//! or a miss.

use super::*;
use crate::actors::cas::{
    forms::packing::{PackTally, pack_now},
    settings::{PackingSettings, SMALL_BLOB_BYTES},
};
use gorego_reapi::compression::CHUNK_BYTES;
use std::{fs, os::unix::fs::MetadataExt as _};

/// Compresses every blob that gets smaller by a fifth, at once.
const AT_ONCE: PackingSettings =
    PackingSettings { after_secs: 0, min_bytes: SMALL_BLOB_BYTES, min_saving_percent: 20, cpu_percent: 100 };

/// Compressible bytes.
fn text(length: usize, seed: u64) -> Bytes {
    noise(length, seed).iter().map(|byte| b"the quick fox"[usize::from(byte % 13)]).collect()
}

/// Changes the bytes of a file.
type Damage = Box<dyn Fn(&mut Vec<u8>)>;

impl TestStore {
    /// Compresses the cold blobs, and waits until the plain files are deleted.
    async fn pack(&self, settings: PackingSettings) -> PackTally {
        let tally = self.worker(move |cas, _| pack_now(&cas, settings, || Ok(()))).await.unwrap();
        self.when_deleted().await;
        tally
    }

    /// Compresses the cold blobs, and calls `meanwhile` once, in the middle of the first blob.
    async fn pack_while(&self, meanwhile: impl FnOnce(&Cas, &Instance) + Send + 'static) -> PackTally {
        let mut meanwhile = Some(meanwhile);
        let packed = move |cas: Cas, main: Instance| {
            pack_now(&cas, AT_ONCE, || {
                if let Some(meanwhile) = meanwhile.take() {
                    meanwhile(&cas, &main);
                }
                Ok(())
            })
        };
        self.worker(packed).await.unwrap()
    }

    /// Reads a blob in every possible way.
    async fn check(&self, plain: &Bytes) {
        let blob = digest(plain);
        assert_eq!(self.get(blob).await.unwrap(), plain);
        let reader = self.cas.open(&self.main, blob).await.unwrap();
        for (offset, length) in [(0, 1), (1, 300_000), (plain.len() / 2, 100_000), (plain.len() - 1, 10)] {
            let read = reader.read_at(offset as u64, length).await.unwrap();
            assert!(!read.is_empty() && read == plain[offset..offset + read.len()], "{offset}");
        }
        for offset in [0, 1, plain.len() / 3, CHUNK_BYTES.min(plain.len()), plain.len() - 1, plain.len()] {
            let mut stream = self.cas.open_zstd(&self.main, blob, offset as u64).await.unwrap();
            let mut pieces = vec![];
            while let Some(piece) = stream.next(50_000).await.unwrap() {
                pieces.push(piece);
            }
            assert_eq!(zstd::decode_all(&pieces.concat()[..]).unwrap(), plain[offset..], "{offset}");
        }
        let read = self.cas.read_many(&self.main, vec![blob]).await.unwrap().remove(0).unwrap();
        assert_eq!(read, plain);
        match self.cas.read_many_zstd(&self.main, vec![blob]).await.unwrap().remove(0).unwrap() {
            Item::Plain(bytes) => assert_eq!(bytes, plain),
            Item::Zstd(stream) => assert_eq!(zstd::decode_all(&stream[..]).unwrap(), &plain[..]),
        }
        assert_eq!(self.materialise(blob).await, &plain[..]);
        assert!(self.has(blob).await);
    }

    /// Reads a damaged blob until the error, and checks that all bytes before it are right.
    async fn fails_to_read(&self, plain: &Bytes, as_zstd: bool) {
        let blob = digest(plain);
        let error = if as_zstd {
            let mut stream = match self.cas.open_zstd(&self.main, blob, 0).await {
                Ok(stream) => stream,
                Err(error) => return assert!(matches!(error, Error::NotFound(_)), "{error}"),
            };
            loop {
                match stream.next(100_000).await {
                    Ok(piece) => assert!(piece.is_some(), "the stream ended as if it were whole"),
                    Err(error) => break error,
                }
            }
        } else {
            let reader = match self.cas.open(&self.main, blob).await {
                Ok(reader) => reader,
                Err(error) => return assert!(matches!(error, Error::NotFound(_)), "{error}"),
            };
            let mut at = 0;
            loop {
                match reader.read_at(at as u64, 100_000).await {
                    Ok(piece) => {
                        assert!(!piece.is_empty() && piece == plain[at..at + piece.len()]);
                        at += piece.len();
                    }
                    Err(error) => break error,
                }
            }
        };
        assert!(matches!(error, Error::Unavailable(_)), "{error}");
    }

    /// The bytes of a blob as an action sees them among its inputs.
    async fn materialise(&self, blob: Digest) -> Vec<u8> {
        let file = reapi::FileNode { name: "f".into(), digest: Some(blob.to_wire()), ..Default::default() };
        let root = reapi::Directory { files: vec![file], ..Default::default() };
        let root = self.put(prost::Message::encode_to_vec(&root)).await;
        let staged = move |cas: Cas, main: Instance| {
            let mut staged = cas.open_inputs(&main, root, Owner::default())?;
            staged.hold_all()?;
            let target = TempDir::new().unwrap();
            let parent = fs::File::open(target.path()).unwrap();
            staged.materialise(&blob, &parent, "f", 0o644)?;
            Ok::<_, Error>(fs::read(target.path().join("f")).unwrap())
        };
        self.worker(staged).await.unwrap()
    }

    fn packed_files(&self) -> Vec<PathBuf> {
        let mut files = self.files();
        files.retain(|path| path.to_string_lossy().contains("/packed/"));
        files
    }

    /// The disk space of the files outside of segments.
    fn bytes_of_files(&self) -> u64 {
        let block = rustix::fs::statvfs(self.root.path()).unwrap().f_frsize;
        let bytes = |path: &PathBuf| {
            let metadata = fs::metadata(path).unwrap();
            metadata.len().next_multiple_of(block).max(metadata.blocks() * 512)
        };
        self.files().iter().map(bytes).sum()
    }

    /// Waits until all superseded files are deleted.
    async fn when_deleted(&self) -> Totals {
        eventually(|| async {
            let totals = self.inspect().await.totals;
            (totals.deleting == 0 && totals.reserved == 0).then_some(totals)
        })
        .await
    }
}

#[actix::test]
async fn a_cold_blob_takes_less_and_reads_as_before_also_after_a_restart() {
    let mut store = TestStore::of_files().await;
    let blobs: Vec<Bytes> = vec![
        text(SMALL_BLOB_BYTES as usize, 1),
        text(LARGE, 2),
        text(CHUNK_BYTES, 3),
        text(10 * CHUNK_BYTES + 1, 4),
        [text(3 * CHUNK_BYTES, 5), noise(CHUNK_BYTES, 5)].concat().into(),
        Bytes::from(vec![0; 5_000_000]),
    ];
    for blob in &blobs {
        store.put(blob.clone()).await;
    }
    let before = store.inspect().await.totals;
    let tally = store.pack(AT_ONCE).await;
    let totals = store.when_deleted().await;
    assert_eq!((tally.blobs, tally.incompressible), (6, 0));
    assert_eq!((totals.packed_blobs, totals.blobs, totals.limit), (6, before.blobs, before.limit));
    assert_eq!(totals.packed_content, blobs.iter().map(|blob| blob.len() as u64).sum::<u64>());
    assert_eq!((totals.packed_used, totals.used), (tally.bytes, tally.bytes));
    assert!(totals.used < before.used / 10 * 6, "{totals:?}");
    assert_eq!(store.bytes_of_files(), totals.used, "it counts what it takes");
    assert_eq!(store.packed_files().len(), 6, "no plain file is left: {:?}", store.files());
    for _ in 0..2 {
        for blob in &blobs {
            store.check(blob).await;
        }
        assert_eq!(store.inspect().await.totals.zstd_forms, 0, "its frames serve as the form");
        assert_eq!(store.pack(AT_ONCE).await, PackTally::default(), "it is compressed already");
        store = store.restart().await;
        let totals = store.inspect().await.totals;
        assert_eq!((totals.packed_blobs, totals.packed_used), (6, tally.bytes));
    }
}

/// The zstd stream of such a blob is the beginning of its file, byte by byte.
#[actix::test]
async fn a_compressed_read_gets_the_stored_frames_and_a_form_goes_when_its_blob_is_compressed() {
    let store = TestStore::of_files().await;
    let plain = text(3_000_000, 1);
    let blob = store.put(plain.clone()).await;
    let read = || async {
        let mut stream = store.cas.open_zstd(&store.main, blob, 0).await.unwrap();
        let mut bytes = vec![];
        while let Some(piece) = stream.next(100_000).await.unwrap() {
            bytes.extend_from_slice(&piece);
        }
        bytes
    };
    read().await;
    read().await;
    eventually(|| async { (store.inspect().await.totals.zstd_forms == 1).then_some(()) }).await;
    // The form is made under a hold of its blob.
    eventually(|| async { (store.pack(AT_ONCE).await.blobs == 1).then_some(()) }).await;
    let totals = store.when_deleted().await;
    assert_eq!((totals.zstd_forms, totals.packed_blobs), (0, 1));
    let stream = read().await;
    let file = fs::read(store.file_of(blob)).unwrap();
    assert!(file.starts_with(&stream) && file.len() < stream.len() + 1_000);
    assert_eq!(zstd::decode_all(&stream[..]).unwrap(), plain);
}

#[actix::test]
async fn what_does_not_get_smaller_is_tried_once() {
    let store = TestStore::of_files().await;
    let blobs = [noise(LARGE, 1), noise(3_000_000, 2), [text(LARGE, 3), noise(3_000_000, 3)].concat().into()];
    for blob in &blobs {
        store.put(blob.clone()).await;
    }
    let before = store.inspect().await.totals;
    let tally = store.pack(AT_ONCE).await;
    assert_eq!((tally.blobs, tally.incompressible), (0, 3));
    assert_eq!(store.when_deleted().await, before);
    assert_eq!(store.files().len(), 3, "{:?}", store.files());
    assert_eq!(store.pack(AT_ONCE).await, PackTally::default());
    for blob in &blobs {
        store.check(blob).await;
    }
}

#[actix::test]
async fn only_what_is_cold_and_large_and_saves_enough_is_compressed() {
    let store = TestStore::of_files().await;
    store.put(text(LARGE, 1)).await;
    let day = PackingSettings { after_secs: 86_400, ..AT_ONCE };
    let larger = PackingSettings { min_bytes: LARGE as u64 + 1, ..AT_ONCE };
    for settings in [day, larger] {
        assert_eq!(store.pack(settings).await, PackTally::default());
    }
    let held = store.cas.open(&store.main, digest(&text(LARGE, 1))).await.unwrap();
    assert_eq!(store.pack(AT_ONCE).await, PackTally::default(), "it is held");
    drop(held);
    let more = PackingSettings { min_saving_percent: 80, ..AT_ONCE };
    assert_eq!(store.pack(more).await.incompressible, 1, "it saves about a half");
}

/// Small blobs are in segments, together with others.
#[actix::test]
async fn blobs_in_segments_stay_as_they_are() {
    let store = TestStore::new().await;
    store.put(text(SMALL_BLOB_BYTES as usize, 1)).await;
    let large = text(SMALL_BLOB_BYTES as usize + 1, 2);
    store.put(large.clone()).await;
    let settings = PackingSettings { min_bytes: 1, ..AT_ONCE };
    assert_eq!(store.pack(settings).await.blobs, 1);
    store.check(&large).await;
}

/// A hold that begins while a blob is being compressed prevents the replacement: the reader continues with
/// the plain file.
#[actix::test]
async fn a_blob_that_is_opened_meanwhile_keeps_its_file() {
    let store = TestStore::of_files().await;
    let plain = text(3_000_000, 1);
    let blob = store.put(plain.clone()).await;
    let (sender, receiver) = std::sync::mpsc::channel();
    let open = move |cas: &Cas, main: &Instance| {
        let reader = cas.shared().runtime.block_on(cas.open(main, blob)).unwrap();
        sender.send(reader).unwrap();
    };
    assert_eq!(store.pack_while(open).await, PackTally::default());
    let reader = receiver.recv().unwrap();
    assert_eq!(store.when_deleted().await.packed_blobs, 0);
    assert!(store.packed_files().is_empty());
    assert_eq!(read_all(&reader).await.unwrap(), plain);
    drop(reader);
    assert_eq!(store.pack(AT_ONCE).await.blobs, 1);
    store.check(&plain).await;
}

/// A blob that is removed while it is being compressed does not come back.
#[actix::test]
async fn a_blob_that_is_dropped_meanwhile_stays_dropped() {
    let store = TestStore::of_files().await;
    let plain = text(3_000_000, 1);
    let blob = store.put(plain.clone()).await;
    let path = store.file_of(blob);
    let lose = move |cas: &Cas, main: &Instance| {
        fs::remove_file(&path).unwrap();
        assert!(cas.shared().runtime.block_on(cas.open(main, blob)).is_err());
    };
    assert_eq!(store.pack_while(lose).await, PackTally::default());
    assert!(!store.has(blob).await);
    assert_eq!(store.when_deleted().await.used, 0);
    assert!(store.files().is_empty(), "{:?}", store.files());
    assert!(!store.restart().await.has(blob).await);
}

#[actix::test]
async fn a_plain_file_that_is_wrong_is_dropped_when_it_would_be_compressed() {
    let store = TestStore::of_files().await;
    let plain = text(3_000_000, 1);
    let blob = store.put(plain.clone()).await;
    overwrite(&store.file_of(blob), |bytes| bytes[1_234_567] ^= 1);
    assert_eq!(store.pack(AT_ONCE).await, PackTally::default());
    eventually(|| async { (store.inspect().await.tally.damaged == 1).then_some(()) }).await;
    assert!(!store.has(blob).await);
    store.put(plain.clone()).await;
    assert_eq!(store.pack(AT_ONCE).await.blobs, 1);
    store.check(&plain).await;
}

/// Each kind of damage is found while the server runs and after a restart. The next upload restores the blob.
#[actix::test]
async fn a_damaged_packed_file_is_a_miss_and_heals() {
    let mut store = TestStore::of_files().await;
    let (plain, other) = (text(1_000_000, 1), text(1_000_000, 2));
    let blob = store.put(plain.clone()).await;
    let other = store.put(other).await;
    assert_eq!(store.pack(AT_ONCE).await.blobs, 2);
    let others = fs::read(store.file_of(other)).unwrap();
    let flip = |at: fn(usize) -> usize| {
        move |bytes: &mut Vec<u8>| {
            let at = at(bytes.len());
            bytes[at] ^= 4;
        }
    };
    let damages: [Damage; 7] = [
        Box::new(flip(|_| 10)),
        Box::new(flip(|length| length / 2)),
        Box::new(flip(|length| length - 1)),
        Box::new(flip(|length| length - 150)),
        Box::new(|bytes| bytes.truncate(bytes.len() / 2)),
        Box::new(|bytes| bytes.clear()),
        Box::new(move |bytes| *bytes = others.clone()),
    ];
    for (number, damage) in damages.iter().enumerate() {
        for restarts in [false, true] {
            overwrite(&store.file_of(blob), damage);
            if restarts {
                store = store.restart().await;
            }
            store.fails_to_read(&plain, number % 2 == 0).await;
            assert!(!store.has(blob).await, "{number}");
            assert!(matches!(store.get(blob).await, Err(Error::NotFound(_))), "{number}");
            store.put(plain.clone()).await;
            assert_eq!(store.pack(AT_ONCE).await.blobs, 1, "{number}");
            store.check(&plain).await;
        }
    }
}

/// A stream that has begun ends with an error, never with other bytes.
#[actix::test]
async fn a_packed_file_that_is_damaged_under_a_reader_ends_the_read() {
    use std::os::unix::fs::FileExt as _;
    let store = TestStore::of_files().await;
    let plain = text(3_000_000, 1);
    let blob = store.put(plain.clone()).await;
    store.pack(AT_ONCE).await;
    let reader = store.cas.open(&store.main, blob).await.unwrap();
    assert_eq!(reader.read_at(0, 1_000).await.unwrap(), plain[..1_000]);
    let path = store.file_of(blob);
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    let file = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let (mut byte, at) = ([0], file.metadata().unwrap().len() / 2);
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    drop(file);
    let mut at = 1_000;
    let outcome = loop {
        match reader.read_at(at as u64, 100_000).await {
            Ok(piece) => {
                assert!(!piece.is_empty() && piece == plain[at..at + piece.len()]);
                at += piece.len();
            }
            Err(error) => break error,
        }
    };
    assert!(matches!(outcome, Error::Unavailable(_)), "{outcome}");
    assert!(!store.has(blob).await);
}

/// Every state in which a kill can leave the two files of a blob.
#[actix::test]
async fn whatever_a_kill_leaves_behind_is_one_right_blob() {
    let mut store = TestStore::of_files().await;
    let plain = text(3_000_000, 1);
    let blob = store.put(plain.clone()).await;
    let plain_path = store.file_of(blob);
    let plain_bytes = fs::read(&plain_path).unwrap();
    // A kill before the new file has its final name leaves this.
    fs::write(store.root.path().join("store/v1/tmp/77"), &plain_bytes[..500_000]).unwrap();
    store = store.restart().await;
    store.check(&plain).await;
    assert_eq!(store.pack(AT_ONCE).await.blobs, 1);
    store.when_deleted().await;
    let packed = store.file_of(blob);
    // A kill after that, and before the plain file is deleted, leaves this.
    fs::write(&plain_path, &plain_bytes).unwrap();
    store = store.restart().await;
    assert_eq!(store.files_of(blob), [packed]);
    let totals = store.inspect().await.totals;
    assert_eq!(totals.packed_blobs, 1);
    assert_eq!(totals.used, store.bytes_of_files(), "only one of the two counts");
    store.check(&plain).await;
}

/// Compressing a blob does not count as a use: the order of use stays, and the time of the last use is kept
/// on disk.
#[actix::test]
async fn the_order_of_use_stays_and_nothing_is_evicted() {
    let store = TestStore::with_limit(4 * MB).await;
    let (old, new) = (text(MB as usize, 1), text(MB as usize, 2));
    store.put(old.clone()).await;
    store.put(new.clone()).await;
    let used_at = |path: PathBuf| fs::metadata(path).unwrap().atime();
    let before = used_at(store.file_of(digest(&old)));
    assert_eq!(store.pack(AT_ONCE).await.blobs, 2);
    let totals = store.when_deleted().await;
    assert_eq!((totals.blobs, store.inspect().await.tally.evicted), (2, 0));
    assert!((used_at(store.file_of(digest(&old))) - before).abs() <= 1);
    // This is the room that was saved, and no more.
    let rest = totals.limit - totals.used - totals.overhead - 100_000;
    store.put(noise(rest as usize, 3)).await;
    assert_eq!(store.files_of(digest(&old)).len(), 1);
    store.put(noise(200_000, 4)).await;
    assert!(!store.has(digest(&old)).await, "the older one goes first");
    assert!(store.has(digest(&new)).await);
}

#[actix::test]
async fn a_blob_for_which_there_is_no_room_twice_is_left_alone() {
    let store = TestStore::with_limit(2 * MB).await;
    let plain = text(MB as usize, 1);
    store.put(plain.clone()).await;
    store.put(noise(MB as usize - 100_000, 2)).await;
    assert_eq!(store.pack(AT_ONCE).await.blobs, 0);
    assert_eq!((store.when_deleted().await.blobs, store.inspect().await.tally.evicted), (2, 0));
    store.check(&plain).await;
}

#[actix::test]
async fn a_leased_blob_is_leased_with_the_bytes_that_it_takes() {
    let store = TestStore::with_leases(200 * MB).await;
    let peer = Peer::V4(std::net::Ipv4Addr::LOCALHOST);
    let build = Owner { peer, build: crate::caller::Build::of("build") };
    let cas = store.cas.on_behalf_of(Caller::without_connection(peer)).for_build(build);
    let plain = text(3_000_000, 1);
    cas.write_many(&store.main, vec![(digest(&plain), plain.clone())]).await.unwrap().remove(0).unwrap();
    let before = store.inspect().await.totals;
    assert_eq!(before.leased, before.used);
    assert_eq!(store.pack(AT_ONCE).await.blobs, 1);
    let totals = store.when_deleted().await;
    assert_eq!((totals.leased, totals.pinned), (totals.used, totals.used));
    assert!(totals.used < before.used);
}

/// The thread does the same as the passes above, and does not keep the store open.
#[actix::test]
async fn the_thread_compresses_while_others_read_and_ends_with_the_store() {
    let root = Rc::new(TempDir::new().unwrap());
    let settings = StoreSettings {
        packing: Some(PackingSettings { cpu_percent: 50, ..AT_ONCE }),
        ..settings_at(root.path().join("store"), 200 * MB)
    };
    let mut store = TestStore::over(root, settings.clone()).await;
    let blobs: Vec<Bytes> = (0..4).map(|seed| text(700_000, seed)).collect();
    for blob in &blobs {
        store.put(blob.clone()).await;
    }
    eventually(|| async {
        for blob in &blobs {
            assert_eq!(&store.get(digest(blob)).await.unwrap(), blob);
        }
        (store.inspect().await.totals.packed_blobs == 4).then_some(())
    })
    .await;
    let TestStore { root, cas, .. } = store;
    cas.actor().send(CloseStore).await.unwrap();
    drop(cas);
    store = TestStore::over(root, settings).await;
    for blob in &blobs {
        store.check(blob).await;
    }
}
