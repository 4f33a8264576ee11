//! Which waiting tasks have their inputs staged before they get a slot.
//!
//! Each pool stages the inputs of one task at a time, and takes the task closest to the front of its queue. Only tasks
//! near the front are considered, so that the trees are still there when the tasks run. A task is considered once, so a
//! task that is tried again or moves in the queue costs nothing more. Tasks without followers are left out, because
//! they will probably not run.
//!
//! Staging is only an optimisation: a task does not wait for it and does not fail with it.

use super::Ledger;
use crate::{
    action::Action,
    actors::{
        scheduler::slots::PoolId,
        worker::{cancel::CancelToken, messages::TaskId},
    },
    caller::{Build, Owner},
};
use std::sync::Arc;

/// Maximum number of tasks at the front of a queue whose inputs are staged. A pool with fewer slots considers as many
/// tasks as it has slots. The trees of more tasks could be evicted before their tasks run.
pub(super) const MAX_STAGED_AHEAD: usize = 8;

/// A decision: stage the inputs of a waiting task.
#[derive(Debug)]
pub(crate) struct StagingOrder {
    pub(crate) task: TaskId,
    pub(crate) pool: PoolId,
    pub(crate) action: Arc<Action>,
    /// The peer for which the task counts, and the build of the first operation.
    pub(crate) owner: Owner,
    /// Stopped when the task gets a slot, and cancelled when it ends.
    pub(crate) cancel: CancelToken,
}

impl Ledger {
    /// From now on, this pool stages the inputs of tasks that wait for it.
    pub(crate) fn stage_ahead_in(&mut self, pool: PoolId) {
        self.staging.insert(pool, false);
    }

    /// The next task whose inputs should be staged while it waits. Called after [`Ledger::assign`], so that no task is
    /// returned that gets a slot at once. Each order must be answered by [`Ledger::staging_ended`] in any case.
    pub(crate) fn next_staging(&mut self) -> Option<StagingOrder> {
        let pools = self.slots.order().iter().copied();
        let is_idle = |pool: &PoolId| self.staging.get(pool) == Some(&false) && self.slots.is_open(*pool);
        let mut idle = pools.filter(is_idle);
        let (pool, id) = idle.find_map(|pool| Some((pool, self.next_to_stage(pool)?)))?;
        let task = self.tasks.get_mut(&id)?;
        let cancel = CancelToken::without_event();
        task.staging = Some(cancel.clone());
        self.staging.insert(pool, true);
        let build = Build::of(&task.first.client.tool_invocation_id);
        let owner = Owner { peer: task.owner.peer, build };
        Some(StagingOrder { task: id, pool, action: task.action.clone(), owner, cancel })
    }

    /// A pool has carried out its order, or has given it up.
    pub(crate) fn staging_ended(&mut self, pool: PoolId) {
        if let Some(is_busy) = self.staging.get_mut(&pool) {
            *is_busy = false;
        }
    }

    /// The first of the tasks near the front of a queue whose inputs were not ordered yet.
    fn next_to_stage(&self, pool: PoolId) -> Option<TaskId> {
        let (_, slots) = self.slots.count(pool);
        let front = self.ready.get(&pool)?.first(slots.min(MAX_STAGED_AHEAD));
        let is_new = |id: &TaskId| {
            self.tasks.get(id).is_some_and(|task| task.staging.is_none() && task.unfollowed_since.is_none())
        };
        front.into_iter().find(is_new)
    }
}
