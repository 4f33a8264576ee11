//! Answers on their way out: room for them is taken before they are made, and given back when the kernel has their bytes.
//!
//! [`ConnectionState::reserve`] waits for room, [`ConnectionState::charge`] ties the room to the bytes: the library that writes
//! them drops them when they are written, or when the connection is gone, and the room is free in that moment.
//!
//! A stream that nobody reads holds two pieces of its blob: the one that the HTTP/2 library has, and the next, which hyper asks
//! for before it knows whether there is room in the window. Pieces get smaller while the connection holds much, so that a
//! thousand such streams leave room for one that is read, and they do not wait behind large answers
//! ([`ConnectionState::reserve_piece`]).

use super::ConnectionState;
use crate::budget::{Bounds, Refusal, Share};
use bytes::Bytes;
use gorego_reapi::error::{Error, Result};
use std::{
    pin::pin,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};
use tokio::time::timeout;

/// Bytes of answers that nobody has taken yet. The server may hold 64 of the largest messages; with what making them takes
/// for a moment, it stays below 600 MB. One connection may hold eight of them, which is more than a link of 1 Gbit/s and
/// 100 ms of latency has under way.
pub const ANSWERS: Bounds = Bounds {
    what: "bytes of answers that were not taken",
    total: 256 * 1024 * 1024,
    connection: 32 * 1024 * 1024,
};
/// What a frame takes beside its bytes.
pub const FRAME_BYTES: u64 = 256;
/// How long an answer waits for room while its client takes nothing of the others.
pub const ROOM_WAIT: Duration = Duration::from_secs(60);
/// Pieces of streams while their connection holds more than half of what it may hold.
const SMALL_PIECE_BYTES: usize = 16 * 1024;
/// The same above three quarters.
const SMALLEST_PIECE_BYTES: usize = 4 * 1024;

impl ConnectionState {
    /// Waits for room for an answer of this many bytes.
    ///
    /// # Errors
    /// `Exhausted` when there is none, and the client has taken nothing for [`ROOM_WAIT`].
    pub async fn reserve(&self, bytes: u64) -> Result<Share> {
        let bytes = within_connection(bytes);
        self.wait_while_read(self.answers.wait_for(self.caller, bytes)).await
    }

    /// Waits for room for as long as the client goes on to read: a slow link may need minutes for the answers before.
    async fn wait_while_read(&self, room: impl Future<Output = Result<Share, Refusal>>) -> Result<Share> {
        let mut since = self.now_ms();
        let mut wait = pin!(room);
        loop {
            let silent = Duration::from_millis(self.now_ms().saturating_sub(since));
            match timeout(ROOM_WAIT.saturating_sub(silent), wait.as_mut()).await {
                Ok(room) => return Ok(room?),
                Err(_) => match self.progress_ms.load(Relaxed) {
                    progress if progress > since => since = progress,
                    _ => return Err(no_room()),
                },
            }
        }
    }

    /// Takes room for an answer of this many bytes if there is some at once.
    ///
    /// # Errors
    /// The bound that is in the way.
    pub fn reserve_now(&self, bytes: u64) -> Result<Share, Refusal> {
        self.answers.take(self.caller, within_connection(bytes))
    }

    /// Waits for room for the next piece of a stream, and says how many bytes it may have, `max` at most.
    ///
    /// # Errors
    /// As [`ConnectionState::reserve`].
    pub async fn reserve_piece(&self, max: usize) -> Result<(usize, Share)> {
        let held = self.answers.held_by(self.caller);
        let piece = match held {
            _ if held <= ANSWERS.connection / 2 => max,
            _ if held <= ANSWERS.connection / 4 * 3 => max.min(SMALL_PIECE_BYTES),
            _ => max.min(SMALLEST_PIECE_BYTES),
        };
        if let Some(room) = self.answers.take_small(self.caller, piece_room(piece)) {
            return Ok((piece, room));
        }
        // What is waited for is small, so that it holds up nobody behind it for long.
        let piece = piece.min(SMALLEST_PIECE_BYTES);
        let room = self.answers.wait_for_small(self.caller, piece_room(piece));
        Ok((piece, self.wait_while_read(room).await?))
    }

    /// Notes that the client has taken a part of its answers.
    pub fn note_progress(&self) {
        self.progress_ms.store(self.now_ms(), Relaxed);
    }

    /// These bytes, which hold this room until they are dropped.
    pub fn charge(self: &Arc<Self>, bytes: Bytes, room: Share) -> Bytes {
        if self.pieces.fetch_add(1, Relaxed) == 0 {
            // Until now there was nothing to take.
            self.note_progress();
        }
        Bytes::from_owner(Charged { bytes, _room: room, connection: self.clone() })
    }
}

/// A piece with what is round it: its frame, and that of its message.
fn piece_room(bytes: usize) -> u64 {
    bytes as u64 + 2 * FRAME_BYTES
}

fn within_connection(bytes: u64) -> u64 {
    bytes.min(ANSWERS.connection)
}

fn no_room() -> Error {
    Error::Exhausted {
        message: format!(
            "there was no room for the answer, and none of those before it was taken for {ROOM_WAIT:?}; \
             read them, or ask for less at a time"
        ),
        retry_after: Some(Duration::from_secs(1)),
    }
}

struct Charged {
    bytes: Bytes,
    _room: Share,
    connection: Arc<ConnectionState>,
}

impl AsRef<[u8]> for Charged {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Charged {
    fn drop(&mut self) {
        self.connection.note_progress();
        self.connection.pieces.fetch_sub(1, Relaxed);
    }
}

/// A wait for room that owns its connection; otherwise as [`ConnectionState::reserve`].
///
/// # Errors
/// As there.
pub async fn reserve_owned(connection: Arc<ConnectionState>, bytes: u64) -> Result<Share> {
    connection.reserve(bytes).await
}
