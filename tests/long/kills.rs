//! A server that is killed hundreds of times, at any moment of its work.

use crate::{Load, Random, Stored, setting, support::Server};
use gorego_reapi::digest::Digest;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

/// Clients that load the server in a round.
const CLIENTS: usize = 4;
/// A round is killed after at most this long.
const ROUND_MAX_MS: u64 = 400;
/// Blobs that are read again after each start.
const READ_AGAIN: u64 = 20;

/// The limit of a store that is full soon, as a setting and in bytes. It is large enough for segments.
const FULL_STORE: (&str, u64) = ("300 MB", 300_000_000);
/// Bytes of a batch that fills it, before its last blob.
const BATCH_BYTES: usize = 1_000_000;

/// What was acknowledged in all rounds.
#[derive(Default)]
struct Acknowledged {
    blobs: HashMap<Digest, Vec<u8>>,
    results: HashMap<Digest, String>,
}

/// AC-03, CAS-05: what was acknowledged survives; nothing else is visible.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: see tests/long/README.md"]
async fn what_was_acknowledged_survives_every_kill() {
    let random = Random::seeded("kills");
    let gone = kill_again_and_again(Server::start().await, Acknowledged::default(), random, &[]).await;
    assert_eq!(gone, 0, "blobs or results were lost");
}

/// AC-03, CAS-05: what is not evicted is whole, and a result is there only with its outputs. The store is full before
/// the first kill, so the load of each round evicts.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: see tests/long/README.md"]
async fn what_is_not_evicted_survives_every_kill() {
    let none = "0s";
    let overrides =
        [("MAX_SIZE_GB", FULL_STORE.0), ("CACHE__BUILD_LEASE", none), ("CACHE__UNNAMED_BUILD_LEASE", none)];
    let server = Server::with(&overrides).await;
    let mut random = Random::seeded("kills on a full store");
    let mut acknowledged = Acknowledged::default();
    fill(&server, &mut acknowledged, &mut random).await;
    let evicted = check(&server, &mut acknowledged, &mut random).await;
    println!("the store is full: {evicted} of the first blobs were evicted");
    assert!(evicted > 0, "the store is not full");
    let gone = kill_again_and_again(server, acknowledged, random, &overrides).await;
    println!("{gone} blobs and results were evicted between the kills");
    assert!(gone > 0, "nothing was evicted between the kills");
}

/// Stores a little more than fits.
async fn fill(server: &Server, acknowledged: &mut Acknowledged, random: &mut Random) {
    let load = Load::new(server.client().await, random.fork());
    let mut stored = 0;
    while stored < FULL_STORE.1 + FULL_STORE.1 / 8 {
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while bytes < BATCH_BYTES {
            let blob = random.blob();
            bytes += blob.len();
            batch.push(blob);
        }
        stored += bytes as u64;
        let digests = load.batch(batch.clone()).await.unwrap();
        acknowledged.blobs.extend(digests.into_iter().zip(batch));
    }
}

/// Returns how many blobs and results were not there any more after a start.
async fn kill_again_and_again(
    mut server: Server,
    acknowledged: Acknowledged,
    mut random: Random,
    overrides: &[(&str, &str)],
) -> usize {
    let rounds = setting("LONG_ROUNDS", 300);
    let acknowledged = Arc::new(Mutex::new(acknowledged));
    let mut gone = 0;
    for round in 0..rounds {
        let loads: Vec<_> = futures::future::join_all((0..CLIENTS).map(|_| server.client())).await;
        let loads = loads.into_iter().map(|client| {
            let load = Load::new(client, random.fork());
            tokio::spawn(work(load, acknowledged.clone()))
        });
        let loads: Vec<_> = loads.collect();
        // The moment of the kill is what is tested, and no event marks it.
        tokio::time::sleep(Duration::from_millis(1 + random.below(ROUND_MAX_MS))).await;
        let store = server.kill().await;
        for load in loads {
            load.await.unwrap();
        }
        server = Server::on(store, overrides).await;
        let mut known = std::mem::take(&mut *acknowledged.lock().unwrap());
        gone += check(&server, &mut known, &mut random.fork()).await;
        if round % 25 == 24 {
            let (blobs, results) = (known.blobs.len(), known.results.len());
            println!("round {}: {blobs} blobs, {results} results, {gone} gone", round + 1);
        }
        *acknowledged.lock().unwrap() = known;
    }
    gone
}

/// Loads the server until it is gone.
async fn work(mut load: Load, acknowledged: Arc<Mutex<Acknowledged>>) {
    while let Ok(stored) = load.step().await {
        let mut acknowledged = acknowledged.lock().unwrap();
        match stored {
            Stored::Blob(digest, bytes) => drop(acknowledged.blobs.insert(digest, bytes)),
            Stored::Result(action, output) => drop(acknowledged.results.insert(action, output)),
            Stored::Nothing => {}
        }
    }
}

/// Checks what is there, and forgets the rest. Returns how much that is.
async fn check(server: &Server, acknowledged: &mut Acknowledged, random: &mut Random) -> usize {
    let client = server.client().await;
    let before = acknowledged.blobs.len() + acknowledged.results.len();
    let blobs: Vec<Digest> = acknowledged.blobs.keys().copied().collect();
    for missing in client.missing(&blobs).await {
        acknowledged.blobs.remove(&missing);
    }
    let blobs: Vec<Digest> = acknowledged.blobs.keys().copied().collect();
    for _ in 0..READ_AGAIN.min(blobs.len() as u64) {
        let digest = blobs[random.below(blobs.len() as u64) as usize];
        assert!(
            client.read(digest).await.unwrap() == acknowledged.blobs[&digest],
            "{digest} is another blob"
        );
    }
    for (action, output) in std::mem::take(&mut acknowledged.results) {
        if let Some(result) = client.cached(action).await {
            assert_eq!(client.output(&result, "out").await, output);
            acknowledged.results.insert(action, output);
        }
    }
    let left: Vec<_> = crate::support::files_below(&server.store().join("v1/tmp"));
    assert!(left.is_empty(), "unfinished files of the killed server: {left:?}");
    before - acknowledged.blobs.len() - acknowledged.results.len()
}
