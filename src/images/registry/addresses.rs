//! [`AllowedAddresses`]: the addresses that a registry may make this server contact. [`super`] has the rules.

use crate::{
    address::Reach,
    host::{ImageRegistry, bare},
};
use reqwest::{
    Url,
    dns::{Addrs, Name, Resolve, Resolving},
};
use std::{
    fmt::{self, Display},
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// The addresses that a registry may refer to: public ones, and addresses with the reach of its own address.
#[derive(Debug)]
pub(super) struct AllowedAddresses {
    /// The host of the registry without the port.
    host: String,
    /// The reaches of the addresses from which the registry has answered.
    own: Mutex<Vec<Reach>>,
}

impl AllowedAddresses {
    pub(super) fn new(registry: &ImageRegistry) -> Self {
        let url = Url::parse(&format!("{}://{}/", registry.scheme(), registry.host)).ok();
        let host = url.as_ref().and_then(Url::host_str).map(bare).unwrap_or_default();
        let own = host.parse().map(Reach::of).into_iter().collect();
        Self { host, own: Mutex::new(own) }
    }

    /// Checks that a host with this name may be contacted at this address.
    pub(super) fn check(&self, host: &str, address: IpAddr) -> std::result::Result<(), String> {
        let reach = Reach::of(address);
        if bare(host) == self.host || reach == Reach::Public || self.own().contains(&reach) {
            return Ok(());
        }
        Err(format!(
            "it leads to {host} at {address}, which is neither public nor in a network like the registry's"
        ))
    }

    /// Records that a host has answered from an address. Only the registry itself counts.
    pub(super) fn record_answer(&self, host: &str, address: IpAddr) {
        let (reach, mut own) = (Reach::of(address), self.own());
        if bare(host) == self.host && !own.contains(&reach) {
            own.push(reach);
        }
    }

    fn own(&self) -> MutexGuard<'_, Vec<Reach>> {
        self.own.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The check of [`AllowedAddresses::check`] for a URL whose host is an address, for which no name is resolved.
    pub(super) fn check_url(&self, url: &Url) -> std::result::Result<(), String> {
        let host = bare(url.host_str().unwrap_or_default());
        host.parse().map_or(Ok(()), |address| self.check(&host, address))
    }
}

/// Resolves names to addresses that may be contacted. The client connects to exactly these addresses, so they cannot
/// change in between.
#[derive(Debug)]
pub(super) struct AllowedAddressResolver(pub(super) Arc<AllowedAddresses>);

/// Why none of a host's addresses may be contacted.
#[derive(Debug)]
pub(super) struct NoAllowedAddress(pub(super) String);

impl Display for NoAllowedAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for NoAllowedAddress {}

impl Resolve for AllowedAddressResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let allowed_addresses = self.0.clone();
        Box::pin(async move {
            let mut refused = None;
            let mut allowed: Vec<SocketAddr> = Vec::new();
            // Port 0 means the port of the URL.
            for address in tokio::net::lookup_host((name.as_str(), 0)).await? {
                match allowed_addresses.check(name.as_str(), address.ip()) {
                    Ok(()) => allowed.push(address),
                    Err(problem) => refused = Some(problem),
                }
            }
            match refused {
                Some(problem) if allowed.is_empty() => Err(NoAllowedAddress(problem).into()),
                _ => Ok(Box::new(allowed.into_iter()) as Addrs),
            }
        })
    }
}

/// Why an address was not contacted, if the error contains that.
pub(super) fn refusal(error: &reqwest::Error) -> Option<&NoAllowedAddress> {
    let mut next = std::error::Error::source(error);
    while let Some(error) = next {
        if let Some(refusal) = error.downcast_ref() {
            return Some(refusal);
        }
        next = error.source();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_also_has_an_internal_address_does_not_open_the_internal_network() {
        let allowed =
            AllowedAddresses::new(&ImageRegistry { host: "registry.example.com".into(), is_plain: false });
        let [public, first, second] = ["1.1.1.1", "10.0.0.1", "10.0.0.6"].map(|text| text.parse().unwrap());
        for own in [public, first] {
            allowed.check("registry.example.com", own).unwrap();
        }
        allowed.record_answer("registry.example.com", public);
        allowed.record_answer("cdn.example.com", second);
        allowed.check("intranet.example.com", second).unwrap_err();
        // An internal registry, which has answered from its address.
        allowed.record_answer("Registry.example.com.", first);
        allowed.check("intranet.example.com", second).unwrap();
        allowed.check("intranet.example.com", "127.0.0.1".parse().unwrap()).unwrap_err();
    }
}
