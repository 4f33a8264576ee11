//! Disk space for a run: waits for space before the run, and frees space after a run that had too little.

use super::ActionRun;
use crate::{
    actors::worker::checkpoint::{Checkpoint, cancelled},
    size::Size,
};
use gorego_reapi::{
    error::{Error, Result},
    tree::InputTree,
};
use std::{
    thread,
    time::{Duration, Instant},
};

/// How long an action waits in its slot while the disk is full. If it failed at once, the next queued action would take
/// the slot and fail too.
pub(super) const ROOM_WAIT: Duration = Duration::from_secs(5);
/// How long an action that ran out of disk space waits for more before it is tried again.
const SECOND_ROOM_WAIT: Duration = Duration::from_secs(2);
/// How often the disk is checked while an action waits. No event tells when another program frees space.
const ROOM_POLL: Duration = Duration::from_millis(20);

impl ActionRun<'_> {
    /// If the disk is full, waits in the slot for a while instead of letting one action after the other fail.
    pub(super) fn wait_for_room(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        let disk = self.settings.build_root.disk();
        self.room_at_start = disk.look();
        if self.room_at_start.is_some_and(|space| space.is_low()) {
            // Free space now, so that no running command has to be stopped for lack of space.
            self.settings.build_root.relieve_disk();
            self.room_at_start = disk.look();
        }
        if self.room_at_start.is_none_or(|space| !space.is_exhausted()) {
            return Ok(());
        }
        self.relieve_disk(&|| self.control.cancel.is_cancelled());
        let end = Instant::now() + ROOM_WAIT;
        loop {
            self.room_at_start = disk.look();
            let Some(space) = self.room_at_start.filter(|space| !space.has_room()) else { return Ok(()) };
            checkpoint.check()?;
            if Instant::now() >= end {
                self.room_wait_expired = true;
                return Err(Error::Unavailable(format!(
                    "the disk of this server has no room to run the action: {space}"
                )));
            }
            thread::sleep(ROOM_POLL);
        }
    }

    /// The error of inputs for which the disk has no room names both sizes. Inputs that are larger than the whole disk
    /// never fit.
    pub(super) fn with_sizes(&self, error: Error, tree: &InputTree) -> Error {
        let space = self.settings.build_root.disk().look();
        let (Error::DiskFull(_), Some(space)) = (&error, space) else { return error };
        let message = format!(
            "the input root of the action has {}, and the disk of execution.build_root has no room for it: {space}",
            Size::from_bytes(tree.bytes()).rounded()
        );
        if tree.bytes() > space.total_bytes { Error::Precondition(message) } else { Error::DiskFull(message) }
    }

    fn relieve_disk(&self, is_cancelled: &dyn Fn() -> bool) {
        if let Some(tools) = &self.settings.tools {
            tools.clear();
        }
        self.settings.build_root.relieve_disk();
        if let Some(images) = &self.settings.images {
            images.relieve_disk();
        }
        self.store.relieve_disk(is_cancelled);
    }

    /// Turns a full disk into a temporary failure of this server: the store frees space, and the action may be retried
    /// once there is more space than before.
    pub(super) fn relieved(&self, error: Error) -> Error {
        let Error::DiskFull(message) = error else { return error };
        let is_cancelled = || self.control.cancel.is_cancelled();
        self.relieve_disk(&is_cancelled);
        let disk = self.settings.build_root.disk();
        let end = Instant::now() + SECOND_ROOM_WAIT;
        while let Some((before, now)) = self.room_at_start.zip(disk.look())
            && !now.has_more_than(&before)
            && !is_cancelled()
            && Instant::now() < end
        {
            thread::sleep(ROOM_POLL);
        }
        if is_cancelled() { cancelled() } else { Error::Unavailable(message) }
    }
}
