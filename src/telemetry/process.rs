//! Reads the metrics of this process from the system.

use super::readings::ProcessReading;
use rustix::{
    process::{Resource, getrlimit},
    time::{ClockId, clock_gettime},
};
use std::{fs, time::Duration};

/// Reads the metrics of this process. A value that cannot be read is 0.
pub(crate) fn read() -> ProcessReading {
    let cpu = clock_gettime(ClockId::ProcessCPUTime);
    ProcessReading {
        resident_bytes: resident_bytes().unwrap_or(0),
        cpu: Duration::try_from(cpu).unwrap_or_default(),
        open_descriptors: open_descriptors().unwrap_or(0),
        max_descriptors: getrlimit(Resource::Nofile).current,
    }
}

fn resident_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib.saturating_mul(1024))
}

/// Since version 6.2, Linux reports the number. On older kernels the descriptors are counted.
fn open_descriptors() -> Option<u64> {
    const DESCRIPTORS: &str = "/proc/self/fd";
    match fs::metadata(DESCRIPTORS).ok()?.len() {
        0 => Some(fs::read_dir(DESCRIPTORS).ok()?.count() as u64),
        count => Some(count),
    }
}
