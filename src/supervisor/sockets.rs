//! [`InheritedSockets`]: listening sockets that the supervisor opened (socket activation). Clients can connect while
//! the server starts or restarts; they wait until it is ready.
//!
//! The name of a socket says which port it is for ([`PortName`]). A socket that the server cannot serve on is an error,
//! because the supervisor would otherwise keep a port open on which no process answers.

use gorego_reapi::error::{Error, Result};
use rustix::net::{AddressFamily, SocketType, sockopt};
use std::{
    net::{SocketAddr, TcpListener},
    os::fd::{FromRawFd as _, OwnedFd, RawFd},
};

/// The name of a socket to which the supervisor gave no name.
const NAMELESS: &str = "unknown";

/// A port of the server, by the name that its socket has (`FileDescriptorName=` in a socket unit).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PortName {
    Grpc,
    Http,
}

impl PortName {
    const ALL: [Self; 2] = [Self::Grpc, Self::Http];

    /// The name of the socket for this port.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Grpc => "grpc",
            Self::Http => "http",
        }
    }

    /// The configuration key that the socket replaces.
    pub(crate) fn key(self) -> &'static str {
        match self {
            Self::Grpc => "listen_addr",
            Self::Http => "http.listen_addr",
        }
    }
}

/// The sockets of a server, at most one for each port.
#[derive(Debug, Default)]
pub(crate) struct InheritedSockets {
    /// The listening socket of the gRPC port, if one was passed.
    pub grpc: Option<TcpListener>,
    /// The listening socket of the HTTP port, if one was passed.
    pub http: Option<TcpListener>,
}

impl InheritedSockets {
    /// Takes the sockets that `LISTEN_FDS` announces to this process. No child inherits them.
    pub(super) fn take() -> Result<Self> {
        let unusable = |error| {
            Error::Precondition(format!(
                "LISTEN_FDS and LISTEN_FDNAMES do not describe sockets that this process has: {error}"
            ))
        };
        let announced: Vec<_> = sd_notify::listen_fds_with_names().map_err(unusable)?.collect();
        // SAFETY: the supervisor opened these descriptors for this process, and nothing else in the process uses them.
        let owned = |fd: RawFd| unsafe { OwnedFd::from_raw_fd(fd) };
        Self::from_named(announced.into_iter().map(|(fd, name)| (name, owned(fd))).collect())
    }

    /// Assigns each socket to its port.
    fn from_named(named: Vec<(String, OwnedFd)>) -> Result<Self> {
        let is_alone = named.len() == 1;
        let mut sockets = Self::default();
        for (name, socket) in named {
            let port = PortName::ALL.into_iter().find(|port| port.name() == name);
            let port = port.or((is_alone && name == NAMELESS).then_some(PortName::Grpc)).ok_or_else(|| {
                Error::Precondition(format!(
                    "the supervisor passed a socket named \"{}\"; goREgo serves on \"grpc\" and \"http\" (FileDescriptorName= \
                     in the socket unit)",
                    name.escape_debug()
                ))
            })?;
            let listener = listening(socket).map_err(|problem| {
                Error::Precondition(format!(
                    "the socket \"{}\" that the supervisor passed {problem}",
                    port.name()
                ))
            })?;
            let place = match port {
                PortName::Grpc => &mut sockets.grpc,
                PortName::Http => &mut sockets.http,
            };
            if place.replace(listener).is_some() {
                return Err(Error::Precondition(format!(
                    "the supervisor passed several sockets named \"{}\"; goREgo serves each port on one (use one ListenStream= \
                     for each name)",
                    port.name()
                )));
            }
        }
        Ok(sockets)
    }

    pub(crate) fn addresses(&self) -> Vec<(PortName, SocketAddr)> {
        let sockets = [(PortName::Grpc, &self.grpc), (PortName::Http, &self.http)];
        let address = |listener: &TcpListener| listener.local_addr().ok();
        sockets
            .into_iter()
            .filter_map(|(port, socket)| Some((port, socket.as_ref().and_then(address)?)))
            .collect()
    }
}

/// Checks that a socket is a listening TCP socket.
fn listening(socket: OwnedFd) -> Result<TcpListener, &'static str> {
    let family = sockopt::socket_domain(&socket).map_err(|_| "is not a socket")?;
    if !matches!(family, AddressFamily::INET | AddressFamily::INET6) {
        return Err("is not a TCP socket; use ListenStream=HOST:PORT");
    }
    if sockopt::socket_type(&socket) != Ok(SocketType::STREAM) {
        return Err("is not a stream socket; use ListenStream= in the socket unit");
    }
    if sockopt::socket_acceptconn(&socket) != Ok(true) {
        return Err("does not listen; Accept=no is needed in the socket unit");
    }
    let listener = TcpListener::from(socket);
    listener.set_nonblocking(true).map_err(|_| "cannot be set to non-blocking mode")?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        net::{TcpStream, UdpSocket},
        os::unix::net::UnixListener,
    };

    fn tcp() -> OwnedFd {
        TcpListener::bind("127.0.0.1:0").unwrap().into()
    }

    fn taken(named: Vec<(&str, OwnedFd)>) -> Result<InheritedSockets> {
        InheritedSockets::from_named(named.into_iter().map(|(name, fd)| (name.to_owned(), fd)).collect())
    }

    #[test]
    fn each_socket_goes_to_the_port_of_its_name_and_one_without_a_name_to_grpc() {
        let both = taken(vec![("http", tcp()), ("grpc", tcp())]).unwrap();
        let ports: Vec<_> = both.addresses().into_iter().map(|(port, _)| port).collect();
        assert_eq!(ports, [PortName::Grpc, PortName::Http]);
        assert_ne!(both.addresses()[0].1, both.addresses()[1].1);
        let alone = taken(vec![(NAMELESS, tcp())]).unwrap();
        assert!(alone.grpc.is_some() && alone.http.is_none());
        assert!(taken(Vec::new()).unwrap().addresses().is_empty());
    }

    #[test]
    fn a_socket_that_cannot_be_served_on_is_refused_with_the_reason() {
        let directory = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let connected = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let unix = UnixListener::bind(directory.path().join("socket")).unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        for (named, part) in [
            (vec![("grpc", OwnedFd::from(file))], "is not a socket"),
            (vec![("grpc", OwnedFd::from(unix))], "is not a TCP socket"),
            (
                vec![("http", OwnedFd::from(udp))],
                "\"http\" that the supervisor passed is not a stream socket",
            ),
            (vec![("grpc", OwnedFd::from(connected))], "does not listen"),
            (vec![("gorego.socket", tcp())], "FileDescriptorName="),
            (vec![(NAMELESS, tcp()), (NAMELESS, tcp())], "\"unknown\""),
            (vec![("grpc", tcp()), ("grpc", tcp())], "several sockets named \"grpc\""),
        ] {
            let error = taken(named).unwrap_err().to_string();
            assert!(error.contains(part), "{part} is not in {error}");
        }
    }
}
