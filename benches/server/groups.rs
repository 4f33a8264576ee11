//! The groups of measurements, with one function for each.

use crate::{
    bare::Bare,
    machine::{cpu_time, percentiles, resident, spawn_latency, spawn_rate},
    report::Report,
    target::{Client, Target},
};
use bytes::Bytes;
use futures::{StreamExt as _, stream};
use gorego_client::stubs::ByteStreamClient;
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    proto::bytestream::{ReadRequest, WriteRequest},
};
use std::{
    future::Future,
    time::{Duration, Instant},
};
use tokio::runtime::Runtime;
use tonic::transport::Channel;

/// Number of concurrent calls for goals that say "64 at once".
const AT_ONCE: usize = 64;

pub(crate) fn runtime() -> Runtime {
    Runtime::new().expect("a runtime")
}

fn slots() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Runs `count` calls, [`AT_ONCE`] concurrently, and returns the calls per second.
async fn rate<F: Future>(count: usize, call: impl Fn(usize) -> F) -> f64 {
    let start = Instant::now();
    stream::iter((0..count).map(call)).buffer_unordered(AT_ONCE).for_each(|_| async {}).await;
    count as f64 / start.elapsed().as_secs_f64()
}

/// Uncached actions without work, one at a time and many at once.
pub(crate) fn noop_execute(report: &mut Report) {
    const ONE_AT_A_TIME: usize = 300;
    const MANY: usize = 3_000;
    let target = Target::start();
    let runtime = runtime();
    let client = runtime.block_on(Client::connect(&target.endpoint));
    let spawn = spawn_latency(ONE_AT_A_TIME);
    let (p50, p99) = runtime.block_on(async {
        let mut samples = Vec::new();
        for i in 0..ONE_AT_A_TIME {
            let action = client.upload_action(&["/bin/true"], &format!("one {i}")).await;
            let start = Instant::now();
            client.run(action).await;
            samples.push(start.elapsed());
        }
        percentiles(samples)
    });
    report.add(
        "no-op Execute, uncached, one at a time, p50",
        format!("{:.2} ms (p99 {:.2} ms)", ms(p50), ms(p99)),
        format!("bare spawn {:.2} ms", ms(spawn)),
        "spawn + 0.6 ms",
        p50 <= spawn + Duration::from_micros(600),
    );

    let machine = spawn_rate(slots(), MANY);
    let (actions, cpu) = runtime.block_on(async {
        let digests: Vec<Digest> = stream::iter(0..MANY)
            .map(|i| {
                let client = client.clone();
                async move { client.upload_action(&["/bin/true"], &format!("many {i}")).await }
            })
            .buffered(AT_ONCE)
            .collect()
            .await;
        let before = cpu_time(target.pid());
        let actions = rate(MANY, |i| client.run(digests[i])).await;
        (actions, cpu_time(target.pid()) - before)
    });
    report.add(
        "no-op Execute, uncached, 64 at once",
        format!("{actions:.0}/s ({:.0} %)", 100.0 * actions / machine),
        format!("{machine:.0} spawns/s on {} threads", slots()),
        "50 %",
        actions >= machine / 2.0,
    );
    let each = ms(cpu) / MANY as f64;
    report.add(
        "CPU of the server and its runners for one of them",
        format!("{each:.2} ms"),
        "-".into(),
        "0.55 ms",
        each <= 0.55,
    );
}

/// Many actions submitted at once: the time until every stream has sent a message.
pub(crate) fn enqueue_burst(report: &mut Report) {
    const ACTIONS: usize = 2_000;
    let target = Target::start();
    let (last, done, took) = runtime().block_on(async {
        let client = Client::connect(&target.endpoint).await;
        let mut digests = Vec::new();
        for i in 0..ACTIONS {
            digests.push(client.upload_action(&["/bin/true"], &format!("burst {i}")).await);
        }
        let start = Instant::now();
        let runs: Vec<_> = digests
            .into_iter()
            .map(|action| {
                let client = client.clone();
                tokio::spawn(async move {
                    let mut stream = client.execute(action).await;
                    let first = stream.message().await.expect("a message").map(|_| start.elapsed());
                    let mut done = false;
                    while let Some(operation) = stream.message().await.expect("the stream goes on") {
                        done = operation.done;
                    }
                    (first, done)
                })
            })
            .collect();
        let mut last = Duration::ZERO;
        let mut completed = 0;
        for run in runs {
            let (first, done) = run.await.expect("no panic");
            last = last.max(first.unwrap_or(Duration::MAX));
            completed += usize::from(done);
        }
        (last, completed, start.elapsed())
    });
    report.add(
        "2,000 actions enqueued at once: last stream's first message",
        format!("{:.0} ms, {done} completed", ms(last)),
        "-".into(),
        "200 ms, none lost",
        last <= Duration::from_millis(200) && done == ACTIONS,
    );
    let (machine, actions) = (spawn_rate(slots(), ACTIONS), done as f64 / took.as_secs_f64());
    report.add(
        "2,000 actions enqueued at once: until the last is done",
        format!("{actions:.0}/s ({:.0} %)", 100.0 * actions / machine),
        format!("{machine:.0} spawns/s on {} threads", slots()),
        "1,300/s",
        actions >= 1_300.0,
    );
}

