//! Metrics and health of the real binary: each metric changes for the reason that `docs/metrics.md` gives.

use crate::support::{PATIENCE, Server, empty, eventually_async, files_below, http_client, sh, sha256};
use futures::{StreamExt as _, stream};
use gorego_reapi::proto::{
    bytestream::{ReadRequest, WriteRequest},
    longrunning::CancelOperationRequest,
    reapi::{Action, GetActionResultRequest, RequestMetadata},
};
use prost::Message as _;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};
use tokio::{io::AsyncWriteExt as _, net::TcpStream};
use tonic::{Code, Request, metadata::MetadataValue};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

const EXECUTION: &str = "build.bazel.remote.execution.v2.Execution";

/// A server with an HTTP port.
struct Watched {
    server: Server,
    base: String,
    http: reqwest::Client,
}

/// The samples of a scrape, by name and labels as they are in the text.
type Samples = BTreeMap<String, f64>;

impl Watched {
    async fn start(overrides: &[(&str, &str)]) -> Self {
        let server = Server::with(&[&[("HTTP__LISTEN_ADDR", "127.0.0.1:0")], overrides].concat()).await;
        let base = format!("http://{}", server.http_address());
        Self { server, base, http: http_client() }
    }

    async fn text(&self) -> String {
        let response = self.http.get(format!("{}/metrics", self.base)).send().await.unwrap();
        assert_eq!(response.status(), 200);
        let kind = response.headers()["content-type"].to_str().unwrap().to_owned();
        assert!(kind.starts_with("application/openmetrics-text; version=1.0.0"), "{kind}");
        response.text().await.unwrap()
    }

    async fn samples(&self) -> Samples {
        let text = self.text().await;
        assert!(text.ends_with("# EOF\n"));
        let samples = text.lines().filter(|line| !line.starts_with('#'));
        let samples = samples.map(|line| {
            let (name, value) = line.rsplit_once(' ').unwrap();
            (name.to_owned(), value.parse().unwrap())
        });
        samples.collect()
    }

