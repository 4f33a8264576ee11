//! Tests of the store over a volume in memory, which show that it relies only on the promises of the trait.

use super::{
    super::{
        index::{EntryKind, Key, Victim},
        volume::{NewFile, SyncPolicy, Volume as _, local::Local, memory::Memory, segments::Sizes},
    },
    *,
};
use std::fs::{File, read, remove_file, rename, write};

/// A store over this volume. Nothing is stored below `root`.
pub(super) async fn over(volume: &Memory, max_bytes: u64) -> TestStore {
    leasing_over(volume, max_bytes, LeaseTimes::default()).await
}

/// Such a store, in which builds have leases.
pub(super) async fn leasing_over(volume: &Memory, max_bytes: u64, leases: LeaseTimes) -> TestStore {
    let root = Rc::new(TempDir::new().unwrap());
    let instances = instances();
    let settings = StoreSettings { leases, ..settings_at(root.path().join("nowhere"), max_bytes) };
    let actor = CasActor::over(Box::new(volume.clone()), settings, Handle::current()).unwrap();
    let (main, other) = (instances.get("").unwrap(), instances.get("other/one").unwrap());
    TestStore { root, cas: actor.launch(), main, other, max_bytes }
}

/// What the deletion leaves on disk takes room until a later try removes it.
#[test]
fn a_file_that_cannot_be_deleted_counts_until_it_is_gone() {
    let (root, instances) = (TempDir::new().unwrap(), instances());
    let sizes = Sizes::of(1_000 * MB);
    let volume = Local::with_sizes(root.path(), &instances, sizes, SyncPolicy::Never).unwrap();
    let bytes = noise(LARGE, 1);
    let key = Key { digest: digest(&bytes), instance: InstanceId(0), kind: EntryKind::Blob };
    let written = volume.write(&[NewFile { key, pieces: &[bytes] }]).remove(0).unwrap();
    let before = volume.overhead();
    // Something else is in the place of its directory for a while.
    let shard = volume.place(&written.file).unwrap().0.parent().unwrap().to_owned();
    let aside = shard.with_extension("aside");
    rename(&shard, &aside).unwrap();
    write(&shard, "").unwrap();
    let failures = volume.delete(&[Victim { file: written.file, bytes: written.bytes }]);
    assert_eq!(failures.len(), 1);
    volume.delete_again();
    assert!(volume.overhead() + (64 << 10) >= before + written.bytes, "{} {before}", volume.overhead());
    remove_file(&shard).unwrap();
    rename(&aside, &shard).unwrap();
    let left = volume.overhead();
    volume.delete_again();
    assert_eq!((left - volume.overhead(), volume.open(&written.file).is_err()), (written.bytes, true));
}

#[actix::test]
async fn every_way_in_and_out_works_without_a_file_system_and_survives_a_restart() {
    let volume = Memory::default();
    let store = over(&volume, 1_000 * MB).await;
    let mut blobs = vec![Bytes::from_static(b"small"), noise(LARGE, 1)];
    for bytes in &blobs {
        store.put(bytes.clone()).await;
    }
    // This upload is long and arrives in pieces.
    let long = noise(5 * MB as usize, 2);
    let Upload::Writer(mut writer) =
        store.cas.begin_upload(&store.main, "uploads/x", digest(&long), 0).await.unwrap()
    else {
        panic!("it is not stored")
    };
    for at in (0..long.len()).step_by(500_000) {
        writer.write(long.slice(at..(at + 500_000).min(long.len()))).await.unwrap();
    }
    assert_eq!(writer.finish().await, Ok(digest(&long)));
    // The digest of this blob is not known in advance.
    let unknown = noise(MB as usize, 3);
    let mut new = store.cas.new_blob(&store.main, SHA256);
    new.write(unknown.clone()).await.unwrap();
    assert_eq!(new.finish().await, Ok(digest(&unknown)));
    // This output is copied.
    let (output, directory) = (noise(LARGE, 4), TempDir::new().unwrap());
    write(directory.path().join("o"), &output).unwrap();
    let path = directory.path().to_owned();
    let stored = store.worker(move |cas, main| {
        let mut outputs = cas.begin_outputs(&main, SHA256, 0);
        let file = File::open(path.join("o")).unwrap();
        let stored = outputs.file(&File::open(&path).unwrap(), "o", file);
        outputs.commit().and(stored)
    });
    assert_eq!(stored.await, Ok(digest(&output)));
    blobs.extend([long, unknown, output.clone()]);
    // This is a result.
    let file =
        reapi::OutputFile { path: "o".into(), digest: Some(digest(&output).to_wire()), ..Default::default() };
    let result = reapi::ActionResult { output_files: vec![file], ..Default::default() };
    let action = digest(b"action");
    store.cas.put_result(&store.main, action, result, Provenance::default()).await.unwrap();
    store.cas.actor().send(CloseStore).await.unwrap();
    drop(store);

    let store = over(&volume, 1_000 * MB).await;
    for bytes in &blobs {
        assert_eq!(store.get(digest(bytes)).await.unwrap(), bytes);
    }
    assert!(store.cas.get_result(&store.main, action).await.unwrap().is_some());
    // This input is copied out.
    let node =
        reapi::FileNode { name: "f".into(), digest: Some(digest(&output).to_wire()), ..Default::default() };
    let root = reapi::Directory { files: vec![node], ..Default::default() };
    let root = store.put(prost::Message::encode_to_vec(&root)).await;
    let path = directory.path().to_owned();
    let blob = digest(&output);
    let made = store.worker(move |cas, main| {
        let mut staged = cas.open_inputs(&main, root, Owner::default())?;
        staged.hold_all()?;
        staged.materialise(&blob, &File::open(&path).unwrap(), "f", 0o644)
    });
    assert_eq!(made.await, Ok(()));
    assert_eq!(read(directory.path().join("f")).unwrap(), output);
    assert!(!store.root.path().join("nowhere").exists());
}

