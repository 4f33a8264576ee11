//! Measures the memory of a command's processes through /proc, for machines where no control group bounds it.
//!
//! First it adds up the private part of each process's resident memory, which is cheap. Pages that processes share
//! after a fork are counted several times. So if the sum exceeds the limit, each page is counted once (PSS), if this
//! process has the permission to read that value. Files in memory (/tmp, /dev/shm) are counted only where they are
//! mapped; they have separate limits.

use super::reap;
use std::fs;

/// Maximum number of processes that are inspected.
const MAX_INSPECTED: usize = 20_000;

/// The memory in bytes of all descendants of a process, if it exceeds `limit`.
pub(super) fn above(of: u32, limit: u64) -> Option<u64> {
    let processes = reap::descendants(of, MAX_INSPECTED);
    let sum = |size: fn(u32) -> Option<u64>| {
        processes.iter().filter_map(|process| size(*process)).fold(0, u64::saturating_add)
    };
    if sum(private) <= limit {
        return None;
    }
    let used = sum(proportional);
    (used > limit).then_some(used)
}

/// Resident memory in bytes that is not backed by a file on a disk.
fn private(process: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    Some(kib(&text, "RssAnon:")?.saturating_add(kib(&text, "RssShmem:").unwrap_or(0)))
}

/// The process's share (PSS) of the resident memory that is not backed by a file on a disk, in bytes.
fn proportional(process: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{process}/smaps_rollup"));
    let part =
        |text: String| Some(kib(&text, "Pss_Anon:")?.saturating_add(kib(&text, "Pss_Shmem:").unwrap_or(0)));
    text.ok().and_then(part).or_else(|| private(process))
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
        let alone: u64 = reap::descendants(shell.id(), MAX_INSPECTED).into_iter().filter_map(private).sum();
        let used = above(shell.id(), 32 << 20).unwrap();
        assert!(alone >= 64 << 20 && used >= 32 << 20 && used <= alone / 4 * 3, "{used} of {alone}");
        assert_eq!(above(shell.id(), alone), None);
        reap::kill_descendants(shell.id());
        let _ = shell.kill();
        let _ = shell.wait();
    }
}
