//! [`Guard`]: watches the limits of one command while it runs, in the thread that waits for its end.
//!
//! Where the kernel bounds the memory, the guard only notices that the kernel killed a process. Elsewhere it adds up
//! the memory of the processes. It also measures what was written to the input root, and counts processes. Each kind of
//! measurement uses at most a twentieth of one CPU ([`MeasurementSchedule`]), so a command may exceed a limit by what
//! it can use between two measurements.

use super::{exhausted, resident, unmapped::FilesInMemory};
use crate::{
    actors::worker::written::Written,
    cgroups::{OutOfMemory, SlotGroup},
    limits::{Exceeded, LimitedResource, Limits},
};
use std::time::{Duration, Instant};

/// Minimum time between two measurements of the memory, where the kernel does not bound it.
const MEMORY_PAUSE: Duration = Duration::from_millis(20);
/// Minimum time between two measurements of anything else.
const PAUSE: Duration = Duration::from_millis(100);
/// How often in a row too many processes must be counted. The first count may include processes of the command before,
/// which the kernel is still ending.
const COUNTS_OF_TOO_MANY: u32 = 2;
/// After a measurement, the guard pauses for this many times its duration.
const PAUSE_PER_LOOK: u32 = 19;

/// Why a command has to be killed, or should have been.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Violation {
    /// It exceeded a limit.
    Exceeded(Exceeded),
    /// Some of its processes were killed because there was too little memory for all actions.
    MemoryShort {
        /// The most memory in bytes that the action used.
        used: u64,
        /// The memory in bytes for all actions together.
        total: u64,
    },
}

/// The schedule of one kind of measurement.
#[derive(Debug)]
struct MeasurementSchedule {
    least: Duration,
    next: Instant,
}

impl MeasurementSchedule {
    fn new(least: Duration, now: Instant) -> Self {
        Self { least, next: now + least }
    }

    /// Runs `look` if it is due.
    fn look<T>(&mut self, look: impl FnOnce() -> Option<T>) -> Option<T> {
        let start = Instant::now();
        if start < self.next {
            return None;
        }
        let seen = look();
        let took = start.elapsed();
        self.next = start + took + self.least.max(took.saturating_mul(PAUSE_PER_LOOK));
        seen
    }
}

/// Watches the limits of one command.
#[derive(Debug)]
pub(super) struct Guard<'a> {
    limits: &'a Limits,
    group: Option<&'a SlotGroup>,
    /// The process from which all processes of the command descend.
    runner: u32,
    /// Measures the memory against a limit in bytes, where the kernel does not bound it.
    resident: Option<(MeasurementSchedule, Exceeded)>,
    files_in_memory: FilesInMemory,
    /// Checks whether the kernel killed a process.
    killed: Option<MeasurementSchedule>,
    /// Measures what was written to the disk.
    written: Option<(MeasurementSchedule, &'a Written)>,
    /// Counts processes and threads, where no control group does.
    counted: Option<MeasurementSchedule>,
    /// The largest number of processes and threads that were counted.
    processes: u64,
    /// How often in a row too many were counted; `None` if the kernel limits their number.
    too_many: Option<u32>,
}

impl<'a> Guard<'a> {
    /// Starts to watch a command whose processes descend from `runner`. `total` is the memory of all actions together.
    pub(super) fn new(
        limits: &'a Limits,
        group: Option<&'a SlotGroup>,
        total: u64,
        runner: u32,
        written: Option<&'a Written>,
    ) -> Self {
        let now = Instant::now();
        let is_bounded = group.is_some_and(SlotGroup::bounds_memory);
        let (resource, limit) = match limits.memory {
            0 => (LimitedResource::AllMemory, total),
            own if total > 0 && total < own => (LimitedResource::AllMemory, total),
            own => (LimitedResource::Memory, own),
        };
        let is_watched = !is_bounded && limit > 0;
        Self {
            limits,
            group,
            runner,
            resident: is_watched.then(|| {
                (MeasurementSchedule::new(MEMORY_PAUSE, now), Exceeded { resource, used: 0, limit })
            }),
            files_in_memory: FilesInMemory::default(),
            killed: is_bounded.then(|| MeasurementSchedule::new(PAUSE, now)),
            written: written
                .filter(|_| limits.disk > 0 || limits.files > 0)
                .map(|written| (MeasurementSchedule::new(PAUSE, now), written)),
            counted: (limits.processes > 0 && !group.is_some_and(SlotGroup::counts_processes))
                .then(|| MeasurementSchedule::new(PAUSE, now)),
            processes: 0,
            too_many: None,
        }
    }

