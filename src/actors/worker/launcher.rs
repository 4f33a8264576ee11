//! [`Launcher`] turns a command into processes. [`RunnerLauncher`] does so with a runner process.
//!
//! The server never forks: with its heap, a fork would take tens of milliseconds. Each worker keeps one small process
//! of the same binary ([`runner`]) and sends it the command over a socket. The runner forks, which is cheap there, and
//! answers when the command and all its descendants are gone. Time limits and cancellation are handled on this side.
//!
//! A runner that dies or does not answer is replaced. Its surviving processes become children of this process and are
//! killed. The server cannot tell whether the command killed its runner. So it reports the run as a fault of its own
//! that may be retried, and the scheduler bounds the number of attempts.

mod capture;
mod cell;
mod children;
mod exhausted;
mod gateway;
mod guard;
mod init;
mod open_files;
mod pool_sandbox;
pub(crate) mod probe;
pub mod protocol;
mod reap;
mod resident;
pub mod runner;
mod spawn;
mod sys;
pub(super) mod tool;
mod unmapped;
mod usage;

use super::{cancel::CancelToken, clock::Moment, command::Launch, written::Written};
use crate::{
    cgroups::{Groups, SlotGroup},
    limits::{Exceeded, Limits},
    log_streams::run::LogKind,
    logging::Event,
    sandbox::{identity::User, settings::Sandbox},
};
use gorego_reapi::{
    error::{Error, Result},
    proto::gorego,
};
use guard::{Guard, Violation};
use protocol::{Ended, Failed, IncompleteLog, Order, Reply, Run, ToRunner};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::{Pid, PidfdFlags, pidfd_open},
};
use std::{
    ffi::OsString,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{ffi::OsStrExt as _, net::UnixStream, process::CommandExt as _},
    },
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

pub use pool_sandbox::PoolSandbox;

/// How long a runner may take to kill everything and answer after a `Kill`. If it takes longer, a process hangs in the
/// kernel.
const KILL_GRACE: Duration = Duration::from_secs(15);
/// How long a runner may take to exit after its socket is closed. It kills what it started first.
const END_GRACE: Duration = Duration::from_secs(5);
/// Time limit for sending or receiving one message.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a cancel token without a descriptor is polled.
const CANCEL_POLL: Duration = Duration::from_millis(100);

const RUNNER_REPLACED: &str = "runner_replaced";
const SLOT_WITHOUT_GROUP: &str = "slot_without_group";

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// It exited with this code.
    Exited(i32),
    /// It was killed by this signal, which the server did not send.
    Signalled(i32),
    /// It could not be started. This is the errno of the last attempt.
    NotStarted(i32),
    /// It was killed because its time limit was reached.
    TimedOut,
    /// It was killed because it was cancelled.
    Cancelled,
    /// It was killed because it printed more to this output than the log may hold.
    LogTooLong(LogKind),
    /// It was killed because its log of this output could not be written. This is the errno.
    LogLost(LogKind, i32),
    /// It was killed because it exceeded a limit.
    Exceeded(Exceeded),
    /// Some of its processes were killed because there was too little memory for all actions together.
    MemoryShort {
        /// The most memory in bytes that the action used.
        used: u64,
        /// The memory in bytes for all actions together.
        total: u64,
    },
}

/// The result of a command that ran. All its processes are gone.
#[derive(Debug, Clone, PartialEq)]
pub struct Ran {
    /// How its first process ended.
    pub ending: Ending,
    /// Resource usage of all its processes together.
    pub usage: gorego::ResourceUsage,
    /// When its first process started.
    pub started: Moment,
    /// When its first process ended or was killed.
    pub ended: Moment,
    /// If it failed: the limits that it had reached, and that did not end it.
    pub reached: Vec<Exceeded>,
}

/// Starts the processes of a [`Launch`].
pub trait Launcher: Send {
    /// Prepares for the first command, so that it is not slower than later ones. Failures are reported by the next run.
    fn warm_up(&mut self);

    /// Runs a command until it ends, and kills it when `timeout` has passed. Blocks.
    ///
    /// # Errors
    /// If it is unknown how the command ended. Its files must not be used then.
    fn run(&mut self, launch: &Launch, timeout: Duration, cancel: &CancelToken) -> Result<Ran>;

    /// Kills all processes that may still run. For a caller that no longer knows the state of the launcher.
    fn reset(&mut self);
}

/// The [`Launcher`] that runs commands through a runner process.
#[derive(Debug)]
pub struct RunnerLauncher {
    command: Vec<OsString>,
    sandbox: Option<Sandbox>,
    runner: Option<RunnerProcess>,
    /// Reserves the host user of the sandbox for this launcher.
    _user: Option<User>,
    /// The control group in which everything runs, if there is one.
    group: Option<SlotGroup>,
    /// Memory in bytes for all actions together; 0 if it is not limited.
    total_memory: u64,
}

