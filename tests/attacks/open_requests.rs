//! Requests that are complete except for their end: clients send everything that takes memory, and then stop.

use crate::{
    decoding::{apart, field},
    harness::{Bystander, assert_memory_is_bounded, connect_from, resident_memory},
    support::{Server, eventually, sha256},
};
use bytes::Bytes;
use futures::{StreamExt as _, future::join_all, stream};
use gorego_client::{
    Raw,
    stubs::{ByteStreamClient, ContentAddressableStorageClient},
};
use gorego_reapi::proto::{
    bytestream::{QueryWriteStatusRequest, WriteRequest},
    reapi::{BatchUpdateBlobsRequest, batch_update_blobs_request},
};
use std::{sync::Arc, time::Duration};
use tokio::{task::JoinHandle, time::timeout};
use tonic::{Code, Request, Status, transport::Channel};

/// A method whose requests take much more memory than bytes on the wire.
const BATCH_READ: &str = "/build.bazel.remote.execution.v2.ContentAddressableStorage/BatchReadBlobs";

/// Makes a call whose request never ends.
fn call_without_end(
    channel: Channel,
    method: &'static str,
    message: Vec<u8>,
) -> JoinHandle<Result<(), Status>> {
    tokio::spawn(async move {
        let mut client = tonic::client::Grpc::new(channel);
        client.ready().await.unwrap();
        let messages = stream::iter([Bytes::from(message)]).chain(stream::pending());
        let path = http::uri::PathAndQuery::from_static(method);
        client.client_streaming(Request::new(messages), path, Raw).await.map(drop)
    })
}

/// Makes two calls that never end, whose requests take all of the decoding memory that one peer can have.
pub(crate) async fn hold_the_room_to_decode(server: &Server) -> [JoinHandle<Result<(), Status>>; 2] {
    let before = resident_memory(server);
    // One connection does not get all of it.
    let connections = [connect_from("127.0.0.1", server).await, connect_from("127.0.0.1", server).await];
    let digests = [0x12, 0].repeat(820_000);
    let message = [field(1, &[b'a'; 13_000_000]), digests].concat();
    let calls = connections.map(|hostile| call_without_end(hostile, BATCH_READ, message.clone()));
    eventually("both are decoded", || resident_memory(server) > before + 85_000_000).await;
    calls
}

/// Two requests that take almost all of a peer's decoding memory and never end leave room for the largest request of
/// another peer.
#[tokio::test(flavor = "multi_thread")]
async fn large_requests_without_an_end_leave_room_for_those_of_another_peer() {
    let server = Server::start().await;
    let bystander = Bystander::beside(&server).await;
    let calls = hold_the_room_to_decode(&server).await;
    let data = vec![7; 3_900_000];
    let digest = Some(sha256(&data).to_wire());
    let request = batch_update_blobs_request::Request { digest, data: data.into(), ..Default::default() };
    let request = BatchUpdateBlobsRequest { requests: vec![request], ..Default::default() };
    let mut other = ContentAddressableStorageClient::new(connect_from("127.0.0.2", &server).await);
    let answer = timeout(Duration::from_secs(5), other.batch_update_blobs(request)).await;
    let answer = answer.expect("a batch of another peer is answered").unwrap().into_inner();
    assert_eq!(answer.responses[0].status.as_ref().unwrap().code, 0);
    for call in calls {
        assert!(!call.is_finished(), "the attack went on all the time");
        call.abort();
    }
    bystander.leave().await;
    assert_memory_is_bounded(&server);
}

/// The received bytes of thousands of uploads are written when there are too many, even if each upload has too few
/// bytes for a write to be worthwhile. If the buffers of silent uploads take too much memory, further ones are refused.
#[tokio::test(flavor = "multi_thread")]
async fn uploads_that_stop_after_their_first_message_are_not_kept_in_memory() {
    const UPLOADS: u32 = 2_500;
    const SENT: usize = 250_000;
    let server = Arc::new(Server::start().await);
    let bystander = Bystander::beside(&server).await;
    let target = server.clone();
    let attack = async move || {
        let client = ByteStreamClient::new(connect_from("127.0.0.1", &target).await);
        let data = Bytes::from(vec![7; SENT]);
        let name = |number: u32| {
            let digest = sha256(&number.to_le_bytes());
            format!("uploads/c0ffee00-0000-4000-8000-{number:012x}/blobs/{}/1000000", digest.hash_hex())
        };
        let write = |number: u32| {
            let message =
                WriteRequest { resource_name: name(number), data: data.clone(), ..Default::default() };
            let mut client = client.clone();
            let messages = stream::iter([message]).chain(stream::pending());
            tokio::spawn(async move { client.write(messages).await.map(drop) })
        };
        let writes: Vec<_> = (0..UPLOADS).map(write).collect();
        let received = (0..UPLOADS).zip(&writes).map(|(number, write)| {
            let mut client = client.clone();
            async move {
                while !write.is_finished() {
                    let request = QueryWriteStatusRequest { resource_name: name(number) };
                    let status = client.query_write_status(request).await.unwrap().into_inner();
                    if status.committed_size == SENT as i64 {
                        return;
                    }
                    tokio::time::sleep(Duration::from_millis(500)).await;
                }
            }
        });
        let received = timeout(Duration::from_secs(100), join_all(received)).await;
        received.expect("all uploads are received");
        for write in writes {
            if write.is_finished() {
                assert_eq!(write.await.unwrap().unwrap_err().code(), Code::ResourceExhausted);
            }
        }
    };
    apart(attack).await;
    bystander.leave().await;
    assert_memory_is_bounded(&server);
}
