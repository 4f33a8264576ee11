//! [`Launcher`] turns a command into processes. [`RunnerLauncher`] does so with a runner process.
//!
//! The server never forks: with its heap, a fork would take tens of milliseconds. Each worker keeps one small process
//! of the same binary ([`runner`]) and sends it the command over a socket. The runner forks, which is cheap there, and
//! answers when the command and all its descendants are gone. Time limits and cancellation are handled on this side.
//!
//! A runner that dies or does not answer is replaced. Its surviving processes become children of this process and are
//! killed. A command that kills its runner cannot be told apart from other causes: the run is reported as a fault of
//! this server that is worth a retry, and the scheduler bounds the number of attempts.

mod capture;
mod cell;
mod children;
mod gateway;
mod guard;
mod init;
pub(crate) mod probe;
pub mod protocol;
mod reap;
mod resident;
pub mod runner;
mod spawn;
mod sys;
pub(super) mod tool;
mod usage;

use super::{cancel::CancelToken, clock::Moment, command::Launch, workspace::BuildRoot, written::Written};
use crate::{
    cgroups::{Groups, SlotGroup},
    limits::{Exceeded, Limits},
    log_streams::run::LogKind,
    logging::Event,
    platform,
    sandbox::{
        identity::{self, User, Users},
        kind::{CellKind, CellNetwork, InnerUser, InputsAsRoot, RootFs},
        settings::{Pasta, Protections, Sandbox, SandboxMode, SandboxSettings},
    },
};
use gorego_reapi::{
    error::{Error, Result},
    proto::gorego,
};
use guard::{Guard, Violation};
use protocol::{Ended, Failed, Order, Reply, Run, ToRunner, Unkept};
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
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

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
    /// How it ended.
    pub ending: Ending,
    /// Resource usage of all its processes together.
    pub usage: gorego::ResourceUsage,
    /// When it started.
    pub started: Moment,
    /// When its first process ended or was killed.
    pub ended: Moment,
    /// Whether it failed to create a process because of its limit on processes.
    pub refused_processes: bool,
}

/// Turns a [`Launch`] into processes.
pub trait Launcher: Send {
    /// Prepares for the first command, so that it is not slower than later ones. Failures are reported by the next run.
    fn warm_up(&mut self);

    /// Runs a command until it ends, and kills it when `timeout` has passed. Blocks.
    ///
    /// # Errors
    /// If it is unknown how the command ended. Its files must not be used then.
    fn run(&mut self, launch: &Launch, timeout: Duration, cancel: &CancelToken) -> Result<Ran>;

    /// Kills everything that may still run, for a caller that no longer knows its state.
    fn reset(&mut self);
}

/// The sandbox of a pool: its settings, and which parts work on this machine. Cheap to clone.
#[derive(Debug, Clone)]
pub struct PoolSandbox {
    pub(crate) settings: SandboxSettings,
    pub(crate) protections: Protections,
    /// The directory that contains the exec directories.
    pub(crate) build_root: PathBuf,
    /// The users from which each slot takes its own.
    pub(crate) users: Users,
    /// Whether input roots can be overlays.
    pub(crate) has_layers: bool,
    /// The program behind the networks of cells, if it works.
    pub(crate) pasta: Option<Pasta>,
}

impl PoolSandbox {
    /// A sandbox with the protections that work on this machine and default settings, for tests.
    pub fn usual(runner: &[OsString], build_root: &BuildRoot) -> Self {
        let settings = SandboxSettings {
            mode: SandboxMode::Auto,
            visible: Vec::new(),
            hidden: Vec::new(),
            writable: Vec::new(),
            tmp_bytes: 1 << 30,
            tmp_files: 10_000,
            shm_bytes: 1 << 28,
            processes: 1_000,
            first_user: identity::FIRST,
            own: Vec::new(),
            root: None,
            network: CellNetwork::Off,
        };
        let protections = probe::probe(&settings, runner, build_root).on;
        let users = Users::new(settings.first_user);
        let directory = build_root.path().to_owned();
        let mut sandbox =
            Self { settings, protections, build_root: directory, users, has_layers: false, pasta: None };
        sandbox.has_layers =
            protections.namespaces && probe::probe_layers(&sandbox, runner, build_root).is_ok();
        sandbox
    }

