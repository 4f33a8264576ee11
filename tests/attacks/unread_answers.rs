//! Unread responses are held up to a limit, and not longer than their connection.

use crate::{
    harness::{Bystander, MEMORY_MAX_BYTES, assert_memory_is_bounded, resident_memory},
    raw,
    support::{Client, Server, empty, eventually, sh},
};
use gorego_client::stubs::{ByteStreamClient, ContentAddressableStorageClient};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    proto::{
        bytestream::ReadRequest,
        longrunning::GetOperationRequest,
        reapi::{
            ActionResult, BatchReadBlobsRequest, BatchUpdateBlobsRequest, GetActionResultRequest,
            OutputSymlink, UpdateActionResultRequest, WaitExecutionRequest, batch_update_blobs_request,
        },
    },
};
use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};
use tonic::transport::Endpoint;

const BATCH_READ: &str = "/build.bazel.remote.execution.v2.ContentAddressableStorage/BatchReadBlobs";
const READ: &str = "/google.bytestream.ByteStream/Read";
/// Resident memory of an idle server after an attack: what the allocator keeps, but not the responses.
const LEFT_MAX_BYTES: u64 = 300_000_000;

/// Stores a blob that compresses badly, near the limit of a batch.
async fn stored_blob(server: &Server) -> Digest {
    let data: Vec<u8> = (0..3_900_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let digest = DigestFunction::Sha256.digest(&data);
    let mut client = ContentAddressableStorageClient::connect(server.endpoint()).await.unwrap();
    let request = batch_update_blobs_request::Request {
        digest: Some(digest.to_wire()),
        data: data.into(),
        ..Default::default()
    };
    let request = BatchUpdateBlobsRequest { requests: vec![request], ..Default::default() };
    let answer = client.batch_update_blobs(request).await.unwrap().into_inner();
    assert_eq!(answer.responses[0].status.as_ref().unwrap().code, 0);
    digest
}

fn address(server: &Server) -> SocketAddr {
    server.address().parse().unwrap()
}

fn read_request(digest: Digest) -> ReadRequest {
    ReadRequest {
        resource_name: format!("blobs/{}/{}", digest.hash_hex(), digest.size()),
        ..Default::default()
    }
}

/// Makes these calls on one connection that is never read, and checks the server during and after.
async fn ask_and_do_not_read(server: &Server, calls: Vec<u8>) {
    let bystander = Bystander::beside(server).await;
    let mut socket = raw::connect_from("127.0.0.1", address(server));
    let writer = tokio::task::spawn_blocking(move || {
        socket.write_all(&raw::preface()).unwrap();
        // The server need not accept everything from a client that does not read.
        socket.set_write_timeout(Some(Duration::from_secs(2))).unwrap();
        let _ = socket.write_all(&calls);
        socket
    });
    // A server without a bound would make all answers in this time.
    tokio::time::sleep(Duration::from_secs(3)).await;
    drop(writer.await.unwrap());
    eventually("the answers are given back", || resident_memory(server) < LEFT_MAX_BYTES).await;
    bystander.leave().await;
    assert_memory_is_bounded(server);
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_that_nobody_reads_are_made_only_as_far_as_there_is_room() {
    let server = Server::start().await;
    let digest = stored_blob(&server).await;
    let request = BatchReadBlobsRequest { digests: vec![digest.to_wire()], ..Default::default() };
    let calls = raw::streams().take(3_000).flat_map(|stream| raw::call(stream, BATCH_READ, &request));
    ask_and_do_not_read(&server, calls.collect()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn downloads_that_nobody_reads_are_made_only_as_far_as_there_is_room() {
    let server = Server::start().await;
    let digest = stored_blob(&server).await;
    let request = read_request(digest);
    let calls = raw::streams().take(4_000).flat_map(|stream| raw::call(stream, READ, &request));
    ask_and_do_not_read(&server, calls.collect()).await;
}

/// The action and the operation of a cached result of 3.9 MB.
async fn long_result(server: &Server) -> (Digest, String) {
    let client = Client::connect(server.endpoint()).await;
    let action = client.action(sh("true"), empty()).await;
    let link = |n| OutputSymlink { path: format!("l{n}"), target: "t".repeat(3_900), ..Default::default() };
    let result = ActionResult { output_symlinks: (0..1_000).map(link).collect(), ..Default::default() };
    let request = UpdateActionResultRequest {
        action_digest: Some(action.to_wire()),
        action_result: Some(result),
        ..Default::default()
    };
    client.action_cache.clone().update_action_result(request).await.unwrap();
    let done = client.start(action).await.until(|operation| operation.done).await;
    (action, done.name)
}

/// An operation that is remembered is copied for each answer, and a result that is too long for the memo is decoded for
/// each answer.
#[tokio::test(flavor = "multi_thread")]
async fn results_that_nobody_reads_are_copied_and_decoded_only_as_far_as_there_is_room() {
    let server = Server::start().await;
    let (action, name) = long_result(&server).await;
    let wait = WaitExecutionRequest { name: name.clone() };
    let get = GetOperationRequest { name };
    let cached = GetActionResultRequest { action_digest: Some(action.to_wire()), ..Default::default() };
    let calls = raw::streams().take(900).flat_map(|stream| match stream % 3 {
        0 => raw::call(stream, "/build.bazel.remote.execution.v2.Execution/WaitExecution", &wait),
        1 => raw::call(stream, "/google.longrunning.Operations/GetOperation", &get),
        _ => raw::call(stream, "/build.bazel.remote.execution.v2.ActionCache/GetActionResult", &cached),
    });
    ask_and_do_not_read(&server, calls.collect()).await;
}

/// This many connections that send these bytes and read nothing.
async fn send_over_each_of(connections: usize, address: SocketAddr, bytes: Vec<u8>) -> Vec<TcpStream> {
    let connect = move |_| {
        let mut socket = raw::connect_from("127.0.0.1", address);
        socket.write_all(&bytes).unwrap();
        socket
    };
    tokio::task::spawn_blocking(move || (0..connections).map(connect).collect()).await.unwrap()
}

/// Twelve connections of one peer hold no more than its share, and the downloads of another peer continue.
#[tokio::test(flavor = "multi_thread")]
async fn many_connections_of_one_peer_leave_room_for_another() {
    let server = Server::start().await;
    let digest = stored_blob(&server).await;
    let request = BatchReadBlobsRequest { digests: vec![digest.to_wire()], ..Default::default() };
    let calls: Vec<u8> =
        raw::streams().take(50).flat_map(|stream| raw::call(stream, BATCH_READ, &request)).collect();
    let sockets = send_over_each_of(12, address(&server), [raw::preface(), calls].concat()).await;
    // A server without a bound would make all answers in this time.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let channel = crate::harness::connect_from("127.0.0.2", &server).await;
    let mut other = ContentAddressableStorageClient::new(channel).max_decoding_message_size(8 << 20);
    let answer = tokio::time::timeout(Duration::from_secs(5), other.batch_read_blobs(request)).await;
    assert_eq!(answer.unwrap().unwrap().into_inner().responses[0].data.len() as u64, digest.size());
    assert!(resident_memory(&server) < MEMORY_MAX_BYTES);
    drop(sockets);
    assert_memory_is_bounded(&server);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_download_that_is_read_comes_through_beside_hundreds_that_are_not() {
    let server = Server::start().await;
    let digest = stored_blob(&server).await;
    let endpoint = Endpoint::from_shared(server.endpoint()).unwrap();
    let endpoint = endpoint.initial_stream_window_size(65_535).initial_connection_window_size(1 << 30);
    let client = ByteStreamClient::new(endpoint.connect().await.unwrap());
    let mut unread = Vec::new();
    for _ in 0..500 {
        unread.push(client.clone().read(read_request(digest)).await.unwrap().into_inner());
    }
    let mut messages = client.clone().read(read_request(digest)).await.unwrap().into_inner();
    let mut bytes = 0;
    let all = async {
        while let Some(message) = messages.message().await.unwrap() {
            bytes += message.data.len() as u64;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), all).await.expect("it comes through");
    assert_eq!(bytes, digest.size());
    assert_memory_is_bounded(&server);
}

#[tokio::test(flavor = "multi_thread")]
async fn downloads_over_http_that_nobody_reads_are_made_only_as_far_as_there_is_room() {
    let server = Server::with(&[("HTTP__LISTEN_ADDR", "127.0.0.1:0")]).await;
    let http = server.http_address();
    let digest = stored_blob(&server).await;
    let bystander = Bystander::beside(&server).await;
    let head = format!("GET /cas/{} HTTP/1.1\r\nhost: localhost\r\n\r\n", digest.hash_hex());
    let mut sockets = send_over_each_of(600, http, head.into_bytes()).await;
    // A server without a bound would make all answers in this time.
    tokio::time::sleep(Duration::from_secs(2)).await;
    // If a client reads its connection in the end, it gets everything.
    let mut first = sockets.swap_remove(0);
    drop(sockets);
    first.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut answer = vec![0; digest.size() as usize];
    tokio::task::spawn_blocking(move || first.read_exact(&mut answer)).await.unwrap().unwrap();
    bystander.leave().await;
    assert_memory_is_bounded(&server);
}
