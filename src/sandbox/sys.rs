//! Safe wrappers of the system calls for which our dependencies have no safe function.

use rustix::{process::Pid, thread::UnshareFlags};
use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
    panic::{AssertUnwindSafe, catch_unwind},
    ptr,
};

/// Exit code of a forked process that panicked.
const PANICKED: i32 = 101;

/// Forks into a new user and pid namespace, as the first process there. The child runs `child` and exits with the code
/// that it returns. It has all capabilities in the namespace and no mapped user yet. The calling process must have a
/// single thread, because a lock that another thread holds would never be released in the child.
pub(super) fn fork(child: impl FnOnce() -> i32) -> io::Result<Pid> {
    let flags = libc::CLONE_NEWUSER | libc::CLONE_NEWPID | libc::SIGCHLD;
    // SAFETY: without a stack argument clone works like fork: the child continues here with a copy of the memory.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    match i32::try_from(pid) {
        Ok(0) => {
            let code = catch_unwind(AssertUnwindSafe(child)).unwrap_or(PANICKED);
            // SAFETY: ends the child without running any exit handler of the parent.
            unsafe { libc::_exit(code) }
        }
        Ok(pid) if pid > 0 => Pid::from_raw(pid).ok_or_else(|| io::ErrorKind::InvalidData.into()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Moves this process, which must have a single thread, into new namespaces.
pub(super) fn unshare(namespaces: UnshareFlags) -> io::Result<()> {
    // SAFETY: no flag stops the sharing of descriptors, and there is no other thread that could share them.
    Ok(unsafe { rustix::thread::unshare_unsafe(namespaces) }?)
}

/// mount_setattr(2) for an open mount.
pub(super) fn set_mount_attributes(
    mount: BorrowedFd<'_>,
    attributes: &libc::mount_attr,
    flags: libc::c_int,
) -> io::Result<()> {
    // SAFETY: the path is a live C string and `attributes` is a live struct of the given size; the kernel only reads
    // both.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags | libc::AT_EMPTY_PATH,
            ptr::from_ref(attributes),
            size_of::<libc::mount_attr>(),
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Brings up the loopback interface of this network namespace.
pub(super) fn loopback_up() -> io::Result<()> {
    // SAFETY: socket(2) returns a descriptor that nobody else owns. `ifreq` is a plain C struct for which all zeros is
    // a valid value, and the ioctl only reads it.
    unsafe {
        let socket = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        if socket < 0 {
            return Err(io::Error::last_os_error());
        }
        let socket = OwnedFd::from_raw_fd(socket);
        let mut request: libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
            *to = *from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        if libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw mut request) < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Removes a capability, by number, from the bounding set, so that neither this process nor its children can ever gain
/// it.
pub(super) fn drop_capability(number: libc::c_ulong) -> io::Result<()> {
    // SAFETY: the call takes only numbers.
    let result = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, number, 0, 0, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Joins a new anonymous session keyring.
pub(super) fn join_new_keyring() -> io::Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_int = 1;
    // SAFETY: a null name asks for an anonymous keyring.
    let result =
        unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, ptr::null::<libc::c_char>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Runs `act` with the file system user and group set to these, and keeps all capabilities. The calling process must
/// have a single thread and be root.
pub(super) fn with_files_of<T>(
    (user, group): (u32, u32),
    act: impl FnOnce() -> io::Result<T>,
) -> io::Result<T> {
    /// SECBIT_NO_SETUID_FIXUP from linux/securebits.h, which the libc crate does not define. It keeps the capabilities
    /// when the user changes.
    const NO_SETUID_FIXUP: libc::c_ulong = 1 << 2;
    // SAFETY: these calls take and return only numbers.
    unsafe {
        let before = libc::prctl(libc::PR_GET_SECUREBITS);
        let bits = libc::c_ulong::try_from(before).map_err(|_| io::Error::last_os_error())?;
        if libc::prctl(libc::PR_SET_SECUREBITS, bits | NO_SETUID_FIXUP) < 0 {
            return Err(io::Error::last_os_error());
        }
        let (user, group) = (libc::setfsuid(user), libc::setfsgid(group));
        let done = act();
        // Restoring cannot fail: both ids were in use before.
        libc::setfsuid(user.unsigned_abs());
        libc::setfsgid(group.unsigned_abs());
        libc::prctl(libc::PR_SET_SECUREBITS, bits);
        done
    }
}