    /// Waits until a sample is as expected. Scrapes within a tenth of a second are the same.
    async fn sees(&self, name: &str, is_right: impl Fn(f64) -> bool) {
        let end = Instant::now() + PATIENCE;
        loop {
            let samples = self.samples().await;
            let value = samples.get(name).copied();
            if value.is_some_and(&is_right) {
                return;
            }
            assert!(Instant::now() < end, "{name} is {value:?} of {samples:#?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn status(&self, path: &str) -> u16 {
        self.http
            .get(format!("{}{path}", self.base))
            .send()
            .await
            .map_or(0, |answer| answer.status().as_u16())
    }
}

fn is(expected: f64) -> impl Fn(f64) -> bool {
    move |value| value == expected
}

async fn health(server: &Server, service: &str) -> i32 {
    let channel = server.client().await.channel;
    let request = HealthCheckRequest { service: service.into() };
    HealthClient::new(channel).check(request).await.unwrap().into_inner().status
}

#[tokio::test]
async fn requests_actions_and_look_ups_are_counted() {
    let watched = Watched::start(&[("EXECUTION__CONCURRENCY", "1")]).await;
    let client = watched.server.client().await;
    let blob = client.upload("a blob").await;
    assert_eq!(client.read(blob).await.unwrap(), b"a blob");
    let action = client.action(sh("echo out"), empty()).await;
    assert!(client.cached(action).await.is_none());
    client.run(action).await;
    assert!(client.cached(action).await.is_some());
    let fails = client.action(sh("exit 3"), empty()).await;
    client.run(fails).await;
    let rpcs = |method: &str, code: &str| {
        format!("gorego_grpc_requests_total{{method=\"{method}\",code=\"{code}\"}}")
    };
    watched.sees(&rpcs("Execution/Execute", "OK"), is(2.0)).await;
    watched.sees(&rpcs("ActionCache/GetActionResult", "NOT_FOUND"), is(1.0)).await;
    watched.sees(&rpcs("ActionCache/GetActionResult", "OK"), is(1.0)).await;
    watched.sees("gorego_grpc_request_seconds_count{method=\"Execution/Execute\"}", is(2.0)).await;
    for direction in ["received", "sent"] {
        let name = format!("gorego_grpc_{direction}_bytes_total{{method=\"Execution/Execute\"}}");
        watched.sees(&name, |bytes| bytes > 100.0).await;
    }
    for (result, count) in [("hit", 1.0), ("miss", 3.0)] {
        let labels = format!("instance_name=\"\",mnemonic=\"none\",result=\"{result}\"");
        watched.sees(&format!("gorego_action_cache_lookups_total{{{labels}}}"), is(count)).await;
    }
    for outcome in ["succeeded", "failed"] {
        watched.sees(&format!("gorego_action_runs_total{{outcome=\"{outcome}\"}}"), is(1.0)).await;
    }
    for stage in ["queue", "fetch", "stage", "run", "upload"] {
        watched.sees(&format!("gorego_action_stage_seconds_count{{stage=\"{stage}\"}}"), is(2.0)).await;
    }
    watched.sees("gorego_http_requests_total{method=\"GET\",code=\"200\"}", |count| count > 5.0).await;
    watched.sees("gorego_http_sent_bytes_total{method=\"GET\"}", |bytes| bytes > 5_000.0).await;
    assert_eq!(
        watched.status("/ac/e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855").await,
        404
    );
    watched.sees("gorego_http_requests_total{method=\"GET\",code=\"404\"}", is(1.0)).await;
    watched.sees("gorego_http_request_seconds_count{method=\"GET\"}", |count| count > 5.0).await;
    let put = watched.http.put(format!("{}/cache/key", watched.base)).body(vec![1; 1_000]);
    assert_eq!(put.send().await.unwrap().status(), 201);
    watched.sees("gorego_http_received_bytes_total{method=\"PUT\"}", is(1_000.0)).await;
    watched.sees("gorego_connections", |open| open >= 2.0).await;
}

#[tokio::test]
async fn runs_are_told_apart_by_who_is_at_fault() {
    let watched =
        Watched::start(&[("EXECUTION__SANDBOX__MODE", "off"), ("EXECUTION__MAX_ATTEMPTS", "2")]).await;
    let client = watched.server.client().await;
    // Without a sandbox, $PPID is the process that runs commands for the worker.
    let kills_its_runner = client.action(sh("kill -9 $PPID; sleep 600"), empty()).await;
    assert_eq!(client.run(kills_its_runner).await.status.unwrap().code, Code::Unavailable as i32);
    let timeout = |action: &mut Action| {
        action.timeout = Some(prost_types::Duration { seconds: 0, nanos: 200_000_000 });
    };
    let slow = client.action_with(sh("sleep 600"), empty(), timeout).await;
    assert_eq!(client.run(slow).await.status.unwrap().code, Code::DeadlineExceeded as i32);
    let mut cancelled = client.start(client.action(sh("sleep 601"), empty()).await).await;
    watched.sees("gorego_slots{pool=\"local\",state=\"busy\"}", is(1.0)).await;
    let name = cancelled.next().await.unwrap().name;
    client.operations.clone().cancel_operation(CancelOperationRequest { name }).await.unwrap();
    for (outcome, count) in [("broken", 2.0), ("timed_out", 1.0), ("cancelled", 1.0), ("succeeded", 0.0)] {
        watched.sees(&format!("gorego_action_runs_total{{outcome=\"{outcome}\"}}"), is(count)).await;
    }
    watched.sees("gorego_sandbox_failures_total{kind=\"runner\"}", is(2.0)).await;
    watched.sees("gorego_sandbox_failures_total{kind=\"panic\"}", is(0.0)).await;
}

#[tokio::test]
async fn look_ups_are_told_apart_by_what_clients_say_of_their_actions() {
    let watched = Watched::start(&[]).await;
    let client = watched.server.client().await;
    let action = client.action(sh("echo out"), empty()).await;
    for mnemonic in ["CppCompile", "a\"} 1\n"] {
        let metadata = RequestMetadata { action_mnemonic: mnemonic.into(), ..Default::default() };
        let asked = GetActionResultRequest { action_digest: Some(action.to_wire()), ..Default::default() };
        let mut request = Request::new(asked);
        let value = MetadataValue::from_bytes(&metadata.encode_to_vec());
        request.metadata_mut().insert_bin("build.bazel.remote.execution.v2.requestmetadata-bin", value);
        let missed = client.action_cache.clone().get_action_result(request).await.unwrap_err();
        assert_eq!(missed.code(), Code::NotFound);
    }
    for mnemonic in ["CppCompile", "other"] {
        let labels = format!("instance_name=\"\",mnemonic=\"{mnemonic}\",result=\"miss\"");
        watched.sees(&format!("gorego_action_cache_lookups_total{{{labels}}}"), is(1.0)).await;
    }
}

#[tokio::test]
async fn slots_the_queue_and_the_demand_follow_the_actions() {
    let watched = Watched::start(&[("EXECUTION__CONCURRENCY", "1")]).await;
    let client = watched.server.client().await;
    let of = |name: &str| format!("gorego_{name}{{pool=\"local\"}}");
    let slots = |state: &str| format!("gorego_slots{{pool=\"local\",state=\"{state}\"}}");
    watched.sees(&slots("free"), is(1.0)).await;
    let mut running = Vec::new();
    for number in 0..3 {
        running
            .push(client.start(client.action(sh(&format!("sleep 60; echo {number}")), empty()).await).await);
    }
    watched.sees(&slots("busy"), is(1.0)).await;
    watched.sees(&of("queue_tasks"), is(2.0)).await;
    watched.sees(&of("desired_slots"), is(3.0)).await;
    watched.sees(&of("queue_oldest_seconds"), |age| age > 0.0).await;
    watched.sees("gorego_pools_age_seconds", |age| age < 1.0).await;
    watched.sees("gorego_requests_open", |open| open >= 3.0).await;
    drop(client);
    drop(running);
}

#[tokio::test]
async fn the_store_is_measured_evictions_damage_and_leases_included() {
    let watched = Watched::start(&[("MAX_SIZE_GB", "1 MB")]).await;
    let client = watched.server.client().await;
    let blob = client.upload(vec![7; 100_000]).await;
    watched.sees("gorego_store_entries{kind=\"blob\"}", |count| count >= 1.0).await;
    watched.sees("gorego_store_used_bytes", |used| used >= 100_000.0).await;
    watched.sees("gorego_store_limit_bytes", |limit| limit > 500_000.0).await;
    let of_blob = |path: &PathBuf| path.to_string_lossy().contains(&blob.hash_hex());
    let damaged = files_below(watched.server.store()).into_iter().find(of_blob).unwrap();
    fs::write(&damaged, vec![8; 100_000]).unwrap();
    assert!(client.read(blob).await.is_err());
    watched.sees("gorego_store_damaged_entries_total", is(1.0)).await;
    watched.sees("gorego_broken_promises_total", is(1.0)).await;
    for number in 0..20u8 {
        client.upload(vec![number; 100_000]).await;
    }
    watched.sees("gorego_store_evicted_entries_total", |count| count > 5.0).await;
    watched.sees("gorego_store_evicted_bytes_total", |bytes| bytes > 500_000.0).await;
    watched.sees("gorego_store_leased_bytes", |leased| leased > 500_000.0).await;
    watched.sees("gorego_store_withdrawn_leases_total", |count| count > 5.0).await;
    watched.sees("gorego_broken_promises_total", is(1.0)).await;
}

#[tokio::test]
async fn what_open_streams_hold_of_the_store_is_measured() {
    const SIZE: usize = 4_000_000;
    let watched = Watched::start(&[]).await;
    let client = watched.server.client().await;
    let blob = client.upload(vec![7; SIZE]).await;
    watched.sees("gorego_store_held_bytes", is(0.0)).await;
    watched.sees("gorego_store_oldest_use_seconds", |age| age > 0.0).await;
    let request = ReadRequest { resource_name: client.name(&format!("blobs/{blob}")), ..Default::default() };
    let mut read = client.bytes.clone().read(request).await.unwrap().into_inner();
    assert!(read.message().await.unwrap().is_some());
    watched.sees("gorego_store_held_bytes", |leased| leased >= SIZE as f64).await;
    drop(read);
    watched.sees("gorego_store_held_bytes", is(0.0)).await;
    let other = sha256(&[8; SIZE]);
    let piece = WriteRequest {
        resource_name: client.name(&format!("uploads/{}/blobs/{other}", uuid::Uuid::new_v4())),
        data: vec![8; SIZE / 2].into(),
        ..Default::default()
    };
    let pieces = stream::once(async { piece }).chain(stream::pending());
    let upload = tokio::spawn(async move { client.bytes.clone().write(pieces).await });
    // Room is reserved for the bytes that are written. The last bytes of a stalled stream wait in memory.
    watched.sees("gorego_store_reserved_bytes", |reserved| reserved >= (SIZE / 4) as f64).await;
    upload.abort();
}

#[tokio::test]
async fn connections_that_the_server_closes_are_counted_by_reason() {
    let watched = Watched::start(&[]).await;
    let closed = "gorego_connections_closed_total{reason=\"too_many_empty_frames\"}";
    watched.sees(closed, is(0.0)).await;
    let address = watched.server.endpoint().trim_start_matches("http://").to_owned();
    let mut client = TcpStream::connect(address).await.unwrap();
    client.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    // These frames have a type that HTTP/2 does not know.
    let frames = [0, 0, 0, 0xb0, 0, 0, 0, 0, 0].repeat(60_000);
    // The connection may be closed before the last one.
    let _ = client.write_all(&frames).await;
    watched.sees(closed, is(1.0)).await;
}

#[tokio::test]
async fn the_process_is_measured() {
    let watched = Watched::start(&[]).await;
    let first = watched.samples().await;
    assert!(first["gorego_process_resident_bytes"] > 1e6);
    assert!(first["gorego_process_open_descriptors"] > 5.0);
    assert!(first["gorego_process_max_descriptors"] >= first["gorego_process_open_descriptors"]);
    assert!(first["gorego_process_start_time_seconds"] > 1.7e9);
    assert!(first.keys().any(|name| name.starts_with("gorego_build_info{version=")));
    let cpu = first["gorego_process_cpu_seconds_total"];
    watched.sees("gorego_process_cpu_seconds_total", |now| now > cpu).await;
    watched.sees("gorego_log_lines_dropped_total", is(0.0)).await;
}

#[tokio::test]
async fn readiness_and_health_end_with_the_drain_and_the_process_stays_alive() {
    let mut watched = Watched::start(&[("EXECUTION__CONCURRENCY", "1")]).await;
    assert_eq!(watched.status("/healthz").await, 200);
    eventually_async("ready", async || watched.status("/readyz").await == 200).await;
    watched.sees("gorego_ready", is(1.0)).await;
    eventually_async("serving", async || health(&watched.server, EXECUTION).await == 1).await;
    let client = watched.server.client().await;
    let action = client.action(sh("sleep 3"), empty()).await;
    let running = client.start(action).await;
    watched.sees("gorego_slots{pool=\"local\",state=\"busy\"}", is(1.0)).await;
    watched.server.signal("TERM");
    eventually_async("not ready", async || watched.status("/readyz").await == 503).await;
    assert_eq!(watched.status("/healthz").await, 200);
    watched.sees("gorego_ready", is(0.0)).await;
    for service in ["", EXECUTION] {
        assert_eq!(health(&watched.server, service).await, 2, "{service}");
    }
    assert_eq!(running.finish().await.result.unwrap().exit_code, 0, "a drain lets actions end");
    watched.server.exit().await;
}

#[tokio::test]
async fn a_cache_alone_is_ready_and_says_that_it_executes_nothing() {
    let watched = Watched::start(&[("EXECUTION__ENABLED", "false")]).await;
    assert_eq!(watched.status("/readyz").await, 200);
    assert_eq!(health(&watched.server, "").await, 1);
    eventually_async("not serving", async || health(&watched.server, EXECUTION).await == 2).await;
    let samples = watched.samples().await;
    assert!(!samples.keys().any(|name| name.starts_with("gorego_slots")), "there are no pools");
}

#[tokio::test]
async fn failed_authentications_are_counted_and_the_metrics_need_a_permission() {
    let directory = tempfile::tempdir().unwrap();
    let tokens = directory.path().join("tokens");
    let tokens = ("ACCESS__TOKENS", tokens.to_str().unwrap());
    let closed = Watched::start(&[tokens]).await;
    for (path, status) in [("/metrics", 401), ("/healthz", 200), ("/readyz", 200)] {
        assert_eq!(closed.status(path).await, status, "{path}");
    }
    let roles = ("ACCESS__ROLES", r#"{ scraper = { permissions = ["metrics"], instances = ["*"] } }"#);
    let open = Watched::start(&[tokens, roles, ("ACCESS__ANONYMOUS", r#"["scraper"]"#)]).await;
    for (credential, reason) in [("Bearer gorego_x", "unknown"), ("Basic %%%", "malformed")] {
        let failures = format!("gorego_authentication_failures_total{{reason=\"{reason}\"}}");
        open.sees(&failures, is(0.0)).await;
        let request = open.http.get(format!("{}/metrics", open.base)).header("authorization", credential);
        assert_eq!(request.send().await.unwrap().status(), 401, "{credential}");
        open.sees(&failures, is(1.0)).await;
    }
    open.sees("gorego_http_requests_total{method=\"GET\",code=\"401\"}", is(2.0)).await;
}

/// A scrape asks the owners of the numbers once, and simultaneous scrapes share its text.
#[tokio::test]
async fn many_scrapes_at_once_get_the_same_text() {
    let watched = Watched::start(&[]).await;
    let first = watched.text().await;
    let texts = futures::future::join_all((0..20).map(|_| watched.text())).await;
    let different: BTreeSet<_> = texts.iter().chain([&first]).collect();
    assert!(different.len() < 10, "{} texts", different.len());
}
