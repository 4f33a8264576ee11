//! Tests of the calls of workers: staging an input root, copying files out of it, storing outputs.

use super::*;
use crate::actors::cas::guards::ReserveRoom;
use prost::Message as _;
use std::{
    fs::File,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink},
};

fn message(files: &[(&str, Digest)], directories: &[(&str, Digest)]) -> Vec<u8> {
    let file = |(name, digest): &(&str, Digest)| reapi::FileNode {
        name: (*name).into(),
        digest: Some(digest.to_wire()),
        ..Default::default()
    };
    let directory = |(name, digest): &(&str, Digest)| reapi::DirectoryNode {
        name: (*name).into(),
        digest: Some(digest.to_wire()),
    };
    reapi::Directory {
        files: files.iter().map(file).collect(),
        directories: directories.iter().map(directory).collect(),
        ..Default::default()
    }
    .encode_to_vec()
}

async fn check(store: &TestStore, root: Digest) -> Result<()> {
    store.cas.check_inputs(&store.main, root).await
}

async fn stage(store: &TestStore, root: Digest) -> Result<ActionInputs> {
    let stage = move |cas: Cas, main: Instance| {
        let mut inputs = cas.open_inputs(&main, root, Owner::default())?;
        inputs.hold_all().map(|()| inputs)
    };
    store.worker(stage).await
}

fn store_bytes(cas: &Cas, main: &Instance, bytes: impl Into<Vec<u8>>) -> Result<Digest> {
    let mut batch = cas.begin_outputs(main, SHA256, 0);
    let digest = batch.bytes(bytes.into())?;
    batch.commit().map(|()| digest)
}

/// EXE-26: one answer names missing files of several directories and missing directories.
#[actix::test]
async fn everything_missing_of_an_input_root_is_reported_at_once() {
    let store = TestStore::new().await;
    let present = store.put("present").await;
    let (absent_1, absent_2) = (digest(b"absent 1"), digest(b"absent 2"));
    let absent_directory = digest(b"absent directory");
    let child = message(&[("a", absent_2), ("b", absent_1), ("c", digest(b""))], &[]);
    let child = store.put(child).await;
    let root = message(
        &[("p", present), ("x", absent_1)],
        &[("child", child), ("gone", absent_directory), ("again", child), ("empty", digest(b""))],
    );
    let root = store.put(root).await;
    for answer in [check(&store, root).await, stage(&store, root).await.map(drop)] {
        let Err(Error::MissingBlobs(mut missing)) = answer else { panic!("{answer:?}") };
        missing.sort();
        let mut expected = [absent_1, absent_2, absent_directory];
        expected.sort();
        assert_eq!(missing, expected);
    }
    for bytes in ["absent 1", "absent 2", "absent directory"] {
        store.put(bytes).await;
    }
    let error = check(&store, root).await.unwrap_err();
    assert!(matches!(error, Error::Invalid(message) if message.contains("Directory")));
}

#[actix::test]
async fn an_empty_input_root_needs_nothing() {
    let store = TestStore::new().await;
    assert_eq!(check(&store, digest(b"")).await, Ok(()));
    assert_eq!(stage(&store, digest(b"")).await.unwrap().tree().nodes(), 0);
}

#[actix::test]
async fn an_input_root_ten_thousand_directories_deep_is_refused() {
    let store = TestStore::new().await;
    let (mut below, mut batch) = (digest(b""), vec![]);
    for _ in 0..10_000 {
        let bytes = Bytes::from(message(&[], &[("d", below)]));
        below = digest(&bytes);
        batch.push((below, bytes));
    }
    assert!(store.cas.write_many(&store.main, batch).await.unwrap().iter().all(Result::is_ok));
    assert!(matches!(check(&store, below).await, Err(Error::Invalid(message)) if message.contains("deeper")));
}

/// The inputs of a running action are not evicted, but may be when it has ended.
#[actix::test]
async fn staged_inputs_stay_until_they_are_dropped() {
    let store = TestStore::with_limit(MB).await;
    let (small, large) = (store.put(noise(100, 1)).await, store.put(noise(LARGE, 2)).await);
    let root = store.put(message(&[("small", small), ("large", large)], &[])).await;
    let staged = stage(&store, root).await.unwrap();
    for seed in 10..40 {
        store.put(noise(200_000, seed)).await;
    }
    assert!(store.cas.find_missing(&store.main, &[small, large, root]).await.unwrap().is_empty());
    assert!(store.inspect().await.totals.held >= LARGE as u64);
    drop(staged);
    assert_eq!(store.inspect().await.totals.held, 0);
    for seed in 10..40 {
        store.put(noise(200_000, seed)).await;
    }
    assert!(!store.has(large).await);
}

