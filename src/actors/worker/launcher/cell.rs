//! [`Cells`]: the runner's side of the sandbox. Each command runs in a cell of its own.
//!
//! A cell is the first process of a new pid namespace, with a file system and network of its own ([`crate::sandbox`]).
//! While a command runs, the runner starts the next cell, assuming that the next command needs the same kind of cell.
//! The new cell waits at a socket for its order. It then runs one command, reports how the command ended, and exits.
//! The kernel then kills all other processes in it. No cell is used twice.

use super::{
    super::clock::Moment,
    capture::Capture,
    children::KILL_LIMIT,
    gateway::Gateway,
    init,
    open_files::send_open,
    protocol::{self, CellEvent, Ended, Failed, FromCell, Run, ToRunner},
    tool::{self, Pipes},
    usage::Usage,
};
use crate::sandbox::{SetupFailure, Step as _, kind::CellKind, namespaces, settings::Sandbox, world::World};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use std::{
    ffi::OsStr,
    io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::{ffi::OsStrExt as _, net::UnixStream},
    },
    path::Path,
    time::{Duration, Instant},
};

/// Time limit for a step of a cell's first process that does not wait for another process.
const CELL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a command must run before the next cell is started at the same time. A shorter command is answered first.
const PREPARE_AFTER: Duration = Duration::from_millis(2);
/// Maximum number of ended cells that the kernel is still tearing down. If there are more, the runner waits for the
/// oldest.
const MOST_ENDED: usize = 4;
/// Maximum number of cells that wait for a command. Each is of another kind.
const MOST_READY: usize = 2;

/// The cells of one runner.
pub(super) struct Cells {
    /// The world of all cells, or why it could not be made.
    world: Result<World, SetupFailure>,
    /// Cells that wait for a command, the newest last.
    ready: Vec<Cell>,
    /// Cells that have ended or were killed, and are not reaped yet.
    ended: Vec<Cell>,
}

/// A cell. It is killed on drop.
struct Cell {
    kind: CellKind,
    /// Number of the view that it was made from.
    view: u64,
    init: Pid,
    pidfd: OwnedFd,
    socket: UnixStream,
    /// The gateway of its network, if it has one. It ends after the cell.
    gateway: Option<Gateway>,
}

/// Why the runner stops waiting for the end of a command.
enum CommandStop {
    /// The first process has reported, or has ended without a report.
    Ended(Option<FromCell>),
    /// The server has ordered to kill the command.
    Killed,
    ServerGone,
    /// A log could not be written.
    IncompleteLog(protocol::IncompleteLog),
}

impl Cells {
    /// Makes the world of all cells and prepares the first cell.
    pub(super) fn new(sandbox: Sandbox) -> Self {
        let first = sandbox.first.clone().unwrap_or_default();
        let mut cells = Self { world: World::new(sandbox), ready: Vec::new(), ended: Vec::new() };
        cells.prepare(&first);
        cells
    }

    /// Starts a cell of this kind for a later command, unless there is one. A failure is reported when a cell is
    /// needed.
    fn prepare(&mut self, kind: &CellKind) {
        if let Ok(world) = &mut self.world
            && self.ready.iter().all(|cell| cell.kind != *kind)
            && let Ok(cell) = Cell::new(world, kind)
        {
            self.ready.push(cell);
            if self.ready.len() > MOST_READY {
                let oldest = self.ready.remove(0);
                self.discard(oldest);
            }
        }
    }

    /// Kills a cell that is not needed, without waiting for its end.
    fn discard(&mut self, cell: Cell) {
        let _ = pidfd_send_signal(&cell.pidfd, Signal::KILL);
        self.ended.push(cell);
    }

    /// Gives the order to a cell: to a prepared one if it is current and still works, or else to a new one.
    fn start(
        &mut self,
        kind: &CellKind,
        run: &Run,
        capture: &Capture,
        pipes: Option<&Pipes>,
    ) -> Result<Cell, SetupFailure> {
        let world = self.world.as_mut().map_err(|failure| failure.duplicate())?;
        let view = world.view(kind)?;
        // Must be done only once for each command: an overlay of the same layers cannot be mounted twice.
        let exec_root = world.exec_root(Path::new(OsStr::from_bytes(&run.root)), run.layers.as_ref())?;
        if let Some(at) = self.ready.iter().position(|cell| cell.kind == *kind) {
            let cell = self.ready.remove(at);
            if cell.is_current(view) && cell.start(&exec_root, run, capture, pipes).is_ok() {
                return Ok(cell);
            }
            self.discard(cell);
        }
        let world = self.world.as_mut().map_err(|failure| failure.duplicate())?;
        let cell = Cell::new(world, kind)?;
        cell.start(&exec_root, run, capture, pipes)?;
        Ok(cell)
    }

