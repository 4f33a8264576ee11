//! [`AssetRequest`]: a checked request of a client. Pure.
//!
//! The URIs and the qualifiers together identify an asset. Every qualifier counts, even if it affects only the
//! download: content that was fetched with credentials is not served to clients that do not have them.

use super::integrity::Integrity;
use crate::instance::Instance;
use gorego_reapi::{
    digest::DigestFunction,
    error::{Error, Result},
    path::RootPath,
};
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use sha2::{Digest as _, Sha256};
use std::{collections::BTreeMap, fmt};

/// Maximum number of URIs of one request; lists of mirrors are short.
pub const MAX_URIS: usize = 64;
/// Maximum length of a URI, in bytes.
pub const MAX_URI_BYTES: usize = 8 * 1024;
/// Maximum number of qualifiers of one request: a few headers for each mirror.
pub const MAX_QUALIFIERS: usize = 256;
/// Maximum length of a name or value of a qualifier, in bytes; some tokens take several thousand.
pub const MAX_QUALIFIER_BYTES: usize = 16 * 1024;

const SRI: &str = "checksum.sri";
const CANONICAL_ID: &str = "bazel.canonical_id";
const DIRECTORY: &str = "directory";
const HEADER: &str = "http_header:";
const HEADER_OF_URI: &str = "http_header_url:";

/// Headers that clients may not set: they concern the connection, or would request other bytes than the whole file, or
/// another host than the one that was checked.
const RESERVED_HEADERS: &[&str] = &[
    "accept-encoding",
    "connection",
    "content-length",
    "expect",
    "host",
    "if-match",
    "if-modified-since",
    "if-none-match",
    "if-range",
    "if-unmodified-since",
    "keep-alive",
    "proxy-authorization",
    "proxy-connection",
    "range",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// The form in which an asset is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AssetKind {
    /// A single blob, stored as it was downloaded.
    Blob,
    /// A Directory with everything below it, unpacked from an archive.
    Directory,
}

impl AssetKind {
    /// The name for log lines.
    pub fn name(self) -> &'static str {
        match self {
            Self::Blob => "blob",
            Self::Directory => "directory",
        }
    }
}

/// A hash of everything that identifies an asset under one URI. It reveals nothing about the asset.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AssetKey(pub [u8; 32]);

impl fmt::Debug for AssetKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&const_hex::encode(self.0))
    }
}

/// Qualifiers by name; names are unique.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Qualifiers(BTreeMap<String, String>);

/// Shows only the names, because values may be credentials.
impl fmt::Debug for Qualifiers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

impl Qualifiers {
    /// Checks a list from the wire.
    ///
    /// # Errors
    /// `Invalid` for a name that is empty or appears twice (AST-01), and when a bound of this file is exceeded.
    pub fn parse(list: impl IntoIterator<Item = (String, String)>) -> Result<Self> {
        let mut qualifiers = BTreeMap::new();
        for (name, value) in list {
            if name.is_empty() {
                return Err(Error::invalid("a qualifier has no name"));
            }
            if name.len() > MAX_QUALIFIER_BYTES || value.len() > MAX_QUALIFIER_BYTES {
                return Err(Error::Invalid(format!(
                    "a qualifier is longer than {MAX_QUALIFIER_BYTES} bytes"
                )));
            }
            if qualifiers.contains_key(&name) {
                return Err(Error::Invalid(format!("qualifier \"{}\" appears twice", name.escape_debug())));
            }
            qualifiers.insert(name, value);
            if qualifiers.len() > MAX_QUALIFIERS {
                return Err(Error::Invalid(format!("there are more than {MAX_QUALIFIERS} qualifiers")));
            }
        }
        Ok(Self(qualifiers))
    }

