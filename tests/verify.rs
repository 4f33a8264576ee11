//! `gorego verify` as a user runs it: the real suite with the real server, and with one that only makes claims.

#![allow(clippy::unwrap_used)]

mod support;

use gorego::grpc::services::capabilities_server::{Capabilities, CapabilitiesServer};
use gorego_reapi::proto::{
    reapi::{
        ActionCacheUpdateCapabilities, CacheCapabilities, ExecutionCapabilities, FastCdc2020Params,
        GetCapabilitiesRequest, ServerCapabilities,
    },
    semver::SemVer,
};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    process::{Command, Output},
    time::{Duration, Instant},
};
use support::Server;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tonic::{Request, Response, Status, transport::server::TcpIncoming};

/// Time limit of a run on any machine: far more than the half minute that it needs.
const RUN_LIMIT: Duration = Duration::from_secs(300);

/// A server with several instances: one that shares nothing with the first, one with restrictions, and one with another
/// digest function. It may fetch from the suite (AST).
const INSTANCES: &str = r#"
[assets]
allowed_hosts = ["127.0.0.1"]

[instances."a/b/c"]

[instances.little]
action_cache_updates = false
execution = false
digest_functions = ["sha256"]

[instances.blake]
digest_functions = ["blake3"]
"#;

/// Checks that are skipped for our server, each with the beginning of the reason. All others must pass.
const LEFT_OUT: &[(&str, &str)] = &[
    (
        "GEN-23 a request with a wrong credential or none is unauthenticated",
        "needs a server that asks for credentials",
    ),
    ("GEN-26 pings on an idle connection are tolerated", "watches a connection for 35s"),
    ("CAS-04 a lookup extends the life of a blob", "needs a store that is about to evict"),
    ("CAS-08 FindMissing fails when the index cannot answer", "needs a fault in the server's index"),
    (
        "CAS-16 an item above the largest blob is refused alone",
        "needs a server whose largest blob is smaller",
    ),
    ("BS-07 GEN-25 a gigabyte is read whole", "moves a gigabyte"),
    ("BS-16 a read never ends OK short", "needs a file that is damaged in the server's store"),
    ("BS-17 slow readers cost bounded memory", "needs a look at the memory of the server"),
    ("AC-04 a hit extends the life of its blobs", "needs a store that is about to evict"),
    ("AC-12 an update without permission is refused as such", "needs a server, or an --instance, where"),
    ("EXE-11 a silent operation is repeated", "needs a minute of silence"),
    ("EXE-62 a lost worker is UNAVAILABLE or invisible", "needs a worker to be killed"),
];

/// Runs `gorego verify` with these arguments, within the time limit.
async fn verify(args: &[&str]) -> Output {
    let begin = Instant::now();
    let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
    let run = move || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gorego"));
        command.arg("verify").args(args).env_clear().output().unwrap()
    };
    let output = tokio::task::spawn_blocking(run).await.unwrap();
    assert!(begin.elapsed() < RUN_LIMIT, "{:?}", begin.elapsed());
    output
}

/// The checks of a report by outcome: rules and title, and the reason.
fn by_outcome(output: &Output) -> BTreeMap<String, Vec<(String, String)>> {
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let mut found: BTreeMap<String, Vec<(String, String)>> = BTreeMap::new();
    for check in report["checks"].as_array().unwrap() {
        let text = |field: &str| check[field].as_str().unwrap_or_default().to_owned();
        let rules: Vec<&str> =
            check["rules"].as_array().unwrap().iter().map(|id| id.as_str().unwrap()).collect();
        let detail = [text("reason"), text("expected"), text("observed")].join(" / ");
        found
            .entry(text("outcome"))
            .or_default()
            .push((format!("{} {}", rules.join(" "), text("title")), detail));
    }
    found
}

