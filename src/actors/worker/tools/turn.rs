//! [`ToolTurn`]: one action that is served by a tool. Its methods block and run on a worker's own thread.

use super::{
    Tool, ToolReservation, Tools,
    call::{ToolCall, is_tool_input},
    codec::{AnswerReader, Encoding, MAX_REQUEST_BYTES, WorkAnswer},
    collect::copy_outputs,
    exchange::{NotExchanged, PlacedInputs, exchange},
};
use crate::{
    action::{Action, Command},
    actors::worker::{
        WorkerSettings,
        build_root::Workspace,
        cancel::CancelToken,
        checkpoint::Checkpoint,
        clock::Moment,
        command::Launch,
        dir::{self, FileIdentity},
        exec_root::ExecRoot,
        inputs,
        launcher::{
            Ending, PoolSandbox, Ran,
            tool::{ExchangeError, Sample, ToolProcess},
        },
        messages::SlotId,
        store::Inputs,
    },
    limits::Limits,
    sandbox::kind::CellKind,
};
use gorego_reapi::{error::Error, path::RootPath};
use rustix::{fs as rfs, process::geteuid};
use std::{
    fs::File,
    io::{self, Read as _},
    ops::ControlFlow,
    os::unix::fs::FileExt as _,
    path::Path,
    time::{Duration, Instant},
};

/// How much of the end of a tool's standard error is searched for its last line.
const MAX_LINE_BYTES: u64 = 4096;

/// An action that a tool is about to serve. The inputs are in place.
pub(crate) struct ToolTurn<'a> {
    reservation: ToolReservation<'a>,
    tool: Tool,
    encoding: Encoding,
    request: Vec<u8>,
    before: Sample,
}

/// An action, with the settings that apply to a process of its own.
#[derive(Debug)]
pub(crate) struct ToolJob<'a> {
    pub action: &'a Action,
    /// The kind of cell that the action needs.
    pub kind: &'a CellKind,
    /// The limits of the action.
    pub limits: Limits,
    /// The slot in which the action runs.
    pub slot: SlotId,
}

/// Why no tool has served an action.
#[derive(Debug)]
pub(crate) enum NotServed {
    /// The action does not ask for a tool.
    NotAsked,
    /// It asks for a tool, but has to run without one for this reason.
    Unfit(String),
    /// The tool failed and was ended. The action runs without a tool.
    ToolFailed(String),
    /// The action fails as well.
    Failed(Error),
}

impl NotServed {
    /// Classifies an error of moving files of a tool. A hostile tool may cause many of these errors.
    fn of(error: Error) -> Self {
        match error {
            Error::Cancelled(_) | Error::MissingBlobs(_) | Error::DiskFull(_) | Error::Unavailable(_) => {
                Self::Failed(error)
            }
            // The ordinary run that follows shows whether the tool or the action is at fault.
            Error::Invalid(reason) => Self::Unfit(reason),
            error => Self::ToolFailed(error.to_string()),
        }
    }
}

impl<'a> ToolTurn<'a> {
    /// Finds or starts a tool for an action, and puts the inputs into place.
    ///
    /// # Errors
    /// [`NotServed`].
    pub(crate) fn begin(
        tools: &'a Tools,
        settings: &WorkerSettings,
        job: &ToolJob<'_>,
        inputs: &mut dyn Inputs,
        checkpoint: &Checkpoint<'_>,
    ) -> std::result::Result<Self, NotServed> {
        let unfit = |reason: &str| NotServed::Unfit(reason.into());
        let root = job.root_directory().map_err(|error| NotServed::Unfit(error.to_string()))?;
        let call = ToolCall::of(job.action, inputs.tree(), root).map_err(unfit)?;
        let call = call.ok_or(NotServed::NotAsked)?;
        job.check(settings).map_err(unfit)?;
        inputs.hold_all().map_err(NotServed::Failed)?;
        let Some((reservation, tool)) = tools.hold(&call) else {
            return Err(NotServed::Unfit("all tools are busy".into()));
        };
        let preparation = Preparation { settings, job, inputs, call: &call, checkpoint };
        let (tool, request) = match tool {
            Some(mut tool) => {
                let request = preparation.exchange(&mut tool.contents, &tool.workspace)?;
                (tool, request)
            }
            None => {
                let started = preparation.start()?;
                tools.log_start(call.key);
                started
            }
        };
        let before = tool.process.sample();
        Ok(Self { reservation, tool, encoding: call.encoding, request, before })
    }

