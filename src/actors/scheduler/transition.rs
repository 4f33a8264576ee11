//! [`Transition`]: a step of an operation, as a value. The ledger returns transitions, and the log lines are written
//! from them.

use super::{
    operation::{OperationInfo, Outcome},
    slots::SlotName,
};
use gorego_reapi::{error::Error, proto::reapi};
use prost_types::Timestamp;
use std::{sync::Arc, time::Duration};

/// A step of one operation.
#[derive(Debug, Clone)]
pub(crate) struct Transition {
    pub(crate) info: Arc<OperationInfo>,
    /// The priority of the operation; lower values run sooner.
    pub(crate) priority: i32,
    pub(crate) event: OperationEvent,
}

/// The steps of an operation. Each operation has exactly one `Completed`, and nothing after it.
#[derive(Debug, Clone)]
pub(crate) enum OperationEvent {
    /// The operation was admitted and waits.
    Queued {
        /// Whether it has joined the task of an earlier operation.
        joined: bool,
    },
    /// Its task was given to a worker, or it joined a task that is running.
    Executing {
        place: Arc<SlotName>,
        /// How long the operation has waited.
        queued_for: Duration,
        /// The number of the attempt, from 1.
        attempt: u32,
    },
    /// A worker failed while it ran the task, or its pool was removed; the task waits again.
    Requeued {
        /// The failure of the worker, or the removal of the pool.
        reason: Error,
        /// The number of the failed attempt, from 1.
        attempt: u32,
    },
    /// The operation ended, with a result or an error.
    Completed {
        outcome: Arc<Outcome>,
        /// The slot on which it ran last; `None` if it did not run.
        place: Option<Arc<SlotName>>,
        /// How long the operation waited before it ran or ended; `None` if it had ended when it was admitted.
        queued_for: Option<Duration>,
    },
}

/// The durations of the parts of a run, by the clock of the worker. `None` for parts that were not reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Phases {
    /// How long it took to fetch the inputs.
    pub(crate) fetch: Option<Duration>,
    /// How long the command ran.
    pub(crate) run: Option<Duration>,
    /// How long it took to store the outputs.
    pub(crate) upload: Option<Duration>,
}

impl Phases {
    /// The phases according to the metadata of a result.
    pub(crate) fn of(result: &reapi::ActionResult) -> Self {
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
