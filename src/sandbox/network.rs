//! The network of a cell whose command may use one (`network=on`): which addresses it cannot reach, how it resolves
//! names, and the code that sets it up inside the cell.
//!
//! Such a cell has a network namespace of its own, in which `pasta` has a network interface. pasta is an ordinary
//! process in the host's network. It opens a socket for each connection of the command, so it needs no privileges and
//! does not change the host.
//!
//! pasta itself would connect to every address that a frame names, including the loopback interface of the host. A
//! filter of frames on the interface ([`frames`]) prevents that. Routes alone would not be enough, because a socket
//! that is bound to the interface (`SO_BINDTODEVICE`, `IP_PKTINFO`) ignores them. The [`routes`] exist so that a
//! connection to an excluded address fails at once instead of timing out.

pub(crate) mod frames;
mod routes;

use super::{SetupFailure, Step as _, sys};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::{
    fs,
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::unix::net::UnixStream,
    time::Duration,
};

/// Name of the interface in the cell.
pub(crate) const INTERFACE: &str = "eth0";
// The addresses in the cell are the same for every action and every machine. They come from ranges that are reserved
// for documentation, so no host that an action may want to reach has one of them.
/// The IPv4 address of the cell.
pub(crate) const ADDRESS_V4: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 100);
/// Length of the network part of [`ADDRESS_V4`].
pub(crate) const BITS_V4: u8 = 24;
/// The IPv4 gateway of the cell.
pub(crate) const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
/// The address at which the cell finds the host's name server, if that server has an IPv4 address.
pub(crate) const RESOLVER_V4: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 53);
/// The IPv6 address of the cell. pasta gives it a network of 64 bits.
pub(crate) const ADDRESS_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 1, 0, 0, 0, 0x64);
/// The IPv6 gateway of the cell.
pub(crate) const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 1, 0, 0, 0, 1);
/// Like [`RESOLVER_V4`], for a name server that has only an IPv6 address.
pub(crate) const RESOLVER_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 1, 0, 0, 0, 0x53);

/// How long to wait for the gateway. The gateway's own time limit is shorter, so it normally reports its failure
/// before.
const GATEWAY_TIMEOUT: Duration = Duration::from_secs(15);
/// The byte with which a cell asks its gateway to start, and with which the gateway reports that it works.
pub(crate) const GO: u8 = 0;
/// Maximum length of the error message of a gateway that could not start.
pub(crate) const MAX_PROBLEM: usize = 512;

/// Addresses that no command can reach, whatever machine it runs on.
const EXCLUDED_V4: &[(Ipv4Addr, u8)] = &[
    // "This host", loopback, link-local, and everything that is not a unicast address.
    (Ipv4Addr::new(0, 0, 0, 0), 8),
    (Ipv4Addr::new(127, 0, 0, 0), 8),
    (Ipv4Addr::new(169, 254, 0, 0), 16),
    (Ipv4Addr::new(224, 0, 0, 0), 3),
    // Cloud services for the machine itself that are not link-local: Alibaba Cloud, Azure.
    (Ipv4Addr::new(100, 100, 100, 200), 32),
    (Ipv4Addr::new(168, 63, 129, 16), 32),
];
/// The same for IPv6.
const EXCLUDED_V6: &[(Ipv6Addr, u8)] = &[
    // Loopback, unspecified, and IPv4 addresses in IPv6 notation; link-local; multicast.
    (Ipv6Addr::UNSPECIFIED, 64),
    (Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10),
    (Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0), 8),
    // Loopback and link-local addresses behind NAT64 and 6to4.
    (Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0x7f00, 0), 104),
    (Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0xa9fe, 0), 112),
    (Ipv6Addr::new(0x2002, 0x7f00, 0, 0, 0, 0, 0, 0), 24),
    (Ipv6Addr::new(0x2002, 0xa9fe, 0, 0, 0, 0, 0, 0), 32),
    // The metadata services of Amazon and Google.
    (Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254), 128),
    (Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254), 128),
];

