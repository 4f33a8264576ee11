//! The limits of this machine: rates that it reaches without a server, as a reference for the scenarios.

mod bare;
mod local;

use crate::{
    Options, Pace, Progress,
    noise::Noise,
    report::{aligned, rounded},
};
use bare::Bare;
use futures::future::BoxFuture;
use gorego_reapi::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::{
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::sync::OnceCell;

/// Bytes of one large blob, and of its messages.
const LARGE_BYTES: usize = 64 << 20;
const MESSAGE_BYTES: usize = 1 << 20;
/// Size of a small blob or file.
const SMALL_BYTES: usize = 4096;
/// Small blobs of one batch.
const BATCH: usize = 100;
/// Digests of one existence check.
const DIGESTS: usize = 1_000;

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
    /// Measures all limits, each for the duration in the options. Only the limits of gRPC have a warm-up. Files are
    /// written to a temporary directory below `directory`, which should be on the disk of the store.
    ///
    /// # Errors
    /// If files cannot be written or processes cannot be started.
    pub async fn measure(
        directory: &Path,
        options: &Options,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<Self> {
        let mut machine = Machine::new(directory, options);
        for kind in ALL {
            machine.limit(kind, progress).await?;
        }
        Ok(Self { cpus: local::cpus(), limits: machine.measured })
    }

    /// The limits as JSON.
    pub fn json(&self) -> String {
        serde_json::to_string_pretty(self).unwrap_or_default()
    }

    /// The limits as a table.
    pub fn table(&self) -> String {
        let row = |limit: &Limit| vec![limit.name.clone(), limit.rate(), limit.about.clone()];
        aligned(&self.limits.iter().map(row).collect::<Vec<_>>())
    }
}

impl Limit {
    /// The rate with its unit.
    pub(crate) fn rate(&self) -> String {
        format!("{} {}/s", rounded(self.per_second), self.unit)
    }
}

/// A limit that can be measured.
#[derive(Debug)]
pub(crate) struct Kind {
    pub(crate) name: &'static str,
    unit: &'static str,
    about: &'static str,
    measure: for<'a> fn(&'a Machine) -> BoxFuture<'a, Result<f64>>,
}

macro_rules! kinds {
    ($($kind:ident: $name:literal, $unit:literal, $about:literal, |$machine:ident| $measure:expr;)*) => {
        $(pub(crate) static $kind: Kind = Kind {
            name: $name,
            unit: $unit,
            about: $about,
            measure: |$machine| Box::pin(async move { $measure }),
        };)*
        /// All limits, in their usual order.
        static ALL: &[&Kind] = &[$(&$kind),*];
    };
}

kinds! {
    HASH: "hash", "MB", "SHA-256 of 64 MiB, one thread",
        |machine| machine.on_a_thread(|time, _| local::hash(1, LARGE_BYTES, time)).await;
    HASH_SMALL: "hash-small", "MB", "SHA-256 of blobs of 4 KiB, on all CPUs",
        |machine| machine.on_a_thread(|time, _| local::hash(local::cpus(), SMALL_BYTES, time)).await;
    SPAWN: "spawn", "processes", "/bin/true, started and waited for, one at a time",
        |machine| machine.on_a_thread(|time, _| local::spawn(1, time)).await;
    SPAWN_ALL: "spawn-all", "processes", "the same on all CPUs",
        |machine| machine.on_a_thread(|time, _| local::spawn(local::cpus(), time)).await;
    CREATE: "create", "files", "at most 100,000 files of 4 KiB, created and written, one thread",
        |machine| machine.on_a_thread(|time, directory| local::create(directory, time)).await;
    WRITE: "write", "MB", "one file of at most 512 MiB, written and synced to the disk",
        |machine| machine.on_a_thread(|time, directory| local::write(directory, time)).await;
    UNARY: "grpc-unary", "calls", "unary calls to a gRPC server that does nothing, 32 callers",
        |machine| Ok(machine.bare().await?.unary().await?.calls_per_second);
    FIND_MISSING: "grpc-find-missing", "calls", "FindMissingBlobs with 1,000 digests, 8 callers, same server",
        |machine| Ok(machine.bare().await?.find_missing().await?.calls_per_second);
    BATCH_READ: "grpc-batch-read", "calls", "BatchReadBlobs with 100 blobs of 4 KiB, 8 callers, same server",
        |machine| Ok(machine.bare().await?.batch_reads().await?.calls_per_second);
    WRITE_SMALL: "grpc-write-small", "calls", "ByteStream.Write of 4 KiB, 32 callers, same server",
        |machine| Ok(machine.bare().await?.writes(SMALL_BYTES, 32).await?.calls_per_second);
    READ_SMALL: "grpc-read-small", "calls", "ByteStream.Read of 4 KiB, 32 callers, same server",
        |machine| Ok(machine.bare().await?.reads(SMALL_BYTES, 32).await?.calls_per_second);
    WRITE_LARGE: "grpc-write-large", "MB", "ByteStream.Write of 64 MiB, 2 callers, same server",
        |machine| Ok(machine.bare().await?.writes(LARGE_BYTES, 2).await?.megabytes_per_second);
    READ_LARGE: "grpc-read-large", "MB", "ByteStream.Read of 64 MiB, 2 callers, same server",
        |machine| Ok(machine.bare().await?.reads(LARGE_BYTES, 2).await?.megabytes_per_second);
    READ_ZSTD: "grpc-read-zstd", "MB", "the same with the size of 64 MiB of text after compression with zstd, in MB of text",
        |machine| {
            let figures = machine.bare().await?.reads(zstd_bytes()?, 2).await?;
            Ok(figures.calls_per_second * LARGE_BYTES as f64 / 1e6)
        };
}

