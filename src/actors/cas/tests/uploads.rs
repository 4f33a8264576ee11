//! Tests of concurrent, broken, resumed and wrong uploads.

use super::*;
use crate::actors::cas::guards::Reservation;
use futures::{FutureExt as _, future::join_all};

const NAME: &str = "uploads/6ba7b810-9dad-11d1-80b4-00c04fd430c8/blobs/x";

async fn begin(store: &TestStore, name: &str, digest: Digest, offset: u64) -> Result<Box<BlobWriter>> {
    match store.cas.begin_upload(&store.main, name, digest, offset).await? {
        Upload::Writer(writer) => Ok(writer),
        Upload::Present => panic!("{digest} is stored"),
    }
}

pub(super) async fn send(writer: &mut BlobWriter, bytes: &Bytes, chunk: usize) -> Result<()> {
    let mut bytes = bytes.clone();
    while !bytes.is_empty() {
        writer.write(bytes.split_to(chunk.min(bytes.len()))).await?;
    }
    Ok(())
}

/// BS-21, BS-23.
#[actix::test]
async fn a_blob_becomes_visible_once_it_is_complete() {
    let store = TestStore::new().await;
    for (length, chunk) in [(1, 1), (100_000, 100_000), (9_000_000, 65_536), (5_000_000, 2_000_000)] {
        let bytes = noise(length, length as u64);
        let blob = digest(&bytes);
        let mut writer = begin(&store, NAME, blob, 0).await.unwrap();
        send(&mut writer, &bytes, chunk).await.unwrap();
        assert_eq!(writer.committed(), length as u64);
        assert!(!store.has(blob).await);
        assert_eq!(writer.finish().await.unwrap(), blob);
        assert_eq!(store.get(blob).await.unwrap(), bytes);
        assert!(matches!(store.cas.begin_upload(&store.main, NAME, blob, 0).await.unwrap(), Upload::Present));
        let status = store.cas.query_upload(&store.main, NAME, blob).await.unwrap();
        assert_eq!(status, UploadStatus { committed: length as u64, complete: true });
    }
    let inspection = store.inspect().await;
    assert_eq!(
        (inspection.totals.reserved, inspection.running_uploads, inspection.partial_uploads),
        (0, 0, 0)
    );
}

/// When the memory budget is spent, each piece is written before the next one is accepted.
#[actix::test]
async fn uploads_continue_when_there_is_no_memory_for_unwritten_bytes() {
    let store = TestStore::new().await;
    let budget = &store.cas.shared().received;
    let caller = Caller::connected("127.0.0.1:1".parse().unwrap());
    let all = budget.take(caller, budget.bounds().connection).unwrap();
    let cas = store.cas.on_behalf_of(caller);
    for (length, is_compressed) in [(100_000, false), (1_000_000, false), (900_000, true), (2_000_000, true)]
    {
        let bytes = noise(length, length as u64);
        let blob = digest(&bytes);
        let Upload::Writer(writer) = cas.begin_upload(&store.main, NAME, blob, 0).await.unwrap() else {
            panic!()
        };
        let (mut writer, sent) = match is_compressed {
            true => (writer.decoding(), Bytes::from(zstd::encode_all(&*bytes, 1).unwrap())),
            false => (*writer, bytes.clone()),
        };
        for piece in sent.chunks(30_000) {
            writer.write(Bytes::copy_from_slice(piece)).await.unwrap();
            assert_eq!(budget.held(), all.amount(), "it is written");
        }
        assert_eq!(writer.finish().await.unwrap(), blob);
        assert_eq!(store.get(blob).await.unwrap(), bytes);
    }
    let mut new = cas.new_blob(&store.main, SHA256);
    let bytes = noise(100_000, 7);
    for piece in bytes.chunks(30_000) {
        new.write(Bytes::copy_from_slice(piece)).await.unwrap();
        assert_eq!(budget.held(), all.amount(), "it is written");
    }
    assert_eq!(store.get(new.finish().await.unwrap()).await.unwrap(), bytes);
}

