//! The memory of a command's processes as /proc shows it, for machines on which no control group bounds it.
//!
//! First, the private part of each process's resident memory is added up, which is cheap. Processes that share pages after a
//! fork are counted too high that way, so a sum above the limit is looked at again: then each page counts once (PSS), as far as
//! this process may see that. Files in memory (/tmp, /dev/shm) are not seen; they have limits of their own.

use super::reap;
use std::fs;

/// Most processes that are looked at.
const MOST: usize = 20_000;

/// The memory of all descendants of a process, if it is more than this many bytes.
pub(super) fn above(of: u32, limit: u64) -> Option<u64> {
    let processes = reap::descendants(of, MOST);
    let sum = |size: fn(u32) -> Option<u64>| {
        processes.iter().filter_map(|process| size(*process)).fold(0, u64::saturating_add)
    };
    if sum(private) <= limit {
        return None;
    }
    let used = sum(proportional);
    (used > limit).then_some(used)
}

/// Resident pages that are not of a file on a disk, in bytes.
fn private(process: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    Some(kib(&text, "RssAnon:")?.saturating_add(kib(&text, "RssShmem:").unwrap_or(0)))
}

/// The process's part of its resident pages that are not of a file on a disk, in bytes.
fn proportional(process: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{process}/smaps_rollup"));
    let part =
        |text: String| Some(kib(&text, "Pss_Anon:")?.saturating_add(kib(&text, "Pss_Shmem:").unwrap_or(0)));
    text.ok().and_then(part).or_else(|| private(process))
}

/// The number of KiB behind a word at the start of a line, in bytes.
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
    fn the_memory_of_descendants_is_seen_and_pages_that_they_share_count_once() {
        // Two shells that share a variable of 32 MiB after a fork.
        let script = "x=$(head -c 33554432 /dev/zero | tr '\\0' x); (printf y; sleep 60; : $x) & printf y; sleep 60; : $x";
        let mut shell = Command::new("sh");
        shell.args(["-c", "sh -c \"$1\"; :", "-", script]).stdout(Stdio::piped());
        let mut shell = shell.spawn().unwrap();
        let mut said = [0; 2];
        shell.stdout.take().unwrap().read_exact(&mut said).unwrap();
        let alone: u64 = reap::descendants(shell.id(), MOST).into_iter().filter_map(private).sum();
        let used = above(shell.id(), 32 << 20).unwrap();
        assert!(alone >= 64 << 20 && used >= 32 << 20 && used <= alone / 4 * 3, "{used} of {alone}");
        assert_eq!(above(shell.id(), alone), None);
        reap::kill_descendants(shell.id());
        let _ = shell.kill();
        let _ = shell.wait();
    }
}
