//! New namespaces: how a process gets into them, and which users they know.

use super::{SetupFailure, Step as _, kind::InnerUser, sys};
use rustix::{
    fs::{Mode, OFlags},
    process::{Pid, Signal},
};
use std::{fs, io, os::fd::OwnedFd};

/// How the one user of a namespace maps to the world outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Map {
    /// The numbers inside.
    pub inner: InnerUser,
    /// User outside.
    pub user: u32,
    /// Group outside.
    pub group: u32,
}

/// Starts a process that is the first of a new user and pid namespace, as a fork of this one. It runs `child` and exits with
/// what that gives. This process must have a single thread.
pub(crate) fn start(child: impl FnOnce() -> i32) -> Result<Pid, SetupFailure> {
    sys::fork(child).step("make namespaces (user, process)")
}

/// Gives the user namespace of a child its user. `groups`: the child may change its groups, which only a privileged process
/// can allow.
pub(crate) fn write_maps(process: &str, map: Map, groups: bool) -> Result<(), SetupFailure> {
    let write = |file: &str, text: &str| {
        let path = format!("/proc/{process}/{file}");
        fs::OpenOptions::new().write(true).open(&path).and_then(|file| {
            // One write, as the kernel wants it.
            rustix::io::write(&file, text.as_bytes()).map(drop).map_err(io::Error::from)
        })
    };
    if !groups {
        write("setgroups", "deny").step("forbid changes of groups (setgroups)")?;
    }
    write("uid_map", &format!("{} {} 1\n", map.inner.user, map.user)).step("map the user (uid_map)")?;
    write("gid_map", &format!("{} {} 1\n", map.inner.group, map.group)).step("map the group (gid_map)")
}

/// A user namespace with this map in which nobody is, for mounts that show other ids than those on disk.
pub(crate) fn mapping(map: Map) -> Result<OwnedFd, SetupFailure> {
    let (ours, theirs) = io::pipe().step("make a pipe")?;
    let child = start(move || {
        let mut byte = [0];
        i32::from(rustix::io::read(&ours, &mut byte).is_err())
    })?;
    let made = write_maps(&child.as_raw_pid().to_string(), map, true).and_then(|()| {
        let path = format!("/proc/{}/ns/user", child.as_raw_pid());
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        rustix::fs::open(path, flags, Mode::empty()).step("open the user namespace for mounts")
    });
    let _ = rustix::process::kill_process(child, Signal::KILL);
    let _ = rustix::process::waitpid(Some(child), rustix::process::WaitOptions::empty());
    drop(theirs);
    made
}

/// Becomes the user and group that this namespace maps; capabilities stay. `groups`: other groups are given up.
pub(crate) fn become_inner(inner: InnerUser, groups: bool) -> Result<(), SetupFailure> {
    use rustix::process::{Gid, Uid};
    let (user, group) = (Uid::from_raw(inner.user), Gid::from_raw(inner.group));
    if groups {
        rustix::thread::set_thread_groups(&[]).step("give up the server's groups")?;
    }
    rustix::thread::set_thread_res_gid(group, group, group).step("become the action's group")?;
    rustix::thread::set_thread_res_uid(user, user, user).step("become the action's user")
}
