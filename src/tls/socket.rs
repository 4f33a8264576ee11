//! [`Socket`]: an accepted TCP stream, with or without TLS on it.

use super::read_ahead::ReadAhead;
use crate::quick_ack::QuickAck;
use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, Waker},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_rustls::server::TlsStream;

#[derive(Debug)]
pub(crate) enum Socket {
    /// A TCP stream without TLS.
    Plain(QuickAck),
    /// A TLS stream after its handshake.
    Tls(Box<TlsStream<ReadAhead>>),
}

impl Socket {
    fn stream(&mut self) -> &mut QuickAck {
        match self {
            Self::Plain(stream) => stream,
            Self::Tls(stream) => stream.get_mut().0.get_mut(),
        }
    }

    /// Tells the stream whether an answer is about to be written ([`QuickAck::set_answers_soon`]).
    pub(crate) fn set_answers_soon(&mut self, answers_soon: bool) {
        self.stream().set_answers_soon(answers_soon);
    }

    /// Whether it may hold written bytes that are not in the kernel yet. A flush writes them.
    pub(crate) fn holds_writes(&self) -> bool {
        matches!(self, Self::Tls(_))
    }

    /// Writes as much as possible without waiting. Nothing else may be written afterwards.
    pub(crate) fn write_last(&mut self, bytes: &[u8]) {
        let mut nobody = Context::from_waker(Waker::noop());
        let _ = Pin::new(&mut *self).poll_write(&mut nobody, bytes);
        let _ = Pin::new(self).poll_flush(&mut nobody);
    }
}

macro_rules! each {
    ($socket:expr, $stream:ident => $result:expr) => {
        match $socket.get_mut() {
            Socket::Plain(stream) => {
                let $stream = Pin::new(stream);
                $result
            }
            Socket::Tls(stream) => {
                let $stream = Pin::new(&mut **stream);
                $result
            }
        }
    };
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        each!(self, stream => stream.poll_read(context, buffer))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        each!(self, stream => stream.poll_write(context, bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        each!(self, stream => stream.poll_write_vectored(context, slices))
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(stream) => stream.is_write_vectored(),
            Self::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, stream => stream.poll_flush(context))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, stream => stream.poll_shutdown(context))
    }
}
