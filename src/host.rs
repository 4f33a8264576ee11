//! [`HostRule`]: the hosts that a configuration entry matches: a name or an address, `*.example.com`, or `*`. Pure.
//!
//! Hosts are compared in the form that [`bare`] returns.

use std::net::{IpAddr, Ipv6Addr};

/// An entry of a host list in the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum HostRule {
    /// Matches every host.
    Any,
    /// Matches this name or address.
    Is(String),
    /// Matches every name with this suffix, which starts with a dot.
    Below(String),
}

/// Removes brackets and the final dot, and converts to lower case.
pub(crate) fn bare(host: &str) -> String {
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase()
}

impl HostRule {
    /// Parses an entry without a port; `None` if it is not a host.
    pub(crate) fn parse(text: &str) -> Option<Self> {
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
    pub(crate) fn covers(&self, host: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Is(name) => name == host,
            // A suffix never matches an address.
            Self::Below(tail) => host.ends_with(tail.as_str()) && host.parse::<IpAddr>().is_err(),
        }
    }
}