    /// The qualifiers that may be repeated in an answer: all except headers, whose values may be credentials.
    pub fn shown(&self) -> impl Iterator<Item = (&str, &str)> {
        // A misspelt header may hold a credential as well.
        let secret = |name: &str| name.starts_with("http_header");
        self.0
            .iter()
            .filter(move |(name, _)| !secret(name))
            .map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// The checksums that the content has to match, if there are any.
    ///
    /// # Errors
    /// The errors of [`Integrity::parse`].
    pub fn integrity(&self) -> Result<Option<Integrity>> {
        self.0.get(SRI).map(|text| Integrity::parse(text)).transpose()
    }

    /// The requested directory of an archive; the root by default.
    ///
    /// # Errors
    /// `Invalid` for a path that is absolute or leaves the archive.
    pub fn directory(&self) -> Result<RootPath> {
        let path = self.0.get(DIRECTORY).map_or("", String::as_str);
        RootPath::root().join(path).map_err(|error| Error::Invalid(format!("qualifier directory: {error}")))
    }

    /// Names that a download cannot honour (AST-02).
    pub fn unsupported(&self, kind: AssetKind) -> Vec<&str> {
        let known = |name: &str| match name {
            SRI | CANONICAL_ID => true,
            DIRECTORY => kind == AssetKind::Directory,
            _ => name.starts_with(HEADER) || name.starts_with(HEADER_OF_URI),
        };
        self.0.keys().map(String::as_str).filter(|name| !known(name)).collect()
    }

    /// The headers for the URI at `index`: the headers for all URIs, overridden by the headers for this URI (AST-03).
    ///
    /// # Errors
    /// `Invalid` for a malformed or reserved header, and for an index without a URI.
    fn headers(&self, index: usize, uris: usize) -> Result<HeaderMap> {
        let mut headers = HeaderMap::new();
        for (qualifier, value) in &self.0 {
            if let Some(name) = qualifier.strip_prefix(HEADER) {
                let (name, value) = header(name, value)?;
                headers.insert(name, value);
            }
        }
        for (qualifier, value) in &self.0 {
            let Some(rest) = qualifier.strip_prefix(HEADER_OF_URI) else { continue };
            let parts = rest.split_once(':').and_then(|(at, name)| Some((at.parse::<usize>().ok()?, name)));
            let Some((at, name)) = parts.filter(|(at, _)| *at < uris) else {
                return Err(Error::Invalid(format!(
                    "qualifier \"{}\" is not http_header_url:INDEX:NAME with the index of a URI",
                    qualifier.escape_debug()
                )));
            };
            let (name, value) = header(name, value)?;
            if at == index {
                headers.insert(name, value);
            }
        }
        Ok(headers)
    }
}

fn header(name: &str, value: &str) -> Result<(HeaderName, HeaderValue)> {
    let refuse = |problem: &str| {
        Error::Invalid(format!("the HTTP header \"{}\" of a qualifier {problem}", name.escape_debug()))
    };
    let name: HeaderName = name.parse().map_err(|_| refuse("has no valid name"))?;
    if RESERVED_HEADERS.contains(&name.as_str()) {
        return Err(refuse("cannot be set"));
    }
    let mut value = HeaderValue::from_str(value).map_err(|_| refuse("has no valid value"))?;
    value.set_sensitive(true);
    Ok((name, value))
}

/// A request for one asset.
#[derive(Debug, Clone)]
pub struct AssetRequest {
    /// The instance that the asset belongs to.
    pub instance: Instance,
    /// The digest function of the answer (AST-07).
    pub function: DigestFunction,
    /// The form in which the asset is stored.
    pub kind: AssetKind,
    /// Its URIs, the preferred one first; at least one.
    pub uris: Vec<String>,
    /// Further properties that identify the asset.
    pub qualifiers: Qualifiers,
}

impl AssetRequest {
    /// Checks a request.
    ///
    /// # Errors
    /// `Invalid` without URIs (AST-01), with an empty one, and when a bound of this file is exceeded.
    pub fn new(
        instance: Instance,
        function: DigestFunction,
        kind: AssetKind,
        uris: Vec<String>,
        qualifiers: Qualifiers,
    ) -> Result<Self> {
        if uris.is_empty() {
            return Err(Error::invalid("there are no uris"));
        }
        if uris.len() > MAX_URIS {
            return Err(Error::Invalid(format!("there are more than {MAX_URIS} uris")));
        }
        if uris.iter().any(|uri| uri.is_empty() || uri.len() > MAX_URI_BYTES) {
            return Err(Error::Invalid(format!("a URI is empty or longer than {MAX_URI_BYTES} bytes")));
        }
        Ok(Self { instance, function, kind, uris, qualifiers })
    }

    /// The approximate memory of its texts, in bytes.
    pub fn size(&self) -> usize {
        let qualifiers = self.qualifiers.0.iter().map(|(name, value)| name.len() + value.len());
        self.uris.iter().map(String::len).chain(qualifiers).sum()
    }

    /// The key of each URI, in order. Headers for single URIs name them by their index. If there are any, the index is
    /// a part of the key, because the same URI at another index gets other headers.
    pub fn keys(&self) -> Vec<AssetKey> {
        let names_index = self.qualifiers.0.keys().any(|name| name.starts_with(HEADER_OF_URI));
        let keys = self.uris.iter().enumerate().map(|(index, uri)| match names_index {
            true => self.key([uri, &index.to_string()]),
            false => self.key([uri]),
        });
        keys.collect()
    }

    /// The key of all URIs together. Two requests with the same key can share a flight.
    pub fn flight_key(&self) -> AssetKey {
        self.key(&self.uris)
    }

