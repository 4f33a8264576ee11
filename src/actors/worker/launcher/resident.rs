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

/// Resident pages that are not of a file, in bytes.
fn private(process: u32) -> Option<u64> {
    kib(&fs::read_to_string(format!("/proc/{process}/status")).ok()?, "RssAnon:")
}

/// The process's part of its resident pages that are not of a file, in bytes.
fn proportional(process: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{process}/smaps_rollup"));
    text.ok().and_then(|text| kib(&text, "Pss_Anon:")).or_else(|| private(process))
}

/// The number of KiB behind a word at the start of a line, in bytes.
fn kib(text: &str, word: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(word))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib.saturating_mul(1024))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn the_memory_of_descendants_is_seen_and_pages_that_they_share_count_once() {
        // Two processes that share 64 MiB after a fork.
        let script = "x = bytearray(64 << 20)\nimport os, sys, time\nos.fork()\nsys.stdout.write('y')\nsys.stdout.flush()\ntime.sleep(60)\n";
        let mut python = Command::new("sh");
        python.args(["-c", &format!("exec 2>&1; python3 -c \"{}\"; :", script.replace('\n', "\n"))]);
        let Ok(mut shell) = python.stdout(Stdio::piped()).spawn() else { return };
        let mut said = [0; 2];
        use std::io::Read as _;
        shell.stdout.take().unwrap().read_exact(&mut said).unwrap();
        assert_eq!(said, *b"yy");
        let used = above(shell.id(), 32 << 20).unwrap();
        assert!((64 << 20..100 << 20).contains(&used), "{used}");
        assert_eq!(above(shell.id(), 100 << 20), None);
        reap::kill_descendants(shell.id());
        let _ = shell.kill();
        let _ = shell.wait();
    }
}
