//! Turns the end of a command into the exit code, logs and outputs of its result.

use super::{ActionRun, errors::log_lost};
use crate::{
    actors::{
        cas::results::check_size,
        worker::{
            build_root::Workspace,
            checkpoint::{Checkpoint, cancelled},
            command::{self, SIGNAL_BASE},
            dir,
            exec_root::ExecRoot,
            launcher::Ending,
            outputs, run_log,
            store::Outputs,
        },
    },
    log_streams::{LiveRun, run::LogKind},
};
use gorego_reapi::{
    digest::Digest,
    error::{Error, Result},
    proto::reapi,
};
use rustix::fs::{self as rfs, OFlags};
use std::{
    fs::File,
    io::{Read as _, Write as _},
    path::Path,
};

/// How much of a log is kept if its command may still be writing. The limit is small, so that copying takes little
/// time.
const MAX_PARTIAL_LOG_BYTES: u64 = 4 * 1024 * 1024;

impl ActionRun<'_> {
    /// Converts how the command ended into exit code, logs and outputs.
    pub(super) fn conclude(
        &mut self,
        ending: Ending,
        workspace: &Workspace,
        root: ExecRoot<'_>,
        live: Option<&LiveRun>,
        batch: &mut dyn Outputs,
    ) -> Result<()> {
        let action = &self.order.action;
        outputs::restore_permissions(workspace.top()?)?;
        let interrupted = self.record_ending(ending, workspace)?;
        self.store_logs(workspace, live, batch)?;
        if let Some(error) = interrupted {
            // EXE-45: only the logs so far are reported. A killed command has no exit code of its own.
            self.result.exit_code = SIGNAL_BASE + libc::SIGKILL;
            return Err(error);
        }
        if matches!(ending, Ending::Exceeded(_)) {
            // The outputs of a command that exceeded a limit are incomplete, and may be large.
            return Ok(());
        }
        let uploading =
            Checkpoint::new(&self.control.cancel, "storing the outputs", self.settings.transfer_timeout);
        outputs::collect(root, action, batch, &uploading, &mut self.result)?;
        check_size(&self.result).inspect_err(|_| {
            // Keep the logs, which may say why there are so many outputs.
            let logs = (self.result.stdout_digest.take(), self.result.stderr_digest.take());
            let exit_code = self.result.exit_code;
            self.result = reapi::ActionResult { exit_code, ..Default::default() };
            (self.result.stdout_digest, self.result.stderr_digest) = logs;
        })
    }

    /// Sets the exit code. Returns the error of a command that was interrupted. Only the logs of such a command are
    /// kept.
    fn record_ending(&mut self, ending: Ending, workspace: &Workspace) -> Result<Option<Error>> {
        let action = &self.order.action;
        self.result.exit_code = match ending {
            Ending::Exited(code) => code,
            Ending::Signalled(signal) => SIGNAL_BASE.saturating_add(signal),
            Ending::NotStarted(errno) => {
                let is_noexec = self.settings.build_root.is_noexec();
                let (code, message) = command::not_started(&action.command, errno, is_noexec);
                self.result.exit_code = code;
                append(workspace, "stderr", &message)?;
                code
            }
            // This is the exit code that any other file that grows too large leads to.
            Ending::LogTooLong(_) => SIGNAL_BASE + libc::SIGXFSZ,
            Ending::TimedOut => {
                return Ok(Some(Error::DeadlineExceeded(format!(
                    "the command ran longer than its timeout of {:?} and was killed",
                    action.timeout
                ))));
            }
            Ending::Cancelled => return Ok(Some(cancelled())),
            // The command is at fault, so this is its result. Clients would retry after an error.
            Ending::Exceeded(_) => SIGNAL_BASE + libc::SIGKILL,
            Ending::MemoryShort { used, total } => {
                return Ok(Some(Error::Unavailable(run_log::memory_short(used, total))));
            }
            Ending::LogLost(kind, errno) => {
                self.result.exit_code = SIGNAL_BASE + libc::SIGKILL;
                return Err(log_lost(kind, errno));
            }
        };
        Ok(None)
    }

    /// Stores the logs, which ends their streams. A log without bytes (EXE-59) does not exist, or was removed or
    /// truncated by the command. It has no digest.
    fn store_logs(
        &mut self,
        workspace: &Workspace,
        live: Option<&LiveRun>,
        batch: &mut dyn Outputs,
    ) -> Result<()> {
        let top = workspace.top()?;
        let mut store = |kind: LogKind| {
            let name = kind.name();
            let is_empty = dir::stat_at(top, name.as_ref()).map_or(true, |stat| stat.st_size == 0);
            if is_empty {
                return Ok(None);
            }
            batch.file(top, name, outputs::open_regular(top, name, name)?).map(Some)
        };
        let (stdout, stderr) = (store(LogKind::Stdout)?, store(LogKind::Stderr)?);
        batch.publish()?;
        if let Some(live) = live {
            live.stored(LogKind::Stdout, stdout);
            live.stored(LogKind::Stderr, stderr);
        }
        self.result.stdout_digest = stdout.map(Digest::to_wire);
        self.result.stderr_digest = stderr.map(Digest::to_wire);
        Ok(())
    }

    /// Keeps the existing parts of the logs when the runner was lost. Some processes may still be writing, so the files
    /// are copied and never moved into the store. Errors are ignored: the run has failed for another reason.
    pub(super) fn salvage_logs(&self, workspace: &Workspace, live: Option<&LiveRun>) {
        for kind in [LogKind::Stdout, LogKind::Stderr] {
            let salvage = || {
                let (top, name) = (workspace.top()?, kind.name());
                if dir::stat_at(top, name.as_ref()).is_err_and(|error| dir::is_absence(&error)) {
                    return Ok(None);
                }
                let file = outputs::open_regular(top, name, name)?;
                let mut bytes = Vec::new();
                file.take(MAX_PARTIAL_LOG_BYTES).read_to_end(&mut bytes).map_err(Error::internal)?;
                if bytes.is_empty() {
                    return Ok(None);
                }
                self.store_bytes(bytes).map(Some)
            };
            if let (Some(live), Ok(digest)) = (live, salvage()) {
                live.stored(kind, digest);
            }
        }
    }
}

/// Appends a line of the server to a log of the command, which may have printed nothing so far.
fn append(workspace: &Workspace, name: &str, line: &str) -> Result<()> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::APPEND | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rfs::openat(workspace.top()?, Path::new(name), flags, rfs::Mode::from_raw_mode(0o644))
        .map_err(std::io::Error::from)
        .and_then(|file| File::from(file).write_all(line.as_bytes()))
        .map_err(|error| Error::io(&format!("write to {name}"), &error))
}
