//! [`Alarm`]: wakes a task at a time that may change between two polls.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio::time::{Instant, Sleep, sleep_until};

/// A timer that exists from its first poll on. A later time does not move it: it rings at the earlier one, and is then
/// set again. So a time that moves with every frame of a stream costs nothing.
#[derive(Debug, Default)]
pub(crate) struct Alarm(Option<Pin<Box<Sleep>>>);

impl Alarm {
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

    /// Whether the alarm was never polled, so that it has no timer.
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
    async fn an_alarm_rings_at_the_latest_time_even_if_that_moved_back_or_forth() {
        let start = Instant::now();
        let mut alarm = Alarm::default();
        for seconds in [50, 20, 80] {
            let time = start + Duration::from_secs(seconds);
            let early = timeout(Duration::from_secs(1), poll_fn(|context| alarm.poll(context, time))).await;
            assert!(early.is_err());
        }
        poll_fn(|context| alarm.poll(context, start + Duration::from_secs(80))).await;
        assert_eq!(start.elapsed().as_secs(), 80);
    }
}
