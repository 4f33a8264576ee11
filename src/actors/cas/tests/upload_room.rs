//! Tests of the disk space of uploads: reservations, their bounds, and how broken uploads give them back.

use super::{super::uploads::*, uploads::send, *};
use crate::actors::cas::{
    guards::{Reservation, UploadRoom},
    index::{EntryKind, Key},
    progress::EndedAttempt,
    uploads::sink::Sink,
};
use futures::FutureExt as _;

/// Adds a broken upload under its own name.
fn park(store: &TestStore, uploads: &mut Uploads, (n, blob): (u64, Key), room: UploadRoom, now: Instant) {
    let name = digest(&n.to_le_bytes());
    let Begin::Fresh(Entered { number, progress }, None) = uploads.begin(name, blob, 0) else { panic!() };
    let file = store.cas.shared().volume.draft().unwrap();
    let partial = Some(Partial { sink: Sink { file, hasher: SHA256.hasher(0) }, room });
    assert!(
        uploads
            .end(EndUpload { attempt: EndedAttempt { name, number, blob, progress }, partial }, now)
            .is_none()
    );
}

/// A peer that keeps as many broken uploads as it can loses its own ones, even if uploads of other peers are older.
#[actix::test]
async fn a_peer_with_many_broken_uploads_loses_its_own_and_never_anothers() {
    let store = TestStore::new().await;
    let (now, hour, limit) = (Instant::now(), Duration::from_secs(3_600), 100 * MB);
    let blob = Key { digest: digest(b"x"), instance: store.main.blobs(), kind: EntryKind::Blob };
    let budget = &store.cas.shared().upload_budget;
    let [few, many] = [1, 2].map(|host| Caller::connected(([127, 0, 0, host], 1).into()));
    let mut uploads = Uploads::default();
    let park = |uploads: &mut Uploads, n, caller, bytes| {
        let mut room = UploadRoom::of(Reservation::new(store.cas.actor().clone(), bytes));
        room.charge_to(budget.take(caller, 0).unwrap()).unwrap();
        park(&store, uploads, (n, blob), room, now + Duration::from_millis(n));
    };
    let peer_of = |partial: Option<Partial>| partial.unwrap().room.caller().unwrap().peer;
    park(&mut uploads, 0, few, 1);
    for n in 1..=settings::MAX_PARTIAL_UPLOADS as u64 + 9 {
        park(&mut uploads, n, many, 1);
    }
    for _ in 0..10 {
        assert_eq!(peer_of(uploads.pop_excess(now, hour, limit)), many.peer);
    }
    assert!(uploads.pop_excess(now, hour, limit).is_none());
    assert_eq!(uploads.counts(), (0, settings::MAX_PARTIAL_UPLOADS));
    // By bytes, the other peer has most. It loses its oldest upload first, although a newer one is larger.
    park(&mut uploads, 1_000, few, 30 * MB);
    for _ in 0..2 {
        assert_eq!(peer_of(uploads.pop_for_room()), few.peer);
    }
    assert_eq!(peer_of(uploads.pop_for_room()), many.peer);
}

#[actix::test]
async fn broken_uploads_are_bounded_in_age_number_and_bytes() {
    let store = TestStore::new().await;
    let (now, hour, limit) = (Instant::now(), Duration::from_secs(3_600), 100 * 4_096);
    let blob = Key { digest: digest(b"x"), instance: store.main.blobs(), kind: EntryKind::Blob };
    let mut uploads = Uploads::default();
    let park = |uploads: &mut Uploads, n: u64, bytes| {
        let room = UploadRoom::of(Reservation::new(store.cas.actor().clone(), bytes));
        park(&store, uploads, (n, blob), room, now);
    };
    park(&mut uploads, 0, 1);
    assert!(uploads.pop_excess(now + hour / 2, hour, limit).is_none());
    assert!(uploads.pop_excess(now + hour, hour, limit).is_some(), "too old");
    for n in 1..=5 {
        park(&mut uploads, n, limit / 20);
    }
    assert!(uploads.pop_excess(now, hour, limit).is_none());
    park(&mut uploads, 6, limit / 20);
    assert!(uploads.pop_excess(now, hour, limit).is_some(), "more than a quarter of the store");
    while uploads.pop_for_room().is_some() {}
    for n in 0..=settings::MAX_PARTIAL_UPLOADS as u64 {
        park(&mut uploads, n, 0);
    }
    assert!(uploads.pop_excess(now, hour, limit).is_some(), "one too many");
    assert_eq!(uploads.counts(), (0, settings::MAX_PARTIAL_UPLOADS));
}

/// A store of `limit` bytes with three blobs, and a caller.
async fn store_with_blobs(limit: u64) -> (TestStore, Vec<Digest>, Caller) {
    let store = TestStore::with_limit(limit).await;
    let mut blobs = Vec::new();
    for seed in 0..3 {
        blobs.push(store.put(noise(1_000_000, 100 + seed)).await);
    }
    (store, blobs, Caller::connected("127.0.0.1:1".parse().unwrap()))
}