/// A client that has just uploaded its inputs does not wait for a second check of each, and an action whose inputs are
/// staged never needs them from the store.
#[actix::test]
async fn a_root_that_was_just_checked_costs_no_look_ups_until_its_blobs_are_needed() {
    let store = TestStore::with_limit(MB).await;
    let file = store.put(noise(LARGE, 1)).await;
    let root = store.put(message(&[("f", file)], &[])).await;
    check(&store, root).await.unwrap();
    for seed in 10..40 {
        store.put(noise(200_000, seed)).await;
    }
    assert_eq!(store.cas.check_inputs_apart(store.main.clone(), root).await, Ok(()));
    let open = move |cas: Cas, main: Instance| cas.open_inputs(&main, root, Owner::default());
    let mut inputs = store.worker(open).await.unwrap();
    assert_eq!(inputs.tree().nodes(), 1);
    let (nothing, one, all) = store
        .worker(move |_, _| (inputs.hold(vec![digest(b"")]), inputs.hold(vec![file]), inputs.hold_all()))
        .await;
    let mut missing = vec![file, root];
    missing.sort();
    assert_eq!(nothing, Ok(()));
    assert_eq!((one, all), (Err(Error::MissingBlobs(vec![file])), Err(Error::MissingBlobs(missing.clone()))));
    let Err(Error::MissingBlobs(found)) = check(&store, root).await else { panic!("it is complete") };
    assert_eq!(found, missing);
}

/// A result may refer to inputs that its action left as they were.
#[actix::test]
async fn stored_blobs_that_a_result_refers_to_stay_until_the_end_of_its_batch() {
    let store = TestStore::with_limit(MB).await;
    let input = store.put(noise(LARGE, 1)).await;
    let hold = move |cas: Cas, main: Instance| {
        let mut batch = cas.begin_outputs(&main, SHA256, 0);
        batch.hold(vec![input, digest(b"")]).map(|()| batch)
    };
    let batch = store.worker(hold).await.unwrap();
    for seed in 10..40 {
        store.put(noise(200_000, seed)).await;
    }
    assert!(store.has(input).await);
    store.worker(move |_, _| batch.commit()).await.unwrap();
    for seed in 10..40 {
        store.put(noise(200_000, seed)).await;
    }
    assert_eq!(store.worker(hold).await.unwrap_err(), Error::MissingBlobs(vec![input]));
}

/// EXE-37: a worker sees the properties that goREgo itself does not apply, even when the root comes from memory.
#[actix::test]
async fn a_staged_input_root_has_the_node_properties_that_its_client_sent() {
    let store = TestStore::new().await;
    let property = reapi::NodeProperty { name: "bazel_tool_input".into(), value: String::new() };
    let tool = reapi::FileNode {
        name: "tool".into(),
        digest: Some(store.put("tool").await.to_wire()),
        node_properties: Some(reapi::NodeProperties { properties: vec![property], ..Default::default() }),
        ..Default::default()
    };
    let root = reapi::Directory { files: vec![tool], ..Default::default() };
    let root = store.put(root.encode_to_vec()).await;
    for _ in 0..2 {
        let staged = stage(&store, root).await.unwrap();
        let [tool] = &*staged.tree().root().files else { panic!("{staged:?}") };
        assert_eq!(tool.properties.named.get("bazel_tool_input"), Some(""));
    }
}

