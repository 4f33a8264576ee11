//! Accepting connections.
//!
//! Options are set on each accepted socket, because tonic's own settings do not reach sockets that it did not accept itself.
//! When the process is out of descriptors, accepting pauses instead of spinning.

use crate::{acknowledge::Prompt, caller::Caller};
use futures::stream::{Stream, StreamExt as _};
use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
};
use tonic::transport::server::{Connected, TcpIncoming};

/// How long a connection may be silent before the kernel asks whether the other end is still there.
const TCP_KEEPALIVE: Duration = Duration::from_secs(60);
/// Pause after a failed accept, long enough for connections to close and short enough that nobody notices.
const ACCEPT_PAUSE: Duration = Duration::from_millis(250);

/// The connections of a listener. Nagle's algorithm is off: with it every small answer waits for the client's delayed
/// acknowledgement, some 40 ms. Clients that leave it on are not made to wait either.
pub fn connections(listener: TcpListener) -> impl Stream<Item = io::Result<Connection>> {
    TcpIncoming::from(listener).with_nodelay(Some(true)).with_keepalive(Some(TCP_KEEPALIVE)).then(
        |accepted| async {
            if let Err(error) = &accepted
                && !is_of_one_connection(error)
            {
                log::warn!(
                    target: "gorego::rpc", event = "accept_failed", error = error.to_string().as_str();
                    "could not accept a connection: {error}; raise the limit on open files if this goes on"
                );
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
            accepted.and_then(Connection::new)
        },
    )
}

/// An accepted connection, which knows who is at its other end.
#[derive(Debug)]
pub struct Connection {
    stream: Prompt,
    info: ConnectionInfo,
}

/// What each request of a connection has among its extensions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectionInfo {
    /// The address at the other end.
    pub address: SocketAddr,
    /// To whom what the request takes is charged.
    pub caller: Caller,
}

impl Connection {
    fn new(stream: TcpStream) -> io::Result<Self> {
        let address = stream.peer_addr()?;
        Ok(Self {
            stream: Prompt::new(stream),
            info: ConnectionInfo { address, caller: Caller::connected(address) },
        })
    }
}

impl Connected for Connection {
    type ConnectInfo = ConnectionInfo;

    fn connect_info(&self) -> ConnectionInfo {
        self.info
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// Whether the fault lies with one connection that never came to be, so that the next one may be fine.
fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::pin;

    #[tokio::test]
    async fn nagles_algorithm_is_off_on_every_accepted_connection() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut connections = pin!(connections(listener));
        for _ in 0..2 {
            let _client = TcpStream::connect(address).await.unwrap();
            assert!(connections.next().await.unwrap().unwrap().stream.get_ref().nodelay().unwrap());
        }
    }
}
