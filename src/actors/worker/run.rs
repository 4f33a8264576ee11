//! One run, step by step: workspace, inputs, command, outputs, result.
//!
//! This file defines the order of the steps and what a failure in each means. It blocks and runs on a worker's own thread.

use super::{
    WorkerSettings,
    checkpoint::{Checkpoint, cancelled},
    clock::{Moment, Point, Timeline},
    command::{self, Launch},
    exec_root::ExecRoot,
    inputs,
    launcher::{Ending, Launcher, Ran, is_full},
    messages::{
        Account, RunAction, RunControl, RunFailure, RunOrder, RunReport, RunResult, RunStage, StageReached,
    },
    outputs, run_log,
    staged_trees::TreeLease,
    store::{BlobStore, Outputs},
    workspace::Workspace,
};
use crate::{
    actors::cas::{client::Provenance, results::check_size},
    disk::Space,
    log_streams::{
        LiveRun,
        run::{LogKind, RunLogs},
    },
    logging::{Event, Field},
};
use gorego_reapi::{
    digest::Digest,
    error::{Error, Result},
    proto::reapi,
};
use rustix::{
    fs::{self as rfs, OFlags},
    process::geteuid,
};
use std::{
    fs::File,
    io::{Read as _, Write as _},
    path::Path,
    thread,
    time::{Duration, Instant, SystemTime},
};

const ACTION_FINISHED: &str = "action_finished";
const RESULT_NOT_RECORDED: &str = "result_not_recorded";

/// The exit code of a process that a signal ended is this plus the signal (EXE-46).
pub(super) const SIGNAL_BASE: i32 = 128;
/// How long an action waits in its slot for space on a full disk. Queued actions would only fail in its place.
const ROOM_WAIT: Duration = Duration::from_secs(5);
/// How long an action that ran out of disk space waits for more before it is tried again.
const MORE_ROOM_WAIT: Duration = Duration::from_secs(2);
/// How often the disk is checked while an action waits.
const ROOM_POLL: Duration = Duration::from_millis(20);
/// How much of a log is kept when its command may still be writing. It is small, so that keeping it takes little time.
const SALVAGED_BYTES: u64 = 4 * 1024 * 1024;

/// The state of one run.
pub(super) struct ActionRun<'a> {
    settings: &'a WorkerSettings,
    store: &'a dyn BlobStore,
    launcher: &'a mut dyn Launcher,
    order: &'a RunOrder,
    control: &'a RunControl,
    timeline: Timeline,
    result: reapi::ActionResult,
    /// The end of the command, once it has ended.
    ran: Option<Ran>,
    /// The disk space when the run began.
    room_at_start: Option<Space>,
    /// Whether the disk stayed full for [`ROOM_WAIT`].
    waited_in_vain: bool,
}

impl<'a> ActionRun<'a> {
    pub(super) fn new(
        settings: &'a WorkerSettings,
        store: &'a dyn BlobStore,
        launcher: &'a mut dyn Launcher,
        RunAction { order, control }: &'a RunAction,
    ) -> Self {
        let timeline = Timeline::start(order.queued_at, SystemTime::now(), Moment::now());
        Self {
            settings,
            store,
            launcher,
            order,
            control,
            timeline,
            result: reapi::ActionResult::default(),
            ran: None,
            room_at_start: None,
            waited_in_vain: false,
        }
    }

    /// Runs the action to its end.
    pub(super) fn execute(mut self) -> RunReport {
        let mut batch = self.begin_outputs();
        let stored = match self.steps(&mut *batch) {
            Ok(()) => Ok(batch),
            Err(error) => {
                // Gives back its reserved room before the disk is relieved.
                drop(batch);
                Err(self.relieved(error))
            }
        };
        self.note(Point::WorkerEnd);
        let usage = self.ran.as_ref().map(|ran| &ran.usage);
        self.result.execution_metadata = Some(self.timeline.metadata(self.worker(), usage));
        let outcome = stored.and_then(|batch| self.keep(batch));
        self.log(&outcome);
        let account = self.account(&outcome);
        match outcome {
            Ok(()) => Ok(Box::new(RunResult { result: self.result, account })),
            Err(error) => Err(RunFailure {
                // After the wait it is better to let the client retry than to occupy a slot.
                retryable: is_workers_fault(&error) && !self.waited_in_vain,
                // Without a command that ran there is no partial result.
                partial: self.ran.is_some().then(|| Box::new(self.result)),
                error,
                account: Box::new(account),
            }),
        }
    }

