//! [`BulkReader`]: reads a socket in large pieces while much arrives.
//!
//! The HTTP/2 library reads at most one frame at a time, so an upload of a megabyte takes more than a hundred system
//! calls, and most of them also send an acknowledgement. A read that fills the library's buffer shows that more bytes
//! are probably waiting. From then on, up to [`BUFFER_BYTES`] are read at once and handed over piece by piece. The copy
//! costs less than the system calls. The buffer is not cleared before a read, because that would cost more than the
//! copy.
//!
//! Bounds: the buffer has a share of the budget of what clients send ahead ([`crate::connections::ahead`]); without
//! one, the socket is read directly. It is freed as soon as the socket is empty, so an idle connection has none.

use crate::{budget::Share, connections::ahead::Ahead, tls::Socket};
use std::{
    io,
    pin::{Pin, pin},
    task::{Context, Poll, ready},
};
use tokio::io::{AsyncRead as _, AsyncReadExt as _, ReadBuf};

/// Size of the buffer: four frames of the usual size.
const BUFFER_BYTES: usize = 64 * 1024;
/// A smaller full buffer is no evidence that more bytes are waiting: the library begins with a buffer of 8 KiB.
const FULL_READ_BYTES: usize = 4 * 1024;

/// A socket that is read in large pieces while much arrives.
#[derive(Debug, Default)]
pub(super) struct BulkReader {
    buffer: Option<Buffer>,
    /// Whether the last read filled its buffer.
    expects_more: bool,
}

#[derive(Debug)]
struct Buffer {
    bytes: Vec<u8>,
    /// The offset of the first byte that is not handed over yet.
    from: usize,
    _room: Share,
}

impl BulkReader {
    /// Reads into `into`, from the buffer or else from the socket.
    pub(super) fn poll_read(
        &mut self,
        socket: &mut Socket,
        ahead: &Ahead,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.buffer.as_ref().is_none_or(Buffer::is_empty) {
            if !self.expects_more || into.remaining() >= BUFFER_BYTES || socket.holds_writes() {
                return self.read_directly(socket, context, into);
            }
            if self.buffer.is_none() {
                let Some(room) = ahead.take_buffer(BUFFER_BYTES as u64) else {
                    return self.read_directly(socket, context, into);
                };
                self.buffer = Some(Buffer { bytes: Vec::with_capacity(BUFFER_BYTES), from: 0, _room: room });
            }
        }
        let Some(buffer) = &mut self.buffer else { return Poll::Pending };
        if buffer.is_empty() {
            buffer.from = 0;
            buffer.bytes.clear();
            let read = pin!(socket.read_buf(&mut buffer.bytes)).poll(context);
            self.expects_more = buffer.bytes.len() > into.remaining();
            if buffer.is_empty() {
                self.buffer = None;
                return read.map_ok(drop);
            }
            ready!(read)?;
        }
        buffer.hand_over(into);
        Poll::Ready(Ok(()))
    }

    fn read_directly(
        &mut self,
        socket: &mut Socket,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.buffer = None;
        let before = into.filled().len();
        let read = Pin::new(socket).poll_read(context, into);
        let new = into.filled().len() - before;
        self.expects_more = new >= FULL_READ_BYTES && into.remaining() == 0;
        read
    }
}

impl Buffer {
    fn is_empty(&self) -> bool {
        self.from == self.bytes.len()
    }

    fn hand_over(&mut self, into: &mut ReadBuf<'_>) {
        let unread = self.bytes.get(self.from..).unwrap_or_default();
        let piece = unread.get(..into.remaining()).unwrap_or(unread);
        into.put_slice(piece);
        self.from += piece.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        connections::{Connections, ahead::AHEAD},
        quick_ack::QuickAck,
    };
    use std::future::poll_fn;
    use tokio::{
        io::AsyncWriteExt as _,
        net::{TcpListener, TcpStream},
    };

    /// Reads up to this many bytes.
    async fn read(bulk: &mut BulkReader, socket: &mut Socket, ahead: &Ahead, most: usize) -> Vec<u8> {
        let mut bytes = vec![0; most];
        let mut into = ReadBuf::new(&mut bytes);
        poll_fn(|context| bulk.poll_read(socket, ahead, context, &mut into)).await.unwrap();
        let filled = into.filled().len();
        bytes.truncate(filled);
        bytes
    }

    #[tokio::test]
    async fn much_is_read_at_once_and_in_order_and_the_buffer_is_freed_when_the_socket_is_empty() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, address) = listener.accept().await.unwrap();
        let mut socket = Socket::Plain(QuickAck::new(stream));
        let connections = Connections::default();
        let admitted = connections.admit(address).unwrap();
        let ahead = &admitted.state().ahead;
        let mut bulk = BulkReader::default();

        client.write_all(b"small").await.unwrap();
        assert_eq!(read(&mut bulk, &mut socket, ahead, 8_192).await, b"small");
        assert!(bulk.buffer.is_none() && !bulk.expects_more);

        let sent: Vec<u8> = (0..300_000u32).map(|at| (at % 251) as u8).collect();
        let all = sent.clone();
        let writing = tokio::spawn(async move {
            client.write_all(&all).await.unwrap();
            client
        });
        let (mut received, mut was_buffered) = (Vec::new(), false);
        while received.len() < sent.len() {
            received.extend(read(&mut bulk, &mut socket, ahead, 8_192).await);
            was_buffered |= bulk.buffer.is_some();
        }
        assert!(received == sent && was_buffered);
        let mut client = writing.await.unwrap();
        let mut bytes = [0; 8_192];
        let mut into = ReadBuf::new(&mut bytes);
        let next = poll_fn(|context| {
            let polled = bulk.poll_read(&mut socket, ahead, context, &mut into);
            Poll::Ready(polled.is_pending())
        });
        assert!(next.await && bulk.buffer.is_none());

        // Without room, nothing is read ahead.
        let _others = ahead.take_buffer(AHEAD.connection).unwrap();
        client.write_all(&sent).await.unwrap();
        let mut received = Vec::new();
        while received.len() < sent.len() {
            received.extend(read(&mut bulk, &mut socket, ahead, 8_192).await);
            assert!(bulk.buffer.is_none());
        }
        assert!(received == sent);
    }
}
