//! The times of the steps of a run.
//!
//! All times of one run are read from the monotonic clock, which the runner process shares. They are converted to wall
//! time by one pair of readings at the start. So their order and distances stay correct even if the wall clock is set
//! during the run (EXE-60). Only [`Moment::now`] and [`Timeline::start`] read a clock.

use gorego_reapi::{
    auxiliary::pack_resource_usage,
    proto::{gorego, reapi},
};
use rustix::time::{ClockId, clock_gettime};
use std::time::{Duration, SystemTime};

/// A reading of `CLOCK_MONOTONIC` in nanoseconds. It can be compared between all processes of this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Moment(pub u64);

impl Moment {
    pub fn now() -> Self {
        let time = clock_gettime(ClockId::Monotonic);
        // Both parts count from boot, so neither is negative, and the sum does not overflow within 500 years.
        Self((time.tv_sec as u64).saturating_mul(1_000_000_000).saturating_add(time.tv_nsec as u64))
    }

    /// The time from `earlier` to this moment; zero if `earlier` is later.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

/// The points of a run that its metadata reports, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Point {
    /// The worker took the task.
    WorkerStart,
    /// The worker began to fetch the inputs.
    FetchStart,
    /// The input tree was known, and the worker began to write the inputs.
    StageStart,
    /// The inputs were in place.
    FetchEnd,
    /// The command began to run.
    RunStart,
    /// The command ended or was killed.
    RunEnd,
    /// The worker began to store the outputs.
    UploadStart,
    /// The outputs were stored.
    UploadEnd,
    /// The worker was done, except for recording the result.
    WorkerEnd,
}

const POINTS: usize = Point::WorkerEnd as usize + 1;

/// The times of one run. A point that was not reached has the time of the previous one, so that there are always nine
/// ordered timestamps.
#[derive(Debug, Clone)]
pub(crate) struct Timeline {
    queued: SystemTime,
    wall: SystemTime,
    points: [Option<Moment>; POINTS],
}

impl Timeline {
    /// The timeline of a run that starts at `start`, when the wall clock shows `wall`.
    pub(crate) fn start(queued: SystemTime, wall: SystemTime, start: Moment) -> Self {
        let mut points = [None; POINTS];
        points[Point::WorkerStart as usize] = Some(start);
        Self { queued: queued.min(wall), wall, points }
    }

    /// Records when a point was reached.
    pub(crate) fn note(&mut self, point: Point, at: Moment) {
        self.points[point as usize] = Some(at);
    }

    /// The time of a point. It is never before the time of an earlier point.
    pub(crate) fn at(&self, point: Point) -> Moment {
        self.points[..=point as usize].iter().flatten().copied().max().unwrap_or_default()
    }

    /// The wall time of a point; `None` if it was not reached.
    pub(crate) fn reached(&self, point: Point) -> Option<SystemTime> {
        self.points[point as usize].map(|_| self.wall(point))
    }

    /// When the action was queued.
    pub(crate) fn queued(&self) -> SystemTime {
        self.queued
    }

    /// The wall time of a point; see [`Timeline::at`].
    pub(crate) fn wall(&self, point: Point) -> SystemTime {
        let since_start = self.at(point).since(self.at(Point::WorkerStart));
        self.wall.checked_add(since_start).unwrap_or(self.wall)
    }

    /// The time between two points.
    pub(crate) fn between(&self, from: Point, to: Point) -> Duration {
        self.at(to).since(self.at(from))
    }

    /// The metadata of a result made by `worker`.
    pub(crate) fn metadata(
        &self,
        worker: String,
        usage: Option<&gorego::ResourceUsage>,
    ) -> reapi::ExecutedActionMetadata {
        let wall = |point| Some(prost_types::Timestamp::from(self.wall(point)));
        let run = self.between(Point::RunStart, Point::RunEnd);
        reapi::ExecutedActionMetadata {
            worker,
            queued_timestamp: Some(self.queued.into()),
            worker_start_timestamp: wall(Point::WorkerStart),
            worker_completed_timestamp: wall(Point::WorkerEnd),
            input_fetch_start_timestamp: wall(Point::FetchStart),
            input_fetch_completed_timestamp: wall(Point::FetchEnd),
            execution_start_timestamp: wall(Point::RunStart),
            execution_completed_timestamp: wall(Point::RunEnd),
            output_upload_start_timestamp: wall(Point::UploadStart),
            output_upload_completed_timestamp: wall(Point::UploadEnd),
            auxiliary_metadata: usage.map(pack_resource_usage).into_iter().collect(),
            virtual_execution_duration: prost_types::Duration::try_from(run).ok(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::UNIX_EPOCH;

    /// EXE-60.
    #[test]
    fn all_nine_timestamps_are_set_and_ordered_even_if_steps_were_not_reached_or_clocks_disagree() {
        let wall = UNIX_EPOCH + Duration::from_secs(1_000);
        // The time of queueing is after the start, as it can be if the wall clock is set. The end of the command is
        // recorded, but not its start.
        let mut timeline = Timeline::start(wall + Duration::from_secs(5), wall, Moment(100));
        timeline.note(Point::FetchStart, Moment(150));
        timeline.note(Point::RunEnd, Moment(130));
        timeline.note(Point::WorkerEnd, Moment(900));
        let m = timeline.metadata("w/0".into(), None);
        let nanos = [
            m.queued_timestamp,
            m.worker_start_timestamp,
            m.input_fetch_start_timestamp,
            m.input_fetch_completed_timestamp,
            m.execution_start_timestamp,
            m.execution_completed_timestamp,
            m.output_upload_start_timestamp,
            m.output_upload_completed_timestamp,
            m.worker_completed_timestamp,
        ]
        .map(|timestamp| timestamp.map(|t| (t.seconds, t.nanos)).unwrap());
        assert!(nanos.is_sorted(), "{nanos:?}");
        assert_eq!(nanos[8], (1_000, 800));
    }
}
