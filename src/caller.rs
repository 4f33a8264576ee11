//! [`Caller`]: who a request comes from, as far as the network tells.
//!
//! Bounds are shared out by [`Peer`] first and by [`ConnectionId`] within a peer, because both are facts: a client can choose
//! its metadata, and as many connections as it likes, but not the network that it calls from. Nothing here is a credential.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::atomic::{AtomicU64, Ordering},
};

/// The machine or network at the other end: an address without its port.
///
/// Of an IPv6 address only the first 64 bits count, since one customer usually has all addresses below them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Peer {
    /// No address is known, as for a request that does not come from a socket.
    #[default]
    Unknown,
    /// An IPv4 address, also one that was mapped into IPv6.
    V4(Ipv4Addr),
    /// The network part of an IPv6 address.
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

/// One connection of this process; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ConnectionId(u64);

impl ConnectionId {
    /// The identity of a connection that has just been accepted.
    pub fn next() -> Self {
        // 0 is the default: no connection.
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// Who a request comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Caller {
    /// The other end.
    pub peer: Peer,
    /// The connection; the default where there is none.
    pub connection: ConnectionId,
}

impl Caller {
    /// The server's work for this peer that no connection waits for, such as an action in the queue.
    pub fn without_connection(peer: Peer) -> Self {
        Self { peer, connection: ConnectionId::default() }
    }

    /// A new connection from this address.
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
