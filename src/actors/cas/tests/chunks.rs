//! Tests of splits and splices.

use super::*;
use futures::FutureExt as _;
use gorego_reapi::chunking::{Chunking, Splitter};

fn small() -> Chunking {
    Chunking::fast_cdc(4_096, 0).unwrap()
}

/// The chunks that a client would upload.
fn cut(bytes: &[u8], chunking: Chunking) -> Vec<Bytes> {
    let mut splitter = Splitter::new(chunking);
    splitter.push(bytes);
    splitter.end();
    std::iter::from_fn(|| splitter.next_chunk()).collect()
}

fn digests(chunks: &[Bytes]) -> Vec<Digest> {
    chunks.iter().map(|chunk| digest(chunk)).collect()
}

impl TestStore {
    async fn split(&self, blob: Digest) -> Result<Vec<Digest>> {
        Ok(self.cas.split(&self.main, blob, small(), usize::MAX).await?.to_vec())
    }

    async fn splice(&self, blob: Digest, chunks: &[Digest]) -> Result<()> {
        self.cas.splice(&self.main, blob, chunks.to_vec(), small()).await
    }

    /// Waits until nothing is reserved or held and no upload is unfinished. Returns the number of blobs.
    async fn settled(&self) -> u64 {
        eventually(|| async {
            let StoreInspection { totals, running_uploads, partial_uploads, .. } = self.inspect().await;
            let rest = (totals.reserved, totals.held, running_uploads, partial_uploads);
            (rest == (0, 0, 0, 0)).then_some(totals.blobs)
        })
        .await
    }

    async fn put_all(&self, chunks: &[Bytes]) -> Vec<Digest> {
        let blobs = chunks.iter().map(|chunk| (digest(chunk), chunk.clone())).collect();
        assert!(self.cas.write_many(&self.main, blobs).await.unwrap().iter().all(Result::is_ok));
        digests(chunks)
    }
}

/// CAS-30, CAS-31, CAS-32.
#[actix::test]
async fn a_split_stores_the_chunks_and_renews_everything() {
    let store = TestStore::new().await;
    let bytes = noise(LARGE, 1);
    let blob = store.put(bytes.clone()).await;
    let chunks = store.split(blob).await.unwrap();
    assert_eq!(chunks, digests(&cut(&bytes, small())));
    let mut joined = vec![];
    for chunk in &chunks {
        joined.extend_from_slice(&store.get(*chunk).await.unwrap());
    }
    assert_eq!(joined, bytes);
    assert_eq!(store.split(blob).await.unwrap(), chunks);
    // These are blobs of a single chunk, because of their size or their content, and the empty blob.
    for (bytes, count) in [(noise(1_000, 2), 1), (noise(1_100, 2), 1), (Bytes::new(), 0)] {
        let blob = store.put(bytes).await;
        assert_eq!(store.split(blob).await.unwrap(), vec![blob; count]);
    }
    for absent in [digest(b"absent"), digest(&noise(LARGE, 3))] {
        assert!(matches!(store.split(absent).await, Err(Error::NotFound(_))));
    }
    let elsewhere = store.cas.split(&store.other, blob, small(), usize::MAX).await;
    assert!(matches!(elsewhere, Err(Error::NotFound(_))), "GEN-15");
}

/// CAS-32: lost chunks are made again from the blob. Without the blob the split fails.
#[actix::test]
async fn lost_chunks_and_forgotten_recipes_are_made_again_and_a_lost_blob_is_not() {
    let mut store = TestStore::of_files().await;
    let blob = store.put(noise(LARGE, 1)).await;
    let chunks = store.split(blob).await.unwrap();
    let written = store.file_of(chunks[0]);
    store.lose(chunks[1]).await;
    assert_eq!(store.split(blob).await.unwrap(), chunks);
    assert!(store.has(chunks[1]).await);
    assert_eq!(store.file_of(chunks[0]), written, "a chunk that is still stored is not written again");
    store.cas.shared().chunk_work.forget();
    assert_eq!(store.split(blob).await.unwrap(), chunks);
    store = store.restart().await;
    assert_eq!(store.split(blob).await.unwrap(), chunks);
    store.lose(blob).await;
    assert!(matches!(store.split(blob).await, Err(Error::NotFound(_))));
    store.splice(blob, &chunks).await.unwrap();
    assert_eq!(store.split(blob).await.unwrap(), chunks);
}

