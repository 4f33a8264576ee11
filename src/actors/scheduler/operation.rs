//! An operation as its clients see it: name, snapshots, subscription, outcome.

use super::transition::RunPlace;
use crate::{
    actors::worker::messages::RunStage, caller::Peer, instance::Instance, log_streams::run::RunLogs,
    node::NodeName,
};
use gorego_reapi::{
    digest::Digest,
    error::{Error, Result},
    proto::reapi,
};
use std::{fmt, str::FromStr, sync::Arc, time::SystemTime};
use tokio::sync::watch;
use uuid::Uuid;

/// Identifies an operation among those of all servers (EXE-02). Its text is the last segment of
/// `[instance/]operations/{id}`: a UUID or, on a server with a name, `node.uuid`.
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
        let malformed = || Error::NotFound(format!("there is no operation \"{}\"", text.escape_debug()));
        let (node, uuid) = text.split_once('.').unwrap_or(("", text));
        let id = Self {
            node: node.parse().map_err(|_| malformed())?,
            uuid: Uuid::try_parse(uuid).map_err(|_| malformed())?,
        };
        // Each operation has exactly one valid name.
        if id.to_string() == text { Ok(id) } else { Err(malformed()) }
    }
}

/// Where an operation is (EXE-04).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Waits for a slot (or, first, for its inputs to be checked).
    Queued,
    /// A worker has it.
    Executing,
    /// Over; the snapshot has its outcome.
    Completed,
}

/// How a task ended, shared by all its operations.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// What the command left behind; also the logs of a command that timed out (EXE-45).
    pub result: Option<Arc<reapi::ActionResult>>,
    /// The result came from the action cache (EXE-16).
    pub cached: bool,
    /// Why there is no (whole) result.
    pub error: Option<Error>,
    /// A word for people; usually empty.
    pub message: String,
    /// Accounts of the runs, where there is something to tell (EXE-61).
    pub server_logs: Vec<ServerLog>,
}

/// A text about one run, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerLog {
    /// A plain file name.
    pub name: String,
    /// The text, stored.
    pub digest: Digest,
}

/// What a subscriber sees.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Where the operation is.
    pub stage: Stage,
    /// When it was submitted.
    pub queued_at: SystemTime,
    /// Where it runs, or ran last.
    pub place: Option<Arc<RunPlace>>,
    /// The worker's current step while executing, and when it was entered.
    pub run_stage: Option<(RunStage, SystemTime)>,
    /// Where the output of its latest run can be followed, from when there may be any; also after the end (EXE-64).
    pub logs: Option<RunLogs>,
    /// Why it waits. It changes with everything else that waits, so that it is never in a watch cell: who wants to show it
    /// asks for it ([`Explain`](super::messages::Explain)) and puts it here.
    pub queue: Option<Box<QueueStatus>>,
    /// Set exactly when the stage is [`Stage::Completed`].
    pub outcome: Option<Arc<Outcome>>,
}

/// Why an operation waits, as of the last second or so.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct QueueStatus {
    /// The pool that is likely to take it.
    pub pool: String,
    /// Other pools that can.
    pub other_pools: Vec<String>,
    /// Which one it is of those that wait for that pool, from 1, if nothing else comes, in the order in which they will be
    /// served; `None` when that is not known yet.
    pub position: Option<usize>,
    /// How many wait for that pool.
    pub waiting: usize,
    /// Slots of that pool that are taken.
    pub busy: usize,
    /// Slots of that pool.
    pub slots: usize,
    /// The reason, for people.
    pub reason: String,
}

impl Snapshot {
    /// That of an operation that waits, submitted at this time.
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

/// Which contents a client wants inlined in results (AC-05, EXE-59).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Inline {
    /// `stdout_raw`.
    pub stdout: bool,
    /// `stderr_raw`.
    pub stderr: bool,
    /// `contents` of these output files.
    pub output_files: Vec<String>,
}

/// What never changes about an operation.
#[derive(Debug, Clone)]
pub struct OperationInfo {
    /// Its name.
    pub id: OperationId,
    /// Its namespace.
    pub instance: Instance,
    /// The action.
    pub action: Digest,
    /// What its client wants inlined.
    pub inline: Inline,
    /// Who asked, in its own words.
    pub client: ClientInfo,
    /// Where it asked from.
    pub peer: Peer,
}

impl OperationInfo {
    /// `[instance/]operations/{id}`.
    pub fn name(&self) -> String {
        self.id.name(&self.instance)
    }
}

/// What the client said about itself in RequestMetadata (GEN-28); all optional, none trusted.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ClientInfo {
    /// One run of the build tool.
    pub tool_invocation_id: String,
    /// The target that is built.
    pub target_id: String,
    /// The kind of action.
    pub action_mnemonic: String,
}

/// The right to follow one operation. While any is held the operation counts as waited for.
#[derive(Debug, Clone)]
pub struct Subscription {
    /// Which operation.
    pub info: Arc<OperationInfo>,
    /// Its current and every later snapshot.
    pub snapshots: watch::Receiver<Snapshot>,
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
