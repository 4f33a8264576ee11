//! [`GroupTree`]: the group of all actions of one server in one hierarchy, with the groups of the slots below it.
//!
//! It is locked while its server runs. Trees that are not locked are left over from earlier servers.

use super::files;
use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
    process::{Pid, Signal, kill_process},
};
use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

/// Names of the groups of servers start with this.
const PREFIX: &str = "gorego-";
/// How many names are tried.
const ATTEMPTS: u32 = 16;
/// How long the processes of a group that is removed may take to end.
const REMOVAL: Duration = Duration::from_secs(2);
/// Pause between two attempts to remove a group. Version 1 has no event for the end of the processes.
const REMOVAL_ROUND: Duration = Duration::from_millis(5);

/// A locked group; removed when dropped.
#[derive(Debug)]
pub(super) struct GroupTree {
    directory: PathBuf,
    _lock: File,
}

impl GroupTree {
    /// Makes a group below `own`, which is the group of this process.
    pub(super) fn new(own: &Path) -> io::Result<Self> {
        let process = std::process::id();
        for attempt in 0..ATTEMPTS {
            let directory = own.join(format!("{PREFIX}{process}-{attempt}"));
            match fs::create_dir(&directory) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                made => made?,
            }
            // Another server that starts at the same time may have removed the group as left over.
            if let Ok(lock) = locked(&directory) {
                return Ok(Self { directory, _lock: lock });
            }
        }
        Err(Errno::EXIST.into())
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }
}

impl Drop for GroupTree {
    fn drop(&mut self) {
        remove(&self.directory);
    }
}

/// Removes the groups below `own` that ended servers have left over.
pub(super) fn sweep(own: &Path) {
    for entry in fs::read_dir(own).into_iter().flatten().flatten() {
        let is_ours = entry.file_name().to_str().is_some_and(|name| name.starts_with(PREFIX));
        let directory = entry.path();
        if is_ours && let Ok(_lock) = locked(&directory) {
            remove(&directory);
        }
    }
}

/// Locks a group that is still there.
fn locked(directory: &Path) -> io::Result<File> {
    let file = File::open(directory)?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    match fs::metadata(directory)?.ino() == file.metadata()?.ino() {
        true => Ok(file),
        false => Err(io::ErrorKind::NotFound.into()),
    }
}

/// Kills the processes in a group and in the groups below it, and removes these groups. The next start tries again to
/// remove the groups that are left.
pub(super) fn remove(directory: &Path) {
    let end = Instant::now() + REMOVAL;
    loop {
        kill(directory);
        match try_remove(directory) {
            Err(error) if ends_by_itself(&error) && Instant::now() < end => thread::sleep(REMOVAL_ROUND),
            _ => return,
        }
    }
}

/// Whether a group can be removed when its processes have ended. The groups of another user, which a server without
/// the rights of root finds, can never be removed.
fn ends_by_itself(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::BUSY | Errno::NOTEMPTY))
}

fn kill(directory: &Path) {
    let processes = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
    let processes = processes.lines().filter_map(|line| Pid::from_raw(line.parse().ok()?));
    let own = rustix::process::getpid();
    let (mine, others): (Vec<Pid>, Vec<Pid>) = processes.partition(|process| *process == own);
    // This also kills processes that fork faster than they are found. Only newer kernels have this file, and only in
    // the unified hierarchy.
    if mine.is_empty() && files::write(directory, "cgroup.kill", 1).is_ok() {
        return;
    }
    for process in others {
        let _ = kill_process(process, Signal::KILL);
    }
    for below in groups_below(directory) {
        kill(&below);
    }
}

fn try_remove(directory: &Path) -> io::Result<()> {
    for below in groups_below(directory) {
        try_remove(&below)?;
    }
    match fs::remove_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

fn groups_below(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let is_group = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
    entries.filter(is_group).map(|entry| entry.path()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_groups_that_are_in_use_are_waited_for() {
        let own = tempfile::tempdir().unwrap();
        fs::create_dir(own.path().join("slot-0")).unwrap();
        let in_use = fs::remove_dir(own.path()).unwrap_err();
        assert!(ends_by_itself(&in_use) && ends_by_itself(&Errno::BUSY.into()));
        assert!(!ends_by_itself(&Errno::ACCESS.into()) && !ends_by_itself(&Errno::PERM.into()));
    }

    /// Uses ordinary directories, where locks and names work in the same way.
    #[test]
    fn only_trees_without_a_server_are_left_over() {
        let own = tempfile::tempdir().unwrap();
        let alive = GroupTree::new(own.path()).unwrap();
        let slot = own.path().join("gorego-1-0/slot-0");
        fs::create_dir_all(&slot).unwrap();
        let foreign = own.path().join("user.slice");
        fs::create_dir(&foreign).unwrap();
        sweep(own.path());
        assert!(alive.directory().exists() && foreign.exists());
        assert!(!own.path().join("gorego-1-0").exists());
        let directory = alive.directory().to_owned();
        drop(alive);
        assert!(!directory.exists());
    }
}
