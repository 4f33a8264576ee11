//! Updates the metrics when a run is over.

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

/// The durations of the stages that have ended. The wait in the queue is included only for the first attempt at a task,
/// because later attempts have the same submission time.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        actors::worker::clock::Moment,
        limits::{Exceeded, LimitedResource},
    };
    use std::time::SystemTime;

    #[test]
    fn the_outcome_of_a_run_says_whether_action_client_or_server_is_at_fault() {
        let text = String::new;
        let exceeded = Ending::Exceeded(Exceeded { resource: LimitedResource::Memory, used: 2, limit: 1 });
        let memory_short = Ending::MemoryShort { used: 1, total: 1 };
        for (ending, exit_code, error, expected) in [
            (Some(Ending::Exited(0)), 0, None, RunFate::Succeeded),
            (Some(Ending::Exited(3)), 3, None, RunFate::Failed),
            (Some(Ending::Signalled(9)), 137, None, RunFate::Failed),
            (Some(exceeded), 137, None, RunFate::Limited),
            (Some(Ending::TimedOut), 137, Some(Error::DeadlineExceeded(text())), RunFate::TimedOut),
            (Some(Ending::Cancelled), 137, Some(Error::Cancelled(text())), RunFate::Cancelled),
            (None, 0, Some(Error::Cancelled(text())), RunFate::Cancelled),
            (None, 0, Some(Error::MissingBlobs(Vec::new())), RunFate::Refused),
            (None, 0, Some(Error::Precondition(text())), RunFate::Refused),
            (None, 0, Some(Error::Internal(text())), RunFate::Broken),
            (Some(Ending::Exited(0)), 0, Some(Error::DiskFull(text())), RunFate::Broken),
            (Some(memory_short), 137, Some(Error::Unavailable(text())), RunFate::Broken),
        ] {
            assert_eq!(fate(ending, exit_code, error.as_ref()), expected, "{ending:?} {error:?}");
        }
    }

    #[test]
    fn only_stages_that_have_ended_count_and_the_queue_only_at_the_first_attempt() {
        let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000);
        let mut timeline = Timeline::start(wall - Duration::from_secs(7), wall, Moment(100));
        timeline.note(Point::FetchStart, Moment(200));
        timeline.note(Point::StageStart, Moment(250));
        let found = |timeline: &Timeline, is_first| stages(timeline, is_first).collect::<Vec<_>>();
        let (queue, fetch) = (Duration::from_secs(7), Duration::from_nanos(50));
        assert_eq!(found(&timeline, true), [(StageOfRun::Queue, queue), (StageOfRun::Fetch, fetch)]);
        for (at, point) in
            [Point::FetchEnd, Point::RunStart, Point::RunEnd, Point::UploadStart, Point::UploadEnd]
                .into_iter()
                .enumerate()
        {
            timeline.note(point, Moment(300 + 10 * at as u64));
        }
        let nanos: Vec<_> = stages(&timeline, false).map(|(stage, took)| (stage, took.as_nanos())).collect();
        let expected = [
            (StageOfRun::Fetch, 50),
            (StageOfRun::Stage, 50),
            (StageOfRun::Run, 10),
            (StageOfRun::Upload, 10),
        ];
        assert_eq!(nanos, expected);
    }
}
