//! Reads whose clients take nothing: an end for them (BS-07).
//!
//! A stream is pulled by its client, so one that takes nothing would hold an open file, and with it bytes on disk that cannot
//! be freed, for as long as the client likes. Nothing polls such a stream, so its end comes from outside: a task that looks
//! whether it was asked for more. What is slow on this side is no stall. A stream that was given up drops all that it held;
//! its error waits for the client to come back.

use super::ReadStream;
use futures::stream::{Stream, StreamExt as _};
use gorego_reapi::{error::Error, proto::bytestream::ReadResponse};
use std::{
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    task::JoinHandle,
    time::{Instant, sleep_until},
};
use tonic::Status;

/// How long a client may leave a message untaken; as long as an upload may be silent.
pub const READ_IDLE_LIMIT: Duration = super::byte_stream::WRITE_IDLE_LIMIT;

/// These messages, until their client has taken none of them for [`READ_IDLE_LIMIT`].
pub(super) fn watched(messages: ReadStream) -> ReadStream {
    let pull =
        Arc::new(Pull(Mutex::new(State { messages: Some(messages), idle_since: Some(Instant::now()) })));
    let watch = tokio::spawn(give_up(Arc::downgrade(&pull)));
    Watched { pull, watch }.boxed()
}

/// What the client and the watch share. The lock is held while one message is made ready, which never blocks.
struct Pull(Mutex<State>);

struct State {
    /// `None` once it was given up, or is over.
    messages: Option<ReadStream>,
    /// Since when it is the client's turn; `None` while it is ours.
    idle_since: Option<Instant>,
}

impl Pull {
    fn state(&self) -> MutexGuard<'_, State> {
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

/// Drops the messages when their client takes none.
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
        "nothing was taken from the download for {READ_IDLE_LIMIT:?}; read on from where it stopped"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::stream;
    use tokio::time::{advance, sleep};
    use tonic::Code;

    const ALMOST: Duration = READ_IDLE_LIMIT.saturating_sub(Duration::from_secs(1));

    /// A read of endless messages, each ready after `delay`, and what it holds meanwhile.
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
