//! [`ReadAhead`]: reads whole TLS records from a socket.
//!
//! The TLS library reads at most 4 KiB at a time when a record begins, so a record of 16 KiB takes five system calls.
//! This wrapper reads up to [`BUFFER_BYTES`] at once and returns them piece by piece. A connection without unread bytes
//! has no buffer.

use crate::quick_ack::QuickAck;
use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Size of the buffer: the largest record, and the beginning of the next one. It is kept while a connection is not
/// read.
const BUFFER_BYTES: usize = 17 * 1024;

/// A TCP stream that is read in large pieces; see the top of this file.
#[derive(Debug)]
pub(crate) struct ReadAhead {
    stream: QuickAck,
    buffer: Vec<u8>,
    /// How much of the buffer was returned.
    taken: usize,
}

impl ReadAhead {
    pub(super) fn new(stream: QuickAck) -> Self {
        Self { stream, buffer: Vec::new(), taken: 0 }
    }

    /// The underlying stream, for its settings.
    pub(super) fn get_mut(&mut self) -> &mut QuickAck {
        &mut self.stream
    }

    fn stream(self: Pin<&mut Self>) -> Pin<&mut QuickAck> {
        Pin::new(&mut self.get_mut().stream)
    }
}

impl AsyncRead for ReadAhead {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.taken == this.buffer.len() {
            // The buffer is written before it is read, so its old content does not matter.
            this.buffer.resize(BUFFER_BYTES, 0);
            let mut room = ReadBuf::new(&mut this.buffer);
            let read = Pin::new(&mut this.stream).poll_read(context, &mut room);
            let filled = room.filled().len();
            this.taken = 0;
            if filled == 0 {
                this.buffer = Vec::new();
                return read;
            }
            this.buffer.truncate(filled);
            ready!(read)?;
        }
        let unread = this.buffer.get(this.taken..).unwrap_or_default();
        let piece = unread.get(..into.remaining()).unwrap_or(unread);
        into.put_slice(piece);
        this.taken += piece.len();
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for ReadAhead {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.stream().poll_write(context, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.stream().poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream().poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream().poll_shutdown(context)
    }
}
