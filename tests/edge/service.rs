//! Behaviour of all connections: capabilities, health, reflection, bursts, and the log.

use crate::harness::Show;
use crate::harness::{Server, absent, digest, executing};
use crate::support::eventually_async;
use gorego_reapi::proto::reapi::{
    self, ExecuteRequest, FindMissingBlobsRequest, GetActionResultRequest, GetCapabilitiesRequest,
    RequestMetadata,
};
use log::kv::{Key, Value, VisitSource};
use prost::Message as _;
use std::{
    collections::BTreeMap,
    sync::{Mutex, Once},
};
use tokio_stream::StreamExt as _;
use tonic::{Code, Request, metadata::MetadataValue};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_reflection::pb::{
    v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    },
    v1alpha,
};

const METADATA: &str = "build.bazel.remote.execution.v2.requestmetadata-bin";

/// CAP-01, GEN-13, GEN-28.
#[tokio::test(flavor = "multi_thread")]
async fn capabilities_are_told_to_anybody_whatever_the_metadata_says() {
    let server = Server::start().await;
    for value in
        [None, Some(&b"\xff\xff random bytes"[..]), Some(&RequestMetadata::default().encode_to_vec())]
    {
        let mut request = Request::new(GetCapabilitiesRequest::default());
        if let Some(value) = value {
            request.metadata_mut().insert_bin(METADATA, MetadataValue::from_bytes(value));
        }
        let answer = server.capabilities.clone().get_capabilities(request).await.unwrap().into_inner();
        assert!(answer.cache_capabilities.is_some() && answer.execution_capabilities.is_some());
    }
    for name in ["blobs", "x/uploads", "/x", "x//y", "nope"] {
        let request = GetCapabilitiesRequest { instance_name: name.into() };
        let status = server.capabilities.clone().get_capabilities(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn health_is_told_for_the_server_and_each_service_until_it_drains() {
    let mut server = Server::start().await;
    let mut health = HealthClient::new(server.channel.clone());
    let check = |service: &str| HealthCheckRequest { service: service.into() };
    let names = [
        "",
        "build.bazel.remote.execution.v2.Execution",
        "google.bytestream.ByteStream",
        "google.longrunning.Operations",
    ];
    for name in names {
        assert_eq!(health.check(check(name)).await.unwrap().into_inner().status, 1, "{name}");
    }
    assert_eq!(health.check(check("nope")).await.unwrap_err().code(), Code::NotFound);
    server.endpoint.health.drain().await;
    for name in names {
        assert_eq!(health.check(check(name)).await.unwrap().into_inner().status, 2, "{name}");
    }
    server.endpoint.shut_down();
    let ended = tokio::time::timeout(std::time::Duration::from_secs(20), &mut server.endpoint.serving).await;
    ended.unwrap().unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn reflection_lists_every_service_in_both_versions() {
    let server = Server::start().await;
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut client = ServerReflectionClient::new(server.channel.clone());
    let mut answers =
        client.server_reflection_info(tokio_stream::iter([request])).await.unwrap().into_inner();
    let answer = answers.next().await.unwrap().unwrap().message_response.unwrap();
    let MessageResponse::ListServicesResponse(list) = answer else { panic!("{answer:?}") };
    let names: Vec<_> = list.service.into_iter().map(|service| service.name).collect();
    for service in [
        "build.bazel.remote.execution.v2.ContentAddressableStorage",
        "google.bytestream.ByteStream",
        "google.longrunning.Operations",
        "grpc.health.v1.Health",
    ] {
        assert!(names.iter().any(|name| name == service), "{service} in {names:?}");
    }
    let request = v1alpha::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(v1alpha::server_reflection_request::MessageRequest::FileContainingSymbol(
            "build.bazel.remote.execution.v2.Execution".into(),
        )),
    };
    let mut client = v1alpha::server_reflection_client::ServerReflectionClient::new(server.channel.clone());
    let mut answers =
        client.server_reflection_info(tokio_stream::iter([request])).await.unwrap().into_inner();
    assert!(answers.next().await.unwrap().is_ok());
}

/// GEN-27: the HTTP/2 library closes a connection on which too many small frames wait to be processed. A build that
/// starts 2,000 actions at once sends that many.
#[tokio::test(flavor = "multi_thread")]
async fn two_thousand_small_requests_at_once_on_one_connection_are_all_answered() {
    let server = Server::start().await;
    let requests = (0..2_000).map(|n| {
        let mut client = server.action_cache.clone();
        let request =
            GetActionResultRequest { action_digest: Some(absent(n).to_wire()), ..Default::default() };
        async move { client.get_action_result(request).await.unwrap_err() }
    });
    for status in futures::future::join_all(requests).await {
        assert_eq!(status.code(), Code::NotFound, "{status}");
    }
}

/// A failed build cancels all its calls at once. The connection must stay open.
#[tokio::test(flavor = "multi_thread")]
async fn a_burst_of_cancelled_calls_does_not_close_the_connection() {
    let server = Server::start().await;
    for _ in 0..5 {
        let calls: Vec<_> = (0..500)
            .map(|_| {
                let mut client = server.execution.clone();
                let action_digest = Some(digest(b"action"));
                let request = ExecuteRequest { action_digest, ..Default::default() };
                tokio::spawn(async move { client.execute(request).await })
            })
            .collect();
        tokio::task::yield_now().await;
        calls.iter().for_each(tokio::task::JoinHandle::abort);
        drop(calls);
        let request = GetCapabilitiesRequest::default();
        server.capabilities.clone().get_capabilities(request).await.unwrap();
    }
}

/// GEN-24: a message of up to 16 MiB is accepted. A larger one is refused and the connection stays open.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_is_too_large_is_refused_by_itself() {
    let server = Server::start().await;
    let blob_digests = vec![digest(b"x"); 300_000];
    let request = FindMissingBlobsRequest { blob_digests, ..Default::default() };
    assert!(request.encoded_len() > 16 * 1024 * 1024);
    assert_eq!(server.cas.clone().find_missing_blobs(request).await.unwrap_err().code(), Code::OutOfRange);
    server.capabilities.clone().get_capabilities(GetCapabilitiesRequest::default()).await.unwrap();
}

/// An empty entry takes two bytes on the wire and a hundred in memory.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_of_a_million_empty_entries_is_refused_before_it_is_decoded() {
    let server = Server::start().await;
    let blob_digests = vec![reapi::Digest::default(); 2_000_000];
    let request = FindMissingBlobsRequest { blob_digests, ..Default::default() };
    assert_eq!(
        server.cas.clone().find_missing_blobs(request).await.unwrap_err().code(),
        Code::InvalidArgument
    );
    let output_files = vec![reapi::OutputFile::default(); 1_500_000];
    let result = reapi::ActionResult { output_files, ..Default::default() };
    let request = reapi::UpdateActionResultRequest { action_result: Some(result), ..Default::default() };
    let status = server.action_cache.clone().update_action_result(request).await.unwrap_err();
    assert!(status.message().contains("bytes of memory"), "{status}");
}

/// A logger that keeps the lines of RPCs.
struct Lines(Mutex<Vec<BTreeMap<String, String>>>);

static LINES: Lines = Lines(Mutex::new(Vec::new()));

impl log::Log for Lines {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.target() == "gorego::rpc"
    }

    fn log(&self, record: &log::Record<'_>) {
        struct Pairs(BTreeMap<String, String>);
        impl<'kvs> VisitSource<'kvs> for Pairs {
            fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), log::kv::Error> {
                assert_eq!(self.0.insert(key.to_string(), value.to_string()), None, "{key} twice");
                Ok(())
            }
        }
        let mut pairs = Pairs(BTreeMap::new());
        record.key_values().visit(&mut pairs).unwrap();
        self.0.lock().unwrap().push(pairs.0);
    }

    fn flush(&self) {}
}