    fn steps(&mut self, batch: &mut dyn Outputs) -> Result<()> {
        let action = &self.order.action;
        let fetching =
            Checkpoint::new(&self.control.cancel, "fetching the inputs", self.settings.transfer_timeout);
        fetching.check()?;
        // The scheduler knows this without a message.
        self.note(Point::FetchStart);
        self.wait_for_room(&fetching)?;
        let workspace = self.settings.build_root.create(self.order.slot, &action.digest)?;
        let outcome = self.steps_in(&workspace, &fetching, batch);
        if let Err(Error::DiskFull(_)) = outcome {
            // Free the space before a retry.
            workspace.remove_now();
        }
        outcome
    }

    fn steps_in(
        &mut self,
        workspace: &Workspace,
        fetching: &Checkpoint,
        batch: &mut dyn Outputs,
    ) -> Result<()> {
        let action = &self.order.action;
        // Held to the end, so that the inputs are not evicted while the action runs.
        let staged = self.store.stage_inputs(&action.instance, action.input_root, self.order.peer)?;
        let base = if self.settings.has_layers() {
            workspace.stage(&*staged, action.instance.blobs(), fetching)?
        } else {
            None
        };
        match &base {
            Some(base) => inputs::write_delta(&*staged, &base.delta, workspace.root()?, fetching)?,
            None => inputs::write(&*staged, workspace.root()?, false, fetching)?,
        }
        let base = base.map(|base| base.lease);
        let root = ExecRoot::new(workspace.root()?, base.as_ref().map(TreeLease::tree));
        let is_root = self.settings.sandbox.is_none() && geteuid().is_root();
        inputs::prepare(staged.tree(), root, &action.command, is_root, fetching)?;
        let layers = base.as_ref().map(|base| workspace.layers(&base.path())).transpose()?;
        self.note(Point::FetchEnd);

        fetching.check()?;
        // Ends the streams when it is dropped, before the workspace is (EXE-64).
        let live = self.settings.log_streams.begin_run(&action.instance, workspace.path());
        let logs = live.as_ref().map(LiveRun::logs);
        self.enter(RunStage::Running, Point::RunStart, logs);
        let launch = Launch::new(&action.command, workspace, layers, self.settings.max_output_file_bytes);
        let watch = self.settings.build_root.disk().begin(self.control.cancel.clone());
        let ran = self.launcher.run(&launch, action.timeout, &self.control.cancel);
        if let Some(space) = watch.end() {
            self.salvage_logs(workspace, live.as_ref());
            return Err(Error::DiskFull(format!(
                "the disk of this server was full while the action ran ({space}), so its outputs may be incomplete"
            )));
        }
        let ran = ran.inspect_err(|_| self.salvage_logs(workspace, live.as_ref()))?;
        self.timeline.note(Point::RunStart, ran.started);
        self.timeline.note(Point::RunEnd, ran.ended);
        let ending = ran.ending;
        self.ran = Some(ran);

        self.enter(RunStage::Uploading, Point::UploadStart, logs);
        let stored = self.conclude(ending, workspace, root, live.as_ref(), batch);
        self.note(Point::UploadEnd);
        // Without this check, outputs that somebody removed would look like outputs that were never made.
        workspace.check_in_place()?;
        stored
    }

    /// While the disk is full, waits in the slot for a while, instead of letting one action after the other fail.
    fn wait_for_room(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        let disk = self.settings.build_root.disk();
        self.room_at_start = disk.look();
        if self.room_at_start.is_none_or(|space| !space.is_exhausted()) {
            return Ok(());
        }
        self.relieve_disk(&|| self.control.cancel.is_cancelled());
        let end = Instant::now() + ROOM_WAIT;
        loop {
            self.room_at_start = disk.look();
            let Some(space) = self.room_at_start.filter(|space| !space.has_room()) else { return Ok(()) };
            checkpoint.check()?;
            if Instant::now() >= end {
                self.waited_in_vain = true;
                return Err(Error::Unavailable(format!(
                    "the disk of this server has no room to run the action: {space}"
                )));
            }
            thread::sleep(ROOM_POLL);
        }
    }

    fn relieve_disk(&self, is_cancelled: &dyn Fn() -> bool) {
        self.settings.build_root.relieve_disk();
        self.store.relieve_disk(is_cancelled);
    }

