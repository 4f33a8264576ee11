//! [`Freshness`]: decides when keys are fetched again, and how long they are valid. Pure. The time is an argument.

use std::time::{Duration, SystemTime};

/// The intervals for the keys of one issuer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FetchTimes {
    /// How often the keys are fetched in the background.
    pub(super) refresh: Duration,
    /// How long keys are used after they were fetched.
    pub(super) max_stale: Duration,
    /// Minimum time between two attempts of any kind.
    pub(super) pause: Duration,
}

/// The time of the last successful attempt, and of the last attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Freshness {
    fetched: Option<SystemTime>,
    tried: Option<SystemTime>,
}

/// The time since an event; zero if the clock was set back.
fn since(event: SystemTime, now: SystemTime) -> Duration {
    now.duration_since(event).unwrap_or_default()
}

impl Freshness {
    /// Whether the keys are still valid.
    pub(super) fn serves(self, times: &FetchTimes, now: SystemTime) -> bool {
        self.fetched.is_some_and(|fetched| since(fetched, now) <= times.max_stale)
    }

    /// Whether another attempt is allowed. If the clock was set back by more than the pause, an attempt is allowed at
    /// once, so that keys are not outdated for long. A smaller difference may be caused by the age of a request.
    pub(super) fn may_try(self, times: &FetchTimes, now: SystemTime) -> bool {
        self.tried.is_none_or(|tried| since(tried, now) >= times.pause || since(now, tried) > times.pause)
    }

    /// How long the background task waits for its next attempt. After a failure it tries again as soon as possible.
    pub(super) fn due_in(self, times: &FetchTimes, now: SystemTime) -> Duration {
        let Some(tried) = self.tried else { return Duration::ZERO };
        let has_failed = self.fetched.is_none_or(|fetched| fetched < tried);
        let interval = if has_failed { times.pause } else { times.refresh.max(times.pause) };
        interval.saturating_sub(since(tried, now))
    }

    /// Records the start of an attempt.
    pub(super) fn try_at(&mut self, now: SystemTime) {
        self.tried = Some(now);
    }

    /// Records that the attempt that began at this time succeeded.
    pub(super) fn succeed(&mut self, began: SystemTime) {
        self.fetched = Some(began);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::UNIX_EPOCH;

    const TIMES: FetchTimes = FetchTimes {
        refresh: Duration::from_secs(900),
        max_stale: Duration::from_secs(3600),
        pause: Duration::from_secs(60),
    };

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(1_000_000 + seconds)
    }

    fn due(freshness: Freshness, seconds: u64) -> u64 {
        freshness.due_in(&TIMES, at(seconds)).as_secs()
    }

    #[test]
    fn keys_serve_for_the_stated_time_after_they_were_fetched_and_are_tried_again_meanwhile() {
        let mut freshness = Freshness::default();
        assert!(!freshness.serves(&TIMES, at(0)) && freshness.may_try(&TIMES, at(0)));
        assert_eq!(due(freshness, 0), 0);
        freshness.try_at(at(0));
        assert!(!freshness.serves(&TIMES, at(0)));
        freshness.succeed(at(0));
        assert_eq!((due(freshness, 0), due(freshness, 850), due(freshness, 2_000)), (900, 50, 0));
        freshness.try_at(at(900));
        assert_eq!(due(freshness, 900), 60, "it failed");
        assert!(freshness.serves(&TIMES, at(3_600)) && !freshness.serves(&TIMES, at(3_601)));
        freshness.try_at(at(960));
        freshness.succeed(at(960));
        assert!(freshness.serves(&TIMES, at(4_560)) && !freshness.serves(&TIMES, at(4_561)));
    }

    #[test]
    fn attempts_keep_their_distance_also_when_they_fail() {
        let mut freshness = Freshness::default();
        freshness.try_at(at(0));
        assert!(!freshness.may_try(&TIMES, at(0)) && !freshness.may_try(&TIMES, at(59)));
        let of_an_old_request = UNIX_EPOCH + Duration::from_secs(999_999);
        assert!(!freshness.may_try(&TIMES, of_an_old_request));
        assert!(freshness.may_try(&TIMES, at(60)));
        freshness.succeed(at(0));
        assert!(!freshness.may_try(&TIMES, at(59)));
    }

    #[test]
    fn a_clock_that_is_set_back_neither_ends_keys_nor_stops_attempts() {
        let mut freshness = Freshness::default();
        freshness.try_at(at(10_000));
        freshness.succeed(at(10_000));
        assert!(freshness.serves(&TIMES, at(0)) && freshness.may_try(&TIMES, at(0)));
        freshness.try_at(at(0));
        assert!(!freshness.may_try(&TIMES, at(1)));
    }
}
