//! The runner process: starts commands for one worker, one at a time, and leaves nothing of them behind.
//!
//! It is this binary under the hidden subcommand `runner`, with one end of a socket as its standard input. It is single
//! threaded and small, so forking is cheap; it is a child subreaper, so everything that a command started ends up as its
//! child, a daemonised grandchild too. When the command's first process ends, when it is told to, and when the socket closes
//! because the server died, it kills all of them (EXE-44).
//!
//! Meanwhile it moves what the command prints from pipes into log files ([`capture`](super::capture)).
//!
//! It knows nothing of actions and timeouts; it gives a command exactly what the order says (EXE-41) and default signal
//! dispositions. Itself it hears no signal that can be blocked: neither a command nor a service manager that signals every
//! process ends it before the end of its socket does.

use super::{
    super::clock::Moment,
    capture::{BUFFER_BYTES, Capture},
    protocol::{self, Ended, Failed, FromRunner, Order, Reply, Run, ToRunner},
    reap,
    spawn::{self, Plan, Stack},
    sys,
};
use crate::actors::worker::dir;
use gorego_reapi::proto::gorego;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{self as rfs, Mode, OFlags},
    io::Errno,
    process::{Resource, Rlimit, getrlimit, setrlimit},
};
use std::{
    ffi::{CString, OsStr},
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd as _, OwnedFd},
        unix::{ffi::OsStrExt as _, net::UnixStream},
    },
    path::Path,
    time::{Duration, Instant},
};

/// How long killing may go on until the survivors are reported; below the worker's patience.
const KILL_LIMIT: Duration = Duration::from_secs(10);
/// How long to wait for a death before looking for processes again.
const KILL_ROUND: Duration = Duration::from_millis(10);

/// Serves the worker at the other end of standard input until it is gone; gives the exit code of this process.
pub fn runner_main() -> i32 {
    let served = settle().and_then(|mut runner| runner.serve());
    // Only a failure in the middle of a command leaves anything to find here.
    reap::kill_descendants(std::process::id());
    i32::from(served.is_err())
}

struct Runner {
    socket: UnixStream,
    /// Readable when a child ended.
    deaths: OwnedFd,
    stack: Stack,
    /// For output on its way to the logs.
    buffer: Vec<u8>,
}

/// Makes this process what its children should inherit, and turns standard input into the socket.
fn settle() -> io::Result<Runner> {
    // Nothing that the server forgot to mark gets further than here.
    sys::close_from(3)?;
    sys::be_subreaper()?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    sys::default_signals();
    // A log may be as large as our own hard limit allows.
    let maximum = getrlimit(Resource::Fsize).maximum;
    let _ = setrlimit(Resource::Fsize, Rlimit { current: maximum, maximum });
    restore_open_files(std::env::args().nth(2).and_then(|limit| limit.parse().ok()));
    let deaths = sys::watch_children()?;
    let socket = UnixStream::from(rustix::io::fcntl_dupfd_cloexec(io::stdin(), 3)?);
    let null = rfs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    sys::become_stdin(&null)?;
    Ok(Runner { socket, deaths, stack: Stack::new(), buffer: vec![0; BUFFER_BYTES] })
}

/// Sets the soft limit on open files that commands inherit. Programs exist that visit every number below it, and the server's
/// own limit may be a million.
fn restore_open_files(limit: Option<u64>) {
    if limit.is_some() {
        let maximum = getrlimit(Resource::Nofile).maximum;
        // Lowering a limit is always allowed; if not, commands merely have more.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: limit, maximum });
    }
}

impl Runner {
    fn serve(&mut self) -> io::Result<()> {
        while let Some(message) = protocol::read::<ToRunner>(&self.socket)? {
            if let Some(Order::Run(run)) = message.order {
                let reply = match self.run(run) {
                    Ok(Some(ended)) => Reply::Ended(ended),
                    // The server is gone, and so is everything that ran for it.
                    Ok(None) => return Ok(()),
                    Err(error) => Reply::Failed(Failed {
                        message: format!("could not start a command: {error}"),
                        errno: error.raw_os_error().unwrap_or(0),
                    }),
                };
                protocol::write(&self.socket, &FromRunner { reply: Some(reply) })?;
            }
            // A Kill that crossed with the answer has nothing left to kill.
        }
        Ok(())
    }