#[actix::test]
async fn concurrent_splits_of_one_blob_are_done_once_and_a_caller_that_leaves_holds_up_nobody() {
    let store = TestStore::of_files().await;
    let blob = store.put(noise(3_000_000, 1)).await;
    let mut left = Box::pin(store.split(blob));
    assert!(left.as_mut().now_or_never().is_none());
    let others = futures::future::join_all((0..20).map(|_| store.split(blob)));
    drop(left);
    let answers = others.await;
    assert!(answers.iter().all(|answer| answer.as_ref().unwrap() == answers[0].as_ref().unwrap()));
    for chunk in answers[0].as_ref().unwrap() {
        // Two files would mean that the chunk was stored twice.
        store.file_of(*chunk);
    }
    store.settled().await;
}

#[actix::test]
async fn a_split_that_cannot_fit_is_refused_with_the_reason_and_evicts_nothing() {
    let store = TestStore::with_limit(2 * MB).await;
    let other = store.put(noise(5_000, 1)).await;
    let blob = store.put(noise(1_200_000, 2)).await;
    let error = store.split(blob).await.unwrap_err();
    assert!(matches!(&error, Error::Precondition(_)), "GEN-20: {error}");
    assert!(store.has(other).await && store.has(blob).await);

    let store = TestStore::new().await;
    let blob = store.put(noise(LARGE, 1)).await;
    let count = store.split(blob).await.unwrap().len();
    for forgotten in [false, true] {
        for (max, fits) in [(0, false), (count - 1, false), (count, true)] {
            if forgotten {
                store.cas.shared().chunk_work.forget();
            }
            let answer = store.cas.split(&store.main, blob, small(), max).await;
            assert_eq!(answer.is_ok(), fits, "{max}");
            assert!(fits || matches!(answer, Err(Error::Precondition(_))));
        }
    }
}

/// This also applies to callers that wait for the refused split.
#[actix::test]
async fn a_split_into_too_many_chunks_is_refused_to_others_without_doing_it_again() {
    let store = TestStore::new().await;
    let blob = store.put(noise(LARGE, 1)).await;
    let count = store.split(blob).await.unwrap().len();
    store.cas.shared().chunk_work.forget();
    let split = |max| store.cas.split(&store.main, blob, small(), max);
    let refused = |answer| matches!(answer, Err(Error::Precondition(_)));
    assert!(refused(split(count - 1).await));
    let places = &store.cas.shared().chunk_work.places;
    let held: Vec<_> = std::iter::from_fn(|| places.take(store.cas.caller(), 1).ok()).collect();
    for max in [count - 1, count - 2, 1] {
        assert!(refused(split(max).await), "without a place");
    }
    assert!(split(count).now_or_never().is_none(), "it may fit");
    drop(held);
    assert_eq!(split(count).await.unwrap().len(), count);
    store.lose(blob).await;
    assert!(matches!(split(count - 1).await, Err(Error::NotFound(_))), "CAS-32");
}

