//! Declared upload sizes: nothing may be evicted for bytes that were not received.

use crate::{
    harness::{Bystander, assert_memory_is_bounded, connect_from},
    support::{Server, eventually, sha256},
};
use futures::stream;
use gorego_client::stubs::{ByteStreamClient, ContentAddressableStorageClient};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    proto::{
        bytestream::{ReadRequest, WriteRequest},
        reapi::{BatchUpdateBlobsRequest, FindMissingBlobsRequest, batch_update_blobs_request, compressor},
    },
};
use std::{future::IntoFuture as _, time::Duration};
use tokio::time::timeout;
use tonic::{Status, transport::Channel};

const GB: i64 = 1_000_000_000;

/// A digest of an unknown blob with this size.
fn announced(seed: u8, size: i64) -> Digest {
    Digest::parse(DigestFunction::Sha256, &sha256(&[seed; 7]).hash_hex(), size).unwrap()
}

fn message(digest: Digest, compressed: bool, data: Vec<u8>, finish_write: bool) -> WriteRequest {
    let kind = if compressed { "compressed-blobs/zstd" } else { "blobs" };
    let resource_name =
        format!("uploads/{}/{kind}/{}/{}", uuid::Uuid::new_v4(), digest.hash_hex(), digest.size());
    WriteRequest { resource_name, write_offset: 0, finish_write, data: data.into() }
}

/// An uninvolved client.
struct Neighbour {
    bytes: ByteStreamClient<Channel>,
    cas: ContentAddressableStorageClient<Channel>,
}

impl Neighbour {
    async fn beside(server: &Server) -> Self {
        let channel = connect_from("127.0.0.2", server).await;
        Self {
            bytes: ByteStreamClient::new(channel.clone()),
            cas: ContentAddressableStorageClient::new(channel),
        }
    }

    async fn upload(&mut self, content: Vec<u8>) -> Digest {
        let digest = sha256(&content);
        let message = message(digest, false, content, true);
        let write = self.bytes.write(stream::iter([message]));
        timeout(Duration::from_secs(5), write).await.expect("an upload is answered").unwrap();
        digest
    }

    async fn read(&mut self, digest: Digest) -> Result<Vec<u8>, Status> {
        let request = ReadRequest { resource_name: digest.blob_name(), ..Default::default() };
        let mut messages = self.bytes.read(request).await?.into_inner();
        let mut bytes = Vec::new();
        while let Some(message) = messages.message().await? {
            bytes.extend_from_slice(&message.data);
        }
        Ok(bytes)
    }

    async fn missing(&mut self, digests: &[Digest]) -> usize {
        let blob_digests = digests.iter().map(|digest| digest.to_wire()).collect();
        let request = FindMissingBlobsRequest { blob_digests, ..Default::default() };
        self.cas.find_missing_blobs(request).await.unwrap().into_inner().missing_blob_digests.len()
    }
}

/// Five uploads that declare 50 GB together, as much as the store may have, send one byte each and stay open. A batch
/// of items that claim to be a MiB each declares another 20 GB.
#[tokio::test]
async fn uploads_that_declare_everything_and_send_a_byte_evict_nothing_and_hold_up_nobody() {
    let server = Server::start().await;
    let bystander = Bystander::beside(&server).await;
    let mut neighbour = Neighbour::beside(&server).await;
    let content = |seed: u8| vec![seed; 3_000_000];
    let mut stored = Vec::new();
    for seed in 0..5 {
        stored.push(neighbour.upload(content(seed)).await);
    }
    let hostile = connect_from("127.0.0.1", &server).await;
    let mut held = Vec::new();
    for seed in 0..5 {
        let (sender, receiver) = tokio::sync::mpsc::channel(1);
        sender.send(message(announced(seed, 10 * GB), seed % 2 == 1, vec![0x28], false)).await.unwrap();
        let messages = stream::unfold(receiver, |mut receiver| async {
            receiver.recv().await.map(|message| (message, receiver))
        });
        let mut client = ByteStreamClient::new(hostile.clone());
        held.push((sender, tokio::spawn(async move { client.write(messages).await.map(drop) })));
    }
    let item = |seed: u32| batch_update_blobs_request::Request {
        digest: Some(
            Digest::parse(DigestFunction::Sha256, &sha256(&seed.to_le_bytes()).hash_hex(), 1 << 20)
                .unwrap()
                .to_wire(),
        ),
        data: "no zstd".into(),
        compressor: compressor::Value::Zstd as i32,
    };
    let request = BatchUpdateBlobsRequest { requests: (0..20_000).map(item).collect(), ..Default::default() };
    let mut client = ContentAddressableStorageClient::new(hostile.clone());
    let batch = tokio::spawn(async move { client.batch_update_blobs(request).into_future().await });
    for seed in 5..15 {
        stored.push(neighbour.upload(content(seed)).await);
    }
    let _ = batch.await.unwrap();
    for (seed, digest) in stored.iter().enumerate() {
        assert_eq!(neighbour.read(*digest).await.unwrap(), content(seed as u8));
    }
    assert_eq!(neighbour.missing(&stored).await, 0);
    assert!(held.iter().all(|(_, write)| !write.is_finished()), "the attack went on all the time");
    assert!(
        !server.log().iter().any(|line| line["event"] == "blobs_evicted" || line["event"] == "store_trimmed")
    );
    assert!(bystander.leave().await.answers > 0);
    // Broken uploads do not block others either.
    for (_, write) in held {
        write.abort();
    }
    drop(hostile);
    let writes = || {
        server
            .log()
            .iter()
            .filter(|line| line["method"].as_str().is_some_and(|method| method.ends_with("Write")))
            .count()
    };
    eventually("the uploads end", || writes() >= stored.len() + 5).await;
    stored.push(neighbour.upload(content(15)).await);
    assert_eq!(neighbour.missing(&stored).await, 0);
    assert_memory_is_bounded(&server);
}
