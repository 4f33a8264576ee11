//! One run, step by step: workspace, inputs, command, outputs, result.
//!
//! This file defines the order of the steps and the effect of a failure in each. `run/disk_room.rs` waits for disk
//! space, `run/ending.rs` turns the end of a command into a result. All of it blocks and runs on a worker's own thread.

mod counts;
mod disk_room;
mod ending;
mod errors;
mod with_tool;

use super::{
    WorkerSettings,
    build_root::Workspace,
    build_root::staged_trees::{Base, TreeLease},
    checkpoint::Checkpoint,
    clock::{Moment, Point, Timeline},
    command::{self, Launch},
    exec_root::ExecRoot,
    image_store,
    inputs::{self, MountPoints},
    launcher::{Ending, Launcher, Ran},
    messages::{
        Account, RunAction, RunControl, RunFailure, RunOrder, RunReport, RunResult, RunStage, StageReached,
    },
    outputs, run_log,
    store::{BlobStore, Inputs, Outputs},
};
use crate::{
    action::Command,
    actors::cas::client::Provenance,
    disk::Space,
    limits::{Exceeded, LimitedResource, Limits},
    log_streams::{LiveRun, run::RunLogs},
    logging::{Event, Field},
    sandbox::kind::CellKind,
    telemetry::SandboxFailure,
};
use errors::{disk_was_full, explained, is_workers_fault};
use gorego_reapi::{
    digest::Digest,
    error::{Error, Result},
    proto::reapi,
    tree::InputTree,
};
use rustix::process::geteuid;
use std::{borrow::Cow, time::SystemTime};

const ACTION_FINISHED: &str = "action_finished";
const RESULT_NOT_RECORDED: &str = "result_not_recorded";

