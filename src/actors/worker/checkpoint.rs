//! [`Checkpoint`]: checked between two files, so that a cancelled or slow transfer ends soon.

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
    /// A checkpoint for a step that may take `limit` from now. `step` begins the error message "... took longer than".
    pub(super) fn new(cancel: &'a CancelToken, step: &'static str, limit: Duration) -> Self {
        // A limit beyond the range of the clock means no limit.
        Self { cancel, step, limit, deadline: Instant::now().checked_add(limit) }
    }

    /// Whether nothing new should be begun. The step itself may continue if it was not cancelled.
    pub(super) fn is_stopped(&self) -> bool {
        self.cancel.is_stopped()
    }

    /// Whether half of the time for the step is over.
    pub(super) fn is_half_over(&self) -> bool {
        let half = self.deadline.and_then(|deadline| deadline.checked_sub(self.limit / 2));
        half.is_some_and(|half| Instant::now() >= half)
    }

    /// Half of the time that is left for the step. `None`: the time is not limited.
    pub(super) fn half_of_rest(&self) -> Option<Duration> {
        self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()) / 2)
    }

    /// A checkpoint for a part of this step, which may take half of the time that is left. If it takes too long, the
    /// other half is left for something else.
    pub(super) fn part(&self, step: &'static str) -> Self {
        Self::new(self.cancel, step, self.half_of_rest().unwrap_or(Duration::MAX))
    }

    /// Checks that the step may continue.
    ///
    /// # Errors
    /// `Cancelled`; `Unavailable` if the step took too long. It is not `DeadlineExceeded`, which clients would take for
    /// the timeout of the command (EXE-45).
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

/// The error of a cancelled run.
pub(super) fn cancelled() -> Error {
    Error::Cancelled("the action was cancelled".into())
}
