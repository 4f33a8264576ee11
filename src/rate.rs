//! [`Bucket`]: a token bucket with a burst and a rate. [`ReadingPace`]: the pauses of a reader with a rate. Pure. The
//! caller passes the time.

use std::time::{Duration, Instant};

/// The size and fill rate of a token bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rate {
    /// Number of tokens in a full bucket.
    pub burst: u64,
    /// Number of tokens that are added per second.
    pub per_second: u64,
}

/// A token bucket. It counts thousandths of tokens, so that rounding loses no time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bucket {
    rate: Rate,
    left: u64,
    at_ms: u64,
}

const THOUSAND: u64 = 1000;
/// A reader pauses when it is this far ahead, so that many small files do not each cost a pause.
const PAUSE_FROM: Duration = Duration::from_millis(10);

impl Bucket {
    /// Creates a full bucket.
    pub(crate) fn new(rate: Rate, now_ms: u64) -> Self {
        Self { rate, left: rate.burst.saturating_mul(THOUSAND), at_ms: now_ms }
    }

    /// Takes tokens. Takes nothing and returns false if there are too few.
    pub(crate) fn take(&mut self, amount: u64, now_ms: u64) -> bool {
        self.refill(now_ms);
        match self.left.checked_sub(amount.saturating_mul(THOUSAND)) {
            Some(left) => {
                self.left = left;
                true
            }
            None => false,
        }
    }

    /// The number of tokens in the full bucket.
    pub(crate) fn burst(&self) -> u64 {
        self.rate.burst
    }

    /// The time in milliseconds until the bucket has this many tokens. It never has more than the burst.
    pub(crate) fn ready_in_ms(&mut self, amount: u64, now_ms: u64) -> u64 {
        self.refill(now_ms);
        let lacking = amount.saturating_mul(THOUSAND).saturating_sub(self.left);
        if lacking == 0 { 0 } else { lacking.div_ceil(self.rate.per_second.max(1)) }
    }

    /// Adds tokens, up to the burst.
    pub(crate) fn earn(&mut self, amount: u64) {
        self.add(amount.saturating_mul(THOUSAND));
    }

    /// Whether it is full, and therefore equal to a new bucket.
    pub(crate) fn is_full(&mut self, now_ms: u64) -> bool {
        self.refill(now_ms);
        self.left == self.rate.burst.saturating_mul(THOUSAND)
    }

    fn refill(&mut self, now_ms: u64) {
        let elapsed = now_ms.saturating_sub(self.at_ms);
        self.at_ms = self.at_ms.max(now_ms);
        self.add(elapsed.saturating_mul(self.rate.per_second));
    }

    fn add(&mut self, thousandths: u64) {
        self.left = self.left.saturating_add(thousandths).min(self.rate.burst.saturating_mul(THOUSAND));
    }
}

/// Bounds the rate at which something is read in the background.
#[derive(Debug)]
pub(crate) struct ReadingPace {
    bytes_per_second: u64,
    /// The time at which the bytes read so far are due at the allowed rate.
    due: Instant,
}

impl ReadingPace {
    pub(crate) fn new(bytes_per_second: u64, now: Instant) -> Self {
        Self { bytes_per_second: bytes_per_second.max(1), due: now }
    }

    /// The pause after reading this many bytes.
    pub(crate) fn after(&mut self, bytes: u64, now: Instant) -> Duration {
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second);
        // Lost time is not made up for.
        self.due = self.due.max(now) + Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        let ahead = self.due.saturating_duration_since(now);
        if ahead < PAUSE_FROM { Duration::ZERO } else { ahead }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_gives_its_burst_then_its_rate_and_what_was_earned() {
        let mut bucket = Bucket::new(Rate { burst: 10, per_second: 2 }, 5_000);
        assert!(bucket.take(10, 5_000) && !bucket.take(1, 5_499) && bucket.take(1, 5_500));
        bucket.earn(3);
        assert!(bucket.take(3, 5_500) && !bucket.take(1, 5_500));
        // It never exceeds the burst, and ignores time that runs backwards.
        assert!(bucket.is_full(60_000) && bucket.take(10, 1_000) && !bucket.take(1, 59_000));
    }

    #[test]
    fn the_rate_is_kept_and_lost_time_is_not_made_up_for() {
        let start = Instant::now();
        let mut pace = ReadingPace::new(1_000_000, start);
        assert_eq!(pace.after(1_000, start), Duration::ZERO, "small pieces add up");
        assert_eq!(pace.after(99_000, start), Duration::from_millis(100));
        let later = start + Duration::from_secs(60);
        assert_eq!(pace.after(500_000, later), Duration::from_millis(500));
    }
}
