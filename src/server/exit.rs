//! [`Exit`]: the deadlines of a shutdown, and the end of running work.

use super::LOG;
use crate::{
    actors::scheduler::{
        SchedulerActor,
        messages::{Drain, Inspect},
    },
    logging::Event,
};
use actix::Addr;
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

/// The part of the grace period in which cancelled work ends: processes are killed and directories removed.
const CANCEL_RESERVE: Duration = Duration::from_secs(2);

/// The part after that, in which clients receive the end of their streams.
const LAST_MESSAGES_RESERVE: Duration = Duration::from_secs(1);

/// The last part, in which the store saves state for the next start.
const CLOSE_RESERVE: Duration = Duration::from_secs(1);

/// The deadlines of a shutdown.
#[derive(Debug, Clone, Copy)]
pub(super) struct Exit {
    /// When the process must have exited.
    pub(super) end: Instant,
}

impl Exit {
    /// A shutdown that starts now and takes at most `grace`, but at least the time for an orderly end.
    pub(super) fn within(grace: Duration) -> Self {
        Self { end: Instant::now() + grace.max(CANCEL_RESERVE + LAST_MESSAGES_RESERVE + CLOSE_RESERVE) }
    }

    /// When running work is cancelled.
    fn cancel_running(self) -> Instant {
        self.cancelled() - CANCEL_RESERVE
    }

    /// When the server stops waiting for cancelled work.
    fn cancelled(self) -> Instant {
        self.last_messages_sent() - LAST_MESSAGES_RESERVE
    }

    /// When the server stops waiting for the removal of what actions have left.
    pub(super) fn removed(self) -> Instant {
        self.end - CLOSE_RESERVE / 2
    }

    /// When the server stops waiting for clients.
    pub(super) fn last_messages_sent(self) -> Instant {
        self.end - CLOSE_RESERVE
    }
}

/// Lets the scheduler finish, then ends the remaining work with a status that clients retry.
pub(super) async fn drain(scheduler: &Addr<SchedulerActor>, exit: Exit) {
    if timeout_at(exit.cancel_running(), scheduler.send(Drain { cancel: false })).await.is_ok() {
        return;
    }
    let left = timeout_at(exit.cancelled(), scheduler.send(Inspect)).await.ok().and_then(Result::ok);
    Event::warn(LOG, "work_cancelled")
        .with_some("queued", left.as_ref().map(|left| left.queued))
        .with_some("running", left.as_ref().map(|left| left.running))
        .log(format_args!("the grace period is nearly over: cancelling the remaining work"));
    if timeout_at(exit.cancelled(), scheduler.send(Drain { cancel: true })).await.is_err() {
        Event::error(LOG, "work_stuck")
            .log(format_args!("some work did not stop; leaving it to the runners"));
    }
}