/// Exactly the evicted entries are deleted from the volume.
#[actix::test]
async fn evicted_entries_leave_the_volume() {
    let volume = Memory::default();
    let store = over(&volume, MB).await;
    for seed in 0..10 {
        store.put(noise(LARGE, seed)).await;
    }
    let blobs = store.inspect().await.totals.blobs as usize;
    assert!(blobs < 10);
    eventually(|| async { (volume.len() == blobs).then_some(()) }).await;
    assert_eq!(store.get(digest(&noise(LARGE, 9))).await.unwrap(), noise(LARGE, 9));
}

/// Writers wait for the deletion of what they displace, but not for compaction that reclaims nothing. The bytes that it
/// leaves count, so they are refused in the end.
#[actix::test]
async fn writers_are_refused_while_compaction_does_not_reclaim_the_bytes_that_they_need() {
    let volume = Memory::that_reclaims_nothing();
    let store = over(&volume, MB).await;
    let write = async |seed| {
        let new = noise(100_000, seed);
        let written = store.cas.write_many(&store.main, vec![(digest(&new), new)]);
        let written = tokio::time::timeout(Duration::from_secs(30), written).await;
        written.expect("a writer waits for ever").unwrap().remove(0)
    };
    let mut refused = 0;
    for seed in 0..30 {
        match write(seed).await {
            Ok(_) => assert_eq!(refused, 0, "nothing was reclaimed since"),
            Err(Error::Exhausted { retry_after: Some(_), .. }) => refused += 1,
            Err(error) => panic!("{error}"),
        }
        assert!(store.inspect().await.totals.used + volume.overhead() <= MB);
    }
    assert!((15..22).contains(&refused), "{refused}");
    assert!(store.inspect().await.totals.used >= MB / 2, "what is stored stays");
    assert!(volume.steps_in_vain() > 0);
    volume.reclaim();
    eventually(|| async { write(100).await.ok() }).await;
}

/// An error that says nothing about a file, such as too few descriptors, is UNAVAILABLE and never a miss, and nothing
/// is dropped.
#[actix::test]
async fn errors_of_the_machine_are_unavailable_and_cost_nothing() {
    let volume = Memory::default();
    let store = over(&volume, 1_000 * MB).await;
    let blobs = [Bytes::from_static(b"small"), noise(LARGE, 1)];
    for bytes in &blobs {
        store.put(bytes.clone()).await;
    }
    let output = digest(&blobs[1]);
    let file = reapi::OutputFile { path: "o".into(), digest: Some(output.to_wire()), ..Default::default() };
    let result = reapi::ActionResult { output_files: vec![file], ..Default::default() };
    let action = digest(b"action");
    store.cas.put_result(&store.main, action, result, Provenance::default()).await.unwrap();
    for errno in [libc::EMFILE, libc::ENFILE, libc::ENOMEM, libc::EAGAIN, libc::EROFS, libc::ESTALE] {
        volume.fail_with(errno);
        store.cas.shared().recent.clear();
        store.cas.shared().results.clear();
        let error = std::io::Error::from_raw_os_error(errno);
        let is_unavailable =
            |what: &str, error: Error| assert!(matches!(error, Error::Unavailable(_)), "{what}: {error}");
        for bytes in &blobs {
            let blob = digest(bytes);
            is_unavailable("read", store.get(blob).await.unwrap_err());
            let many = store.cas.read_many(&store.main, vec![blob]).await.unwrap().remove(0);
            is_unavailable("read many", many.unwrap_err());
            assert!(store.has(blob).await, "{error} is no miss");
        }
        is_unavailable("result", store.cas.get_result(&store.main, action).await.unwrap_err());
        let new = noise(1_000, 7);
        let stored = store.cas.write_many(&store.main, vec![(digest(&new), new)]).await.unwrap().remove(0);
        is_unavailable("write", stored.unwrap_err());
        volume.fail_with(0);
        for bytes in &blobs {
            assert_eq!(store.get(digest(bytes)).await.unwrap(), bytes);
        }
        assert!(store.cas.get_result(&store.main, action).await.unwrap().is_some());
    }
    let inspection = store.inspect().await;
    assert_eq!((inspection.tally.damaged, inspection.totals.reserved), (0, 0));
}

/// They are written after they were handed over, so the batch has to remember the error.
#[actix::test]
async fn small_outputs_that_cannot_be_written_fail_their_batch_and_no_result_needs_them() {
    let volume = Memory::default();
    let store = over(&volume, 1_000 * MB).await;
    let (action, output) = (digest(b"action"), digest(b"output"));
    for with_result in [true, false] {
        let faulty = volume.clone();
        let committed = store.worker(move |cas, main| {
            let mut outputs = cas.begin_outputs(&main, SHA256, 0);
            assert_eq!(outputs.bytes(b"output".to_vec()), Ok(output));
            faulty.fail_with(libc::EMFILE);
            if with_result {
                let file = reapi::OutputFile {
                    path: "o".into(),
                    digest: Some(output.to_wire()),
                    ..Default::default()
                };
                let result = reapi::ActionResult { output_files: vec![file], ..Default::default() };
                assert!(outputs.result(action, result, Provenance::default()).is_err());
                faulty.fail_with(0);
            }
            let committed = outputs.commit();
            faulty.fail_with(0);
            committed
        });
        assert!(matches!(committed.await, Err(Error::Unavailable(_))));
        assert!(!store.has(output).await);
        assert!(store.cas.get_result(&store.main, action).await.unwrap().is_none());
    }
    assert_eq!(store.inspect().await.totals.reserved, 0);
}