async fn all_there(store: &TestStore, blobs: &[Digest]) -> bool {
    store.cas.find_missing(&store.main, blobs).await.unwrap().is_empty()
}

/// Announced bytes reserve and evict nothing, in whichever way they are announced. Only received bytes reserve room.
#[actix::test]
async fn room_is_reserved_for_received_bytes_and_not_for_announced_ones() {
    let (store, blobs, caller) = store_with_blobs(30 * MB).await;
    let cas = store.cas.on_behalf_of(caller);
    let mut writers = Vec::new();
    for seed in 0..5 {
        let announced = Digest::parse(SHA256, &digest(&[seed]).hash_hex(), 20_000_000).unwrap();
        let name = format!("uploads/{seed}");
        let Upload::Writer(writer) = cas.begin_upload(&store.main, &name, announced, 0).await.unwrap() else {
            panic!()
        };
        let mut writer = if seed % 2 == 0 { *writer } else { writer.decoding() };
        writer.write(Bytes::from_static(b"(")).await.unwrap();
        writers.push(writer);
    }
    assert_eq!(store.inspect().await.totals.reserved, 0);
    // All items of this batch claim a false size of one MiB, 40 MiB in total.
    let lies = (0..40u8).map(|n| {
        let digest = Digest::parse(SHA256, &digest(&[n, n]).hash_hex(), 1 << 20).unwrap();
        (digest, Payload::Zstd(Bytes::from_static(b"no zstd")))
    });
    let outcomes = cas.write_many(&store.main, lies.collect()).await.unwrap();
    assert!(outcomes.iter().all(|outcome| matches!(outcome, Err(Error::Invalid(_)))));
    assert!(all_there(&store, &blobs).await);
    // Received bytes reserve room, at most a step ahead.
    let bytes = noise(5_000_000, 1);
    let mut writer = writers.remove(0);
    send(&mut writer, &bytes, 100_000).await.unwrap();
    drop(writer);
    eventually(|| async { (store.inspect().await.partial_uploads == 1).then_some(()) }).await;
    let reserved = store.inspect().await.totals.reserved;
    let most = 5_000_001 + settings::ROOM_STEP_BYTES + 4_096;
    assert!((5_000_001..=most).contains(&reserved), "{reserved}");
    drop(writers);
    eventually(|| async { (store.inspect().await.running_uploads == 0).then_some(()) }).await;
    assert!(all_there(&store, &blobs).await);
}

/// The announced size, such as a Content-Length, may be wrong in either direction.
#[actix::test]
async fn a_new_blob_reserves_no_more_than_its_announced_size_ahead_of_its_bytes() {
    let store = TestStore::new().await;
    let bytes = noise(LARGE, 1);
    let block = 4_096;
    for (announced, most) in [
        (None, settings::ROOM_STEP_BYTES),
        (Some(LARGE as u64), LARGE as u64 + block),
        (Some(100_000), 280_000 + block),
        (Some(1 << 40), settings::ROOM_STEP_BYTES),
    ] {
        let mut new = store.cas.new_blob(&store.main, SHA256);
        if let Some(size) = announced {
            new.announce(size);
        }
        new.write(bytes.slice(..280_000)).await.unwrap();
        let reserved = store.inspect().await.totals.reserved;
        assert!((280_000..=most).contains(&reserved), "{announced:?}: {reserved}");
        new.write(bytes.slice(280_000..)).await.unwrap();
        assert_eq!(new.finish().await, Ok(digest(&bytes)));
        eventually(|| async { (store.inspect().await.totals.reserved == 0).then_some(()) }).await;
    }
}

/// BS-26: a small stream that decodes to many bytes reserves room as it is decoded, and fails if there is none.
#[actix::test]
async fn a_compressed_upload_gets_room_as_it_is_decoded() {
    let (store, blobs, caller) = store_with_blobs(10 * MB).await;
    let cas = store.cas.on_behalf_of(caller);
    let zeros = vec![0u8; 9_500_000];
    for (kept, fits) in [(6_000_000, true), (9_500_000, false)] {
        let plain = Bytes::from(zeros[..kept].to_vec());
        let mut stream = Vec::new();
        gorego_reapi::compression::Encoder::new(1).unwrap().frames(&plain, &mut stream).unwrap();
        let reader = store.cas.open(&store.main, blobs[0]).await.unwrap();
        let outcomes =
            cas.write_many(&store.main, vec![(digest(&plain), Payload::Zstd(stream.into()))]).await.unwrap();
        assert_eq!(outcomes[0].is_ok(), fits, "{outcomes:?}");
        assert_eq!(store.has(digest(&plain)).await, fits);
        drop(reader);
        eventually(|| async { (store.inspect().await.totals.reserved == 0).then_some(()) }).await;
    }
}

