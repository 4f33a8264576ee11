//! [`Patience`]: how long a mirror may be silent before the next one is tried (AST-09).
//!
//! Only silence is limited, not the whole download: a mirror that is sending is better than an untried one, and large
//! content takes time. The allowed silence is a share of the remaining time. So even if many mirrors accept the
//! connection and hang, each is tried before the callers' time is up, unless only a few seconds are left.

use super::outcome::{FailureKind, Problem};
use std::time::Duration;
use tokio::{sync::watch, time::Instant};

/// Maximum silence of the last mirror.
const LAST_LIMIT: Duration = Duration::from_secs(60);
/// Maximum silence of the other mirrors. It is short, because the next one may do better.
const LIMIT: Duration = Duration::from_secs(20);
/// Every mirror may be silent for this long, because some produce the content only when it is requested.
const LEAST: Duration = Duration::from_secs(2);

/// The limit on the silence of one mirror in a flight.
#[derive(Debug)]
pub(super) struct Patience {
    /// When the flight has to end.
    pub latest: watch::Receiver<Instant>,
    /// The number of mirrors that are left to try, including this one.
    pub mirrors: u32,
}

impl Patience {
    /// Waits for the next response or piece from a mirror.
    ///
    /// # Errors
    /// `TimedOut` when it is silent for too long; the errors of `answer`.
    pub(super) async fn wait<T>(
        &self,
        answer: impl Future<Output = Result<T, Problem>>,
    ) -> Result<T, Problem> {
        let left = self.latest.borrow().saturating_duration_since(Instant::now());
        let limit = silence(left, self.mirrors);
        tokio::time::timeout(limit, answer).await.unwrap_or_else(|_| {
            let message = format!("the origin was silent for {:.1} s", limit.as_secs_f64());
            Err(Problem::origin(FailureKind::TimedOut, message))
        })
    }
}

/// How long a mirror may be silent when `left` is the time for it and the mirrors after it.
fn silence(left: Duration, mirrors: u32) -> Duration {
    let limit = if mirrors > 1 { LIMIT } else { LAST_LIMIT };
    (left / mirrors.max(1)).clamp(LEAST, limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Waits for each of `mirrors` mirrors, which send `words` pieces and then hang. Returns the time that each took.
    async fn tries(time: Duration, mirrors: u32, words: usize) -> Vec<Duration> {
        let (_flight, latest) = watch::channel(Instant::now() + time);
        let mut taken = Vec::new();
        for mirrors in (1..=mirrors).rev() {
            let (patience, begun) = (Patience { latest: latest.clone(), mirrors }, Instant::now());
            for _ in 0..words {
                // Each piece takes nearly as long as allowed.
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
    async fn every_mirror_is_tried_in_time_however_many_hang() {
        for (seconds, mirrors) in [(10, 2), (30, 8), (60, 2), (60, 10), (600, 3)] {
            let time = Duration::from_secs(seconds);
            let taken = tries(time, mirrors, 0).await;
            let before_last: Duration = taken.iter().rev().skip(1).sum();
            assert!(before_last + LEAST <= time, "{seconds} s, {mirrors} mirrors: {taken:?}");
            assert!(taken.iter().all(|taken| *taken >= LEAST), "{taken:?}");
        }
    }

    /// AST-09: this also holds when a mirror hangs in the middle of its content.
    #[tokio::test(start_paused = true)]
    async fn the_next_mirror_is_tried_when_one_hangs_after_it_has_answered() {
        let time = Duration::from_secs(60);
        let taken = tries(time, 2, 2).await;
        assert!(taken[0] + LEAST <= time, "{taken:?}");
    }

    #[test]
    fn the_last_mirror_may_be_silent_for_longer_than_others() {
        let hour = Duration::from_secs(3600);
        assert_eq!((silence(hour, 1), silence(hour, 2)), (LAST_LIMIT, LIMIT));
        assert_eq!(silence(Duration::ZERO, 64), LEAST);
    }
}
