//! [`Caller`]: the origin of a request, as far as the network tells.
//!
//! Limits are shared out by [`Peer`] and, within a peer, by [`ConnectionId`], because a client cannot forge them: it
//! chooses its metadata and its number of connections, but not its network address. This is not authentication.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::atomic::{AtomicU64, Ordering},
};

/// The machine or network at the other end: an address without the port.
///
/// IPv6 addresses are reduced to their first 64 bits, because one customer usually controls all addresses below such a
/// prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Peer {
    /// There is no address, for example because the request does not come from a socket.
    #[default]
    Unknown,
    /// An IPv4 address, including IPv4-mapped IPv6 addresses.
    V4(Ipv4Addr),
    /// The first 64 bits of an IPv6 address.
    V6([u16; 4]),
}

impl From<IpAddr> for Peer {
    fn from(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(address) => Self::V4(address),
            IpAddr::V6(address) => {
                let [a, b, c, d, ..] = address.segments();
                Self::V6([a, b, c, d])
            }
        }
    }
}

impl From<SocketAddr> for Peer {
    fn from(address: SocketAddr) -> Self {
        address.ip().into()
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown => formatter.write_str("unknown"),
            Self::V4(address) => address.fmt(formatter),
            Self::V6([a, b, c, d]) => {
                let network = std::net::Ipv6Addr::new(*a, *b, *c, *d, 0, 0, 0, 0);
                write!(formatter, "{network}/64")
            }
        }
    }
}

/// The id of a connection, unique within this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ConnectionId(u64);

impl ConnectionId {
    /// Creates the id of a newly accepted connection.
    pub fn next() -> Self {
        // 0 is the default and means no connection.
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// The origin of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Caller {
    /// The machine at the other end.
    pub peer: Peer,
    /// The connection, or the default if there is none.
    pub connection: ConnectionId,
}

impl Caller {
    /// The caller for work on behalf of a peer that is not tied to a connection, such as a queued action.
    pub fn without_connection(peer: Peer) -> Self {
        Self { peer, connection: ConnectionId::default() }
    }

    /// The caller of a new connection from this address.
    pub fn connected(address: SocketAddr) -> Self {
        Self { peer: address.into(), connection: ConnectionId::next() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(address: &str) -> Peer {
        Peer::from(address.parse::<IpAddr>().unwrap())
    }

    #[test]
    fn a_peer_is_an_address_without_its_port_and_an_ipv6_network_of_64_bits() {
        let [one, other] = ["127.0.0.1:1", "127.0.0.1:2"].map(|text| text.parse::<SocketAddr>().unwrap());
        assert_eq!(Peer::from(one), Peer::from(other));
        assert_ne!(peer("127.0.0.1"), peer("127.0.0.2"));
        assert_eq!(peer("2001:db8:1:2::1"), peer("2001:db8:1:2:ffff::9"));
        assert_ne!(peer("2001:db8:1:2::1"), peer("2001:db8:1:3::1"));
        assert_eq!(peer("::ffff:192.0.2.7"), peer("192.0.2.7"));
        assert_eq!(peer("2001:db8:1:2::1").to_string(), "2001:db8:1:2::/64");
        assert_eq!(peer("192.0.2.7").to_string(), "192.0.2.7");
    }
}
