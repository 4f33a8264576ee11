//! `gorego bench limits`: measures what this machine can do without a server, as a reference for the scenarios.

mod bare;

use crate::{
    noise::Noise,
    report::{aligned, rounded},
    target::FUNCTION,
};
use gorego_reapi::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::{
    fs::File,
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

/// Time for each measurement.
const TIME: Duration = Duration::from_secs(2);
/// Bytes of one large blob, and of its messages.
const LARGE_BYTES: usize = 64 << 20;
const MESSAGE_BYTES: usize = 1 << 20;
/// Size of a small file.
const SMALL_BYTES: usize = 4096;

/// The limits of one machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    /// Number of CPUs that this process may use.
    pub cpus: usize,
    /// The limits, in the order of their measurements.
    pub limits: Vec<Limit>,
}

/// A rate that this machine reaches without a server.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Limit {
    /// A short name of the measured work, for the table.
    pub name: String,
    /// What was done to measure the rate, in a few words.
    pub about: String,
    /// The measured rate per second, in `unit`.
    pub per_second: f64,
    /// The unit of `per_second`.
    pub unit: String,
}

impl Limits {
    /// Measures the limits. Files are written to a temporary directory below `directory`, which should be on the disk
    /// of the store. Takes about 20 seconds.
    ///
    /// # Errors
    /// If files cannot be written or processes cannot be started.
    pub async fn measure(directory: &Path, say: &(dyn Fn(&str) + Sync)) -> Result<Self> {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let mut limits = Vec::new();
        let mut add = |name: &str, about: &str, unit: &str, per_second: f64| {
            limits.push(Limit { name: name.into(), about: about.into(), per_second, unit: unit.into() });
        };
        let directory = directory.to_owned();
        say("SHA-256");
        add("hash", "SHA-256 of 64 MiB, one thread", "MB", blocking(|| Ok(hash())).await?);
        say("processes");
        add(
            "spawn",
            "/bin/true, started and waited for, one at a time",
            "processes",
            blocking(|| spawn(1)).await?,
        );
        add("spawn-all", "the same on all CPUs", "processes", blocking(move || spawn(cpus)).await?);
        say("files");
        let place = directory.clone();
        add(
            "create",
            "files of 4 KiB, created and written, one thread",
            "files",
            blocking(move || create(&place)).await?,
        );
        add(
            "write",
            "one file, written and synced to the disk",
            "MB",
            blocking(move || write(&directory)).await?,
        );
        say("a gRPC server that does nothing");
        let bare = bare::Bare::start().await?;
        let (unary, small) = (bare.unary().await?, bare.writes(SMALL_BYTES, 32).await?);
        add("grpc-unary", "unary calls, 32 callers", "calls", unary.calls_per_second);
        add("grpc-write-small", "ByteStream.Write of 4 KiB, 32 callers", "calls", small.calls_per_second);
        add(
            "grpc-write-large",
            "ByteStream.Write of 64 MiB, 2 callers",
            "MB",
            bare.writes(LARGE_BYTES, 2).await?.megabytes_per_second,
        );
        add(
            "grpc-read-large",
            "ByteStream.Read of 64 MiB, 2 callers",
            "MB",
            bare.reads(2).await?.megabytes_per_second,
        );
        Ok(Self { cpus, limits })
    }

    /// The limits as JSON.
    pub fn json(&self) -> String {
        serde_json::to_string_pretty(self).unwrap_or_default()
    }

    /// The limits as a table.
    pub fn table(&self) -> String {
        let rows: Vec<_> = self
            .limits
            .iter()
            .map(|limit| {
                vec![
                    limit.name.clone(),
                    format!("{} {}/s", rounded(limit.per_second), limit.unit),
                    limit.about.clone(),
                ]
            })
            .collect();
        aligned(&rows)
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    gorego_client::blocking(work).await
}

/// Bytes per second that one thread hashes, in 10^6.
fn hash() -> f64 {
    let content = Noise::new(1).bytes(LARGE_BYTES);
    let (mut bytes, start) = (0, Instant::now());
    while start.elapsed() < TIME {
        std::hint::black_box(FUNCTION.digest(&content));
        bytes += content.len();
    }
    bytes as f64 / 1e6 / start.elapsed().as_secs_f64()
}

/// Processes per second that this many threads start and wait for.
fn spawn(threads: usize) -> Result<f64> {
    let (count, start) = (AtomicU64::new(0), Instant::now());
    let work = || -> std::io::Result<()> {
        while start.elapsed() < TIME {
            Command::new("/bin/true").stdin(Stdio::null()).status()?;
            count.fetch_add(1, Relaxed);
        }
        Ok(())
    };
    let outcomes: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| Err(std::io::Error::other("a thread panicked"))))
            .collect()
    });
    outcomes
        .into_iter()
        .collect::<std::io::Result<()>>()
        .map_err(|error| Error::io("start /bin/true", &error))?;
    Ok(count.into_inner() as f64 / start.elapsed().as_secs_f64())
}

fn scratch(directory: &Path) -> Result<tempfile::TempDir> {
    tempfile::tempdir_in(directory).map_err(|error| Error::io("make a directory for test files", &error))
}

/// Small files per second.
fn create(directory: &Path) -> Result<f64> {
    let (scratch, content) = (scratch(directory)?, Noise::new(1).bytes(SMALL_BYTES));
    let (mut count, start) = (0u32, Instant::now());
    while start.elapsed() < TIME {
        let path = scratch.path().join(count.to_string());
        std::fs::write(path, &content).map_err(|error| Error::io("write a test file", &error))?;
        count += 1;
    }
    Ok(f64::from(count) / start.elapsed().as_secs_f64())
}

/// Bytes per second that reach the disk, in 10^6.
#[allow(clippy::disallowed_methods, reason = "the disk itself is measured")]
fn write(directory: &Path) -> Result<f64> {
    /// This is more than the cache of a disk.
    const BYTES: usize = 512 << 20;
    let (scratch, content) = (scratch(directory)?, Noise::new(1).bytes(MESSAGE_BYTES));
    let failed = |error: std::io::Error| Error::io("write a test file", &error);
    let start = Instant::now();
    let mut file = File::create(scratch.path().join("large")).map_err(failed)?;
    for _ in 0..BYTES / MESSAGE_BYTES {
        file.write_all(&content).map_err(failed)?;
    }
    file.sync_all().map_err(failed)?;
    Ok(BYTES as f64 / 1e6 / start.elapsed().as_secs_f64())
}
