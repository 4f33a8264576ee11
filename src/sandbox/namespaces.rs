//! New namespaces: how a process gets into them, and which users they know.

use super::{Failure, Step as _, identity};
use rustix::{
    fs::{Mode, OFlags},
    process::Pid,
    thread::UnshareFlags,
};
use std::{
    fs, io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

/// How the one user of a namespace maps to the world outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Map {
    /// Its number, and that of its group, inside.
    pub inner: u32,
    /// User outside.
    pub user: u32,
    /// Group outside.
    pub group: u32,
}

/// A process after [`fork_into`].
pub(crate) enum Forked {
    /// The new process.
    Child,
    /// The process that forked, with the id of the child.
    Parent(Pid),
}

/// Forks into a new user and pid namespace, of which the child is the first process. The child has all capabilities in it
/// and no mapped user yet.
///
/// # Safety
/// This process must have a single thread. The child must not return from the function that calls this.
pub(crate) unsafe fn fork_into() -> io::Result<Forked> {
    let flags = libc::CLONE_NEWUSER | libc::CLONE_NEWPID | libc::SIGCHLD;
    // SAFETY: without a stack clone works like fork, and there is no other thread that could hold a lock.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    match i32::try_from(pid).ok().filter(|pid| *pid >= 0) {
        None => Err(io::Error::last_os_error()),
        Some(pid) => Ok(Pid::from_raw(pid).map_or(Forked::Child, Forked::Parent)),
    }
}

/// Moves this process, which must have a single thread, into new namespaces.
pub(crate) fn unshare(namespaces: UnshareFlags) -> io::Result<()> {
    // SAFETY: descriptors and directories stay shared with nobody, because there is no other thread.
    Ok(unsafe { rustix::thread::unshare_unsafe(namespaces) }?)
}

/// Gives the user namespace of a child its user. `groups`: the child may change its groups, which only a privileged process
/// can allow.
pub(crate) fn write_maps(process: &str, map: Map, groups: bool) -> Result<(), Failure> {
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
    write("uid_map", &format!("{} {} 1\n", map.inner, map.user)).step("map the user (uid_map)")?;
    write("gid_map", &format!("{} {} 1\n", map.inner, map.group)).step("map the group (gid_map)")
}

/// A user namespace with this map in which nobody is, for mounts that show other ids than those on disk.
pub(crate) fn mapping(map: Map) -> Result<OwnedFd, Failure> {
    let (ours, theirs) = io::pipe().step("make a pipe")?;
    // SAFETY: runners have a single thread; the child only reads and exits.
    match unsafe { fork_into() }.step("make a user namespace for mounts")? {
        Forked::Child => {
            drop(theirs);
            let mut byte = [0];
            let _ = rustix::io::read(&ours, &mut byte);
            // SAFETY: ends the child without running anything that belongs to the parent.
            unsafe { libc::_exit(0) }
        }
        Forked::Parent(child) => {
            let made = write_maps(&child.as_raw_pid().to_string(), map, true).and_then(|()| {
                let path = format!("/proc/{}/ns/user", child.as_raw_pid());
                let flags = OFlags::RDONLY | OFlags::CLOEXEC;
                rustix::fs::open(path, flags, Mode::empty()).step("open the user namespace for mounts")
            });
            drop(theirs);
            let _ = rustix::process::waitpid(Some(child), rustix::process::WaitOptions::empty());
            made
        }
    }
}

/// Switches on the loopback interface of this network namespace.
pub(crate) fn loopback_up() -> io::Result<()> {
    // SAFETY: socket(2) gives a descriptor that nobody else owns. `ifreq` is a plain struct of which zero is a value, and the
    // ioctls only read and write it.
    unsafe {
        let socket = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        if socket < 0 {
            return Err(io::Error::last_os_error());
        }
        let socket = OwnedFd::from_raw_fd(socket);
        let mut request: libc::ifreq = std::mem::zeroed();
        request.ifr_name[0] = b'l' as libc::c_char;
        request.ifr_name[1] = b'o' as libc::c_char;
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        if libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw mut request) < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Becomes the user and group that this namespace maps; capabilities stay. `groups`: other groups are given up.
pub(crate) fn become_inner(groups: bool) -> Result<(), Failure> {
    use rustix::process::{Gid, Uid};
    let (user, group) = (Uid::from_raw(identity::INNER), Gid::from_raw(identity::INNER));
    if groups {
        rustix::thread::set_thread_groups(&[]).step("give up the server's groups")?;
    }
    rustix::thread::set_thread_res_gid(group, group, group).step("become the action's group")?;
    rustix::thread::set_thread_res_uid(user, user, user).step("become the action's user")
}

/// Does something as the user and group of a map as far as files are concerned, with all capabilities. The process must have a
/// single thread and be root.
pub(crate) fn with_files_of<T>(map: Map, act: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    /// From linux/securebits.h, which the libc crate does not have: capabilities stay when the user changes.
    const NO_SETUID_FIXUP: libc::c_ulong = 1 << 2;
    // SAFETY: these calls take and give numbers.
    unsafe {
        let before = libc::prctl(libc::PR_GET_SECUREBITS);
        let bits = libc::c_ulong::try_from(before).map_err(|_| io::Error::last_os_error())?;
        if libc::prctl(libc::PR_SET_SECUREBITS, bits | NO_SETUID_FIXUP) < 0 {
            return Err(io::Error::last_os_error());
        }
        let (user, group) = (libc::setfsuid(map.user), libc::setfsgid(map.group));
        let done = act();
        // They were valid before.
        libc::setfsuid(user.unsigned_abs());
        libc::setfsgid(group.unsigned_abs());
        libc::prctl(libc::PR_SET_SECUREBITS, bits);
        done
    }
}