/// The state of one run.
pub(super) struct ActionRun<'a> {
    settings: &'a WorkerSettings,
    store: &'a dyn BlobStore,
    launcher: &'a mut dyn Launcher,
    order: &'a RunOrder,
    control: &'a RunControl,
    timeline: Timeline,
    result: reapi::ActionResult,
    /// How the command ended, once it has.
    ran: Option<Ran>,
    /// Why a tool failed to run the action, if one was tried.
    tool_failure: Option<String>,
    /// The free disk space when the run began.
    room_at_start: Option<Space>,
    /// Whether the disk was still full after [`disk_room::ROOM_WAIT`].
    room_wait_expired: bool,
    /// Whether the disk was full before all inputs were in place.
    inputs_had_no_room: bool,
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
            tool_failure: None,
            room_at_start: None,
            room_wait_expired: false,
            inputs_had_no_room: false,
        }
    }

    /// Runs the action to its end.
    pub(super) fn execute(mut self) -> RunReport {
        let mut batch = self.begin_outputs();
        let stored = match self.steps(&mut *batch) {
            Ok(()) => Ok(batch),
            Err(error) => {
                // Releases the reserved space before the disk is relieved.
                drop(batch);
                Err(self.relieved(error))
            }
        };
        self.note(Point::WorkerEnd);
        let usage = self.ran.as_ref().map(|ran| &ran.usage);
        self.result.execution_metadata = Some(self.timeline.metadata(self.worker(), usage));
        let outcome = stored.and_then(|batch| self.keep(batch).map_err(|error| self.relieved(error)));
        self.log(&outcome);
        self.count(&outcome);
        let account = self.account(&outcome);
        match outcome {
            Ok(()) => Ok(Box::new(RunResult { result: self.result.into(), account })),
            Err(error) => Err(RunFailure {
                // After the wait it is better that the client retries than that the action occupies a slot.
                retryable: is_workers_fault(&error) && !self.room_wait_expired,
                // There is a partial result only if a command ran.
                partial: self.ran.is_some().then(|| self.result.into()),
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
        // This stage is not reported, because the scheduler assumes it.
        self.note(Point::FetchStart);
        self.wait_for_room(&fetching)?;
        let mut kind = self.settings.kind(action)?;
        // Held to the end of the run, so that the image is not removed meanwhile.
        let image = image_store::lease_for(self.settings, action, self.order.peer, &mut kind, &fetching)?;
        let command = match &image {
            Some(image) => Cow::Owned(image.complete(&action.command)),
            None => Cow::Borrowed(&action.command),
        };
        let (build_root, slot) = (&self.settings.build_root, self.order.slot);
        let workspace = match &self.settings.sandbox {
            Some(sandbox) if sandbox.protections.namespaces => build_root.create_unseen(slot)?,
            _ => build_root.create(slot, &action.digest)?,
        };
        let outcome = self.steps_in(&workspace, kind, &command, &fetching, batch);
        if self.inputs_had_no_room || matches!(outcome, Err(Error::DiskFull(_))) {
            // The space is free before the log of the run is stored, and before a retry.
            workspace.remove_now();
        }
        outcome
    }

    fn steps_in(
        &mut self,
        workspace: &Workspace,
        kind: CellKind,
        command: &Command,
        fetching: &Checkpoint,
        batch: &mut dyn Outputs,
    ) -> Result<()> {
        let action = &self.order.action;
        // Held until the outputs are collected, which may refer to inputs.
        let mut inputs = self.store.open_inputs(&action.instance, action.input_root, self.order.owner())?;
        self.note(Point::StageStart);
        if let Some(ending) = self.run_with_tool(&mut *inputs, &kind, workspace, fetching)? {
            let root = ExecRoot::new(workspace.root()?, None);
            return self.store_outputs(ending, workspace, root, None, batch);
        }
        if kind.has_input_root_as_root() {
            let directory = &action.command.working_directory;
            inputs::check_not_hidden(directory, directory.as_path())?;
        }
        let tree = inputs.tree().clone();
        let staged = self.stage(&mut *inputs, &tree, workspace, fetching);
        self.inputs_had_no_room = matches!(staged, Err(Error::DiskFull(_)));
        let base = staged.map_err(|error| self.with_sizes(error, &tree))?;
        let root = ExecRoot::new(workspace.root()?, base.as_ref().map(TreeLease::tree));
        let mount_points = kind.has_input_root_as_root().then(|| MountPoints::make(root)).transpose()?;
        let is_root = self.settings.sandbox.is_none() && geteuid().is_root();
        inputs::prepare(&tree, root, &action.command, is_root, fetching)?;
        if kind.has_input_root_as_root() {
            let directory = &action.command.working_directory;
            let real = root
                .real_path(directory.as_path())
                .map_err(|error| Error::io("resolve the working directory", &error))?;
            inputs::check_not_hidden(directory, &real)?;
        }
        let layers = base.as_ref().map(|base| workspace.layers(&base.path())).transpose()?;
        self.note(Point::FetchEnd);

        fetching.check()?;
        // Dropping this ends the streams, which must happen before the workspace is dropped (EXE-64).
        let live = self.settings.log_streams.begin_run(&action.instance, workspace.path());
        let logs = live.as_ref().map(LiveRun::logs);
        self.enter(RunStage::Running, Point::RunStart, logs);
        let launch = Launch {
            kind,
            limits: self.limits(),
            ..Launch::new(command, workspace, layers, self.settings.max_output_file_bytes)
        };
        let watch = self.settings.build_root.disk().begin(self.control.cancel.clone());
        let ran = self.launcher.run(&launch, action.timeout, &self.control.cancel);
        if let Some(space) = watch.end() {
            self.settings.metrics.failed(SandboxFailure::DiskFull);
            self.salvage_logs(workspace, live.as_ref());
            return Err(disk_was_full(space));
        }
        let ran = ran.map_err(|error| {
            self.settings.metrics.failed(SandboxFailure::Runner);
            self.salvage_logs(workspace, live.as_ref());
            explained(error, base.as_ref())
        })?;
        self.timeline.note(Point::RunStart, ran.started);
        self.timeline.note(Point::RunEnd, ran.ended);
        let ending = ran.ending;
        self.ran = Some(ran);
        if let Some(made) = mount_points {
            made.remove();
        }
        self.store_outputs(ending, workspace, root, live.as_ref(), batch)?;
        base.as_ref().map_or(Ok(()), TreeLease::check_in_place)
    }

    fn store_outputs(
        &mut self,
        ending: Ending,
        workspace: &Workspace,
        root: ExecRoot<'_>,
        live: Option<&LiveRun>,
        batch: &mut dyn Outputs,
    ) -> Result<()> {
        self.enter(RunStage::Uploading, Point::UploadStart, live.map(LiveRun::logs));
        let stored = self.conclude(ending, workspace, root, live, batch);
        self.note(Point::UploadEnd);
        // Without this check, outputs in a removed directory would look like outputs that were never made.
        workspace.check_in_place()?;
        stored
    }

    /// Puts the inputs into place: as a layer above a staged tree, which is returned, or as copies.
    fn stage(
        &self,
        inputs: &mut dyn Inputs,
        tree: &InputTree,
        workspace: &Workspace,
        checkpoint: &Checkpoint,
    ) -> Result<Option<TreeLease>> {
        let action = &self.order.action;
        let base = match self.settings.can_stage(tree) {
            true => workspace.stage(inputs, tree, action.instance.blobs(), checkpoint)?,
            false => None,
        };
        let Some(Base { lease, delta }) = base else {
            inputs.hold_all()?;
            inputs::write(inputs, workspace.root()?, false, checkpoint)?;
            return Ok(None);
        };
        let mut needed = delta.blobs(tree);
        needed.extend(outputs::named::inputs_named_by(&action.command, tree));
        inputs.hold(needed)?;
        inputs::write_delta(inputs, &delta, workspace.root()?, checkpoint)?;
        Ok(Some(lease))
    }

    /// The explanations for users. A text that cannot be stored is left out, because the outcome of the run matters
    /// more.
    fn account(&self, outcome: &Result<()>) -> Account {
        let facts = self.facts();
        let text = run_log::render(&facts, self.ran.as_ref(), outcome.as_ref().err());
        let of_tool = self.tool_failure.as_ref();
        let of_tool = of_tool.map(|reason| {
            format!("the persistent worker of this action failed, so the action ran without it: {reason}")
        });
        let of_run = self.ran.as_ref().map(|ran| run_log::message(ran, &facts));
        let messages: Vec<_> = of_tool.into_iter().chain(of_run).filter(|text| !text.is_empty()).collect();
        Account {
            message: messages.join("; "),
            log: text.and_then(|text| self.store_bytes(text.into_bytes()).ok()),
            memory: self.ran.as_ref().map_or(0, |ran| ran.usage.max_resident_bytes.max(0).unsigned_abs()),
            out_of_memory: self.ran.as_ref().is_some_and(|ran| {
                matches!(ran.ending, Ending::Exceeded(Exceeded { resource: LimitedResource::Memory, .. }))
            }),
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
        self.store.begin_outputs(&action.instance, action.digest.function(), self.order.owner())
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

    fn limits(&self) -> Limits {
        self.settings.limits.settings.of(&self.order.action.platform)
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
            principal: self.order.principal.clone(),
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
