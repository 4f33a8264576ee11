//! The runner process: runs commands for one worker, one at a time, and leaves none of their processes behind.
//!
//! It is this binary with the hidden subcommand `runner` and one end of a socket as its standard input. It is single
//! threaded and small, so that forking is cheap. It kills all processes of the command (EXE-44) when the command's
//! first process ends, when it receives an order to do so, and when the socket closes because the server died.
//!
//! In a sandbox each command gets a [cell](super::cell) of its own, which is killed as a whole. Without a sandbox, the
//! runner is a child subreaper, so that every orphaned descendant of a command, such as a daemon, becomes its child.
//!
//! While a command runs, the runner moves its output from pipes into log files ([`capture`](super::capture)).
//!
//! The runner knows nothing of actions and time limits. A command gets exactly the arguments and environment of the
//! order (EXE-41) and default signal dispositions. The runner itself blocks every signal that can be blocked: neither a
//! command nor a service manager that signals every process can end it before its socket closes.

use super::{
    capture::{BUFFER_BYTES, Capture},
    cell::Cells,
    children::{ChildExits, Children},
    protocol::{self, Ended, Failed, FromRunner, Order, Reply, Run, ToRunner},
    reap,
    spawn::Stack,
    sys,
    tool::{self, Pipes},
};
use crate::sandbox::{kind::CellKind, settings::Sandbox, world::restrict_in_place};
use rustix::{
    event::{PollFd, PollFlags},
    fs::{self as rfs, Mode, OFlags},
    process::{Resource, Rlimit, getrlimit, setrlimit},
};
use std::{
    ffi::OsStr,
    io,
    os::{
        fd::AsFd,
        unix::{ffi::OsStrExt as _, net::UnixStream},
    },
    path::PathBuf,
    time::{Duration, Instant},
};

/// Serves the worker at the other end of standard input until the socket closes. Returns the exit code of this process.
pub fn runner_main() -> i32 {
    let served = set_up_runner().and_then(|mut runner| runner.serve());
    // There are descendants only after a failure in the middle of a command.
    reap::kill_descendants(std::process::id());
    i32::from(served.is_err())
}

/// How commands are isolated.
enum Isolation {
    /// In the namespaces of this process, which may be restricted.
    None,
    /// Each command runs in a cell of its own.
    Cells(Box<Cells>),
    /// No command can run, because this process could not be restricted.
    Failed(Failed),
}

struct Runner {
    socket: UnixStream,
    child_exits: ChildExits,
    stack: Stack,
    /// Buffer for output on its way to the logs.
    buffer: Vec<u8>,
    isolation: Isolation,
}

/// Sets up what the children of this process will inherit, and takes the socket from standard input.
fn set_up_runner() -> io::Result<Runner> {
    // Close descriptors that the server failed to mark close-on-exec.
    sys::close_from(3)?;
    sys::be_subreaper()?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    sys::default_signals();
    // A log may be as large as the hard limit of this process allows.
    let maximum = getrlimit(Resource::Fsize).maximum;
    let _ = setrlimit(Resource::Fsize, Rlimit { current: maximum, maximum });
    restore_open_files(std::env::args().nth(2).and_then(|limit| limit.parse().ok()));
    let child_exits = ChildExits::watch()?;
    let socket = UnixStream::from(rustix::io::fcntl_dupfd_cloexec(io::stdin(), 3)?);
    let null = rfs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    sys::become_stdin(&null)?;
    Ok(Runner {
        socket,
        child_exits,
        stack: Stack::new(),
        buffer: vec![0; BUFFER_BYTES],
        isolation: Isolation::None,
    })
}

/// Sets the soft limit on open files that commands inherit. Some programs visit every descriptor number below it, and
/// the server's own limit may be a million.
fn restore_open_files(limit: Option<u64>) {
    if limit.is_some() {
        let maximum = getrlimit(Resource::Nofile).maximum;
        // Lowering a limit is always allowed. If it fails, commands merely have a higher limit.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: limit, maximum });
    }
}

impl Isolation {
    fn new(sandbox: Sandbox) -> Self {
        if sandbox.protections.namespaces {
            return Self::Cells(Box::new(Cells::new(sandbox)));
        }
        match restrict_in_place(&sandbox) {
            Ok(()) => Self::None,
            Err(failure) => {
                Self::Failed(Failed { message: format!("could not set up the sandbox: {failure}"), errno: 0 })
            }
        }
    }
}

