//! Finds and kills processes by descent or by where they are.
//!
//! Everything that a command starts descends from its runner: the runner is a child subreaper, so even a daemon whose parents
//! are gone becomes its child. A process that got SIGKILL starts no more children, so killing from the top down and looking
//! again until nothing is left cannot miss one.

use rustix::process::{Pid, Signal, kill_process};
use std::{fs, path::Path};

/// Sends SIGKILL to every descendant of a process, the process itself left alone; gives how many there were.
pub fn kill_descendants(of: u32) -> usize {
    let mut found = children(of);
    let mut next = 0;
    while let Some(&pid) = found.get(next) {
        kill(pid);
        // The dead one's children are either still listed here or have become children of the runner, which looks again.
        found.extend(children(pid));
        next += 1;
    }
    found.len()
}

/// How often processes are looked for by place; each round can only find what was started during the one before.
const INHABITANT_ROUNDS: usize = 10;

/// Kills every process whose working directory is below `path`: what is left of a command whose runner died. A process that
/// went elsewhere is not found.
pub fn kill_inhabitants(path: &Path) {
    for _ in 0..INHABITANT_ROUNDS {
        let Ok(processes) = fs::read_dir("/proc") else { return };
        let mut found = false;
        for process in processes.flatten() {
            let pid = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok());
            let Some(pid) = pid else { continue };
            if fs::read_link(process.path().join("cwd")).is_ok_and(|cwd| cwd.starts_with(path)) {
                kill(pid);
                found = true;
            }
        }
        if !found {
            return;
        }
    }
}

/// Children of all threads of a process.
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
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        // It may be gone already.
        let _ = kill_process(pid, Signal::KILL);
    }
}
