//! [`Turn`]: the state that a connection shares with the task that serves it.
//!
//! A turn is one round of work of that task ([`super::serving`]). It bounds how many frames are read, and may be
//! corked: then the connection collects small writes ([`super::connection`]).

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
};

/// Limit on the frames that are read in a turn, so that the HTTP/2 library hands over the requests that it has. It
/// allows 2 MiB of an upload in frames of the default size, and 8 MiB in frames of the largest size. Without it, the
/// library would first read everything that has arrived, and keep a stream for each request.
pub(super) const FRAMES_PER_TURN: usize = 128;

/// The state that a connection shares with the task that serves it. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct Turn(Arc<TurnState>);

#[derive(Debug, Default)]
struct TurnState {
    is_corked: AtomicBool,
    /// Number of frames that were read in this turn.
    frames: AtomicUsize,
    /// Number of requests that were handed over and have not ended.
    requests: AtomicUsize,
}

impl Turn {
    /// Begins a turn. If it is corked, small writes are collected. Unless it may read, nothing is read in it.
    pub(super) fn begin(&self, is_corked: bool, may_read: bool) {
        self.0.is_corked.store(is_corked, Relaxed);
        self.0.frames.store(if may_read { 0 } else { FRAMES_PER_TURN }, Relaxed);
    }

    /// Whether the turn has reached its limit of frames. There may be more to read.
    pub(super) fn is_used_up(&self) -> bool {
        self.0.frames.load(Relaxed) >= FRAMES_PER_TURN
    }

    /// Counts a request until the returned guard is dropped.
    pub(super) fn request(&self) -> OpenRequest {
        self.0.requests.fetch_add(1, Relaxed);
        OpenRequest(self.clone())
    }

    /// Whether small writes are collected.
    pub(super) fn is_corked(&self) -> bool {
        self.0.is_corked.load(Relaxed)
    }

    /// Counts frames that were read.
    pub(super) fn note_read(&self, frames: usize) {
        self.0.frames.fetch_add(frames, Relaxed);
    }

    /// Number of requests that were handed over and have not ended.
    pub(super) fn requests(&self) -> usize {
        self.0.requests.load(Relaxed)
    }
}

/// A request that has not ended; see [`Turn::request`].
#[derive(Debug)]
pub(super) struct OpenRequest(Turn);

impl Drop for OpenRequest {
    fn drop(&mut self) {
        self.0.0.requests.fetch_sub(1, Relaxed);
    }
}