    /// Ends the command if it has too many processes, because the kernel does not limit their number.
    pub(super) fn ending_too_many(self) -> Self {
        Self { too_many: Some(0), ..self }
    }

    /// When the next measurement is due, if there is one.
    pub(super) fn next(&self) -> Option<Instant> {
        let paces = [
            self.resident.as_ref().map(|(pace, _)| pace.next),
            self.killed.as_ref().map(|pace| pace.next),
            self.written.as_ref().map(|(pace, _)| pace.next),
            self.counted.as_ref().map(|pace| pace.next),
        ];
        paces.into_iter().flatten().min()
    }

    /// Takes all measurements that are due.
    pub(super) fn look(&mut self) -> Option<Violation> {
        let runner = self.runner;
        if let Some((pace, limit)) = &mut self.resident {
            let files = &mut self.files_in_memory;
            if let Some(used) = pace.look(|| resident::measure(runner, limit.limit, files)) {
                return Some(Violation::Exceeded(Exceeded { used, ..*limit }));
            }
        }
        if let Some(pace) = &mut self.counted
            && let Some(processes) = pace.look(|| Some(resident::processes(runner)))
        {
            self.processes = self.processes.max(processes);
            // The first process of the cell does not count.
            let (used, limit) = (processes.saturating_sub(1), self.limits.processes);
            self.too_many = self.too_many.map(|before| if used > limit { before + 1 } else { 0 });
            if self.too_many.is_some_and(|times| times >= COUNTS_OF_TOO_MANY) {
                let resource = LimitedResource::Processes;
                return Some(Violation::Exceeded(Exceeded { resource, used, limit }));
            }
        }
        if let Some(pace) = &mut self.killed
            && let Some(group) = self.group
            && let Some(violation) = pace.look(|| killed(group))
        {
            return Some(violation);
        }
        if let Some((pace, written)) = &mut self.written
            && let Some(exceeded) = pace.look(|| written.exceeded(self.limits))
        {
            return Some(Violation::Exceeded(exceeded));
        }
        None
    }

    /// The last measurement, when the command has ended.
    pub(super) fn end(&self) -> Option<Violation> {
        if let Some(violation) = self.group.and_then(killed) {
            return Some(violation);
        }
        let (_, written) = self.written.as_ref().filter(|(_, written)| written.may_exceed(self.limits))?;
        written.exceeded(self.limits).map(Violation::Exceeded)
    }

    /// The limit on processes, if the command has reached it. Its cell had `left` processes and threads when it failed.
    pub(super) fn used_up_processes(&self, left: u64) -> Option<Exceeded> {
        let limit = self.limits.processes;
        let (used, is_reached) = match self.group.filter(|group| group.counts_processes()) {
            Some(group) => (limit, group.refused_processes()),
            None => {
                // The first process of the cell does not count.
                let used = self.processes.max(left).saturating_sub(1);
                (used.min(limit), exhausted::are_used_up(used, limit))
            }
        };
        is_reached.then_some(Exceeded { resource: LimitedResource::Processes, used, limit })
    }
}

/// Whether the kernel killed a process because memory ran out.
fn killed(group: &SlotGroup) -> Option<Violation> {
    Some(match group.out_of_memory()? {
        OutOfMemory::Exceeded(exceeded) => Violation::Exceeded(exceeded),
        OutOfMemory::Shared { used, total } => Violation::MemoryShort { used, total },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_are_counted_where_no_group_does_even_if_the_memory_is_not_measured() {
        let limits = Limits { processes: 40, ..Limits::default() };
        let guard = Guard::new(&limits, None, 0, std::process::id(), None);
        assert!(guard.resident.is_none() && guard.next().is_some());
        assert_eq!(Guard::new(&Limits::default(), None, 0, std::process::id(), None).next(), None);
    }

    #[test]
    fn a_slow_look_is_followed_by_a_long_pause() {
        let mut pace = MeasurementSchedule::new(Duration::ZERO, Instant::now());
        let start = Instant::now();
        let seen = pace.look(|| {
            // The duration of the look is what is tested.
            std::thread::sleep(Duration::from_millis(5));
            Some(())
        });
        assert!(seen.is_some() && pace.next >= start + Duration::from_millis(5 * 20));
        assert!(pace.look(|| Some(())).is_none(), "it is not time yet");
    }
}