/// A range of addresses with the same first bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct AddressRange {
    pub first: IpAddr,
    pub bits: u8,
}

/// The addresses that a command cannot reach: the ranges that no command can reach, and the addresses of the host
/// itself.
pub(crate) fn excluded(host: &[IpAddr]) -> Vec<AddressRange> {
    let v4 = EXCLUDED_V4.iter().map(|(first, bits)| AddressRange { first: (*first).into(), bits: *bits });
    let v6 = EXCLUDED_V6.iter().map(|(first, bits)| AddressRange { first: (*first).into(), bits: *bits });
    let fixed: Vec<_> = v4.chain(v6).collect();
    let single =
        |address: &IpAddr| AddressRange { first: *address, bits: if address.is_ipv4() { 32 } else { 128 } };
    let others = host.iter().filter(|address| !fixed.iter().any(|range| range.contains(**address)));
    let others: Vec<_> = others.map(single).collect();
    fixed.into_iter().chain(others).collect()
}

impl AddressRange {
    /// Whether an address is in this range.
    pub(crate) fn contains(&self, address: IpAddr) -> bool {
        let differing = match (self.first, address) {
            (IpAddr::V4(first), IpAddr::V4(address)) => (first.to_bits() ^ address.to_bits()).leading_zeros(),
            (IpAddr::V6(first), IpAddr::V6(address)) => (first.to_bits() ^ address.to_bits()).leading_zeros(),
            _ => return false,
        };
        differing >= self.bits.into()
    }
}

/// The addresses of all network interfaces of this process's network namespace.
pub(crate) fn host_addresses() -> Result<Vec<IpAddr>, SetupFailure> {
    let mut addresses = sys::interface_addresses().step("list the network addresses of this machine")?;
    addresses.sort_unstable();
    addresses.dedup();
    Ok(addresses)
}

/// How commands resolve names: through the host's first name server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Resolver {
    /// The host's name server. It may be on the host's loopback interface.
    server: IpAddr,
    /// The search domains, if the host has any.
    search: Option<String>,
}

impl Resolver {
    /// Reads the resolv.conf of the host; `None` if it names no server. A server with an IPv4 address is preferred.
    pub(crate) fn read(text: &str) -> Option<Self> {
        let after = |line: &str, keyword: &str| {
            let rest = line.trim().strip_prefix(keyword)?;
            rest.starts_with([' ', '\t']).then(|| rest.trim().to_owned())
        };
        let servers = text.lines().filter_map(|line| after(line, "nameserver")?.parse::<IpAddr>().ok());
        let servers: Vec<_> = servers.collect();
        let server = *servers.iter().find(|server| server.is_ipv4()).or(servers.first())?;
        // The last of these lines is the one that counts.
        let domains = |line: &str| after(line, "search").or_else(|| after(line, "domain"));
        Some(Self { server, search: text.lines().rev().find_map(domains) })
    }

    /// The address at which the cell finds the name server.
    pub(crate) fn inside(&self) -> IpAddr {
        match self.server {
            IpAddr::V4(_) => RESOLVER_V4.into(),
            IpAddr::V6(_) => RESOLVER_V6.into(),
        }
    }

    /// The resolv.conf of the cell. Some versions of pasta pass on queries over UDP only, so larger answers are asked
    /// for (`edns0`).
    pub(crate) fn conf(&self) -> String {
        let search = self.search.as_ref().map_or_else(String::new, |domains| format!("search {domains}\n"));
        format!("nameserver {}\n{search}options edns0\n", self.inside())
    }
}

/// The connection between a cell and its gateway, which is a process of the runner outside of the cell.
#[derive(Debug)]
pub(crate) struct OwnNetwork {
    /// The gateway starts when it receives [`GO`], and ends when this is closed.
    pub gateway: UnixStream,
    /// The addresses of the host.
    pub host: Vec<IpAddr>,
}