/// Size of the zstd stream of the compressible blob that `read-zstd` reads.
fn zstd_bytes() -> Result<usize> {
    let text = Noise::new(1).text(MESSAGE_BYTES);
    let stream = zstd::bulk::compress(&text, 1).map_err(|error| Error::io("compress", &error))?;
    Ok(stream.len() * (LARGE_BYTES / MESSAGE_BYTES))
}

/// Measures the limits of this machine, each once.
pub(crate) struct Machine {
    /// How long each limit is measured.
    options: Options,
    /// Files are written to a temporary directory below this one.
    directory: PathBuf,
    /// The gRPC server that does nothing. It starts when a limit needs it.
    bare: OnceCell<Bare>,
    measured: Vec<Limit>,
}

impl Machine {
    /// The duration of each limit, and the warm-up of the limits of gRPC, come from the options.
    pub(crate) fn new(directory: &Path, options: &Options) -> Self {
        let options = Options { callers: None, pace: Pace::Closed, pid: None, ..options.clone() };
        Self { options, directory: directory.to_owned(), bare: OnceCell::new(), measured: Vec::new() }
    }

    /// The limit of this kind. It is measured if it was not measured before.
    ///
    /// # Errors
    /// If files cannot be written or processes cannot be started.
    pub(crate) async fn limit(&mut self, kind: &Kind, progress: &(dyn Fn(Progress) + Sync)) -> Result<Limit> {
        if let Some(limit) = self.measured.iter().find(|limit| limit.name == kind.name) {
            return Ok(limit.clone());
        }
        progress(Progress::Limit(kind.name));
        let per_second = (kind.measure)(self).await?;
        let Kind { name, about, unit, .. } = *kind;
        let limit = Limit { name: name.into(), about: about.into(), per_second, unit: unit.into() };
        self.measured.push(limit.clone());
        Ok(limit)
    }

    async fn bare(&self) -> Result<&Bare> {
        self.bare.get_or_try_init(|| Bare::start(self.options.clone())).await
    }

    /// Measures with the duration and the directory on a thread that may block.
    async fn on_a_thread(&self, measure: fn(Duration, &Path) -> Result<f64>) -> Result<f64> {
        let (time, directory) = (self.options.duration, self.directory.clone());
        gorego_client::blocking(move || measure(time, &directory)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    fn options(duration: Duration) -> Options {
        Options {
            callers: Some(1),
            pace: Pace::Open(1.0),
            warm_up: Duration::ZERO,
            duration,
            pid: None,
            limits: None,
        }
    }

    /// A debug build hashes slowly, so the hash of a large blob is left out.
    #[tokio::test]
    async fn each_limit_is_measured_once() {
        let directory = tempfile::tempdir().unwrap();
        let mut machine = Machine::new(directory.path(), &options(Duration::from_millis(500)));
        let said = Mutex::new(Vec::new());
        let kinds: Vec<_> = ALL.iter().filter(|kind| kind.name != HASH.name).collect();
        for kind in kinds.iter().chain([&&&UNARY]) {
            let limit = machine.limit(kind, &|progress| said.lock().unwrap().push(progress)).await.unwrap();
            assert!(limit.per_second > 0.0 && limit.name == kind.name, "{limit:?}");
        }
        let expected: Vec<_> = kinds.iter().map(|kind| Progress::Limit(kind.name)).collect();
        assert_eq!(said.into_inner().unwrap(), expected);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "all files are removed");
    }

    #[tokio::test]
    async fn limits_are_measured_for_the_time_of_the_options() {
        let directory = tempfile::tempdir().unwrap();
        let limits = Limits::measure(directory.path(), &options(Duration::ZERO), &|_| {}).await.unwrap();
        let rates: Vec<_> = limits.limits.iter().map(|limit| limit.per_second).collect();
        assert_eq!(rates, vec![0.0; ALL.len()], "nothing can be done in no time");
    }
}
