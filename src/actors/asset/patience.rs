//! [`Patience`]: how long a mirror may be silent before the next one has its turn (AST-09).
//!
//! Silence is measured, not the whole of a download: a mirror that sends is better than one that nobody has tried, and large
//! content takes what it takes. What a mirror may spend in silence is a share of the time that is left, so however many of
//! them accept and hang, each has its turn before the callers' time is up, as far as there are more than a few seconds of it.

use super::outcome::{FailureKind, Problem};
use std::time::Duration;
use tokio::{sync::watch, time::Instant};

/// Longest silence of the last mirror.
const LAST_LIMIT: Duration = Duration::from_secs(60);
/// Longest silence of the others; short, because the next one may do better.
const LIMIT: Duration = Duration::from_secs(20);
/// A mirror has at least this long: some make the content only when they are asked for it.
const LEAST: Duration = Duration::from_secs(2);

/// What a mirror is granted by a flight.
#[derive(Debug)]
pub struct Patience {
    /// When the flight has to end.
    pub latest: watch::Receiver<Instant>,
    /// Mirrors that were not tried yet, with this one.
    pub mirrors: u32,
}

impl Patience {
    /// Waits for the next thing that a mirror says.
    ///
    /// # Errors
    /// `TimedOut` when it says nothing; those of `answer`.
    pub async fn wait<T>(&self, answer: impl Future<Output = Result<T, Problem>>) -> Result<T, Problem> {
        let left = self.latest.borrow().saturating_duration_since(Instant::now());
        let limit = silence(left, self.mirrors);
        tokio::time::timeout(limit, answer).await.unwrap_or_else(|_| {
            let message = format!("the origin was silent for {:.1} s", limit.as_secs_f64());
            Err(Problem::origin(FailureKind::TimedOut, message))
        })
    }
}

/// How long a mirror may be silent now, when this much time is left for it and those after it.
fn silence(left: Duration, mirrors: u32) -> Duration {
    let limit = if mirrors > 1 { LIMIT } else { LAST_LIMIT };
    (left / mirrors.max(1)).clamp(LEAST, limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Waits for each of so many mirrors, which say `words` things and then nothing more; the time that each took.
    async fn tries(time: Duration, mirrors: u32, words: usize) -> Vec<Duration> {
        let (_flight, latest) = watch::channel(Instant::now() + time);
        let mut taken = Vec::new();
        for mirrors in (1..=mirrors).rev() {
            let (patience, begun) = (Patience { latest: latest.clone(), mirrors }, Instant::now());
            for _ in 0..words {
                // It takes nearly as long as it may.
                let left = latest.borrow().saturating_duration_since(Instant::now());
                let word = tokio::time::sleep(silence(left, mirrors) - Duration::from_millis(1));
                patience.wait(futures::FutureExt::map(word, Ok)).await.unwrap();
            }
            let silent = patience.wait(std::future::pending::<Result<(), Problem>>()).await.unwrap_err();
            let Problem::Origin(failure) = silent else { panic!("{silent:?}") };
            assert_eq!(failure.kind, FailureKind::TimedOut);
            taken.push(begun.elapsed());
        }
        taken
    }

    /// AST-09.
    #[tokio::test(start_paused = true)]
    async fn every_mirror_has_its_turn_within_the_time_however_many_hang() {
        for (seconds, mirrors) in [(10, 2), (30, 8), (60, 2), (60, 10), (600, 3)] {
            let time = Duration::from_secs(seconds);
            let taken = tries(time, mirrors, 0).await;
            let before_last: Duration = taken.iter().rev().skip(1).sum();
            assert!(before_last + LEAST <= time, "{seconds} s, {mirrors} mirrors: {taken:?}");
            assert!(taken.iter().all(|taken| *taken >= LEAST), "{taken:?}");
        }
    }

    /// AST-09: also when they hang in the middle of what they send.
    #[tokio::test(start_paused = true)]
    async fn the_next_mirror_has_its_turn_when_one_hangs_after_it_has_answered() {
        let time = Duration::from_secs(60);
        let taken = tries(time, 2, 2).await;
        assert!(taken[0] + LEAST <= time, "{taken:?}");
    }

    #[test]
    fn a_lone_mirror_has_longer_than_one_that_others_can_stand_in_for() {
        let hour = Duration::from_secs(3600);
        assert_eq!((silence(hour, 1), silence(hour, 2)), (LAST_LIMIT, LIMIT));
        assert_eq!(silence(Duration::ZERO, 64), LEAST);
    }
}