/// Large blobs by ByteStream, compared with the same chunks from the bare server.
pub(crate) fn streams(report: &mut Report) {
    const SIZE: usize = 512 << 20;
    const CHUNK: usize = 128 << 10;
    const ROUNDS: usize = 3;
    let runtime = runtime();
    let target = Target::start();
    let bare = Bare::start();
    let mut blob = incompressible(SIZE);
    runtime.block_on(async {
        let ours = Client::connect(&target.endpoint).await.bytes;
        let theirs = Client::connect(&bare.endpoint).await.bytes;
        let (mut up, mut bare_up, mut down, mut bare_down) = (0f64, 0f64, 0f64, 0f64);
        for round in 0..ROUNDS {
            blob[..8].copy_from_slice(&(round as u64).to_le_bytes());
            let bytes = Bytes::from(blob.clone());
            let digest = DigestFunction::Sha256.digest(&bytes);
            bare_up = bare_up.max(write(&theirs, digest, &bytes, CHUNK).await);
            up = up.max(write(&ours, digest, &bytes, CHUNK).await);
            let sized =
                ReadRequest { read_offset: CHUNK as i64, read_limit: SIZE as i64, ..Default::default() };
            bare_down = bare_down.max(read(&theirs, sized, SIZE).await);
            let named = ReadRequest { resource_name: digest.blob_name(), ..Default::default() };
            down = down.max(read(&ours, named, SIZE).await);
        }
        for (what, ours, bare, goal) in [("upload", up, bare_up, 0.6), ("download", down, bare_down, 0.8)] {
            report.add(
                &format!("ByteStream {what} of 512 MiB in chunks of 128 KiB"),
                format!("{:.0} MB/s ({:.0} %)", ours / 1e6, 100.0 * ours / bare),
                format!("bare tonic stream {:.0} MB/s", bare / 1e6),
                &format!("{:.0} %", goal * 100.0),
                ours >= bare * goal,
            );
        }
    });
}

/// Incompressible bytes, made once, so that the client spends no time on making them.
pub(crate) fn incompressible(size: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut blob = vec![0u8; size];
    for word in blob.chunks_exact_mut(8) {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        word.copy_from_slice(&state.to_le_bytes());
    }
    blob
}

pub(crate) async fn write(
    client: &ByteStreamClient<Channel>,
    digest: Digest,
    bytes: &Bytes,
    chunk: usize,
) -> f64 {
    let name = format!("uploads/6ba7b810-9dad-11d1-80b4-00c04fd430c8/{}", digest.blob_name());
    let (bytes, size) = (bytes.clone(), bytes.len());
    let messages = (0..size).step_by(chunk).map(move |offset| {
        let end = (offset + chunk).min(size);
        WriteRequest {
            resource_name: if offset == 0 { name.clone() } else { String::new() },
            write_offset: offset as i64,
            finish_write: end == size,
            data: bytes.slice(offset..end),
        }
    });
    let start = Instant::now();
    let reply = client.clone().write(stream::iter(messages)).await.expect("it is stored").into_inner();
    assert_eq!(reply.committed_size, size as i64);
    size as f64 / start.elapsed().as_secs_f64()
}

pub(crate) async fn read(client: &ByteStreamClient<Channel>, request: ReadRequest, size: usize) -> f64 {
    let start = Instant::now();
    let mut stream = client.clone().read(request).await.expect("it is there").into_inner();
    let mut received = 0;
    while let Some(message) = stream.message().await.expect("the stream goes on") {
        received += message.data.len();
    }
    assert_eq!(received, size);
    size as f64 / start.elapsed().as_secs_f64()
}

/// Resident memory when idle, and with a long queue of watched operations.
pub(crate) fn memory(report: &mut Report) {
    const QUEUED: usize = 10_000;
    const CONNECTIONS: usize = 10;
    let target = Target::start();
    let idle = resident(target.pid());
    report.add("idle server, resident", mb(idle), "-".into(), "30 MB", idle < 30_000_000);
    let loaded = runtime().block_on(async {
        let mut clients = Vec::new();
        for _ in 0..CONNECTIONS {
            clients.push(Client::connect(&target.endpoint).await);
        }
        let mut streams = Vec::new();
        for i in 0..QUEUED {
            let client = &clients[i % CONNECTIONS];
            let action = client.upload_action(&["/bin/sleep", "600"], &format!("queued {i}")).await;
            let mut stream = client.execute(action).await;
            stream.message().await.expect("a message");
            streams.push(stream);
        }
        resident(target.pid())
    });
    report.add(
        "10,000 queued operations with open streams, resident",
        mb(loaded),
        "-".into(),
        "200 MB",
        loaded < 200_000_000,
    );
}

/// A store of a million small blobs: the memory of its index, and the time until it serves after a restart.
pub(crate) fn million_blobs(report: &mut Report) {
    const BLOBS: usize = 1_000_000;
    const BATCH: usize = 4_000;
    let target = Target::start();
    let before = resident(target.pid());
    let runtime = runtime();
    runtime.block_on(async {
        let client = Client::connect(&target.endpoint).await;
        for start in (0..BLOBS).step_by(BATCH) {
            client.upload((start..start + BATCH).map(|i| format!("small blob {i}").into_bytes())).await;
        }
    });
    let grown = resident(target.pid()).saturating_sub(before);
    let store = target.into_store();
    let target = Target::start_on(store, &[]);
    // After a start the process holds only the index, without the buffers of a million uploads.
    let index = resident(target.pid()).saturating_sub(before) / BLOBS as u64;
    report.add(
        "1,000,000 small blobs: memory a blob",
        format!("{index} B (after uploading them: {} B)", grown / BLOBS as u64),
        "-".into(),
        "250 B",
        index < 250,
    );
    report.add(
        "1,000,000 small blobs: start until served",
        format!("{:.1} s", target.startup.as_secs_f64()),
        "-".into(),
        "10 s",
        target.startup < Duration::from_secs(10),
    );
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn mb(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}
