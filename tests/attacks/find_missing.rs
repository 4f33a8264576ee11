//! Look-ups of many digests at once.

use crate::{
    decoding::apart,
    harness::{Bystander, assert_memory_is_bounded, connect_from, resident_memory},
    support::{Server, eventually},
};
use futures::future::join_all;
use gorego_client::stubs::ContentAddressableStorageClient as Cas;
use gorego_reapi::proto::reapi::{Digest, FindMissingBlobsRequest, FindMissingBlobsResponse};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tonic::transport::Channel;

/// Largest response that the test accepts.
const ANSWER_MAX_BYTES: usize = 16 * 1024 * 1024;
/// Memory that the server may keep after the attack, in addition to what it had before.
const KEPT_MAX_BYTES: u64 = 100_000_000;

/// This many digests of unknown blobs.
fn digests(from: u64, count: u64) -> Vec<Digest> {
    let hash = |n: u64| format!("{:016x}", n.wrapping_mul(0x9e37_79b9_7f4a_7c15)).repeat(4);
    (from..from + count).map(|n| Digest { hash: hash(n), size_bytes: 1 }).collect()
}

/// The same, but with a common prefix.
fn alike(count: u64) -> Vec<Digest> {
    (0..count).map(|n| Digest { hash: format!("{n:064x}"), size_bytes: 1 }).collect()
}

async fn find(channel: Channel, blob_digests: Vec<Digest>) -> FindMissingBlobsResponse {
    let request = FindMissingBlobsRequest { blob_digests, ..Default::default() };
    let mut client = Cas::new(channel).max_decoding_message_size(ANSWER_MAX_BYTES);
    client.find_missing_blobs(request).await.unwrap().into_inner()
}

/// CAS-01, CAS-02. All calls are answered, other clients are served meanwhile, and the memory is returned.
#[tokio::test(flavor = "multi_thread")]
async fn a_storm_of_large_look_ups_is_answered_beside_others_and_its_memory_goes_back() {
    const CLIENTS: u64 = 20;
    const DIGESTS: u64 = 80_000;
    let server = Arc::new(Server::start().await);
    let before = resident_memory(&server);
    let bystander = Bystander::beside(&server).await;
    let target = server.clone();
    let storm = async move || {
        let clients = (0..CLIENTS).map(|client| {
            let target = &target;
            async move {
                let channel = connect_from("127.0.0.1", target).await;
                let asked = digests(client * DIGESTS, DIGESTS);
                assert_eq!(find(channel, asked).await.missing_blob_digests.len() as u64, DIGESTS);
            }
        });
        join_all(clients).await;
    };
    apart(storm).await;
    bystander.leave().await;
    assert_memory_is_bounded(&server);
    let what = format!("not more than {} MB are kept", KEPT_MAX_BYTES / 1_000_000);
    eventually(&what, || resident_memory(&server) < before + KEPT_MAX_BYTES).await;
}

/// They differ only in their last characters. A hash of the prefix made all of them collide, so each was compared with
/// all others.
#[tokio::test(flavor = "multi_thread")]
async fn digests_that_begin_alike_take_no_longer_than_others() {
    let server = Server::start().await;
    let bystander = Bystander::beside(&server).await;
    let mut times = Vec::new();
    for asked in [digests(1, 40_000), alike(40_000)] {
        let begin = Instant::now();
        let channel = connect_from("127.0.0.1", &server).await;
        assert_eq!(find(channel, asked).await.missing_blob_digests.len(), 40_000);
        times.push(begin.elapsed());
    }
    bystander.leave().await;
    // It used to take a hundred times as long.
    assert!(times[1] < 5 * times[0] + Duration::from_secs(1), "{times:?}");
}
