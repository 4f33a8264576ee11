//! Compressed transfers, compared with the library alone in one thread on the same bytes.

use crate::{
    report::Report,
    target::{Client, Target},
};
use bytes::Bytes;
use futures::stream;
use gorego_client::stubs::ByteStreamClient;
use gorego_reapi::{
    compression::{CHUNK_BYTES, Encoder},
    digest::{Digest, DigestFunction},
    proto::bytestream::{ReadRequest, WriteRequest},
};
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;
use tonic::transport::Channel;

/// The default level of the server.
const LEVEL: i32 = 1;
const SIZE: usize = 256 << 20;
const MESSAGE_BYTES: usize = 128 << 10;
const ROUNDS: u64 = 3;
/// Time in which the compressed form of a blob is made in the background.
const FORM_WAIT: Duration = Duration::from_secs(5);

/// Compressed uploads and downloads of 256 MiB of machine code.
pub(crate) fn transfers(report: &mut Report) {
    let runtime = Runtime::new().expect("a runtime");
    let target = Target::start();
    let program = std::fs::read(env!("CARGO_BIN_EXE_gorego")).expect("the server's own program");
    let mut blob: Vec<u8> = program.iter().copied().cycle().take(SIZE).collect();
    let [mut encode, mut decode, mut up, mut first, mut kept] = [0f64; 5];
    for round in 0..ROUNDS {
        // A different blob each time, both for digests and for the compressor.
        for (n, chunk) in blob.chunks_mut(CHUNK_BYTES).enumerate() {
            chunk[..8].copy_from_slice(&(round << 32 | n as u64).to_le_bytes());
        }
        let digest = DigestFunction::Sha256.digest(&blob);
        let (mut encoder, mut stream) = (Encoder::new(LEVEL).expect("an encoder"), Vec::with_capacity(SIZE));
        encode = encode.max(speed(|| encoder.frames(&blob, &mut stream).expect("it is compressed")));
        decode = decode
            .max(speed(|| zstd::stream::copy_decode(&stream[..], std::io::sink()).expect("it decodes")));
        runtime.block_on(async {
            let client = Client::connect(&target.endpoint).await.bytes;
            let name = digest.blob_name().replacen("blobs/", "compressed-blobs/zstd/", 1);
            up = up.max(upload(&client, &name, digest, stream.into()).await);
            first = first.max(download(&client, &name).await);
            download(&client, &name).await;
            tokio::time::sleep(FORM_WAIT).await;
            kept = kept.max(download(&client, &name).await);
        });
    }
    for (what, ours, library, limit) in [
        ("upload", up, decode, "decompression"),
        ("first download", first, encode, "compression"),
        ("later download", kept, encode, "compression"),
    ] {
        report.add(
            &format!("zstd {what} of 256 MiB (uncompressed)"),
            format!("{:.0} MB/s ({:.0} %)", ours / 1e6, 100.0 * ours / library),
            format!("the library's {limit} in one thread {:.0} MB/s", library / 1e6),
            "70 %",
            ours >= library * 0.7,
        );
    }
}

/// Bytes of the blob per second.
pub(crate) fn speed(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    SIZE as f64 / start.elapsed().as_secs_f64()
}

async fn upload(client: &ByteStreamClient<Channel>, name: &str, digest: Digest, stream: Bytes) -> f64 {
    let name = format!("uploads/6ba7b810-9dad-11d1-80b4-00c04fd430c8/{name}");
    let size = stream.len();
    let messages = (0..size).step_by(MESSAGE_BYTES).map(move |offset| {
        let end = (offset + MESSAGE_BYTES).min(size);
        WriteRequest {
            resource_name: if offset == 0 { name.clone() } else { String::new() },
            write_offset: offset as i64,
            finish_write: end == size,
            data: stream.slice(offset..end),
        }
    });
    let start = Instant::now();
    let reply = client.clone().write(stream::iter(messages)).await.expect("it is stored").into_inner();
    assert_eq!(reply.committed_size, size as i64);
    digest.size() as f64 / start.elapsed().as_secs_f64()
}

async fn download(client: &ByteStreamClient<Channel>, name: &str) -> f64 {
    let request = ReadRequest { resource_name: name.to_owned(), ..Default::default() };
    let start = Instant::now();
    let mut stream = client.clone().read(request).await.expect("it is there").into_inner();
    let mut received = 0;
    while let Some(message) = stream.message().await.expect("the stream goes on") {
        received += message.data.len();
    }
    assert!(received > 0);
    SIZE as f64 / start.elapsed().as_secs_f64()
}