impl OwnNetwork {
    /// Sets up the network of this process, which has just entered a network namespace. The host's /proc must be
    /// mounted. Returns when the gateway works.
    pub(super) fn set_up(&self) -> Result<(), SetupFailure> {
        // Without IPv6, or where these settings are read-only, a new address may not be usable for the first seconds.
        for (name, value) in [("accept_dad", "0"), ("accept_ra", "0")] {
            let _ = fs::write(format!("/proc/sys/net/ipv6/conf/default/{name}"), value);
        }
        routes::exclude(&excluded(&self.host))?;
        let mut gateway = &self.gateway;
        gateway.write_all(&[GO]).step("start the gateway of the network")?;
        let timeout = Timespec::try_from(GATEWAY_TIMEOUT).ok();
        let is_ready = poll(&mut [PollFd::new(gateway, PollFlags::IN)], timeout.as_ref());
        if is_ready.step("wait for the gateway of the network")? == 0 {
            return Err(io::Error::from(io::ErrorKind::TimedOut)).step("wait for the gateway of the network");
        }
        let mut answer = [0; MAX_PROBLEM];
        let length = gateway.read(&mut answer).step("wait for the gateway of the network")?;
        match &answer[..length] {
            [GO] => Ok(()),
            [] => Err(io::Error::from(io::ErrorKind::UnexpectedEof)).step("start the gateway of the network"),
            problem => Err(io::Error::other(String::from_utf8_lossy(problem))).step("set up the network"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_its_link_and_the_metadata_services_of_clouds_are_excluded() {
        let host = ["10.1.2.3", "127.0.0.1", "2600::7", "fe80::7"].map(|address| address.parse().unwrap());
        let excluded = excluded(&host);
        let is_excluded = |address: &str| {
            let address = address.parse().unwrap();
            excluded.iter().any(|range| range.contains(address))
        };
        for address in [
            "127.0.0.1",
            "127.255.0.9",
            "0.0.0.0",
            "169.254.169.254",
            "255.255.255.255",
            "224.0.0.251",
            "10.1.2.3",
            "168.63.129.16",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "::ffff:8.8.8.8",
            "fe80::1",
            "febf::1",
            "ff02::fb",
            "2600::7",
            "64:ff9b::7f00:1",
            "64:ff9b::a9fe:a9fe",
            "2002:7f00:1::",
            "2002:a9fe:a9fe::1",
            "fd00:ec2::254",
        ] {
            assert!(is_excluded(address), "{address}");
        }
        for address in [
            "10.1.2.4",
            "8.8.8.8",
            "128.0.0.1",
            "169.253.0.1",
            "223.255.255.1",
            "203.0.113.53",
            "2600::8",
            "fec0::1",
            "64:ff9b::808:808",
            "2001:db8:0:1::53",
            "fd00:ec2::253",
        ] {
            assert!(!is_excluded(address), "{address}");
        }
        assert_eq!(excluded.len(), EXCLUDED_V4.len() + EXCLUDED_V6.len() + 2, "no address is listed twice");
    }

    #[test]
    fn names_are_resolved_by_the_first_server_of_the_host() {
        let read = |text| Resolver::read(text);
        let local =
            read("# nameserver 1.2.3.4\nnameserver ::1\n nameserver\t127.0.0.53 \nsearch corp.example\n")
                .unwrap();
        assert_eq!(local.server, "127.0.0.53".parse::<IpAddr>().unwrap());
        assert_eq!(local.conf(), "nameserver 203.0.113.53\nsearch corp.example\noptions edns0\n");
        let v6 = read("nameserver fe80::1%eth0\nnameserver 2600::53\n").unwrap();
        assert_eq!(v6.conf(), "nameserver 2001:db8:0:1::53\noptions edns0\n");
        assert_eq!(read("nameservers 1.2.3.4\nnameserver localhost\n"), None);
    }
}