#[derive(Debug)]
struct RunnerProcess {
    child: Child,
    socket: Option<UnixStream>,
}

impl RunnerLauncher {
    /// A launcher whose runner is started with `command`: a program and its arguments. Commands run in the sandbox if
    /// there is one.
    pub fn new(command: Vec<OsString>, sandbox: Option<&PoolSandbox>) -> Self {
        let user = sandbox.filter(|pool| pool.protections.identity).map(|pool| pool.users.take());
        let number = user.as_ref().map_or(0, User::number);
        let sandbox = sandbox.map(|pool| Sandbox {
            pasta: pool.pasta.clone(),
            ..Sandbox::new(&pool.settings, pool.protections, &pool.build_root, number)
        });
        Self { command, sandbox, runner: None, _user: user, group: None, total_memory: 0 }
    }

    /// Gives this launcher its own control group.
    pub(crate) fn grouped(self, groups: &Groups) -> Self {
        let has_gateways = self.sandbox.as_ref().is_some_and(|sandbox| sandbox.pasta.is_some());
        let group = groups.slot(has_gateways).inspect_err(|error| {
            Event::warn("gorego::worker", SLOT_WITHOUT_GROUP).with_shown("error", error).log(format_args!(
                "a slot has no control group; the limits of its actions are enforced as well as possible without"
            ));
        });
        Self { group: group.ok(), total_memory: groups.total_memory(), ..self }
    }

    /// Starts to watch a command of this runner.
    fn guard<'a>(&'a self, limits: &'a Limits, runner: u32, written: Option<&'a Written>) -> Guard<'a> {
        let guard = Guard::new(limits, self.group.as_ref(), self.total_memory, runner, written);
        let on = self.sandbox.as_ref().map(|sandbox| sandbox.protections);
        if on.is_some_and(|on| on.limit_processes()) { guard } else { guard.ending_too_many() }
    }

    fn order(&self, launch: &Launch) -> Run {
        let is_counted = self.group.as_ref().is_some_and(SlotGroup::counts_processes);
        Run::of(launch, is_counted)
    }

    /// [`Launcher::run`] without error handling.
    fn try_run(&mut self, launch: &Launch, timeout: Duration, cancel: &CancelToken) -> Result<Ran> {
        if let Some(group) = &mut self.group {
            let failed = |error| Error::io("set the limits of an action", &error);
            group.begin(&launch.limits).map_err(failed)?;
        }
        let mut runner = match self.runner.take().and_then(RunnerProcess::if_alive) {
            Some(runner) => runner,
            None => RunnerProcess::start(&self.command, self.sandbox.as_ref(), self.group.as_ref())?,
        };
        let written = match launch.limits {
            Limits { disk: 0, files: 0, .. } => None,
            _ => Some(
                Written::begin(launch.written()).map_err(|error| Error::io("measure the disk", &error))?,
            ),
        };
        let process = runner.child.id();
        let guard = self.guard(&launch.limits, process, written.as_ref());
        let outcome = runner.run(self.order(launch), timeout, cancel, guard);
        self.runner = Some(runner);
        outcome
    }
}

impl Launcher for RunnerLauncher {
    fn warm_up(&mut self) {
        if self.runner.is_none() {
            self.runner =
                RunnerProcess::start(&self.command, self.sandbox.as_ref(), self.group.as_ref()).ok();
        }
    }

    fn run(&mut self, launch: &Launch, timeout: Duration, cancel: &CancelToken) -> Result<Ran> {
        let outcome = self.try_run(launch, timeout, cancel);
        if let Err(error) = &outcome {
            Event::warn("gorego::worker", RUNNER_REPLACED)
                .with_shown("error", error)
                .log(format_args!("a runner process did not do its work and is replaced"));
            self.reset();
        }
        outcome
    }

    fn reset(&mut self) {
        self.runner = None;
        reap::kill_orphans();
    }
}

impl RunnerProcess {
    /// This runner, unless it has died since the last action.
    fn if_alive(mut self) -> Option<Self> {
        if matches!(self.child.try_wait(), Ok(None)) {
            return Some(self);
        }
        drop(self);
        // The runner may have left a process, such as a cell that was ready.
        reap::kill_orphans();
        None
    }

