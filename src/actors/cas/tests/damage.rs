//! Tests of stored files that others have changed: changed content with all times restored, and files that were
//! replaced by something else.

use super::{
    super::{
        index::{EntryKind, Key},
        lookup::Purpose,
        upkeep::{Touch, Touched},
        volume::stamps::{COARSE_TICK, has_fine_change_times, stamp_of},
        volume::{NewFile, Volume as _, files::Files},
    },
    *,
};
use gorego_reapi::chunking::Chunking;
use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, mknodat, utimensat};
use std::{
    fs,
    os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _},
};

/// Waits until the next change of a file shows in its change time, even where change times are coarse.
fn wait_for_next_tick() {
    let directory = TempDir::new().unwrap();
    if !has_fine_change_times(directory.path()).unwrap() {
        // The store trusts a stamp only once it is older than a tick.
        std::thread::sleep(2 * COARSE_TICK);
    }
}

/// Flips a bit in the middle of a file in place, and restores everything that a user can restore.
fn tamper(path: &Path) {
    wait_for_next_tick();
    let before = fs::metadata(path).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
    let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let (mut byte, at) = ([0], before.len() / 2);
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    fs::set_permissions(path, before.permissions()).unwrap();
    set_times(path, (before.atime(), before.atime_nsec()), (before.mtime(), before.mtime_nsec()));
    let after = fs::metadata(path).unwrap();
    assert_eq!((after.len(), after.mtime_nsec()), (before.len(), before.mtime_nsec()));
}

fn set_times(path: &Path, accessed: (i64, i64), modified: (i64, i64)) {
    let at = |(tv_sec, tv_nsec)| Timespec { tv_sec, tv_nsec };
    let times = Timestamps { last_access: at(accessed), last_modification: at(modified) };
    utimensat(CWD, path, &times, AtFlags::empty()).unwrap();
}

fn is_missing<T: std::fmt::Debug>(outcome: Result<T>) {
    assert!(matches!(outcome, Err(Error::NotFound(_) | Error::MissingBlobs(_))), "{outcome:?}");
}

async fn read_zstd(store: &TestStore, blob: Digest, offset: u64) -> Result<()> {
    let mut reader = store.cas.open_zstd(&store.main, blob, offset).await?;
    while reader.next(100_000).await?.is_some() {}
    Ok(())
}

/// Reads a blob as an input file, which a worker copies from below an input root.
pub(super) async fn materialise(store: &TestStore, blob: Digest) -> Result<Bytes> {
    let file = reapi::FileNode { name: "f".into(), digest: Some(blob.to_wire()), ..Default::default() };
    let root = reapi::Directory { files: vec![file], ..Default::default() };
    let root = store.put(prost::Message::encode_to_vec(&root)).await;
    store
        .worker(move |cas, main| {
            let mut staged = cas.open_inputs(&main, root, Owner::default())?;
            staged.hold_all()?;
            let target = TempDir::new().unwrap();
            let parent = fs::File::open(target.path()).unwrap();
            staged.materialise(&blob, &parent, "f", 0o644)?;
            Ok(fs::read(target.path().join("f")).unwrap().into())
        })
        .await
}

async fn upload(store: &TestStore, bytes: &Bytes) -> bool {
    let name = "uploads/heal";
    match store.cas.begin_upload(&store.main, name, digest(bytes), 0).await.unwrap() {
        Upload::Present => false,
        Upload::Writer(mut writer) => {
            writer.write(bytes.clone()).await.unwrap();
            writer.finish().await.unwrap();
            true
        }
    }
}

