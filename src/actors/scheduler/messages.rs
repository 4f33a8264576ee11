//! The messages that the scheduler accepts from RPC handlers and operators. Each is one request with one reply.

use super::{
    Pool,
    operation::{
        ClientInfo, FinishedOperation, Inline, OperationId, OperationInfo, QueueStatus, Snapshot,
        Subscription,
    },
    slots::{PoolId, PoolStatus},
};
use crate::{
    access::principal::Principal, actors::cas::resolve::Resolution, caller::Caller, instance::Instance,
    quotas::OperationLimits,
};
use gorego_reapi::{digest::Digest, error::Result};
use std::{sync::Arc, time::Duration};

/// Admits an action and creates an operation for it. The operation joins a task of the same action, waits in the queue,
/// or ends at once because the action cannot run. An operation with a cached result also ends at once, but see
/// [`Record`].
///
/// # Errors
/// `Exhausted` if the queue is full, `Unavailable` during shutdown, `Precondition` if no pool is suitable (EXE-31).
#[derive(Debug, Clone, actix::Message)]
#[rtype(result = "Result<Subscription>")]
pub struct Admit {
    /// The request of the client.
    pub submit: Submit,
    /// The action, or a cached result of it, as found in the store.
    pub resolution: Resolution,
}

/// A fact: clients were given cached results as the answers to their requests. These operations become known under
/// their names like any other (EXE-02). A mailbox keeps the order of its messages, so later requests of clients about
/// these names find them.
#[derive(Debug, actix::Message)]
#[rtype(result = "()")]
pub struct Record(pub Vec<FinishedOperation>);

/// The request of a client to execute an action.
#[derive(Debug, Clone)]
pub struct Submit {
    /// The instance that the request names.
    pub instance: Instance,
    /// The digest of the Action message.
    pub action: Digest,
    /// Whether to run the action even if a result is cached (EXE-17).
    pub skip_cache_lookup: bool,
    /// The requested priority; lower values run sooner. A value outside the configured range is replaced by the nearest
    /// value in it.
    pub priority: i32,
    /// The contents that the client wants in the response itself.
    pub inline: Inline,
    /// The RequestMetadata of the client.
    pub client: ClientInfo,
    /// The connection and peer of the request.
    pub caller: Caller,
    /// The sender, who owns the operation.
    pub principal: Principal,
    /// How many operations its sender may have.
    pub limits: OperationLimits,
}

impl Submit {
    /// The immutable part of the operation for this request, and its priority.
    pub(crate) fn into_info(self, id: OperationId) -> (Arc<OperationInfo>, i32) {
        let Self { instance, action, priority, inline, client, caller, principal, .. } = self;
        let peer = principal.peer(caller.peer);
        (Arc::new(OperationInfo { id, instance, action, inline, client, peer, principal }), priority)
    }
}

/// Subscribes to an existing operation (EXE-12).
///
/// # Errors
/// `NotFound` if it is unknown or forgotten (EXE-13).
#[derive(Debug, Clone, actix::Message)]
#[rtype(result = "Result<Subscription>")]
pub struct Watch {
    /// The instance in the name of the operation.
    pub instance: Instance,
    /// The rest of the name.
    pub id: OperationId,
}

/// Cancels one operation. Its task stops with the last operation that waits for it (OPS-03, OPS-04). A finished
/// operation is not changed.
///
/// # Errors
/// `NotFound` if it is unknown.
#[derive(Debug, Clone, actix::Message)]
#[rtype(result = "Result<()>")]
pub struct Cancel {
    /// The instance in the name of the operation.
    pub instance: Instance,
    /// The rest of the name.
    pub id: OperationId,
}

/// Removes a finished operation from the list of operations.
///
/// # Errors
/// `NotFound` if it is unknown, `Precondition` if it is not finished.
#[derive(Debug, Clone, actix::Message)]
#[rtype(result = "Result<()>")]
pub struct Forget {
    /// The instance in the name of the operation.
    pub instance: Instance,
    /// The rest of the name.
    pub id: OperationId,
}

/// Asks why an operation waits. The answer is `None` if it does not wait or is unknown. Positions come from a snapshot
/// of the queues, so any number of clients may ask. It is at most about a second old if up to 20,000 tasks wait, and
/// older in longer queues.
#[derive(Debug, Clone, actix::Message)]
#[rtype(result = "Option<Box<QueueStatus>>")]
pub struct Explain {
    /// The instance in the name of the operation.
    pub instance: Instance,
    /// The rest of the name.
    pub id: OperationId,
}