    fn start(command: &[OsString], sandbox: Option<&Sandbox>, group: Option<&SlotGroup>) -> Result<Self> {
        let failed = |error: std::io::Error| Error::io("start a runner process", &error);
        // Orphans of the runner become children of this process instead of init.
        sys::be_subreaper().map_err(failed)?;
        let (program, arguments) =
            command.split_first().ok_or_else(|| Error::internal("no runner command is set"))?;
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        ours.set_read_timeout(Some(MESSAGE_TIMEOUT)).map_err(failed)?;
        ours.set_write_timeout(Some(MESSAGE_TIMEOUT)).map_err(failed)?;
        // Only options with which std uses posix_spawn are set: any other option would make std fork this server. A
        // Ctrl-C on the server's terminal does not reach running commands, because the runner has its own process
        // group.
        let child = Command::new(program)
            .arg0("gorego")
            .args(arguments)
            .env_clear()
            .process_group(0)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(failed)?;
        let runner = Self { child, socket: Some(ours) };
        // The runner has started nothing yet, so everything that it starts will be in its group.
        if let Some(group) = group {
            let failed = |error| Error::io("put a runner process into its control group", &error);
            group.admit(runner.child.id()).map_err(failed)?;
        }
        if let (Some(sandbox), Some(socket)) = (sandbox, &runner.socket) {
            let order = ToRunner { order: Some(Order::UseSandbox(sandbox.clone())) };
            protocol::write(socket, &order).map_err(failed)?;
        }
        Ok(runner)
    }

    fn run(
        &mut self,
        run: Run,
        timeout: Duration,
        cancel: &CancelToken,
        mut guard: Guard<'_>,
    ) -> Result<Ran> {
        let order = ToRunner { order: Some(Order::Run(run)) };
        let Some(socket) = &self.socket else { return Err(Error::internal("the runner was given up")) };
        let started = Moment::now();
        protocol::write(socket, &order).map_err(|error| match error.kind() {
            std::io::ErrorKind::InvalidInput => Error::invalid(error),
            _ => lost(&error),
        })?;
        let mut stopped = match wait(socket, Instant::now().checked_add(timeout), cancel, Some(&mut guard))? {
            WaitOutcome::Ready => None,
            WaitOutcome::TimeUp => Some(Ending::TimedOut),
            WaitOutcome::Cancelled => Some(Ending::Cancelled),
            WaitOutcome::Violated(violation) => Some(violation.into()),
        };
        if stopped.is_some() {
            let kill = ToRunner { order: Some(Order::Kill(protocol::Kill {})) };
            protocol::write(socket, &kill).map_err(|error| lost(&error))?;
            let never = CancelToken::new();
            let end = Instant::now().checked_add(KILL_GRACE);
            if !matches!(wait(socket, end, &never, None)?, WaitOutcome::Ready) {
                return Err(Error::internal("a command could not be killed"));
            }
        }
        let reply = protocol::read::<protocol::FromRunner>(socket)
            .and_then(|reply| reply.ok_or_else(|| std::io::ErrorKind::UnexpectedEof.into()));
        stopped = stopped.or_else(|| guard.end().map(Ending::from));
        match (reply.map(|reply| reply.reply), stopped) {
            (Ok(Some(Reply::Ended(ended))), stopped) => {
                let mut reached = Vec::new();
                if ended.exit_code != 0 || ended.signal != 0 {
                    reached.extend(guard.used_up_processes(ended.processes));
                    reached.extend(exhausted::reached(&ended));
                }
                Ok(Ran { reached, ..ran(ended, stopped)? })
            }
            // The kernel may have killed the first process of the cell too.
            (
                Ok(Some(Reply::Failed(_))),
                Some(stopped @ (Ending::Exceeded(_) | Ending::MemoryShort { .. })),
            ) => {
                let (started_nanos, ended_nanos) = (started.0, Moment::now().0);
                ran(Ended { started_nanos, ended_nanos, ..Ended::default() }, Some(stopped))
            }
            // The kernel may have killed the runner instead. A retry would end in the same way.
            (Err(_), Some(Ending::Exceeded(exceeded))) => {
                Err(Error::Precondition(format!("the command was ended because {exceeded}")))
            }
            (Ok(Some(Reply::Failed(Failed { message, errno }))), _) if is_full(errno) => {
                Err(Error::DiskFull(message))
            }
            (Ok(Some(Reply::Failed(Failed { message, .. }))), _) => Err(Error::Internal(message)),
            (Ok(None), _) => Err(Error::internal("a runner process gave an empty answer")),
            (Err(error), _) => Err(lost(&error)),
        }
    }
}

impl From<Violation> for Ending {
    fn from(violation: Violation) -> Self {
        match violation {
            Violation::Exceeded(exceeded) => Self::Exceeded(exceeded),
            Violation::MemoryShort { used, total } => Self::MemoryShort { used, total },
        }
    }
}

