//! [`Progress`]: how far one attempt at an upload has got, for the actor and for the other uploads of its blob.

use super::{index::Key, settings::TWIN_STALL};
use gorego_reapi::digest::Digest;
use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};
use tokio::sync::watch;

/// The state of a running attempt that others can observe.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes of the blob accepted so far; never decreases.
    pub accepted: AtomicU64,
    fate: watch::Sender<Fate>,
}

/// How an attempt ended. Flags are never cleared.
#[derive(Debug, Clone, Copy, Default)]
struct Fate {
    /// The blob is stored, by this attempt or another (BS-24).
    is_superseded: bool,
    /// The attempt is over.
    has_ended: bool,
}

impl Progress {
    /// Whether the blob has been stored since the attempt began, by this attempt or another (BS-24).
    pub fn is_superseded(&self) -> bool {
        self.fate.borrow().is_superseded
    }

    /// The blob is stored now.
    pub(super) fn supersede(&self) {
        self.fate.send_modify(|fate| fate.is_superseded = true);
    }

    /// The attempt is over.
    pub(super) fn end(&self) {
        self.fate.send_modify(|fate| fate.has_ended = true);
    }

    /// Waits until [`Progress::is_superseded`], possibly for ever.
    pub fn superseded(&self) -> impl Future<Output = ()> + Send + use<> {
        self.reaches(|fate| fate.is_superseded)
    }

    /// Waits until the attempt is over.
    pub fn ended(&self) -> impl Future<Output = ()> + Send + use<> {
        self.reaches(|fate| fate.has_ended)
    }

    fn reaches(&self, is_reached: fn(&Fate) -> bool) -> impl Future<Output = ()> + Send + use<> {
        let mut fate = self.fate.subscribe();
        async move {
            if fate.wait_for(is_reached).await.is_err() {
                // The sender is gone, so the flag cannot be set any more.
                std::future::pending().await
            }
        }
    }

    /// Waits for the end of the attempt, until `deadline` or until it has accepted nothing for [`TWIN_STALL`]. Returns
    /// whether it ended.
    pub async fn ends_before(&self, deadline: tokio::time::Instant) -> bool {
        let mut ended = std::pin::pin!(self.ended());
        loop {
            let accepted = self.accepted.load(Ordering::Relaxed);
            let look = deadline.min(tokio::time::Instant::now() + TWIN_STALL);
            match tokio::time::timeout_at(look, &mut ended).await {
                Ok(()) => return true,
                Err(_) if look == deadline || self.accepted.load(Ordering::Relaxed) == accepted => {
                    return false;
                }
                Err(_) => {}
            }
        }
    }
}

/// An attempt that is over.
#[derive(Debug)]
pub(crate) struct EndedAttempt {
    /// The name of the upload: the digest of the resource name within its instance.
    pub name: Digest,
    pub number: u64,
    pub blob: Key,
    pub progress: Arc<Progress>,
}
