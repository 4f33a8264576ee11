//! Checks headers from users and from credential helpers. Pure.

use gorego_reapi::error::{Error, Result};
use http::{HeaderName, HeaderValue};

/// Headers that belong to the protocol and cannot be set.
const RESERVED: &[&str] = &["content-type", "content-length", "te", "host", "connection", "user-agent"];

/// A header that may be sent with requests. Its value does not appear in debug output.
pub(crate) fn checked_header(name: &str, value: &str) -> Result<(HeaderName, HeaderValue)> {
    let refuse = |problem: &str| Error::Invalid(format!("header \"{}\" {problem}", name.escape_debug()));
    let parsed: HeaderName = name.parse().map_err(|_| refuse("has a malformed name"))?;
    if RESERVED.contains(&parsed.as_str()) || parsed.as_str().starts_with("grpc-") {
        return Err(refuse("belongs to the protocol and cannot be set"));
    }
    let mut value = HeaderValue::from_str(value)
        .map_err(|_| refuse("has a value with characters that a header cannot have"))?;
    value.set_sensitive(true);
    Ok((parsed, value))
}