/// CAS-35, CAS-36, CAS-37, CAS-38.
#[actix::test]
async fn a_splice_joins_the_chunks_in_order_and_a_wrong_one_is_refused_and_leaves_nothing() {
    let store = TestStore::new().await;
    let (one, two, long) = (noise(100_000, 1), noise(150_000, 2), noise(3_000_000, 3));
    let parts = store.put_all(&[one.clone(), two.clone(), long.clone()]).await;
    let [c1, c2, c3] = parts[..] else { panic!() };
    let whole = [&one[..], &two, &long, &one].concat();
    let blob = digest(&whole);
    let absent = digest(b"absent");
    let attempts: [&[Digest]; 5] =
        [&[c2, c1, c3, c1], &[c1, c2, c3], &[], &[c1, c2, c3, c1, c1], &[c1, c2, c3, c1, absent]];
    for chunks in attempts {
        let error = store.splice(blob, chunks).await.unwrap_err();
        assert!(matches!(error, Error::Invalid(_)), "{chunks:?}: {error}");
        assert!(!store.has(blob).await);
    }
    // This chunk has the right size and is not stored.
    let unknown = digest(&noise(100_000, 9));
    let error = store.splice(blob, &[c1, c2, c3, unknown]).await.unwrap_err();
    assert!(matches!(&error, Error::NotFound(m) if m.contains(&unknown.to_string())), "{error}");
    let huge = Digest::parse(SHA256, &"1".repeat(64), i64::MAX).unwrap();
    let error = store.splice(blob, &[huge, huge, huge]).await.unwrap_err();
    assert!(matches!(error, Error::Invalid(_)), "a sum that overflows: {error}");

    assert_eq!(store.settled().await, 3);
    for _ in 0..2 {
        store.splice(blob, &[c1, c2, digest(b""), c3, c1]).await.unwrap();
        assert_eq!(store.get(blob).await.unwrap(), whole);
    }
    store.splice(digest(b""), &[]).await.unwrap();
}

/// A damaged chunk counts as missing.
#[actix::test]
async fn a_splice_over_a_damaged_chunk_stores_nothing() {
    let store = TestStore::new().await;
    let (one, two) = (noise(100_000, 1), noise(200_000, 2));
    let chunks = store.put_all(&[one.clone(), two.clone()]).await;
    overwrite(&store.file_of(chunks[1]), |bytes| bytes[7] ^= 1);
    let blob = digest(&[&one[..], &two].concat());
    assert!(matches!(store.splice(blob, &chunks).await, Err(Error::NotFound(_))));
    assert!(!store.has(blob).await && !store.has(chunks[1]).await && store.has(chunks[0]).await);
    store.put(two).await;
    store.splice(blob, &chunks).await.unwrap();
}

/// Clients cannot forge a recipe: the recipe of a splice is kept only if its cuts are those of the chunking
/// function.
#[actix::test]
async fn a_split_after_a_splice_gives_the_chunks_of_the_function_however_the_client_cut() {
    let store = TestStore::new().await;
    let bytes = noise(LARGE, 1);
    let blob = digest(&bytes);
    let right = cut(&bytes, small());
    let expected = digests(&right);
    // These chunks have allowed sizes but other cuts, or are far too large.
    let shifted: Vec<Bytes> = bytes.chunks(4_000).map(Bytes::copy_from_slice).collect();
    let halves: Vec<Bytes> = bytes.chunks(LARGE / 2).map(Bytes::copy_from_slice).collect();
    for (chunks, remembered) in [(&shifted, false), (&halves, false), (&right, true)] {
        let parts = store.put_all(chunks).await;
        store.splice(blob, &parts).await.unwrap();
        let known = store.cas.known_recipe(&store.main, blob, small(), usize::MAX).await.unwrap();
        assert_eq!(known.is_some(), remembered);
        assert_eq!(store.split(blob).await.unwrap(), expected);
        store.cas.shared().chunk_work.forget();
        store.lose(blob).await;
    }
}

#[actix::test]
async fn a_splice_that_does_not_fit_fails_and_evicts_none_of_its_chunks() {
    let store = TestStore::with_limit(MB).await;
    let chunks = cut(&noise(600_000, 1), small());
    let parts = store.put_all(&chunks).await;
    let blob = digest(&chunks.concat());
    let error = store.splice(blob, &parts).await.unwrap_err();
    assert!(matches!(error, Error::Exhausted { .. }), "{error}");
    assert_eq!(store.cas.find_missing(&store.main, &parts).await.unwrap(), []);
    store.settled().await;
}
