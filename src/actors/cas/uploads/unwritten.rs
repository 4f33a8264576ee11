//! [`UnwrittenPieces`]: the pieces of an upload that have arrived and are not written yet.
//!
//! Starting a job on a blocking thread is not worthwhile for a few bytes, so each upload collects some first. Thousands
//! of stalled uploads would keep these bytes in memory, so all uploads share a [`Budget`]. If it has no room for the
//! next piece, [`UnwrittenPieces::push`] fails, and the upload writes its pieces at once and waits for that. Uploads
//! already buffer less when half of the budget is taken ([`UnwrittenPieces::has_plenty`]), so that many uploads of one
//! client seldom reach the bound.

use crate::{
    actors::cas::client::Cas,
    budget::{Bounds, Budget, Refusal, Share},
    caller::Caller,
};
use bytes::Bytes;

/// Bound on the bytes that clients sent and that are not written yet.
pub(crate) const RECEIVED: Bounds = Bounds {
    what: "bytes of uploads that are not written yet",
    total: 128 * 1024 * 1024,
    connection: 96 * 1024 * 1024,
};
/// Memory of a piece beyond its bytes: its handle, and the rest of the message that it is a part of.
const PIECE_OVERHEAD_BYTES: u64 = 1024;

/// The unwritten pieces of one upload; see the module documentation.
#[derive(Debug)]
pub(crate) struct UnwrittenPieces {
    account: Option<(Budget, Caller)>,
    pieces: Pieces,
    bytes: usize,
}

/// Pieces, with their share of the budget. A closure that calls [`Pieces::bytes`] captures both; one that used the
/// field would capture the bytes only, and the share would be given back before the job runs.
#[derive(Debug, Default)]
pub(crate) struct Pieces {
    bytes: Vec<Bytes>,
    share: Option<Share>,
}

impl Pieces {
    pub(crate) fn bytes(&self) -> &[Bytes] {
        &self.bytes
    }
}

impl UnwrittenPieces {
    /// An empty buffer. Without an account, nothing is charged: the server itself stores the bytes.
    pub(crate) fn new(account: Option<(Budget, Caller)>) -> Self {
        Self { account, pieces: Pieces::default(), bytes: 0 }
    }

    /// The caller that is charged, or the default caller if the server itself stores the bytes.
    pub(crate) fn caller(&self) -> Caller {
        self.account.as_ref().map(|(_, caller)| *caller).unwrap_or_default()
    }

    /// The first piece; empty if there is none.
    pub(crate) fn head(&self) -> &[u8] {
        self.pieces.bytes.first().map(AsRef::as_ref).unwrap_or_default()
    }

    /// The number of unwritten bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether this upload may buffer many bytes. It may while all uploads hold less than half of their common bound,
    /// and those of its connection less than half of theirs.
    pub(crate) fn has_plenty(&self) -> bool {
        self.account.as_ref().is_none_or(|(budget, caller)| {
            budget.held() < RECEIVED.total / 2 && budget.held_by(*caller) < RECEIVED.connection / 2
        })
    }

    /// Appends a piece, unless it is empty.
    ///
    /// # Errors
    /// When there is no memory for the piece. It is added nevertheless, and has to be written at once.
    pub(crate) fn push(&mut self, piece: Bytes) -> Result<(), Refusal> {
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

    /// Takes out all pieces.
    pub(crate) fn take(&mut self) -> Pieces {
        self.bytes = 0;
        std::mem::take(&mut self.pieces)
    }
}

impl Cas {
    /// A buffer for bytes that arrive through this handle and are not written yet.
    pub(in crate::actors::cas) fn received(&self) -> UnwrittenPieces {
        UnwrittenPieces::new(self.client().map(|caller| (self.shared().received.clone(), caller)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_counted_until_they_are_dropped_and_one_without_room_is_added_all_the_same() {
        let budget = Budget::new(RECEIVED);
        let caller = Caller::connected(([127, 0, 0, 1], 1).into());
        let mut received = UnwrittenPieces::new(Some((budget.clone(), caller)));
        received.push(Bytes::new()).unwrap();
        assert_eq!(budget.held(), 0);
        received.push(Bytes::from_static(b"first")).unwrap();
        assert_eq!(budget.held(), 5 + PIECE_OVERHEAD_BYTES);
        assert!(received.has_plenty());
        let others = budget.take(caller, RECEIVED.connection - budget.held()).unwrap();
        assert!(!received.has_plenty());
        assert!(received.push(Bytes::from_static(b"second")).is_err());
        assert_eq!(received.bytes(), 11);
        let pieces = received.take();
        assert_eq!((received.bytes(), pieces.bytes.concat()), (0, b"firstsecond".to_vec()));
        assert!(budget.held() > others.amount());
        drop(pieces);
        assert_eq!(budget.held(), others.amount());
    }
}
