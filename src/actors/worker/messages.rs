//! What the scheduler and a worker say to each other.

use super::cancel::CancelToken;
use crate::{action::Action, caller::Peer, log_streams::run::RunLogs};
use actix::Recipient;
use gorego_reapi::{digest::Digest, error::Error, proto::reapi};
use std::{sync::Arc, time::SystemTime};

/// Names one piece of work inside this process; the work of one action, however many operations wait for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TaskId(pub u64);

/// Which slot of a pool runs a task; for logs and for `ExecutedActionMetadata.worker`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotId(pub usize);

impl SlotId {
    /// The name of the worker that serves the slot, given what the workers of its pool are called.
    pub fn worker(self, prefix: &str) -> String {
        format!("{prefix}/{}", self.0)
    }
}

/// Runs one action, start to end. The reply is the whole answer; a `MailboxError` instead of it means that the worker died.
#[derive(actix::Message)]
#[rtype(result = "RunReport")]
pub struct RunAction {
    /// The work.
    pub task: TaskId,
    /// The slot it was given.
    pub slot: SlotId,
    /// What to run.
    pub action: Arc<Action>,
    /// For whom; what is read for the action counts as this peer's.
    pub peer: Peer,
    /// When the scheduler took the work in, for `queued_timestamp`.
    pub queued_at: SystemTime,
    /// The tool invocation that asked first, for the result's provenance; empty when unknown.
    pub tool_invocation_id: String,
    /// Tells the worker to stop.
    pub cancel: CancelToken,
    /// Hears how the run gets on.
    pub progress: Recipient<StageReached>,
}

/// Steps of a run, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum RunStage {
    /// Inputs are being brought into place.
    Fetching,
    /// The command runs.
    Running,
    /// Outputs are being collected and stored.
    Uploading,
}

/// A worker has entered a step after [`RunStage::Fetching`], with which each run begins. A fact, not a request.
#[derive(Debug, Clone, Copy, actix::Message)]
#[rtype(result = "()")]
pub struct StageReached {
    /// Whose work.
    pub task: TaskId,
    /// Which step.
    pub stage: RunStage,
    /// When.
    pub at: SystemTime,
    /// Where the command's output can be followed, from [`RunStage::Running`] on (EXE-64).
    pub logs: Option<RunLogs>,
}

/// How a run ended, short of the worker's death.
pub type RunReport = Result<Box<RunResult>, RunFailure>;

/// The command ran to an end of its own.
#[derive(Debug, Clone, PartialEq)]
pub struct RunResult {
    /// Outputs, exit code, logs, metadata with all timestamps; every blob is stored and, unless the action says otherwise
    /// or the exit code is not 0, the action cache has it (EXE-18, EXE-20, EXE-54).
    pub result: reapi::ActionResult,
    /// Words for people; usually none.
    pub account: Account,
}

/// What people are told about a run, where that is worth telling (EXE-61).
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Account {
    /// One line; often empty.
    pub message: String,
    /// A stored text about how it went, step by step.
    pub log: Option<Digest>,
}

/// The action could not be run, or not to its end.
#[derive(Debug, Clone, PartialEq)]
pub struct RunFailure {
    /// Why.
    pub error: Error,
    /// What there is nevertheless: logs and metadata of a command that timed out (EXE-45).
    pub partial: Option<Box<reapi::ActionResult>>,
    /// Whether the fault lies with the worker, so that another try may succeed.
    pub retryable: bool,
    /// Words for people besides the error.
    pub account: Box<Account>,
}

impl RunFailure {
    /// A failure that leaves nothing behind and is for good.
    pub fn new(error: Error) -> Self {
        Self { error, partial: None, retryable: false, account: Box::default() }
    }
}
