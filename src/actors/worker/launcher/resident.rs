//! Measures the memory of a command's processes through /proc, and counts them, where no control group does.
//!
//! For the memory, it first adds up the private part of each process's resident memory and the
//! [files in memory](FilesInMemory), which is cheap. Pages that processes share after a fork are counted several times.
//! So if the sum exceeds the limit, each page is counted once (PSS), if this process has the permission to read that
//! value.

use super::{exhausted, reap, unmapped::FilesInMemory};
use std::fs;

/// Maximum number of processes that are inspected.
const MAX_INSPECTED: usize = 20_000;

/// Resident memory in bytes that is not backed by a file on a disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Resident {
    private: u64,
    /// Pages of files in memory, as far as they are mapped.
    shared: u64,
}

impl Resident {
    fn with(self, other: Self) -> Self {
        Self {
            private: self.private.saturating_add(other.private),
            shared: self.shared.saturating_add(other.shared),
        }
    }

    /// The sum with the bytes of all files in memory. A mapped page may be among them, so the larger of both counts.
    /// To tell them apart, each mapping would have to be read, and a command may have tens of thousands of them. So
    /// shared memory that belongs to no file can hide as many bytes of files.
    fn with_files(self, files: u64) -> u64 {
        self.private.saturating_add(self.shared.max(files))
    }
}

/// The memory of all descendants of a process in bytes, if it exceeds the limit. `files` are the files in memory as the
/// previous measurement found them.
pub(super) fn measure(of: u32, limit: u64, files: &mut FilesInMemory) -> Option<u64> {
    let (mut all, mut in_cell, mut resident) = (Vec::new(), Vec::new(), Resident::default());
    for (process, status) in statuses(of) {
        resident = resident.with(mapped(&status));
        all.push(process);
        if is_in_cell(&status) {
            in_cell.push(process);
        }
    }
    files.measure(&all, &in_cell, limit);
    if resident.with_files(files.bytes()) <= limit {
        return None;
    }
    files.forget_closed();
    once(&all, files.bytes()).filter(|used| *used > limit)
}

/// The number of processes and threads in the cell below a process, including its first process. 0 if there is no cell.
pub(super) fn processes(of: u32) -> u64 {
    let in_cell = statuses(of).filter(|(_, status)| is_in_cell(status));
    let threads: u64 = in_cell.map(|(_, status)| exhausted::threads(&status).unwrap_or(1)).sum();
    if threads == 0 { 0 } else { threads + 1 }
}

/// The descendants of a process, each with its `/proc/PID/status`.
fn statuses(of: u32) -> impl Iterator<Item = (u32, String)> {
    let status = |process| Some((process, fs::read_to_string(format!("/proc/{process}/status")).ok()?));
    reap::descendants(of, MAX_INSPECTED).into_iter().filter_map(status)
}

/// The memory of these processes in bytes, in which each page counts once, with the bytes of all files in memory.
fn once(processes: &[u32], files: u64) -> Option<u64> {
    let sum = processes.iter().filter_map(|process| proportional(*process)).reduce(Resident::with)?;
    Some(sum.with_files(files))
}

/// The resident memory in `/proc/PID/status`.
fn mapped(status: &str) -> Resident {
    let part = |name| kib(status, name).unwrap_or(0);
    Resident { private: part("RssAnon:"), shared: part("RssShmem:") }
}

/// The process's share (PSS) of the resident memory.
fn proportional(process: u32) -> Option<Resident> {
    let text = fs::read_to_string(format!("/proc/{process}/smaps_rollup"));
    let part = |text: String| {
        Some(Resident { private: kib(&text, "Pss_Anon:")?, shared: kib(&text, "Pss_Shmem:").unwrap_or(0) })
    };
    let status = || fs::read_to_string(format!("/proc/{process}/status")).ok();
    text.ok().and_then(part).or_else(|| status().map(|status| mapped(&status)))
}

/// Whether a process is in another pid namespace than this one, and is not the first process there.
fn is_in_cell(status: &str) -> bool {
    let ids = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
    let mut ids = ids.split_ascii_whitespace();
    ids.next().is_some() && ids.next_back().is_some_and(|inner| inner != "1")
}

/// The number of KiB after `word` at the start of a line, converted to bytes.
fn kib(text: &str, word: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(word))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib.saturating_mul(1024))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::Read as _,
        process::{Command, Stdio},
    };

    #[test]
    fn the_memory_of_descendants_is_measured_and_shared_pages_count_once() {
        // Two shells that share a variable of 32 MiB after a fork.
        let script = "x=$(head -c 33554432 /dev/zero | tr '\\0' x); (printf y; sleep 60; : $x) & printf y; sleep 60; : $x";
        let mut shell = Command::new("sh");
        shell.args(["-c", "sh -c \"$1\"; :", "-", script]).stdout(Stdio::piped());
        let mut shell = shell.spawn().unwrap();
        let mut said = [0; 2];
        shell.stdout.take().unwrap().read_exact(&mut said).unwrap();
        let status = |pid: u32| fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let processes = reap::descendants(shell.id(), MAX_INSPECTED);
        let alone: u64 = processes.into_iter().map(|pid| mapped(&status(pid)).private).sum();
        let measure = |limit| measure(shell.id(), limit, &mut FilesInMemory::default());
        let used = measure(32 << 20).unwrap();
        assert!(alone >= 64 << 20 && used >= 32 << 20 && used <= alone / 4 * 3, "{used} of {alone}");
        assert_eq!(measure(u64::MAX), None, "below the limit");
        assert_eq!(super::processes(shell.id()), 0, "without a cell");
        reap::kill_descendants(shell.id());
        let _ = shell.kill();
        let _ = shell.wait();
    }

    #[test]
    fn processes_of_a_cell_have_a_number_of_their_own() {
        assert!(is_in_cell("Name:\tx\nNSpid:\t4711\t12\n"));
        for outside in ["NSpid:\t4711\n", "NSpid:\t4711\t1\n", "Name:\tx\n"] {
            assert!(!is_in_cell(outside), "{outside}");
        }
    }

    #[test]
    fn files_in_memory_count_once_with_the_pages_that_are_mapped() {
        let own = std::process::id();
        let mapped = once(&[own], 0).unwrap();
        let files = 1 << 40;
        let both = once(&[own], files).unwrap();
        assert!(mapped < files && both >= files && both < files + mapped + (64 << 20), "{mapped} {both}");
        assert_eq!(once(&[], files), None);
        let resident = Resident { private: 5, shared: 60 };
        assert_eq!((resident.with_files(60), resident.with_files(70)), (65, 75));
    }
}
