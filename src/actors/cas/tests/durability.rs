//! Tests of `durability = "disk"`: entries are synced before they are acknowledged.

use super::{
    super::volume::{SyncPolicy, simulation::SimulatedDisk},
    *,
};
use std::fs;

async fn durable(root: Rc<TempDir>, max_bytes: u64) -> TestStore {
    let settings =
        StoreSettings { sync: SyncPolicy::BeforeAnswer, ..settings_at(root.path().join("store"), max_bytes) };
    TestStore::over(root, settings).await
}

/// Stores blobs of each size and results in each way. Returns the acknowledged ones.
async fn put_all(store: &TestStore, seed: u64) -> Vec<Result<Bytes>> {
    let all = [
        noise(3_000, seed),
        noise(LARGE, seed + 1),
        noise(2 * MB as usize, seed + 2),
        noise(90_000, seed + 3),
    ];
    let mut acknowledged = vec![];
    for bytes in &all[..2] {
        let outcome = store.cas.write_many(&store.main, vec![(digest(bytes), bytes.clone())]).await;
        acknowledged.push(outcome.and_then(|mut outcomes| outcomes.remove(0)).map(|()| bytes.clone()));
    }
    let begun = store.cas.begin_upload(&store.main, "uploads/x", digest(&all[2]), 0).await.unwrap();
    let Upload::Writer(mut writer) = begun else { panic!("it is not stored") };
    writer.write(all[2].clone()).await.unwrap();
    acknowledged.push(writer.finish().await.map(|_| all[2].clone()));
    let directory = store.root.path().join("outputs");
    fs::create_dir_all(&directory).unwrap();
    fs::write(directory.join("o"), &all[3]).unwrap();
    let stored = store.worker(move |cas, main| {
        let mut outputs = cas.begin_outputs(&main, SHA256, 0);
        let file = fs::File::open(directory.join("o")).unwrap();
        let stored = outputs.file(&fs::File::open(&directory).unwrap(), "o", file);
        outputs.commit().and(stored)
    });
    acknowledged.push(stored.await.map(|_| all[3].clone()));
    acknowledged
}

/// A blob exists after a power cut, in whichever way it was stored, and so does a result.
#[actix::test]
async fn what_was_acknowledged_survives_a_power_cut() {
    for max_bytes in [1_000 * MB, 200 * MB] {
        let root = Rc::new(TempDir::new().unwrap());
        let disk = SimulatedDisk::new(root.path(), max_bytes);
        let store = durable(root, max_bytes).await;
        let mut all = put_all(&store, 10).await;
        all.extend(put_all(&store, 20).await);
        let (action, output) = (digest(b"action"), all[0].clone().unwrap());
        let file = reapi::OutputFile {
            path: "o".into(),
            digest: Some(digest(&output).to_wire()),
            ..Default::default()
        };
        let result = reapi::ActionResult { output_files: vec![file], ..Default::default() };
        store.cas.put_result(&store.main, action, result, Provenance::default()).await.unwrap();
        let image = Rc::new(disk.cut_power());
        let store = durable(image, max_bytes).await;
        for bytes in all {
            let bytes = bytes.unwrap();
            assert_eq!(store.get(digest(&bytes)).await.unwrap(), bytes);
        }
        assert!(store.cas.get_result(&store.main, action).await.unwrap().is_some());
    }
}

/// Entries that cannot be synced are not acknowledged and do not become visible.
#[actix::test]
async fn a_disk_that_cannot_sync_fails_uploads() {
    let root = Rc::new(TempDir::new().unwrap());
    let disk = SimulatedDisk::new(root.path(), 1);
    let store = durable(root, 1_000 * MB).await;
    let before = put_all(&store, 10).await;
    assert!(before.iter().all(Result::is_ok), "{before:?}");
    disk.fail_syncs(true);
    let failed = put_all(&store, 20).await;
    for (at, outcome) in failed.iter().enumerate() {
        assert!(outcome.is_err(), "{at}");
    }
    assert_eq!(store.inspect().await.totals.blobs, 4, "only what was acknowledged");
    assert!(!store.has(digest(&noise(3_000, 20))).await);
    disk.fail_syncs(false);
    let after = put_all(&store, 20).await;
    assert!(after.iter().all(Result::is_ok), "{after:?}");
    assert_eq!(store.inspect().await.totals.reserved, 0);
}
