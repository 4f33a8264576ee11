//! [`Ranks`]: which of several priorities is the most urgent, and which have waited long enough to make up for the
//! difference.
//!
//! A task gains one step of priority for every interval (`step`) that it waits. A priority whose oldest task has made
//! up for the difference to the most urgent priority is *due*. No difference counts for more than [`STEPS_MAX`] steps.
//! Tasks that have waited that long come before all others that are due, the oldest first. Clients choose their
//! priorities, and a large difference would otherwise mean that a task waits for ever.
//!
//! No timer has to move tasks. A task of priority `p` that was queued at `t` is as urgent as a new one of
//! priority `b` when `p - (now - t) / step <= b`, which is `t + p * step <= now + b * step`: the left side never
//! changes, so priorities can be kept in order of the left side of their oldest task.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

/// Most steps of priority that a task has to make up for. By default a step is a minute and this is an hour. That is
/// more than teams need to order their builds, and less than a task may wait.
pub(crate) const STEPS_MAX: u32 = 60;

/// Priorities with waiting tasks, each with the submission time of its oldest task. Setting one costs O(log n).
#[derive(Debug)]
pub(super) struct Ranks {
    step: Duration,
    /// The instant from which `ages` are counted: the first one that was set.
    origin: Option<Instant>,
    oldest: BTreeMap<i32, Instant>,
    /// Priorities by the combined age and urgency of their oldest task; the first is the most overdue.
    ages: BTreeSet<(i128, i32)>,
    arrivals: BTreeSet<(Instant, i32)>,
}

impl Ranks {
    pub(super) fn new(step: Duration) -> Self {
        Self { step, origin: None, oldest: BTreeMap::new(), ages: BTreeSet::new(), arrivals: BTreeSet::new() }
    }

    /// Sets the submission time of the oldest task of a priority; `None` if no task of it waits.
    pub(super) fn set(&mut self, priority: i32, since: Option<Instant>) {
        let before = match since {
            Some(since) => self.oldest.insert(priority, since),
            None => self.oldest.remove(&priority),
        };
        if before == since {
            return;
        }
        if let Some(before) = before {
            let age = self.age(before, priority);
            self.ages.remove(&(age, priority));
            self.arrivals.remove(&(before, priority));
        }
        if let Some(since) = since {
            self.origin.get_or_insert(since);
            let age = self.age(since, priority);
            self.ages.insert((age, priority));
            self.arrivals.insert((since, priority));
        }
    }

    /// The most urgent priority.
    pub(super) fn lowest(&self) -> Option<i32> {
        self.oldest.keys().next().copied()
    }

    /// The other priorities that are due, the most overdue first. A priority may occur twice.
    pub(super) fn due(&self, now: Instant) -> impl Iterator<Item = i32> {
        let lowest = self.lowest();
        let longest = self.step.saturating_mul(STEPS_MAX);
        let limit = lowest.map_or(i128::MIN, |lowest| self.age(now, lowest));
        let old = self.arrivals.iter().map(|(since, priority)| (*since, *priority));
        let old = old.take_while(move |(since, _)| now.saturating_duration_since(*since) >= longest);
        let overdue = self.ages.iter().take_while(move |(age, _)| *age <= limit);
        let due = old.map(|(_, priority)| priority).chain(overdue.map(|(_, priority)| *priority));
        due.filter(move |priority| Some(*priority) != lowest)
    }

    /// `at + priority * step`, in nanoseconds.
    fn age(&self, at: Instant, priority: i32) -> i128 {
        let origin = self.origin.unwrap_or(at);
        // At least one of them is zero. Times that a clock can show are far from an overflow.
        let after = at.saturating_duration_since(origin).as_nanos() as i128;
        let before = origin.saturating_duration_since(at).as_nanos() as i128;
        let steps = i128::from(priority).saturating_mul(self.step.as_nanos() as i128);
        (after - before).saturating_add(steps)
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.oldest.is_empty() && self.ages.is_empty() && self.arrivals.is_empty()
    }
}
