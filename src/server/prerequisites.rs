//! [`Prerequisites`]: the ports, and the files that decide who may use them. They are opened before the store, so that
//! a start that fails for their sake leaves nothing behind. One case is left: if two servers take the same address
//! before either listens, the later one fails when its store exists.

use super::tls;
use crate::{access::AccessLoader, config::Settings, supervisor::InheritedSockets, tls::ServerTls};
use gorego_reapi::error::{Error, Result};
use std::{io, io::ErrorKind, net::SocketAddr, sync::Arc};
use tokio::{
    net::{TcpListener, TcpSocket},
    runtime::Handle,
};

/// Maximum number of connections that wait to be accepted.
const BACKLOG: u32 = 1024;

/// The ports, and the files that decide who may use them.
pub(super) struct Prerequisites {
    tls: Option<ServerTls>,
    access: Arc<AccessLoader>,
    grpc: ReservedPort,
    /// The HTTP port, if it is enabled.
    http: Option<ReservedPort>,
}

/// The sockets of the ports.
pub(super) struct Listeners {
    pub(super) grpc: TcpListener,
    /// The socket of the HTTP port, if the port is enabled.
    pub(super) http: Option<TcpListener>,
}

impl Prerequisites {
    /// Reads the files and takes the addresses. Blocks.
    ///
    /// # Errors
    /// If a file cannot be used, or an address is taken.
    pub(super) fn open(settings: &Settings, sockets: InheritedSockets, workers: &Handle) -> Result<Self> {
        let InheritedSockets { grpc, http } = sockets;
        Ok(Self {
            grpc: ReservedPort::take(grpc, settings.listen_addr, "listen_addr")?,
            http: settings
                .http_addr
                .map(|address| ReservedPort::take(http, address, "http.listen_addr"))
                .transpose()?,
            tls: tls::open(settings)?,
            access: Arc::new(AccessLoader::open(settings.access.clone(), workers)?),
        })
    }

    /// Starts to listen on the ports. Needs the runtime.
    ///
    /// # Errors
    /// If another process that had taken the address too has started to listen.
    pub(super) fn listen(self) -> Result<(Listeners, Option<ServerTls>, Arc<AccessLoader>)> {
        let listeners =
            Listeners { grpc: self.grpc.listen()?, http: self.http.map(ReservedPort::listen).transpose()? };
        Ok((listeners, self.tls, self.access))
    }
}

/// A bound port. Connections to it are refused until [`ReservedPort::listen`]. Until then, another process with
/// `SO_REUSEADDR` can bind it too, and the first process that listens gets it.
struct ReservedPort {
    socket: PortSocket,
    address: SocketAddr,
    /// The key of its address.
    key: &'static str,
}

enum PortSocket {
    /// The supervisor has passed it and listens on it already.
    Inherited(std::net::TcpListener),
    Bound(TcpSocket),
}

impl ReservedPort {
    /// Takes the socket that the supervisor passed, or else the address of this configuration key.
    fn take(
        inherited: Option<std::net::TcpListener>,
        address: SocketAddr,
        key: &'static str,
    ) -> Result<Self> {
        let socket = match inherited {
            Some(listener) => PortSocket::Inherited(listener),
            None => PortSocket::Bound(bind(address).map_err(|error| explain(&error, address, key))?),
        };
        Ok(Self { socket, address, key })
    }

    fn listen(self) -> Result<TcpListener> {
        let Self { socket, address, key } = self;
        match socket {
            PortSocket::Inherited(listener) => TcpListener::from_std(listener).map_err(|error| {
                Error::io(&format!("serve on the socket that the supervisor passed for {key}"), &error)
            }),
            PortSocket::Bound(socket) => {
                socket.listen(BACKLOG).map_err(|error| explain(&error, address, key))
            }
        }
    }
}

fn bind(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // Connections of an earlier server that the kernel still remembers do not prevent a start.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket)
}

fn explain(error: &io::Error, address: SocketAddr, key: &str) -> Error {
    match error.kind() {
        ErrorKind::AddrInUse => Error::Precondition(format!(
            "could not listen on {address}: another process listens there, perhaps another goREgo; stop it, or set {key} to \
             another address"
        )),
        ErrorKind::AddrNotAvailable => Error::Precondition(format!(
            "could not listen on {address}: this machine does not have that address; set {key} to one that it has"
        )),
        _ => Error::io(&format!("listen on {address} ({key})"), error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(address: SocketAddr, key: &'static str) -> Result<ReservedPort> {
        ReservedPort::take(None, address, key)
    }

    #[tokio::test]
    async fn an_address_that_is_taken_is_named_with_its_key() {
        let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let (first, second) = (take(free, "listen_addr").unwrap(), take(free, "http.listen_addr").unwrap());
        let _listener = first.listen().unwrap();
        // Another process was faster, or is there already.
        for error in [second.listen().err(), take(free, "http.listen_addr").err()] {
            let error = error.unwrap().to_string();
            for part in [free.to_string().as_str(), "another goREgo", "http.listen_addr"] {
                assert!(error.contains(part), "{part} is not in {error}");
            }
        }
        let error = take("192.0.2.1:1".parse().unwrap(), "listen_addr").err().unwrap().to_string();
        assert!(error.contains("does not have that address"), "{error}");
    }

    #[tokio::test]
    async fn connections_are_refused_until_the_port_listens() {
        let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let port = take(free, "listen_addr").unwrap();
        let refused = tokio::net::TcpStream::connect(free).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        let _listener = port.listen().unwrap();
        tokio::net::TcpStream::connect(free).await.unwrap();
    }
}
