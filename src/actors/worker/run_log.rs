//! Explains a failed run to users: a line for `ExecuteResponse.message`, and a text for `ExecuteResponse.server_logs`
//! (EXE-61). A successful run has neither and costs nothing here. Pure.

use super::{
    clock::{Point, Timeline},
    command::{EXIT_NOT_EXECUTABLE, NOEXEC, SIGNAL_BASE},
    launcher::{Ending, Ran},
};
use crate::{action::Action, size::Size};
use gorego_reapi::{duration, error::Error};
use std::{
    fmt::Write as _,
    time::{Duration, SystemTime},
};

/// Why the sandbox's filter kills a process with SIGSYS.
const FOREIGN_CALLS: &str = "it used system calls of another architecture, such as the calls of a 32-bit program, \
                             which the system call filter of the sandbox forbids (docs/sandbox.md)";

/// The facts of a run, except its ending.
#[derive(Debug)]
pub(super) struct Facts<'a> {
    pub(super) action: &'a Action,
    pub(super) worker: String,
    pub(super) timeline: &'a Timeline,
    pub(super) transfer_timeout: Duration,
    pub(super) max_file_bytes: u64,
    pub(super) stdout_bytes: i64,
    pub(super) stderr_bytes: i64,
    /// Whether the command may have failed because programs in the build root cannot be run.
    pub(super) is_noexec: bool,
}

/// One line about a command that ran; empty when its exit code needs no explanation.
pub(super) fn message(ran: &Ran, facts: &Facts<'_>) -> String {
    let limit = facts.max_file_bytes;
    match ran.ending {
        Ending::Exited(code) if code == SIGNAL_BASE + libc::SIGXFSZ => format!(
            "exit code {code} is how a shell reports a program that wrote a file larger than the {limit} bytes allowed \
             (execution.max_output_file_gb)"
        ),
        Ending::Exited(code) if code == EXIT_NOT_EXECUTABLE && facts.is_noexec => {
            format!("exit code {code} is how a shell reports a program that cannot be run: {NOEXEC}")
        }
        Ending::Exited(code) if code == SIGNAL_BASE + libc::SIGSYS => {
            format!(
                "exit code {code} is how a shell reports a program that was killed by SIGSYS: {FOREIGN_CALLS}"
            )
        }
        Ending::Exited(code) if code != 0 && !ran.reached.is_empty() => {
            format!("exit code {code}: {}", reached(ran))
        }
        Ending::Exited(_) => String::new(),
        Ending::Signalled(signal) => {
            let hint = match signal {
                libc::SIGXFSZ => format!(
                    ": it wrote a file larger than the {limit} bytes allowed (execution.max_output_file_gb)"
                ),
                libc::SIGSYS => format!(": {FOREIGN_CALLS}"),
                _ if !ran.reached.is_empty() => format!(": {}", reached(ran)),
                libc::SIGKILL => ", which this server did not send; it may have run out of memory".into(),
                _ => String::new(),
            };
            format!("the command was killed by {}{hint}", signal_name(signal))
        }
        Ending::NotStarted(_) => "the command could not be started; its stderr says why".into(),
        Ending::TimedOut => format!(
            "the command was killed after {}, its timeout; its output so far is kept: {} bytes of stdout, {} bytes of stderr",
            seconds(facts.action.timeout),
            facts.stdout_bytes,
            facts.stderr_bytes
        ),
        Ending::Cancelled => "the command was killed because no client waits for it any more".into(),
        Ending::LogTooLong(kind) => format!(
            "the command was killed because it printed more to its {} than the {limit} bytes allowed \
             (execution.max_output_file_gb)",
            kind.name()
        ),
        Ending::LogLost(kind, _) => {
            format!("the command was killed because this server could not keep its {}", kind.name())
        }
        Ending::Exceeded(exceeded) => format!("the command was killed because {exceeded}"),
        Ending::MemoryShort { used, total } => memory_short(used, total),
    }
}