    /// Sends the request and waits for the answer. Returns the exit code and the output that the tool reports.
    ///
    /// # Errors
    /// [`NotServed`]. The tool must then be ended.
    pub(crate) fn run(
        &self,
        timeout: Duration,
        cancel: &CancelToken,
    ) -> std::result::Result<(Ran, String), NotServed> {
        let started = Moment::now();
        let limit = timeout.min(self.reservation.tools.0.limits.max_call);
        let mut reader = AnswerReader::new(self.encoding);
        let answer: WorkAnswer = self
            .tool
            .process
            .exchange(&self.request, Instant::now().checked_add(limit), cancel, |bytes| {
                match reader.read(bytes) {
                    Ok(None) => ControlFlow::Continue(()),
                    Ok(Some(answer)) => ControlFlow::Break(Ok(answer)),
                    Err(problem) => ControlFlow::Break(Err(problem.to_string())),
                }
            })
            .map_err(|error| match error {
                ExchangeError::Broken(reason) => NotServed::ToolFailed(self.with_last_line(reason)),
                ExchangeError::TimedOut => {
                    NotServed::ToolFailed(format!("it did not answer within {limit:?}"))
                }
                ExchangeError::Cancelled => NotServed::Failed(crate::actors::worker::checkpoint::cancelled()),
            })?;
        let ran = Ran {
            ending: Ending::Exited(answer.exit_code),
            usage: self.tool.process.sample().since(self.before),
            started,
            ended: Moment::now(),
            reached: Vec::new(),
        };
        Ok((ran, answer.output))
    }

    /// Copies the outputs into the exec directory of the action, and keeps the tool for another one.
    ///
    /// # Errors
    /// [`NotServed`]. The tool is then ended.
    pub(crate) fn end(
        self,
        action: &Action,
        to: &File,
        checkpoint: &Checkpoint<'_>,
    ) -> std::result::Result<(), NotServed> {
        let root = self.tool.workspace.root().map_err(NotServed::of)?;
        copy_outputs(root, to, &action.command.outputs, checkpoint).map_err(|error| match error {
            // The tool made the outputs, and may have made too many.
            Error::Unavailable(too_slow) => NotServed::ToolFailed(too_slow),
            error => NotServed::of(error),
        })?;
        self.reservation.keep(self.tool);
        Ok(())
    }

    /// Adds the last line that the tool printed to its standard error to a reason.
    fn with_last_line(&self, reason: String) -> String {
        let end = end_of_log(&self.tool.workspace.path().join("stderr"));
        match end.ok().as_deref().map(last_line).filter(|line| !line.is_empty()) {
            Some(line) => format!("{reason}; the last line of its standard error is \"{line}\""),
            None => reason,
        }
    }
}

impl ToolJob<'_> {
    /// The identity of the directory that is the root file system now; `None` for the host's files.
    fn root_directory(&self) -> io::Result<Option<FileIdentity>> {
        let path = self.kind.root_directory();
        path.map(|path| Ok(dir::file_id(&rfs::stat(path)?))).transpose()
    }

    /// Whether running in a tool gives the action everything that a process of its own would have.
    fn check(&self, settings: &WorkerSettings) -> std::result::Result<(), &'static str> {
        let usual = settings.sandbox.as_ref().map_or_else(CellKind::default, PoolSandbox::usual_kind);
        if *self.kind != usual {
            return Err("it has its own root file system, image or network");
        }
        if usual.has_input_root_as_root() {
            return Err("the input root is its root file system");
        }
        if self.limits.disk > 0 || self.limits.files > 0 {
            return Err("the bytes and files that it writes are limited (disk, files)");
        }
        Ok(())
    }
}

/// The data for putting the inputs of an action into place.
struct Preparation<'a> {
    settings: &'a WorkerSettings,
    job: &'a ToolJob<'a>,
    inputs: &'a dyn Inputs,
    call: &'a ToolCall,
    checkpoint: &'a Checkpoint<'a>,
}

