//! Restrictions that a process puts on itself before it starts a command: it drops capabilities and keys, and limits
//! its processes and core dumps.

use super::sys;
use rustix::{
    process::{Resource, Rlimit, getrlimit, setrlimit},
    thread::{CapabilitySet, CapabilitySets},
};
use std::{fs, io};

/// Added to the OOM score of an action's processes, so that the kernel kills them before others; the maximum is 1000.
const OOM_SCORE: &str = "800";
/// Maximum number of System V message queues of an action. Each takes at most 16 KiB of memory.
const MESSAGE_QUEUES: &str = "1000";
/// Highest capability number that is tried. The kernel returns EINVAL above its last one.
const LAST_CAPABILITY: libc::c_ulong = 63;

/// The number of processes of a cell's user namespace that do not belong to the command: the first process of the cell.
const CELL_PROCESSES: u64 = 1;

/// Ensures that neither this process nor its children can gain a capability, whatever program they run.
pub(crate) fn forbid_new_privileges() -> io::Result<()> {
    rustix::thread::set_no_new_privs(true)?;
    for capability in 0..=LAST_CAPABILITY {
        match sys::drop_capability(capability) {
            Ok(()) => {}
            // There are no more capabilities, or this process has none and therefore cannot gain any.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EPERM)) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The capabilities that root keeps when there are no namespaces: those for acting as other users and on their files.
/// Without the other capabilities it cannot trace processes, create devices, or change the network or the mounts.
const ROOT_CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::KILL)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID);

/// Drops all capabilities except [`ROOT_CAPABILITIES`], for this process and all programs that it starts.
pub(crate) fn restrict_root_capabilities() -> io::Result<()> {
    let _ = rustix::thread::clear_ambient_capability_set();
    let own = rustix::thread::capabilities(None)?;
    for capability in (0..=LAST_CAPABILITY).filter(|number| ROOT_CAPABILITIES.bits() & 1 << number == 0) {
        match sys::drop_capability(capability) {
            Ok(()) => {}
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EPERM)) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(rustix::thread::set_capabilities(
        None,
        CapabilitySets {
            effective: own.effective & ROOT_CAPABILITIES,
            permitted: own.permitted & ROOT_CAPABILITIES,
            inheritable: CapabilitySet::empty(),
        },
    )?)
}

/// Drops all capabilities of this process.
pub(crate) fn drop_capabilities() -> io::Result<()> {
    let _ = rustix::thread::clear_ambient_capability_set();
    let none = CapabilitySet::empty();
    rustix::thread::set_capabilities(
        None,
        CapabilitySets { effective: none, permitted: none, inheritable: none },
    )?;
    // A process that is not dumpable cannot be traced, nor its memory read, by other processes of its user.
    Ok(rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)?)
}

/// Keeps crashes from writing a core file and from starting the host's core handler: at a limit of 1 byte the kernel
/// does neither. Must be called before the filter is installed, which makes this limit final.
pub(crate) fn limit_cores() -> io::Result<()> {
    Ok(setrlimit(Resource::Core, Rlimit { current: Some(1), maximum: Some(1) })?)
}

/// Lowers the limit on processes and threads of this user namespace, so that a command can have `limit` of them.
pub(crate) fn limit_processes(limit: u64) -> io::Result<()> {
    let (limit, maximum) = (limit.saturating_add(CELL_PROCESSES), getrlimit(Resource::Nproc).maximum);
    let limit = Some(maximum.map_or(limit, |maximum| maximum.min(limit)));
    Ok(setrlimit(Resource::Nproc, Rlimit { current: limit, maximum: limit })?)
}

/// Limits the System V shared memory and message queues of this IPC namespace. Only the machine's root may do that, so
/// errors are ignored: an ordinary user's actions keep the kernel's limits.
pub(crate) fn limit_ipc(shared_bytes: u64) {
    let pages = (shared_bytes / sys::page_size()).max(1);
    let _ = fs::write("/proc/sys/kernel/shmall", pages.to_string());
    let _ = fs::write("/proc/sys/kernel/msgmni", MESSAGE_QUEUES);
}

/// Makes the kernel kill a process and its later children before the server when memory runs out. If this process is
/// root of the host, they cannot undo it. Errors are ignored: the kernel refuses only if the score is higher already.
pub(crate) fn raise_oom_score(process: i32) {
    let _ = fs::write(format!("/proc/{process}/oom_score_adj"), OOM_SCORE);
}

/// Leaves the session keyring, which may hold keys of the server.
pub(crate) fn new_keyring() -> io::Result<()> {
    match sys::join_new_keyring() {
        // The kernel has no keyrings, a container forbids them, or there are too many. The command gets no keys in
        // these cases either.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM | libc::EDQUOT)) => {
            Ok(())
        }
        joined => joined,
    }
}
