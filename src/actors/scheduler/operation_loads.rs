//! [`OperationLoads`]: the number of unfinished operations of each peer in each instance, for quotas. Pure.

use super::{
    operation::{OperationInfo, Stage},
    settings::QUEUE_FULL_RETRY,
};
use crate::{
    caller::Peer,
    instance::InstanceId,
    quotas::{OperationLimits, over_quota},
};
use gorego_reapi::error::Result;
use std::collections::HashMap;

/// The loads; there is an entry for each peer and instance with an unfinished operation.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct OperationLoads(HashMap<(Peer, InstanceId), OperationLoad>);

/// The operations of one peer in one instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct OperationLoad {
    unfinished: usize,
    /// The number of them that wait for a worker.
    queued: usize,
}

fn key(info: &OperationInfo) -> (Peer, InstanceId) {
    (info.peer, info.instance.id())
}

impl OperationLoads {
    /// Counts an operation that begins at this stage.
    pub(super) fn enter(&mut self, info: &OperationInfo, stage: Stage) {
        let load = self.0.entry(key(info)).or_default();
        load.unfinished += 1;
        load.queued += usize::from(stage == Stage::Queued);
    }

    /// Counts a change of the stage of an unfinished operation.
    pub(super) fn turn(&mut self, info: &OperationInfo, from: Stage, to: Stage) {
        let Some(load) = self.0.get_mut(&key(info)).filter(|_| from != to) else { return };
        match (from, to) {
            (Stage::Queued, _) => load.queued = load.queued.saturating_sub(1),
            (_, Stage::Queued) => load.queued += 1,
            _ => {}
        }
    }

    /// Counts the end of an operation that was at this stage.
    pub(super) fn leave(&mut self, info: &OperationInfo, stage: Stage) {
        let Some(load) = self.0.get_mut(&key(info)) else { return };
        load.unfinished = load.unfinished.saturating_sub(1);
        load.queued = load.queued.saturating_sub(usize::from(stage == Stage::Queued));
        if load.unfinished == 0 {
            self.0.remove(&key(info));
        }
    }

    /// Checks whether one more operation is within the limits.
    ///
    /// # Errors
    /// `OverQuota` if it is not.
    pub(super) fn check(&self, info: &OperationInfo, limits: OperationLimits) -> Result<()> {
        let load = self.0.get(&key(info)).copied().unwrap_or_default();
        let counts = [
            (limits.operations, load.unfinished, "unfinished operations"),
            (limits.queued, load.queued, "operations that wait for a worker"),
        ];
        for (limit, count, what) in counts {
            if limit.is_some_and(|limit| count >= limit) {
                let yours = info.peer.own_name();
                let problem = format!("{yours} has {count} {what} here, the most that it may have");
                return Err(over_quota(&problem, QUEUE_FULL_RETRY));
            }
        }
        Ok(())
    }
}