/// Waits until one invocation has this many lines and returns them.
async fn lines(invocation: &str, count: usize) -> Vec<BTreeMap<String, String>> {
    let of_it = || {
        let lines = LINES.0.lock().unwrap();
        let of_it = |line: &&BTreeMap<_, _>| line.get("invocation_id").is_some_and(|id| id == invocation);
        lines.iter().filter(of_it).cloned().collect::<Vec<_>>()
    };
    eventually_async("the lines are there", || async { of_it().len() >= count }).await;
    of_it()
}

fn identified<T>(message: T, invocation: &str) -> Request<T> {
    let metadata = RequestMetadata {
        tool_invocation_id: invocation.into(),
        target_id: "//a:b".into(),
        action_mnemonic: "CppCompile".into(),
        ..Default::default()
    };
    let mut request = Request::new(message);
    let value = MetadataValue::from_bytes(&metadata.encode_to_vec());
    request.metadata_mut().insert_bin(METADATA, value);
    request
}

/// One line per call: for an answer, an error, and a client that disconnects.
#[tokio::test(flavor = "multi_thread")]
async fn every_call_ends_in_one_log_line() {
    static LOGGER: Once = Once::new();
    LOGGER.call_once(|| {
        log::set_logger(&LINES).unwrap();
        log::set_max_level(log::LevelFilter::Info);
    });
    let server = Server::start().await;
    let find = FindMissingBlobsRequest {
        instance_name: "a/b/c".into(),
        blob_digests: vec![absent(0).to_wire()],
        ..Default::default()
    };
    server.cas.clone().find_missing_blobs(identified(find, "answer")).await.unwrap();
    let line = lines("answer", 1).await.remove(0);
    let field = |key: &str| line.get(key).cloned().unwrap_or_default();
    assert_eq!(field("event"), "rpc_finished");
    assert_eq!(field("method"), "ContentAddressableStorage/FindMissingBlobs");
    assert_eq!(field("grpc_code"), "OK");
    assert_eq!(field("instance"), "a/b/c");
    assert_eq!(field("target_id"), "//a:b");
    assert_eq!(field("mnemonic"), "CppCompile");
    assert!(field("peer").starts_with("127.0.0.1:"));
    assert!(field("bytes_in").parse::<u64>().unwrap() > 64);
    assert!(field("bytes_out").parse::<u64>().unwrap() > 64);
    assert!(field("duration_us").parse::<u64>().is_ok());

    let action_digest = Some(digest(b"action"));
    let miss = GetActionResultRequest { action_digest: action_digest.clone(), ..Default::default() };
    server.action_cache.clone().get_action_result(identified(miss, "error")).await.unwrap_err();
    let line = lines("error", 1).await.remove(0);
    assert_eq!(line["grpc_code"], "NOT_FOUND");
    assert_eq!(line["cached"], "false");
    assert!(line["error"].contains(&digest(b"action").hash), "{line:?}");
    assert_eq!(line["action_digest"], format!("{}/6", digest(b"action").hash));

    let run = ExecuteRequest { action_digest, ..Default::default() };
    let mut stream = server.execution.clone().execute(identified(run, "leaves")).await.unwrap().into_inner();
    let operation = stream.message().await.unwrap().unwrap();
    drop(stream);
    let line = lines("leaves", 1).await.remove(0);
    assert_eq!(line["grpc_code"], "CANCELLED");
    assert!(operation.name.ends_with(&line["operation"]), "{line:?}");
    server.scheduler.send(Show(executing())).await.unwrap();
    for invocation in ["answer", "error", "leaves"] {
        assert_eq!(lines(invocation, 1).await.len(), 1);
    }
}
