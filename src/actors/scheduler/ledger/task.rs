//! Tasks and runs. A task is the work of one action, and a run is one attempt at it. A run may outlive its task, if no
//! operation waits for the task any more.

use crate::{
    action::Action,
    actors::{
        scheduler::{
            operation::{OperationInfo, ServerLog},
            queue::{Charge, Owner, QueueEntry},
            quota::Load,
            slots::{PoolId, PoolSet, SlotName},
        },
        worker::{
            cancel::CancelToken,
            messages::{RunStage, TaskId},
        },
    },
    instance::InstanceId,
    limits::Room,
    log_streams::run::RunLogs,
};
use gorego_reapi::digest::Digest;
use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    sync::Arc,
    time::{Instant, SystemTime},
};
use tokio::sync::oneshot;

/// Actions with equal keys share a task. Actions that must not be cached have no key (EXE-15).
pub(super) type TaskKey = (InstanceId, Digest);

/// The work of one action. Its id is the number of its first operation, so ids ascend in the order of submission.
#[derive(Debug)]
pub(super) struct Task {
    pub(super) action: Arc<Action>,
    /// The value of [`Action::weight`], which is expensive to compute.
    pub(super) weight: usize,
    pub(super) pools: PoolSet,
    /// The memory that was too little for an earlier run. The pools of the task give it more, as long as there are such
    /// pools.
    pub(super) more_than: Option<u64>,
    /// The first operation. It may have been cancelled since.
    pub(super) first: Arc<OperationInfo>,
    pub(super) queued_at: SystemTime,
    /// The time of the submission on the monotonic clock. It does not change if the task is tried again.
    pub(super) queued: Instant,
    pub(super) waiting_since: Instant,
    pub(super) attempts: u32,
    /// The number of attempts that ended because their pools were removed. They do not count against `max_attempts`.
    pub(super) evictions: u32,
    /// The operations that wait, as (priority, number), by owner. There is at least one owner, and no set is empty. The
    /// first operation of each set determines the queue entry of the task for this owner.
    pub(super) waiters: BTreeMap<Owner, BTreeSet<(i32, u64)>>,
    /// The owner for which the task counts in the quota of the queue; one of the above.
    pub(super) owner: Owner,
    /// The number of waiters with followers, as of when they were last examined.
    pub(super) followers: usize,
    /// The time since when no waiter has followers; `None` if one has.
    pub(super) unfollowed_since: Option<Instant>,
    pub(super) step: TaskStep,
    /// Held while the image of the task is pulled. It is dropped with the task, so that the pull is no longer waited
    /// for.
    pub(super) image_order: Option<oneshot::Sender<Infallible>>,
    /// Stops the staging of its inputs, which was ordered while it waited. A task has at most one such order.
    pub(super) staging: Option<CancelToken>,
    /// Texts about its runs so far, in order. There is at most one for each run.
    pub(super) server_logs: Vec<ServerLog>,
    /// The pool in whose queue it is closest to the front, and its position there when positions were computed
    /// last.
    pub(super) position: Option<(PoolId, usize)>,
    /// The pool for whose demand the task counts while it waits.
    pub(super) home: Option<PoolId>,
}

/// The progress of a task towards its run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TaskStep {
    /// It waits for a check of its inputs.
    Unchecked,
    /// The store checks its inputs.
    Checking,
    /// Its container image is being pulled.
    AwaitingImage,
    /// It waits for a slot.
    Ready,
    /// It has a slot and an entry in `runs`.
    Running,
}

/// One attempt at a task, on a slot. It may outlive its task.
#[derive(Debug)]
pub(super) struct TaskRun {
    /// The number of the attempt at its task. A report of another attempt is not about this run.
    pub(super) attempt: u32,
    pub(super) pool: PoolId,
    pub(super) place: Arc<SlotName>,
    /// The room that it takes from its pool.
    pub(super) room: Room,
    /// The owner and priority for which it counts in the queue of its pool.
    pub(super) charge: Charge,
    pub(super) cancel: CancelToken,
    pub(super) started: Instant,
    pub(super) deadline: Instant,
    pub(super) reached: Option<(RunStage, SystemTime)>,
    /// The streams in which its output can be followed.
    pub(super) logs: Option<RunLogs>,
    /// Whether its deadline has passed. Its task has ended, but its slot stays busy until the worker answers.
    pub(super) stuck: bool,
    /// Whether its pool was removed. The run was told to stop, and its task is tried again in another pool. This
    /// happens at the deadline of the run even if the run has not stopped.
    pub(super) evicted: bool,
}

impl Task {
    pub(super) fn key(&self) -> Option<TaskKey> {
        key(&self.action)
    }

    /// Its queue entry for one of its owners.
    pub(super) fn entry(&self, id: TaskId, owner: Owner) -> Option<QueueEntry> {
        let &(priority, _) = self.waiters.get(&owner)?.first()?;
        let followed = self.unfollowed_since.is_none();
        Some(QueueEntry { priority, owner, task: id, since: self.queued, followed })
    }

    /// Its queue entries for all of its owners.
    pub(super) fn entries(&self, id: TaskId) -> Vec<QueueEntry> {
        self.waiters.keys().filter_map(|owner| self.entry(id, *owner)).collect()
    }

    /// Whether at most one operation waits for it.
    pub(super) fn has_one_waiter(&self) -> bool {
        self.waiters.len() <= 1 && self.waiters.values().all(|numbers| numbers.len() <= 1)
    }

    /// Its part of the quota.
    pub(super) fn load(&self) -> Load {
        Load { waiting: usize::from(self.step != TaskStep::Running), weight: self.weight }
    }

    /// The number of attempts that failed, or whose results are not known.
    pub(super) fn failures(&self) -> u32 {
        self.attempts.saturating_sub(self.evictions)
    }

    /// Keeps the text about the latest run, under a plain file name (EXE-61).
    pub(super) fn keep_log(&mut self, log: Option<Digest>) {
        let name = format!("run-{}.log", self.attempts);
        self.server_logs.extend(log.map(|digest| ServerLog { name, digest }));
    }

    pub(super) fn numbers(&self) -> impl Iterator<Item = u64> {
        self.waiters.values().flatten().map(|&(_, number)| number)
    }
}

pub(super) fn key(action: &Action) -> Option<TaskKey> {
    (!action.do_not_cache).then(|| (action.instance.id(), action.digest))
}
