//! Tasks and runs: the work, and one try at it. A run may outlive its task, when nobody waits for it any more.

use crate::{
    action::Action,
    actors::{
        scheduler::{
            operation::{OperationInfo, ServerLog},
            queue::{Charge, Owner, Place},
            room::Load,
            slots::{PoolId, PoolSet},
            transition::RunPlace,
        },
        worker::{
            cancel::CancelToken,
            messages::{RunStage, TaskId},
        },
    },
    instance::InstanceId,
    log_streams::run::RunLogs,
};
use gorego_reapi::digest::Digest;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Instant, SystemTime},
};

/// What makes two actions the same work. Never made for actions that must not be cached (EXE-15).
pub(super) type Key = (InstanceId, Digest);

/// The work of one action. Its id is the number of the operation that brought it in, so that ids ascend with age.
#[derive(Debug)]
pub(super) struct Task {
    pub(super) action: Arc<Action>,
    /// [`Action::weight`], which goes through all arguments and is asked for at each step.
    pub(super) weight: usize,
    pub(super) pools: PoolSet,
    /// The operation that brought it in; it may have been cancelled since.
    pub(super) first: Arc<OperationInfo>,
    pub(super) queued_at: SystemTime,
    /// The same on the other clock; it goes on for a task that is tried again.
    pub(super) queued: Instant,
    pub(super) waiting_since: Instant,
    pub(super) attempts: u32,
    /// The operations that wait, by owner: (priority, number). No set is empty, and there is one at least. The first of each
    /// set gives the task its place for this owner.
    pub(super) waiters: BTreeMap<Owner, BTreeSet<(i32, u64)>>,
    /// One of these owners: the one for which the task counts in the room that there is.
    pub(super) owner: Owner,
    /// How many of the waiters are followed, as of when they were looked at last.
    pub(super) followers: usize,
    /// Since when none is; `None` while one is.
    pub(super) unfollowed_since: Option<Instant>,
    pub(super) step: Step,
    /// Accounts of its runs so far, in order; at most one a try.
    pub(super) server_logs: Vec<ServerLog>,
    /// The pool and the position in its queue, as of when somebody asked last.
    pub(super) position: Option<(PoolId, usize)>,
}

/// Where a task is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// In the queue of those whose inputs have to be looked at.
    Unchecked,
    /// The CAS looks at its inputs.
    Checking,
    /// In the queue for a slot.
    Ready,
    /// It has a slot, and an entry in `runs`.
    Running,
}

/// One try of a task on a slot. It may outlive its task.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) pool: PoolId,
    pub(super) place: Arc<RunPlace>,
    /// What it counts for in the queue of its pool.
    pub(super) charge: Charge,
    pub(super) cancel: CancelToken,
    pub(super) started: Instant,
    pub(super) deadline: Instant,
    pub(super) reached: Option<(RunStage, SystemTime)>,
    /// Where its output can be followed.
    pub(super) logs: Option<RunLogs>,
    /// Its deadline passed: nobody waits for it any more, but its slot is not free either.
    pub(super) stuck: bool,
    /// Its pool was removed, so it was told to stop although its task is still wanted.
    pub(super) evicted: bool,
}

impl Task {
    pub(super) fn key(&self) -> Option<Key> {
        key(&self.action)
    }

    /// Where it stands for one of its owners.
    pub(super) fn place(&self, id: TaskId, owner: Owner) -> Option<Place> {
        let &(priority, _) = self.waiters.get(&owner)?.first()?;
        let followed = self.unfollowed_since.is_none();
        Some(Place { priority, owner, task: id, since: self.queued, followed })
    }

    /// Where it stands, for each of its owners.
    pub(super) fn places(&self, id: TaskId) -> Vec<Place> {
        self.waiters.keys().filter_map(|owner| self.place(id, *owner)).collect()
    }

    /// Whether no more than one operation waits for it.
    pub(super) fn has_one_waiter(&self) -> bool {
        self.waiters.len() <= 1 && self.waiters.values().all(|numbers| numbers.len() <= 1)
    }

    /// What it takes up as it is.
    pub(super) fn load(&self) -> Load {
        Load { waiting: usize::from(self.step != Step::Running), weight: self.weight }
    }

    /// Keeps the account of the latest try, under a plain file name (EXE-61).
    pub(super) fn keep_log(&mut self, log: Option<Digest>) {
        let name = format!("run-{}.log", self.attempts);
        self.server_logs.extend(log.map(|digest| ServerLog { name, digest }));
    }

    pub(super) fn numbers(&self) -> impl Iterator<Item = u64> {
        self.waiters.values().flatten().map(|&(_, number)| number)
    }
}

pub(super) fn key(action: &Action) -> Option<Key> {
    (!action.do_not_cache).then(|| (action.instance.id(), action.digest))
}
