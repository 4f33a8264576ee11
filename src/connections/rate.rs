//! [`Bucket`]: so much at once, and so much in a second. Pure: time is milliseconds that the caller gives.

/// How fast a bucket fills, and how much it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// What may be taken at once.
    pub burst: u64,
    /// What comes back in a second.
    pub per_second: u64,
}

/// What is left of a [`Rate`]. It counts thousandths, so that no time is lost to rounding.
#[derive(Debug, Clone, Copy)]
pub struct Bucket {
    rate: Rate,
    left: u64,
    at_ms: u64,
}

const THOUSAND: u64 = 1000;

impl Bucket {
    /// A full one.
    pub fn new(rate: Rate, now_ms: u64) -> Self {
        Self { rate, left: rate.burst.saturating_mul(THOUSAND), at_ms: now_ms }
    }

    /// Takes this much; takes nothing and returns false when there is less.
    pub fn take(&mut self, amount: u64, now_ms: u64) -> bool {
        self.refill(now_ms);
        match self.left.checked_sub(amount.saturating_mul(THOUSAND)) {
            Some(left) => {
                self.left = left;
                true
            }
            None => false,
        }
    }

    /// Puts this much back, up to the burst.
    pub fn earn(&mut self, amount: u64) {
        self.add(amount.saturating_mul(THOUSAND));
    }

    /// Whether it holds its burst, so that a new one would be the same.
    pub fn is_full(&mut self, now_ms: u64) -> bool {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_gives_its_burst_then_its_rate_and_what_was_earned() {
        let mut bucket = Bucket::new(Rate { burst: 10, per_second: 2 }, 5_000);
        assert!(bucket.take(10, 5_000) && !bucket.take(1, 5_499) && bucket.take(1, 5_500));
        bucket.earn(3);
        assert!(bucket.take(3, 5_500) && !bucket.take(1, 5_500));
        // Never more than the burst, and time does not run backwards.
        assert!(bucket.is_full(60_000) && bucket.take(10, 1_000) && !bucket.take(1, 59_000));
    }
}
