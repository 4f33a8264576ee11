//! How long a store with many small blobs takes to start after it was killed: `cargo bench --bench start [-- BLOBS
//! [BYTES [DIRECTORY]]]`.
//!
//! One process writes the blobs through the store itself and is killed as soon as the last one is acknowledged. Then
//! the files are dropped from the page cache, and a new process opens the store and asks which of two thousand blobs
//! are missing. The time counts from the start of that process to its answer. A third process does the same once more,
//! with the files in the page cache.
//!
//! The defaults, 200,000 blobs of 1 KiB, take some seconds; `tests/run` runs them as `cargo test --bench start`. It
//! fails if an answer is wrong or takes longer than [`MOST`], or if the index takes more than [`MOST_BYTES`] for a
//! blob. The directory is removed at the end.
#![allow(clippy::unwrap_used)]

mod support;

use bytes::Bytes;
use gorego::actors::cas::CloseStore;
use gorego_reapi::digest::{Digest, DigestFunction};
use rustix::{
    fs::{Advice, fadvise},
    time::{ClockId, clock_gettime},
};
use std::{
    collections::HashSet,
    fs::{self, File},
    future::pending,
    io::{BufRead as _, BufReader, Lines},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

const SHA256: DigestFunction = DigestFunction::Sha256;
/// Blobs of one request.
const BATCH: u64 = 1_000;
/// Requests at the same time.
const CALLERS: u64 = 4;
/// Stored blobs that are asked for, and as many that are not stored.
const ASKED: u64 = 1_000;
/// Limit on the time to the first answer. Code that is not optimised is some ten times slower.
const MOST: Duration = Duration::from_secs(if cfg!(debug_assertions) { 10 } else { 2 });
/// Limit on the memory that the index takes for a blob.
const MOST_BYTES: f64 = 100.0;
/// What a child process does: `write` or `open`.
const ROLE: &str = "GOREGO_BENCH_START";

/// The arguments, which child processes get too.
struct Load {
    blobs: u64,
    bytes: usize,
    /// Where the directory of the store is made, or the store itself in a child.
    place: PathBuf,
}

fn load() -> Load {
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    let blobs = arguments.next().map_or(200_000, |text| text.parse().unwrap());
    let bytes = arguments.next().map_or(1_024, |text| text.parse().unwrap());
    Load { blobs, bytes, place: arguments.next().map_or_else(std::env::temp_dir, PathBuf::from) }
}

fn main() {
    let load = load();
    match std::env::var(ROLE).as_deref() {
        Ok("write") => actix::System::new().block_on(write(load)),
        Ok(_) => actix::System::new().block_on(open(load)),
        Err(_) => measure(load),
    }
}

fn measure(load: Load) {
    let directory = tempfile::tempdir_in(&load.place).unwrap();
    let load = Load { place: directory.path().join("store"), ..load };
    let (mut writer, mut said) = start("write", &load);
    println!("wrote {} blobs of {} bytes: {}", load.blobs, load.bytes, next(&mut said));
    writer.kill().unwrap();
    writer.wait().unwrap();
    rustix::fs::sync();
    let (files, bytes) = forget(&load.place);
    println!("on disk: {files} files, {:.0} MB", bytes as f64 / 1e6);
    for state in ["cold", "cached"] {
        let begin = Instant::now();
        let (mut opener, mut said) = start("open", &load);
        let inside = next(&mut said);
        let elapsed = begin.elapsed();
        println!("{state}: first answer after {:.2} s ({inside})", elapsed.as_secs_f64());
        println!("{state}: {}", next(&mut said));
        assert!(opener.wait().unwrap().success());
        assert!(elapsed < MOST, "the start takes too long");
    }
}

/// Starts this program in another role.
fn start(role: &str, load: &Load) -> (Child, Lines<BufReader<ChildStdout>>) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([load.blobs.to_string(), load.bytes.to_string()]).arg(&load.place).env(ROLE, role);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let said = BufReader::new(child.stdout.take().unwrap()).lines();
    (child, said)
}

fn next(said: &mut Lines<BufReader<ChildStdout>>) -> String {
    said.next().expect("a process of the benchmark failed").unwrap()
}

fn content(n: u64, bytes: usize) -> Bytes {
    let mut content = vec![n as u8; bytes.max(8)];
    content[..8].copy_from_slice(&n.to_le_bytes());
    content.into()
}

/// Writes the blobs, says so, and waits to be killed.
async fn write(load: Load) {
    let Load { blobs, bytes, place } = load;
    let (cas, main) = support::open(&support::settings(place));
    let (cas, main) = (&cas, &main);
    let batch = |first: u64| async move {
        let blobs = (first..blobs.min(first + BATCH)).map(|n| content(n, bytes));
        let blobs = blobs.map(|bytes| (SHA256.digest(&bytes), bytes)).collect();
        assert!(cas.write_many(main, blobs).await.unwrap().iter().all(Result::is_ok));
    };
    let begin = Instant::now();
    for first in (0..blobs).step_by((BATCH * CALLERS) as usize) {
        futures::future::join_all((0..CALLERS).map(|caller| batch(first + caller * BATCH))).await;
    }
    let elapsed = begin.elapsed().as_secs_f64();
    println!("{elapsed:.1} s, {:.0} blobs/s", blobs as f64 / elapsed);
    pending().await
}

/// Opens the store, looks up some blobs, and reports.
async fn open(load: Load) {
    let Load { blobs, bytes, place } = load;
    let before = resident("VmRSS:");
    let digest = |n| SHA256.digest(&content(n, bytes));
    let some: Vec<Digest> = (0..blobs).step_by((blobs / ASKED).max(1) as usize).map(digest).collect();
    let absent: HashSet<Digest> = (blobs..blobs + ASKED).map(digest).collect();
    let asked: Vec<Digest> = some.iter().chain(&absent).copied().collect();
    let begin = Instant::now();
    let (cas, main) = support::open(&support::settings(place));
    let missing = cas.find_missing(&main, &asked).await.unwrap();
    let (elapsed, cpu) = (begin.elapsed().as_secs_f64(), clock_gettime(ClockId::ProcessCPUTime));
    let cpu = cpu.tv_sec as f64 + cpu.tv_nsec as f64 / 1e9;
    println!("{elapsed:.2} s of it to open and ask, {cpu:.2} s of CPU");
    assert_eq!(missing.into_iter().collect::<HashSet<_>>(), absent, "a wrong answer");

    let measured = cas.measure();
    assert_eq!(measured.totals.blobs, blobs, "every blob that was acknowledged is there");
    let of_index = measured.index_bytes as f64 / blobs as f64;
    let each = |bytes: u64| bytes.saturating_sub(before) as f64 / blobs as f64;
    println!(
        "memory a blob: {of_index:.1} bytes of the index, {:.1} resident, {:.1} at the peak",
        each(resident("VmRSS:")),
        each(resident("VmHWM:"))
    );
    assert!(blobs < 100_000 || of_index <= MOST_BYTES, "the index takes too much memory");
    cas.actor().send(CloseStore).await.unwrap();
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

/// Memory of this process in bytes, from a line of its status.
fn resident(name: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}
