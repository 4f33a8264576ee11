//! [`Hosts`]: the host names for which the HTTP port answers. Pure.
//!
//! A web page can point its own name at this machine (DNS rebinding). The browser then treats this server as the page's
//! own site, and the page could read and write the cache. Every request contains the name, so unknown names are
//! refused. Addresses cannot be rebound. Still, only addresses of this server are accepted: loopback, and the address
//! to which the client has connected.

use crate::host::{HostRule, bare};
use arc_swap::ArcSwap;
use axum::http::{HeaderMap, HeaderValue, Uri, Version, header, uri::Authority};
use std::{net::IpAddr, sync::Arc};

/// Number of characters of a refused host that a response repeats.
const SHOWN_CHARS: usize = 100;

/// The configured hosts. Loopback and the local address are always accepted too.
/// Clones share the list, also when it is replaced.
#[derive(Debug, Clone, Default)]
pub(crate) struct Hosts(Arc<ArcSwap<Vec<HostRule>>>);

/// The reason why a request is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum HostRefusal {
    /// The host is missing or malformed (RFC 9112, 3.2).
    Malformed(&'static str),
    /// The host is not a name of this server.
    Stranger(String),
}

impl Hosts {
    pub(crate) fn new(hosts: Vec<HostRule>) -> Self {
        Self(Arc::new(ArcSwap::from_pointee(hosts)))
    }

    /// Replaces the configured hosts.
    pub(crate) fn replace(&self, hosts: Vec<HostRule>) {
        self.0.store(Arc::new(hosts));
    }

    /// Checks the host of a request on a connection to the local address `reached`.
    ///
    /// # Errors
    /// The reason why it is refused.
    pub(crate) fn check(
        &self,
        version: Version,
        uri: &Uri,
        headers: &HeaderMap,
        reached: IpAddr,
    ) -> Result<(), HostRefusal> {
        let Some(host) = host_of(version, uri, headers).map_err(HostRefusal::Malformed)? else {
            return Ok(());
        };
        let leads_here = host
            .parse::<IpAddr>()
            .map(|address| address.to_canonical())
            .is_ok_and(|address| address.is_loopback() || address == reached.to_canonical());
        if leads_here || host == "localhost" || self.0.load().iter().any(|rule| rule.covers(&host)) {
            return Ok(());
        }
        let shown: String = host.chars().take(SHOWN_CHARS).collect();
        Err(HostRefusal::Stranger(format!(
            "this server does not answer for host \"{}\"; if it is a name of this server, list it in http.allowed_hosts",
            shown.escape_debug()
        )))
    }
}

/// The host of a request, in bare form. `None` if an HTTP/1.0 request omits it, which no browser does.
fn host_of(version: Version, uri: &Uri, headers: &HeaderMap) -> Result<Option<String>, &'static str> {
    let mut values = headers.get_all(header::HOST).iter();
    let host = match (values.next(), values.next()) {
        (_, Some(_)) => return Err("the request has more than one Host field"),
        (None, None) if version >= Version::HTTP_11 => return Err("the request has no Host field"),
        (host, None) => host.map(authority).transpose()?,
    };
    // A host in the request target takes precedence over the field (RFC 9112, 3.2.2).
    match uri.authority() {
        Some(target) if target.as_str().contains('@') => Err("the target of the request contains a user"),
        Some(target) => Ok(Some(bare(target.host()))),
        None => Ok(host.map(|host| bare(host.host()))),
    }
}

/// Parses a Host field.
fn authority(value: &HeaderValue) -> Result<Authority, &'static str> {
    let parsed = Authority::try_from(value.as_bytes()).ok();
    let is_fine = |authority: &Authority| !authority.host().is_empty() && !authority.as_str().contains('@');
    parsed.filter(is_fine).ok_or("the Host field of the request is not a host with a port")
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::extract::Request;

    fn check(allowed: &[&str], version: Version, target: &str, hosts: &[&str]) -> Result<(), HostRefusal> {
        let allowed = allowed.iter().map(|host| HostRule::parse(host).unwrap()).collect();
        let mut request = Request::builder().version(version).uri(target);
        for host in hosts {
            request = request.header(header::HOST, *host);
        }
        let request = request.body(()).unwrap();
        let reached = "192.0.2.7".parse().unwrap();
        Hosts::new(allowed).check(version, request.uri(), request.headers(), reached)
    }

    fn answers(allowed: &[&str], host: &str) -> bool {
        match check(allowed, Version::HTTP_11, "/", &[host]) {
            Err(HostRefusal::Malformed(why)) => panic!("{host}: {why}"),
            judged => judged.is_ok(),
        }
    }

    #[test]
    fn names_of_this_machine_are_answered_on_any_port_and_all_others_only_when_they_are_listed() {
        for host in [
            "localhost",
            "LOCALHOST:80",
            "localhost.",
            "127.0.0.1:50052",
            "127.8.9.1",
            "[::1]:1",
            "192.0.2.7:9",
        ] {
            assert!(answers(&[], host), "{host}");
        }
        let listed = ["cache.test", "*.corp.test", "10.0.0.9"];
        for host in ["cache.test:8080", "Cache.Test", "a.b.corp.test", "10.0.0.9:1"] {
            assert!(answers(&listed, host) && !answers(&[], host), "{host}");
        }
        for host in [
            "evil.test",
            "localhost.evil.test",
            "127.0.0.1.evil.test:50052",
            "x.localhost",
            "corp.test",
            "cache.test.evil.test",
            "192.0.2.8",
            "0.0.0.0",
            "[::]",
            "0x7f.1",
        ] {
            assert!(!answers(&listed, host) && answers(&["*"], host), "{host}");
        }
    }

    #[test]
    fn the_answer_names_the_setting_and_not_too_much_of_the_host() {
        let judged = check(&[], Version::HTTP_11, "/", &[&"a".repeat(5_000)]);
        let Err(HostRefusal::Stranger(text)) = judged else { panic!("{judged:?}") };
        assert!(text.contains("http.allowed_hosts") && text.len() < 300, "{text}");
    }

    /// RFC 9112, 3.2.
    #[test]
    fn a_request_says_its_host_once_and_the_target_goes_before_the_field() {
        let malformed = |judged| matches!(judged, Err(HostRefusal::Malformed(_)));
        let stranger = |judged| matches!(judged, Err(HostRefusal::Stranger(_)));
        assert!(malformed(check(&["*"], Version::HTTP_11, "/", &[])));
        assert!(malformed(check(&["*"], Version::HTTP_11, "/", &["localhost", "localhost"])));
        assert!(malformed(check(&["*"], Version::HTTP_11, "/", &["evil@localhost"])));
        assert!(malformed(check(&["*"], Version::HTTP_11, "/", &[""])));
        assert!(malformed(check(&["*"], Version::HTTP_11, "/", &["local host"])));
        assert!(malformed(check(&["*"], Version::HTTP_11, "http://localhost/", &[])));
        assert!(check(&[], Version::HTTP_10, "/", &[]).is_ok());
        assert!(stranger(check(&[], Version::HTTP_10, "/", &["evil.test"])));
        assert!(stranger(check(&[], Version::HTTP_11, "http://evil.test/", &["localhost"])));
        assert!(check(&[], Version::HTTP_11, "http://localhost/", &["evil.test"]).is_ok());
    }
}
