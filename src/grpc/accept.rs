//! Accepts connections.
//!
//! Options are set on each accepted socket, because tonic's own settings do not reach sockets that it did not accept
//! itself. When the process is out of descriptors, accepting pauses instead of spinning. A connection that
//! [`Connections`] has no place for is closed at once. Handshakes are done by the task of the connection
//! ([`Arrived::establish`]).

use super::connection::Connection;
use crate::{
    connections::{Admitted, Connections},
    logging::Event,
    quick_ack::QuickAck,
    tls::{Socket, TlsPort},
};
use futures::stream::{Stream, StreamExt as _};
use std::{io, time::Duration};
use tokio::net::{TcpListener, TcpStream};
use tonic::transport::server::TcpIncoming;

/// Idle time after which the kernel checks that the other end still exists.
const TCP_KEEPALIVE: Duration = Duration::from_secs(60);
/// Pause after a failed accept: long enough for connections to close, too short for clients to notice.
const ACCEPT_PAUSE: Duration = Duration::from_millis(250);

/// Accepts the connections of a listener. Nagle's algorithm is off, because with it every small answer would wait about
/// 40 ms for the client's delayed acknowledgement. The server's acknowledgements are not delayed either, for clients
/// that leave it on.
pub(super) fn connections(
    listener: TcpListener,
    connections: Connections,
    tls: Option<TlsPort>,
) -> impl Stream<Item = io::Result<Arrived>> {
    let sockets = TcpIncoming::from(listener).with_nodelay(Some(true)).with_keepalive(Some(TCP_KEEPALIVE));
    sockets.filter_map(move |accepted| {
        let (connections, tls) = (connections.clone(), tls.clone());
        async move {
            if let Err(error) = &accepted
                && !is_of_one_connection(error)
            {
                Event::warn("gorego::rpc", "accept_failed").with_shown("error", &error).log(format_args!(
                    "could not accept a connection: {error}; raise the limit on open files if this continues"
                ));
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
            connections.until_few_are_closing().await;
            accepted.and_then(|stream| Arrived::new(stream, &connections, tls)).transpose()
        }
    })
}

/// An accepted connection before its handshake.
pub(super) struct Arrived {
    stream: TcpStream,
    admitted: Admitted,
    tls: Option<TlsPort>,
}

impl Arrived {
    fn new(stream: TcpStream, connections: &Connections, tls: Option<TlsPort>) -> io::Result<Option<Self>> {
        let admitted = connections.admit(stream.peer_addr()?);
        Ok(admitted.map(|admitted| Self { stream, admitted, tls }))
    }

    /// Does the handshake if the port has TLS. `None` when it failed.
    pub(super) async fn establish(self) -> Option<Connection> {
        let stream = QuickAck::new(self.stream);
        let stream = match self.tls {
            Some(tls) => tls.shake_hands(stream, &self.admitted).await?,
            None => Socket::Plain(stream),
        };
        Some(Connection::new(stream, self.admitted))
    }
}

/// Whether an error of accept concerns only the connection that failed.
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
        let mut arrivals = pin!(connections(listener, Connections::default(), None));
        for _ in 0..2 {
            let _client = TcpStream::connect(address).await.unwrap();
            assert!(arrivals.next().await.unwrap().unwrap().stream.nodelay().unwrap());
        }
    }
}