    /// The kind of cell for an action that asks for nothing special.
    pub(super) fn usual_kind(&self) -> CellKind {
        self.settings.kind()
    }

    /// Whether input roots can be overlays.
    pub fn has_layers(&self) -> bool {
        self.has_layers
    }

    /// The kind of cell for an action that asks for these platform properties.
    ///
    /// # Errors
    /// `Precondition` if this sandbox lacks something that is asked for; `Invalid` if the user is not valid.
    pub(crate) fn kind(&self, asked: &[(String, String)]) -> Result<CellKind> {
        let mut kind = self.settings.kind();
        if platform::wants_input_root_as_root(asked) {
            if !self.protections.namespaces {
                return Err(Error::Precondition(
                    "the action asks for its input root as its root file system (rootfs), which requires the namespaces of the \
                     sandbox; they are off on this server"
                        .into(),
                ));
            }
            kind.root = Some(RootFs::InputRoot(InputsAsRoot {}));
        }
        let (user, group) = platform::wanted_user(asked).map_err(Error::Invalid)?;
        if self.protections.namespaces && (user.is_some() || group.is_some()) {
            let usual = kind.user();
            let (user, group) = (user.unwrap_or(usual.user), group.unwrap_or(usual.group));
            kind.user = Some(InnerUser { user, group });
        }
        // Without network namespaces, every action has the network of the host.
        if self.protections.network && platform::wants_network(asked) {
            if self.settings.network == CellNetwork::On && self.pasta.is_none() {
                return Err(Error::Precondition(
                    "the action asks for a network (network=on), and this machine cannot give it one; the start of the                      server says why"
                        .into(),
                ));
            }
            kind.network = self.settings.network.into();
        }
        Ok(kind)
    }
}

/// The [`Launcher`] that runs commands through a runner process.
#[derive(Debug)]
pub struct RunnerLauncher {
    command: Vec<OsString>,
    sandbox: Option<Sandbox>,
    runner: Option<Runner>,
    /// Reserves the host user of the sandbox for this launcher.
    _user: Option<User>,
    /// The control group in which everything runs, if there is one.
    group: Option<SlotGroup>,
    /// Memory in bytes for all actions together; 0 if it is not limited.
    total_memory: u64,
}

#[derive(Debug)]
struct Runner {
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

    /// Adds a control group of its own to this launcher.
    pub(crate) fn grouped(self, groups: &Groups) -> Self {
        let group = groups.slot().inspect_err(|error| {
            Event::warn("gorego::worker", SLOT_WITHOUT_GROUP).with_shown("error", error).log(format_args!(
                "a slot has no control group; the limits of its actions are enforced as well as possible without"
            ));
        });
        Self { group: group.ok(), total_memory: groups.total_memory(), ..self }
    }

    /// [`Launcher::run`] without the handling of errors.
    fn try_run(&mut self, launch: &Launch, timeout: Duration, cancel: &CancelToken) -> Result<Ran> {
        if let Some(group) = &mut self.group {
            let failed = |error| Error::io("set the limits of an action", &error);
            group.begin(&launch.limits).map_err(failed)?;
        }
        let mut runner = match self.runner.take().and_then(Runner::still_there) {
            Some(runner) => runner,
            None => Runner::start(&self.command, self.sandbox.as_ref(), self.group.as_ref())?,
        };
        let written = match launch.limits {
            Limits { disk: 0, files: 0, .. } => None,
            _ => Some(
                Written::begin(launch.written()).map_err(|error| Error::io("measure the disk", &error))?,
            ),
        };
        let process = runner.child.id();
        let guard =
            Guard::new(&launch.limits, self.group.as_ref(), self.total_memory, process, written.as_ref());
        let outcome = runner.run(launch, timeout, cancel, guard);
        self.runner = Some(runner);
        let refused_processes = self.group.as_ref().is_some_and(SlotGroup::refused_processes);
        Ok(Ran { refused_processes, ..outcome? })
    }
}

