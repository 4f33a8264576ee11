//! [`ToolProcess`]: a command that outlives one action and talks to this server over its standard input and output.
//!
//! A tool has a runner of its own, and therefore a user and a cell of its own. For the runner it is a command like any
//! other, except that it gets two pipes ([`Pipes`]). All its processes are killed when this value is dropped, when the
//! runner ends, and when the server dies. No call here waits for a tool beyond the deadline.

use super::{
    CANCEL_POLL, Launcher as _, PoolSandbox, RunnerLauncher, exhausted,
    guard::{Guard, Violation},
    open_files::{receive_open, send_open},
    protocol::{self, Ended, FromRunner, IncompleteLog, Order, Reply, Run, ToRunner},
    reap, sys,
};
use crate::{
    actors::worker::{cancel::CancelToken, command::Launch},
    cgroups::Groups,
    limits::Limits,
};
use gorego_reapi::{
    error::{Error, Result},
    proto::gorego,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{self as rfs, Gid, OFlags, Uid},
    io::Errno,
    pipe::{PipeFlags, pipe_with},
};
use std::{
    ffi::OsString,
    fs,
    io::{self, ErrorKind},
    ops::ControlFlow,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::net::UnixStream,
    },
    time::{Duration, Instant},
};

/// Maximum number of bytes that a tool may print to its standard error during its whole life. The log is shown only if
/// the tool fails.
const MAX_LOG_BYTES: u64 = 64 * 1024 * 1024;
/// How long to wait for the report of the runner after a tool has closed its output.
const REASON_WAIT: Duration = Duration::from_secs(1);
/// Maximum size of one read.
const READ_BYTES: usize = 64 * 1024;
/// Maximum number of processes of a tool that are inspected for its usage.
const MOST_PROCESSES: usize = 10_000;

/// The tool's ends of its two pipes.
#[derive(Debug)]
pub(in super::super) struct Pipes {
    /// The read end of the pipe for requests.
    pub requests: OwnedFd,
    /// The write end of the pipe for answers.
    pub answers: OwnedFd,
}

/// A tool that was started.
#[derive(Debug)]
pub(in super::super) struct ToolProcess {
    launcher: RunnerLauncher,
    requests: OwnedFd,
    answers: OwnedFd,
    limits: Limits,
}

/// Why a request was not answered.
#[derive(Debug, PartialEq, Eq)]
pub(in super::super) enum ExchangeError {
    /// The tool cannot be used any more. The text is the reason.
    Broken(String),
    /// The deadline has passed.
    TimedOut,
    /// The action was cancelled.
    Cancelled,
}

/// The resource usage of a tool's processes at one point in time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in super::super) struct Sample {
    /// CPU time in user mode of all processes since their start.
    pub user: Duration,
    /// CPU time in the kernel of all processes since their start.
    pub system: Duration,
    /// Current resident memory in bytes. Memory that processes share is counted for each of them.
    pub memory: u64,
}

impl Pipes {
    /// Receives the pipes that follow an order.
    pub(super) fn receive(socket: &UnixStream) -> io::Result<Self> {
        let files = receive_open(socket)?.ok_or(ErrorKind::UnexpectedEof)?;
        let [requests, answers]: [OwnedFd; 2] = files.try_into().map_err(|_| ErrorKind::InvalidData)?;
        Ok(Self { requests, answers })
    }

    /// Changes the owner of the pipes, so that this user and group can open `/dev/stdout` again.
    pub(super) fn give_to(&self, owner: Option<(u32, u32)>) -> io::Result<()> {
        let Some((user, group)) = owner else { return Ok(()) };
        for pipe in [&self.requests, &self.answers] {
            rfs::fchown(pipe, Some(Uid::from_raw(user)), Some(Gid::from_raw(group)))?;
        }
        Ok(())
    }
}

/// Maximum size in bytes of a log of the command.
pub(super) fn max_log_bytes(run: &Run) -> u64 {
    if run.has_pipes { run.max_file_bytes.min(MAX_LOG_BYTES) } else { run.max_file_bytes }
}

impl ToolProcess {
    /// Starts a tool with a runner of its own. If the program cannot be executed, the first exchange fails.
    ///
    /// # Errors
    /// If no runner can be started.
    pub(in super::super) fn start(
        runner: &[OsString],
        sandbox: Option<&PoolSandbox>,
        groups: Option<&Groups>,
        launch: &Launch,
    ) -> Result<Self> {
        let failed = |error: io::Error| Error::io("start a tool", &error);
        let ((their_requests, requests), (answers, their_answers)) = (pipe()?, pipe()?);
        for ours in [&requests, &answers] {
            rfs::fcntl_setfl(ours, OFlags::NONBLOCK).map_err(|error| failed(error.into()))?;
        }
        let mut launcher = RunnerLauncher::new(runner.to_vec(), sandbox);
        if let Some(groups) = groups {
            launcher = launcher.grouped(groups);
        }
        if let Some(group) = &mut launcher.group {
            group.begin(&launch.limits).map_err(failed)?;
        }
        launcher.warm_up();
        let run = Run { has_pipes: true, ..launcher.order(launch) };
        let socket = launcher.runner.as_ref().and_then(|runner| runner.socket.as_ref());
        let socket = socket.ok_or_else(|| Error::internal("could not start a runner process for a tool"))?;
        let order = ToRunner { order: Some(Order::Run(run)) };
        protocol::write(socket, &order).map_err(failed)?;
        send_open(socket, &[their_requests.as_fd(), their_answers.as_fd()]).map_err(failed)?;
        Ok(Self { launcher, requests, answers, limits: launch.limits })
    }