/// BS-22, BS-29.
#[actix::test]
async fn bytes_that_do_not_match_the_digest_leave_nothing_behind() {
    let store = TestStore::new().await;
    for length in [1_000usize, 3_000_000] {
        let (bytes, evil) = (noise(length, 1), noise(length, 2));
        let blob = digest(&bytes);
        let mut lying = begin(&store, NAME, blob, 0).await.unwrap();
        send(&mut lying, &evil, 100_000).await.unwrap();
        assert!(matches!(lying.finish().await, Err(Error::Invalid(_))));
        let mut short = begin(&store, NAME, blob, 0).await.unwrap();
        send(&mut short, &bytes.slice(1..), 100_000).await.unwrap();
        assert!(matches!(short.finish().await, Err(Error::Invalid(_))));
        let mut long = begin(&store, NAME, blob, 0).await.unwrap();
        send(&mut long, &bytes, 100_000).await.unwrap();
        assert!(
            matches!(long.write(Bytes::from("x")).await, Err(Error::Invalid(_))),
            "as soon as it is seen"
        );
        drop(long);
        assert!(!store.has(blob).await);
        eventually(|| async {
            let inspection = store.inspect().await;
            let gone = inspection.totals.reserved + inspection.totals.deleting == 0;
            (gone && inspection.partial_uploads + inspection.running_uploads == 0 && store.files().is_empty())
                .then_some(())
        })
        .await;
    }
}

/// BS-28.
#[actix::test]
async fn sixty_four_racing_uploads_of_one_blob_all_succeed_and_leave_one_file() {
    let store = TestStore::new().await;
    let bytes = noise(700_000, 1);
    let blob = digest(&bytes);
    let uploads = (0..64).map(|n| {
        let (store, bytes) = (&store, &bytes);
        async move {
            match store.cas.begin_upload(&store.main, &format!("{NAME}/{}", n % 40), blob, 0).await.unwrap() {
                Upload::Present => blob,
                Upload::Writer(mut writer) => {
                    send(&mut writer, bytes, 10_000 + n).await.unwrap();
                    writer.finish().await.unwrap()
                }
            }
        }
    });
    assert!(join_all(uploads).await.iter().all(|stored| *stored == blob));
    assert_eq!(store.get(blob).await.unwrap(), bytes);
    eventually(|| async { (store.files().len() == 1).then_some(()) }).await;
    eventually(|| async {
        let totals = store.inspect().await.totals;
        (totals.used == 700_416 && totals.reserved == 0 && totals.deleting == 0).then_some(())
    })
    .await;
}

/// BS-20, BS-31: a client that vanishes at any point can resume there or start over.
#[actix::test]
async fn a_broken_upload_is_resumed_where_it_stopped() {
    let store = TestStore::new().await;
    let bytes = noise(3_000_000, 1);
    let blob = digest(&bytes);
    for cut in [1usize, 100_000, 2_999_999] {
        let mut writer = begin(&store, NAME, blob, 0).await.unwrap();
        send(&mut writer, &bytes.slice(..cut), 70_000).await.unwrap();
        let committed = || async { store.cas.query_upload(&store.main, NAME, blob).await.unwrap() };
        let expected = UploadStatus { committed: cut as u64, complete: false };
        assert_eq!(committed().await, expected);
        drop(writer);
        assert_eq!(committed().await, expected, "never less than before");
        // The client resumes at once, when the earlier stream may not have ended yet.
        let writer = begin(&store, NAME, blob, cut as u64).await.unwrap();
        assert_eq!(writer.committed(), cut as u64);
        drop(writer);
        eventually(|| async { (store.inspect().await.partial_uploads == 1).then_some(()) }).await;
        assert!(matches!(begin(&store, NAME, blob, cut as u64 + 1).await, Err(Error::Invalid(_))));
        assert!(matches!(begin(&store, "another", blob, cut as u64).await, Err(Error::Invalid(_))));
    }
    let mut writer = begin(&store, NAME, blob, 2_999_999).await.unwrap();
    send(&mut writer, &bytes.slice(2_999_999..), 1).await.unwrap();
    writer.finish().await.unwrap();
    assert_eq!(store.get(blob).await.unwrap(), bytes);
}

