//! A full store: clients do not wait for the writes of other clients.

use crate::lifecycle::upload;
use crate::support::{Server, sha256};
use std::time::{Duration, Instant};

/// The least size of a store that keeps small blobs in segments is 256 MiB.
const STORE: &str = "270 MiB";
/// The store has room for this many small blobs.
const FILL: u64 = 8_600;
const SMALL: usize = 32 * 1024;
/// How long a small upload may take beside a large one, in a debug build on a busy machine.
const SMALL_LIMIT: Duration = Duration::from_secs(3);

/// Bytes that differ for each seed.
fn blob(bytes: usize, seed: u64) -> Vec<u8> {
    let mut blob = vec![seed as u8; bytes];
    blob[..8].copy_from_slice(&seed.to_le_bytes());
    blob
}

/// User-asks failure mode 37, scaled down: a blob of half of the store into a cache full of small blobs. Other clients
/// upload meanwhile, and the blobs that they have just stored stay.
#[tokio::test(flavor = "multi_thread")]
async fn a_large_upload_into_a_full_cache_of_small_blobs_does_not_stall_others() {
    let leases = [("CACHE__BUILD_LEASE", "0s"), ("CACHE__UNNAMED_BUILD_LEASE", "0s")];
    let server = Server::with(&[("MAX_SIZE_GB", STORE), leases[0], leases[1]]).await;
    let client = server.client().await;
    for first in (0..FILL).step_by(100) {
        client.upload_all((first..first + 100).map(|seed| blob(SMALL, seed))).await;
    }
    let has_evicted = |event: &str| server.log().iter().any(|line| line["event"] == event);
    assert!(has_evicted("store_trimmed"), "the store is full");

    let (large_client, small_client) = (server.client().await, server.client().await);
    let large = tokio::spawn(async move {
        let data = blob(130 << 20, 1_000_000);
        upload(&large_client, &data).await.unwrap();
        sha256(&data)
    });
    let (mut waits, mut uploaded) = (Vec::new(), Vec::new());
    while !large.is_finished() {
        let begin = Instant::now();
        uploaded.push(small_client.upload(blob(4_096, 2_000_000 + uploaded.len() as u64)).await);
        waits.push(begin.elapsed());
        // The small uploads must not load the server themselves.
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let digest = large.await.unwrap();
    waits.sort_unstable();
    let slowest = *waits.last().unwrap();
    println!("{} small uploads beside a large one, the slowest took {slowest:?}", waits.len());
    assert!(waits.len() >= 5 && slowest < SMALL_LIMIT, "{waits:?}");
    assert!(client.missing(&[digest]).await.is_empty());
    assert!(client.missing(&uploaded).await.is_empty(), "the least recently used go first");
    assert!(!client.missing(&[sha256(&blob(SMALL, 0))]).await.is_empty());
}
