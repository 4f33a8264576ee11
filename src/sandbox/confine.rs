//! What a process gives up before it starts a command: capabilities, keys, and the right to unlimited processes.

use super::sys;
use rustix::{
    process::{Resource, Rlimit, getrlimit, setrlimit},
    thread::{CapabilitySet, CapabilitySets},
};
use std::{fs, io};

/// How much sooner than other processes one of an action is killed when the machine runs out of memory; 1000 is the most.
const OOM_SCORE: &str = "800";
/// Highest capability that is tried; the kernel says where they end.
const LAST_CAPABILITY: libc::c_ulong = 63;

/// No program that this process or a child runs gives it capabilities that it does not have.
pub(crate) fn gain_nothing() -> io::Result<()> {
    rustix::thread::set_no_new_privs(true)?;
    for capability in 0..=LAST_CAPABILITY {
        match sys::drop_capability(capability) {
            Ok(()) => {}
            // There are no more, or this process has none and so cannot get any.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EPERM)) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// What root keeps where there are no namespaces: to act as other users and on their files. It cannot trace processes, make
/// devices, or change the network or the mounts.
const OF_ROOT: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::KILL)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID);

/// Gives up all capabilities but those of [`OF_ROOT`], for this process and all programs that it starts.
pub(crate) fn keep_few_capabilities() -> io::Result<()> {
    let _ = rustix::thread::clear_ambient_capability_set();
    let own = rustix::thread::capabilities(None)?;
    for capability in (0..=LAST_CAPABILITY).filter(|number| OF_ROOT.bits() & 1 << number == 0) {
        match sys::drop_capability(capability) {
            Ok(()) => {}
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EPERM)) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(rustix::thread::set_capabilities(
        None,
        CapabilitySets {
            effective: own.effective & OF_ROOT,
            permitted: own.permitted & OF_ROOT,
            inheritable: CapabilitySet::empty(),
        },
    )?)
}

/// Gives up the capabilities that this process has.
pub(crate) fn give_up_capabilities() -> io::Result<()> {
    let _ = rustix::thread::clear_ambient_capability_set();
    let none = CapabilitySet::empty();
    rustix::thread::set_capabilities(
        None,
        CapabilitySets { effective: none, permitted: none, inheritable: none },
    )?;
    // What shares its user can neither trace it nor read its memory.
    Ok(rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)?)
}

/// Keeps crashes from leaving a core file and from starting the host's core handler: at a limit of 1 byte the kernel does
/// neither. Must precede the filter, which makes this limit final.
pub(crate) fn limit_cores() -> io::Result<()> {
    Ok(setrlimit(Resource::Core, Rlimit { current: Some(1), maximum: Some(1) })?)
}

/// Lowers the limit on processes and threads of this user namespace.
pub(crate) fn limit_processes(limit: u64) -> io::Result<()> {
    let maximum = getrlimit(Resource::Nproc).maximum;
    let limit = Some(maximum.map_or(limit, |maximum| maximum.min(limit)));
    Ok(setrlimit(Resource::Nproc, Rlimit { current: limit, maximum: limit })?)
}

/// Makes the kernel kill a process and its later children before the server, if it must kill any. If this process is root of
/// the host, they cannot undo it. A kernel that refuses has a higher value already.
pub(crate) fn offer_to_the_oom_killer(process: i32) {
    let _ = fs::write(format!("/proc/{process}/oom_score_adj"), OOM_SCORE);
}

/// Leaves the keyring of the session, which may hold keys of the server.
pub(crate) fn new_keyring() -> io::Result<()> {
    match sys::join_new_keyring() {
        // A kernel without keys, a container that forbids them, or too many of them: a command gets none either.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM | libc::EDQUOT)) => {
            Ok(())
        }
        joined => joined,
    }
}
