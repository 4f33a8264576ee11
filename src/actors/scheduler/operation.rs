//! An operation as its clients see it: its name, its state, the subscription to it, and its outcome.

use super::slots::SlotName;
use crate::{
    access::principal::Principal, actors::worker::messages::RunStage, caller::Peer, instance::Instance,
    log_streams::run::RunLogs, memory, node::NodeName, result::SharedResult,
};
use gorego_reapi::{
    digest::Digest,
    error::{Error, Result},
    escape::shown,
};
use std::{fmt, str::FromStr, sync::Arc, time::SystemTime};
use tokio::sync::watch;
use uuid::Uuid;

/// Identifies an operation across all servers (EXE-02). Its text is the last segment of `[instance/]operations/{id}`: a
/// UUID or, on a server with a name, `node.uuid`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OperationId {
    node: NodeName,
    uuid: Uuid,
}

impl OperationId {
    /// The operation with this UUID on this server.
    pub fn new(node: NodeName, uuid: Uuid) -> Self {
        Self { node, uuid }
    }

    /// A new operation on this server. Its UUID is random, so it cannot be guessed.
    pub fn random(node: NodeName) -> Self {
        Self::new(node, Uuid::new_v4())
    }

    #[cfg(test)]
    pub(crate) fn uuid(self) -> Uuid {
        self.uuid
    }

    /// The server that owns the operation.
    pub fn node(self) -> NodeName {
        self.node
    }

    /// The name that clients use: `[instance/]operations/{id}`.
    pub fn name(self, instance: &Instance) -> String {
        instance.qualify(&format!("operations/{self}"))
    }
}

impl fmt::Display for OperationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.node.is_empty() {
            write!(f, "{}.", self.node)?;
        }
        self.uuid.hyphenated().fmt(f)
    }
}

impl FromStr for OperationId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let malformed = || Error::NotFound(format!("there is no operation \"{}\"", shown(text)));
        let (node, uuid) = text.split_once('.').unwrap_or(("", text));
        let id = Self {
            node: node.parse().map_err(|_| malformed())?,
            uuid: Uuid::try_parse(uuid).map_err(|_| malformed())?,
        };
        // Each operation has exactly one valid name.
        if id.to_string() == text { Ok(id) } else { Err(malformed()) }
    }
}

/// The stage of an operation (EXE-04).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// It waits for a slot or, before that, for the check of its inputs.
    Queued,
    /// A worker runs its task.
    Executing,
    /// It has ended, and the snapshot has its outcome.
    Completed,
}

/// How a task ended. All its operations share it.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// The result of the command. It may be set together with an error: a command that timed out has logs (EXE-45).
    pub result: Option<SharedResult>,
    /// Whether the result came from the action cache (EXE-16).
    pub cached: bool,
    /// Why there is no complete result.
    pub error: Option<Error>,
    /// An explanation for people; usually empty.
    pub message: String,
    /// Texts about unusual runs (EXE-61).
    pub server_logs: Vec<ServerLog>,
}

impl Outcome {
    /// The outcome of an operation with a result from the action cache.
    pub(crate) fn cached(result: SharedResult) -> Self {
        Self {
            result: Some(result),
            cached: true,
            error: None,
            message: String::new(),
            server_logs: Vec::new(),
        }
    }

    /// The outcome of an operation without a result.
    pub(crate) fn failed(error: Error) -> Self {
        Self {
            result: None,
            cached: false,
            error: Some(error),
            message: String::new(),
            server_logs: Vec::new(),
        }
    }

    /// The approximate memory that it takes, in bytes. The cost does not depend on the size of the result.
    pub(crate) fn memory(&self) -> usize {
        let logs = self.server_logs.iter().map(|log| size_of_val(log) + memory::of_buffer(log.name.len()));
        let texts = memory::of_buffer(self.message.len()) + logs.sum::<usize>();
        let result = self.result.as_ref().map_or(0, SharedResult::memory);
        texts.saturating_add(result).saturating_add(self.error.as_ref().map_or(0, Error::memory))
    }
}

/// A text about one run, for people (EXE-61).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerLog {
    /// The file name under which clients may save it.
    pub name: String,
    /// The digest of the text, which is stored as a blob.
    pub digest: Digest,
}

/// The state of an operation as a subscriber sees it.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// The stage that the operation is in.
    pub stage: Stage,
    /// The time of the submission.
    pub queued_at: SystemTime,
    /// The slot on which it runs or ran last.
    pub place: Option<Arc<SlotName>>,
    /// The current stage of the run, and the time at which it was entered.
    pub run_stage: Option<(RunStage, SystemTime)>,
    /// The streams in which the output of the latest run can be followed, during the run and after it (EXE-64).
    pub logs: Option<RunLogs>,
    /// Why it waits. This changes whenever another operation comes or goes, so it is not set in snapshots that are
    /// pushed. A handler requests it with [`Explain`](super::messages::Explain).
    pub queue: Option<Box<QueueStatus>>,
    /// How it ended; set if and only if the stage is [`Stage::Completed`].
    pub outcome: Option<Arc<Outcome>>,
}