fn ran(ended: Ended, stopped: Option<Ending>) -> Result<Ran> {
    if ended.survivors {
        return Err(Error::internal("processes of the command could not be killed"));
    }
    let kind = |is_stderr| if is_stderr { LogKind::Stderr } else { LogKind::Stdout };
    let ending = match (stopped, ended.incomplete_log, ended.not_started, ended.signal) {
        (Some(stopped), ..) => stopped,
        (None, Some(IncompleteLog { is_stderr, errno: 0 }), ..) => Ending::LogTooLong(kind(is_stderr)),
        (None, Some(IncompleteLog { is_stderr, errno }), ..) => Ending::LogLost(kind(is_stderr), errno),
        (None, None, 0, 0) => Ending::Exited(ended.exit_code),
        (None, None, 0, signal) => Ending::Signalled(signal),
        (None, None, errno, _) if is_shortage(errno) => {
            let error = std::io::Error::from_raw_os_error(errno);
            return Err(Error::Internal(format!("the command could not be started: {error}")));
        }
        (None, None, errno, _) => Ending::NotStarted(errno),
    };
    Ok(Ran {
        ending,
        usage: ended.usage.unwrap_or_default(),
        started: Moment(ended.started_nanos),
        ended: Moment(ended.ended_nanos),
        reached: Vec::new(),
    })
}

/// Whether a program could not be executed because the server lacked something (EXE-62). A busy program is among these,
/// because no process of the command could have opened it. `EIO` is not, because it is also the error of a truncated
/// program.
fn is_shortage(errno: i32) -> bool {
    matches!(errno, libc::ENOMEM | libc::EAGAIN | libc::ENFILE | libc::ETXTBSY)
}

/// Whether this errno means that a disk is full.
pub(super) fn is_full(errno: i32) -> bool {
    matches!(errno, libc::ENOSPC | libc::EDQUOT)
}

fn lost(error: &std::io::Error) -> Error {
    Error::Internal(format!(
        "the process that runs commands was lost while one ran ({error}); was it killed?"
    ))
}

enum WaitOutcome {
    Ready,
    TimeUp,
    Cancelled,
    Violated(Violation),
}

/// Waits until there is an answer, a cancellation or a violation of a limit, or until the deadline (`None`: never).
fn wait(
    socket: &UnixStream,
    deadline: Option<Instant>,
    cancel: &CancelToken,
    mut guard: Option<&mut Guard<'_>>,
) -> Result<WaitOutcome> {
    loop {
        let now = Instant::now();
        let look = guard.as_ref().and_then(|guard| guard.next());
        let next = deadline.into_iter().chain(look).min();
        let mut left = next.map(|next| next.saturating_duration_since(now));
        let mut fds = vec![PollFd::new(socket, PollFlags::IN)];
        match cancel.event() {
            Some(event) => fds.push(PollFd::from_borrowed_fd(event, PollFlags::IN)),
            None => left = Some(left.map_or(CANCEL_POLL, |left| left.min(CANCEL_POLL))),
        }
        // A timeout that is too long for the kernel is split.
        let timeout =
            left.map(|left| Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 3600, tv_nsec: 0 }));
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(Error::io("wait for a command", &error.into())),
        }
        if !fds[0].revents().is_empty() {
            return Ok(WaitOutcome::Ready);
        }
        if cancel.is_stopped() {
            return Ok(WaitOutcome::Cancelled);
        }
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Ok(WaitOutcome::TimeUp);
        }
        if let Some(violation) = guard.as_mut().and_then(|guard| guard.look()) {
            return Ok(WaitOutcome::Violated(violation));
        }
    }
}

impl Drop for RunnerProcess {
    /// Leaves no process behind: the runner kills its processes and exits when its socket is closed.
    fn drop(&mut self) {
        self.socket = None;
        if !ends_within(&self.child, END_GRACE) {
            reap::kill_descendants(self.child.id());
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}

fn ends_within(child: &Child, limit: Duration) -> bool {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let Some(pidfd) = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()) else { return false };
    let timeout = Timespec::try_from(limit).ok();
    let mut fds = [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)];
    matches!(poll(&mut fds, timeout.as_ref()), Ok(1))
}

impl Run {
    /// The order for this launch. `is_counted` says whether a control group limits the number of its processes.
    fn of(launch: &Launch, is_counted: bool) -> Self {
        let bytes = |texts: &[String]| texts.iter().map(|text| text.clone().into_bytes()).collect();
        let path = |path: &std::path::Path| path.as_os_str().as_bytes().to_vec();
        Self {
            programs: bytes(&launch.programs),
            arguments: bytes(&launch.arguments),
            environment: bytes(&launch.environment),
            root: path(&launch.root),
            working_directory: path(&launch.working_directory),
            stdout: path(&launch.stdout),
            stderr: path(&launch.stderr),
            max_file_bytes: launch.max_file_bytes,
            layers: launch.layers.clone(),
            kind: Some(launch.kind.clone()),
            terminal: launch.terminal.as_deref().map(path),
            has_pipes: false,
            // Only a control group reports that its limit was reached, so the limit of the user is higher.
            processes: if is_counted { 0 } else { launch.limits.processes },
        }
    }
}

#[cfg(test)]
mod tests;