/// EXE-43: an action may change its inputs.
#[actix::test]
async fn inputs_are_copies_with_the_mode_asked_for() {
    let store = TestStore::new().await;
    let contents = [Bytes::new(), noise(100, 1), noise(LARGE, 2)];
    let mut files = vec![];
    for bytes in &contents {
        files.push(store.put(bytes.clone()).await);
    }
    let named: Vec<(&str, Digest)> = ["a", "b", "c"].into_iter().zip(files.iter().copied()).collect();
    let root = store.put(message(&named, &[])).await;
    let target = TempDir::new().unwrap();
    let path = target.path().to_owned();
    let work = files.clone();
    let staged = stage(&store, root).await.unwrap();
    store
        .worker(move |_, _| {
            let parent = File::open(&path).unwrap();
            for (n, file) in work.iter().enumerate() {
                staged.materialise(file, &parent, &format!("{n}"), 0o755).unwrap();
                // A second file of this name, or a link of this name, is an error and changes nothing.
                symlink(path.join("elsewhere"), path.join(format!("link{n}"))).unwrap();
                for name in [format!("{n}"), format!("link{n}")] {
                    assert!(staged.materialise(file, &parent, &name, 0o644).is_err());
                }
            }
            assert!(!path.join("elsewhere").exists());
        })
        .await;
    for (n, bytes) in contents.iter().enumerate() {
        let path = target.path().join(format!("{n}"));
        assert_eq!(&std::fs::read(&path).unwrap(), bytes);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o755);
        std::fs::write(&path, "changed by the action").unwrap();
        assert_eq!(&store.get(files[n]).await.unwrap(), bytes);
    }
}

#[actix::test]
async fn a_damaged_input_is_a_missing_blob() {
    let store = TestStore::new().await;
    let file = store.put(noise(1_000, 1)).await;
    let root = store.put(message(&[("f", file)], &[])).await;
    let staged = stage(&store, root).await.unwrap();
    store.damage(file);
    let target = TempDir::new().unwrap();
    let parent = File::open(target.path()).unwrap();
    let outcome = store.worker(move |_, _| staged.materialise(&file, &parent, "f", 0o644)).await;
    assert_eq!(outcome, Err(Error::MissingBlobs(vec![file])));
    assert!(!target.path().join("f").exists());
    assert!(!store.has(file).await);
}

/// A file is moved into the store if that is safe and copied otherwise. In both cases, nobody else can write it.
#[actix::test]
async fn outputs_are_moved_or_copied_and_belong_to_the_store_afterwards() {
    let store = TestStore::new().await;
    // The directory is on the same file system as the store.
    let exec = store.root.path().join("exec");
    std::fs::create_dir(&exec).unwrap();
    let inode = |path: &Path| std::fs::metadata(path).unwrap().ino();
    let (plain, linked) = (noise(LARGE, 1), noise(LARGE, 2));
    std::fs::write(exec.join("plain"), &plain).unwrap();
    std::fs::write(exec.join("linked"), &linked).unwrap();
    std::fs::hard_link(exec.join("linked"), exec.join("link")).unwrap();
    std::fs::write(exec.join("empty"), "").unwrap();
    std::fs::write(exec.join("open"), &plain[1..]).unwrap();
    let writer = File::options().write(true).open(exec.join("open")).unwrap();
    let of_open = inode(&exec.join("open"));
    let [of_plain, of_linked] = ["plain", "linked"].map(|name| inode(&exec.join(name)));
    let path = exec.clone();
    let digests = store
        .worker(move |cas, main| {
            let parent = File::open(&path).unwrap();
            let mut batch = cas.begin_outputs(&main, SHA256, 0);
            let digests = ["plain", "linked", "link", "empty", "open"]
                .map(|name| batch.file(&parent, name, File::open(path.join(name)).unwrap()).unwrap());
            batch.commit().unwrap();
            digests
        })
        .await;
    assert_eq!(digests, [digest(&plain), digest(&linked), digest(&linked), digest(b""), digest(&plain[1..])]);
    assert_eq!(inode(&store.file_of(digests[0])), of_plain);
    assert!(!exec.join("plain").exists(), "removing a second name would move the change time again");
    assert_ne!(inode(&store.file_of(digests[1])), of_linked);
    assert_ne!(inode(&store.file_of(digests[4])), of_open, "somebody could still write it");
    drop(writer);
    std::fs::write(exec.join("link"), "written through the other link").unwrap();
    std::fs::remove_dir_all(&exec).unwrap();
    for (blob, bytes) in [(digests[0], plain), (digests[1], linked)] {
        assert_eq!(store.get(blob).await.unwrap(), bytes);
        let mode = std::fs::metadata(store.file_of(blob)).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o444);
    }
    let bytes = store.worker(|cas, main| store_bytes(&cas, &main, "log").unwrap()).await;
    assert_eq!(store.get(bytes).await.unwrap(), "log");
    assert_eq!(store.inspect().await.totals.reserved, 0);
}

