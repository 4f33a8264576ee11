//! Compressed uploads whose decoders need a large window, and that do not continue.

use crate::{
    decoding::apart,
    harness::{Bystander, assert_memory_is_bounded, connect_from, resident_memory},
    raw,
    support::{Server, eventually, sha256},
};
use bytes::Bytes;
use futures::{StreamExt as _, future::join_all, stream};
use gorego_client::stubs::ByteStreamClient;
use gorego_reapi::proto::bytestream::{QueryWriteStatusRequest, WriteRequest};
use std::{io::Write as _, sync::Arc, time::Duration};
use tokio::time::timeout;

/// Number of bytes that a decoder must yield to use its whole window.
const WINDOW: usize = 8 << 20;

/// Incompressible bytes, so that there are enough of them for a decoder to begin.
fn noise(bytes: usize) -> Vec<u8> {
    let blocks = (0u32..)
        .flat_map(|block| *sha256(&block.to_le_bytes()).hash_hex().as_bytes().first_chunk::<64>().unwrap());
    blocks.take(bytes).collect()
}

/// The beginning of a stream with a window of 8 MiB, which decodes to more than that.
fn beginning(noise: &[u8]) -> Vec<u8> {
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
    encoder.window_log(23).unwrap();
    for part in [noise, &vec![0; WINDOW + 1_000_000], noise] {
        encoder.write_all(part).unwrap();
    }
    encoder.flush().unwrap();
    encoder.get_ref().clone()
}

/// Another peer uploads a larger compressed blob.
async fn assert_others_are_served(server: &Server) {
    let plain = noise(3_000_000);
    let digest = sha256(&plain);
    let name = format!("uploads/c0ffee00-0000-4000-8000-00000000cafe/compressed-blobs/zstd/{digest}");
    let data = zstd::encode_all(plain.as_slice(), 3).unwrap();
    let message =
        WriteRequest { resource_name: name, data: data.into(), finish_write: true, ..Default::default() };
    let mut other = ByteStreamClient::new(connect_from("127.0.0.3", server).await);
    let answer = timeout(Duration::from_secs(10), other.write(stream::iter([message]))).await;
    answer.expect("the other peer is served in time").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn decoders_with_large_windows_wait_for_room() {
    const CONNECTIONS: u32 = 4;
    const UPLOADS: u32 = 32;
    /// A peer gets eight ninths of 256 MiB.
    const AT_ONCE: usize = 20;
    let server = Arc::new(Server::start().await);
    let bystander = Bystander::beside(&server).await;
    let target = server.clone();
    let attack = async move || {
        let data = Bytes::from(beginning(&noise(600_000)));
        let name = |connection: u32, number: u32| {
            let blob = format!("{}/{}", sha256(&[connection as u8, number as u8]).hash_hex(), 50 << 20);
            format!(
                "uploads/c0ffee00-0000-4000-8000-{connection:06x}{number:06x}/compressed-blobs/zstd/{blob}"
            )
        };
        let mut uploads = Vec::new();
        for connection in 0..CONNECTIONS {
            let client = ByteStreamClient::new(connect_from("127.0.0.1", &target).await);
            for number in 0..UPLOADS {
                let resource_name = name(connection, number);
                let message = WriteRequest {
                    resource_name: resource_name.clone(),
                    data: data.clone(),
                    ..Default::default()
                };
                let mut client_of_upload = client.clone();
                let messages = stream::iter([message]).chain(stream::pending());
                let upload = tokio::spawn(async move { client_of_upload.write(messages).await.map(drop) });
                uploads.push((client.clone(), resource_name, upload));
            }
        }
        let decoded = async {
            loop {
                let statuses =
                    uploads.iter().map(|(client, name, _)| {
                        let request = QueryWriteStatusRequest { resource_name: name.clone() };
                        let mut client = client.clone();
                        async move {
                            client.query_write_status(request).await.unwrap().into_inner().committed_size
                        }
                    });
                let sizes = join_all(statuses).await;
                if sizes.iter().filter(|size| **size > WINDOW as i64).count() >= AT_ONCE {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        };
        timeout(Duration::from_secs(60), decoded).await.expect("some are decoded");
        assert_others_are_served(&target).await;
        assert!(
            uploads.iter().all(|(_, _, upload)| !upload.is_finished()),
            "the attack went on all the time"
        );
    };
    apart(attack).await;
    bystander.leave().await;
    assert_memory_is_bounded(&server);
}

#[tokio::test(flavor = "multi_thread")]
async fn decoders_with_large_windows_wait_for_room_over_http() {
    let server = Server::with(&[("HTTP__LISTEN_ADDR", "127.0.0.1:0")]).await;
    let bystander = Bystander::beside(&server).await;
    let before = resident_memory(&server);
    let address = server.http_address();
    let body = beginning(&[]);
    assert!(body.len() < 1_000);
    let put = |number: u8| {
        let mut socket = raw::connect_from("127.0.0.1", address);
        let path = sha256(&[number]).hash_hex();
        let fields = "Host: localhost\r\nContent-Encoding: zstd\r\nTransfer-Encoding: chunked";
        write!(socket, "PUT /cas/{path} HTTP/1.1\r\n{fields}\r\n\r\n{:x}\r\n", body.len()).unwrap();
        socket.write_all(&body).unwrap();
        socket.write_all(b"\r\n").unwrap();
        socket
    };
    let sockets: Vec<_> = (0..128).map(put).collect();
    eventually("some are decoded", || resident_memory(&server) > before + 100_000_000).await;
    assert_others_are_served(&server).await;
    bystander.leave().await;
    assert_memory_is_bounded(&server);
    drop(sockets);
}