/// Each upload holds a part of the room and none can get the rest. All of them end, and failed ones can be resumed
/// later.
#[actix::test]
async fn uploads_that_do_not_fit_together_all_end() {
    let store = TestStore::with_limit(10 * MB).await;
    let upload = async |seed: u64| {
        let bytes = noise(6_000_000, seed);
        let name = format!("uploads/{seed}");
        loop {
            let stored = async {
                let mut writer = match store.cas.begin_upload(&store.main, &name, digest(&bytes), 0).await? {
                    Upload::Present => return Ok(()),
                    Upload::Writer(writer) => writer,
                };
                for at in (0..bytes.len()).step_by(500_000) {
                    writer.write(bytes.slice(at..at + 500_000)).await?;
                    tokio::task::yield_now().await;
                }
                writer.finish().await.map(drop)
            };
            match stored.await {
                Ok(()) => return,
                Err(Error::Exhausted { retry_after: Some(_), .. }) => {}
                Err(error) => panic!("{error}"),
            }
            // The clients wait for different times, so that they do not take room from each other in step for ever.
            tokio::time::sleep(Duration::from_millis(20 * seed)).await;
        }
    };
    let all = futures::future::join_all((1..=4).map(upload));
    tokio::time::timeout(Duration::from_secs(60), all).await.unwrap();
    let on_disk: u64 = store.files().iter().filter_map(|path| path.metadata().ok()).map(|m| m.len()).sum();
    assert!(on_disk <= 10 * MB);
}

#[actix::test]
async fn a_caller_that_leaves_while_it_waits_for_room_is_not_charged_for_it() {
    let store = TestStore::new().await;
    let budget = &store.cas.shared().upload_budget;
    let mut room = UploadRoom::none(store.cas.actor().clone());
    room.charge_to(budget.take(Caller::connected("127.0.0.1:1".parse().unwrap()), 0).unwrap()).unwrap();
    assert!(room.grow(1_000, 1_000).now_or_never().is_none(), "the actor has not answered yet");
    assert_eq!(budget.held(), 0);
    eventually(|| async { (store.inspect().await.totals.reserved == 0).then_some(()) }).await;
    room.grow(1_000, 1_000).await.unwrap();
    assert_eq!((budget.held(), room.bytes()), (1_000, 1_000));
}

/// A connection has a bound, a peer has a share, and its own broken uploads make room for its new ones.
#[actix::test]
async fn what_a_client_holds_in_unfinished_uploads_is_bounded() {
    let store = TestStore::with_limit(600 * MB).await;
    let bounds = store.cas.shared().settings.upload_bounds(600 * MB);
    assert_eq!((bounds.total, bounds.connection), (300 * MB, 150 * MB));
    let caller = Caller::connected("127.0.0.1:1".parse().unwrap());
    let budget = &store.cas.shared().upload_budget;
    // This stands for running uploads of the caller.
    let held = budget.take(caller, 149 * MB).unwrap();
    let upload = async |caller: Caller, name: &str| {
        let bytes = noise(3_000_000, 1);
        let cas = store.cas.on_behalf_of(caller);
        let Upload::Writer(mut writer) =
            cas.begin_upload(&store.main, name, digest(&bytes), 0).await.unwrap()
        else {
            panic!()
        };
        send(&mut writer, &bytes.slice(..2_900_000), 300_000).await?;
        Ok::<_, Error>(writer)
    };
    let error = upload(caller, "uploads/a").await.unwrap_err();
    assert!(
        matches!(&error, Error::Exhausted { message, retry_after: Some(_) } if message.contains("connection")),
        "{error}"
    );
    let neighbour = Caller::connected("127.0.0.2:1".parse().unwrap());
    drop(upload(neighbour, "uploads/b").await.unwrap());
    eventually(|| async { (store.inspect().await.partial_uploads == 2).then_some(()) }).await;
    let committed = async |name: &str| {
        let blob = digest(&noise(3_000_000, 1));
        store.cas.query_upload(&store.main, name, blob).await.unwrap().committed
    };
    assert!(committed("uploads/a").await > 0);
    // With this broken upload, the connection is at its bound. It is discarded for the first bytes of the next upload.
    drop(upload(caller, "uploads/instead").await.unwrap_err());
    assert_eq!(committed("uploads/a").await, 0);
    drop(held);
    eventually(|| async { (store.inspect().await.partial_uploads == 2).then_some(()) }).await;
    assert!(committed("uploads/instead").await > 0);
    let kept = budget.held();
    assert!(kept >= 2_900_000, "broken uploads count: {kept}");
    // Other connections of the first peer take all that a peer may have, and the peer's broken upload is discarded for
    // a new one.
    let each = std::iter::repeat_with(|| {
        let mut share = budget.take(Caller::connected("127.0.0.1:2".parse().unwrap()), 0).unwrap();
        while share.grow(MB / 4).is_ok() {}
        share
    });
    let all: Vec<_> = each.take_while(|share| share.amount() > 0).collect();
    let third = Caller::connected("127.0.0.1:3".parse().unwrap());
    let _ = upload(third, "uploads/c").await;
    assert_eq!(committed("uploads/instead").await, 0);
    assert!(upload(neighbour, "uploads/d").await.is_ok());
    drop(all);
}