    /// Runs a command to its end; `None` when the server went away meanwhile.
    fn run(&mut self, run: Run) -> io::Result<Option<Ended>> {
        // More than our own hard limit may not be asked for.
        let limit = getrlimit(Resource::Fsize).maximum.unwrap_or(u64::MAX).min(run.max_file_bytes);
        let mut capture = Capture::open(&run.stdout, &run.stderr, limit)?;
        let mut children = self.start(run, &capture, limit)?;
        let (mut server_is_there, mut kept) = (true, Ok(()));
        while kept.is_ok() && !children.reap_ended()?.first_ended {
            let ready = self.wait(&capture)?;
            if ready.order {
                // The only order that can come now is to kill; the end of the stream means the same.
                server_is_there = protocol::read::<ToRunner>(&self.socket).is_ok_and(|order| order.is_some());
                break;
            }
            kept = if ready.output { capture.take(Instant::now(), &mut self.buffer) } else { Ok(()) };
        }
        self.clear(&mut children)?;
        children.ended.unkept = kept.and_then(|()| capture.finish(&mut self.buffer)).err();
        Ok(server_is_there.then(|| children.report()))
    }

    fn start(&mut self, run: Run, capture: &Capture, max_file_bytes: u64) -> io::Result<Children> {
        let root = File::from(rfs::open(
            OsStr::from_bytes(&run.root),
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?);
        let directory = dir::open_beneath(&root, Path::new(OsStr::from_bytes(&run.working_directory)))?;
        let (stdout, stderr) = capture.writing_ends();
        let plan = Plan {
            programs: c_strings(run.programs)?,
            arguments: c_strings(run.arguments)?,
            environment: c_strings(run.environment)?,
            working_directory: directory.as_raw_fd(),
            stdout,
            stderr,
            max_file_bytes,
        };
        let mut ended = Ended { started_nanos: Moment::now().0, ..Ended::default() };
        let spawned = spawn::spawn(&plan, &mut self.stack)?;
        ended.not_started = spawned.not_started;
        Ok(Children { first: spawned.pid, ended, usage: Usage::default() })
    }

    /// Kills until no child is left.
    fn clear(&self, children: &mut Children) -> io::Result<()> {
        let start = Instant::now();
        loop {
            let reaped = children.reap_ended()?;
            if reaped.none_left {
                return Ok(());
            }
            if start.elapsed() > KILL_LIMIT {
                children.ended.survivors = true;
                return Ok(());
            }
            if !reaped.first_ended {
                sys::kill_group(children.first);
            }
            reap::kill_descendants(std::process::id());
            self.wait_for_death()?;
        }
    }

    /// Waits for the death of a child, for the server, and for output that is worth moving.
    fn wait(&self, capture: &Capture) -> io::Result<Ready> {
        let mut fds = vec![
            PollFd::from_borrowed_fd(self.deaths.as_fd(), PollFlags::IN),
            PollFd::new(&self.socket, PollFlags::IN),
        ];
        let pause = capture.watch(Instant::now(), &mut fds);
        self.poll(&mut fds, pause)?;
        let is_ready = |fd: &PollFd<'_>| !fd.revents().is_empty();
        Ok(Ready {
            order: fds.get(1).is_some_and(is_ready),
            output: fds.get(2..).unwrap_or_default().iter().any(is_ready),
        })
    }

    /// Waits for the death of a child for [`KILL_ROUND`].
    fn wait_for_death(&self) -> io::Result<()> {
        self.poll(&mut [PollFd::from_borrowed_fd(self.deaths.as_fd(), PollFlags::IN)], Some(KILL_ROUND))
    }

    /// Waits for any of these, the first of which are the deaths; who waits looks at all children anyway.
    fn poll(&self, fds: &mut [PollFd<'_>], limit: Option<Duration>) -> io::Result<()> {
        let timeout = limit.and_then(|limit| Timespec::try_from(limit).ok());
        match poll(fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        if fds.first().is_some_and(|deaths| !deaths.revents().is_empty()) {
            // One record may stand for many deaths.
            let mut record = [0u8; size_of::<libc::signalfd_siginfo>()];
            let _ = rustix::io::read(&self.deaths, &mut record);
        }
        Ok(())
    }
}

/// Which of the awaited events are ready.
struct Ready {
    order: bool,
    output: bool,
}

/// The processes of one command, as far as they were children of the runner.
struct Children {
    first: libc::pid_t,
    ended: Ended,
    usage: Usage,
}

struct Reaped {
    /// The process that was started has ended.
    first_ended: bool,
    /// There are no children at all.
    none_left: bool,
}

impl Children {
    /// Takes note of all children that have ended.
    fn reap_ended(&mut self) -> io::Result<Reaped> {
        loop {
            let first_ended = self.ended.ended_nanos != 0;
            match sys::ended_child()? {
                sys::EndedChild::None => return Ok(Reaped { first_ended, none_left: true }),
                sys::EndedChild::NotYet => return Ok(Reaped { first_ended, none_left: false }),
                sys::EndedChild::Pid(pid) => {
                    if pid == self.first {
                        self.ended.ended_nanos = Moment::now().0;
                        // While it is not reaped its process group cannot be anybody else's.
                        sys::kill_group(pid);
                    }
                    let (status, usage) = sys::reap(pid)?;
                    self.usage.add(&usage);
                    if pid == self.first {
                        self.ended.exit_code =
                            if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { 0 };
                        self.ended.signal =
                            if libc::WIFSIGNALED(status) { libc::WTERMSIG(status) } else { 0 };
                    }
                }
            }
        }
    }

    fn report(mut self) -> Ended {
        if self.ended.ended_nanos == 0 {
            self.ended.ended_nanos = Moment::now().0;
        }
        self.ended.usage = Some(self.usage.into_wire());
        self.ended
    }
}

/// Sums up rusage. Each child's covers the children that it waited for itself, so nothing is counted twice. The largest
/// resident set is never below the runner's own few MiB, which the child shares until it execs.
#[derive(Default)]
struct Usage {
    user: Duration,
    system: Duration,
    wire: gorego::ResourceUsage,
}

impl Usage {
    fn add(&mut self, usage: &libc::rusage) {
        let time = |time: libc::timeval| {
            Duration::from_secs(time.tv_sec.try_into().unwrap_or(0))
                + Duration::from_micros(time.tv_usec.try_into().unwrap_or(0))
        };
        self.user += time(usage.ru_utime);
        self.system += time(usage.ru_stime);
        let wire = &mut self.wire;
        wire.max_resident_bytes = wire.max_resident_bytes.max(usage.ru_maxrss.saturating_mul(1024));
        for (sum, part) in [
            (&mut wire.minor_page_faults, usage.ru_minflt),
            (&mut wire.major_page_faults, usage.ru_majflt),
            (&mut wire.blocks_read, usage.ru_inblock),
            (&mut wire.blocks_written, usage.ru_oublock),
            (&mut wire.voluntary_context_switches, usage.ru_nvcsw),
            (&mut wire.involuntary_context_switches, usage.ru_nivcsw),
        ] {
            *sum = sum.saturating_add(part);
        }
    }

    fn into_wire(self) -> gorego::ResourceUsage {
        gorego::ResourceUsage {
            user_time: self.user.try_into().ok(),
            system_time: self.system.try_into().ok(),
            ..self.wire
        }
    }
}

fn c_strings(strings: Vec<Vec<u8>>) -> io::Result<Vec<CString>> {
    strings.into_iter().map(|string| CString::new(string).map_err(io::Error::from)).collect()
}
