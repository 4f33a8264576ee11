//! What RPC handlers ask of the scheduler. Each message is one intent and its reply the whole answer.

use super::{
    Pool,
    operation::{ClientInfo, Inline, OperationId, OperationInfo, QueueStatus, Snapshot, Subscription},
    slots::{PoolId, PoolStatus},
};
use crate::{actors::cas::resolve::Resolution, caller::Caller, instance::Instance};
use gorego_reapi::{digest::Digest, error::Result};
use std::sync::Arc;

/// Takes an action in: answered from the cache, joined to the same work in flight, queued, or over at once because it cannot
/// run. In each case there is an operation afterwards.
///
/// # Errors
/// `Exhausted` when the queue is full, `Unavailable` during shutdown, `Precondition` when no pool can ever take it (EXE-31).
#[derive(Debug, Clone, actix::Message)]
#[rtype(result = "Result<Subscription>")]
pub struct Admit {
    /// What the client asks for.
    pub submit: Submit,
    /// What the store knows of the action.
    pub resolution: Resolution,
}

/// A client's request to execute an action.
#[derive(Debug, Clone)]
pub struct Submit {
    /// The namespace.
    pub instance: Instance,
    /// Digest of the Action.
    pub action: Digest,
    /// Run even if a result is cached (EXE-17).
    pub skip_cache_lookup: bool,
    /// Lower runs sooner. One outside of the range that is configured counts as the nearest in it.
    pub priority: i32,
    /// What the client wants inlined.
    pub inline: Inline,
    /// What the client says about itself (RequestMetadata).
    pub client: ClientInfo,
    /// Who asks.
    pub caller: Caller,
}

/// Joins an operation (EXE-12).
///
/// # Errors
/// `NotFound` when it is unknown or forgotten (EXE-13).
#[derive(Debug, Clone, actix::Message)]
#[rtype(result = "Result<Subscription>")]
pub struct Watch {
    /// The namespace in the operation's name.
    pub instance: Instance,
    /// Which operation.
    pub id: OperationId,
}

/// Ends one operation as cancelled; its work stops with the last operation that waits for it (OPS-03, OPS-04). Harmless on a
/// finished one.
///
/// # Errors
/// `NotFound` when it is unknown.
#[derive(Debug, Clone, actix::Message)]
#[rtype(result = "Result<()>")]
pub struct Cancel {
    /// The namespace in the operation's name.
    pub instance: Instance,
    /// Which operation.
    pub id: OperationId,
}

/// Forgets a finished operation.
///
/// # Errors
/// `NotFound` when it is unknown, `Precondition` when it is not finished.
#[derive(Debug, Clone, actix::Message)]
#[rtype(result = "Result<()>")]
pub struct Forget {
    /// The namespace in the operation's name.
    pub instance: Instance,
    /// Which operation.
    pub id: OperationId,
}

/// Asks why an operation waits; `None` when it does not, or is unknown. Answered from a picture of the queue that is made
/// about once a second, so that any number may ask.
#[derive(Debug, Clone, actix::Message)]
#[rtype(result = "Option<Box<QueueStatus>>")]
pub struct Explain {
    /// The namespace in the operation's name.
    pub instance: Instance,
    /// Which operation.
    pub id: OperationId,
}

/// A page of operations, in a stable order: by submission, oldest first.
///
/// # Errors
/// `Invalid` when the filter names a pool that there is not.
#[derive(Debug, Clone, actix::Message)]
#[rtype(result = "Result<OperationPage>")]
pub struct ListOperations {
    /// The namespace.
    pub instance: Instance,
    /// Only those that satisfy all of these.
    pub filter: OperationFilter,
    /// Start after this submission number; 0 for the first page.
    pub after: u64,
    /// At most this many; at least 1.
    pub limit: usize,
}

/// Conditions on operations; `None` matches everything.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct OperationFilter {
    /// Stage name as in `ExecutionStage.Value`.
    pub stage: Option<super::operation::Stage>,
    /// Finished or not.
    pub done: Option<bool>,
    /// `tool_invocation_id` of the client.
    pub invocation: Option<String>,
    /// `target_id` of the client.
    pub target: Option<String>,
    /// The pool that it runs or ran in or, while it waits, one that can take it.
    pub pool: Option<String>,
    /// The worker that runs or ran it.
    pub worker: Option<String>,
}

/// The answer to [`ListOperations`].
#[derive(Debug, Clone)]
pub struct OperationPage {
    /// The operations, with their state now.
    pub operations: Vec<(Arc<OperationInfo>, Snapshot)>,
    /// `after` of the next page; `None` at the end.
    pub next: Option<u64>,
}

/// Counts for people and health checks.
#[derive(Debug, Clone, actix::Message)]
#[rtype(result = "Inspection")]
pub struct Inspect;

/// The answer to [`Inspect`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Inspection {
    /// Operations remembered, finished ones included.
    pub operations: usize,
    /// Tasks waiting for a slot.
    pub queued: usize,
    /// Tasks on a worker.
    pub running: usize,
    /// Slots that can take work, busy or not.
    pub slots: usize,
}

/// Adds a pool. Tasks that wait and that it suits wait for it too from now on.
///
/// # Errors
/// `Precondition` when there are too many pools, or one with this name that is not draining.
#[derive(actix::Message)]
#[rtype(result = "Result<PoolId>")]
pub struct AddPool {
    /// The new pool.
    pub pool: Pool,
}

/// Has a pool take no more tasks. Replies when all runs of the pool have ended.
///
/// # Errors
/// `NotFound` when there is no such pool.
#[derive(Debug, Clone, Copy, actix::Message)]
#[rtype(result = "Result<()>")]
pub struct DrainPool {
    /// The pool.
    pub id: PoolId,
}

/// Removes a pool. Runs that it still has are stopped and their tasks are tried again in other pools; tasks that only this pool
/// could run end.
///
/// # Errors
/// `NotFound` when there is no such pool.
#[derive(Debug, Clone, Copy, actix::Message)]
#[rtype(result = "Result<()>")]
pub struct RemovePool {
    /// The pool.
    pub id: PoolId,
}

/// All pools, in order of preference.
#[derive(Debug, Clone, Copy, actix::Message)]
#[rtype(result = "Vec<PoolStatus>")]
pub struct ListPools;

/// Takes no new work from now on; replies when none is left. With `cancel`, what is left is cancelled first.
#[derive(Debug, Clone, Copy, actix::Message)]
#[rtype(result = "()")]
pub struct Drain {
    /// End everything now, with a status that clients retry.
    pub cancel: bool,
}
