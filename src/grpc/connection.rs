//! [`Connection`]: an accepted connection with the limits that apply to it.
//!
//! Its bytes pass its [`FloodGuard`] on their way to the HTTP/2 library and back. A connection that must close fails
//! its next read or write, which ends all its calls; the client is sent ENHANCE_YOUR_CALM first, if possible. A
//! connection whose client is too far ahead of its handlers is not read ([`crate::connections::ahead`]). While much
//! arrives, the socket is read in large pieces ([`super::bulk`]).
//!
//! The HTTP/2 library writes each message of more than a few hundred bytes by itself. While a [`Turn`] is corked, small
//! writes are collected, at most [`HELD_MAX_BYTES`] of them. They are written when the next one does not fit, or at the
//! first read or flush after the cork was removed. Nothing is read in a turn that is used up, or while the socket is
//! full and more than [`UNSENT_STREAMS_MAX`] answers or resets wait to be written.

use super::{
    bulk::BulkReader,
    flood_guard::{FloodGuard, Sent},
    turn::Turn,
};
use crate::{
    call::ConnectionInfo,
    connections::{Admitted, Reason, ahead::Wait},
    tls::Socket,
};
use std::{
    io,
    pin::Pin,
    task::{Context, Poll, Waker, ready},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::server::Connected;

/// Limit on streams without a running request while the socket takes no more bytes. Their answers, and the resets that
/// answer stray frames ([`super::flood_guard`]), wait for a client that does not read, and take memory that no other
/// bound counts (70 KB for this many). A client that reads its socket but grants no window is still read, because its
/// window updates arrive on the same connection and its answers are charged until they are written.
const UNSENT_STREAMS_MAX: usize = 64;

/// Largest number of bytes that a cork holds back: one or two packets over loopback, or dozens of small answers.
const HELD_MAX_BYTES: usize = 16 * 1024;

/// An accepted connection with its limits.
pub(crate) struct Connection {
    stream: Socket,
    admitted: Admitted,
    flood_guard: FloodGuard,
    /// Set while the client is too far ahead of its handlers.
    wait: Option<Wait>,
    turn: Turn,
    /// The reader, while answers must be written before more is read.
    unsent: Option<Waker>,
    /// Whether the socket did not take the last write.
    is_blocked: bool,
    /// Writes that were collected for one system call.
    held: Vec<u8>,
    bulk: BulkReader,
}

impl Connection {
    pub(super) fn new(stream: Socket, admitted: Admitted) -> Self {
        let flood_guard = FloodGuard::new(admitted.state().now_ms());
        Self {
            stream,
            admitted,
            flood_guard,
            wait: None,
            turn: Turn::default(),
            is_blocked: false,
            unsent: None,
            held: Vec::new(),
            bulk: BulkReader::default(),
        }
    }

    pub(super) fn turn(&self) -> Turn {
        self.turn.clone()
    }

    /// Records whether the socket takes no more bytes. Once it does, the client is read again.
    fn note_blocked(&mut self, is_blocked: bool) {
        self.is_blocked = is_blocked;
        self.admitted.state().note_blocked(is_blocked);
        if !is_blocked {
            self.flood_guard.forget_strays();
            if let Some(reader) = self.unsent.take() {
                reader.wake();
            }
        }
    }

    /// Whether too many answers or resets wait for the client to read.
    fn has_unsent(&self) -> bool {
        let streams = self.flood_guard.open_streams() + self.flood_guard.strays();
        self.is_blocked && streams > UNSENT_STREAMS_MAX + self.turn.requests()
    }

    /// Writes the collected bytes.
    fn poll_release(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.held.is_empty() {
            let written = Pin::new(&mut self.stream).poll_write(context, &self.held);
            self.note_blocked(written.is_pending());
            let written = ready!(written)?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.held.drain(..written);
        }
        // An idle connection keeps no buffer.
        self.held = Vec::new();
        Poll::Ready(Ok(()))
    }

    /// Fails when the connection has to close.
    fn check(&mut self, context: &Context<'_>) -> io::Result<()> {
        match self.admitted.state().poll_closing(context) {
            Poll::Ready(reason) => Err(self.end(reason)),
            Poll::Pending => Ok(()),
        }
    }

    /// Ready when the client is not too far ahead of its handlers.
    fn poll_room(&mut self, context: &mut Context<'_>) -> Poll<()> {
        self.admitted.state().ahead.poll_room(&mut self.wait, context)
    }

    /// Sends GOAWAY if that is possible without waiting, and returns the error that ends the connection.
    fn end(&mut self, reason: Reason) -> io::Error {
        if let Some(frame) = self.flood_guard.goaway() {
            // The collected bytes are whole frames.
            self.held.extend_from_slice(&frame);
            self.stream.write_last(&self.held);
        }
        self.held = Vec::new();
        io::Error::new(io::ErrorKind::ConnectionAborted, reason.name())
    }

    /// Counts bytes that were read. Fails when the client has exceeded a limit.
    fn note_received(&mut self, bytes: &[u8]) -> io::Result<()> {
        let state = self.admitted.state();
        let received = self.flood_guard.receive(bytes, state.now_ms());
        self.turn.note_read(received.frames);
        state.ahead.received(received.ahead);
        if received.has_closed {
            state.ahead.at_most(self.flood_guard.ahead_at_most());
        }
        if let Some(is_open) = received.head_is_open {
            state.note_head(is_open);
        }
        let (connections, peer) = (self.admitted.connections(), state.caller.peer);
        let reason = if received.is_noise {
            Reason::Noise
        } else if received.resets_too_much
            || received.resets > 0 && !connections.take_resets(peer, received.resets, received.finished)
        {
            Reason::Resets
        } else {
            return Ok(());
        };
        connections.close(state, reason);
        Err(self.end(reason))
    }
}

impl Connected for Connection {
    type ConnectInfo = ConnectionInfo;

    fn connect_info(&self) -> ConnectionInfo {
        ConnectionInfo::of(&self.admitted)
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(context)?;
        if self.turn.is_used_up() {
            // The task of the connection begins another turn.
            self.admitted.state().ahead.end_turn();
            return Poll::Pending;
        }
        let is_corked = self.turn.is_corked();
        if !is_corked
            && !self.held.is_empty()
            && let Poll::Ready(Err(error)) = self.poll_release(context)
        {
            return Poll::Ready(Err(error));
        }
        if self.has_unsent() {
            self.unsent = Some(context.waker().clone());
            self.admitted.state().ahead.end_turn();
            return Poll::Pending;
        }
        if self.poll_room(context).is_pending() {
            return Poll::Pending;
        }
        self.stream.set_answers_soon(is_corked);
        let before = buffer.filled().len();
        let Self { stream, admitted, bulk, .. } = &mut *self;
        match bulk.poll_read(stream, &admitted.state().ahead, context, buffer) {
            Poll::Ready(Ok(())) => {
                self.note_received(buffer.filled().get(before..).unwrap_or_default())?;
                Poll::Ready(Ok(()))
            }
            Poll::Pending => {
                self.admitted.state().ahead.end_turn();
                Poll::Pending
            }
            failed => failed,
        }
    }
}

impl Connection {
    /// Writes the buffers, or collects them if they are small.
    fn poll_send(
        &mut self,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check(context)?;
        let bytes: usize = buffers.iter().map(|buffer| buffer.len()).sum();
        if self.turn.is_corked() && self.held.len() + bytes <= HELD_MAX_BYTES {
            buffers.iter().for_each(|buffer| self.held.extend_from_slice(buffer));
            self.note_sent(bytes, buffers);
            return Poll::Ready(Ok(bytes));
        }
        ready!(self.poll_release(context))?;
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, buffers);
        self.note_blocked(written.is_pending());
        let written = ready!(written)?;
        self.note_sent(written, buffers);
        Poll::Ready(Ok(written))
    }

    /// Counts the first `bytes` bytes of these buffers as sent.
    fn note_sent(&mut self, bytes: usize, buffers: &[io::IoSlice<'_>]) {
        let mut left = bytes;
        let mut sent = Sent::default();
        for buffer in buffers {
            let part = buffer.get(..left).unwrap_or(buffer);
            self.flood_guard.send(part, &mut sent);
            left -= part.len();
            if left == 0 {
                break;
            }
        }
        if sent.has_closed {
            self.admitted.state().ahead.at_most(self.flood_guard.ahead_at_most());
        }
        if sent.has_data {
            // Streams share the link. On a slow link, an answer may take minutes.
            self.admitted.state().note_progress();
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_send(context, &[io::IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_send(context, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.turn.is_corked() {
            return Poll::Ready(Ok(()));
        }
        ready!(self.poll_release(context))?;
        let flushed = Pin::new(&mut self.stream).poll_flush(context);
        if self.stream.holds_writes() {
            // Bytes that TLS has accepted may still wait for the socket.
            self.note_blocked(flushed.is_pending());
        }
        flushed
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_release(context))?;
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{accept::connections, turn::FRAMES_PER_TURN},
        *,
    };
    use crate::connections::{
        Connections,
        answers::{ANSWERS, ROOM_WAIT},
    };
    use futures::stream::StreamExt as _;
    use std::pin::pin;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::{TcpListener, TcpStream},
        time::timeout,
    };

    /// A connection after its handshake, and its client.
    async fn connected() -> (Connection, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let mut arrivals = pin!(connections(listener, Connections::default(), None));
        let arrived = arrivals.next().await.unwrap().unwrap();
        (arrived.establish().await.unwrap(), client)
    }

    #[tokio::test]
    async fn small_writes_are_collected_until_the_cork_is_out_and_large_ones_are_not() {
        let (mut connection, mut client) = connected().await;
        let turn = connection.turn();
        let mut received = [0; 2 * HELD_MAX_BYTES];
        turn.begin(true, true);
        for _ in 0..2 {
            connection.write_all(b"small").await.unwrap();
            connection.flush().await.unwrap();
        }
        assert_eq!(client.try_read(&mut received).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        turn.begin(false, true);
        connection.flush().await.unwrap();
        client.read_exact(&mut received[..10]).await.unwrap();
        assert_eq!(&received[..10], b"smallsmall");
        turn.begin(true, true);
        connection.write_all(b"small").await.unwrap();
        connection.write_all(&[b'l'; HELD_MAX_BYTES]).await.unwrap();
        client.read_exact(&mut received[..5 + HELD_MAX_BYTES]).await.unwrap();
        assert!(received.starts_with(b"smalll"), "the order is kept");
    }

    /// A frame with the head of a request, or with an answer that has no message.
    fn head(stream: u8) -> [u8; 10] {
        [0, 0, 1, 1, 0x5, 0, 0, 0, stream, b'h']
    }

    #[tokio::test]
    async fn a_turn_reads_a_bounded_number_of_frames() {
        let (mut connection, mut client) = connected().await;
        let turn = connection.turn();
        let empty_data = [0, 0, 0, 0, 0, 0, 0, 0, 1];
        client.write_all(&[b'x'; 24]).await.unwrap();
        client.write_all(&empty_data.repeat(FRAMES_PER_TURN)).await.unwrap();
        let mut bytes = vec![0; 24 + empty_data.len() * FRAMES_PER_TURN];
        connection.read_exact(&mut bytes).await.unwrap();
        assert!(turn.is_used_up());
        client.write_all(&empty_data).await.unwrap();
        let mut next = pin!(connection.read_exact(&mut bytes[..9]));
        assert!(futures::poll!(next.as_mut()).is_pending());
        turn.begin(true, true);
        next.await.unwrap();
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_its_answers_is_not_read_until_it_does() {
        let (mut connection, mut client) = connected().await;
        let turn = connection.turn();
        client.write_all(&[b'x'; 24]).await.unwrap();
        let streams: Vec<u8> = (0..=UNSENT_STREAMS_MAX).map(|at| u8::try_from(2 * at + 1).unwrap()).collect();
        for stream in &streams {
            client.write_all(&head(*stream)).await.unwrap();
        }
        let mut bytes = vec![0; 24 + 10 * streams.len()];
        connection.read_exact(&mut bytes).await.unwrap();
        client.write_all(&head(201)).await.unwrap();
        assert_eq!(connection.read(&mut bytes).await.unwrap(), 10, "the socket takes more");
        // The client reads nothing of this large frame.
        let mut offered = vec![0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1];
        offered.resize(8 * 1024 * 1024, 0);
        let mut writing = Box::pin(connection.write_all(&offered));
        assert!(futures::poll!(writing.as_mut()).is_pending());
        drop(writing);
        client.write_all(&head(203)).await.unwrap();
        assert!(futures::poll!(pin!(connection.read(&mut bytes))).is_pending());
        let request = turn.request();
        let second = turn.request();
        assert_eq!(connection.read(&mut bytes).await.unwrap(), 10, "two requests are being handled");
        drop((request, second));
        client.write_all(&head(205)).await.unwrap();
        assert!(futures::poll!(pin!(connection.read(&mut bytes))).is_pending());
        let (mut answers, _requests) = client.into_split();
        tokio::spawn(async move { tokio::io::copy(&mut answers, &mut tokio::io::sink()).await });
        connection.write_all(&[0; 64 * 1024]).await.unwrap();
        assert_eq!(connection.read(&mut bytes).await.unwrap(), 10, "the client reads");
    }

    /// The HTTP/2 library keeps a reset for each of these frames until it is written.
    #[tokio::test]
    async fn a_client_that_does_not_read_is_not_read_either_if_it_sends_frames_of_streams_that_are_not_open()
    {
        let (mut connection, mut client) = connected().await;
        let mut bytes = vec![0; 10 * UNSENT_STREAMS_MAX];
        client.write_all(&[b'x'; 24]).await.unwrap();
        connection.read_exact(&mut bytes[..24]).await.unwrap();
        let offered = vec![0; 8 * 1024 * 1024];
        let mut writing = Box::pin(connection.write_all(&offered));
        assert!(futures::poll!(writing.as_mut()).is_pending());
        drop(writing);
        let stray = [0, 0, 1, 0, 0, 0, 0, 0, 1, b'd'];
        client.write_all(&stray.repeat(UNSENT_STREAMS_MAX + 2)).await.unwrap();
        connection.read_exact(&mut bytes).await.unwrap();
        assert!(futures::poll!(pin!(connection.read(&mut bytes[..10]))).is_ready());
        assert!(futures::poll!(pin!(connection.read(&mut bytes[..10]))).is_pending());
        let (mut answers, _requests) = client.into_split();
        tokio::spawn(async move { tokio::io::copy(&mut answers, &mut tokio::io::sink()).await });
        connection.write_all(&[0; 64 * 1024]).await.unwrap();
        assert_eq!(connection.read(&mut bytes).await.unwrap(), 10, "the client reads");
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_takes_frames_of_large_answers_is_waited_for_though_no_answer_is_done() {
        let (mut connection, _client) = connected().await;
        let state = connection.connect_info().state;
        let _unsent = state.reserve(ANSWERS.connection).await.unwrap();
        let mut next = pin!(state.reserve(1_000));
        let data = [0, 0, 3, 0, 0, 0, 0, 0, 1, b'a', b'b', b'c'];
        for _ in 0..6 {
            assert!(timeout(ROOM_WAIT / 2, next.as_mut()).await.is_err());
            connection.write_all(&data).await.unwrap();
        }
        // A PING is not a part of an answer.
        assert!(timeout(ROOM_WAIT / 2, next.as_mut()).await.is_err());
        connection.write_all(&[0, 0, 8, 6, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).await.unwrap();
        assert!(timeout(ROOM_WAIT, next).await.unwrap().is_err());
    }
}
