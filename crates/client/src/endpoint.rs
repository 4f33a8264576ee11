//! [`ServerUri`]: the address of a server as users write it.

use gorego_reapi::error::{Error, Result};

/// The port of `grpcs://host` and `https://host`.
const TLS_PORT: u16 = 443;

/// The address of a server, and whether to use TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerUri {
    uri: String,
    has_tls: bool,
}

impl ServerUri {
    /// Parses `grpc://host:port`, `grpcs://host[:port]`, `http://host:port`, `https://host[:port]`, `unix:///path` or
    /// `host:port`.
    ///
    /// # Errors
    /// `Invalid` for any other form, and for a missing port.
    pub fn parse(endpoint: &str) -> Result<Self> {
        let refuse = |problem: &str| {
            Err(Error::Invalid(format!(
                "endpoint \"{}\" {problem}; it should look like grpc://127.0.0.1:50051, or grpcs://build.example.com for TLS",
                endpoint.escape_debug()
            )))
        };
        let (has_tls, authority) = match endpoint.split_once("://") {
            Some(("unix", _)) => return Ok(Self { uri: endpoint.to_owned(), has_tls: false }),
            Some(("grpc" | "http", rest)) => (false, rest),
            Some(("grpcs" | "https", rest)) => (true, rest),
            Some(_) => return refuse("has an unknown scheme"),
            None => (false, endpoint),
        };
        let authority = authority.trim_end_matches('/');
        let Ok(parsed) = authority.parse::<http::uri::Authority>() else { return refuse("is malformed") };
        if parsed.host().is_empty() || authority.contains('@') {
            return refuse("is malformed");
        }
        let port = match parsed.port_u16() {
            Some(port) => port,
            None if authority.len() > parsed.host().len() => return refuse("is malformed"),
            None if has_tls => TLS_PORT,
            None => return refuse("has no port"),
        };
        let scheme = if has_tls { "https" } else { "http" };
        Ok(Self { uri: format!("{scheme}://{}:{port}", parsed.host()), has_tls })
    }

    /// The URI with the scheme of HTTP or `unix`.
    pub fn as_str(&self) -> &str {
        &self.uri
    }

    /// Whether the server is expected to use TLS.
    pub fn has_tls(&self) -> bool {
        self.has_tls
    }

    /// `host:port`; `None` for a Unix socket.
    pub fn authority(&self) -> Option<&str> {
        self.uri.strip_prefix("http://").or_else(|| self.uri.strip_prefix("https://"))
    }

    /// Its host; `None` for a Unix socket.
    pub fn host(&self) -> Option<&str> {
        Some(self.authority()?.rsplit_once(':')?.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_read_as_people_write_them() {
        for (written, meant) in [
            ("grpc://127.0.0.1:50051", "http://127.0.0.1:50051"),
            ("http://build:80/", "http://build:80"),
            ("localhost:50051", "http://localhost:50051"),
            ("grpc://[::1]:9092", "http://[::1]:9092"),
            ("grpcs://build.example.com", "https://build.example.com:443"),
            ("https://build.example.com:50051/", "https://build.example.com:50051"),
            ("unix:///run/gorego.sock", "unix:///run/gorego.sock"),
        ] {
            let parsed = ServerUri::parse(written).unwrap();
            assert_eq!((parsed.as_str(), parsed.has_tls()), (meant, meant.starts_with("https")));
        }
        assert_eq!(ServerUri::parse("grpcs://[::1]").unwrap().host(), Some("[::1]"));
        for (wrong, hint) in [
            ("ftp://a:1", "scheme"),
            ("grpc://a", "port"),
            ("grpcs://a:x", "malformed"),
            ("", "malformed"),
            ("grpc://a b:1", "malformed"),
            ("grpcs://u:p@a:1", "malformed"),
        ] {
            let error = ServerUri::parse(wrong).unwrap_err().to_string();
            assert!(error.contains(hint), "{wrong}: {error}");
        }
    }
}
