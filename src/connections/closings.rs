//! [`Closings`]: the connections that were asked to close and still have their descriptors.
//!
//! Such a connection has given up its place, so that a new one need not be refused. If new connections arrive faster
//! than old ones close, the server would hold far more descriptors than it has places. So accepting waits while many
//! connections are being closed.

use crate::budget::Share;
use std::time::Duration;
use tokio::{sync::watch, time::timeout};

/// Accepting waits while this many connections are being closed.
pub(super) const CLOSINGS_MAX: usize = 64;
/// How long accepting waits at most. A connection closes within milliseconds, unless its task is stuck. One new
/// connection per wait is too few to use up the descriptors.
pub(super) const CLOSINGS_WAIT: Duration = Duration::from_millis(250);

/// The number of connections that are being closed. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct Closings(watch::Sender<usize>);

impl Closings {
    /// Waits until few connections are being closed, but not for long.
    pub(super) async fn few(&self) {
        let mut closings = self.0.subscribe();
        let _ = timeout(CLOSINGS_WAIT, closings.wait_for(|number| *number < CLOSINGS_MAX)).await;
    }

    #[cfg(test)]
    pub(super) fn number(&self) -> usize {
        *self.0.borrow()
    }

    /// Counts a connection until the guard is dropped.
    fn begin(&self) -> Closing {
        self.0.send_modify(|number| *number += 1);
        Closing(self.clone())
    }
}

/// A connection that is being closed.
#[derive(Debug)]
pub(super) struct Closing(Closings);

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.0.send_modify(|number| *number -= 1);
    }
}

/// How a connection is counted.
#[derive(Debug)]
pub(super) enum ConnectionPlace {
    /// It is open and holds a share of the budget of places.
    Open {
        _share: Share,
        closings: Closings,
    },
    /// It was asked to close.
    Closing {
        _count: Closing,
    },
    Closed,
}

impl ConnectionPlace {
    /// Returns the share to the budget. The connection counts as one that is being closed.
    pub(super) fn give_up(&mut self) {
        if let Self::Open { closings, .. } = self {
            *self = Self::Closing { _count: closings.begin() };
        }
    }
}