    /// Why the tool cannot be used any more: it has ended, or has printed something without a request. `None` if it can
    /// be used.
    pub(in super::super) fn problem(&self) -> Option<String> {
        let socket = self.socket()?;
        let mut fds = [PollFd::new(&self.answers, PollFlags::IN), PollFd::new(socket, PollFlags::IN)];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        match poll(&mut fds, Some(&at_once)) {
            Ok(0) => None,
            _ => Some(self.reason("it ended or printed something between two requests")),
        }
    }

    /// Sends a request, and passes the tool's output to `hear` until `hear` returns the answer.
    ///
    /// # Errors
    /// The reason why there is no answer. The tool must not be used again then.
    pub(in super::super) fn exchange<T>(
        &self,
        request: &[u8],
        deadline: Option<Instant>,
        cancel: &CancelToken,
        mut hear: impl FnMut(&[u8]) -> ControlFlow<std::result::Result<T, String>>,
    ) -> std::result::Result<T, ExchangeError> {
        let socket = self.socket().ok_or_else(|| ExchangeError::Broken("its runner is gone".into()))?;
        let runner = self.launcher.runner.as_ref().map_or(0, |runner| runner.child.id());
        let mut guard = self.launcher.guard(&self.limits, runner, None);
        let (mut unsent, mut buffer) = (request, vec![0; READ_BYTES]);
        loop {
            let ready = self.wait(socket, !unsent.is_empty(), deadline, cancel, &mut guard)?;
            if ready.answers {
                match rustix::io::read(&self.answers, &mut *buffer) {
                    Ok(0) => return Err(ExchangeError::Broken(self.reason("it closed its standard output"))),
                    Ok(read) => {
                        if let ControlFlow::Break(heard) = hear(buffer.get(..read).unwrap_or_default()) {
                            return heard.map_err(ExchangeError::Broken);
                        }
                        continue;
                    }
                    Err(Errno::AGAIN | Errno::INTR) => {}
                    Err(error) => {
                        return Err(ExchangeError::Broken(format!("its answer cannot be read: {error}")));
                    }
                }
            }
            // The output from before the end of the tool was read above.
            if ready.ended {
                return Err(ExchangeError::Broken(self.reason("it ended")));
            }
            if ready.requests {
                match rustix::io::write(&self.requests, unsent) {
                    Ok(sent) => unsent = unsent.get(sent..).unwrap_or_default(),
                    Err(Errno::AGAIN | Errno::INTR) => {}
                    Err(_) => return Err(ExchangeError::Broken(self.reason("it closed its standard input"))),
                }
            }
        }
    }

    /// Waits for one of the events.
    fn wait(
        &self,
        socket: &UnixStream,
        is_sending: bool,
        deadline: Option<Instant>,
        cancel: &CancelToken,
        guard: &mut Guard<'_>,
    ) -> std::result::Result<ToolEvents, ExchangeError> {
        loop {
            let now = Instant::now();
            if cancel.is_stopped() {
                return Err(ExchangeError::Cancelled);
            }
            if deadline.is_some_and(|deadline| now >= deadline) {
                return Err(ExchangeError::TimedOut);
            }
            if let Some(violation) = guard.look() {
                return Err(ExchangeError::Broken(match violation {
                    Violation::Exceeded(exceeded) => format!("it was ended because {exceeded}"),
                    Violation::MemoryShort { .. } => "it lost processes because memory was short".into(),
                }));
            }
            let next = deadline.into_iter().chain(guard.next()).min();
            let mut left = next.map(|next| next.saturating_duration_since(now));
            let mut fds = vec![PollFd::new(&self.answers, PollFlags::IN), PollFd::new(socket, PollFlags::IN)];
            match cancel.event() {
                Some(event) => fds.push(PollFd::from_borrowed_fd(event, PollFlags::IN)),
                None => left = Some(left.map_or(CANCEL_POLL, |left| left.min(CANCEL_POLL))),
            }
            if is_sending {
                fds.push(PollFd::new(&self.requests, PollFlags::OUT));
            }
            let timeout =
                left.map(|left| Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 3600, tv_nsec: 0 }));
            match poll(&mut fds, timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(ExchangeError::Broken(format!("it cannot be waited for: {error}"))),
            }
            let is_ready = |at: usize| fds.get(at).is_some_and(|fd: &PollFd<'_>| !fd.revents().is_empty());
            let ready = ToolEvents {
                answers: is_ready(0),
                ended: is_ready(1),
                requests: is_sending && is_ready(fds.len() - 1),
            };
            if ready.answers || ready.ended || ready.requests {
                return Ok(ready);
            }
        }
    }

    /// How the tool ended. Returns `seen` if that is not known.
    fn reason(&self, seen: &str) -> String {
        let Some(socket) = self.socket() else { return seen.into() };
        let mut fds = [PollFd::new(socket, PollFlags::IN)];
        let wait = Timespec::try_from(REASON_WAIT).ok();
        if !matches!(poll(&mut fds, wait.as_ref()), Ok(1)) {
            return seen.into();
        }
        match protocol::read::<FromRunner>(socket).ok().flatten().and_then(|message| message.reply) {
            Some(Reply::Ended(ended)) => {
                let reached = exhausted::reached(&ended).map(|reached| format!("; {reached}"));
                describe_ending(&ended) + &reached.collect::<String>()
            }
            Some(Reply::Failed(failed)) => failed.message,
            None => "its runner ended".into(),
        }
    }

    /// The usage of the tool's processes, as far as the kernel reports it.
    pub(in super::super) fn sample(&self) -> Sample {
        let Some(runner) = &self.launcher.runner else { return Sample::default() };
        let mut sum = Sample::default();
        for pid in reap::descendants(runner.child.id(), MOST_PROCESSES) {
            let one = fs::read_to_string(format!("/proc/{pid}/stat")).ok();
            let Some(one) = one.as_deref().and_then(Sample::of_stat) else { continue };
            sum.user += one.user;
            sum.system += one.system;
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            sum.memory = sum.memory.saturating_add(resident(&status));
        }
        sum
    }

    fn socket(&self) -> Option<&UnixStream> {
        self.launcher.runner.as_ref()?.socket.as_ref()
    }
}