    /// A full disk is a temporary failure of this server: the store frees space, and the action may be retried once there is
    /// more than it had.
    fn relieved(&self, error: Error) -> Error {
        let Error::DiskFull(message) = error else { return error };
        let is_cancelled = || self.control.cancel.is_cancelled();
        self.relieve_disk(&is_cancelled);
        let disk = self.settings.build_root.disk();
        let end = Instant::now() + MORE_ROOM_WAIT;
        while let Some((before, now)) = self.room_at_start.zip(disk.look())
            && !now.has_more_than(&before)
            && !is_cancelled()
            && Instant::now() < end
        {
            thread::sleep(ROOM_POLL);
        }
        if is_cancelled() { cancelled() } else { Error::Unavailable(message) }
    }

    /// Converts the end of the command to exit code, logs and outputs.
    fn conclude(
        &mut self,
        ending: Ending,
        workspace: &Workspace,
        root: ExecRoot<'_>,
        live: Option<&LiveRun>,
        batch: &mut dyn Outputs,
    ) -> Result<()> {
        let action = &self.order.action;
        outputs::open_up(workspace.top()?)?;
        let interrupted = self.record_ending(ending, workspace)?;
        self.store_logs(workspace, live, batch)?;
        if let Some(error) = interrupted {
            // EXE-45: only the logs so far are reported. A killed command has no exit code of its own.
            self.result.exit_code = SIGNAL_BASE + libc::SIGKILL;
            return Err(error);
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

    /// Sets the exit code. Returns the error of a command that was interrupted, of which only the logs are kept.
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
            // The same exit code as for any other file that grows too large.
            Ending::LogTooLong(_) => SIGNAL_BASE + libc::SIGXFSZ,
            Ending::TimedOut => {
                return Ok(Some(Error::DeadlineExceeded(format!(
                    "the command ran longer than its timeout of {:?} and was killed",
                    action.timeout
                ))));
            }
            Ending::Cancelled => return Ok(Some(cancelled())),
            Ending::LogLost(kind, errno) => {
                self.result.exit_code = SIGNAL_BASE + libc::SIGKILL;
                return Err(log_lost(kind, errno));
            }
        };
        Ok(None)
    }

