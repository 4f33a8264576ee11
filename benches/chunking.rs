//! The cost of chunking: `cargo bench --bench chunking`.
//!
//! Prints MB/s of one thread, and the ratio to the library alone on bytes in memory; then a split and a splice by the
//! store, which also hash and write. The best of several rounds counts.
#![allow(clippy::unwrap_used)]

mod support;

use bytes::Bytes;
use fastcdc::v2020::{FastCDC, Normalization};
use gorego::actors::cas::Upload;
use gorego_reapi::{
    chunking::{Chunking, Splitter},
    digest::DigestFunction,
};
use std::time::{Duration, Instant};

const BYTES: usize = 256 << 20;
const ROUNDS: usize = 5;
/// The size in which files are read.
const PIECE: usize = 256 * 1024;

fn rate(elapsed: Duration) -> f64 {
    BYTES as f64 / 1e6 / elapsed.as_secs_f64()
}

fn report(what: &str, rate: f64, library: f64) {
    println!("{what:<45} {rate:>8.0} MB/s {:>5.0} %", rate / library * 100.0);
}

fn fastest(mut work: impl FnMut() -> usize) -> f64 {
    let rounds = (0..ROUNDS).map(|_| {
        let start = Instant::now();
        assert!(std::hint::black_box(work()) > 100);
        rate(start.elapsed())
    });
    rounds.fold(0.0, f64::max)
}

fn split(chunking: Chunking, bytes: &[u8]) -> usize {
    let mut splitter = Splitter::new(chunking);
    let mut chunks = 0;
    for piece in bytes.chunks(PIECE) {
        splitter.push(piece);
        chunks += std::iter::from_fn(|| splitter.next_chunk()).count();
    }
    splitter.end();
    chunks + std::iter::from_fn(|| splitter.next_chunk()).count()
}

#[actix::main]
async fn main() {
    let mut state = 1u64;
    let words = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state ^ (state >> 31)).to_le_bytes()
    });
    let bytes: Bytes = words.take(BYTES / 8).flatten().collect();

    let average = 524_288;
    let library = fastest(|| {
        FastCDC::with_level_and_seed(&bytes, average / 4, average, average * 4, Normalization::Level2, 0)
            .count()
    });
    report("FastCDC 2020, the library over a slice", library, library);
    report("FastCDC 2020, streamed", fastest(|| split(Chunking::FAST_CDC, &bytes)), library);
    report("RepMaxCDC, streamed", fastest(|| split(Chunking::REP_MAX, &bytes)), library);

    let root = tempfile::tempdir().unwrap();
    let (cas, main) = support::open(&support::settings(root.path().join("store")));
    let start = Instant::now();
    let blob = DigestFunction::Sha256.digest(&bytes);
    report("bare: SHA-256", rate(start.elapsed()), library);
    let start = Instant::now();
    let Upload::Writer(mut writer) = cas.begin_upload(&main, "u", blob, 0).await.unwrap() else { panic!() };
    for at in (0..BYTES).step_by(PIECE) {
        writer.write(bytes.slice(at..at + PIECE)).await.unwrap();
    }
    writer.finish().await.unwrap();
    report("upload, for comparison", rate(start.elapsed()), library);
    let start = Instant::now();
    let chunks = cas.split(&main, blob, Chunking::FAST_CDC, usize::MAX).await.unwrap();
    report("split, chunks written", rate(start.elapsed()), library);
    let start = Instant::now();
    cas.split(&main, blob, Chunking::FAST_CDC, usize::MAX).await.unwrap();
    println!("split of {} chunks, known {:>40.0} us", chunks.len(), start.elapsed().as_secs_f64() * 1e6);
    let twice = [&bytes[..], &bytes].concat();
    let double = DigestFunction::Sha256.digest(&twice);
    let parts = [&chunks[..], &chunks].concat();
    let start = Instant::now();
    cas.splice(&main, double, parts, Chunking::FAST_CDC).await.unwrap();
    report("splice", 2.0 * rate(start.elapsed()), library);
}
