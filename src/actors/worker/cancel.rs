//! [`CancelToken`]: tells a running action to stop.

use rustix::{
    event::{EventfdFlags, eventfd},
    fd::{AsFd, BorrowedFd, OwnedFd},
    io,
};
use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

/// Tells the worker thread of one run to stop. The scheduler cancels the whole run. The disk watch stops only the
/// command: the run has then failed, and the worker decides whether it is retried. The thread checks the token between
/// two steps. While it waits for the command, it polls the descriptors of the token and of the child.
#[derive(Debug, Clone)]
pub struct CancelToken(Arc<TokenState>);

#[derive(Debug)]
struct TokenState {
    cancelled: AtomicBool,
    stopped: AtomicBool,
    event: Option<OwnedFd>,
}

impl CancelToken {
    /// A new token. If no descriptor is free, it still works between steps.
    pub fn new() -> Self {
        Self::with(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).ok())
    }

    /// A token for work that is only checked between steps. It takes no descriptor.
    pub fn without_event() -> Self {
        Self::with(None)
    }

    fn with(event: Option<OwnedFd>) -> Self {
        Self(Arc::new(TokenState {
            cancelled: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            event,
        }))
    }

    /// Asks the run to end as soon as it can. Further calls have no effect.
    pub fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::SeqCst);
        self.stop();
    }

    /// Asks the command to stop, without cancelling the run. Further calls have no effect.
    pub fn stop(&self) {
        if !self.0.stopped.swap(true, Ordering::SeqCst)
            && let Some(event) = &self.0.event
        {
            // Writing 1 to an eventfd at 0 does not block.
            let _ = io::write(event, &1u64.to_ne_bytes());
        }
    }

    /// Whether the run was cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::SeqCst)
    }

    /// Whether the command has to stop, for any reason.
    pub fn is_stopped(&self) -> bool {
        self.0.stopped.load(Ordering::SeqCst)
    }

    /// A descriptor that becomes readable when the command has to stop.
    pub fn event(&self) -> Option<BorrowedFd<'_>> {
        self.0.event.as_ref().map(AsFd::as_fd)
    }
}

impl Default for CancelToken {
    fn default() -> Self {
        Self::new()
    }
}