impl Drop for ToolProcess {
    /// Leaves no process behind, even if the runner was killed.
    fn drop(&mut self) {
        self.launcher.reset();
    }
}

/// Which of the awaited events have happened.
struct ToolEvents {
    answers: bool,
    ended: bool,
    requests: bool,
}

impl Sample {
    /// The CPU times in `/proc/PID/stat`, of the process and of the children that it has reaped.
    fn of_stat(stat: &str) -> Option<Self> {
        // The name of the program is in parentheses, and may itself contain parentheses and spaces.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
        let ticks = |field: usize| fields.get(field)?.parse::<u64>().ok();
        let second = sys::ticks_per_second();
        let time = |ticks: u64| Duration::from_nanos(ticks.saturating_mul(1_000_000_000 / second));
        // Field 14 of the file has index 11 after the name.
        let (user, system) = (ticks(11)? + ticks(13)?, ticks(12)? + ticks(14)?);
        Some(Self { user: time(user), system: time(system), memory: 0 })
    }

    /// The usage since an earlier sample. The times of a process that ended in between may be missing.
    pub(in super::super) fn since(self, earlier: Self) -> gorego::ResourceUsage {
        gorego::ResourceUsage {
            user_time: self.user.saturating_sub(earlier.user).try_into().ok(),
            system_time: self.system.saturating_sub(earlier.system).try_into().ok(),
            max_resident_bytes: i64::try_from(self.memory).unwrap_or(i64::MAX),
            ..Default::default()
        }
    }
}

/// The resident memory (VmRSS) in `/proc/PID/status`, in bytes.
fn resident(status: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kilobytes = line.and_then(|line| line.split_ascii_whitespace().next()?.parse::<u64>().ok());
    kilobytes.unwrap_or(0).saturating_mul(1024)
}

fn describe_ending(ended: &Ended) -> String {
    match ended {
        Ended { incomplete_log: Some(IncompleteLog { errno: 0, .. }), .. } => {
            format!("it printed more than {MAX_LOG_BYTES} bytes to its standard error")
        }
        Ended { incomplete_log: Some(_), .. } => "its standard error could not be kept".into(),
        Ended { not_started: errno @ 1.., .. } => {
            format!("it could not be started: {}", io::Error::from_raw_os_error(*errno))
        }
        Ended { signal: signal @ 1.., .. } => format!("it was ended by signal {signal}"),
        Ended { exit_code, .. } => format!("it ended with exit code {exit_code}"),
    }
}

fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    pipe_with(PipeFlags::CLOEXEC).map_err(|error| Error::io("start a tool", &error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_times_of_a_process_are_found_whatever_its_name_is() {
        let stat = "7 (a) S (b c) S 1 7 7 0 -1 4194560 1 2 3 4 150 25 50 75 20 0 1 0 100 1 1";
        let sample = Sample::of_stat(stat).unwrap();
        let ticks = sys::ticks_per_second();
        let time = |count: u64| Duration::from_nanos(count * (1_000_000_000 / ticks));
        assert_eq!((sample.user, sample.system), (time(200), time(100)));
        assert_eq!(Sample::of_stat("7 (x) S"), None);
        assert_eq!(resident("Name:\tx\nVmRSS:\t  12 kB\n"), 12 * 1024);
    }
}