impl Preparation<'_> {
    /// Puts the inputs of its first action into place, and starts a tool.
    fn start(&self) -> std::result::Result<(Tool, Vec<u8>), NotServed> {
        let (settings, job) = (self.settings, self.job);
        let workspace = match &settings.sandbox {
            Some(sandbox) if sandbox.protections.namespaces => settings.build_root.create_unseen(job.slot),
            _ => settings.build_root.create(job.slot, &self.call.key.0),
        };
        let workspace = workspace.map_err(NotServed::Failed)?;
        let mut contents = PlacedInputs::default();
        let request = self.exchange(&mut contents, &workspace)?;
        let command = Command { arguments: self.call.start.clone(), ..job.action.command.clone() };
        let launch = Launch {
            kind: job.kind.clone(),
            limits: job.limits,
            ..Launch::new(&command, &workspace, None, settings.max_output_file_bytes)
        };
        let groups = settings.limits.groups.as_ref();
        let process = ToolProcess::start(&settings.runner, settings.sandbox.as_ref(), groups, &launch);
        let process = process.map_err(|error| NotServed::ToolFailed(error.to_string()))?;
        Ok((Tool { process, workspace, contents }, request))
    }

    /// Puts the inputs into place, and encodes the request.
    fn exchange(
        &self,
        contents: &mut PlacedInputs,
        workspace: &Workspace,
    ) -> std::result::Result<Vec<u8>, NotServed> {
        let command = &self.job.action.command;
        let root = workspace.root().map_err(NotServed::of)?;
        let directory = &command.working_directory;
        exchange(contents, root, self.inputs, directory, is_tool_input, self.checkpoint).map_err(
            |problem| match problem {
                NotExchanged::Failed(error) => NotServed::of(error),
                NotExchanged::ToolChanged(path) => {
                    NotServed::ToolFailed(format!("it has changed its own file \"{}\"", path.escape_debug()))
                }
            },
        )?;
        let is_root = self.settings.sandbox.is_none() && geteuid().is_root();
        let tree = self.inputs.tree();
        inputs::prepare(tree, ExecRoot::new(root, None), command, is_root, self.checkpoint)
            .map_err(NotServed::of)?;
        let mut read = |path: &str| read_input(root, &directory.join(path).ok()?).ok();
        self.call.request(tree, directory, &mut read).map_err(NotServed::Unfit)
    }
}

/// The text of a file in the exec root.
fn read_input(root: &File, path: &RootPath) -> io::Result<String> {
    let (parent, name) = path.parent().zip(path.name()).ok_or(io::ErrorKind::IsADirectory)?;
    let parent = dir::open_beneath(root, parent.as_path())?;
    read_text(dir::open_file(&parent, name.as_ref())?)
}

fn read_text(file: File) -> io::Result<String> {
    if !file.metadata()?.is_file() {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut bytes = Vec::new();
    file.take(MAX_REQUEST_BYTES as u64 + 1).read_to_end(&mut bytes)?;
    String::from_utf8(bytes).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// The last [`MAX_LINE_BYTES`] of a log.
fn end_of_log(path: &Path) -> io::Result<Vec<u8>> {
    let flags = rfs::OFlags::RDONLY | rfs::OFlags::NOFOLLOW | rfs::OFlags::NONBLOCK | rfs::OFlags::CLOEXEC;
    let log = File::from(rfs::open(path, flags, rfs::Mode::empty())?);
    let metadata = log.metadata()?;
    if !metadata.is_file() {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let start = metadata.len().saturating_sub(MAX_LINE_BYTES);
    let mut end = vec![0; (metadata.len() - start) as usize];
    log.read_exact_at(&mut end, start)?;
    Ok(end)
}

/// The last line of a text that is not blank. The text need not be UTF-8.
fn last_line(text: &[u8]) -> String {
    let line = text.split(|&byte| byte == b'\n').rev().find(|line| !line.trim_ascii().is_empty());
    super::codec::shown(line.unwrap_or_default().trim_ascii_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_of_a_log_is_found_at_its_end() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("stderr");
        let last_line_of = |text: &[u8]| {
            std::fs::write(&log, text).unwrap();
            last_line(&end_of_log(&log).unwrap())
        };
        assert_eq!(last_line_of(b""), "");
        assert_eq!(last_line_of(b"first\nlast\r\n \n\n"), "last");
        assert_eq!(last_line_of(b"\xff\xfe\nlast \xff words"), "last \u{fffd} words");
        assert_eq!(last_line_of(&[&b"\xff\n".repeat(100_000)[..], b"last"].concat()), "last");
        assert!(end_of_log(directory.path()).is_err(), "a directory is no log");
        std::fs::write(&log, vec![b'x'; 10 * MAX_LINE_BYTES as usize]).unwrap();
        assert_eq!(end_of_log(&log).unwrap().len() as u64, MAX_LINE_BYTES);
    }
}
