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

/// Tells the worker thread of one run to stop. The scheduler cancels the run; the watch over the disk only stops its command,
/// since the run has failed and what follows is the worker's to decide. Between two steps the thread asks; inside a wait it
/// polls the descriptor together with the child's.
#[derive(Debug, Clone)]
pub struct CancelToken(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    cancelled: AtomicBool,
    stopped: AtomicBool,
    event: Option<OwnedFd>,
}

impl CancelToken {
    /// A token that nobody has cancelled. Without a free descriptor it still works between steps.
    pub fn new() -> Self {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).ok();
        Self(Arc::new(Inner { cancelled: AtomicBool::new(false), stopped: AtomicBool::new(false), event }))
    }

    /// Asks the run to end as soon as it can; more than once does no harm.
    pub fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::SeqCst);
        self.stop();
    }

    /// Asks the command to stop; the run is not cancelled. More than once does no harm.
    pub fn stop(&self) {
        if !self.0.stopped.swap(true, Ordering::SeqCst)
            && let Some(event) = &self.0.event
        {
            // An eventfd at 0 takes a 1 without blocking.
            let _ = io::write(event, &1u64.to_ne_bytes());
        }
    }

    /// Whether the run was cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::SeqCst)
    }

    /// Whether the command is to stop, for whatever reason.
    pub fn is_stopped(&self) -> bool {
        self.0.stopped.load(Ordering::SeqCst)
    }

    /// Readable once stopped, and for good.
    pub fn event(&self) -> Option<BorrowedFd<'_>> {
        self.0.event.as_ref().map(AsFd::as_fd)
    }
}

impl Default for CancelToken {
    fn default() -> Self {
        Self::new()
    }
}