impl Runner {
    fn serve(&mut self) -> io::Result<()> {
        while let Some(message) = protocol::read::<ToRunner>(&self.socket)? {
            match message.order {
                Some(Order::UseSandbox(sandbox)) => self.isolation = Isolation::new(sandbox),
                Some(Order::Run(run)) => {
                    let kind = run.kind.clone().unwrap_or_default();
                    let pipes = if run.has_pipes { Some(Pipes::receive(&self.socket)?) } else { None };
                    let reply = match self.run(run, pipes) {
                        Ok(Some(ended)) => Reply::Ended(ended),
                        // The server is gone, and so are all processes that ran for it.
                        Ok(None) => return Ok(()),
                        Err(failed) => Reply::Failed(failed),
                    };
                    protocol::write(&self.socket, &FromRunner { reply: Some(reply) })?;
                    if let Isolation::Cells(cells) = &mut self.isolation {
                        cells.tidy(&kind);
                    }
                }
                // The Kill crossed with the answer, so there is nothing left to kill.
                Some(Order::Kill(_)) | None => {}
            }
        }
        Ok(())
    }

    /// Runs a command to its end; `None` if the server is gone.
    fn run(&mut self, mut run: Run, pipes: Option<Pipes>) -> Result<Option<Ended>, Failed> {
        // The limit must not exceed the hard limit of this process.
        let limit = getrlimit(Resource::Fsize).maximum.unwrap_or(u64::MAX);
        run.max_file_bytes = run.max_file_bytes.min(limit);
        match &mut self.isolation {
            Isolation::Cells(cells) => cells.run(run, pipes, &self.socket, &mut self.buffer),
            Isolation::Failed(failed) => Err(failed.clone()),
            Isolation::None if run.kind.as_ref().is_some_and(|kind| *kind != CellKind::default()) => {
                Err(Failed {
                    message: "this command needs the namespaces of the sandbox, and they are off".into(),
                    errno: 0,
                })
            }
            Isolation::None => self.run_here(run, pipes).map_err(|error| Failed {
                message: format!("could not start a command: {error}"),
                errno: error.raw_os_error().unwrap_or(0),
            }),
        }
    }

    /// Runs a command without a cell.
    fn run_here(&mut self, run: Run, pipes: Option<Pipes>) -> io::Result<Option<Ended>> {
        let mut capture = Capture::open(&run.stdout, &run.stderr, tool::max_log_bytes(&run))?
            .or_terminal(run.terminal.as_deref())?;
        let root = PathBuf::from(OsStr::from_bytes(&run.root));
        let (mut stdin, (mut stdout, stderr)) = (None, capture.writing_ends());
        if let Some(pipes) = &pipes {
            (stdin, stdout) = (Some(pipes.requests.as_fd()), pipes.answers.as_fd());
        }
        let mut children = Children::start(run, &root, stdin, (stdout, stderr), &mut self.stack)?;
        drop(pipes);
        let (mut server_is_there, mut kept) = (true, Ok(()));
        while kept.is_ok() {
            let reaped = children.reap_ended()?;
            if reaped.first_ended {
                break;
            }
            let ready = self.wait(&capture, reaped.pause())?;
            if ready.order {
                // The only possible order is a kill. The end of the stream means that the server is gone.
                server_is_there = protocol::read::<ToRunner>(&self.socket).is_ok_and(|order| order.is_some());
                break;
            }
            kept = if ready.output { capture.take(Instant::now(), &mut self.buffer) } else { Ok(()) };
        }
        children.clear(&self.child_exits, || {
            reap::kill_descendants(std::process::id());
        })?;
        let mut ended = children.report();
        ended.incomplete_log = kept.and_then(|()| capture.finish(&mut self.buffer)).err();
        Ok(server_is_there.then_some(ended))
    }

    /// Waits for the death of a child, for the server, or for output that should be moved.
    fn wait(&self, capture: &Capture, limit: Option<Duration>) -> io::Result<ReadyEvents> {
        let mut fds = vec![PollFd::from_borrowed_fd(self.socket.as_fd(), PollFlags::IN)];
        let pause = capture.watch(Instant::now(), &mut fds);
        let outputs = fds.len();
        self.child_exits.wait(&mut fds, limit.or(pause))?;
        let is_ready = |fd: &PollFd<'_>| !fd.revents().is_empty();
        Ok(ReadyEvents {
            order: fds.first().is_some_and(is_ready),
            output: fds.get(1..outputs).unwrap_or_default().iter().any(is_ready),
        })
    }
}

/// Which of the awaited events have happened.
struct ReadyEvents {
    order: bool,
    output: bool,
}