/// The limits that a failed command had reached.
fn reached(ran: &Ran) -> String {
    ran.reached.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// The message for a command that lost processes because the memory for all actions together was used up, although this
/// action used at most half of it.
pub(super) fn memory_short(used: u64, total: u64) -> String {
    format!(
        "the kernel killed processes of the command because the memory was used up: {} for all actions together \
         (execution.limits.total_memory_gb); this action used at most {}",
        Size::from_bytes(total).rounded(),
        Size::from_bytes(used).rounded()
    )
}

/// The report about a run. `None` if there is nothing to explain: the run succeeded, the command chose its exit code,
/// or the client already knows the cause.
pub(super) fn render(facts: &Facts<'_>, ran: Option<&Ran>, error: Option<&Error>) -> Option<String> {
    let killed = ran.is_some_and(|ran| {
        matches!(ran.ending, Ending::Signalled(_) | Ending::LogTooLong(_) | Ending::Exceeded(_))
    });
    let is_known = matches!(error, Some(Error::Cancelled(_) | Error::MissingBlobs(_)));
    if is_known || (error.is_none() && !killed) {
        return None;
    }
    let mut text = String::new();
    // Writing to a String does not fail.
    let _ = write_account(&mut text, facts, ran, error);
    Some(text)
}

fn write_account(
    text: &mut String,
    facts: &Facts<'_>,
    ran: Option<&Ran>,
    error: Option<&Error>,
) -> std::fmt::Result {
    let action = facts.action;
    writeln!(text, "action {}", action.digest)?;
    writeln!(text, "instance \"{}\"", action.instance.name())?;
    writeln!(text, "worker {}", facts.worker)?;
    writeln!(text)?;
    write_times(text, facts.timeline)?;
    writeln!(text)?;
    writeln!(
        text,
        "limits: command {}, fetching inputs {}, storing outputs {}, largest file {} bytes",
        seconds(action.timeout),
        seconds(facts.transfer_timeout),
        seconds(facts.transfer_timeout),
        facts.max_file_bytes
    )?;
    if let Some(ran) = ran {
        writeln!(text, "command: {}", describe(ran.ending))?;
        for reached in &ran.reached {
            writeln!(text, "limit: {reached}")?;
        }
        write_usage(text, facts, ran)?;
    }
    match error {
        Some(error) => writeln!(text, "{}: {error}", error.code_name()),
        None => Ok(()),
    }
}

fn write_times(text: &mut String, timeline: &Timeline) -> std::fmt::Result {
    writeln!(text, "{}  queued", time(timeline.queued()))?;
    for (point, what) in [
        (Point::WorkerStart, "the worker took it"),
        (Point::FetchStart, "began to fetch the inputs"),
        (Point::FetchEnd, "the inputs are in place"),
        (Point::RunStart, "started the command"),
        (Point::RunEnd, "the command ended"),
        (Point::UploadStart, "began to store the outputs"),
        (Point::UploadEnd, "done with the outputs"),
        (Point::WorkerEnd, "the worker is done"),
    ] {
        if let Some(at) = timeline.reached(point) {
            writeln!(text, "{}  {what}", time(at))?;
        }
    }
    Ok(())
}

/// How the command ended, in one line.
fn describe(ending: Ending) -> String {
    let killed = |why: &str| format!("{why}; all its processes were killed (SIGKILL)");
    match ending {
        Ending::Exited(code) => format!("exit code {code}"),
        Ending::Signalled(signal) => format!("killed by {}", signal_name(signal)),
        Ending::NotStarted(errno) => {
            format!("not started: {}", std::io::Error::from_raw_os_error(errno))
        }
        Ending::TimedOut => killed("timed out"),
        Ending::Cancelled => killed("cancelled"),
        Ending::LogTooLong(kind) => killed(&format!("its {} grew too long", kind.name())),
        Ending::LogLost(kind, _) => killed(&format!("its {} was not kept", kind.name())),
        Ending::Exceeded(exceeded) => killed(&exceeded.to_string()),
        Ending::MemoryShort { .. } => killed("too little memory for all actions"),
    }
}

fn write_usage(text: &mut String, facts: &Facts<'_>, ran: &Ran) -> std::fmt::Result {
    let usage = &ran.usage;
    let cpu = |time: &Option<prost_types::Duration>| {
        time.as_ref().and_then(duration::from_wire).map_or_else(String::new, seconds)
    };
    writeln!(
        text,
        "used: {} of CPU time, {} in the kernel, {} KiB of memory at most",
        cpu(&usage.user_time),
        cpu(&usage.system_time),
        usage.max_resident_bytes / 1024
    )?;
    writeln!(text, "output: {} bytes of stdout, {} bytes of stderr", facts.stdout_bytes, facts.stderr_bytes)
}

fn time(time: SystemTime) -> impl std::fmt::Display {
    humantime::format_rfc3339_millis(time)
}

fn seconds(duration: Duration) -> String {
    let millis = Duration::from_millis(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX));
    humantime::format_duration(millis).to_string()
}

/// The number and name of a signal, such as `signal 9 (SIGKILL)`.
fn signal_name(signal: i32) -> String {
    let name = match signal {
        libc::SIGHUP => "SIGHUP",
        libc::SIGINT => "SIGINT",
        libc::SIGQUIT => "SIGQUIT",
        libc::SIGILL => "SIGILL",
        libc::SIGTRAP => "SIGTRAP",
        libc::SIGABRT => "SIGABRT",
        libc::SIGBUS => "SIGBUS",
        libc::SIGFPE => "SIGFPE",
        libc::SIGKILL => "SIGKILL",
        libc::SIGUSR1 => "SIGUSR1",
        libc::SIGSEGV => "SIGSEGV",
        libc::SIGUSR2 => "SIGUSR2",
        libc::SIGPIPE => "SIGPIPE",
        libc::SIGALRM => "SIGALRM",
        libc::SIGTERM => "SIGTERM",
        libc::SIGXCPU => "SIGXCPU",
        libc::SIGXFSZ => "SIGXFSZ",
        libc::SIGSYS => "SIGSYS",
        _ => return format!("signal {signal}"),
    };
    format!("signal {signal} ({name})")
}
