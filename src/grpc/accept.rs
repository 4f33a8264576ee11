//! Accepting connections.
//!
//! Options are set on each accepted socket, because tonic's own settings do not reach sockets that it did not accept itself.
//! When the process is out of descriptors, accepting pauses instead of spinning.

use crate::acknowledge::Prompt;
use futures::stream::{Stream, StreamExt as _};
use std::{io, time::Duration};
use tokio::net::TcpListener;
use tonic::transport::server::{Connected, TcpConnectInfo, TcpIncoming};

/// How long a connection may be silent before the kernel asks whether the other end is still there.
const TCP_KEEPALIVE: Duration = Duration::from_secs(60);
/// Pause after a failed accept, long enough for connections to close and short enough that nobody notices.
const ACCEPT_PAUSE: Duration = Duration::from_millis(250);

/// The connections of a listener. Nagle's algorithm is off: with it every small answer waits for the client's delayed
/// acknowledgement, some 40 ms. Clients that leave it on are not made to wait either.
pub(crate) fn connections(listener: TcpListener) -> impl Stream<Item = io::Result<Prompt>> {
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
            accepted.map(Prompt::new)
        },
    )
}

impl Connected for Prompt {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.get_ref().connect_info()
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
    use tokio::net::TcpStream;

    #[tokio::test]
    async fn nagles_algorithm_is_off_on_every_accepted_connection() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut connections = pin!(connections(listener));
        for _ in 0..2 {
            let _client = TcpStream::connect(address).await.unwrap();
            assert!(connections.next().await.unwrap().unwrap().get_ref().nodelay().unwrap());
        }
    }
}
