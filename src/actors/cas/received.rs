//! [`Received`]: the pieces of an upload that came in and are not written yet.
//!
//! A job on a blocking thread is not worth its start for a few bytes, so each upload collects some before it starts one. Thousands of
//! uploads that say nothing more would keep those in memory, so all of them share a [`Budget`]. Where it has no room for the next
//! piece, [`Received::push`] says so, and the upload writes what it has at once and waits for that.

use crate::{
    budget::{Bounds, Budget, Refusal, Share},
    caller::Caller,
};
use bytes::Bytes;

/// Bytes that clients sent and that are not written yet.
pub const RECEIVED: Bounds = Bounds {
    what: "bytes of uploads that are not written yet",
    total: 128 * 1024 * 1024,
    connection: 96 * 1024 * 1024,
};
/// What a piece takes beside its bytes: its handle, and the rest of the message that it is a part of.
const PIECE_OVERHEAD_BYTES: u64 = 1024;

/// See the top of this file.
#[derive(Debug)]
pub struct Received {
    account: Option<(Budget, Caller)>,
    pieces: Pieces,
    bytes: usize,
}

/// Pieces, with their share of the budget.
#[derive(Debug, Default)]
pub struct Pieces {
    /// The bytes.
    pub bytes: Vec<Bytes>,
    share: Option<Share>,
}

impl Received {
    /// Nothing yet. What the server itself takes in is on no account.
    pub fn new(account: Option<(Budget, Caller)>) -> Self {
        Self { account, pieces: Pieces::default(), bytes: 0 }
    }

    /// How many bytes there are.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Adds a piece, unless it is empty.
    ///
    /// # Errors
    /// When there is no room for it in memory. It was added all the same, and has to be written at once.
    pub fn push(&mut self, piece: Bytes) -> Result<(), Refusal> {
        if piece.is_empty() {
            return Ok(());
        }
        let amount = piece.len() as u64 + PIECE_OVERHEAD_BYTES;
        self.bytes = self.bytes.saturating_add(piece.len());
        self.pieces.bytes.push(piece);
        match (&mut self.pieces.share, &self.account) {
            (Some(share), _) => share.grow(amount),
            (none, Some((budget, caller))) => {
                *none = Some(budget.take(*caller, amount)?);
                Ok(())
            }
            (None, None) => Ok(()),
        }
    }

    /// Takes out what there is.
    pub fn take(&mut self) -> Pieces {
        self.bytes = 0;
        std::mem::take(&mut self.pieces)
    }
}