    /// Prepares a cell of this kind for the next command, and reaps ended cells. To be called after the command's
    /// result was sent.
    pub(super) fn tidy(&mut self, kind: &CellKind) {
        self.prepare(kind);
        self.ended.retain(|cell| !cell.has_ended());
        if self.ended.len() > MOST_ENDED {
            self.ended.remove(0);
        }
    }

    /// Runs a command to its end; `None` if the server is gone. A command that talks to the server has `pipes`.
    pub(super) fn run(
        &mut self,
        run: Run,
        pipes: Option<Pipes>,
        server: &UnixStream,
        buffer: &mut [u8],
    ) -> Result<Option<Ended>, Failed> {
        let kind = run.kind.clone().unwrap_or_default();
        let world = self.world.as_ref().map_err(not_set_up)?;
        let failed = |error: io::Error| Failed {
            message: format!("could not start a command: {error}"),
            errno: error.raw_os_error().unwrap_or(0),
        };
        let mut capture = Capture::open(&run.stdout, &run.stderr, tool::max_log_bytes(&run))
            .and_then(|capture| capture.or_terminal(run.terminal.as_deref()))
            .map_err(failed)?;
        capture.give_to(world.owner()).map_err(failed)?;
        if let Some(pipes) = &pipes {
            pipes.give_to(world.owner()).map_err(failed)?;
        }
        let mut ended = Ended { started_nanos: Moment::now().0, ..Ended::default() };
        let cell =
            self.start(&kind, &run, &capture, pipes.as_ref()).map_err(|failure| not_set_up(&failure))?;
        // A tool is the only command of its runner.
        let prepares = pipes.is_none();
        // The command has its own copies of these descriptors. They are closed here so that the server notices when the
        // command closes them.
        drop(pipes);
        let stop = self.follow(&cell, server, &mut capture, buffer, prepares).map_err(failed)?;
        let incomplete_log = match stop {
            CommandStop::Ended(Some(FromCell { event: Some(CellEvent::Ended(event)) })) => {
                ended = event;
                self.ended.push(cell);
                None
            }
            CommandStop::Ended(Some(FromCell { event: Some(CellEvent::Failed(failed)) })) => {
                return Err(failed);
            }
            CommandStop::Ended(_) => {
                return Err(Failed { message: "the sandbox ended before its command".into(), errno: 0 });
            }
            CommandStop::Killed => {
                cell.kill(&mut ended);
                None
            }
            CommandStop::IncompleteLog(incomplete_log) => {
                cell.kill(&mut ended);
                Some(incomplete_log)
            }
            CommandStop::ServerGone => return Ok(None),
        };
        ended.incomplete_log = incomplete_log.or_else(|| capture.finish(buffer).err());
        Ok(Some(ended))
    }

    /// Waits for the end of the command or a message of the server, and moves output. Meanwhile it prepares the next
    /// cell if `prepares` is set.
    fn follow(
        &mut self,
        cell: &Cell,
        server: &UnixStream,
        capture: &mut Capture,
        buffer: &mut [u8],
        prepares: bool,
    ) -> io::Result<CommandStop> {
        let mut prepare_at = prepares.then(|| Instant::now() + PREPARE_AFTER);
        loop {
            let mut fds = vec![PollFd::new(&cell.socket, PollFlags::IN), PollFd::new(server, PollFlags::IN)];
            let mut pause = capture.watch(Instant::now(), &mut fds);
            if let Some(at) = prepare_at {
                let wait = at.saturating_duration_since(Instant::now());
                pause = Some(pause.map_or(wait, |pause| pause.min(wait)));
            }
            let timeout = pause.and_then(|pause| Timespec::try_from(pause).ok());
            match poll(&mut fds, timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            if ready[0] {
                return Ok(CommandStop::Ended(protocol::read(&cell.socket).unwrap_or(None)));
            }
            if ready[1] {
                // The only possible order is a kill. The end of the stream means that the server is gone.
                let order = protocol::read::<ToRunner>(server);
                return Ok(if matches!(order, Ok(Some(_))) {
                    CommandStop::Killed
                } else {
                    CommandStop::ServerGone
                });
            }
            if ready[2..].contains(&true)
                && let Err(incomplete_log) = capture.take(Instant::now(), buffer)
            {
                return Ok(CommandStop::IncompleteLog(incomplete_log));
            }
            if prepare_at.is_some_and(|at| Instant::now() >= at) {
                prepare_at = None;
                self.prepare(&cell.kind);
            }
        }
    }
}

impl Cell {
    /// Starts the first process of a cell, which then sets up the rest.
    fn new(world: &mut World, kind: &CellKind) -> Result<Self, SetupFailure> {
        let (setup, view) = world.setup(kind)?;
        let world = &*world;
        let (ours, theirs) = UnixStream::pair().step("make a socket")?;
        ours.set_read_timeout(Some(CELL_TIMEOUT)).step("set a timeout")?;
        ours.set_write_timeout(Some(CELL_TIMEOUT)).step("set a timeout")?;
        let plan = world.gateway(kind)?;
        let network = plan.as_ref().map(|_| Gateway::prepare()).transpose()?;
        let (setup, network) = match network {
            Some((host, inner, outer)) => (setup.with_gateway(inner, host.clone()), Some((host, outer))),
            None => (setup, None),
        };
        let init = world.start(kind, move || init::init_main(&theirs, world, setup))?;
        // Nothing else would reap the first process if it cannot be watched.
        let pidfd = pidfd_open(init, PidfdFlags::empty())
            .inspect_err(|_| namespaces::end(init))
            .step("watch the sandbox")?;
        let mut cell = Self { kind: kind.clone(), view, init, pidfd, socket: ours, gateway: None };
        if let Some((plan, (host, outer))) = plan.zip(network) {
            cell.gateway = Some(Gateway::start(&plan, init, &outer, host)?);
        }
        world.map_user(init.as_raw_pid(), kind)?;
        rustix::io::write(&cell.socket, &[init::USER_MAPPED]).step("start the sandbox")?;
        Ok(cell)
    }

