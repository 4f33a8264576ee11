//! [`UnderWay`]: the requests that a server that stops lets finish, as long as they make progress.
//!
//! At any time a request waits either for the server or for its client: for the server while that works on an answer, and for
//! its client while bytes of the request are missing, or bytes of the answer are not taken. The requests that wait for the server
//! are counted, and so is progress: each time that a client does what it was waited for. A shutdown waits while a request waits
//! for the server and while clients make progress; a client that does nothing cannot hold it up. What a client may keep open for as long as it
//! likes is not counted, and neither are connections.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::time::{Instant, sleep};

/// How often a shutdown looks at the counts.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// The requests under way, of both ports; cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct UnderWay(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    /// Requests that are the server's turn.
    server_turns: AtomicUsize,
    /// Requests that began, and turns that clients have ended.
    moves: AtomicU64,
}

/// A request under way, until [`Unfinished::end`] or until it is dropped. It begins as the server's turn.
#[derive(Debug)]
pub struct Unfinished {
    counts: Arc<Counts>,
    turn: AtomicU8,
}

const SERVER: u8 = 0;
const CLIENT: u8 = 1;
const ENDED: u8 = 2;

impl UnderWay {
    /// Counts a request that has just begun.
    pub fn begin(&self) -> Unfinished {
        self.0.server_turns.fetch_add(1, Ordering::SeqCst);
        self.0.moves.fetch_add(1, Ordering::SeqCst);
        Unfinished { counts: self.0.clone(), turn: AtomicU8::new(SERVER) }
    }

    /// Returns when, for `quiet`, no request waited for the server and no client made progress. Clients may begin requests until
    /// they are told not to.
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

impl Unfinished {
    /// From now on the client is waited for.
    pub fn wait_for_client(&self) {
        self.change(CLIENT);
    }

    /// The client has done its part.
    pub fn client_moved(&self) {
        if self.change(SERVER) == CLIENT {
            self.counts.moves.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// The request is over.
    pub fn end(&self) {
        self.change(ENDED);
    }

    /// Changes whose turn it is, and returns whose it was. What has ended stays so.
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

impl Drop for Unfinished {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUIET: Duration = Duration::from_secs(2);

    /// How long it takes until a shutdown that begins now is over, to the second.
    async fn exit(under_way: &UnderWay) -> u64 {
        let begin = Instant::now();
        under_way.finished(QUIET).await;
        begin.elapsed().as_secs()
    }

    #[tokio::test(start_paused = true)]
    async fn what_the_server_works_on_is_waited_for_and_a_client_that_does_nothing_is_not() {
        let under_way = UnderWay::default();
        assert_eq!(exit(&under_way).await, 2, "clients may be about to ask for something");
        let (working, stalled, over) = (under_way.begin(), under_way.begin(), under_way.begin());
        stalled.wait_for_client();
        over.wait_for_client();
        over.end();
        over.client_moved();
        drop(over);
        let work = async {
            sleep(Duration::from_secs(100)).await;
            drop(working);
        };
        assert_eq!(tokio::join!(exit(&under_way), work).0, 102);
        drop(stalled);
        assert_eq!(under_way.0.server_turns.load(Ordering::SeqCst), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_client_is_waited_for_as_long_as_it_moves() {
        let under_way = UnderWay::default();
        let slow = under_way.begin();
        let moves = async {
            for _ in 0..10 {
                slow.wait_for_client();
                sleep(QUIET * 3 / 4).await;
                slow.client_moved();
            }
            slow.wait_for_client();
        };
        assert_eq!(
            tokio::join!(exit(&under_way), moves).0,
            17,
            "ten times a second and a half, and the quiet"
        );
    }
}