    fn key<'a>(&self, uris: impl IntoIterator<Item = &'a String>) -> AssetKey {
        let mut hasher = Sha256::new();
        // Each part is preceded by its length, so that different lists of parts give different input.
        let mut part = |bytes: &[u8]| {
            hasher.update((bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        part(self.instance.name().as_bytes());
        part(self.function.name().as_bytes());
        part(self.kind.name().as_bytes());
        for (name, value) in &self.qualifiers.0 {
            part(name.as_bytes());
            part(value.as_bytes());
        }
        part(b"");
        uris.into_iter().for_each(|uri| part(uri.as_bytes()));
        AssetKey(hasher.finalize().into())
    }

    /// The request headers for the URI at this index. They can be as large as all qualifiers together, so
    /// callers keep the headers of one URI at a time.
    ///
    /// # Errors
    /// `Invalid` for headers that cannot be sent, of any URI.
    pub fn headers(&self, index: usize) -> Result<HeaderMap> {
        self.qualifiers.headers(index, self.uris.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instance::Instances;

    fn qualifiers(list: &[(&str, &str)]) -> Result<Qualifiers> {
        Qualifiers::parse(list.iter().map(|(name, value)| (name.to_string(), value.to_string())))
    }

    fn request(uris: &[&str], list: &[(&str, &str)]) -> AssetRequest {
        let instance = Instances::new([""]).unwrap().get("").unwrap();
        let uris = uris.iter().map(ToString::to_string).collect();
        AssetRequest::new(instance, DigestFunction::Sha256, AssetKind::Blob, uris, qualifiers(list).unwrap())
            .unwrap()
    }

    /// AST-01.
    #[test]
    fn requests_without_uris_and_qualifiers_named_twice_are_refused() {
        assert!(qualifiers(&[("a", "1"), ("a", "1")]).is_err());
        assert!(qualifiers(&[("", "1")]).is_err());
        let instance = Instances::new([""]).unwrap().get("").unwrap();
        let none = AssetRequest::new(
            instance,
            DigestFunction::Sha256,
            AssetKind::Blob,
            vec![],
            Qualifiers::default(),
        );
        assert!(matches!(none, Err(Error::Invalid(_))));
    }

    /// AST-02.
    #[test]
    fn unsupported_qualifiers_are_named() {
        let some = qualifiers(&[("x.y", ""), ("checksum.sri", ""), ("directory", ""), ("http_header:A", "")])
            .unwrap();
        assert_eq!(some.unsupported(AssetKind::Blob), ["directory", "x.y"]);
        assert_eq!(some.unsupported(AssetKind::Directory), ["x.y"]);
    }

    /// AST-03.
    #[test]
    fn a_header_for_one_uri_overrides_the_one_for_all() {
        let request = request(
            &["http://a/", "http://b/"],
            &[("http_header:X-A", "all"), ("http_header:X-B", "all"), ("http_header_url:1:x-a", "one")],
        );
        let headers = [0, 1].map(|index| request.headers(index).unwrap());
        assert_eq!(
            (&headers[0]["x-a"], &headers[0]["x-b"]),
            (&"all".parse().unwrap(), &"all".parse().unwrap())
        );
        assert_eq!(
            (&headers[1]["x-a"], &headers[1]["x-b"]),
            (&"one".parse().unwrap(), &"all".parse().unwrap())
        );
        assert_eq!(request.qualifiers.shown().count(), 0, "credentials are not repeated");
    }

    #[test]
    fn headers_that_would_deceive_are_refused() {
        for name in [
            "http_header:Host",
            "http_header:a b",
            "http_header_url:1:A",
            "http_header_url:x:A",
            "http_header_url:A",
        ] {
            assert!(request(&["http://a/"], &[(name, "x")]).headers(0).is_err(), "{name}");
        }
        assert!(request(&["http://a/"], &[("http_header:A", "x\r\nB: y")]).headers(0).is_err());
    }

    /// Otherwise a client without the header would get what was fetched with it.
    #[test]
    fn a_uri_with_a_header_of_its_own_is_not_the_same_asset_at_another_index() {
        let header = [("http_header_url:0:Authorization", "secret")];
        let keys = |uris: &[&str], list: &[(&str, &str)]| request(uris, list).keys();
        let (here, there) = (keys(&["a", "b"], &header), keys(&["b", "a"], &header));
        assert_ne!(here[0], there[1]);
        assert_ne!(here[1], there[0]);
        assert_eq!(keys(&["a", "b"], &header), here);
        // Headers for all URIs do not depend on the index.
        let header = [("http_header:Authorization", "secret")];
        assert_eq!(keys(&["a", "b"], &header)[0], keys(&["b", "a"], &header)[1]);
    }

    #[test]
    fn any_difference_makes_another_asset() {
        let keys = [
            request(&["a"], &[]),
            request(&["b"], &[]),
            request(&["a", "b"], &[]),
            request(&["ab"], &[]),
            request(&["a"], &[("b", "")]),
            request(&["a"], &[("b", "c")]),
            request(&["a"], &[("bc", "")]),
        ];
        let distinct: std::collections::HashSet<_> = keys.iter().map(AssetRequest::flight_key).collect();
        assert_eq!(distinct.len(), keys.len());
        let (one, two) = ([("a", "1"), ("b", "2")], [("b", "2"), ("a", "1")]);
        assert_eq!(request(&["a"], &one).flight_key(), request(&["a"], &two).flight_key());
    }
}
