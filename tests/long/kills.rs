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
    let rounds = setting("LONG_ROUNDS", 300);
    let mut random = Random::seeded("kills");
    let acknowledged = Arc::new(Mutex::new(Acknowledged::default()));
    let mut server = Server::start().await;
    for round in 0..rounds {
        let loads: Vec<_> = futures::future::join_all((0..CLIENTS).map(|_| server.client())).await;
        let loads = loads.into_iter().map(|client| {
            let (load, acknowledged) = (Load { client, random: random.fork() }, acknowledged.clone());
            tokio::spawn(work(load, acknowledged))
        });
        let loads: Vec<_> = loads.collect();
        // The moment of the kill is what is tested, and no event marks it.
        tokio::time::sleep(Duration::from_millis(1 + random.below(ROUND_MAX_MS))).await;
        let store = server.kill().await;
        for load in loads {
            load.await.unwrap();
        }
        server = Server::on(store, &[]).await;
        let known = std::mem::take(&mut *acknowledged.lock().unwrap());
        check(&server, &known, &mut random.fork()).await;
        if round % 25 == 24 {
            println!("round {}: {} blobs, {} results", round + 1, known.blobs.len(), known.results.len());
        }
        *acknowledged.lock().unwrap() = known;
    }
}

/// Loads the server until it is gone.
async fn work(mut load: Load, acknowledged: Arc<Mutex<Acknowledged>>) {
    while let Ok(stored) = load.step().await {
        let mut acknowledged = acknowledged.lock().unwrap();
        match stored {
            Stored::Blob(digest, bytes) => drop(acknowledged.blobs.insert(digest, bytes)),
            Stored::Result(action, output) => drop(acknowledged.results.insert(action, output)),
        }
    }
}

async fn check(server: &Server, acknowledged: &Acknowledged, random: &mut Random) {
    let client = server.client().await;
    let blobs: Vec<Digest> = acknowledged.blobs.keys().copied().collect();
    assert_eq!(client.missing(&blobs).await, [], "a blob was lost");
    for _ in 0..READ_AGAIN.min(blobs.len() as u64) {
        let digest = blobs[random.below(blobs.len() as u64) as usize];
        assert!(
            client.read(digest).await.unwrap() == acknowledged.blobs[&digest],
            "{digest} is another blob"
        );
    }
    for (action, output) in &acknowledged.results {
        let result =
            client.cached(*action).await.unwrap_or_else(|| panic!("the result of {action} was lost"));
        assert_eq!(client.output(&result, "out").await, *output);
    }
    let left: Vec<_> = crate::support::files_below(&server.store().join("v1/tmp"));
    assert!(left.is_empty(), "unfinished files of the killed server: {left:?}");
}