/// CAS-22: in every way to read it, a changed blob is a miss, is dropped, and can be uploaded again.
#[actix::test]
async fn changed_content_is_never_served_though_size_and_mtime_are_restored() {
    let store = TestStore::new().await;
    for seed in 0..8u64 {
        let bytes = noise(LARGE, seed);
        let blob = store.put(bytes.clone()).await;
        assert_eq!(store.get(blob).await.unwrap(), bytes);
        tamper(&store.file_of(blob));
        match seed {
            0 => is_missing(store.get(blob).await),
            1 => is_missing(store.cas.read_many(&store.main, vec![blob]).await.unwrap().remove(0)),
            2 => is_missing(store.cas.read_many_zstd(&store.main, vec![blob]).await.unwrap().remove(0)),
            3 => is_missing(read_zstd(&store, blob, 0).await),
            4 => is_missing(read_zstd(&store, blob, LARGE as u64 - 1).await),
            5 => is_missing(materialise(&store, blob).await.map(drop)),
            6 => {
                let chunking = Chunking::fast_cdc(16_384, 0).unwrap();
                is_missing(store.cas.split(&store.main, blob, chunking, 1_000).await);
            }
            _ => {
                let whole = digest(&[&bytes[..], b"end"].concat());
                let end = store.put("end").await;
                let chunking = Chunking::fast_cdc(16_384, 0).unwrap();
                is_missing(store.cas.splice(&store.main, whole, vec![blob, end], chunking).await);
            }
        }
        assert!(!store.has(blob).await, "{seed}");
        assert!(upload(&store, &bytes).await);
        assert_eq!(store.get(blob).await.unwrap(), bytes, "{seed}");
    }
}

/// Weak digest functions have collisions, so a client of one instance could otherwise choose the inputs of another.
#[actix::test]
async fn a_directory_that_was_decoded_for_one_instance_is_not_used_for_another() {
    let store = TestStore::new().await;
    let file =
        reapi::FileNode { name: "f".into(), digest: Some(digest(b"x").to_wire()), ..Default::default() };
    let directory = reapi::Directory { files: vec![file], ..Default::default() };
    let root = store.put(prost::Message::encode_to_vec(&directory)).await;
    assert!(store.cas.directories(&store.main, &[root]).await.unwrap()[0].is_some());
    let memo = &store.cas.shared().directories;
    let in_instance =
        |instance: &Instance| Key { digest: root, instance: instance.blobs(), kind: EntryKind::Blob };
    assert!(memo.get(&in_instance(&store.main)).is_some());
    assert!(memo.get(&in_instance(&store.other)).is_none());
}

/// A large Directory that is not cached is read from its file.
#[actix::test]
async fn a_changed_directory_is_missing() {
    let store = TestStore::new().await;
    let file = |n| reapi::FileNode {
        name: format!("{n:05}"),
        digest: Some(digest(b"x").to_wire()),
        ..Default::default()
    };
    let directory = reapi::Directory { files: (0..2_000).map(file).collect(), ..Default::default() };
    let root = store.put(prost::Message::encode_to_vec(&directory)).await;
    assert!(root.size() > settings::SMALL_BLOB_BYTES);
    tamper(&store.file_of(root));
    assert!(store.cas.directories(&store.main, &[root]).await.unwrap()[0].is_none());
    assert!(!store.has(root).await);
}

#[actix::test]
async fn a_changed_zstd_form_is_dropped() {
    let store = TestStore::new().await;
    let bytes = Bytes::from(noise(LARGE / 2, 1).repeat(4));
    let blob = store.put(bytes).await;
    for _ in 0..3 {
        read_zstd(&store, blob, 0).await.unwrap();
    }
    let form = || store.files_of(blob).into_iter().find(|path| path.to_string_lossy().contains("/zstd/"));
    let form = eventually(|| async { form() }).await;
    eventually(|| async { (store.inspect().await.totals.zstd_forms == 1).then_some(()) }).await;
    tamper(&form);
    read_zstd(&store, blob, 0).await.unwrap();
    eventually(|| async { (!form.exists()).then_some(()) }).await;
    assert!(store.has(blob).await);
}

/// Bytes read before a change are right, and none are returned after it.
#[actix::test]
async fn a_file_that_changes_under_its_reader_ends_the_read() {
    let store = TestStore::new().await;
    let bytes = noise(LARGE, 1);
    let blob = store.put(bytes.clone()).await;
    let reader = store.cas.open(&store.main, blob).await.unwrap();
    assert_eq!(reader.read_at(0, 1_000).await.unwrap(), bytes[..1_000]);
    // A change of the times alone does not matter.
    let path = store.file_of(blob);
    set_times(&path, (1, 0), (1, 0));
    assert_eq!(reader.read_at(0, 1_000).await.unwrap(), bytes[..1_000]);
    tamper(&path);
    assert!(matches!(reader.read_at(0, 1_000).await, Err(Error::Unavailable(_))));
    assert!(!store.has(blob).await);
}

