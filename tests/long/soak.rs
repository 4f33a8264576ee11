//! An hour of load on a full store: nothing may grow.

use crate::{
    Load, Random, Stored, setting,
    support::{Client, Server, files_below},
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};
use tonic::Code;

const CLIENTS: usize = 8;
/// The limit of the store, in GB: some seconds of uploads, and large enough for segments.
const STORE_GB: &str = "0.6";
const STORE_BYTES: u64 = 600_000_000;
/// Samples of the whole run.
const SAMPLES: u32 = 60;
/// How much more a resource may take at the end than after the first third.
const GROWTH_MAX: f64 = 1.25;

/// What the server takes.
#[derive(Debug, Clone, Copy)]
struct Taken {
    resident: u64,
    descriptors: u64,
    threads: u64,
    stored: u64,
}

impl Taken {
    fn by(server: &Server) -> Self {
        let process = format!("/proc/{}", server.pid());
        let status = std::fs::read_to_string(format!("{process}/status")).unwrap();
        let number = |key: &str| -> u64 {
            let line = status.lines().find(|line| line.starts_with(key)).unwrap();
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        let files = files_below(server.store());
        Self {
            resident: number("VmRSS:") * 1024,
            descriptors: std::fs::read_dir(format!("{process}/fd")).unwrap().count() as u64,
            threads: number("Threads:"),
            // Files come and go meanwhile.
            stored: files.iter().filter_map(|path| path.metadata().ok()).map(|metadata| metadata.len()).sum(),
        }
    }
}

/// CAS-04: memory, descriptors, threads and bytes on disk stay level while entries come and go.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: see tests/long/README.md"]
async fn a_server_under_steady_load_stays_as_large_as_it_was() {
    let length = Duration::from_secs(60 * setting("LONG_MINUTES", 60));
    let mut random = Random::seeded("soak");
    let server = Server::with(&[("MAX_SIZE_GB", STORE_GB), ("HTTP__LISTEN_ADDR", "127.0.0.1:0")]).await;
    let (is_over, steps) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut loads = Vec::new();
    for _ in 0..CLIENTS {
        let client = server.client().await;
        let load = Load::new(client.clone(), random.fork()).with_http(server.http_address());
        loads.push(tokio::spawn(work(load, client, is_over.clone(), steps.clone())));
    }
    let (start, mut samples) = (Instant::now(), Vec::new());
    for sample in 1..=SAMPLES {
        tokio::time::sleep_until((start + length * sample / SAMPLES).into()).await;
        let taken = Taken::by(&server);
        println!("{:>5} s, {:>9} steps: {taken:?}", start.elapsed().as_secs(), steps.load(Relaxed));
        samples.push(taken);
    }
    is_over.store(true, Relaxed);
    for load in loads {
        load.await.unwrap();
    }
    let third = samples.len() / 3;
    let most = |part: &[Taken], what: fn(&Taken) -> u64| part.iter().map(what).max().unwrap() as f64;
    for (name, what) in [
        ("resident memory", (|taken| taken.resident) as fn(&Taken) -> u64),
        ("descriptors", |taken| taken.descriptors),
        ("threads", |taken| taken.threads),
    ] {
        let (before, after) = (most(&samples[third..2 * third], what), most(&samples[2 * third..], what));
        assert!(after <= before * GROWTH_MAX, "{name} grew from {before} to {after}");
    }
    // Files without their metadata and directories.
    assert!(samples.iter().all(|taken| taken.stored <= STORE_BYTES), "the store is larger than its limit");
}

/// Loads the server until the end. What was stored may be evicted right away.
async fn work(mut load: Load, client: Client, is_over: Arc<AtomicBool>, steps: Arc<AtomicU64>) {
    while !is_over.load(Relaxed) {
        match load.step().await {
            Ok(Stored::Blob(digest, bytes)) => match client.read(digest).await {
                Ok(read) => assert!(read == bytes, "{digest} is another blob"),
                Err(status) => assert_eq!(status.code(), Code::NotFound, "{status}"),
            },
            Ok(Stored::Result(..) | Stored::Nothing) => {}
            Err(status) => {
                let may_be = [Code::ResourceExhausted, Code::FailedPrecondition, Code::Unavailable];
                assert!(may_be.contains(&status.code()), "{status}");
            }
        }
        steps.fetch_add(1, Relaxed);
    }
}
