//! A run in which a persistent worker executes the action ([`super::super::tools`]).

use super::{ActionRun, Point, RunStage, errors::disk_was_full};
use crate::{
    actors::worker::{
        build_root::{Workspace, remove},
        checkpoint::Checkpoint,
        dir,
        launcher::Ending,
        store::Inputs,
        tools::{NotServed, ToolJob, ToolTurn, Tools},
    },
    logging::Event,
    sandbox::kind::CellKind,
    telemetry::SandboxFailure,
};
use gorego_reapi::error::{Error, Result};
use rustix::fs::{self as rfs, Mode, OFlags};
use std::{fs::File, io::Write as _};

const TOOL_FAILED: &str = "tool_failed";
const TOOL_NOT_USED: &str = "tool_not_used";

impl ActionRun<'_> {
    /// Lets a tool execute the action, and puts the outputs into the exec directory. `None` if the command has to run
    /// in a process of its own; the exec directory is then empty.
    ///
    /// # Errors
    /// The errors of the inputs and of the disk; `Cancelled`.
    pub(super) fn run_with_tool(
        &mut self,
        inputs: &mut dyn Inputs,
        kind: &CellKind,
        workspace: &Workspace,
        fetching: &Checkpoint<'_>,
    ) -> Result<Option<Ending>> {
        let Some(tools) = self.settings.tools.clone() else { return Ok(None) };
        match self.ask_tool(&tools, inputs, kind, workspace, fetching) {
            Ok(ending) => Ok(Some(ending)),
            Err(NotServed::Failed(error)) => Err(error),
            Err(NotServed::NotAsked) => Ok(None),
            Err(NotServed::Unfit(reason)) => {
                Event::debug("gorego::worker", TOOL_NOT_USED)
                    .with("task", self.order.task.0)
                    .with("pool", &*self.settings.pool)
                    .with("slot", self.order.slot.0)
                    .with_shown("action_digest", &self.order.action.digest)
                    .with("error", &*reason)
                    .log(format_args!("an action that asks for a tool runs without one: {reason}"));
                Ok(None)
            }
            Err(NotServed::ToolFailed(reason)) => {
                Event::warn("gorego::worker", TOOL_FAILED)
                    .with("task", self.order.task.0)
                    .with("pool", &*self.settings.pool)
                    .with("slot", self.order.slot.0)
                    .with_shown("action_digest", &self.order.action.digest)
                    .with("error", &*reason)
                    .log(format_args!("a tool failed; its action runs without it"));
                self.settings.metrics.failed(SandboxFailure::Tool);
                self.tool_failure = Some(reason);
                empty(workspace.root()?)?;
                Ok(None)
            }
        }
    }

    fn ask_tool(
        &mut self,
        tools: &Tools,
        inputs: &mut dyn Inputs,
        kind: &CellKind,
        workspace: &Workspace,
        fetching: &Checkpoint<'_>,
    ) -> std::result::Result<Ending, NotServed> {
        let (settings, action, control) = (self.settings, &self.order.action, self.control);
        let job = ToolJob { action, kind, limits: self.limits(), slot: self.order.slot };
        let turn = ToolTurn::begin(tools, settings, &job, inputs, fetching)?;
        self.note(Point::FetchEnd);
        self.enter(RunStage::Running, Point::RunStart, None);
        let watch = settings.build_root.disk().begin(control.cancel.clone());
        // The time of the tool counts as time for fetching the inputs, so that this and an ordinary run that may follow
        // together take no longer than the scheduler waits. The other half is left for the ordinary run.
        let half = fetching.half_of_rest();
        let timeout = half.map_or(action.timeout, |half| half.min(action.timeout));
        let heard = turn.run(timeout, &control.cancel);
        if let Some(space) = watch.end() {
            settings.metrics.failed(SandboxFailure::DiskFull);
            return Err(NotServed::Failed(disk_was_full(space)));
        }
        let (ran, output) = heard?;
        let root = workspace.root().map_err(NotServed::Failed)?;
        turn.end(action, root, &fetching.part("copying the outputs of the tool"))?;
        print(workspace, &output).map_err(NotServed::Failed)?;
        self.timeline.note(Point::RunStart, ran.started);
        self.timeline.note(Point::RunEnd, ran.ended);
        let ending = ran.ending;
        self.ran = Some(ran);
        Ok(ending)
    }
}

/// Writes the output of the tool to the standard error of the command.
fn print(workspace: &Workspace, output: &str) -> Result<()> {
    if output.is_empty() {
        return Ok(());
    }
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rfs::openat(workspace.top()?, "stderr", flags, Mode::from_raw_mode(0o644))
        .map_err(std::io::Error::from)
        .and_then(|file| File::from(file).write_all(output.as_bytes()))
        .map_err(|error| Error::io("write to stderr", &error))
}

/// Removes all copied files from an exec root.
fn empty(root: &File) -> Result<()> {
    let emptied = || {
        for name in dir::names(root)? {
            match rfs::unlinkat(root, &*name, rfs::AtFlags::empty()) {
                Err(rustix::io::Errno::ISDIR) => remove(root, &name)?,
                removed => removed?,
            }
        }
        Ok(())
    };
    emptied().map_err(|error: std::io::Error| Error::io("empty an exec directory", &error))
}
