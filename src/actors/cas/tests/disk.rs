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