/// BS-20.
#[actix::test]
async fn an_upload_that_starts_over_discards_what_was_there() {
    let store = TestStore::new().await;
    let bytes = noise(1_000_000, 1);
    let blob = digest(&bytes);
    let mut stale = begin(&store, NAME, blob, 0).await.unwrap();
    send(&mut stale, &noise(500_000, 2), 70_000).await.unwrap();
    let mut fresh = begin(&store, NAME, blob, 0).await.unwrap();
    send(&mut fresh, &bytes, 70_000).await.unwrap();
    drop(stale);
    fresh.finish().await.unwrap();
    assert_eq!(store.get(blob).await.unwrap(), bytes);
    eventually(|| async { (store.files().len() == 1).then_some(()) }).await;
    assert_eq!(store.inspect().await.totals.reserved, 0);
}

/// BS-24.
#[actix::test]
async fn a_writer_learns_that_another_upload_stored_the_blob() {
    let store = TestStore::new().await;
    let bytes = noise(1_000, 1);
    let writer = begin(&store, NAME, digest(&bytes), 0).await.unwrap();
    let mut superseded = std::pin::pin!(writer.superseded());
    assert!(futures::poll!(&mut superseded).is_pending());
    let mut late = std::pin::pin!(writer.superseded());
    store.put(bytes.clone()).await;
    assert!(futures::poll!(&mut superseded).is_ready());
    store.lose(digest(&bytes)).await;
    assert!(futures::poll!(&mut late).is_pending(), "the blob is gone again");
}

/// BS-24: one stored upload answers all others of the same blob, and is not evicted to make room for them.
#[actix::test]
async fn uploads_of_one_blob_do_not_evict_it() {
    let store = TestStore::with_limit(5 * MB).await;
    let bytes = noise(2_000_000, 1);
    let blob = digest(&bytes);
    let mut first = begin(&store, NAME, blob, 0).await.unwrap();
    let mut second = begin(&store, "second", blob, 0).await.unwrap();
    let mut third = Box::pin(store.cas.begin_upload(&store.main, "third", blob, 0));
    assert!(futures::poll!(&mut third).is_pending(), "all of them would not fit");
    drop(third);
    send(&mut second, &bytes.slice(..600_000), 300_000).await.unwrap();
    send(&mut first, &bytes, 300_000).await.unwrap();
    first.finish().await.unwrap();
    let others = Reservation::take(store.cas.actor(), 3 * MB / 2).await.unwrap();
    send(&mut second, &bytes.slice(600_000..), 300_000).await.unwrap();
    assert!(store.has(blob).await, "it was evicted for a copy of itself");
    second.finish().await.unwrap();
    assert!(store.has(blob).await);
    drop(others);
    eventually(|| async { (store.inspect().await.totals.reserved == 0).then_some(()) }).await;
}

/// An acknowledgement holds only while the blob is stored.
#[actix::test]
async fn an_upload_that_gave_way_to_another_one_fails_if_that_blob_is_gone_again() {
    let store = TestStore::with_limit(5 * MB).await;
    let bytes = noise(2_000_000, 1);
    let blob = digest(&bytes);
    let mut writer = begin(&store, NAME, blob, 0).await.unwrap();
    store.put(bytes.clone()).await;
    send(&mut writer, &bytes, 300_000).await.unwrap();
    store.lose(blob).await;
    let error = writer.finish().await.unwrap_err();
    assert!(matches!(&error, Error::Unavailable(problem) if problem.contains("try again")), "{error}");
}

/// BS-24, BS-29: the bytes of a superseded upload are discarded.
#[actix::test]
async fn a_superseded_upload_takes_no_room() {
    let store = TestStore::new().await;
    let bytes = noise(3_000_000, 1);
    let mut slow = begin(&store, NAME, digest(&bytes), 0).await.unwrap();
    send(&mut slow, &bytes.slice(..1_000_000), 300_000).await.unwrap();
    let mut fast = begin(&store, "another name", digest(&bytes), 0).await.unwrap();
    send(&mut fast, &bytes, 300_000).await.unwrap();
    fast.finish().await.unwrap();
    slow.superseded().now_or_never().expect("it was superseded");
    drop(slow);
    eventually(|| async { (store.inspect().await.running_uploads == 0).then_some(()) }).await;
    let inspection = store.inspect().await;
    assert_eq!((inspection.partial_uploads, inspection.totals.reserved), (0, 0));
    eventually(|| async { (store.files().len() == 1).then_some(()) }).await;
}

