//! Entries of the host lists and network lists in the configuration: what they match. Pure.
//!
//! A [`HostRule`] is a name or an address, `*.example.com`, or `*`; a [`HostPortRule`] may name a port too; a
//! [`Network`] is a range of addresses; an [`ImageRegistry`] is one host that container images come from. They are
//! parsed here, so that the configuration can check them; the modules that use them decide what a match means. Hosts
//! are compared in the form that [`bare`] returns.

use std::net::{IpAddr, Ipv6Addr};

/// An entry of a host list in the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostRule {
    /// Matches every host, written as `*`.
    Any,
    /// Matches this name or address.
    Is(String),
    /// Matches every name with this suffix, which starts with a dot.
    Below(String),
}

/// Removes brackets and the final dot, and converts to lower case.
pub fn bare(host: &str) -> String {
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase()
}

impl HostRule {
    /// Parses an entry without a port; `None` if it is not a host.
    pub fn parse(text: &str) -> Option<Self> {
        if text == "*." {
            return None;
        }
        let host = bare(text);
        let rule = match host.strip_prefix('*') {
            Some("") => Self::Any,
            Some(tail) if tail.len() > 1 && tail.starts_with('.') => Self::Below(tail.into()),
            Some(_) => return None,
            None => Self::Is(host.clone()),
        };
        let named = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':');
        let fine = !host.is_empty() && host.trim_start_matches('*').chars().all(named);
        let is_name = !host.contains(':') || host.parse::<Ipv6Addr>().is_ok();
        (fine && is_name).then_some(rule)
    }

    /// Whether the rule matches a host in [`bare`] form.
    pub fn covers(&self, host: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Is(name) => name == host,
            // A suffix never matches an address.
            Self::Below(tail) => host.ends_with(tail.as_str()) && host.parse::<IpAddr>().is_err(),
        }
    }
}

/// A host rule and a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPortRule {
    /// The hosts that it matches.
    pub host: HostRule,
    /// The port that it matches; `None` for every port.
    pub port: Option<u16>,
}

impl HostPortRule {
    /// Parses an entry such as `example.com` or `example.com:8443`; `None` if it is neither.
    pub fn parse(text: &str) -> Option<Self> {
        // "::1" and "[::1]:80" are hosts too.
        let (host, port) = match text.rsplit_once(':') {
            Some((host, port)) if host.ends_with(']') || !host.contains(':') => {
                (host, Some(port.parse().ok()?))
            }
            _ => (text, None),
        };
        Some(Self { host: HostRule::parse(host)?, port })
    }
}

/// Whether the text is only a host with an optional port, without other parts of a URL.
pub fn is_host_and_port(text: &str) -> bool {
    let (name, port) = match text.rsplit_once(':') {
        Some((name, port)) if !text.ends_with(']') => (name, Some(port)),
        _ => (text, None),
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-');
    let is_name = !name.is_empty() && name.chars().all(plain);
    let is_v6 = name.strip_prefix('[').and_then(|name| name.strip_suffix(']'));
    let is_v6 = is_v6.is_some_and(|address| address.parse::<Ipv6Addr>().is_ok());
    (is_name || is_v6) && port.is_none_or(|port| port.parse::<u16>().is_ok())
}

/// A registry of container images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageRegistry {
    /// The host in lower case, with the port unless it is the default one.
    pub host: String,
    /// Whether it is contacted without TLS.
    pub is_plain: bool,
}

impl ImageRegistry {
    /// Parses an entry such as `registry.example.com`, or `http://localhost:5000` for a registry without TLS; `None` if
    /// it is neither.
    pub fn parse(text: &str) -> Option<Self> {
        let (host, is_plain) = match text.strip_prefix("http://") {
            Some(host) => (host, true),
            None => (text, false),
        };
        is_host_and_port(host).then(|| Self { host: host.to_ascii_lowercase(), is_plain })
    }

    /// The scheme of its URLs.
    pub fn scheme(&self) -> &'static str {
        if self.is_plain { "http" } else { "https" }
    }
}

/// A range of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    first: IpAddr,
    bits: u32,
}

impl Network {
    /// Parses an entry such as `10.0.0.0/8`; `None` if it is not a range.
    pub fn parse(text: &str) -> Option<Self> {
        let (first, bits) = text.split_once('/')?;
        let (first, bits): (IpAddr, u32) = (first.parse().ok()?, bits.parse().ok()?);
        (bits <= if first.is_ipv4() { 32 } else { 128 }).then_some(Self { first, bits })
    }

    /// Whether an address is in the range. An IPv4 address in IPv6 notation counts as the IPv4 address.
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.first, address.to_canonical()) {
            (IpAddr::V4(first), IpAddr::V4(address)) => {
                let mask = u32::MAX.checked_shl(32 - self.bits).unwrap_or(0);
                first.to_bits() & mask == address.to_bits() & mask
            }
            (IpAddr::V6(first), IpAddr::V6(address)) => {
                let mask = u128::MAX.checked_shl(128 - self.bits).unwrap_or(0);
                first.to_bits() & mask == address.to_bits() & mask
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_that_are_no_rule_are_recognised() {
        for host in ["", "a b", "https://x", "*x", "a*", "x/", "*."] {
            assert!(HostRule::parse(host).is_none() && HostPortRule::parse(host).is_none(), "{host}");
        }
        for host in ["x:y", "1:2:3"] {
            assert!(HostPortRule::parse(host).is_none(), "{host}");
        }
        assert!(HostRule::parse("x:80").is_none(), "a rule without a port");
        for network in ["", "10.0.0.0", "10.0.0.0/33", "::/129", "x/8", "10.0.0.0/-1"] {
            assert!(Network::parse(network).is_none(), "{network}");
        }
        for host in ["[::1]:80", "::1", "*:443"] {
            assert!(HostPortRule::parse(host).is_some(), "{host}");
        }
        assert!(Network::parse("::/0").is_some());
    }
}
