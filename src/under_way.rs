//! [`UnderWay`]: the requests that a server that stops lets finish.
//!
//! It counts, nothing else: whoever serves a request holds an [`Unfinished`] until the answer is over, and the shutdown waits
//! until nobody does. What a client may keep open for as long as it likes is not counted, and neither are connections: they
//! must not hold up the exit.

use std::time::Duration;
use tokio::{sync::watch, time::sleep};

/// The requests under way, of all doors; cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct UnderWay(watch::Sender<()>);

/// One of them, as long as this is held.
#[derive(Debug)]
pub struct Unfinished(#[expect(dead_code, reason = "held to be counted")] watch::Receiver<()>);

impl UnderWay {
    /// Counts a request that has just begun.
    pub fn begin(&self) -> Unfinished {
        Unfinished(self.0.subscribe())
    }

    /// Ends when nothing is under way and nothing was for `quiet`: clients may ask for more until they know better.
    pub async fn finished(&self, quiet: Duration) {
        loop {
            self.0.closed().await;
            sleep(quiet).await;
            if self.0.is_closed() {
                return;
            }
        }
    }
}
