//! [`Reach`]: from where an IP address can be reached. Pure.
//!
//! A server that contacts addresses chosen by clients must not give them access to what only the server can reach:
//! services on its loopback interface, the metadata service of a cloud, the hosts of an internal network. Every address
//! that is not known to be public counts as internal.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// From where an address can be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reach {
    /// Reached from everywhere: it belongs to the public internet.
    Public,
    /// Reached from within a site or provider: private networks, unique local addresses, carrier-grade NAT.
    Site,
    /// Reached from the same link: metadata services of clouds among others.
    Link,
    /// Reached from this machine only.
    Loopback,
    /// Reached from nowhere, or unknown: unspecified, multicast, reserved and documentation addresses.
    Unknown,
}

impl Reach {
    /// The reach of an address. An IPv4 address that is embedded in an IPv6 address counts as the IPv4 address.
    pub(crate) fn of(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(address) => Self::of_v4(address),
            IpAddr::V6(address) => Self::of_v6(address),
        }
    }

    fn of_v4(address: Ipv4Addr) -> Self {
        let [a, b, c, _] = address.octets();
        if address.is_loopback() {
            Self::Loopback
        } else if address.is_link_local() {
            Self::Link
        } else if address.is_private() || (a == 100 && b & 0xc0 == 64) {
            Self::Site
        } else if address.is_documentation()
            || a == 0
            || a >= 224 // multicast, reserved, broadcast
            || (a == 198 && b & 0xfe == 18) // benchmarks
            || (a == 192 && b == 0 && c == 0)
        // protocol assignments
        {
            Self::Unknown
        } else {
            Self::Public
        }
    }

    fn of_v6(address: Ipv6Addr) -> Self {
        let [a, b, c, d, e, f, g, h] = address.segments();
        let embedded =
            |high: u16, low: u16| Self::of_v4(Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low)));
        match (a, b) {
            _ if address.is_loopback() => Self::Loopback,
            (0xfe80..=0xfebf, _) => Self::Link,
            (0xfc00..=0xfdff, _) => Self::Site,
            // NAT64 and 6to4 addresses lead to the IPv4 address that they contain.
            (0x64, 0xff9b) if [c, d, e, f] == [0; 4] => embedded(g, h),
            (0x2002, _) => embedded(b, c),
            // Protocol assignments (Teredo among them) and documentation.
            (0x2001, 0..=0x1ff | 0xdb8) | (0x3fff, 0..=0xfff) => Self::Unknown,
            // All other global unicast addresses.
            (0x2000..=0x3fff, _) => Self::Public,
            _ => Self::Unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_notation_of_an_address_has_the_reach_of_what_it_leads_to() {
        for (reach, addresses) in [
            (Reach::Public, &["1.1.1.1", "2606:4700::1111", "64:ff9b::1.1.1.1", "::ffff:1.1.1.1"][..]),
            (
                Reach::Site,
                &["10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "fd00::1", "64:ff9b::10.0.0.1"],
            ),
            (Reach::Link, &["169.254.169.254", "fe80::1", "febf::1", "2002:a9fe:a9fe::"]),
            (Reach::Loopback, &["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1", "2002:7f00:1::"]),
            (
                Reach::Unknown,
                &[
                    "0.0.0.0",
                    "198.18.0.1",
                    "224.0.0.1",
                    "255.255.255.255",
                    "192.0.0.1",
                    "203.0.113.1",
                    "::",
                    "ff02::1",
                    "2001:db8::1",
                    "64:ff9b:1::1",
                    "::127.0.0.1",
                    "fec0::1",
                ],
            ),
        ] {
            for address in addresses {
                assert_eq!(Reach::of(address.parse().unwrap()), reach, "{address}");
            }
        }
    }
}
