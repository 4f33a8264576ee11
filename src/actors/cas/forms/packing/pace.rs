//! [`PackPace`]: bounds the CPU time of a thread to a share of one core. Pure.

use std::time::Duration;

/// Rests are at least this long, so that a thread does not wake up for every millisecond of work.
const LEAST_REST: Duration = Duration::from_millis(20);

/// Computes how long a thread has to rest after its work.
#[derive(Debug)]
pub(super) struct PackPace {
    percent: u32,
    /// The rest that is due for the work so far.
    owed: Duration,
}

impl PackPace {
    /// A thread that works for at most this part of the time, from 1 to 100 percent.
    pub(super) fn new(percent: u32) -> Self {
        Self { percent: percent.clamp(1, 100), owed: Duration::ZERO }
    }

    /// How long to rest after a piece of work that has taken this much CPU time and this long. Time in which the work
    /// had to wait counts as rest, but no rest is saved up for later.
    pub(super) fn rest_after(&mut self, cpu: Duration, took: Duration) -> Duration {
        self.owed = (self.owed + cpu.saturating_mul(100) / self.percent).saturating_sub(took);
        if self.owed < LEAST_REST { Duration::ZERO } else { std::mem::take(&mut self.owed) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// For pieces of any length, the total work stays within the share, apart from one piece and one rest.
        #[test]
        fn the_share_holds(percent in 1u32..=100, pieces in proptest::collection::vec((0u64..50, 0u64..100), 1..200)) {
            let mut pace = PackPace::new(percent);
            let (mut cpu, mut passed) = (Duration::ZERO, Duration::ZERO);
            for (busy, waiting) in pieces {
                let (busy, took) = (Duration::from_millis(busy), Duration::from_millis(busy + waiting));
                cpu += busy;
                passed += took;
                passed += pace.rest_after(busy, took);
                let allowed = passed * percent / 100 + LEAST_REST;
                prop_assert!(cpu <= allowed, "{cpu:?} of {passed:?}");
            }
        }
    }

    #[test]
    fn a_whole_core_needs_no_rest_and_waiting_counts_as_rest() {
        let ms = Duration::from_millis;
        assert_eq!(PackPace::new(100).rest_after(ms(500), ms(500)), ms(0));
        let mut quarter = PackPace::new(25);
        assert_eq!(quarter.rest_after(ms(100), ms(100)), ms(300));
        assert_eq!(quarter.rest_after(ms(100), ms(400)), ms(0));
        assert_eq!(quarter.rest_after(ms(0), ms(10_000)), ms(0));
        assert_eq!(quarter.rest_after(ms(100), ms(100)), ms(300), "nothing is saved up");
    }
}
