//! [`JwksLocation`]: the location of an issuer's keys, which is a file or an https URL. Pure.

use crate::host::{bare, is_host_and_port};
use std::{
    fmt,
    net::IpAddr,
    path::{Path, PathBuf},
};

/// Maximum length of a URL in bytes.
const MAX_URL_BYTES: usize = 2048;

/// The location; see the top of this file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JwksLocation {
    /// Absolute path of a file.
    File(PathBuf),
    /// The URL from which the key set is fetched.
    Url(String),
}

impl JwksLocation {
    /// Parses the setting. A text with "://" is a URL. A relative path starts at `directory`.
    ///
    /// # Errors
    /// Why it is neither a URL nor a path.
    pub fn parse(text: &str, directory: &Path) -> Result<Self, String> {
        if text.is_empty() || text.contains('\0') {
            return Err(
                "is missing; write the https URL of the issuer's key set (JWKS), or the path of a file"
                    .into(),
            );
        }
        if !text.contains("://") {
            return Ok(Self::File(directory.join(text)));
        }
        let is_secure = text.starts_with("https://");
        let Some(rest) = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://")) else {
            return Err("is neither an https URL nor a path".into());
        };
        let plain = text.len() <= MAX_URL_BYTES && text.chars().all(|c| c.is_ascii_graphic() && c != '\\');
        let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
        if !plain || !is_host_and_port(authority) {
            return Err("is not a URL with a host and no user".into());
        }
        if !is_secure && !is_loopback(authority) {
            return Err("is an http URL: an attacker on the network could replace the keys; use https".into());
        }
        Ok(Self::Url(text.to_owned()))
    }
}

/// Whether the connection stays on this machine, so that http is safe. For tests, and for a proxy on the same machine.
fn is_loopback(authority: &str) -> bool {
    let host = match authority.rsplit_once(':') {
        Some((host, _)) if !authority.ends_with(']') => host,
        _ => authority,
    };
    bare(host).parse().is_ok_and(|address: IpAddr| address.is_loopback())
}

impl fmt::Display for JwksLocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Url(url) => f.write_str(url),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_come_from_a_file_or_by_https() {
        let parse = |text| JwksLocation::parse(text, Path::new("/etc"));
        let url = "https://token.example.com:8443/.well-known/jwks?v=1";
        assert_eq!(parse(url), Ok(JwksLocation::Url(url.into())));
        assert_eq!(parse("keys.json"), Ok(JwksLocation::File("/etc/keys.json".into())));
        assert_eq!(parse("/a/keys.json"), Ok(JwksLocation::File("/a/keys.json".into())));
        for text in ["http://127.0.0.1:80/jwks", "http://[::1]:80/jwks", "http://127.1.2.3/"] {
            assert!(parse(text).is_ok(), "{text}");
        }
        for text in [
            "http://example.com/",
            "http://localhost/",
            "http://127.0.0.1.example.com/",
            "http://[::2]/",
            "https://user@example.com/",
            "https://user:password@example.com/",
            "https:///jwks",
            "https://",
            "https://example.com\\@evil.test/",
            "https://exa mple.com/",
            "https://example.com/\n",
            "file:///etc/passwd",
            "HTTPS://example.com/",
            "",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
