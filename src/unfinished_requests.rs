//! [`UnfinishedRequests`]: the requests that may finish during a shutdown, as long as they make progress.
//!
//! At any time a request waits either for the server or for its client: for the server while it works on an answer, for
//! the client while bytes of the request are missing or bytes of the answer are not taken. The requests that wait for
//! the server are counted, and so is the progress of clients. A shutdown waits while any request waits for the server,
//! and while clients make progress. An inactive client cannot delay it. Streams that a client may keep open
//! indefinitely are not counted, and neither are connections.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::time::{Instant, sleep};

/// Interval between checks of the counts during a shutdown.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// The open requests of both ports. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct UnfinishedRequests(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    /// Number of requests that wait for the server.
    server_turns: AtomicUsize,
    /// Number of started requests and of completed client turns.
    moves: AtomicU64,
}

/// An open request, until [`UnfinishedRequest::end`] or its drop. It starts by waiting for the server.
#[derive(Debug)]
pub struct UnfinishedRequest {
    counts: Arc<Counts>,
    turn: AtomicU8,
}

const SERVER: u8 = 0;
const CLIENT: u8 = 1;
const ENDED: u8 = 2;

impl UnfinishedRequests {
    /// Counts a request that has just begun.
    pub fn begin(&self) -> UnfinishedRequest {
        self.0.server_turns.fetch_add(1, Ordering::SeqCst);
        self.0.moves.fetch_add(1, Ordering::SeqCst);
        UnfinishedRequest { counts: self.0.clone(), turn: AtomicU8::new(SERVER) }
    }

    /// Returns when, for the duration `quiet`, no request waited for the server and no client made progress. New
    /// requests are still possible until the server stops accepting them.
    pub async fn finished(&self, quiet: Duration) {
        let (mut seen, mut since) = (None, Instant::now());
        loop {
            let moves = self.0.moves.load(Ordering::SeqCst);
            if self.0.server_turns.load(Ordering::SeqCst) > 0 || seen != Some(moves) {
                (seen, since) = (Some(moves), Instant::now());
            } else if since.elapsed() >= quiet {
                return;
            }
            sleep(LOOK_INTERVAL).await;
        }
    }
}

impl UnfinishedRequest {
    /// The request now waits for its client.
    pub fn wait_for_client(&self) {
        self.change(CLIENT);
    }

    /// The client has made progress; the request waits for the server again.
    pub fn client_moved(&self) {
        if self.change(SERVER) == CLIENT {
            self.counts.moves.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// The request is finished.
    pub fn end(&self) {
        self.change(ENDED);
    }

    /// Sets the state and returns the previous one. A finished request stays finished.
    fn change(&self, to: u8) -> u8 {
        let change = |from| (from != ENDED).then_some(to);
        let (Ok(from) | Err(from)) = self.turn.fetch_update(Ordering::SeqCst, Ordering::SeqCst, change);
        match (from, to) {
            (SERVER, CLIENT | ENDED) => drop(self.counts.server_turns.fetch_sub(1, Ordering::SeqCst)),
            (CLIENT, SERVER) => drop(self.counts.server_turns.fetch_add(1, Ordering::SeqCst)),
            _ => {}
        }
        from
    }
}

impl Drop for UnfinishedRequest {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUIET: Duration = Duration::from_secs(2);

    /// The time in seconds until a shutdown that starts now would be over.
    async fn exit(unfinished_requests: &UnfinishedRequests) -> u64 {
        let begin = Instant::now();
        unfinished_requests.finished(QUIET).await;
        begin.elapsed().as_secs()
    }

    #[tokio::test(start_paused = true)]
    async fn what_the_server_works_on_is_waited_for_and_a_client_that_does_nothing_is_not() {
        let unfinished_requests = UnfinishedRequests::default();
        assert_eq!(exit(&unfinished_requests).await, 2, "clients may be about to ask for something");
        let (working, stalled, over) =
            (unfinished_requests.begin(), unfinished_requests.begin(), unfinished_requests.begin());
        stalled.wait_for_client();
        over.wait_for_client();
        over.end();
        over.client_moved();
        drop(over);
        let work = async {
            sleep(Duration::from_secs(100)).await;
            drop(working);
        };
        assert_eq!(tokio::join!(exit(&unfinished_requests), work).0, 102);
        drop(stalled);
        assert_eq!(unfinished_requests.0.server_turns.load(Ordering::SeqCst), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_client_is_waited_for_as_long_as_it_moves() {
        let unfinished_requests = UnfinishedRequests::default();
        let slow = unfinished_requests.begin();
        let moves = async {
            for _ in 0..10 {
                slow.wait_for_client();
                sleep(QUIET * 3 / 4).await;
                slow.client_moved();
            }
            slow.wait_for_client();
        };
        assert_eq!(
            tokio::join!(exit(&unfinished_requests), moves).0,
            17,
            "ten times a second and a half, and the quiet"
        );
    }
}
