//! [`Caller`]: the origin of a request, for limits.
//!
//! Limits are shared out by [`Peer`] and, within a peer, by [`ConnectionId`], because a client cannot forge them: it
//! chooses its metadata and its number of connections, but not its network address. This is not authentication. For
//! clients that have authenticated, what belongs to the client rather than to its connection, such as its operations,
//! is shared out by principal. Such a principal is a peer too.

use std::{
    fmt,
    hash::{BuildHasher as _, Hash, Hasher, RandomState},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{
        LazyLock,
        atomic::{AtomicU64, Ordering},
    },
};

/// The owner of a share of a limit. For connections and requests it is the machine or network at the other end: an
/// address without the port.
///
/// IPv6 addresses are reduced to their first 64 bits, because one customer usually controls all addresses below such a
/// prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Peer {
    /// There is no address, for example because the request does not come from a socket.
    #[default]
    Unknown,
    /// An IPv4 address, including IPv4-mapped IPv6 addresses.
    V4(Ipv4Addr),
    /// The first 64 bits of an IPv6 address.
    V6([u16; 4]),
    /// A client that has authenticated, whatever its address is.
    Principal(PrincipalId),
}

/// A number that stands for the name of a principal. Two names practically never have the same number within a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PrincipalId(u64);

impl PrincipalId {
    /// The number of the principal with this name. It is a hash with a secret key, so that no client can choose a name
    /// that has the number of another principal.
    pub fn of(name: &str) -> Self {
        static KEY: LazyLock<RandomState> = LazyLock::new(RandomState::new);
        Self(KEY.hash_one(name))
    }
}

impl Peer {
    /// How a refusal refers to the peer that gets it.
    pub(crate) fn own_name(self) -> &'static str {
        match self {
            Self::Principal(_) => "your principal",
            Self::Unknown | Self::V4(_) | Self::V6(_) => "your address",
        }
    }
}

/// One number for each peer. Every request looks its peer up several times, and the derived implementation hashes an
/// address in several pieces, which takes three times as long.
impl Hash for Peer {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(match self {
            Self::Unknown => 0,
            Self::V4(address) => 1 << 32 | u64::from(address.to_bits()),
            Self::V6([a, b, c, d]) => [a, b, c, d].iter().fold(0, |all, part| all << 16 | u64::from(**part)),
            Self::Principal(PrincipalId(number)) => *number,
        });
    }
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
            Self::Principal(_) => formatter.write_str("principal"),
            Self::V4(address) => address.fmt(formatter),
            Self::V6([a, b, c, d]) => {
                let network = std::net::Ipv6Addr::new(*a, *b, *c, *d, 0, 0, 0, 0);
                write!(formatter, "{network}/64")
            }
        }
    }
}

/// One run of a build tool, as a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Build(pub u64);

impl Build {
    /// All requests of a peer that do not say which build they belong to.
    pub const UNNAMED: Self = Self(0);
    /// All builds of a peer beyond a bound.
    pub const OTHERS: Self = Self(1);

    /// All builds whose leases are from before the start of the server.
    pub const BEFORE_START: Self = Self(u64::MAX);

    /// The build with this name (`tool_invocation_id`). Builds whose hashes collide, which is very unlikely, count as
    /// one build.
    pub fn of(name: &str) -> Self {
        static KEY: LazyLock<RandomState> = LazyLock::new(RandomState::new);
        if name.is_empty() { Self::UNNAMED } else { Self(KEY.hash_one(name).max(2)) }
    }

    /// Whether a client has named this build.
    pub fn is_named(self) -> bool {
        self != Self::UNNAMED
    }
}

/// A peer and one of its builds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Owner {
    /// The peer from which the request came.
    pub peer: Peer,
    /// The build according to the client. Builds of different peers are different builds.
    pub build: Build,
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
