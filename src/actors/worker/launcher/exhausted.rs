//! Finds the limits of its cell that a failed command has reached. The kernel reports them only to the command, as the
//! error of a system call.
//!
//! The first process of the cell [examines](examine) the cell while its mounts and the rest of its processes exist. A
//! command that succeeds costs nothing.

use super::protocol::Ended;
use crate::{
    limits::{Exceeded, LimitedResource},
    sandbox::full::{FullMount, full_mounts},
};
use std::{ffi::OsString, fs, path::Path};

/// Maximum number of processes that are counted.
const MOST_PROCESSES: usize = 20_000;
/// Processes are used up if at most one part in this many is free: a process that could not start another has often
/// ended before they are counted.
const FEW: u64 = 16;
/// The process that has failed. It alone does not show that a limit was reached.
const ALWAYS: u64 = 1;

/// Notes what is used up in the cell of this process, in which a command has just failed.
pub(super) fn examine(ended: &mut Ended) {
    ended.full_mounts = full_mounts();
    ended.processes = processes();
}

/// The number of processes and threads in the pid namespace of this process.
fn processes() -> u64 {
    let threads =
        |process| threads(&fs::read_to_string(Path::new("/proc").join(process).join("status")).ok()?);
    ids().take(MOST_PROCESSES).filter_map(threads).sum()
}

/// The ids of the processes in the pid namespace of this process.
fn ids() -> impl Iterator<Item = OsString> {
    let names = fs::read_dir("/proc").into_iter().flatten().flatten().map(|entry| entry.file_name());
    names.filter(|name| name.as_encoded_bytes().iter().all(u8::is_ascii_digit))
}

/// The number of threads in `/proc/PID/status`.
pub(super) fn threads(status: &str) -> Option<u64> {
    status.lines().find_map(|line| line.strip_prefix("Threads:"))?.trim().parse().ok()
}

/// Whether so many processes and threads of a command are all or nearly all that are allowed.
pub(super) fn are_used_up(processes: u64, limit: u64) -> bool {
    limit > 0 && processes > ALWAYS && processes.saturating_add(limit / FEW) >= limit
}

/// The limits of its cell that a command has reached.
pub(super) fn reached(ended: &Ended) -> impl Iterator<Item = Exceeded> {
    ended.full_mounts.iter().map(|&FullMount { is_shm, is_files, used, limit }| {
        let resource = match (is_shm, is_files) {
            (false, false) => LimitedResource::Tmp,
            (false, true) => LimitedResource::TmpFiles,
            (true, false) => LimitedResource::Shm,
            (true, true) => LimitedResource::ShmFiles,
        };
        Exceeded { resource, used, limit }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_are_used_up_if_few_more_may_start() {
        for (least, limit) in [(2, 1), (2, 2), (3, 3), (15, 16), (38, 40), (3_840, 4_096)] {
            assert!(are_used_up(least, limit) && are_used_up(limit.max(least), limit), "{least} of {limit}");
            assert!(!are_used_up(least - 1, limit), "fewer than {least} of {limit}");
        }
        assert!(!are_used_up(0, 0), "there is no limit");
    }

    #[test]
    fn the_processes_of_a_namespace_include_threads() {
        // More than the processes of the machine that may end between the two counts.
        let threads_here = 200;
        let end = std::sync::Barrier::new(threads_here + 1);
        let (alone, all) = std::thread::scope(|scope| {
            for _ in 0..threads_here {
                scope.spawn(|| end.wait());
            }
            let counted = (ids().count() as u64, processes());
            end.wait();
            counted
        });
        assert!(all >= alone + 100, "{all} processes and threads, {alone} processes");
        assert_eq!(threads("Name:\tx\nThreads:\t12\n"), Some(12));
    }
}
