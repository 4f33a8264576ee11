//! Making namespaces, and mapping the users in them.

use super::{SetupFailure, Step as _, identity::InnerUser, sys};
use rustix::{
    fs::{Mode, OFlags},
    process::{Pid, Signal},
};
use std::{fs, io, os::fd::OwnedFd};

/// The mapping of the one user and group of a user namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Map {
    /// User and group inside the namespace.
    pub inner: InnerUser,
    /// User outside the namespace.
    pub user: u32,
    /// Group outside the namespace.
    pub group: u32,
}

/// Forks this process into a new user and pid namespace, as the first process there. The child runs `child` and exits
/// with the code that it returns. Processes of the user `owner` outside may enter the namespace; without an owner, only
/// processes of this process's user may. The calling process must have a single thread.
pub(crate) fn start(owner: Option<u32>, child: impl FnOnce() -> i32) -> Result<Pid, SetupFailure> {
    let fork = || sys::fork(sys::NEW_USER_AND_PID, child);
    let started = match owner {
        Some(owner) => sys::with_effective_user(owner, fork),
        None => fork(),
    };
    started.step("make namespaces (user, process)")
}

/// Forks this process. The child runs `child` and exits with the code that it returns. The calling process must have a
/// single thread.
pub(crate) fn start_beside(child: impl FnOnce() -> i32) -> Result<Pid, SetupFailure> {
    sys::fork(0, child).step("start a process")
}

/// Writes the user and group maps of a child's user namespace. `groups` allows the child to change its supplementary
/// groups, for which the caller must be privileged.
pub(crate) fn write_maps(process: &str, map: Map, groups: bool) -> Result<(), SetupFailure> {
    let write = |file: &str, text: &str| {
        let path = format!("/proc/{process}/{file}");
        fs::OpenOptions::new().write(true).open(&path).and_then(|file| {
            // The kernel requires a single write.
            rustix::io::write(&file, text.as_bytes()).map(drop).map_err(io::Error::from)
        })
    };
    if !groups {
        write("setgroups", "deny").step("forbid changes of groups (setgroups)")?;
    }
    write("uid_map", &format!("{} {} 1\n", map.inner.user, map.user)).step("map the user (uid_map)")?;
    write("gid_map", &format!("{} {} 1\n", map.inner.group, map.group)).step("map the group (gid_map)")
}

/// Makes a user namespace with this map and no process in it, for idmapped mounts.
pub(crate) fn mapping(map: Map) -> Result<OwnedFd, SetupFailure> {
    let (ours, theirs) = io::pipe().step("make a pipe")?;
    let child = start(None, move || {
        let mut byte = [0];
        i32::from(rustix::io::read(&ours, &mut byte).is_err())
    })?;
    let made = write_maps(&child.as_raw_pid().to_string(), map, true).and_then(|()| {
        let path = format!("/proc/{}/ns/user", child.as_raw_pid());
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        rustix::fs::open(path, flags, Mode::empty()).step("open the user namespace for mounts")
    });
    end(child);
    drop(theirs);
    made
}

/// Kills and reaps a child that [`start`] has started.
pub(crate) fn end(child: Pid) {
    let _ = rustix::process::kill_process(child, Signal::KILL);
    let _ = rustix::process::waitpid(Some(child), rustix::process::WaitOptions::empty());
}

/// Switches to the user and group that this namespace maps; capabilities are kept. `groups` also drops the
/// supplementary groups.
pub(crate) fn become_inner(inner: InnerUser, groups: bool) -> Result<(), SetupFailure> {
    use rustix::process::{Gid, Uid};
    let (user, group) = (Uid::from_raw(inner.user), Gid::from_raw(inner.group));
    if groups {
        rustix::thread::set_thread_groups(&[]).step("give up the server's groups")?;
    }
    rustix::thread::set_thread_res_gid(group, group, group).step("become the action's group")?;
    rustix::thread::set_thread_res_uid(user, user, user).step("become the action's user")
}
