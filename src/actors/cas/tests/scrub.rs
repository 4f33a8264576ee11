//! Tests of the scrub: it finds damage without any read, and continues after a stop.

use super::{checksums::flip, *};
use std::fs;

impl TestStore {
    /// Opens a store that is scrubbed at this rate.
    async fn scrubbed(root: Rc<TempDir>, bytes_per_second: u64) -> Self {
        let settings = StoreSettings {
            scrub_bytes_per_second: bytes_per_second,
            ..settings_at(root.path().join("store"), 1_000 * MB)
        };
        Self::over(root, settings).await
    }

    async fn close(self) -> Rc<TempDir> {
        let Self { root, cas, .. } = self;
        cas.actor().send(CloseStore).await.unwrap();
        root
    }

    async fn scrub_to_its_end(&self) -> ScrubTally {
        eventually(|| async {
            let tally = self.cas.measure().scrub;
            (tally.passes > 0).then_some(tally)
        })
        .await
    }
}

const FAST: u64 = 10_000 * MB;

/// Makes a closed store look as if its server was killed, by removing the note that closing leaves.
fn killed(root: Rc<TempDir>) -> Rc<TempDir> {
    fs::remove_file(root.path().join("store/note")).unwrap();
    root
}

async fn put_result(store: &TestStore, action: Digest) {
    let result = reapi::ActionResult::default();
    store.cas.put_result(&store.main, action, result, Provenance::default()).await.unwrap();
}

/// After an unclean stop, all entries are verified, even those that are not read, and damaged ones are
/// dropped.
#[actix::test]
async fn damage_of_any_kind_is_found_without_a_read() {
    let store = TestStore::new().await;
    let (large, small, cut) = (noise(3 * MB as usize, 1), noise(5_000, 2), noise(LARGE, 3));
    let blobs = [store.put(large.clone()).await, store.put(small).await, store.put(cut).await];
    let good = [store.put(noise(LARGE, 4)).await, store.put("good").await];
    let (action, kept) = (digest(b"action"), digest(b"kept"));
    put_result(&store, action).await;
    put_result(&store, kept).await;
    // A start scans the last segment and gives it a table, which later starts trust.
    let store = store.restart().await;
    let path = store.file_of(blobs[0]);
    flip(&path, 2 * MB);
    store.damage(blobs[1]);
    fs::remove_file(store.file_of(blobs[2])).unwrap();
    store.damage(action);
    // A file that vanishes while the server runs is noticed, too.
    let store = TestStore::scrubbed(killed(store.close().await), FAST).await;
    let tally = store.scrub_to_its_end().await;
    assert_eq!(tally.damaged, 3, "the file that was removed is not found by the start");
    assert!(tally.bytes > 2 * MB, "all before the damaged block");
    for blob in blobs {
        assert!(!store.has(blob).await);
    }
    for blob in good {
        assert!(store.has(blob).await);
    }
    let totals = store.inspect().await.totals;
    assert_eq!((totals.blobs, totals.results), (2, 1));
    assert_eq!(store.inspect().await.tally.damaged, 3);
    eventually(|| async { (!path.exists()).then_some(()) }).await;
    // An upload restores the blob.
    assert_eq!(store.put(large.clone()).await, blobs[0]);
    assert_eq!(store.get(blobs[0]).await.unwrap(), large);
}

/// A store of an earlier version gets its checksums without being read by clients.
#[actix::test]
async fn the_scrub_gives_checksums_to_files_that_have_none() {
    let store = TestStore::new().await;
    let blob = store.put(noise(3 * MB as usize, 1)).await;
    let root = killed(store.close().await);
    let checksums = root.path().join("store/checksums");
    fs::remove_dir_all(&checksums).unwrap();
    fs::write(root.path().join("store/format"), "gorego store 2\n").unwrap();
    let store = TestStore::scrubbed(root, FAST).await;
    store.scrub_to_its_end().await;
    let path = store.file_of(blob);
    let store = TestStore::at(store.close().await, 1_000 * MB).await;
    flip(&path, 2 * MB);
    let reader = store.cas.open(&store.main, blob).await.unwrap();
    assert!(matches!(read_all(&reader).await, Err(Error::Unavailable(_))), "its checksums tell");
}

/// After a clean stop, a pass continues where it was, and a finished pass is not repeated.
#[actix::test]
async fn a_clean_stop_neither_repeats_nor_loses_a_pass() {
    let store = TestStore::new().await;
    for seed in 0..40 {
        store.put(noise(LARGE, seed)).await;
    }
    // The rate is low enough that the pass is stopped in the middle.
    let store = TestStore::scrubbed(killed(store.close().await), 2 * MB).await;
    eventually(|| async { (store.cas.measure().scrub.bytes > 3 * LARGE as u64).then_some(()) }).await;
    let before = store.cas.measure().scrub;
    assert_eq!(before.passes, 0);
    let store = TestStore::scrubbed(store.close().await, FAST).await;
    let after = store.scrub_to_its_end().await;
    assert!(after.bytes < 39 * LARGE as u64, "{after:?} after {before:?}");
    assert!(after.bytes + before.bytes >= 40 * LARGE as u64, "{after:?} after {before:?}");
    let note = store.root.path().join("store/note");
    let root = store.close().await;
    let of_first = fs::read_to_string(&note).unwrap();
    let store = TestStore::scrubbed(root, FAST).await;
    store.put("x").await;
    let root = store.close().await;
    assert_eq!(fs::read_to_string(root.path().join("store/note")).unwrap(), of_first, "none was due");
}
