//! [`Transition`]: what happened to an operation, as a value. The ledger returns them; logs, metrics and a journal read them.

use super::operation::{OperationInfo, Outcome};
use crate::actors::worker::messages::SlotId;
use gorego_reapi::{error::Error, proto::reapi};
use prost_types::Timestamp;
use std::{sync::Arc, time::Duration};

/// One step of one operation.
#[derive(Debug, Clone)]
pub struct Transition {
    /// Whose step.
    pub info: Arc<OperationInfo>,
    /// The operation's priority; lower runs sooner.
    pub priority: i32,
    /// Which step.
    pub event: Event,
}

/// The steps of an operation. Each operation has exactly one `Completed`, and nothing after it.
#[derive(Debug, Clone)]
pub enum Event {
    /// It was admitted and waits.
    Queued {
        /// It shares a task with operations that came before it.
        joined: bool,
    },
    /// Its task was given to a worker, or it joined a task that a worker has.
    Executing {
        /// Where.
        place: Arc<RunPlace>,
        /// How long it waited.
        queued_for: Duration,
        /// Which try this is, from 1.
        attempt: u32,
    },
    /// A worker failed under its task, which waits again.
    Requeued {
        /// What happened.
        reason: Error,
        /// The try that failed, from 1.
        attempt: u32,
    },
    /// It ended.
    Completed {
        /// How.
        outcome: Arc<Outcome>,
        /// Where it ran; `None` when it never did.
        place: Option<Arc<RunPlace>>,
        /// How long it waited before it ran or ended; `None` for one that was over when it was admitted.
        queued_for: Option<Duration>,
    },
}

/// A slot by its pool's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunPlace {
    /// The pool.
    pub pool: Arc<str>,
    /// The slot in it.
    pub slot: SlotId,
    /// The name of the worker that serves the slot.
    pub worker: Arc<str>,
}

/// How long the parts of a run took, by the worker's own clock; `None` for parts that were not reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Phases {
    /// Bringing in inputs.
    pub fetch: Option<Duration>,
    /// The command.
    pub run: Option<Duration>,
    /// Storing outputs.
    pub upload: Option<Duration>,
}

impl Phases {
    /// The phases that a result's metadata tells.
    pub fn of(result: &reapi::ActionResult) -> Self {
        let Some(metadata) = &result.execution_metadata else { return Self::default() };
        let between = |start: &Option<Timestamp>, end: &Option<Timestamp>| {
            let (start, end) = start.as_ref().zip(end.as_ref())?;
            let seconds = end.seconds.checked_sub(start.seconds)?;
            let nanos = i64::from(end.nanos).checked_sub(start.nanos.into())?;
            let nanos = seconds.checked_mul(1_000_000_000)?.checked_add(nanos)?;
            Some(Duration::from_nanos(nanos.try_into().unwrap_or(0)))
        };
        Self {
            fetch: between(&metadata.input_fetch_start_timestamp, &metadata.input_fetch_completed_timestamp),
            run: between(&metadata.execution_start_timestamp, &metadata.execution_completed_timestamp),
            upload: between(
                &metadata.output_upload_start_timestamp,
                &metadata.output_upload_completed_timestamp,
            ),
        }
    }
}
