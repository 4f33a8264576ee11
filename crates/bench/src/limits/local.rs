//! Measures what this machine does without gRPC: hashing, processes and files.

use super::{LARGE_BYTES, MESSAGE_BYTES, SMALL_BYTES};
use crate::{noise::Noise, target::FUNCTION};
use gorego_reapi::error::{Error, Result};
use std::{
    fs::File,
    io::{self, Write as _},
    path::Path,
    process::{Command, Stdio},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

/// Number of CPUs that this process may use.
pub(super) fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// How often per second this many threads can do this work, which gets its number. The measurement ends after this time
/// or this number of repetitions.
fn rate(
    threads: usize,
    time: Duration,
    max: u64,
    work: impl Fn(u64) -> io::Result<()> + Sync,
) -> io::Result<f64> {
    let (next, count, start) = (AtomicU64::new(0), AtomicU64::new(0), Instant::now());
    let repeat = || -> io::Result<()> {
        while start.elapsed() < time {
            let number = next.fetch_add(1, Relaxed);
            if number >= max {
                break;
            }
            work(number)?;
            count.fetch_add(1, Relaxed);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(repeat)).collect();
        // All are joined, also after the first error.
        let ended: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
        ended
            .into_iter()
            .try_for_each(|outcome| outcome.unwrap_or_else(|_| Err(io::Error::other("a thread panicked"))))
    })?;
    Ok(count.into_inner() as f64 / start.elapsed().as_secs_f64())
}

/// Bytes per second that these threads hash, in 10^6, as blobs of this size.
pub(super) fn hash(threads: usize, size: usize, time: Duration) -> Result<f64> {
    let content = Noise::new(1).bytes(size);
    let hash = |_| {
        std::hint::black_box(FUNCTION.digest(&content));
        Ok(())
    };
    let rate = rate(threads, time, u64::MAX, hash).map_err(|error| Error::io("hash", &error))?;
    Ok(rate * size as f64 / 1e6)
}

/// Processes per second that these threads start and wait for.
pub(super) fn spawn(threads: usize, time: Duration) -> Result<f64> {
    let spawn = |_| Command::new("/bin/true").stdin(Stdio::null()).status().map(|_| ());
    rate(threads, time, u64::MAX, spawn).map_err(|error| Error::io("start /bin/true", &error))
}

fn scratch(directory: &Path) -> Result<tempfile::TempDir> {
    tempfile::tempdir_in(directory).map_err(|error| Error::io("make a directory for test files", &error))
}

/// Small files per second that one thread writes.
pub(super) fn create(directory: &Path, time: Duration) -> Result<f64> {
    /// An interrupted measurement leaves at most 400 MB behind.
    const MAX_FILES: u64 = 100_000;
    let (scratch, content) = (scratch(directory)?, Noise::new(1).bytes(SMALL_BYTES));
    let create = |number: u64| std::fs::write(scratch.path().join(number.to_string()), &content);
    rate(1, time, MAX_FILES, create).map_err(|error| Error::io("write a test file", &error))
}

/// Bytes per second that reach the disk, in 10^6.
#[allow(clippy::disallowed_methods, reason = "the disk itself is measured")]
pub(super) fn write(directory: &Path, time: Duration) -> Result<f64> {
    /// This is more than the cache of a disk.
    const MAX_BYTES: usize = 8 * LARGE_BYTES;
    let (scratch, content) = (scratch(directory)?, Noise::new(1).bytes(MESSAGE_BYTES));
    let failed = |error: io::Error| Error::io("write a test file", &error);
    let (mut bytes, start) = (0, Instant::now());
    let mut file = File::create(scratch.path().join("large")).map_err(failed)?;
    while bytes < MAX_BYTES && start.elapsed() < time {
        file.write_all(&content).map_err(failed)?;
        bytes += content.len();
    }
    file.sync_all().map_err(failed)?;
    Ok(bytes as f64 / 1e6 / start.elapsed().as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_measurement_ends_after_its_maximum_of_repetitions() {
        let made = std::sync::Mutex::new(Vec::new());
        let work = |number| {
            made.lock().unwrap().push(number);
            Ok(())
        };
        assert!(rate(1, Duration::from_secs(1), 3, work).unwrap() > 0.0);
        assert_eq!(made.into_inner().unwrap(), [0, 1, 2]);
    }
}