/// BS-24: a blob counts as already stored only if its file is intact, even if nobody has read it since it was damaged.
#[actix::test]
async fn every_way_to_store_a_blob_replaces_a_damaged_file() {
    let mut store = TestStore::new().await;
    for (restarted, way) in
        [false, true].into_iter().flat_map(|restarted| (0..6).map(move |way| (restarted, way)))
    {
        let bytes = noise(LARGE, way);
        let blob = store.put(bytes.clone()).await;
        assert!(!upload(&store, &bytes).await, "an intact blob is already stored");
        tamper(&store.file_of(blob));
        if restarted {
            store = store.restart().await;
        }
        match way {
            0 => assert!(upload(&store, &bytes).await),
            1 => assert_eq!(store.put(bytes.clone()).await, blob),
            2 => {
                let bytes = bytes.to_vec();
                let stored =
                    store.worker(move |cas, main| cas.begin_outputs(&main, SHA256, 0).bytes(bytes)).await;
                assert_eq!(stored, Ok(blob));
                store.inspect().await;
            }
            3 => {
                let mut new = store.cas.new_blob(&store.main, SHA256);
                new.write(bytes.clone()).await.unwrap();
                new.finish().await.unwrap();
            }
            4 => {
                let (first, second) = (bytes.slice(..100_000), bytes.slice(100_000..));
                let chunks = vec![store.put(first).await, store.put(second).await];
                let chunking = Chunking::fast_cdc(16_384, 0).unwrap();
                store.cas.splice(&store.main, blob, chunks, chunking).await.unwrap();
            }
            _ => {
                let status = store.cas.query_upload(&store.main, "uploads/x", blob).await.unwrap();
                assert!(!status.complete);
                assert!(upload(&store, &bytes).await);
            }
        }
        assert_eq!(store.get(blob).await.unwrap(), bytes, "{way}");
        eventually(|| async { (store.files_of(blob).len() == 1).then_some(()) }).await;
    }
    assert_eq!(store.inspect().await.totals.reserved, 0);
}

/// AC-03: the result is a miss even if nobody has read the damaged output since the start.
#[actix::test]
async fn a_result_is_dropped_if_an_output_was_damaged_before_a_restart() {
    for length in [1_000, LARGE] {
        let store = TestStore::new().await;
        let bytes = noise(length, 1);
        let output = store.put(bytes.clone()).await;
        let file =
            reapi::OutputFile { path: "o".into(), digest: Some(output.to_wire()), ..Default::default() };
        let result = reapi::ActionResult { output_files: vec![file], ..Default::default() };
        let (good, action) = (digest(b"good"), digest(b"action"));
        for action in [good, action] {
            store.cas.put_result(&store.main, action, result.clone(), Provenance::default()).await.unwrap();
        }
        let store = store.restart().await;
        assert!(store.cas.get_result(&store.main, good).await.unwrap().is_some(), "nothing is wrong yet");
        let store = store.restart().await;
        store.damage(output);
        // A result that was just uploaded is in memory, but its outputs are checked nevertheless.
        store.cas.put_result(&store.main, good, result, Provenance::default()).await.unwrap();
        for action in [good, action] {
            assert_eq!(store.cas.get_result(&store.main, action).await.unwrap(), None);
        }
        assert!(!store.has(output).await);
        assert_eq!(store.inspect().await.totals.results, 0);
        store.put(bytes).await;
        assert_eq!(
            store.cas.get_result(&store.main, action).await.unwrap(),
            None,
            "the dropped result does not come back"
        );
    }
}

