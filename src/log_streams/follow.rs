//! [`Follower`]: a reader of one stream, from any offset to the end (LOG-03, EXE-64).
//!
//! It pulls: bytes stay in the file until it asks for them, so a slow reader costs no memory and delays no other
//! client. Appends to client streams wake it. The runner's writes to a log do not, so while a reader exists, it polls
//! the file every [`TAIL_INTERVAL`]. The end of a run wakes it too.

use super::{
    run::{RunState, Tail},
    spool::{Spool, SpoolState, read},
};
use crate::budget::Share;
use bytes::Bytes;
use gorego_reapi::{
    digest::Digest,
    error::{Error, Result},
};
use std::{sync::Arc, time::Duration};
use tokio::{select, sync::watch, time::sleep};

/// Polling interval for the log of a running command: fast enough for a person, at the cost of about one small system
/// call.
pub(crate) const TAIL_INTERVAL: Duration = Duration::from_millis(100);

/// The next part of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// These bytes; never empty.
    Bytes(Bytes),
    /// The rest of the stream is this blob, at the same offset.
    Stored(Digest),
    /// The stream has ended.
    End,
}

/// A reader of one stream. It holds a share of the reader budget.
#[derive(Debug)]
pub struct Follower {
    source: StreamSource,
    closing: watch::Receiver<bool>,
    _place: Share,
}

#[derive(Debug)]
enum StreamSource {
    Spool(Arc<Spool>, watch::Receiver<SpoolState>),
    Run(Tail),
}

impl Follower {
    pub(super) fn of_spool(spool: Arc<Spool>, closing: watch::Receiver<bool>, place: Share) -> Self {
        let state = spool.watch();
        Self { source: StreamSource::Spool(spool, state), closing, _place: place }
    }

    pub(super) fn of_run(tail: Tail, closing: watch::Receiver<bool>, place: Share) -> Self {
        Self { source: StreamSource::Run(tail), closing, _place: place }
    }

    /// Waits for bytes at `offset` and returns at most `max` of them.
    ///
    /// # Errors
    /// `OutOfRange` when the stream ended before `offset`; `NotFound` when its bytes are lost, or were removed before
    /// they were read; `DeadlineExceeded` when the stream was not written to for too long; `Unavailable` when the
    /// server shuts down.
    pub async fn next(&mut self, offset: u64, max: usize) -> Result<Piece> {
        let closing = &mut self.closing;
        let piece = async {
            match &mut self.source {
                StreamSource::Spool(spool, state) => next_of_spool(spool, state, offset, max).await,
                StreamSource::Run(tail) => next_of_run(tail, offset, max).await,
            }
        };
        select! {
            biased;
            piece = piece => piece,
            _ = closing.wait_for(|closing| *closing) => {
                Err(Error::Unavailable("this server is shutting down; the log stream may be incomplete".into()))
            }
        }
    }
}

async fn next_of_spool(
    spool: &Arc<Spool>,
    states: &mut watch::Receiver<SpoolState>,
    offset: u64,
    max: usize,
) -> Result<Piece> {
    loop {
        let SpoolState { committed, removed } = *states.borrow_and_update();
        if let Some(left @ 1..) = committed.bytes.checked_sub(offset) {
            let max = usize::try_from(left).unwrap_or(usize::MAX).min(max);
            let reading = spool.clone();
            let bytes = super::blocking(move || reading.read(offset, max)).await?;
            if spool.is_removed() {
                return Err(removed_unread());
            }
            return if bytes.is_empty() { Err(lost()) } else { Ok(Piece::Bytes(bytes)) };
        }
        if committed.finished {
            return end(offset, committed.bytes);
        }
        if removed {
            return Err(Error::DeadlineExceeded(
                "the log stream was not written to for too long and was aborted".into(),
            ));
        }
        // The sender is in the spool, which this source holds.
        let _ = states.changed().await;
    }
}

async fn next_of_run(tail: &mut Tail, offset: u64, max: usize) -> Result<Piece> {
    loop {
        // Read before the file: bytes that are missing after the end will never appear.
        let state = tail.state();
        let file = match state {
            RunState::Open => tail.file().await?,
            RunState::Stored(_) | RunState::Lost => tail.opened(),
        };
        let length = match (file, state) {
            (Some(file), _) => {
                let (bytes, length) = super::blocking(move || {
                    let length = file.metadata().map_or(0, |metadata| metadata.len());
                    // Polls of a quiet file usually end here, before memory is allocated.
                    let left = usize::try_from(length.saturating_sub(offset)).unwrap_or(usize::MAX);
                    let bytes = if left == 0 { Bytes::new() } else { read(&file, offset, left.min(max))? };
                    Ok((bytes, length))
                })
                .await?;
                if !bytes.is_empty() {
                    return Ok(Piece::Bytes(bytes));
                }
                length
            }
            (None, RunState::Stored(Some(digest))) => return Ok(Piece::Stored(digest)),
            (None, RunState::Lost) => return Err(lost()),
            (None, RunState::Stored(None) | RunState::Open) => 0,
        };
        if state != RunState::Open {
            return end(offset, length);
        }
        select! {
            () = tail.changed() => {}
            () = sleep(TAIL_INTERVAL) => {}
        }
    }
}

fn end(offset: u64, length: u64) -> Result<Piece> {
    if offset > length {
        return Err(Error::OutOfRange(format!(
            "read_offset {offset} is not within the log stream, which ended at byte {length}"
        )));
    }
    Ok(Piece::End)
}

fn removed_unread() -> Error {
    let message = "the log stream was removed to make room, or because its time was over, before it was read to its end";
    Error::NotFound(message.into())
}

fn lost() -> Error {
    Error::NotFound("the log stream ended without its bytes being kept".into())
}
