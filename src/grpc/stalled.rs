//! Ends reads whose clients take nothing (BS-07).
//!
//! A stream advances only when its client reads. So an inactive client would hold a file open, and with it bytes on
//! disk, without limit. Nothing polls such a stream, so a task checks whether the client has asked for more. The time
//! that the server needs does not count. A stream that was ended drops everything that it held; the client gets the
//! error if it reads again.

use super::{ReadStream, stream_limits::READ_IDLE_LIMIT};
use futures::stream::{Stream, StreamExt as _};
use gorego_reapi::{error::Error, proto::bytestream::ReadResponse};
use std::{
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    task::{Context, Poll},
};
use tokio::{
    task::JoinHandle,
    time::{Instant, sleep_until},
};
use tonic::Status;

/// Ends a stream when its client has taken no message for [`READ_IDLE_LIMIT`].
pub(super) fn watched(messages: ReadStream) -> ReadStream {
    let pull =
        Arc::new(Pull(Mutex::new(PullState { messages: Some(messages), idle_since: Some(Instant::now()) })));
    let watch = tokio::spawn(give_up(Arc::downgrade(&pull)));
    Watched { pull, watch }.boxed()
}

/// The state that a stream shares with the task that watches it. The lock is held while the stream is polled for its
/// next message, which never blocks.
struct Pull(Mutex<PullState>);

struct PullState {
    /// `None` once the stream has ended.
    messages: Option<ReadStream>,
    /// Start of the wait for the client; `None` while the server works.
    idle_since: Option<Instant>,
}

impl Pull {
    fn state(&self) -> MutexGuard<'_, PullState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Watched {
    pull: Arc<Pull>,
    watch: JoinHandle<()>,
}

impl Stream for Watched {
    type Item = Result<ReadResponse, Status>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut state = self.pull.state();
        let Some(messages) = &mut state.messages else {
            // The stream ends with its first error, so this is never asked again.
            return Poll::Ready(Some(Err(stalled().into())));
        };
        let next = messages.poll_next_unpin(context);
        state.idle_since = next.is_ready().then(Instant::now);
        next
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.watch.abort();
    }
}

/// Drops the messages when the client takes none.
async fn give_up(pull: Weak<Pull>) {
    let mut look = Instant::now() + READ_IDLE_LIMIT;
    loop {
        sleep_until(look).await;
        let Some(pull) = pull.upgrade() else { return };
        let mut state = pull.state();
        look = state.idle_since.unwrap_or_else(Instant::now) + READ_IDLE_LIMIT;
        if look <= Instant::now() {
            let given_up = state.messages.take();
            drop(state);
            drop(given_up);
            return;
        }
    }
}

fn stalled() -> Error {
    Error::DeadlineExceeded(format!(
        "the client took nothing from the download for {READ_IDLE_LIMIT:?}; resume where it stopped"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::stream;
    use std::time::Duration;
    use tokio::time::{advance, sleep};
    use tonic::Code;

    const ALMOST: Duration = READ_IDLE_LIMIT.saturating_sub(Duration::from_secs(1));

    /// A read of endless messages, each ready after `delay`, and a reference to a resource that the read holds.
    fn read(delay: Duration) -> (ReadStream, Weak<()>) {
        let held = Arc::new(());
        let weak = Arc::downgrade(&held);
        let messages = stream::unfold(held, move |held| async move {
            sleep(delay).await;
            Some((Ok(ReadResponse::default()), held))
        });
        (watched(messages.boxed()), weak)
    }

    #[tokio::test(start_paused = true)]
    async fn a_read_that_nobody_takes_holds_nothing_and_ends_with_an_error() {
        let (mut messages, held) = read(Duration::ZERO);
        assert!(messages.next().await.unwrap().is_ok());
        sleep(ALMOST).await;
        assert!(held.upgrade().is_some());
        sleep(Duration::from_secs(2)).await;
        assert!(held.upgrade().is_none());
        assert_eq!(messages.next().await.unwrap().unwrap_err().code(), Code::DeadlineExceeded);
    }

    #[tokio::test(start_paused = true)]
    async fn slow_clients_and_slow_disks_are_waited_for() {
        let (mut messages, _held) = read(Duration::ZERO);
        for _ in 0..10 {
            assert!(messages.next().await.unwrap().is_ok());
            sleep(ALMOST).await;
        }
        let (mut messages, _held) = read(READ_IDLE_LIMIT * 3);
        for _ in 0..3 {
            assert!(messages.next().await.unwrap().is_ok());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_read_that_is_over_leaves_no_task() {
        let (messages, held) = read(Duration::ZERO);
        drop(messages);
        assert!(held.upgrade().is_none());
        advance(Duration::ZERO).await;
        tokio::task::yield_now().await;
        assert_eq!(tokio::runtime::Handle::current().metrics().num_alive_tasks(), 0);
    }
}