/// Only the server's own changes of a file's change time are followed.
#[test]
fn recording_a_use_keeps_a_file_verified_only_if_it_was_verified() {
    let root = TempDir::new().unwrap();
    let files = Files::open(root.path(), &Instances::new([""]).unwrap(), SyncPolicy::Never).unwrap();
    let mut index = Index::new(1_000_000);
    let key = Key { digest: digest(b"x"), instance: InstanceId(0), kind: EntryKind::Blob };
    let pieces = [Bytes::from("x")];
    let file = files.write(&[NewFile { key, pieces: &pieces }]).remove(0).unwrap().file;
    let path = files.path(&file);
    let now = || stamp_of(&fs::metadata(&path).unwrap());
    index.reserve(1).unwrap();
    index.commit(file, 1, now(), 0);
    let found = index.renew(&key, 0).unwrap();
    wait_for_next_tick();
    let touch = |found: &index::FoundEntry| {
        let mut all = vec![];
        files.touch(&[found.file], &mut |moved| all.extend(moved));
        all.pop()
    };
    let Some(touched) = touch(&found) else { return };
    assert_eq!(touched.after, now());
    assert_ne!(touched.before, touched.after);
    index.follow(found.at, touched.before, touched.after);
    let found = index.renew(&key, 0).unwrap();
    assert_eq!(found.stamp, now());
    tamper(&path);
    let of_changed = touch(&found).unwrap();
    assert_eq!(of_changed.after, now());
    index.follow(found.at, of_changed.before, of_changed.after);
    assert_eq!(index.renew(&key, 0).unwrap().stamp, found.stamp, "a change by somebody else came first");
}

/// Readers wait a moment for the report of such a change instead of hashing the file, whose content would be wrong
/// here.
#[actix::test]
async fn a_change_that_the_server_is_about_to_report_is_waited_for() {
    let store = TestStore::new().await;
    let blob = store.put(noise(LARGE, 1)).await;
    assert!(store.get(blob).await.is_ok());
    let reader = store.cas.open(&store.main, blob).await.unwrap();
    let mut located = store.cas.locate(&store.main, &[blob], Purpose::Look).await.unwrap();
    let found = located.found.remove(0).unwrap();
    let path = store.file_of(blob);
    let before = stamp_of(&fs::metadata(&path).unwrap());
    tamper(&path);
    let after = stamp_of(&fs::metadata(&path).unwrap());
    let late = async {
        // The report comes between two looks at the stamp, which are a tick apart.
        tokio::time::sleep(COARSE_TICK / 2).await;
        store.cas.actor().do_send(Touched(vec![Touch { at: found.at, before, after }]));
    };
    let (read, opened, ()) = tokio::join!(reader.read_at(0, 10), store.cas.open(&store.main, blob), late);
    assert!(read.is_ok() && opened.is_ok(), "{read:?} {opened:?}");
}

fn put_in_place(path: &Path, what: &str, other: &Path) {
    fs::remove_file(path).unwrap();
    match what {
        "FIFO" => mknodat(CWD, path, FileType::Fifo, Mode::RUSR, 0).unwrap(),
        "directory" => {
            fs::create_dir(path).unwrap();
            fs::write(path.join("x"), "x").unwrap();
        }
        "device" => std::os::unix::fs::symlink("/dev/zero", path).unwrap(),
        _ => {
            fs::write(other, "elsewhere").unwrap();
            std::os::unix::fs::symlink(other, path).unwrap();
        }
    }
}

/// No read blocks on a file that was replaced, before or after a restart.
#[actix::test]
async fn a_file_that_was_replaced_by_something_else_is_a_miss_and_is_cleared_away() {
    let mut store = TestStore::of_files().await;
    for (restarted, what) in [false, true]
        .into_iter()
        .flat_map(|restarted| ["FIFO", "directory", "device", "link"].map(|what| (restarted, what)))
    {
        let (small, large) = (store.put("small").await, store.put(noise(LARGE, 1)).await);
        let action = digest(b"action");
        let result = reapi::ActionResult::default();
        store.cas.put_result(&store.main, action, result, Provenance::default()).await.unwrap();
        for entry in [small, large, action] {
            put_in_place(&store.file_of(entry), what, &store.root.path().join("elsewhere"));
        }
        if restarted {
            store = store.restart().await;
        }
        store.cas.shared().recent.clear();
        store.cas.shared().results.clear();
        is_missing(store.get(small).await);
        is_missing(store.get(large).await);
        assert_eq!(store.cas.get_result(&store.main, action).await.unwrap(), None);
        assert!(!store.has(small).await && !store.has(large).await);
        assert_eq!(store.inspect().await.totals.results, 0);
        let is_trash = |path: &PathBuf| path.to_string_lossy().contains("/trash/");
        eventually(|| async { store.files().iter().all(is_trash).then_some(()) }).await;
    }
}
