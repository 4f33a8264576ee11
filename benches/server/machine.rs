//! The limits of the machine, and the resources of a process.

use std::{
    process::Command,
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

/// The median and the 99th percentile of some durations.
pub(crate) fn percentiles(mut samples: Vec<Duration>) -> (Duration, Duration) {
    samples.sort();
    let at = |share: usize| samples.get(samples.len() * share / 100).copied().unwrap_or_default();
    (at(50), at(99))
}

/// The time to spawn `/bin/true` and wait for it, one at a time.
pub(crate) fn spawn_latency(runs: usize) -> Duration {
    let samples = (0..runs).map(|_| {
        let start = Instant::now();
        Command::new("/bin/true").status().expect("/bin/true runs");
        start.elapsed()
    });
    percentiles(samples.collect()).0
}

/// How many `/bin/true` this many threads can spawn and reap per second.
pub(crate) fn spawn_rate(threads: usize, runs: usize) -> f64 {
    let left = AtomicUsize::new(runs);
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_ok() {
                    Command::new("/bin/true").status().expect("/bin/true runs");
                }
            });
        }
    });
    runs as f64 / start.elapsed().as_secs_f64()
}

/// CPU time of a server and its runners, which are its children; not of the commands, which are children of theirs.
pub(crate) fn cpu_time(server: u32) -> Duration {
    std::iter::once(server).chain(children(server)).map(cpu_time_alone).sum()
}

fn children(parent: u32) -> impl Iterator<Item = u32> {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    processes.filter_map(move |process| {
        let stat = std::fs::read_to_string(process.path().join("stat")).ok()?;
        // Behind the name, which may have anything in it: the state and the parent.
        let of: u32 = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()?;
        (of == parent).then(|| process.file_name().to_str()?.parse().ok())?
    })
}

fn cpu_time_alone(pid: u32) -> Duration {
    // Seconds of each thread from schedstat, which has nanosecond resolution, unlike the ticks of /proc/PID/stat.
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let nanos = tasks.filter_map(|task| {
        let text = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<u64>().ok()
    });
    Duration::from_nanos(nanos.sum())
}

/// Resident memory of a process in bytes.
pub(crate) fn resident(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("VmRSS:")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) * 1024
}