impl Launcher for RunnerLauncher {
    fn warm_up(&mut self) {
        if self.runner.is_none() {
            self.runner = Runner::start(&self.command, self.sandbox.as_ref(), self.group.as_ref()).ok();
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

impl Runner {
    /// This runner, unless it has died since the last action.
    fn still_there(mut self) -> Option<Self> {
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
        // Only options that let std use posix_spawn are set: any other would make std fork this server. The own process
        // group keeps a Ctrl-C on the server's terminal away from running commands.
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
            let order = ToRunner { order: Some(Order::Enclose(sandbox.clone())) };
            protocol::write(socket, &order).map_err(failed)?;
        }
        Ok(runner)
    }

    fn run(
        &mut self,
        launch: &Launch,
        timeout: Duration,
        cancel: &CancelToken,
        mut guard: Guard<'_>,
    ) -> Result<Ran> {
        let order = ToRunner { order: Some(Order::Run(Run::from(launch))) };
        let Some(socket) = &self.socket else { return Err(Error::internal("the runner was given up")) };
        let started = Moment::now();
        protocol::write(socket, &order).map_err(|error| match error.kind() {
            std::io::ErrorKind::InvalidInput => Error::invalid(error),
            _ => lost(&error),
        })?;
        let mut stopped = match wait(socket, Instant::now().checked_add(timeout), cancel, Some(&mut guard))? {
            Waited::Ready => None,
            Waited::TimeUp => Some(Ending::TimedOut),
            Waited::Cancelled => Some(Ending::Cancelled),
            Waited::Violated(violation) => Some(violation.into()),
        };
        if stopped.is_some() {
            let kill = ToRunner { order: Some(Order::Kill(protocol::Kill {})) };
            protocol::write(socket, &kill).map_err(|error| lost(&error))?;
            let never = CancelToken::new();
            let end = Instant::now().checked_add(KILL_GRACE);
            if !matches!(wait(socket, end, &never, None)?, Waited::Ready) {
                return Err(Error::internal("a command could not be killed"));
            }
        }
        let reply = protocol::read::<protocol::FromRunner>(socket)
            .and_then(|reply| reply.ok_or_else(|| std::io::ErrorKind::UnexpectedEof.into()));
        stopped = stopped.or_else(|| guard.end().map(Ending::from));
        match (reply.map(|reply| reply.reply), stopped) {
            (Ok(Some(Reply::Ended(ended))), stopped) => ran(ended, stopped),
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
    let ending = match (stopped, ended.unkept, ended.not_started, ended.signal) {
        (Some(stopped), ..) => stopped,
        (None, Some(Unkept { is_stderr, errno: 0 }), ..) => Ending::LogTooLong(kind(is_stderr)),
        (None, Some(Unkept { is_stderr, errno }), ..) => Ending::LogLost(kind(is_stderr), errno),
        (None, None, 0, 0) => Ending::Exited(ended.exit_code),
        (None, None, 0, signal) => Ending::Signalled(signal),
        (None, None, errno, _) => Ending::NotStarted(errno),
    };
    Ok(Ran {
        ending,
        usage: ended.usage.unwrap_or_default(),
        started: Moment(ended.started_nanos),
        ended: Moment(ended.ended_nanos),
        refused_processes: false,
    })
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

enum Waited {
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
) -> Result<Waited> {
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
            return Ok(Waited::Ready);
        }
        if cancel.is_stopped() {
            return Ok(Waited::Cancelled);
        }
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Ok(Waited::TimeUp);
        }
        if let Some(violation) = guard.as_mut().and_then(|guard| guard.look()) {
            return Ok(Waited::Violated(violation));
        }
    }
}

impl Drop for Runner {
    /// Leaves no process behind: when its socket is closed, the runner kills what it started and exits.
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

impl From<&Launch> for Run {
    fn from(launch: &Launch) -> Self {
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
        }
    }
}
