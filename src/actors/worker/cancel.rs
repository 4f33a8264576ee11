//! [`CancelToken`]: how a running action is told to stop.

use rustix::{
    event::{EventfdFlags, eventfd},
    fd::{AsFd, BorrowedFd, OwnedFd},
    io,
};
use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

/// Set once, by the scheduler or by the watch over the disk; seen by the worker thread: between two steps by asking, inside a wait by polling its
/// descriptor together with the child's.
#[derive(Debug, Clone)]
pub struct CancelToken(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    cancelled: AtomicBool,
    event: Option<OwnedFd>,
}

impl CancelToken {
    /// A token that nobody has cancelled. Without a free descriptor it still works between steps.
    pub fn new() -> Self {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).ok();
        Self(Arc::new(Inner { cancelled: AtomicBool::new(false), event }))
    }

    /// Asks the action to stop; more than once does no harm.
    pub fn cancel(&self) {
        if !self.0.cancelled.swap(true, Ordering::SeqCst)
            && let Some(event) = &self.0.event
        {
            // An eventfd at 0 takes a 1 without blocking.
            let _ = io::write(event, &1u64.to_ne_bytes());
        }
    }

    /// Whether it was cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::SeqCst)
    }

    /// Readable once cancelled, and for good.
    pub fn event(&self) -> Option<BorrowedFd<'_>> {
        self.0.event.as_ref().map(AsFd::as_fd)
    }
}

impl Default for CancelToken {
    fn default() -> Self {
        Self::new()
    }
}
