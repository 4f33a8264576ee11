//! Stored and received messages that are small on the wire and large in memory, and names that are large in errors.

use crate::{
    harness::{Bystander, assert_memory_is_bounded, connect_from},
    support::{Client, Server, empty, http_client, response, sh, sha256},
};
use bytes::Bytes;
use futures::{StreamExt as _, future::join_all, stream};
use gorego_client::Raw;
use gorego_reapi::{
    digest::Digest,
    proto::{
        bytestream::WriteRequest,
        reapi::{
            Action, ActionResult, GetCapabilitiesRequest, GetTreeRequest, OutputDirectory,
            UpdateActionResultRequest,
        },
    },
};
use prost::Message as _;
use std::sync::Arc;
use tonic::{Code, Request, Status, codec::CompressionEncoding, transport::Channel};

/// A message field with this number and content.
pub(crate) fn field(number: u8, content: &[u8]) -> Vec<u8> {
    let mut message = vec![number << 3 | 2];
    prost::encode_length_delimiter(content.len(), &mut message).unwrap();
    [&message[..], content].concat()
}

/// This many empty messages as field 1, of two bytes each.
fn nothings(count: usize) -> Vec<u8> {
    b"\x0a\x00".repeat(count)
}

/// A Directory whose own properties are 30 million empty messages. It is salted, so that each is a different blob.
fn directory_of_nothings(salt: u8) -> Vec<u8> {
    let mut properties = nothings(30_000_000);
    properties.extend(field(1, &field(1, &[b'a' + salt])));
    field(5, &properties)
}

/// Stores a blob of any size.
async fn store(client: &Client, data: Vec<u8>) -> Digest {
    const PIECE: usize = 1024 * 1024;
    let digest = sha256(&data);
    let resource_name = format!("uploads/c0ffee00-0000-4000-8000-{:012x}/blobs/{digest}", data.len());
    let pieces: Vec<WriteRequest> = data
        .chunks(PIECE)
        .enumerate()
        .map(|(at, piece)| WriteRequest {
            resource_name: if at == 0 { resource_name.clone() } else { String::new() },
            write_offset: (at * PIECE) as i64,
            finish_write: (at + 1) * PIECE >= data.len(),
            data: piece.to_vec().into(),
        })
        .collect();
    client.bytes.clone().write(stream::iter(pieces)).await.unwrap();
    digest
}

/// GEN-13, GEN-14. Each request used to take 0.5 GB: each byte of the name takes six in an error, which was copied.
#[tokio::test(flavor = "multi_thread")]
async fn names_of_megabytes_have_short_errors_within_bounds() {
    let server = Server::start().await;
    let client = server.client().await;
    let bystander = Bystander::beside(&server).await;
    let calls = (0..8).map(|_| {
        let mut capabilities = client.capabilities.clone();
        async move {
            let instance_name = "\u{7f}".repeat(15 * 1024 * 1024);
            let status =
                capabilities.get_capabilities(GetCapabilitiesRequest { instance_name }).await.unwrap_err();
            assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
        }
    });
    join_all(calls).await;
    assert_memory_is_bounded(&server);
    bystander.leave().await;
}

/// EXE-27. Each action used to take 1.5 GB for 60 MB of input.
#[tokio::test(flavor = "multi_thread")]
async fn actions_whose_directories_are_millions_of_nothings_are_refused_within_bounds() {
    let server = Server::start().await;
    let client = server.client().await;
    let roots = stream::iter(0..3).then(|salt| store(&client, directory_of_nothings(salt)));
    let roots: Vec<Digest> = roots.collect().await;
    let bystander = Bystander::beside(&server).await;
    let executions = (0..6).map(|at| {
        let (client, root) = (client.clone(), roots[at % roots.len()]);
        async move {
            let action = client.action(sh(&format!("echo {at}")), root).await;
            let status = client.run(action).await.status.unwrap();
            assert_eq!(status.code, Code::InvalidArgument as i32, "{status:?}");
            assert!(status.message.contains("the Directory is refused"), "{}", status.message);
            assert!(status.message.contains("bytes of memory"), "{}", status.message);
        }
    });
    join_all(executions).await;
    let trees = (0..4).map(|at| {
        let (mut cas, root) = (client.cas.clone(), roots[at % roots.len()]);
        async move {
            let request = GetTreeRequest { root_digest: Some(root.to_wire()), ..Default::default() };
            let mut pages = cas.get_tree(request).await.unwrap().into_inner();
            assert_eq!(pages.message().await.unwrap_err().code(), Code::InvalidArgument);
        }
    });
    join_all(trees).await;
    bystander.leave().await;
    assert_memory_is_bounded(&server);
}

