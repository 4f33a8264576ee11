//! [`QuickAck`]: a TCP stream that acknowledges what it has read as soon as it waits for more.
//!
//! The kernel delays an acknowledgement by about 40 ms, to send it along with an answer. A client that uses Nagle's
//! algorithm and writes a request in two pieces (ccache: head and body) delays its second piece until the first is
//! acknowledged, so each side waits for the other. The kernel's option against this, `TCP_QUICKACK`, does not persist
//! (tcp(7)). So it is set whenever a reader has drained the socket and nothing was written since that would have
//! carried the acknowledgement.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

/// A TCP stream without delayed acknowledgements.
#[derive(Debug)]
pub(crate) struct QuickAck {
    stream: TcpStream,
    /// Whether bytes were read that may not be acknowledged yet.
    owed: bool,
    /// An answer is about to be written.
    answers_soon: bool,
}

impl QuickAck {
    /// Wraps a stream that has not been read from.
    pub(crate) fn new(stream: TcpStream) -> Self {
        Self { stream, owed: false, answers_soon: false }
    }

    pub(crate) fn get_ref(&self) -> &TcpStream {
        &self.stream
    }

    /// Says whether an answer is about to be written, which makes an acknowledgement of its own unnecessary.
    pub(crate) fn set_answers_soon(&mut self, answers_soon: bool) {
        self.answers_soon = answers_soon;
    }

    fn stream(self: Pin<&mut Self>) -> Pin<&mut TcpStream> {
        Pin::new(&mut self.get_mut().stream)
    }

    /// Clears `owed`: a successful write carries the acknowledgement.
    fn wrote(mut self: Pin<&mut Self>, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if matches!(written, Poll::Ready(Ok(bytes)) if bytes > 0) {
            self.owed = false;
        }
        written
    }
}

impl AsyncRead for QuickAck {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = self.as_mut().stream().poll_read(context, buffer);
        if read.is_pending() && !self.answers_soon && std::mem::take(&mut self.owed) {
            // On failure the connection is slow but still works.
            let _ = rustix::net::sockopt::set_tcp_quickack(&self.stream, true);
        }
        ready!(read)?;
        self.owed |= buffer.filled().len() > before;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for QuickAck {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = self.as_mut().stream().poll_write(context, bytes);
        self.wrote(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = self.as_mut().stream().poll_write_vectored(context, slices);
        self.wrote(written)
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::{Read as _, Write as _},
        time::{Duration, Instant},
    };
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    /// The median latency of requests that a client writes in two pieces, with Nagle's algorithm. A delayed
    /// acknowledgement adds at least 40 ms.
    #[tokio::test]
    async fn a_request_in_two_pieces_does_not_wait_for_an_acknowledgement() {
        const REQUESTS: usize = 41;
        // A delayed acknowledgement would add 40 ms.
        const MORE_MAX: Duration = Duration::from_millis(20);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let client = tokio::task::spawn_blocking(move || {
            let mut stream = std::net::TcpStream::connect(address).unwrap();
            let mut median = |pieces: &[&[u8]]| {
                let mut times = [(); REQUESTS].map(|()| {
                    let start = Instant::now();
                    pieces.iter().for_each(|piece| stream.write_all(piece).unwrap());
                    stream.read_exact(&mut [0; 6]).unwrap();
                    start.elapsed()
                });
                times.sort_unstable();
                times[REQUESTS / 2]
            };
            (median(&[b"headbody"]), median(&[b"head", b"body"]))
        });
        let (stream, _) = listener.accept().await.unwrap();
        stream.set_nodelay(true).unwrap();
        let mut stream = QuickAck::new(stream);
        for _ in 0..2 * REQUESTS {
            stream.read_exact(&mut [0; 8]).await.unwrap();
            stream.write_all(b"answer").await.unwrap();
        }
        let (whole, in_two) = client.await.unwrap();
        assert!(in_two < whole + MORE_MAX, "{in_two:?}, and {whole:?} in one piece");
    }
}
