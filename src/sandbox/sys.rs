//! Safe wrappers of the system calls for which our dependencies have no safe function.

use rustix::{process::Pid, thread::UnshareFlags};
use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
    panic::{AssertUnwindSafe, catch_unwind},
    ptr,
};

/// Exit code of a forked process that panicked.
const PANICKED: i32 = 101;

/// Flags of [`fork`] for a child that is the first process of a new user and pid namespace. It has all capabilities in
/// the namespace and no mapped user yet.
pub(super) const NEW_USER_AND_PID: libc::c_int = libc::CLONE_NEWUSER | libc::CLONE_NEWPID;

/// Forks with these flags of clone(2). The child runs `child` and exits with the code that it returns. The calling
/// process must have a single thread, because a lock that another thread holds would never be released in the child.
pub(super) fn fork(flags: libc::c_int, child: impl FnOnce() -> i32) -> io::Result<Pid> {
    let flags = flags | libc::SIGCHLD;
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
    // SAFETY: socket(2) returns a descriptor that has no other owner. `ifreq` is a plain C struct for which all zeros
    // is a valid value, and the ioctl only reads it.
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

/// Size of a page of memory in bytes.
pub(super) fn page_size() -> u64 {
    // SAFETY: takes and returns a number.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(size).ok().filter(|size| *size > 0).unwrap_or(4096)
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

/// SECBIT_NO_SETUID_FIXUP from linux/securebits.h, which the libc crate does not define. It keeps the capabilities when
/// the user changes.
const NO_SETUID_FIXUP: libc::c_ulong = 1 << 2;

/// Runs `act` with the file system user and group set to these, and keeps all capabilities. The calling process must
/// have a single thread and be root.
pub(super) fn with_file_system_user<T>(
    (user, group): (u32, u32),
    act: impl FnOnce() -> io::Result<T>,
) -> io::Result<T> {
    keeping_capabilities(|| {
        // SAFETY: these calls take and return only numbers.
        let before = unsafe { (libc::setfsuid(user), libc::setfsgid(group)) };
        let done = act();
        // SAFETY: as above. Restoring cannot fail: both ids were in use before.
        unsafe {
            libc::setfsuid(before.0.unsigned_abs());
            libc::setfsgid(before.1.unsigned_abs());
        }
        done
    })
}

/// Runs `act` with this effective user, and keeps all capabilities. The calling process must have a single thread and
/// be root.
pub(super) fn with_effective_user<T>(user: u32, act: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    keeping_capabilities(|| {
        set_effective_user(user)?;
        let done = act();
        // SAFETY: takes and returns a number.
        set_effective_user(unsafe { libc::getuid() })?;
        done
    })
}

/// Changes the effective user and keeps this process dumpable. Otherwise only root could open the files in /proc of its
/// children.
fn set_effective_user(user: u32) -> io::Result<()> {
    // SAFETY: takes only numbers. This makes the system call directly, because libc's function would change the user of
    // all threads.
    if unsafe { libc::syscall(libc::SYS_setresuid, -1, user, -1) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::Dumpable)?)
}

/// Runs `act`. If `act` changes the user, the capabilities are kept.
fn keeping_capabilities<T>(act: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    // SAFETY: these calls take and return only numbers.
    let before = unsafe { libc::prctl(libc::PR_GET_SECUREBITS) };
    let bits = libc::c_ulong::try_from(before).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: as above.
    if unsafe { libc::prctl(libc::PR_SET_SECUREBITS, bits | NO_SETUID_FIXUP) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let done = act();
    // SAFETY: as above.
    unsafe { libc::prctl(libc::PR_SET_SECUREBITS, bits) };
    done
}

/// The addresses of all network interfaces in the network namespace of this process.
pub(super) fn interface_addresses() -> io::Result<Vec<IpAddr>> {
    let mut first = ptr::null_mut();
    // SAFETY: on success it stores a list that stays valid until `freeifaddrs`.
    if unsafe { libc::getifaddrs(&mut first) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut addresses = Vec::new();
    let mut next = first;
    while !next.is_null() {
        // SAFETY: `next` is an entry of that list. Its address is null or a socket address of the length that belongs
        // to its family. It need not be aligned for that type.
        unsafe {
            let address = (*next).ifa_addr;
            if !address.is_null() {
                match libc::c_int::from((*address).sa_family) {
                    libc::AF_INET => {
                        let address = address.cast::<libc::sockaddr_in>().read_unaligned();
                        addresses.push(Ipv4Addr::from_bits(u32::from_be(address.sin_addr.s_addr)).into());
                    }
                    libc::AF_INET6 => {
                        let address = address.cast::<libc::sockaddr_in6>().read_unaligned();
                        addresses.push(IpAddr::from(Ipv6Addr::from(address.sin6_addr.s6_addr)));
                    }
                    _ => {}
                }
            }
            next = (*next).ifa_next;
        }
    }
    // SAFETY: the list is freed once, and nothing refers to it any more.
    unsafe { libc::freeifaddrs(first) };
    Ok(addresses)
}

/// Filters the frames that the kernel hands to the process that has this tap interface open.
pub(super) fn filter_frames(tap: BorrowedFd<'_>, program: &mut [libc::sock_filter]) -> io::Result<()> {
    /// The number of TUNATTACHFILTER in linux/if_tun.h.
    const ATTACH_FILTER: u32 = 0x4010_54d5;
    let length = u16::try_from(program.len()).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?;
    let program = libc::sock_fprog { len: length, filter: program.as_mut_ptr() };
    // SAFETY: `program` is a live struct that refers to `len` instructions; the kernel only reads both.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), ATTACH_FILTER as _, ptr::from_ref(&program)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
