//! Small calls at full rate: how many a second, and how much CPU time of the server each takes.
//!
//! The calls are made by tasks that each wait for their answer, over one connection. Beside each figure stands what a
//! bare tonic server does with a call of the same shape, measured right before. The goals are CPU times. Rates depend
//! on what the client leaves of the machine, so they are to be read as a share of the bare rate.

use crate::{
    bare::Bare,
    machine::cpu_time,
    report::Report,
    target::{Client, Target},
};
use gorego_client::stubs::{ActionCacheClient, ByteStreamClient, CapabilitiesClient};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    proto::{
        bytestream::ReadRequest,
        reapi::{
            ActionResult, FindMissingBlobsRequest, GetActionResultRequest, GetCapabilitiesRequest,
            OutputFile, UpdateActionResultRequest,
        },
    },
};
use std::{
    future::Future,
    time::{Duration, Instant},
};
use tokio::runtime::Runtime;
use tonic::{Code, transport::Channel};

/// Callers where a goal says "64 at once".
const CALLERS: usize = 64;
/// Callers of FindMissingBlobs.
const FIND_CALLERS: usize = 16;
/// Calls of one measurement; `BENCH_CALLS` in the environment has another number, for runs under a profiler.
const CALLS: usize = 40_000;
/// What is not measured: the part of the calls that warms up the server and its caches.
const WARM_UP_PART: usize = 10;
/// Size of the blob that is read.
const BLOB_BYTES: usize = 4 << 10;
/// Digests in one FindMissingBlobs.
const DIGESTS: usize = 1_000;

/// What one kind of call reaches.
#[derive(Clone, Copy)]
struct Figure {
    per_second: f64,
    /// CPU time of the server.
    cpu: Duration,
}

impl Figure {
    fn show(self, bare: Self) -> String {
        let share = 100.0 * self.per_second / bare.per_second;
        format!("{:.0}/s ({share:.0} %), {:.1} us of CPU", self.per_second, micros(self.cpu))
    }