/// AC-03. Such a Tree or Directory makes the result a miss.
#[tokio::test(flavor = "multi_thread")]
async fn results_whose_trees_are_millions_of_nothings_are_misses_within_bounds() {
    let server = Server::start().await;
    let client = server.client().await;
    let directory = store(&client, directory_of_nothings(0)).await;
    let tree = store(&client, field(2, &directory_of_nothings(1))).await;
    let bystander = Bystander::beside(&server).await;
    let results = (0..6u8).map(|at| {
        let client = client.clone();
        async move {
            let action = sha256(&[at]);
            let (tree_digest, root_directory_digest) = match at % 2 {
                0 => (Some(tree.to_wire()), None),
                _ => (None, Some(directory.to_wire())),
            };
            let output = OutputDirectory {
                path: "out".into(),
                tree_digest,
                root_directory_digest,
                ..Default::default()
            };
            let result = ActionResult { output_directories: vec![output], ..Default::default() };
            let request = UpdateActionResultRequest {
                action_digest: Some(action.to_wire()),
                action_result: Some(result),
                ..Default::default()
            };
            client.action_cache.clone().update_action_result(request).await.unwrap();
            assert_eq!(client.cached(action).await, None);
        }
    });
    join_all(results).await;
    bystander.leave().await;
    assert_memory_is_bounded(&server);
}

/// Runs an attack on its own thread, so that the CPU time of its client does not delay the bystander.
pub(crate) async fn apart<F: Future<Output = ()>>(attack: impl FnOnce() -> F + Send + 'static) {
    let run = move || {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(attack())
    };
    tokio::task::spawn_blocking(run).await.unwrap();
}

async fn call(
    channel: Channel,
    method: &'static str,
    message: Vec<u8>,
    compression: Option<CompressionEncoding>,
) -> Result<Bytes, Status> {
    let mut client = tonic::client::Grpc::new(channel);
    if let Some(compression) = compression {
        client = client.send_compressed(compression);
    }
    client.ready().await.unwrap();
    let path = http::uri::PathAndQuery::from_static(method);
    client.unary(Request::new(message.into()), path, Raw).await.map(|response| response.into_inner())
}

pub(crate) const FIND_MISSING: &str =
    "/build.bazel.remote.execution.v2.ContentAddressableStorage/FindMissingBlobs";
const BATCH_UPDATE: &str = "/build.bazel.remote.execution.v2.ContentAddressableStorage/BatchUpdateBlobs";
const BATCH_READ: &str = "/build.bazel.remote.execution.v2.ContentAddressableStorage/BatchReadBlobs";
const UPDATE_RESULT: &str = "/build.bazel.remote.execution.v2.ActionCache/UpdateActionResult";
const GET_RESULT: &str = "/build.bazel.remote.execution.v2.ActionCache/GetActionResult";
const PUSH_BLOB: &str = "/build.bazel.remote.asset.v1.Push/PushBlob";