/// Asks for a page of operations, ordered by submission, oldest first.
///
/// # Errors
/// `Invalid` if the filter names an unknown pool.
#[derive(Debug, Clone, actix::Message)]
#[rtype(result = "Result<OperationPage>")]
pub struct ListOperations {
    /// The instance whose operations are listed.
    pub instance: Instance,
    /// The conditions that all listed operations satisfy.
    pub filter: OperationFilter,
    /// The submission number after which the page starts; 0 for the first page.
    pub after: u64,
    /// Maximum number of operations on the page; at least 1.
    pub limit: usize,
}

/// Conditions on operations. `None` matches every operation.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct OperationFilter {
    /// The stage that the operation is in.
    pub stage: Option<super::operation::Stage>,
    /// Whether the operation is finished.
    pub done: Option<bool>,
    /// The `tool_invocation_id` in the RequestMetadata.
    pub invocation: Option<String>,
    /// The `target_id` in the RequestMetadata.
    pub target: Option<String>,
    /// The name of the pool that runs or ran the operation. While it waits, this is a pool that can run it.
    pub pool: Option<String>,
    /// The name of the worker that runs or ran it.
    pub worker: Option<String>,
    /// The id of the operation.
    pub operation: Option<super::operation::OperationId>,
    /// The principal that owns the operation.
    pub owner: Option<Principal>,
}

/// A page of operations; the answer to [`ListOperations`].
#[derive(Debug, Clone)]
pub struct OperationPage {
    /// The operations and their current states.
    pub operations: Vec<(Arc<OperationInfo>, Snapshot)>,
    /// The value of `after` for the next page; `None` on the last page.
    pub next: Option<u64>,
}

/// Asks for the numbers of operations, tasks and slots.
#[derive(Debug, Clone, actix::Message)]
#[rtype(result = "Inspection")]
pub struct Inspect;

/// The numbers that answer [`Inspect`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Inspection {
    /// Operations in the register, including finished ones that are remembered.
    pub operations: usize,
    /// Tasks that wait for a slot.
    pub queued: usize,
    /// Runs whose workers have not reported the end.
    pub running: usize,
    /// Slots of the pools that take tasks, busy or free.
    pub slots: usize,
}

/// Adds a pool. Waiting tasks that it suits wait for it too from now on.
///
/// # Errors
/// `Precondition` if there are too many pools, or another pool with this name that is not draining. Nothing changes
/// then.
#[derive(actix::Message)]
#[rtype(result = "Result<PoolId>")]
pub struct AddPool {
    /// The description of the pool, and how it runs tasks.
    pub pool: Pool,
    /// A pool that takes no more tasks from the same moment on, if it is still there; see [`DrainPool`].
    pub replaces: Option<PoolId>,
}

/// Stops a pool from taking tasks. Replies when all runs of the pool have ended.
///
/// # Errors
/// `NotFound` if there is no such pool.
#[derive(Debug, Clone, Copy, actix::Message)]
#[rtype(result = "Result<()>")]
pub struct DrainPool {
    /// The id that [`AddPool`] or [`ListPools`] returned.
    pub id: PoolId,
}

/// Removes a pool. Its remaining runs are stopped and their tasks are tried again in other pools. Tasks that only this
/// pool could run end.
///
/// # Errors
/// `NotFound` if there is no such pool.
#[derive(Debug, Clone, Copy, actix::Message)]
#[rtype(result = "Result<()>")]
pub struct RemovePool {
    /// The id that [`AddPool`] or [`ListPools`] returned.
    pub id: PoolId,
}

/// Asks for all pools, in order of preference.
#[derive(Debug, Clone, Copy, actix::Message)]
#[rtype(result = "Vec<PoolStatus>")]
pub struct ListPools;

/// Asks for the measurements of each pool, in order of preference. The answer costs O(pools), however many tasks there
/// are.
#[derive(Debug, Clone, Copy, actix::Message)]
#[rtype(result = "Vec<PoolMeasurement>")]
pub struct Measure;

/// The measurements of a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolMeasurement {
    /// Its name, its state and its slots.
    pub status: PoolStatus,
    /// The number of waiting tasks that would run in this pool if every pool had a free slot. Each waiting task counts
    /// for one pool.
    pub waiting: usize,
    /// How long ago the oldest of them was submitted.
    pub oldest: Option<Duration>,
    /// The number of slots that would be busy now if there were enough: one for each running task and one for each
    /// waiting task.
    pub desired: usize,
}

/// Stops the scheduler from admitting actions. Replies when no task is left.
#[derive(Debug, Clone, Copy, actix::Message)]
#[rtype(result = "()")]
pub struct Drain {
    /// Whether to end all tasks now, with a status that clients retry.
    pub cancel: bool,
}
