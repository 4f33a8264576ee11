//! [`Checkpoint`]: asked between two files, so that a cancelled or slow transfer ends soon.

use super::cancel::CancelToken;
use gorego_reapi::error::{Error, Result};
use std::time::{Duration, Instant};

/// The bounds of one step of a run.
#[derive(Debug)]
pub(super) struct Checkpoint<'a> {
    cancel: &'a CancelToken,
    step: &'static str,
    limit: Duration,
    deadline: Option<Instant>,
}

impl<'a> Checkpoint<'a> {
    /// For a step that may take `limit` from now; `step` completes "... took longer than".
    pub(super) fn new(cancel: &'a CancelToken, step: &'static str, limit: Duration) -> Self {
        // A limit beyond the clock's range is no limit.
        Self { cancel, step, limit, deadline: Instant::now().checked_add(limit) }
    }

    /// Whether the step may go on.
    ///
    /// # Errors
    /// `Cancelled`, or `Unavailable` once the step took too long: not `DeadlineExceeded`, which clients take for the timeout
    /// of the command (EXE-45).
    pub(super) fn check(&self) -> Result<()> {
        if self.cancel.is_cancelled() {
            return Err(cancelled());
        }
        match self.deadline {
            Some(deadline) if Instant::now() >= deadline => Err(Error::Unavailable(format!(
                "{} took longer than {:?} (execution.transfer_timeout)",
                self.step, self.limit
            ))),
            _ => Ok(()),
        }
    }
}

/// The error of a run that was told to stop.
pub(super) fn cancelled() -> Error {
    Error::Cancelled("the action was cancelled".into())
}
