//! The messages between the scheduler and a worker.

use super::cancel::CancelToken;
use crate::{
    action::Action,
    caller::{Build, Owner, Peer},
    log_streams::run::RunLogs,
    result::SharedResult,
};
use actix::Recipient;
use gorego_reapi::{digest::Digest, error::Error};
use std::{sync::Arc, time::SystemTime};

/// Identifies a task within this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TaskId(pub u64);

/// A slot of a pool, counted from 0; for logs and for `ExecutedActionMetadata.worker`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotId(pub usize);

impl SlotId {
    /// The name of the worker that serves the slot; `prefix` is the common part of the names of the pool's workers.
    pub fn worker(self, prefix: &str) -> String {
        format!("{prefix}/{}", self.0)
    }
}

/// Runs one action from start to end. A `MailboxError` instead of the reply means that the worker died.
#[derive(Debug, actix::Message)]
#[rtype(result = "RunReport")]
pub struct RunAction {
    /// The data of the run.
    pub order: RunOrder,
    /// The connection between the scheduler and the run while it lasts.
    pub control: RunControl,
}

/// The data that a worker needs to run an action. It contains no handles, like the [`RunReport`] that answers it and
/// the [`StageReached`] in between, so all three can be sent to a worker in another process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunOrder {
    /// The task that the run belongs to.
    pub task: TaskId,
    /// The number of the attempt at the task, from 1.
    pub attempt: u32,
    /// The slot that the task was given.
    pub slot: SlotId,
    /// The action, which has been validated.
    pub action: Arc<Action>,
    /// The peer that asked for it. What the run reads and stores counts against the limits of this peer.
    pub peer: Peer,
    /// When the scheduler accepted the task (`queued_timestamp`).
    pub queued_at: SystemTime,
    /// The tool invocation of the first client, for the result's provenance; empty if unknown.
    pub tool_invocation_id: String,
    /// The name of the first client's principal, for the result's provenance.
    pub principal: String,
}

impl RunOrder {
    /// The build that the run belongs to. What the run reads and stores is leased to it.
    pub fn owner(&self) -> Owner {
        Owner { peer: self.peer, build: Build::of(&self.tool_invocation_id) }
    }
}

/// The handles of a run that is in progress. They work only within this process: for a pool in another process, this
/// side would keep them, forward a cancellation, and send the progress that the other process reports.
#[derive(Debug, Clone)]
pub struct RunControl {
    /// Tells the worker to stop.
    pub cancel: CancelToken,
    /// Receives the progress of the run.
    pub progress: Recipient<StageReached>,
}

/// Stages the inputs of a waiting action, so that its run finds them on disk. It never fails: the run stages what is
/// not staged. The answer means that the next request can be sent.
#[derive(Debug, actix::Message)]
#[rtype(result = "()")]
pub struct StageAhead {
    /// The task that waits, for logs.
    pub task: TaskId,
    /// The action, which has been validated.
    pub action: Arc<Action>,
    /// The build that the task belongs to. What is read is leased to it.
    pub owner: Owner,
    /// Stopped when the task has a slot: then a tree is not begun any more. Cancelled when the task has ended: then a
    /// tree that was begun is not finished either.
    pub cancel: CancelToken,
}

/// The stages of a run, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum RunStage {
    /// Inputs are being brought into place.
    Fetching,
    /// The command is running.
    Running,
    /// Outputs are being collected and stored.
    Uploading,
}

/// A worker has entered a stage. The first stage, [`RunStage::Fetching`], is not reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, actix::Message)]
#[rtype(result = "()")]
pub struct StageReached {
    /// The task that the run belongs to.
    pub task: TaskId,
    /// The number of the attempt at the task.
    pub attempt: u32,
    /// The stage that was entered.
    pub stage: RunStage,
    /// The time at which it was entered.
    pub at: SystemTime,
    /// The streams in which the command's output can be followed, from [`RunStage::Running`] on (EXE-64).
    pub logs: Option<RunLogs>,
}

/// How a run ended, unless its worker died.
pub type RunReport = Result<Box<RunResult>, RunFailure>;

/// The command ended by itself, with any exit code.
#[derive(Debug, Clone, PartialEq)]
pub struct RunResult {
    /// Outputs, exit code, logs and metadata with all timestamps. Every blob is stored. The action cache has the result
    /// too, unless the action forbids that or the exit code is not 0 (EXE-18, EXE-20, EXE-54).
    pub result: SharedResult,
    /// Explanations for people; usually none.
    pub account: Account,
}

/// Explanations of a run for people (EXE-61).
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Account {
    /// One line for users; often empty.
    pub message: String,
    /// Digest of a stored text that describes the run step by step.
    pub log: Option<Digest>,
    /// Whether the action reached its memory limit, so that it may succeed with more memory.
    pub out_of_memory: bool,
    /// The memory of its largest process, in bytes; 0 if that is not known.
    pub memory: u64,
}

/// The action could not be run, or its command did not end by itself.
#[derive(Debug, Clone, PartialEq)]
pub struct RunFailure {
    /// Why the action has no regular result.
    pub error: Error,
    /// What could be kept: logs and metadata of a command that timed out (EXE-45).
    pub partial: Option<SharedResult>,
    /// Whether the worker is at fault, so that a retry may succeed.
    pub retryable: bool,
    /// Explanations for people in addition to the error.
    pub account: Box<Account>,
}

impl RunFailure {
    /// A failure without logs or metadata that is not retried.
    pub fn new(error: Error) -> Self {
        Self { error, partial: None, retryable: false, account: Box::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A handle cannot be compared, so a message that contains one does not compile here.
    #[test]
    fn messages_between_scheduler_and_worker_are_plain_data() {
        fn is_plain<T: Clone + PartialEq + std::fmt::Debug + Send + Sync + 'static>() {}
        is_plain::<RunOrder>();
        is_plain::<StageReached>();
        is_plain::<RunReport>();
    }
}
