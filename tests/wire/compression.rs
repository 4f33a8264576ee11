//! Compressed transfers with the real binary: what survives a restart, and what can be configured.

use crate::support::{Client, Kind, Server, eventually, files_below, record_of, sha256};
use gorego_reapi::{
    digest::Digest,
    proto::bytestream::{ReadRequest, WriteRequest},
};

fn text(size: usize) -> Vec<u8> {
    (0..size).map(|n| b"some words and some more"[(n * n / 7) % 24]).collect()
}

fn name(digest: &Digest) -> String {
    digest.blob_name().replace("blobs/", "compressed-blobs/zstd/")
}

async fn upload(client: &Client, plain: &[u8], stream: Vec<u8>) -> i64 {
    let message = WriteRequest {
        resource_name: format!("uploads/{}/{}", uuid::Uuid::new_v4(), name(&sha256(plain))),
        write_offset: 0,
        finish_write: true,
        data: stream.into(),
    };
    let answer = client.bytes.clone().write(tokio_stream::once(message)).await.unwrap();
    answer.into_inner().committed_size
}

async fn download(client: &Client, digest: &Digest, offset: usize) -> Vec<u8> {
    let request =
        ReadRequest { resource_name: name(digest), read_offset: offset as i64, ..Default::default() };
    zstd::decode_all(&client.read_request(request).await.unwrap()[..]).unwrap()
}

/// BS-25: each client gets the answer that it expects.
#[tokio::test]
async fn the_answer_to_a_compressed_upload_can_be_chosen() {
    let plain = text(100_000);
    let stream = zstd::encode_all(&plain[..], 3).unwrap();
    for (convention, expected) in
        [("compressed", stream.len() as i64), ("uncompressed", 100_000), ("minus_one", -1)]
    {
        let server = Server::with(&[("CACHE__COMPRESSED_COMMITTED_SIZE", convention)]).await;
        let client = server.client().await;
        assert_eq!(upload(&client, &plain, stream.clone()).await, expected);
        assert_eq!(upload(&client, &plain, stream.clone()).await, -1, "BS-24");
        assert_eq!(client.read(sha256(&plain)).await.unwrap(), plain);
    }
}

/// BS-12, CAP-12: also with a compressed form from an earlier process.
#[tokio::test]
async fn what_was_compressed_once_is_served_after_a_crash_from_any_offset() {
    let server = Server::start().await;
    let client = server.client().await;
    let plain = text(1_000_000);
    let digest = client.upload(plain.clone()).await;
    for _ in 0..2 {
        assert_eq!(download(&client, &digest, 0).await, plain);
    }
    let form = |server: &Server| {
        let files = files_below(server.store());
        let is_form = |path: &std::path::PathBuf| {
            let path = path.to_string_lossy();
            path.contains("/zstd/") && path.contains(&digest.hash_hex())
        };
        files.iter().any(is_form) || record_of(server, digest, Kind::Zstd).is_some()
    };
    eventually("it is kept compressed", || form(&server)).await;
    drop(client);
    let server = Server::on(server.kill().await, &[]).await;
    let client = server.client().await;
    assert!(form(&server));
    for offset in [0, 1, 262_144, 999_999] {
        assert_eq!(download(&client, &digest, offset).await, plain[offset..]);
    }
}
