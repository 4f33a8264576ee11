//! [`Children`]: the processes of one command, as seen by the process that starts the first of them and adopts its
//! orphans. That is either a runner or the first process of a cell.

use super::{
    super::{clock::Moment, dir},
    protocol::{Ended, Run},
    spawn::{self, Plan, Stack},
    sys,
    usage::Usage,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{self as rfs, Mode, OFlags},
    io::Errno,
};
use std::{
    ffi::CString,
    fs::File,
    io,
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
    time::{Duration, Instant},
};

/// How long to keep killing before survivors are reported. It is below the worker's time limit.
pub(super) const KILL_LIMIT: Duration = Duration::from_secs(10);
/// Number of children that are reaped before the other events are looked at again. Orphans may die as fast as they are
/// reaped.
const REAPED_AT_ONCE: usize = 1_000;
/// How long to wait for a death before looking for processes again.
const KILL_ROUND: Duration = Duration::from_millis(10);

/// A descriptor that is readable when a child of this process has ended.
pub(super) struct ChildExits(OwnedFd);

/// The processes of one command, as far as they are or were children of this process.
pub(super) struct Children {
    first: libc::pid_t,
    ended: Ended,
    usage: Usage,
    /// Called when the first process has failed, before any other process is killed.
    examine_failure: fn(&mut Ended),
}

pub(super) struct Reaped {
    /// Whether the process that was started has ended.
    pub first_ended: bool,
    /// Whether there are no children at all.
    pub none_left: bool,
    /// Whether more children may have ended already.
    has_more: bool,
}

impl Reaped {
    /// How long to wait for the next death: not at all if more children may have ended.
    pub(super) fn pause(&self) -> Option<Duration> {
        self.has_more.then_some(Duration::ZERO)
    }
}

impl ChildExits {
    /// Starts to watch. From now on every signal that can be blocked is blocked in this process.
    pub(super) fn watch() -> io::Result<Self> {
        sys::watch_children().map(Self)
    }

    /// Waits for a death or one of the other events, for at most `limit`. It does not report which event occurred,
    /// because the caller checks all children anyway.
    pub(super) fn wait<'a>(&'a self, fds: &mut Vec<PollFd<'a>>, limit: Option<Duration>) -> io::Result<()> {
        fds.push(PollFd::from_borrowed_fd(self.0.as_fd(), PollFlags::IN));
        let timeout = limit.and_then(|limit| Timespec::try_from(limit).ok());
        match poll(fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        if fds.last().is_some_and(|child_exits| !child_exits.revents().is_empty()) {
            // One record may stand for many deaths.
            let mut record = [0u8; size_of::<libc::signalfd_siginfo>()];
            let _ = rustix::io::read(&self.0, &mut record);
        }
        Ok(())
    }
}

impl Children {
    /// Starts the first process of a command whose input root is at `root`. If `stdin` is `None`, the process inherits
    /// the standard input of this process.
    ///
    /// # Errors
    /// If the kernel cannot create a process. A program that cannot be executed is not an error.
    pub(super) fn start(
        run: Run,
        root: &Path,
        stdin: Option<BorrowedFd<'_>>,
        (stdout, stderr): (BorrowedFd<'_>, BorrowedFd<'_>),
        stack: &mut Stack,
    ) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = File::from(rfs::open(root, flags, Mode::empty())?);
        let directory =
            dir::open_beneath(&root, Path::new(std::ffi::OsStr::from_bytes(&run.working_directory)))?;
        let plan = Plan {
            has_terminal: run.terminal.is_some(),
            programs: c_strings(run.programs)?,
            arguments: c_strings(run.arguments)?,
            environment: c_strings(run.environment)?,
            working_directory: directory.as_raw_fd(),
            stdin: stdin.map(|stdin| stdin.as_raw_fd()),
            stdout: stdout.as_raw_fd(),
            stderr: stderr.as_raw_fd(),
            max_file_bytes: run.max_file_bytes,
        };
        let mut ended = Ended { started_nanos: Moment::now().0, ..Ended::default() };
        let spawned = spawn::spawn(&plan, stack)?;
        ended.not_started = spawned.not_started;
        Ok(Self { first: spawned.pid, ended, usage: Usage::default(), examine_failure: |_| {} })
    }

    /// Calls `examine` if the first process fails, before any other process is killed.
    pub(super) fn examining_failure(self, examine: fn(&mut Ended)) -> Self {
        Self { examine_failure: examine, ..self }
    }

    /// Reaps children that have ended: all of them, up to the first process, or [`REAPED_AT_ONCE`].
    pub(super) fn reap_ended(&mut self) -> io::Result<Reaped> {
        for _ in 0..REAPED_AT_ONCE {
            let first_ended = self.ended.ended_nanos != 0;
            match sys::ended_child()? {
                sys::EndedChild::None => return Ok(Reaped { first_ended, none_left: true, has_more: false }),
                sys::EndedChild::NotYet => {
                    return Ok(Reaped { first_ended, none_left: false, has_more: false });
                }
                sys::EndedChild::Pid { pid, has_failed } => {
                    if pid == self.first {
                        self.ended.ended_nanos = Moment::now().0;
                        if has_failed {
                            (self.examine_failure)(&mut self.ended);
                        }
                        // As long as it is not reaped, its process group id cannot be reused.
                        sys::kill_group(pid);
                    }
                    let (status, usage) = sys::reap(pid)?;
                    self.usage.add(&usage);
                    if pid == self.first {
                        self.ended.exit_code =
                            if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { 0 };
                        self.ended.signal =
                            if libc::WIFSIGNALED(status) { libc::WTERMSIG(status) } else { 0 };
                        break;
                    }
                }
            }
        }
        Ok(Reaped { first_ended: self.ended.ended_nanos != 0, none_left: false, has_more: true })
    }

    /// Kills processes until no child is left. `kill_others` must send SIGKILL to all remaining processes of the
    /// command.
    pub(super) fn clear(&mut self, child_exits: &ChildExits, kill_others: impl Fn()) -> io::Result<()> {
        let start = Instant::now();
        loop {
            let reaped = self.reap_ended()?;
            if reaped.none_left {
                return Ok(());
            }
            if start.elapsed() > KILL_LIMIT {
                self.ended.survivors = true;
                return Ok(());
            }
            if !reaped.first_ended {
                sys::kill_group(self.first);
            }
            kill_others();
            child_exits.wait(&mut Vec::new(), reaped.pause().or(Some(KILL_ROUND)))?;
        }
    }

    /// How the command ended.
    pub(super) fn report(mut self) -> Ended {
        if self.ended.ended_nanos == 0 {
            self.ended.ended_nanos = Moment::now().0;
        }
        self.ended.usage = Some(self.usage.into_wire());
        self.ended
    }
}

fn c_strings(strings: Vec<Vec<u8>>) -> io::Result<Vec<CString>> {
    strings.into_iter().map(|string| CString::new(string).map_err(io::Error::from)).collect()
}
