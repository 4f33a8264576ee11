//! The builds whose operations are unfinished and followed. They are active although they send no requests, so their
//! leases in the store must not end.

use super::{Ledger, OperationInfo, TaskId};
use crate::caller::{Build, Owner};
use std::{
    collections::HashSet,
    ops::Bound::{Excluded, Unbounded},
};

impl Ledger {
    /// The builds that follow the next `max` tasks. Successive calls go through all tasks, and then begin again.
    pub(crate) fn active_builds(&mut self, max: usize) -> HashSet<Owner> {
        let after = self.examined.map_or(Unbounded, Excluded);
        let tasks: Vec<TaskId> = self.tasks.range((after, Unbounded)).map(|(id, _)| *id).take(max).collect();
        self.examined = tasks.last().copied().filter(|_| tasks.len() == max);
        tasks.into_iter().flat_map(|id| self.followers_of(id)).collect()
    }

    fn followers_of(&self, id: TaskId) -> Vec<Owner> {
        let Some(task) = self.tasks.get(&id).filter(|task| task.unfollowed_since.is_none()) else {
            return Vec::new();
        };
        // All operations of one owner belong to one build.
        let first = task.waiters.values().filter_map(|own| own.first());
        let operations = first.filter_map(|(_, number)| self.register.get(*number));
        operations.map(|operation| build_of(&operation.info)).collect()
    }
}

/// The build of an operation, as the store knows it.
fn build_of(info: &OperationInfo) -> Owner {
    Owner { peer: info.peer, build: Build::of(&info.client.tool_invocation_id) }
}
