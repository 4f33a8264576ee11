//! What the metrics learn of a run when it is over.

use super::{ActionRun, Point, is_workers_fault};
use crate::{
    actors::worker::{clock::Timeline, launcher::Ending},
    telemetry::{RunFate, SandboxFailure, StageOfRun},
};
use gorego_reapi::error::{Error, Result};
use std::time::Duration;

impl ActionRun<'_> {
    /// Counts the run and the stages that it has reached.
    pub(super) fn count(&self, outcome: &Result<()>) {
        let metrics = &self.settings.metrics;
        let ending = self.ran.as_ref().map(|ran| ran.ending);
        if matches!(ending, Some(Ending::MemoryShort { .. })) {
            metrics.failed(SandboxFailure::MemoryShort);
        }
        metrics.ended(fate(ending, self.result.exit_code, outcome.as_ref().err()));
        for (stage, took) in stages(&self.timeline, self.order.attempt == 1) {
            metrics.stage(stage, took);
        }
    }
}

/// How long each stage took that has ended. Only the first attempt at a task says how long it waited, because the others were
/// submitted at the same time.
fn stages(timeline: &Timeline, is_first: bool) -> impl Iterator<Item = (StageOfRun, Duration)> {
    let waited = || timeline.wall(Point::WorkerStart).duration_since(timeline.queued()).unwrap_or_default();
    let between = |from, to| timeline.reached(to).map(|_| timeline.between(from, to));
    [
        (StageOfRun::Queue, is_first.then(waited)),
        (StageOfRun::Fetch, between(Point::FetchStart, Point::StageStart)),
        (StageOfRun::Stage, between(Point::StageStart, Point::FetchEnd)),
        (StageOfRun::Run, between(Point::RunStart, Point::RunEnd)),
        (StageOfRun::Upload, between(Point::UploadStart, Point::UploadEnd)),
    ]
    .into_iter()
    .filter_map(|(stage, took)| Some((stage, took?)))
}

fn fate(ending: Option<Ending>, exit_code: i32, error: Option<&Error>) -> RunFate {
    match (error, ending) {
        (Some(Error::Cancelled(_)), _) => RunFate::Cancelled,
        (Some(Error::DeadlineExceeded(_)), Some(Ending::TimedOut)) => RunFate::TimedOut,
        (Some(error), _) if is_workers_fault(error) || matches!(error, Error::DiskFull(_)) => RunFate::Broken,
        (Some(_), _) => RunFate::Refused,
        (None, Some(Ending::Exceeded(_) | Ending::LogTooLong(_))) => RunFate::Limited,
        (None, _) if exit_code == 0 => RunFate::Succeeded,
        (None, _) => RunFate::Failed,
    }
}
