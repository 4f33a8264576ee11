//! Safe wrappers of the runner's system calls for which our dependencies have no safe function.

use std::{
    io,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
        unix::process::CommandExt as _,
    },
    process::Command,
    ptr,
};

/// Closes every descriptor from `first` on.
///
/// To be called at the start of a process, before it has opened any descriptor that it will use.
///
/// # Errors
/// On kernels before Linux 5.9.
pub(super) fn close_from(first: RawFd) -> io::Result<()> {
    // SAFETY: takes no pointers. The caller ensures, as documented above, that no descriptor in use is closed.
    let closed = unsafe { libc::syscall(libc::SYS_close_range, first.unsigned_abs(), libc::c_uint::MAX, 0) };
    if closed < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Closes every descriptor except these.
///
/// To be called at the start of a process that uses no other inherited descriptor.
///
/// # Errors
/// On kernels before Linux 5.9.
pub(super) fn close_all_but(kept: &[RawFd]) -> io::Result<()> {
    let mut kept: Vec<_> = kept.iter().map(|fd| fd.unsigned_abs()).collect();
    kept.sort_unstable();
    let mut first = 0;
    for (fd, is_last) in kept.into_iter().map(|fd| (fd, false)).chain([(libc::c_uint::MAX, true)]) {
        let last = if is_last { fd } else { fd.wrapping_sub(1) };
        if is_last || fd > first {
            // SAFETY: takes no pointers. The caller ensures, as documented above, that no descriptor in use is closed.
            if unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        first = fd.wrapping_add(1);
    }
    Ok(())
}

/// Makes the kernel kill this process when its parent ends.
///
/// # Errors
/// None in practice.
pub(super) fn die_with_parent() -> io::Result<()> {
    // SAFETY: takes no pointers.
    check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) })
}

/// Makes the kernel kill the process that this command will start when the thread that starts it ends.
pub(super) fn let_die_with_parent(command: &mut Command) {
    // SAFETY: the new process makes one system call and touches no memory of this one.
    unsafe { command.pre_exec(die_with_parent) };
}

/// Kills every other process of this pid namespace. Only for its first process.
pub(super) fn kill_all_others() {
    // SAFETY: takes no pointers. All other processes in the namespace descend from the command.
    unsafe { libc::kill(-1, libc::SIGKILL) };
}

/// Makes descriptor 0 a duplicate of `file`.
///
/// # Errors
/// The errors of dup2(2).
pub(super) fn become_stdin(file: &OwnedFd) -> io::Result<()> {
    // SAFETY: `file` is open, and descriptor 0 has no owner in a process that does not use std's stdin.
    check(unsafe { libc::dup2(file.as_raw_fd(), 0) })
}

/// Makes this process a child subreaper: orphaned descendants become its children.
///
/// # Errors
/// None in practice.
pub(super) fn be_subreaper() -> io::Result<()> {
    // SAFETY: takes no pointers.
    check(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) })
}

/// Resets all signals to their default dispositions, above all SIGPIPE, because ignored signals are inherited.
pub(super) fn default_signals() {
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: SIG_DFL is a valid disposition. Signals that cannot be changed are refused without harm.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// Blocks every signal that can be blocked and returns a descriptor that delivers SIGCHLD.
///
/// # Errors
/// The errors of the system calls.
pub(super) fn watch_children() -> io::Result<OwnedFd> {
    // SAFETY: the sets are initialised before use, and signalfd returns a descriptor that has no other owner.
    unsafe {
        let (mut all, mut deaths) = (std::mem::zeroed(), std::mem::zeroed());
        libc::sigfillset(&mut all);
        libc::sigemptyset(&mut deaths);
        libc::sigaddset(&mut deaths, libc::SIGCHLD);
        check(libc::sigprocmask(libc::SIG_SETMASK, &all, ptr::null_mut()))?;
        let fd = libc::signalfd(-1, &deaths, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        check(fd)?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// The result of looking for a child that has ended but is not reaped yet.
pub(super) enum EndedChild {
    /// There is no child.
    None,
    /// All children are running.
    NotYet,
    /// A child has ended.
    Pid {
        pid: libc::pid_t,
        /// Whether a signal or an exit code other than 0 ended it.
        has_failed: bool,
    },
}

/// Looks for a child that has ended, without reaping it.
///
/// # Errors
/// The errors of the system calls.
pub(super) fn ended_child() -> io::Result<EndedChild> {
    // SAFETY: `info` is a plain C struct that waitid fills in. If no child has ended, its zeroed pid stays 0.
    unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
        if libc::waitid(libc::P_ALL, 0, &mut info, flags) < 0 {
            let error = io::Error::last_os_error();
            return match error.raw_os_error() {
                Some(libc::ECHILD) => Ok(EndedChild::None),
                _ => Err(error),
            };
        }
        Ok(match info.si_pid() {
            0 => EndedChild::NotYet,
            pid => {
                let has_failed = info.si_code != libc::CLD_EXITED || info.si_status() != 0;
                EndedChild::Pid { pid, has_failed }
            }
        })
    }
}

/// Reaps a child that has ended. Returns its wait status and its resource usage.
///
/// # Errors
/// The errors of the system calls.
pub(super) fn reap(pid: libc::pid_t) -> io::Result<(libc::c_int, libc::rusage)> {
    // SAFETY: both are plain C values that wait4 fills in.
    unsafe {
        let (mut status, mut usage) = (0, std::mem::zeroed());
        check(libc::wait4(pid, &mut status, 0, &mut usage))?;
        Ok((status, usage))
    }
}

/// Kills the process group that `leader` created. The group may be empty.
pub(super) fn kill_group(leader: libc::pid_t) {
    // SAFETY: takes no pointers. `leader` is an unreaped child of this process that called setsid, so the group is its
    // own.
    unsafe { libc::kill(-leader, libc::SIGKILL) };
}

/// Ticks per second, the unit in which the kernel reports times of processes.
pub(super) fn ticks_per_second() -> u64 {
    // SAFETY: takes and returns a number.
    let ticks = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    u64::try_from(ticks).ok().filter(|ticks| *ticks > 0).unwrap_or(100)
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
