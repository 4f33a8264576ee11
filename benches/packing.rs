//! Compression at rest over real files: `cargo bench --bench packing -- [DIRECTORY...]`.
//!
//! For each directory (`target/debug/deps` by default): the disk space of its files plain and compressed, the speed of
//! one core that compresses them, and the cost of reads before and after. Files of up to 64 KiB are joined to blobs of
//! 4 MiB, as archives of headers would be.
#![allow(clippy::unwrap_used)]

mod support;

use bytes::Bytes;
use gorego::{
    actors::cas::{CloseStore, PackingSettings, StoreSettings, Upload, client::Cas},
    instance::Instance,
};
use gorego_reapi::digest::{Digest, DigestFunction};
use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

const SHA256: DigestFunction = DigestFunction::Sha256;
const SMALL_BYTES: u64 = 64 << 10;
const JOINED_BYTES: usize = 4 << 20;
/// Most bytes that are read of a directory.
const MOST_BYTES: u64 = 1 << 30;
const PIECE_BYTES: usize = 256 << 10;

/// The contents to store: large files, and small ones joined.
fn contents(directory: &Path) -> Vec<Bytes> {
    let (mut blobs, mut joined, mut bytes) = (vec![], vec![], 0);
    let mut directories = vec![directory.to_owned()];
    while let Some(directory) = directories.pop() {
        let mut entries: Vec<_> = fs::read_dir(directory).unwrap().flatten().collect();
        entries.sort_by_key(fs::DirEntry::path);
        for entry in entries {
            let Ok(metadata) = entry.metadata() else { continue };
            if metadata.is_dir() {
                directories.push(entry.path());
            }
            if !metadata.is_file() || bytes + metadata.len() > MOST_BYTES {
                continue;
            }
            let Ok(content) = fs::read(entry.path()) else { continue };
            bytes += content.len() as u64;
            if metadata.len() > SMALL_BYTES {
                blobs.push(content.into());
                continue;
            }
            joined.extend(content);
            if joined.len() >= JOINED_BYTES {
                blobs.push(std::mem::take(&mut joined).into());
            }
        }
    }
    blobs.extend((joined.len() as u64 > SMALL_BYTES).then(|| joined.into()));
    blobs
}

async fn store(cas: &Cas, main: &Instance, content: &Bytes) -> Digest {
    let digest = SHA256.digest(content);
    if let Upload::Writer(mut writer) = cas.begin_upload(main, "u", digest, 0).await.unwrap() {
        for at in (0..content.len()).step_by(PIECE_BYTES) {
            writer.write(content.slice(at..content.len().min(at + PIECE_BYTES))).await.unwrap();
        }
        writer.finish().await.unwrap();
    }
    digest
}

/// Reads all blobs, plain and as zstd, and the last byte of each; in MB of content per second, and microseconds.
async fn reads(cas: &Cas, main: &Instance, blobs: &[Digest]) -> (f64, f64, f64) {
    let all = blobs.iter().map(|blob| blob.size()).sum::<u64>() as f64 / 1e6;
    let start = Instant::now();
    for blob in blobs {
        let (reader, mut at) = (cas.open(main, *blob).await.unwrap(), 0);
        while at < reader.size() {
            at += reader.read_at(at, PIECE_BYTES).await.unwrap().len() as u64;
        }
    }
    let plain = all / start.elapsed().as_secs_f64();
    let start = Instant::now();
    for blob in blobs {
        let mut stream = cas.open_zstd(main, *blob, 0).await.unwrap();
        while stream.next(PIECE_BYTES).await.unwrap().is_some() {}
    }
    let zstd = all / start.elapsed().as_secs_f64();
    let start = Instant::now();
    for blob in blobs {
        let reader = cas.open(main, *blob).await.unwrap();
        assert_eq!(reader.read_at(reader.size() - 1, 1).await.unwrap().len(), 1);
    }
    (plain, zstd, start.elapsed().as_secs_f64() * 1e6 / blobs.len() as f64)
}

#[actix::main]
async fn main() {
    let mut directories: Vec<PathBuf> =
        std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).map(PathBuf::from).collect();
    if directories.is_empty() {
        directories.push("target/debug/deps".into());
    }
    for directory in directories {
        let root = tempfile::tempdir().unwrap();
        let settings = support::settings(root.path().join("store"));
        let (cas, main) = support::open(&settings);
        let mut blobs = vec![];
        for content in contents(&directory) {
            blobs.push(store(&cas, &main, &content).await);
        }
        blobs.sort_by_key(|blob| blob.hash_hex());
        blobs.dedup();
        let before = cas.measure().totals;
        // The first read verifies nothing: the blobs were written by this process.
        let (plain, zstd, last) = reads(&cas, &main, &blobs).await;
        println!(
            "{}: {} blobs, {:.0} MB on disk",
            directory.display(),
            blobs.len(),
            before.used as f64 / 1e6
        );
        println!(
            "  plain:  identity {plain:.0} MB/s, zstd made on the way {zstd:.0} MB/s, last byte {last:.0} us"
        );
        cas.actor().send(CloseStore).await.unwrap();
        drop(cas);

        let packing =
            PackingSettings { after_secs: 0, min_bytes: 1 << 16, min_saving_percent: 20, cpu_percent: 100 };
        let settings = StoreSettings { packing: Some(packing), ..settings };
        let cas = support::reopen(&settings).await.launch();
        let (start, mut last_change, mut packed) = (Instant::now(), Instant::now(), 0);
        // No event tells the end of the pass. It has ended when nothing has changed for two seconds.
        while last_change.elapsed() < Duration::from_secs(2) {
            tokio::time::sleep(Duration::from_millis(20)).await;
            let now = cas.measure().totals.packed_blobs;
            if now != packed {
                (packed, last_change) = (now, Instant::now());
            }
        }
        let took = (last_change - start).as_secs_f64();
        let totals = cas.measure().totals;
        println!(
            "  packed: {} blobs of {:.0} MB in {:.0} MB ({:.0} %), {:.1} s with one core, {:.0} MB/s; the store takes {:.0} MB ({:.0} %)",
            totals.packed_blobs,
            totals.packed_content as f64 / 1e6,
            totals.packed_used as f64 / 1e6,
            100.0 * totals.packed_used as f64 / totals.packed_content.max(1) as f64,
            took,
            totals.packed_content as f64 / 1e6 / took,
            totals.used as f64 / 1e6,
            100.0 * totals.used as f64 / before.used.max(1) as f64,
        );
        // The first reads after a restart also check the digest; the others do not.
        let (first, ..) = reads(&cas, &main, &blobs).await;
        let (plain, zstd, last) = reads(&cas, &main, &blobs).await;
        println!(
            "  packed: identity {plain:.0} MB/s ({first:.0} the first time), stored zstd {zstd:.0} MB/s, last byte {last:.0} us"
        );
        cas.actor().send(CloseStore).await.unwrap();
    }
}