/// Why an operation waits. The data is at most about a second old if up to 20,000 tasks wait, and older in longer
/// queues.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct QueueStatus {
    /// The name of the pool that will probably run it.
    pub pool: String,
    /// The names of the other pools that can run it.
    pub other_pools: Vec<String>,
    /// Its position in the queue of that pool, from 1, if no other operation arrives; `None` if it is not known yet.
    pub position: Option<usize>,
    /// The number of tasks in the queue of that pool.
    pub waiting: usize,
    /// The number of busy slots of that pool.
    pub busy: usize,
    /// The number of all slots of that pool.
    pub slots: usize,
    /// The reason as a sentence for people.
    pub reason: String,
}

impl Snapshot {
    /// The snapshot of an operation that was submitted at this time and waits.
    pub fn queued(queued_at: SystemTime) -> Self {
        Self {
            stage: Stage::Queued,
            queued_at,
            place: None,
            run_stage: None,
            logs: None,
            queue: None,
            outcome: None,
        }
    }
}

/// The contents that a client wants in the result itself (AC-05, EXE-59).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Inline {
    /// Whether to fill `stdout_raw`.
    pub stdout: bool,
    /// Whether to fill `stderr_raw`.
    pub stderr: bool,
    /// The paths of the output files whose `contents` to fill.
    pub output_files: Vec<String>,
}

/// The immutable part of an operation.
#[derive(Debug, Clone)]
pub struct OperationInfo {
    /// The last part of its name.
    pub id: OperationId,
    /// The instance to which it belongs.
    pub instance: Instance,
    /// The digest of the Action message.
    pub action: Digest,
    /// The contents that its client wants in the response.
    pub inline: Inline,
    /// The parts of the client's RequestMetadata that the server uses.
    pub client: ClientInfo,
    /// The peer from which the request came.
    pub peer: Peer,
    /// The principal that sent the request.
    pub principal: Principal,
}

impl OperationInfo {
    /// The name that clients use: `[instance/]operations/{id}`.
    pub fn name(&self) -> String {
        self.id.name(&self.instance)
    }

    /// The approximate memory of the texts from the client, in bytes. Clients can make this part large.
    pub(crate) fn memory(&self) -> usize {
        let ClientInfo { tool_invocation_id, target_id, action_mnemonic } = &self.client;
        let texts = [tool_invocation_id, target_id, action_mnemonic];
        let files = self.inline.output_files.iter().map(|file| memory::of_text(file.len()));
        files.chain(texts.map(|text| memory::of_buffer(text.len()))).sum()
    }
}

/// The part of the RequestMetadata that the server uses (GEN-28). Every field is optional, and none is trusted.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ClientInfo {
    /// Identifies one run of the build tool.
    pub tool_invocation_id: String,
    /// The target that the action belongs to.
    pub target_id: String,
    /// The kind of the action, such as `CppCompile`.
    pub action_mnemonic: String,
}

/// A subscription to one operation. While a client holds one, the operation counts as followed.
#[derive(Debug, Clone)]
pub struct Subscription {
    /// The immutable part of the operation.
    pub info: Arc<OperationInfo>,
    /// The current snapshot and all later ones.
    pub snapshots: watch::Receiver<Snapshot>,
}

/// An operation that has ended before it is recorded. Until then, only the holder of its [`Subscription`] knows it.
#[derive(Debug)]
pub struct FinishedOperation {
    pub(super) info: Arc<OperationInfo>,
    /// The priority that the client requested.
    pub(super) priority: i32,
    pub(super) outcome: Arc<Outcome>,
    pub(super) snapshot: watch::Sender<Snapshot>,
}

impl FinishedOperation {
    /// An operation that had this outcome when it was submitted.
    pub(crate) fn new(info: Arc<OperationInfo>, priority: i32, outcome: Outcome, at: SystemTime) -> Self {
        let outcome = Arc::new(outcome);
        let snapshot =
            Snapshot { stage: Stage::Completed, outcome: Some(outcome.clone()), ..Snapshot::queued(at) };
        Self { info, priority, outcome, snapshot: watch::Sender::new(snapshot) }
    }

    /// The subscription of its client.
    pub(crate) fn subscribe(&self) -> Subscription {
        Subscription { info: self.info.clone(), snapshots: self.snapshot.subscribe() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: &str = "6ba7b810-9dad-11d1-80b4-00c04fd430c8";

    /// EXE-02, EXE-13.
    #[test]
    fn an_id_names_its_server_and_has_one_spelling() {
        let own: OperationId = format!("build-3.{UUID}").parse().unwrap();
        let alone: OperationId = UUID.parse().unwrap();
        assert_eq!((own.node().as_str(), alone.node().as_str()), ("build-3", ""));
        assert_eq!((own.to_string(), alone.to_string()), (format!("build-3.{UUID}"), UUID.into()));
        assert_ne!(own, alone);
        let (upper, simple) = (UUID.to_uppercase(), UUID.replace('-', ""));
        let node_only = ["a.", "a", ".", ""].map(str::to_owned);
        let uuids = [&upper, &simple].map(|uuid| format!("a.{uuid}"));
        let nodes =
            ["", "a.b", "A", "a/b", "-", "abcdefghijklmnopq", "\0"].map(|node| format!("{node}.{UUID}"));
        for text in node_only.iter().chain(&uuids).chain(&nodes).chain([&upper, &simple]) {
            assert!(matches!(text.parse::<OperationId>(), Err(Error::NotFound(_))), "{text:?}");
        }
    }
}
