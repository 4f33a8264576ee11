//! Benchmarks for any server of the Remote Execution API: `gorego bench`.
//!
//! A [`scenario`] defines what one call does. The [`driver`](drive) makes many calls, either as fast as a number of
//! callers can ([`Pace::Closed`]) or at a fixed rate ([`Pace::Open`]), and measures each. Everything that a call needs,
//! such as blobs that the server has never seen, is created before the clock runs. Every answer is checked, and a wrong
//! one counts as an error.
//! [`limits`] measures the machine itself, so that a result can be read as a share of the limit of its scenario.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod compare;
mod drive;
mod figures;
pub mod limits;
mod noise;
mod process;
mod progress;
mod report;
mod scenario;
mod target;

pub use compare::compare;
pub use drive::Pace;
pub use figures::{Figures, Latency};
pub use limits::{Limit, Limits};
pub use process::ServerUse;
pub use progress::Progress;
pub use report::{Report, ScenarioReport};
pub use scenario::{Scenario, find, scenarios};
pub use target::Target;

use gorego_reapi::error::Result;
use limits::Machine;
use std::{path::PathBuf, time::Duration};

/// How long and with which load each scenario is measured.
#[derive(Debug, Clone)]
pub struct Options {
    /// Number of concurrent callers; `None` uses the default of each scenario.
    pub callers: Option<usize>,
    /// Calls per second, or as many as the callers can make.
    pub pace: Pace,
    /// Time for which calls are made before the measurement.
    pub warm_up: Duration,
    /// Time for which calls are measured.
    pub duration: Duration,
    /// Process id of the server, if it runs on this machine: its CPU time and memory are reported.
    pub pid: Option<u32>,
    /// A directory on the disk of the store, to measure the limit of each scenario too.
    pub limits: Option<PathBuf>,
}

/// Runs these scenarios one after the other.
///
/// # Errors
/// If a scenario cannot be prepared, for example because the server refuses its uploads, or if a limit cannot be
/// measured. Failed calls are not errors; they are counted.
pub async fn run(
    target: &Target,
    chosen: &[&'static Scenario],
    options: &Options,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<Report> {
    let mut report = Report::new(target, options);
    let mut machine = options.limits.as_deref().map(|directory| Machine::new(directory, options));
    for scenario in chosen {
        let limit = match (&mut machine, &scenario.bound) {
            (Some(machine), Some(bound)) => Some(machine.limit(bound.kind, progress).await?),
            _ => None,
        };
        progress(Progress::WarmUp(scenario.name));
        let callers = options.callers.unwrap_or(scenario.callers);
        let workload = scenario.start(target, callers).await?;
        let measured = drive::measure(scenario.name, &*workload, callers, options, progress).await?;
        report.scenarios.push(ScenarioReport::new(scenario, callers, measured, limit));
    }
    Ok(report)
}
