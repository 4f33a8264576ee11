//! [`Timer`]: wakes a task at a time that may change between two polls.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio::time::{Instant, Sleep, sleep_until};

/// A timer that is created by its first poll. A later time does not reset it: it fires at the earlier time and is reset
/// then. So a time that moves with every frame of a stream needs no timer operation.
#[derive(Debug, Default)]
pub(crate) struct Timer(Option<Pin<Box<Sleep>>>);

impl Timer {
    /// Ready at this time or later.
    pub(crate) fn poll(&mut self, context: &mut Context<'_>, time: Instant) -> Poll<()> {
        let timer = self.0.get_or_insert_with(|| Box::pin(sleep_until(time)));
        if timer.deadline() > time {
            timer.as_mut().reset(time);
        }
        loop {
            ready!(timer.as_mut().poll(context));
            if Instant::now() >= time {
                return Poll::Ready(());
            }
            timer.as_mut().reset(time);
        }
    }

    /// Whether the timer was never polled.
    #[cfg(test)]
    pub(crate) fn is_unused(&self) -> bool {
        self.0.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{future::poll_fn, time::Duration};
    use tokio::time::timeout;

    #[tokio::test(start_paused = true)]
    async fn a_timer_fires_at_the_latest_time_even_if_that_moved_back_or_forth() {
        let start = Instant::now();
        let mut timer = Timer::default();
        for seconds in [50, 20, 80] {
            let time = start + Duration::from_secs(seconds);
            let early = timeout(Duration::from_secs(1), poll_fn(|context| timer.poll(context, time))).await;
            assert!(early.is_err());
        }
        poll_fn(|context| timer.poll(context, start + Duration::from_secs(80))).await;
        assert_eq!(start.elapsed().as_secs(), 80);
    }
}
