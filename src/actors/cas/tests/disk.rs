//! Tests of the file system of the store: other data on it, and writes that find no room.

use super::*;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// One limit applies to the store and to the data that the server keeps beside it, which takes at most half.
#[actix::test]
async fn what_is_beside_the_store_counts_against_its_limit_up_to_half() {
    let store = TestStore::with_limit(10 * MB).await;
    let beside = Arc::new(AtomicU64::new(0));
    let measured = beside.clone();
    store.cas.count_beside("test", move || measured.load(Relaxed));
    for seed in 0..9 {
        store.put(noise(1_000_000, seed)).await;
    }
    for (taken, counted) in [(3 * MB, 3 * MB), (100 * MB, 5 * MB)] {
        beside.store(taken, Relaxed);
        let is_seen = || async { (store.cas.disk_sight().beside == [("test", taken)]).then_some(()) };
        eventually(is_seen).await;
        store.put(noise(10_000, taken)).await;
        let totals = store.inspect().await.totals;
        let of_volume = store.cas.shared().volume.overhead();
        assert_eq!(totals.overhead, counted + of_volume);
        assert!(totals.used + totals.overhead <= totals.limit, "{totals:?}");
        assert!(totals.used + totals.overhead > totals.limit - 2 * MB, "no more is evicted: {totals:?}");
    }
}

/// With a quota, the file system seems to have room, but a write fails.
#[actix::test]
async fn after_a_write_that_found_no_room_others_are_refused_and_reads_go_on() {
    let store = TestStore::new().await;
    let stored = store.put("stored").await;
    assert!(store.cas.shared().disk.note::<()>(Err(Error::DiskFull("no room".into()))).is_err());
    let (blob, large) = (Bytes::from("new"), digest(&noise(LARGE, 1)));
    let refused = store.cas.write_many(&store.main, vec![(digest(&blob), blob)]).await.unwrap().remove(0);
    assert!(matches!(refused, Err(Error::DiskFull(_))), "{refused:?}");
    let refused = store.cas.begin_upload(&store.main, "u", large, 0).await.map(drop);
    assert!(matches!(refused, Err(Error::DiskFull(_))), "{refused:?}");
    let result = reapi::ActionResult::default();
    let refused = store.cas.put_result(&store.main, digest(b"a"), result, Provenance::default()).await;
    assert!(matches!(refused, Err(Error::DiskFull(_))), "{refused:?}");
    assert_eq!(store.get(stored).await.unwrap(), "stored");
    assert!(store.has(stored).await && store.cas.is_read_only());
}

/// The worker must not wait within a wait: tokio panics then, and copies that the index does not know stay behind.
#[actix::test]
async fn a_worker_that_found_no_room_reclaims_the_bytes_of_deleted_results() {
    // The smallest store with segments.
    let store = TestStore::with_limit(270 * MB).await;
    let no_background_work = store.cas.shared().compaction_turn.clone().try_acquire_owned().unwrap();
    let action = |number: u64| digest(&number.to_le_bytes());
    let write = async |number, length| {
        let link =
            reapi::OutputSymlink { path: "link".into(), target: "t".repeat(length), ..Default::default() };
        let result = reapi::ActionResult { output_symlinks: vec![link], ..Default::default() };
        store.cas.put_result(&store.main, action(number), result, Provenance::default()).await.unwrap();
    };
    for number in 0..600 {
        write(number, 2_000).await;
    }
    let (first, ..) = store.place_of(action(0));
    assert_ne!(first, store.place_of(action(599)).0, "the first segment is full");
    for number in (0..400).step_by(2) {
        write(number, 1).await;
    }
    assert!(first.exists());
    let reclaimed = || async {
        store.worker(|cas, _| cas.relieve_disk(&|| false)).await;
        (!first.exists()).then_some(())
    };
    eventually(reclaimed).await;
    drop(no_background_work);
    let kept = store.inspect().await.totals.results;
    let store = store.restart().await;
    assert_eq!(store.inspect().await.totals.results, kept, "a replaced result is back");
}