    /// Stores the logs, which ends their streams. A log that is empty (EXE-59) or was removed by the command has no digest.
    fn store_logs(
        &mut self,
        workspace: &Workspace,
        live: Option<&LiveRun>,
        batch: &mut dyn Outputs,
    ) -> Result<()> {
        let top = workspace.top()?;
        let mut store = |kind: LogKind| {
            let name = kind.name();
            let is_empty = super::dir::stat_at(top, name.as_ref()).map_or(true, |stat| stat.st_size == 0);
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

    /// Keeps what there is of the logs when the runner was lost. Some processes may still be writing, so the files are copied,
    /// never moved into the store. Errors are ignored: the run has failed for another reason.
    fn salvage_logs(&self, workspace: &Workspace, live: Option<&LiveRun>) {
        for kind in [LogKind::Stdout, LogKind::Stderr] {
            let salvage = || {
                let file = outputs::open_regular(workspace.top()?, kind.name(), kind.name())?;
                let mut bytes = Vec::new();
                file.take(SALVAGED_BYTES).read_to_end(&mut bytes).map_err(Error::internal)?;
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

    /// The report for users. A text that cannot be stored is left out, since the outcome of the run matters more.
    fn account(&self, outcome: &Result<()>) -> Account {
        let facts = self.facts();
        let text = run_log::render(&facts, self.ran.as_ref(), outcome.as_ref().err());
        Account {
            message: self.ran.as_ref().map_or_else(String::new, |ran| run_log::message(ran, &facts)),
            log: text.and_then(|text| self.store_bytes(text.into_bytes()).ok()),
        }
    }

    fn store_bytes(&self, bytes: Vec<u8>) -> Result<Digest> {
        let mut batch = self.begin_outputs();
        let digest = batch.bytes(bytes)?;
        batch.commit()?;
        Ok(digest)
    }

    fn begin_outputs(&self) -> Box<dyn Outputs + 'a> {
        let action = &self.order.action;
        self.store.begin_outputs(&action.instance, action.digest.function())
    }

    fn facts(&self) -> run_log::Facts<'_> {
        let size = |digest: &Option<reapi::Digest>| digest.as_ref().map_or(0, |digest| digest.size_bytes);
        run_log::Facts {
            action: &self.order.action,
            worker: self.worker(),
            timeline: &self.timeline,
            transfer_timeout: self.settings.transfer_timeout,
            max_file_bytes: self.settings.max_output_file_bytes,
            stdout_bytes: size(&self.result.stdout_digest),
            stderr_bytes: size(&self.result.stderr_digest),
            is_noexec: self.result.exit_code == command::EXIT_NOT_EXECUTABLE
                && self.settings.build_root.is_noexec(),
        }
    }

    /// Records the result and makes it visible together with the outputs.
    fn keep(&self, mut batch: Box<dyn Outputs + '_>) -> Result<()> {
        self.record(&mut *batch);
        batch.commit()
    }

    /// EXE-18 to EXE-20: only successes are recorded. A result that cannot be cached is still valid.
    fn record(&self, batch: &mut dyn Outputs) {
        let action = &self.order.action;
        if action.do_not_cache || self.result.exit_code != 0 {
            return;
        }
        let provenance = Provenance {
            worker: self.worker(),
            tool_invocation_id: self.order.tool_invocation_id.clone(),
            peer: String::new(),
        };
        if let Err(error) = batch.result(action.digest, self.result.clone(), provenance) {
            Event::warn("gorego::worker", RESULT_NOT_RECORDED)
                .with("task", self.order.task.0)
                .with_shown("action_digest", &action.digest)
                .with_shown("error", &error)
                .log(format_args!("a result could not be written to the action cache"));
        }
    }

    fn worker(&self) -> String {
        self.order.slot.worker(&self.settings.name)
    }

    fn enter(&mut self, stage: RunStage, point: Point, logs: Option<RunLogs>) {
        self.note(point);
        let at = self.timeline.wall(point);
        let &RunOrder { task, attempt, .. } = self.order;
        self.control.progress.do_send(StageReached { task, attempt, stage, at, logs });
    }

    fn note(&mut self, point: Point) {
        self.timeline.note(point, Moment::now());
    }

    /// Logs the run for debugging a worker. The scheduler logs the outcome of each operation once.
    fn log(&self, outcome: &Result<()>) {
        let millis = |from, to| self.timeline.between(from, to).as_millis() as u64;
        let action = &self.order.action;
        Event::debug("gorego::worker", ACTION_FINISHED)
            .with("task", self.order.task.0)
            .with("pool", &*self.settings.pool)
            .with("slot", self.order.slot.0)
            .with_shown("action_digest", &action.digest)
            .with("instance", action.instance.name())
            .with("fetch_ms", millis(Point::FetchStart, Point::FetchEnd))
            .with("run_ms", millis(Point::RunStart, Point::RunEnd))
            .with("upload_ms", millis(Point::UploadStart, Point::UploadEnd))
            .with_some("exit_code", outcome.is_ok().then_some(self.result.exit_code))
            .with_some("error", outcome.as_ref().err().map(|error| Field::Shown(error)))
            .log(format_args!("an action ended"));
    }
}

/// Whether another worker, or this one later, may succeed.
pub(super) fn is_workers_fault(error: &Error) -> bool {
    match error {
        Error::Internal(_) | Error::Unavailable(_) => true,
        Error::Invalid(_)
        | Error::NotFound(_)
        | Error::MissingBlobs(_)
        | Error::Precondition(_)
        | Error::OutOfRange(_)
        | Error::Exhausted { .. }
        | Error::DiskFull(_)
        | Error::Denied(_)
        | Error::Unimplemented(_)
        | Error::Cancelled(_)
        | Error::DeadlineExceeded(_)
        | Error::DataLoss(_) => false,
    }
}

/// The error of a run whose log could not be kept, which is not the fault of the command.
fn log_lost(kind: LogKind, errno: i32) -> Error {
    let what = format!("the command was stopped because its {} could not be kept", kind.name());
    if is_full(errno) {
        return Error::DiskFull(format!("{what}: the disk of this server is full (execution.build_root)"));
    }
    Error::Internal(format!("{what}: {}", std::io::Error::from_raw_os_error(errno)))
}

/// Appends a line of the server to a log of the command.
fn append(workspace: &Workspace, name: &str, line: &str) -> Result<()> {
    let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rfs::openat(workspace.top()?, Path::new(name), flags, rfs::Mode::empty())
        .map_err(std::io::Error::from)
        .and_then(|file| File::from(file).write_all(line.as_bytes()))
        .map_err(|error| Error::io(&format!("write to {name}"), &error))
}
