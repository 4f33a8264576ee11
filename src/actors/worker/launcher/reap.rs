//! Finds and kills the descendants of a process.
//!
//! Everything that a command starts descends from its runner: the runner is a child subreaper, so even a daemon whose
//! parents are gone becomes its child. The server is a child subreaper too, in case the runner dies. A process that has
//! received SIGKILL starts no more children. So killing from the top down, and repeating it until nothing is left,
//! cannot miss a process.

use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use std::{
    fs, thread,
    time::{Duration, Instant},
};

/// Sends SIGKILL to every descendant of a process, but not to the process itself. Returns the number of descendants.
pub(super) fn kill_descendants(of: u32) -> usize {
    let mut found = children(of);
    let mut next = 0;
    while let Some(&pid) = found.get(next) {
        kill(pid);
        // The children of the killed process are still listed here, or they have become children of the runner. The
        // caller looks at the runner's children again.
        found.extend(children(pid));
        next += 1;
    }
    found.len()
}

/// The descendants of a process, limited to about `most`. Processes that start or end meanwhile may be missing or
/// included.
pub(super) fn descendants(of: u32, most: usize) -> Vec<u32> {
    let mut found = children(of);
    let mut next = 0;
    while let Some(&pid) = found.get(next)
        && found.len() < most
    {
        found.extend(children(pid));
        next += 1;
    }
    found
}

/// How long to keep killing orphans. Survivors hang in the kernel and are left alone.
const ORPHAN_LIMIT: Duration = Duration::from_secs(5);
/// Pause between two searches for orphans. Their deaths cannot be awaited: to wait for any child would reap the
/// children of other threads.
const ORPHAN_ROUND: Duration = Duration::from_millis(1);

/// Kills and reaps the orphans of runners that have died. This process must be a child subreaper. Its own children are
/// in its session. Processes that a runner starts are in other sessions, and no process can join a session.
pub(super) fn kill_orphans() {
    let Some(own) = session(0) else { return };
    let start = Instant::now();
    loop {
        let mut orphans = children(std::process::id());
        orphans.retain(|&pid| session(pid).is_some_and(|session| session != own));
        if orphans.is_empty() || start.elapsed() > ORPHAN_LIMIT {
            return;
        }
        let mut reaped = false;
        // The youngest come first: a process that forks and exits all the time exists only for a moment.
        for pid in orphans.into_iter().rev() {
            kill(pid);
            // Another worker may have reaped it.
            reaped |= matches!(waitpid(id(pid), WaitOptions::NOHANG), Ok(Some(_)));
        }
        if !reaped {
            thread::sleep(ORPHAN_ROUND);
        }
    }
}

/// The session of a process, where 0 means this process; `None` if the process is gone. If the session leader is
/// outside of this pid namespace, as often for the first process of a container, the session is 0, for which rustix has
/// no value.
fn session(of: u32) -> Option<libc::pid_t> {
    let pid = libc::pid_t::try_from(of).ok()?;
    // SAFETY: takes and returns a number.
    let session = unsafe { libc::getsid(pid) };
    (session >= 0).then_some(session)
}

/// The children of all threads of a process.
fn children(of: u32) -> Vec<u32> {
    let mut children = Vec::new();
    let Ok(threads) = fs::read_dir(format!("/proc/{of}/task")) else { return children };
    for thread in threads.flatten() {
        if let Ok(list) = fs::read_to_string(thread.path().join("children")) {
            children.extend(list.split_ascii_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
        }
    }
    children
}

fn kill(pid: u32) {
    if let Some(pid) = id(pid) {
        // It may be gone already.
        let _ = kill_process(pid, Signal::KILL);
    }
}

fn id(pid: u32) -> Option<Pid> {
    i32::try_from(pid).ok().and_then(Pid::from_raw)
}