/// BS-28: there is no room for both uploads.
#[actix::test]
async fn an_upload_without_room_waits_for_another_one_of_its_blob() {
    let store = TestStore::with_limit(4 * MB).await;
    for is_finished in [true, false] {
        let bytes = noise(3_000_000, u64::from(is_finished));
        let blob = digest(&bytes);
        let mut first = begin(&store, NAME, blob, 0).await.unwrap();
        send(&mut first, &bytes.slice(..1_000_000), 300_000).await.unwrap();
        let mut second = Box::pin(store.cas.begin_upload(&store.main, "another name", blob, 0));
        assert!(futures::poll!(&mut second).is_pending());
        let other = begin(&store, "a third name", digest(b"another blob"), 0).await;
        assert!(other.is_ok() && futures::poll!(&mut second).is_pending());
        drop(other);
        if is_finished {
            send(&mut first, &bytes.slice(1_000_000..), 300_000).await.unwrap();
            first.finish().await.unwrap();
        } else {
            drop(first);
        }
        let second = second.await.unwrap();
        assert_eq!(matches!(second, Upload::Present), is_finished);
    }
}

/// The client leaves while the last bytes are being checked.
#[actix::test]
async fn an_upload_whose_client_leaves_at_the_end_is_finished_anyway() {
    let store = TestStore::new().await;
    let bytes = noise(2_000_000, 1);
    let mut writer = begin(&store, NAME, digest(&bytes), 0).await.unwrap();
    send(&mut writer, &bytes.slice(..200_000), 200_000).await.unwrap();
    send(&mut writer, &bytes.slice(200_000..), 1_800_000).await.unwrap();
    let mut finish = Box::pin(writer.finish());
    assert!(futures::poll!(&mut finish).is_pending());
    drop(finish);
    eventually(|| async { store.has(digest(&bytes)).await.then_some(()) }).await;
    assert_eq!(store.inspect().await.totals.reserved, 0);
}

/// Broken uploads are discarded before any blob is evicted.
#[actix::test]
async fn broken_uploads_make_room_first() {
    let store = TestStore::with_limit(4 * MB).await;
    let kept = store.put(noise(1_000_000, 1)).await;
    let broken = noise(1_000_000, 2);
    let mut writer = begin(&store, NAME, digest(&broken), 0).await.unwrap();
    send(&mut writer, &broken.slice(..600_000), 600_000).await.unwrap();
    drop(writer);
    eventually(|| async { (store.inspect().await.partial_uploads == 1).then_some(()) }).await;
    store.put(noise(2_500_000, 3)).await;
    assert!(store.has(kept).await);
    assert_eq!(store.inspect().await.partial_uploads, 0);
    assert_eq!(store.cas.query_upload(&store.main, NAME, digest(&broken)).await.unwrap().committed, 0);
}

/// CAP-15.
#[actix::test]
async fn a_blob_above_the_largest_size_is_refused_before_a_byte_is_sent() {
    let store = TestStore::new().await;
    let blob = Digest::parse(SHA256, &"1".repeat(64), i64::MAX).unwrap();
    let error = begin(&store, NAME, blob, 0).await.unwrap_err();
    assert!(matches!(&error, Error::Invalid(message) if message.contains("104857600")), "{error}");
}

/// An upload in chunks of a few bytes would otherwise take a buffer of several KiB for each of them.
#[actix::test]
async fn a_small_piece_of_a_new_blob_does_not_keep_the_buffer_that_it_arrived_in() {
    let store = TestStore::new().await;
    let mut new = store.cas.new_blob(&store.main, SHA256);
    let buffer = noise(8 * 1024, 1);
    new.write(buffer.slice(..10)).await.unwrap();
    assert!(buffer.is_unique());
    new.write(buffer.slice(10..)).await.unwrap();
    assert!(!buffer.is_unique(), "a large piece is not copied");
    assert_eq!(store.get(new.finish().await.unwrap()).await.unwrap(), buffer);
}
