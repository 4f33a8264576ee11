//! [`UnverifiedToken`]: a parsed signed token (RFC 7515, RFC 7519) whose signature is not checked. Pure.
//!
//! Everything that a token says about keys (`jku`, `x5u`, `jwk`, `x5c`) is ignored. Tokens with critical extensions
//! (`crit`) are refused, because no extension is supported.

use super::{
    algorithm::SignatureAlgorithm,
    json::StrictObject,
    keys::MAX_KEY_ID_BYTES,
    refusal::{RefusalKind, TokenRefusal, shown},
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::{Map, Value};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Maximum length of a token in bytes. Tokens of known issuers have 1 to 4 KiB.
pub const MAX_TOKEN_BYTES: usize = 16 * 1024;
/// Maximum length of issuer and subject in bytes.
pub(super) const MAX_NAME_BYTES: usize = 1024;
/// Maximum number of audiences of a token.
const MAX_AUDIENCES: usize = 32;

/// The token. Its content cannot be trusted until the signature is checked.
#[derive(Debug)]
pub(super) struct UnverifiedToken<'a> {
    /// The token as the client sent it.
    pub(super) text: &'a str,
    pub(super) algorithm: SignatureAlgorithm,
    pub(super) key_id: Option<String>,
    pub(super) issuer: String,
    pub(super) subject: String,
    pub(super) audiences: Vec<String>,
    pub(super) expires: SystemTime,
    pub(super) not_before: Option<SystemTime>,
    pub(super) issued: Option<SystemTime>,
    /// All claims, including those above.
    pub(super) claims: Map<String, Value>,
}

fn malformed(reason: impl Into<String>) -> TokenRefusal {
    TokenRefusal::new(RefusalKind::Malformed, reason)
}

impl<'a> UnverifiedToken<'a> {
    /// Parses a token in compact form.
    ///
    /// # Errors
    /// `Malformed`, or `Algorithm` for an algorithm that is not supported.
    pub(super) fn parse(text: &'a str) -> Result<Self, TokenRefusal> {
        if text.len() > MAX_TOKEN_BYTES {
            return Err(malformed(format!("it has {} bytes, more than {MAX_TOKEN_BYTES}", text.len())));
        }
        let parts: Vec<&str> = text.splitn(4, '.').collect();
        let [header, payload, _] = parts[..] else {
            return Err(malformed(format!(
                "it has {} parts instead of three (encrypted tokens are not supported)",
                parts.len()
            )));
        };
        let header = decode(header, "header")?;
        let algorithm = algorithm(&header)?;
        check_header(&header)?;
        let key_id = optional_text(&header, "kid", MAX_KEY_ID_BYTES)?.map(str::to_owned);
        let claims = decode(payload, "payload")?;
        Ok(Self {
            text,
            algorithm,
            key_id,
            issuer: text_claim(&claims, "iss")?.to_owned(),
            subject: text_claim(&claims, "sub")?.to_owned(),
            audiences: audiences(&claims)?,
            expires: time(&claims, "exp")?.ok_or_else(|| malformed("it has no exp"))?,
            not_before: time(&claims, "nbf")?,
            issued: time(&claims, "iat")?,
            claims,
        })
    }
}

fn decode(part: &str, name: &str) -> Result<Map<String, Value>, TokenRefusal> {
    let bytes = URL_SAFE_NO_PAD
        .decode(part)
        .map_err(|_| malformed(format!("its {name} is not base64url without padding")))?;
    StrictObject::parse(&bytes)
        .map_err(|problem| malformed(format!("its {name} is not JSON of the right form: {problem}")))
}

fn algorithm(header: &Map<String, Value>) -> Result<SignatureAlgorithm, TokenRefusal> {
    let name = optional_text(header, "alg", MAX_NAME_BYTES)?.ok_or_else(|| malformed("it has no alg"))?;
    SignatureAlgorithm::from_name(name).ok_or_else(|| {
        let reason = format!("its algorithm \"{}\" is never accepted here", shown(name));
        TokenRefusal::new(RefusalKind::Algorithm, reason)
    })
}

fn check_header(header: &Map<String, Value>) -> Result<(), TokenRefusal> {
    if header.contains_key("crit") {
        return Err(malformed("it demands extensions (crit); none is supported"));
    }
    // Other kinds of tokens of the same issuer, such as logout tokens, are signed with the same keys (RFC 8725).
    let kind = optional_text(header, "typ", MAX_NAME_BYTES)?.map(str::to_ascii_lowercase);
    match kind.as_deref().map(|kind| kind.strip_prefix("application/").unwrap_or(kind)) {
        None | Some("jwt" | "at+jwt") => Ok(()),
        Some(other) => Err(malformed(format!("its type (typ) is \"{}\" instead of JWT", shown(other)))),
    }
}

fn optional_text<'a>(
    object: &'a Map<String, Value>,
    name: &str,
    max: usize,
) -> Result<Option<&'a str>, TokenRefusal> {
    match object.get(name) {
        None => Ok(None),
        Some(Value::String(text)) if !text.is_empty() && text.len() <= max => Ok(Some(text)),
        Some(_) => Err(malformed(format!("its {name} is not a string of 1 to {max} bytes"))),
    }
}

fn text_claim<'a>(claims: &'a Map<String, Value>, name: &str) -> Result<&'a str, TokenRefusal> {
    optional_text(claims, name, MAX_NAME_BYTES)?.ok_or_else(|| malformed(format!("it has no {name}")))
}

fn audiences(claims: &Map<String, Value>) -> Result<Vec<String>, TokenRefusal> {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let all = match claims.get("aud") {
        None => return Err(malformed("it has no aud")),
        Some(Value::Array(values)) if values.len() <= MAX_AUDIENCES => values.iter().map(text).collect(),
        Some(value) => text(value).map(|only| vec![only]),
    };
    all.ok_or_else(|| {
        malformed(format!("its aud is neither a string nor a list of at most {MAX_AUDIENCES} strings"))
    })
}

/// Parses a number of seconds since 1970, which may have a fraction.
fn time(claims: &Map<String, Value>, name: &str) -> Result<Option<SystemTime>, TokenRefusal> {
    let Some(value) = claims.get(name) else { return Ok(None) };
    let whole = value.as_u64().map(Duration::from_secs);
    let since =
        whole.or_else(|| value.as_f64().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()));
    let time = since.and_then(|since| UNIX_EPOCH.checked_add(since));
    time.map(Some).ok_or_else(|| malformed(format!("its {name} is not a time")))
}
