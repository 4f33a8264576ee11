//! [`HostRule`]: which hosts an entry of the configuration covers: a name or an address, `*.example.com`, `*`. Pure.
//!
//! Hosts are compared as [`bare`] writes them.

use std::net::{IpAddr, Ipv6Addr};

/// An entry of a list of hosts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostRule {
    /// Every host.
    Any,
    /// This name or address.
    Is(String),
    /// Every name with this ending, which begins with a dot.
    Below(String),
}

/// A host without brackets, final dot and capitals.
pub fn bare(host: &str) -> String {
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase()
}

impl HostRule {
    /// Reads an entry without a port; `None` when it is no host.
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

    /// Whether it covers a bare host.
    pub fn covers(&self, host: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Is(name) => name == host,
            // An address is not below anything.
            Self::Below(tail) => host.ends_with(tail.as_str()) && host.parse::<IpAddr>().is_err(),
        }
    }
}
