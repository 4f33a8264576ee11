//! Hashing of large blobs, compared with the library alone in one thread on the same bytes in memory.

use crate::{
    report::Report,
    target::{Client, Target},
    zstd::speed,
};
use bytes::Bytes;
use futures::stream;
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    proto::bytestream::{ReadRequest, WriteRequest},
};
use std::time::Instant;
use tokio::runtime::Runtime;

const SIZE: usize = 256 << 20;
const MESSAGE_BYTES: usize = 128 << 10;
/// The piece size in which files and decoded streams are hashed.
const PIECE_BYTES: usize = 256 << 10;
const ROUNDS: u64 = 3;

/// Hashing in pieces, an upload, and the first read after a restart, which hashes the stored file, with BLAKE3 and
/// SHA-256.
pub(crate) fn large_blobs(report: &mut Report) {
    for function in [DigestFunction::Blake3, DigestFunction::Sha256] {
        let [mut library, mut pieces, mut up, mut cold] = [0f64; 4];
        let mut blob: Vec<u8> = (0..SIZE as u64 / 8).flat_map(|n| (n * n + n).to_le_bytes()).collect();
        let runtime = Runtime::new().expect("a runtime");
        for round in 0..ROUNDS {
            blob[..8].copy_from_slice(&round.to_le_bytes());
            library = library.max(speed(|| match function {
                DigestFunction::Blake3 => drop(std::hint::black_box(blake3::hash(&blob))),
                _ => drop(std::hint::black_box(<sha2::Sha256 as sha2::Digest>::digest(&blob))),
            }));
            let mut hasher = function.hasher(SIZE as u64);
            pieces = pieces.max(speed(|| blob.chunks(PIECE_BYTES).for_each(|piece| hasher.update(piece))));
            let digest = hasher.finish();
            let target = Target::start();
            up = up.max(runtime.block_on(upload(&target, digest, blob.clone().into())));
            let target = Target::start_on(target.into_store(), &[]);
            cold = cold.max(runtime.block_on(first_byte(&target, digest)));
        }
        for (what, ours, goal) in [
            ("hashed in pieces", pieces, Some(0.7)),
            ("hashed on the first read after a restart", cold, Some(0.7)),
            ("uploaded, hashed and written", up, None),
        ] {
            report.add(
                &format!("{}, 256 MiB {what}", function.name()),
                format!("{:.0} MB/s ({:.0} %)", ours / 1e6, 100.0 * ours / library),
                format!("the library in one thread {:.0} MB/s", library / 1e6),
                if goal.is_some() { "70 %" } else { "-" },
                goal.is_none_or(|goal| ours >= library * goal),
            );
        }
    }
}

async fn upload(target: &Target, digest: Digest, bytes: Bytes) -> f64 {
    let mut client = Client::connect(&target.endpoint).await.bytes;
    let name = format!("uploads/6ba7b810-9dad-11d1-80b4-00c04fd430c8/{}", digest.blob_name());
    let messages = (0..SIZE).step_by(MESSAGE_BYTES).map(move |offset| WriteRequest {
        resource_name: if offset == 0 { name.clone() } else { String::new() },
        write_offset: offset as i64,
        finish_write: offset + MESSAGE_BYTES == SIZE,
        data: bytes.slice(offset..offset + MESSAGE_BYTES),
    });
    let start = Instant::now();
    client.write(stream::iter(messages)).await.expect("it is stored");
    SIZE as f64 / start.elapsed().as_secs_f64()
}

/// Reads one byte of a blob whose file this server has not verified yet.
async fn first_byte(target: &Target, digest: Digest) -> f64 {
    let mut client = Client::connect(&target.endpoint).await.bytes;
    let request = ReadRequest { resource_name: digest.blob_name(), read_limit: 1, ..Default::default() };
    let start = Instant::now();
    let mut stream = client.read(request).await.expect("it is there").into_inner();
    stream.message().await.expect("it is read");
    SIZE as f64 / start.elapsed().as_secs_f64()
}