/// Requests of 15 MB that would take a gigabyte, for every field that may be a list; one of them also compressed to a
/// few kilobytes.
#[tokio::test(flavor = "multi_thread")]
async fn requests_of_millions_of_nothings_are_refused_within_bounds() {
    let server = Arc::new(Server::start().await);
    let many = nothings(7_500_000);
    let in_list = |number: u8| [number << 3 | 2, 0].repeat(7_500_000);
    let result = |number: u8, content: &[u8]| field(3, &field(number, content));
    let requests: Vec<(&'static str, Vec<u8>)> = vec![
        (FIND_MISSING, in_list(2)),
        (BATCH_UPDATE, in_list(2)),
        (BATCH_READ, in_list(2)),
        (GET_RESULT, in_list(5)),
        (PUSH_BLOB, in_list(3)),
        // ActionResult.output_files, output_symlinks; then their node_properties; then auxiliary_metadata.
        (UPDATE_RESULT, field(3, &in_list(2))),
        (UPDATE_RESULT, field(3, &in_list(12))),
        (UPDATE_RESULT, result(2, &field(7, &many))),
        (UPDATE_RESULT, result(12, &field(4, &many))),
        (UPDATE_RESULT, field(3, &field(9, &in_list(11)))),
    ];
    let bystander = Bystander::beside(&server).await;
    let target = server.clone();
    let attack = async move || {
        // The client needs seconds to compress one of them.
        let compressed = requests.len() - 1..requests.len();
        for (compression, chosen) in [
            (None, 0..requests.len()),
            (Some(CompressionEncoding::Gzip), compressed.clone()),
            (Some(CompressionEncoding::Zstd), compressed),
        ] {
            let calls = requests[chosen].iter().map(|(method, message)| {
                let (message, target) = (message.clone(), &target);
                async move {
                    let channel = connect_from("127.0.0.1", target).await;
                    let status = call(channel, method, message, compression).await.unwrap_err();
                    assert_eq!(status.code(), Code::InvalidArgument, "{method}: {status}");
                    // The length of a FindMissingBlobs bounds its memory, so it is not measured first.
                    let reason = if *method == FIND_MISSING { "blob_digests" } else { "bytes of memory" };
                    assert!(status.message().contains(reason), "{method}: {status}");
                }
            });
            join_all(calls).await;
        }
    };
    apart(attack).await;
    bystander.leave().await;
    assert_memory_is_bounded(&server);
}

/// EXE-27. Command and Action: variables, outputs, platform properties; sixteen megabytes each.
#[tokio::test(flavor = "multi_thread")]
async fn commands_and_actions_of_millions_of_nothings_are_refused_within_bounds() {
    let server = Server::start().await;
    let client = server.client().await;
    let in_list = |number: u8| [number << 3 | 2, 0].repeat(8_000_000);
    let mut actions = Vec::new();
    for command in [in_list(1), in_list(2), in_list(7), in_list(8), field(5, &nothings(8_000_000))] {
        let command = store(&client, command).await;
        let action = Action {
            command_digest: Some(command.to_wire()),
            input_root_digest: Some(empty().to_wire()),
            ..Default::default()
        };
        actions.push(client.upload(action.encode_to_vec()).await);
    }
    actions.push(store(&client, field(10, &nothings(8_000_000))).await);
    let bystander = Bystander::beside(&server).await;
    let runs = actions.iter().map(|action| async {
        let status = response(&client.start(*action).await.next().await.unwrap()).status.unwrap();
        assert_eq!(status.code, Code::InvalidArgument as i32, "{status:?}");
        assert!(status.message.contains("bytes of memory"), "{status:?}");
    });
    join_all(runs).await;
    bystander.leave().await;
    assert_memory_is_bounded(&server);
}

/// The HTTP port accepts ActionResults too.
#[tokio::test(flavor = "multi_thread")]
async fn results_of_millions_of_nothings_over_http_are_refused_within_bounds() {
    let server = Server::with(&[("HTTP__LISTEN_ADDR", "127.0.0.1:0")]).await;
    let address = server.http_address();
    let bystander = Bystander::beside(&server).await;
    let puts = (0..4).map(|at| {
        let url = format!("http://{address}/ac/{}", sha256(&[at]).hash_hex());
        async move {
            let body = b"\x12\x00".repeat(7_500_000);
            let answer = http_client().put(url).body(body).send().await.unwrap();
            assert_eq!(answer.status(), 400);
        }
    });
    join_all(puts).await;
    bystander.leave().await;
    assert_memory_is_bounded(&server);
}
