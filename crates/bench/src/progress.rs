//! [`Progress`]: what a run does now, for the progress line.

use std::{fmt, time::Duration};

/// The progress of a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Progress {
    /// A limit of the machine is measured.
    Limit(&'static str),
    /// A scenario is set up, and its warm-up runs.
    WarmUp(&'static str),
    /// A scenario is measured.
    Measured {
        /// Name of the scenario.
        scenario: &'static str,
        /// Calls that were measured so far.
        calls: u64,
        /// Measured time so far.
        time: Duration,
    },
}

impl fmt::Display for Progress {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Limit(name) => write!(formatter, "{name}: the limit of this machine"),
            Self::WarmUp(scenario) => write!(formatter, "{scenario}: warm-up"),
            Self::Measured { scenario, calls, time } => {
                write!(formatter, "{scenario}: {calls} calls in {:.1} s", time.as_secs_f64())
            }
        }
    }
}
