//! [`Guard`]: what watches over the limits of one command while it runs, for the thread that waits for its end.
//!
//! Where the kernel bounds the memory, the guard only notices that it killed something. Where it does not, the guard adds up
//! what the processes use. It looks at what was written to the input root. It takes at most a twentieth of the time of a CPU
//! ([`LookPace`]), and so a command may overshoot by what it can use between two looks.

use super::resident;
use crate::{
    actors::worker::written::Written,
    cgroups::{OutOfMemory, SlotGroup},
    limits::{Exceeded, LimitedResource, Limits},
};
use std::time::{Duration, Instant};

/// The shortest time between two looks at the memory, where the kernel does not bound it.
const MEMORY_PAUSE: Duration = Duration::from_millis(20);
/// The shortest time between two looks at everything else.
const PAUSE: Duration = Duration::from_millis(100);
/// A look is followed by a pause of this many times its duration.
const PAUSE_PER_LOOK: u32 = 19;

/// Why a command has to end, or should have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Violation {
    /// It crossed a limit.
    Exceeded(Exceeded),
    /// It lost processes because there was too little memory for all actions.
    MemoryShort {
        /// What it used at most.
        used: u64,
        /// What there is for all.
        total: u64,
    },
}

/// When to look next.
#[derive(Debug)]
struct LookPace {
    least: Duration,
    next: Instant,
}

impl LookPace {
    fn new(least: Duration, now: Instant) -> Self {
        Self { least, next: now + least }
    }

    /// Looks if it is time.
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

/// Watches over one command.
#[derive(Debug)]
pub(super) struct Guard<'a> {
    limits: &'a Limits,
    group: Option<&'a SlotGroup>,
    /// The process from which all of the command descend.
    runner: u32,
    /// Bounds the memory where the kernel does not; with the limit in bytes.
    resident: Option<(LookPace, Exceeded)>,
    /// Looks at what the kernel did.
    killed: Option<LookPace>,
    /// Looks at the disk.
    written: Option<(LookPace, &'a Written)>,
}

impl<'a> Guard<'a> {
    /// A guard of a command that starts now, below this process. `total` is the memory of all actions together.
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
            resident: is_watched
                .then(|| (LookPace::new(MEMORY_PAUSE, now), Exceeded { resource, used: 0, limit })),
            killed: is_bounded.then(|| LookPace::new(PAUSE, now)),
            written: written
                .filter(|_| limits.disk > 0 || limits.files > 0)
                .map(|written| (LookPace::new(PAUSE, now), written)),
        }
    }

    /// When to look next, if at all.
    pub(super) fn next(&self) -> Option<Instant> {
        let paces = [
            self.resident.as_ref().map(|(pace, _)| pace.next),
            self.killed.as_ref().map(|pace| pace.next),
            self.written.as_ref().map(|(pace, _)| pace.next),
        ];
        paces.into_iter().flatten().min()
    }

    /// Looks at everything whose time has come.
    pub(super) fn look(&mut self) -> Option<Violation> {
        let runner = self.runner;
        if let Some((pace, limit)) = &mut self.resident
            && let Some(used) = pace.look(|| resident::above(runner, limit.limit))
        {
            return Some(Violation::Exceeded(Exceeded { used, ..*limit }));
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

    /// The last look, when the command has ended.
    pub(super) fn end(self) -> Option<Violation> {
        if let Some(violation) = self.group.and_then(killed) {
            return Some(violation);
        }
        let (_, written) = self.written.filter(|(_, written)| written.may_exceed(self.limits))?;
        written.exceeded(self.limits).map(Violation::Exceeded)
    }
}

/// Whether the kernel killed something for lack of memory.
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
    fn a_slow_look_is_followed_by_a_long_pause() {
        let mut pace = LookPace::new(Duration::ZERO, Instant::now());
        let start = Instant::now();
        let seen = pace.look(|| {
            std::thread::sleep(Duration::from_millis(5));
            Some(())
        });
        assert!(seen.is_some() && pace.next >= start + Duration::from_millis(5 * 20));
        assert!(pace.look(|| Some(())).is_none(), "it is not time yet");
    }
}
