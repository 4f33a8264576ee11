//! How long a store with many small blobs takes to start: `cargo bench --bench start [-- BLOBS [BYTES [DIRECTORY]]]`.
//!
//! Blobs are written through the store itself. Then the store is closed, its files are dropped from the page cache, and it is
//! opened again, until the first look-up is answered. The defaults, 200,000 blobs of 1 KiB, take some seconds and fail if the start
//! takes longer than [`MOST`]. The directory is removed at the end.
#![allow(clippy::unwrap_used)]

use bytes::Bytes;
use gorego::{
    action::TimeoutPolicy,
    actors::cas::{CasActor, CloseStore, StoreSettings, client::Cas},
    instance::{Instance, Instances},
};
use gorego_reapi::digest::{Digest, DigestFunction};
use rustix::fs::{Advice, fadvise};
use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};
use tokio::runtime::Handle;

const SHA256: DigestFunction = DigestFunction::Sha256;
/// Blobs of one request.
const BATCH: u64 = 1_000;
/// Requests at the same time.
const CALLERS: u64 = 4;
/// What a start with the defaults may take, on a slow disk and a busy machine.
const MOST: Duration = Duration::from_secs(2);

fn argument(at: usize) -> Option<String> {
    std::env::args().skip(1).filter(|argument| argument != "--bench").nth(at)
}

fn content(n: u64, bytes: usize) -> Bytes {
    let mut content = vec![n as u8; bytes.max(8)];
    content[..8].copy_from_slice(&n.to_le_bytes());
    content.into()
}

async fn write(cas: &Cas, main: &Instance, blobs: u64, bytes: usize) {
    let batch = |first: u64| async move {
        let blobs = (first..blobs.min(first + BATCH)).map(|n| content(n, bytes));
        let blobs = blobs.map(|bytes| (SHA256.digest(&bytes), bytes)).collect();
        assert!(cas.write_many(main, blobs).await.unwrap().iter().all(Result::is_ok));
    };
    for first in (0..blobs).step_by((BATCH * CALLERS) as usize) {
        futures::future::join_all((0..CALLERS).map(|caller| batch(first + caller * BATCH))).await;
    }
}

/// Drops the files below a directory from the page cache. Returns their number and bytes.
fn forget(directory: &Path) -> (u64, u64) {
    let (mut files, mut bytes) = (0, 0);
    for entry in fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        let metadata = entry.metadata().unwrap();
        let (more, more_bytes) = match metadata.is_dir() {
            true => forget(&entry.path()),
            false => {
                fadvise(File::open(entry.path()).unwrap(), 0, None, Advice::DontNeed).unwrap();
                (1, metadata.len())
            }
        };
        (files, bytes) = (files + more, bytes + more_bytes);
    }
    (files, bytes)
}

/// Resident memory of this process in bytes.
fn resident() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

#[actix::main]
async fn main() {
    let blobs: u64 = argument(0).map_or(200_000, |text| text.parse().unwrap());
    let bytes: usize = argument(1).map_or(1_024, |text| text.parse().unwrap());
    let directory = tempfile::tempdir_in(argument(2).map_or_else(std::env::temp_dir, PathBuf::from)).unwrap();
    let settings = StoreSettings {
        root: directory.path().join("store"),
        max_bytes: 1 << 40,
        max_blob_bytes: 1 << 34,
        zstd_level: 1,
        scrub_bytes_per_second: 0,
        leases: Default::default(),
        result_links_bytes: 1 << 20,
        partial_upload_retention: Duration::from_secs(60),
        timeouts: TimeoutPolicy { default: Duration::from_secs(60), max: Duration::from_secs(600) },
    };
    let instances = Instances::new([""]).unwrap();
    let main = instances.get("").unwrap();
    let cas = CasActor::open(settings.clone(), &instances, Handle::current()).unwrap().launch();
    let start = Instant::now();
    write(&cas, &main, blobs, bytes).await;
    let rate = blobs as f64 / start.elapsed().as_secs_f64();
    println!(
        "wrote {blobs} blobs of {bytes} bytes: {:.1} s, {rate:.0} blobs/s",
        start.elapsed().as_secs_f64()
    );
    cas.actor().send(CloseStore).await.unwrap();
    drop(cas);

    rustix::fs::sync();
    let (files, on_disk) = forget(&settings.root);
    println!("on disk: {files} files, {:.0} MB", on_disk as f64 / 1e6);
    let before = resident();
    let start = Instant::now();
    let cas = loop {
        // The last file operation of the closed store may still hold its lock.
        match CasActor::open(settings.clone(), &instances, Handle::current()) {
            Ok(actor) => break actor.launch(),
            Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
        }
    };
    let some: Vec<Digest> = (0..blobs)
        .step_by((blobs as usize / 1_000).max(1))
        .map(|n| SHA256.digest(&content(n, bytes)))
        .collect();
    assert!(cas.find_missing(&main, &some).await.unwrap().is_empty());
    let elapsed = start.elapsed();
    let memory = resident().saturating_sub(before) as f64 / blobs as f64;
    println!("first answer after {:.2} s; {memory:.0} bytes of memory a blob", elapsed.as_secs_f64());
    assert!(argument(0).is_some() || elapsed < MOST, "the start takes too long");
}
