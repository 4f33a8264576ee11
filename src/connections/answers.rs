//! The memory of responses. It is reserved before they are made, and returned when the kernel has their bytes.
//!
//! [`ConnectionState::reserve`] waits for room, and [`ConnectionState::charge`] ties the room to the bytes. The library
//! drops the bytes when they are written or the connection is gone, which frees the room.
//!
//! A stream that its client does not read holds two pieces of its blob: the one in the HTTP/2 library, and the next,
//! which hyper requests before it knows whether the window has room. The pieces get smaller as the connection holds
//! more, so a thousand such streams leave room for one that is read, and they do not wait behind large responses
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

/// Limits on the bytes of responses that clients have not taken. The server may hold 64 of the largest messages;
/// together with the temporary memory for making them this stays below 600 MB. One connection may hold eight of them,
/// which is more than a link of 1 Gbit/s with a latency of 100 ms has in flight.
pub(crate) const ANSWERS: Bounds = Bounds {
    what: "bytes of answers that were not read",
    total: 256 * 1024 * 1024,
    connection: 32 * 1024 * 1024,
};
/// Overhead of a frame besides its bytes.
pub(crate) const FRAME_BYTES: u64 = 256;
/// How long a response waits for room while its client takes nothing.
pub(crate) const ROOM_WAIT: Duration = Duration::from_secs(60);
/// Piece size of streams while their connection holds more than half of its limit.
const SMALL_PIECE_BYTES: usize = 16 * 1024;
/// Piece size above three quarters of the limit.
const SMALLEST_PIECE_BYTES: usize = 4 * 1024;

impl ConnectionState {
    /// Waits for room for a response of this many bytes.
    ///
    /// # Errors
    /// `Exhausted` when there is no room and the client has taken nothing for [`ROOM_WAIT`].
    pub async fn reserve(&self, bytes: u64) -> Result<Share> {
        let bytes = within_connection(bytes);
        self.wait_while_read(self.answers.wait_for(self.caller, bytes)).await
    }

    /// Waits for room as long as the client keeps reading. On a slow link, the earlier responses may take minutes.
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

    /// Reserves room for a response of this many bytes without waiting.
    ///
    /// # Errors
    /// The limit that was reached.
    pub fn reserve_now(&self, bytes: u64) -> Result<Share, Refusal> {
        self.answers.take(self.caller, within_connection(bytes))
    }

    /// Waits for room for the next piece of a stream. Returns the size that the piece may have, at most `max`.
    ///
    /// # Errors
    /// See [`ConnectionState::reserve`].
    pub async fn reserve_piece(&self, max: usize) -> Result<(usize, Share)> {
        let held = self.answers.held_by(self.caller);
        let piece = match held {
            _ if held <= ANSWERS.connection / 2 => max,
            _ if held <= ANSWERS.connection / 4 * 3 => max.min(SMALL_PIECE_BYTES),
            _ => max.min(SMALLEST_PIECE_BYTES),
        };
        if let Some(room) = self.answers.take_small(self.caller, room_with_frames(piece)) {
            return Ok((piece, room));
        }
        // Only a small amount is waited for, so that it does not block the requests behind it for long.
        let piece = piece.min(SMALLEST_PIECE_BYTES);
        let room = self.answers.wait_for_small(self.caller, room_with_frames(piece));
        Ok((piece, self.wait_while_read(room).await?))
    }

    /// Records that the client has taken a part of its responses.
    pub fn note_progress(&self) {
        self.progress_ms.store(self.now_ms(), Relaxed);
    }

    /// Ties room to bytes. The returned bytes hold it until they are dropped.
    pub fn charge(self: &Arc<Self>, bytes: Bytes, room: Share) -> Bytes {
        if self.pieces.fetch_add(1, Relaxed) == 0 {
            // The client's time begins now, because there was nothing that it could have taken before.
            self.note_progress();
        }
        Bytes::from_owner(Charged { bytes, _room: room, connection: self.clone() })
    }
}

/// The room for an answer or a piece of it, including its HTTP/2 frames and the beginning of its message, which may
/// have a frame of its own.
pub(crate) fn room_with_frames(bytes: usize) -> u64 {
    bytes as u64 + 3 * FRAME_BYTES
}

fn within_connection(bytes: u64) -> u64 {
    bytes.min(ANSWERS.connection)
}

fn no_room() -> Error {
    Error::Exhausted {
        message: format!(
            "there was no room for the response, and the client took none of the earlier ones for {ROOM_WAIT:?}; \
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