    fn show_bare(self, what: &str) -> String {
        format!("bare tonic {what} {:.0}/s, {:.1} us", self.per_second, micros(self.cpu))
    }
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

fn calls() -> usize {
    std::env::var("BENCH_CALLS").ok().and_then(|calls| calls.parse().ok()).unwrap_or(CALLS)
}

/// Has `callers` tasks make `calls` calls together to the server with this process id.
async fn measure<F>(
    server: u32,
    callers: usize,
    calls: usize,
    call: impl Fn() -> F + Clone + Send + 'static,
) -> Figure
where
    F: Future + Send,
{
    let run = async |calls: usize| {
        let caller = |_| {
            let call = call.clone();
            tokio::spawn(async move {
                for _ in 0..calls.div_ceil(callers) {
                    call().await;
                }
            })
        };
        for caller in (0..callers).map(caller).collect::<Vec<_>>() {
            caller.await.expect("no call fails");
        }
        calls.div_ceil(callers) * callers
    };
    run(calls / WARM_UP_PART).await;
    let (start, before) = (Instant::now(), cpu_time(server));
    let made = run(calls).await;
    let cpu = cpu_time(server).saturating_sub(before) / u32::try_from(made).expect("few calls");
    Figure { per_second: made as f64 / start.elapsed().as_secs_f64(), cpu }
}

async fn channel(endpoint: &str) -> Channel {
    Channel::from_shared(endpoint.to_owned()).expect("an endpoint").connect().await.expect("it listens")
}

/// A call without any work.
async fn bare_unary(callers: usize) -> Figure {
    let bare = Bare::start();
    let client = CapabilitiesClient::new(channel(&bare.endpoint).await);
    measure(bare.pid(), callers, calls(), move || {
        let mut client = client.clone();
        async move { client.get_capabilities(GetCapabilitiesRequest::default()).await.expect("an answer") }
    })
    .await
}

/// GetActionResult of an action without a result, and of one with three outputs.
pub(crate) fn action_results(report: &mut Report) {
    let runtime = Runtime::new().expect("a runtime");
    let bare = runtime.block_on(bare_unary(CALLERS));
    let target = Target::start();
    let (miss, hit) = runtime.block_on(async {
        let store = Client::connect(&target.endpoint).await;
        let client = ActionCacheClient::new(channel(&target.endpoint).await);
        let get = |digest: Digest, expected: Code| {
            let request =
                GetActionResultRequest { action_digest: Some(digest.to_wire()), ..Default::default() };
            let client = client.clone();
            move || {
                let (mut client, request) = (client.clone(), request.clone());
                async move {
                    let code =
                        client.get_action_result(request).await.map_or_else(|s| s.code(), |_| Code::Ok);
                    assert_eq!(code, expected);
                }
            }
        };
        let unknown = DigestFunction::Sha256.digest(b"an action without a result");
        let miss = measure(target.pid(), CALLERS, calls(), get(unknown, Code::NotFound)).await;
        let known = put_result(&store, &mut client.clone()).await;
        (miss, measure(target.pid(), CALLERS, calls(), get(known, Code::Ok)).await)
    });
    for (what, figure, goal) in [("a miss", miss, 16), ("a hit with 3 outputs", hit, 25)] {
        report.add(
            &format!("GetActionResult, {what}, 64 at once"),
            figure.show(bare),
            bare.show_bare("unary call"),
            &format!("{goal} us"),
            figure.cpu <= Duration::from_micros(goal),
        );
    }
}

async fn put_result(store: &Client, client: &mut ActionCacheClient<Channel>) -> Digest {
    let blobs: Vec<Vec<u8>> = (0..3).map(|n| format!("output {n}").into_bytes()).collect();
    let output_files = blobs
        .iter()
        .enumerate()
        .map(|(n, blob)| OutputFile {
            path: format!("bazel-out/k8-fastbuild/bin/package/output-{n}.o"),
            digest: Some(DigestFunction::Sha256.digest(blob).to_wire()),
            ..Default::default()
        })
        .collect();
    store.upload(blobs).await;
    let action = DigestFunction::Sha256.digest(b"an action with a result");
    let request = UpdateActionResultRequest {
        action_digest: Some(action.to_wire()),
        action_result: Some(ActionResult { output_files, ..Default::default() }),
        ..Default::default()
    };
    client.update_action_result(request).await.expect("it is stored");
    action
}

/// ByteStream.Read of a small blob.
pub(crate) fn small_reads(report: &mut Report) {
    let runtime = Runtime::new().expect("a runtime");
    let read = |client: ByteStreamClient<Channel>, request: ReadRequest| {
        move || {
            let (mut client, request) = (client.clone(), request.clone());
            async move {
                let mut messages = client.read(request).await.expect("it is there").into_inner();
                let mut received = 0;
                while let Some(message) = messages.message().await.expect("the stream goes on") {
                    received += message.data.len();
                }
                assert_eq!(received, BLOB_BYTES);
            }
        }
    };
    let size = BLOB_BYTES as i64;
    let bare = runtime.block_on(async {
        let bare = Bare::start();
        let client = ByteStreamClient::new(channel(&bare.endpoint).await);
        let request = ReadRequest { read_offset: size, read_limit: size, ..Default::default() };
        measure(bare.pid(), CALLERS, calls(), read(client, request)).await
    });
    let target = Target::start();
    let figure = runtime.block_on(async {
        let store = Client::connect(&target.endpoint).await;
        let blob: Vec<u8> = (0..BLOB_BYTES).map(|n| (n * 31 % 251) as u8).collect();
        let resource_name = DigestFunction::Sha256.digest(&blob).blob_name();
        store.upload([blob]).await;
        let client = ByteStreamClient::new(channel(&target.endpoint).await);
        let request = ReadRequest { resource_name, ..Default::default() };
        measure(target.pid(), CALLERS, calls(), read(client, request)).await
    });
    report.add(
        "ByteStream.Read of 4 KiB, 64 at once",
        figure.show(bare),
        bare.show_bare("read"),
        "25 us",
        figure.cpu <= Duration::from_micros(25),
    );
}

/// Look-ups of 1,000 digests: all of them stored, and half of them.
pub(crate) fn find_missing(report: &mut Report) {
    let calls = calls() / 4;
    let runtime = Runtime::new().expect("a runtime");
    let bare = runtime.block_on(bare_unary(FIND_CALLERS));
    let target = Target::start();
    for (what, stored) in [("half of them", DIGESTS / 2), ("all of them", DIGESTS)] {
        let figure = runtime.block_on(async {
            let client = Client::connect(&target.endpoint).await;
            let blobs: Vec<Vec<u8>> = (0..DIGESTS).map(|i| format!("blob {i}").into_bytes()).collect();
            client.upload(blobs.iter().take(stored).cloned()).await;
            let request = FindMissingBlobsRequest {
                blob_digests: blobs.iter().map(|b| DigestFunction::Sha256.digest(b).to_wire()).collect(),
                ..Default::default()
            };
            let cas = client.cas;
            measure(target.pid(), FIND_CALLERS, calls, move || {
                let (mut cas, request) = (cas.clone(), request.clone());
                async move {
                    let reply = cas.find_missing_blobs(request).await.expect("an answer").into_inner();
                    assert_eq!(reply.missing_blob_digests.len(), DIGESTS - stored);
                }
            })
            .await
        });
        let cpu = micros(figure.cpu) / DIGESTS as f64;
        let millions = figure.per_second * DIGESTS as f64 / 1e6;
        report.add(
            &format!("FindMissingBlobs of 1,000 digests, {what} stored, 16 at once"),
            format!(
                "{millions:.2} M digests/s, {cpu:.3} us of CPU a digest ({:.0} us a call)",
                micros(figure.cpu)
            ),
            bare.show_bare("unary call"),
            "0.2 us a digest",
            cpu <= 0.2,
        );
    }
}

/// Executes that the action cache answers.
pub(crate) fn cached_execute(report: &mut Report) {
    let runtime = Runtime::new().expect("a runtime");
    let bare = runtime.block_on(bare_unary(CALLERS));
    let target = Target::start();
    let cached = runtime.block_on(async {
        let client = Client::connect(&target.endpoint).await;
        let action = client.upload_action(&["/bin/true"], "cached").await;
        client.run(action).await;
        measure(target.pid(), CALLERS, calls(), move || {
            let client = client.clone();
            async move { client.run(action).await }
        })
        .await
    });
    report.add(
        "cached Execute, 64 at once",
        cached.show(bare),
        bare.show_bare("unary call"),
        "30 us",
        cached.cpu <= Duration::from_micros(30),
    );
}
