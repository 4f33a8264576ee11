//! [`Origins`]: which hosts and addresses a download may contact (AST-10). Pure.
//!
//! A host is checked by its name before it is resolved, and again at every redirect. Each address that a name resolves
//! to is checked before it is connected to, so a name cannot be pointed at an internal address after it was checked.

use crate::{
    address::Reach,
    host::{HostPortRule, HostRule, Network, bare},
};
use arc_swap::ArcSwap;
use reqwest::Url;
use std::{net::IpAddr, sync::Arc};

/// The hosts and networks that may be contacted; none by default. Clones share them, also when they are replaced.
#[derive(Debug, Clone, Default)]
pub struct Origins(Arc<ArcSwap<OriginRules>>);

#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct OriginRules {
    hosts: Vec<HostPortRule>,
    networks: Vec<Network>,
}

impl PartialEq for Origins {
    fn eq(&self, other: &Self) -> bool {
        *self.0.load() == *other.0.load()
    }
}
impl Eq for Origins {}

impl Origins {
    /// Allows these hosts, and addresses that are public or in these networks.
    pub fn new(hosts: Vec<HostPortRule>, networks: Vec<Network>) -> Self {
        Self(Arc::new(ArcSwap::from_pointee(OriginRules { hosts, networks })))
    }

    /// Replaces what is allowed, also for downloads that are under way: each host and address is checked when its turn
    /// comes.
    pub fn replace(&self, hosts: Vec<HostPortRule>, networks: Vec<Network>) {
        self.0.store(Arc::new(OriginRules { hosts, networks }));
    }

    /// Checks the scheme, host and port of a URL.
    ///
    /// # Errors
    /// Why it is not allowed, with the configuration key that could allow it.
    pub fn check_url(&self, url: &Url) -> Result<(), String> {
        if !matches!(url.scheme(), "http" | "https") {
            return Err(format!("scheme \"{}\" is not fetched; only http and https are", url.scheme()));
        }
        let Some(host) = url.host_str().filter(|host| !host.is_empty()) else {
            return Err("the URI names no host".into());
        };
        let host = bare(host);
        let port = url.port_or_known_default();
        let rules = self.0.load();
        let mut rules = rules.hosts.iter().filter(|rule| rule.port.is_none() || rule.port == port);
        let matching: Vec<&HostRule> =
            rules.by_ref().map(|rule| &rule.host).filter(|rule| rule.covers(&host)).collect();
        if matching.is_empty() {
            return Err(format!("host \"{host}\" is not in assets.allowed_hosts of this server"));
        }
        match host.parse() {
            // An address that is listed as a host is allowed without a further check.
            Ok(address) if !matching.iter().any(|rule| matches!(rule, HostRule::Is(_))) => {
                self.check_address(address)
            }
            _ => Ok(()),
        }
    }

    /// Checks an address that a name resolved to.
    ///
    /// # Errors
    /// Why it is not allowed, with the configuration key that could allow it.
    pub fn check_address(&self, address: IpAddr) -> Result<(), String> {
        if Reach::of(address) == Reach::Public
            || self.0.load().networks.iter().any(|network| network.contains(address))
        {
            return Ok(());
        }
        Err(format!(
            "address {address} is not public and in no range of assets.allowed_networks of this server"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origins(hosts: &[&str], networks: &[&str]) -> Origins {
        let hosts = hosts.iter().map(|host| HostPortRule::parse(host).unwrap());
        Origins::new(
            hosts.collect(),
            networks.iter().map(|network| Network::parse(network).unwrap()).collect(),
        )
    }

    fn allows(origins: &Origins, url: &str) -> bool {
        origins.check_url(&Url::parse(url).unwrap()).is_ok()
    }

    /// AST-10.
    #[test]
    fn only_listed_hosts_are_contacted_and_none_by_default() {
        assert!(!allows(&origins(&[], &[]), "https://example.com/"));
        let some = origins(&["Example.com", "*.corp.test", "ported.test:8443", "10.1.2.3"], &[]);
        for url in [
            "https://example.com/x",
            "http://EXAMPLE.com.:99/",
            "https://a.b.corp.test/",
            "https://ported.test:8443/",
            "http://10.1.2.3/",
        ] {
            assert!(allows(&some, url), "{url}");
        }
        for url in [
            "https://sub.example.com/",
            "https://corp.test/",
            "https://evilcorp.test/",
            "https://ported.test/",
            "http://10.1.2.4/",
            "https://example.com@evil.test/",
            "file:///etc/passwd",
            "ftp://example.com/",
            "gopher://example.com/",
        ] {
            assert!(!allows(&some, url), "{url}");
        }
    }

    /// AST-10, in any notation of the address.
    #[test]
    fn addresses_that_are_not_public_need_to_be_listed() {
        let all = origins(&["*"], &[]);
        for url in [
            "http://127.0.0.1/",
            "http://0x7f.1/",
            "http://2130706433/",
            "http://0/",
            "http://169.254.169.254/latest/meta-data",
            "http://10.0.0.1/",
            "http://172.16.0.1/",
            "http://192.168.1.1/",
            "http://100.64.0.1/",
            "http://198.18.0.1/",
            "http://224.0.0.1/",
            "http://255.255.255.255/",
            "http://[::1]/",
            "http://[::]/",
            "http://[fe80::1]/",
            "http://[fd00::1]/",
            "http://[ff02::1]/",
            "http://[::ffff:127.0.0.1]/",
            "http://[64:ff9b::10.0.0.1]/",
            "http://[64:ff9b:1::1]/",
            "http://[2002:7f00:1::]/",
            "http://[2001:db8::1]/",
            "http://[::127.0.0.1]/",
        ] {
            assert!(!allows(&all, url), "{url}");
        }
        for url in ["http://1.1.1.1/", "http://[2606:4700::1111]/", "http://[64:ff9b::1.1.1.1]/"] {
            assert!(allows(&all, url), "{url}");
        }
        let inside = origins(&["*"], &["127.0.0.0/8", "fd00::/8", "0.0.0.0/32"]);
        for url in ["http://127.9.9.9/", "http://[fd12::1]/", "http://[::ffff:127.0.0.1]/", "http://0/"] {
            assert!(allows(&inside, url), "{url}");
        }
        assert!(!allows(&inside, "http://10.0.0.1/"));
        assert!(inside.check_address("0.0.0.1".parse().unwrap()).is_err());
        // Listing a host by name does not allow its addresses.
        assert!(origins(&["localhost"], &[]).check_address("127.0.0.1".parse().unwrap()).is_err());
    }
}