/// Room is reserved ahead only if there is room, whatever the worker expects. Unused room is given back.
#[actix::test]
async fn outputs_become_visible_together_and_those_of_a_failed_run_are_kept_too() {
    let store = TestStore::with_limit(MB).await;
    for (expected, commits) in [(0, true), (64 * 4_096, true), (1_000 * MB, true), (64 * 4_096, false)] {
        let seed = expected + u64::from(commits);
        let blobs = store
            .worker(move |cas, main| {
                let mut batch = cas.begin_outputs(&main, SHA256, expected);
                let mut blobs = vec![];
                for n in 0..32 {
                    let bytes = noise(100, seed * 100 + n).to_vec();
                    blobs.push(batch.bytes(bytes.clone()).unwrap());
                    assert_eq!(batch.bytes(bytes).unwrap(), blobs[blobs.len() - 1], "stored once");
                }
                if commits {
                    batch.commit().unwrap();
                }
                blobs
            })
            .await;
        assert_eq!(store.inspect().await.totals.reserved, 0);
        assert_eq!(store.cas.find_missing(&store.main, &blobs).await.unwrap(), [], "{expected}");
    }
}

/// This includes outputs that exceed the room reserved ahead. Otherwise they would take room that is reserved for
/// others.
#[actix::test]
async fn all_outputs_that_are_not_visible_yet_have_room() {
    let store = TestStore::with_limit(MB).await;
    let held =
        store.cas.ask(ReserveRoom { bytes: 4_096, of: 4_096, held: 0, blob: None }).await.unwrap().unwrap();
    for expected in [0, 3 * 4_096] {
        let (cas, main) = (store.cas.clone(), store.main.clone());
        let batch = store
            .worker(move |_, _| {
                let mut batch = cas.begin_outputs(&main, SHA256, expected);
                for n in 0..8 {
                    batch.bytes(noise(100, expected + n).to_vec()).unwrap();
                }
                batch
            })
            .await;
        assert_eq!(store.inspect().await.totals.reserved, 9 * 4_096);
        store.worker(move |_, _| batch.commit().unwrap()).await;
        assert_eq!(store.inspect().await.totals.reserved, held.bytes());
    }
}

#[actix::test]
async fn a_worker_records_a_result_that_the_next_lookup_finds() {
    let store = TestStore::new().await;
    let action = digest(b"action");
    let result = reapi::ActionResult { stdout_raw: Bytes::from("out"), ..Default::default() };
    let provenance =
        Provenance { worker: "host/0".into(), tool_invocation_id: "i".into(), ..Provenance::default() };
    let record = move |cas: Cas, main: Instance| {
        let mut batch = cas.begin_outputs(&main, SHA256, 0);
        batch.result(action, result, provenance).unwrap();
        let is_known = |cas: &Cas| cas.action_by_hash(&main, action).unwrap().is_some();
        assert!(!is_known(&cas), "it becomes visible with the outputs");
        batch.commit().unwrap();
        assert!(is_known(&cas));
    };
    store.worker(record).await;
    let found = store.cas.get_result(&store.main, action).await.unwrap().unwrap();
    assert_eq!(found.stdout_digest, Some(digest(b"out").to_wire()));
    assert_eq!(store.inspect().await.totals.reserved, 0);
}

/// Reserved room is spent only once: files that are written and not visible yet keep theirs.
#[actix::test]
async fn a_batch_always_has_room_for_everything_that_it_wrote() {
    let store = TestStore::with_limit(MB).await;
    let batch = store
        .worker(|cas, main| {
            let mut batch = cas.begin_outputs(&main, SHA256, 0);
            for n in 1..20 {
                batch.bytes(noise(n * 4_096, n as u64).to_vec()).unwrap();
            }
            batch
        })
        .await;
    let written = (1..20).map(|n| n * 4_096).sum::<u64>();
    assert!(store.inspect().await.totals.reserved >= written);
    let batch = store.worker(move |_, _| {
        let mut batch = batch;
        batch.publish().map(|()| batch).unwrap()
    });
    let batch = batch.await;
    assert_eq!(store.inspect().await.totals.used, written);
    drop(batch);
    eventually(|| async { (store.inspect().await.totals.reserved == 0).then_some(()) }).await;
}