/// A server with the configuration [`INSTANCES`].
async fn server_with_instances() -> (Server, tempfile::NamedTempFile) {
    let config = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(config.path(), INSTANCES).unwrap();
    // The suite leaves work behind and checks it later, while its other checks wait for slots.
    let settings =
        [("CONFIG", config.path().to_str().unwrap()), ("EXECUTION__CONTENDED_ABANDON_GRACE", "1m")];
    (Server::with(&settings).await, config)
}

#[tokio::test(flavor = "multi_thread")]
async fn our_own_server_passes_and_what_is_left_out_is_known() {
    let (server, _config) = server_with_instances().await;
    let output = verify(&[&server.endpoint(), "--other-instance", "a/b/c", "--json", "--strict"]).await;
    let mut found = by_outcome(&output);
    assert!(!found.contains_key("fail"), "{:#?}", found["fail"]);
    assert!(!found.contains_key("warn"), "{:#?}", found["warn"]);
    assert!(!found.contains_key("inconclusive"), "{:#?}", found["inconclusive"]);
    assert_eq!(output.status.code(), Some(0));
    let mut left_out = found.remove("absent").unwrap_or_default();
    left_out.extend(found.remove("skipped").unwrap_or_default());
    let known = |(check, reason): &&(String, String)| {
        LEFT_OUT.iter().any(|(name, why)| check == name && reason.starts_with(why))
    };
    let unknown: Vec<_> = left_out.iter().filter(|left| !known(left)).collect();
    assert!(unknown.is_empty(), "left out, and not in the list: {unknown:#?}");
    for (check, _) in LEFT_OUT {
        assert!(left_out.iter().any(|(name, _)| name == check), "{check} is not left out any more");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn instances_that_offer_less_pass_with_what_they_offer() {
    let (server, _config) = server_with_instances().await;
    for (instance, absent) in [("little", "CAP-18"), ("blake", "GEN-11")] {
        let output = verify(&[&server.endpoint(), "--instance", instance, "--json", "--strict"]).await;
        let found = by_outcome(&output);
        assert!(!found.contains_key("fail"), "{instance}: {:#?}", found["fail"]);
        assert_eq!(output.status.code(), Some(0), "{instance}");
        assert!(found["absent"].iter().any(|(check, _)| check.starts_with(absent)), "{instance}: {absent}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_single_group_is_written_for_machines_too() {
    let server = Server::start().await;
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_str().unwrap();
    let output = verify(&[&server.endpoint(), "--only", "BS,CAS-17", "--junit", path]).await;
    assert_eq!(output.status.code(), Some(0));
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(
        table.contains("BS  ByteStream") && table.contains("CAS-17") && !table.contains("CAS-01"),
        "{table}"
    );
    let xml = std::fs::read_to_string(path).unwrap();
    assert!(xml.starts_with("<?xml") && xml.contains("<testsuite name=\"BS\""), "{xml}");
    assert!(xml.contains("failures=\"0\"") && xml.contains("needs a look at the memory"), "{xml}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_rule_is_listed_with_its_checks() {
    let output = verify(&["--list"]).await;
    let text = String::from_utf8(output.stdout).unwrap();
    let mut counts = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with(' ')) {
        *counts.entry(line.split('-').next().unwrap().to_owned()).or_insert(0) += 1;
    }
    let expected = [("GEN", 30), ("CAP", 19), ("CAS", 38), ("BS", 33), ("AC", 15), ("EXE", 64), ("OPS", 5)];
    for (group, count) in expected.into_iter().chain([("AST", 11), ("LOG", 5)]) {
        assert_eq!(counts.remove(group), Some(count), "{group}");
    }
    assert!(counts.is_empty(), "{counts:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_there_and_nonsense_are_told_apart_from_a_bad_server() {
    for args in [&["grpc://127.0.0.1:1"][..], &["nonsense"], &["--only", "XYZ-99"], &["--jobs", "0"]] {
        let output = verify(args).await;
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(!output.stderr.is_empty() && output.stdout.is_empty(), "{args:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_port_of_the_http_cache_is_told_from_one_of_grpc() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("grpc://{}", listener.local_addr().unwrap());
    let serving = tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            // The response of an HTTP/1 server to the first line of HTTP/2.
            let _ = stream.read(&mut [0; 1024]).await;
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n").await;
        }
    });
    let output = verify(&[&endpoint]).await;
    serving.abort();
    assert_eq!(output.status.code(), Some(2));
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(told.contains("speaks HTTP/1 and not gRPC") && told.lines().count() == 1, "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_report_that_cannot_be_written_is_noticed_before_the_server_is_asked_anything() {
    let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    server.set_nonblocking(true).unwrap();
    let endpoint = format!("grpc://{}", server.local_addr().unwrap());
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("absent/report.xml");
    let output = verify(&[&endpoint, "--junit", path.to_str().unwrap()]).await;
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains(path.to_str().unwrap()), "{output:?}");
    assert_eq!(server.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock, "nobody called");
}

/// A server that claims everything and implements nothing.
struct Talker;

#[tonic::async_trait]
impl Capabilities for Talker {
    async fn get_capabilities(
        &self,
        request: Request<GetCapabilitiesRequest>,
    ) -> Result<Response<ServerCapabilities>, Status> {
        if !request.get_ref().instance_name.is_empty() {
            return Err(Status::invalid_argument("no such instance"));
        }
        let functions = vec![1, 9, 8, 5, 6, 2, 10, 3];
        let version = |minor| Some(SemVer { major: 2, minor, ..Default::default() });
        Ok(Response::new(ServerCapabilities {
            cache_capabilities: Some(CacheCapabilities {
                digest_functions: functions.clone(),
                action_cache_update_capabilities: Some(ActionCacheUpdateCapabilities {
                    update_enabled: true,
                }),
                max_batch_total_size_bytes: 4_000_000,
                symlink_absolute_path_strategy: 2,
                supported_compressors: vec![1],
                supported_batch_update_compressors: vec![1],
                max_cas_blob_size_bytes: 1_000_000,
                split_blob_support: true,
                splice_blob_support: true,
                fast_cdc_2020_params: Some(FastCdc2020Params { avg_chunk_size_bytes: 524_288, seed: 0 }),
                ..Default::default()
            }),
            execution_capabilities: Some(ExecutionCapabilities {
                digest_function: 1,
                exec_enabled: true,
                digest_functions: functions,
                ..Default::default()
            }),
            low_api_version: version(0),
            high_api_version: version(3),
            ..Default::default()
        }))
    }
}

/// The rules that a server with only capabilities follows.
const TRUE_OF_A_TALKER: &[&str] = &[
    "CAP-02 the versions are set and overlap 2",
    "CAP-03 the deprecated version is older",
    "CAP-06 the first digest function of execution is set",
    "CAP-07 the digest functions of execution are those of the cache",
    "CAP-14 the strategy for absolute symlinks is named",
    "CAP-17 chunking parameters are in range",
    "CAP-19 every connection gets the same answer quickly",
    "GEN-16 OPS-02 optional methods work or say that they do not exist",
    "GEN-16 methods that do not exist are unimplemented",
];

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_claims_everything_and_does_nothing_passes_nothing_else() {
    let incoming = TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = incoming.local_addr().unwrap();
    let server = tonic::transport::Server::builder().add_service(CapabilitiesServer::new(Talker));
    let serving = tokio::spawn(server.serve_with_incoming(incoming));
    let output = verify(&[&format!("grpc://{address}"), "--json"]).await;
    serving.abort();
    assert_eq!(output.status.code(), Some(1));
    let found = by_outcome(&output);
    let passed: Vec<&str> = found["pass"].iter().map(|(check, _)| check.as_str()).collect();
    for check in &passed {
        assert!(TRUE_OF_A_TALKER.contains(check), "passes against a server that does nothing: {check}");
    }
    assert_eq!(passed.len(), TRUE_OF_A_TALKER.len(), "{passed:?}");
}