    /// Whether the files and the network of the cell are as they would be in a new one. `view` is the number of the
    /// current view.
    fn is_current(&self, view: u64) -> bool {
        self.view == view && self.gateway.as_ref().is_none_or(Gateway::is_current)
    }

    /// Waits until the cell is ready and sends it the order.
    fn start(
        &self,
        exec_root: &OwnedFd,
        run: &Run,
        capture: &Capture,
        pipes: Option<&Pipes>,
    ) -> Result<(), SetupFailure> {
        let ready = protocol::read::<FromCell>(&self.socket).step("wait for the sandbox")?;
        match ready.and_then(|message| message.event) {
            Some(CellEvent::Ready(_)) => {}
            Some(CellEvent::Failed(Failed { message, errno: 0 })) => {
                let (step, error) = message.split_once(": ").unwrap_or((&message, "it failed"));
                return Err(SetupFailure { step: step.into(), error: io::Error::other(error.to_owned()) });
            }
            Some(CellEvent::Failed(Failed { message, errno })) => {
                return Err(SetupFailure { step: message, error: io::Error::from_raw_os_error(errno) });
            }
            _ => return Err(SetupFailure { step: "wait for the sandbox".into(), error: Errno::PIPE.into() }),
        }
        let (stdout, stderr) = capture.writing_ends();
        let files = match pipes {
            Some(pipes) => &[exec_root.as_fd(), pipes.answers.as_fd(), stderr, pipes.requests.as_fd()][..],
            None => &[exec_root.as_fd(), stdout, stderr][..],
        };
        send_open(&self.socket, files).step("send open files to the sandbox")?;
        protocol::write(&self.socket, run).step("send the command to the sandbox")
    }

    /// Kills all processes of the cell. Stores in `ended` the time of the end and the resource usage.
    fn kill(self, ended: &mut Ended) {
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
        ended.ended_nanos = Moment::now().0;
        if self.wait(KILL_LIMIT) {
            // The first process ends after all others, so its usage includes everything that the command used, and a
            // little more.
            if let Ok((_, usage)) = super::sys::reap(self.init.as_raw_pid()) {
                let mut sum = Usage::default();
                sum.add(&usage);
                ended.usage = Some(sum.into_wire());
            }
        } else {
            ended.survivors = true;
        }
    }

    /// Whether all processes of the cell have ended.
    fn has_ended(&self) -> bool {
        self.wait(Duration::ZERO) && self.gateway.as_ref().is_none_or(|gateway| gateway.wait(Duration::ZERO))
    }

    /// Waits until the first process, and thus the whole cell, has ended. Returns false if that takes longer than
    /// `limit`.
    fn wait(&self, limit: Duration) -> bool {
        let timeout = Timespec::try_from(limit).ok();
        let mut fds = [PollFd::from_borrowed_fd(self.pidfd.as_fd(), PollFlags::IN)];
        matches!(poll(&mut fds, timeout.as_ref()), Ok(1))
    }
}

impl Drop for Cell {
    /// Leaves no process behind.
    fn drop(&mut self) {
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
        if self.wait(KILL_LIMIT) {
            let _ = rustix::process::waitpid(Some(self.init), rustix::process::WaitOptions::NOHANG);
        }
    }
}

fn not_set_up(failure: &SetupFailure) -> Failed {
    // No errno: if something is full, it is not the disk of the build root.
    Failed { message: format!("could not set up the sandbox: {failure}"), errno: 0 }
}
