//! [`Resource`]: the thing that a path names. Pure. Paths are hostile until parsed here.

use gorego_reapi::{
    digest::{Digest, DigestFunction},
    error::{Error, Result},
};

/// The text for people who open the server in a browser.
pub const HELP: &str = "goREgo's HTTP cache: /cas/HASH (blobs), /ac/HASH (action results), /cache/KEY (values), \
                        each with [/INSTANCE] in front";
/// Longest key of a value, in bytes.
pub const MAX_KEY_BYTES: usize = 1_024;

/// The parsed form of a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resource {
    /// `/`: a help text.
    Root,
    /// `/healthz` or `/status`: the health check.
    Health,
    /// `[/instance]/cas/[function/]hash`: a blob.
    Blob {
        /// The instance name; not looked up.
        instance_name: String,
        /// The hash of the blob.
        hash: HashInPath,
    },
    /// `[/instance]/ac/[function/]hash`: an action result.
    Result {
        /// The instance name; not looked up.
        instance_name: String,
        /// The hash of the Action.
        hash: HashInPath,
    },
    /// `[/instance]/cache/key`: a value.
    Value {
        /// The instance name; not looked up.
        instance_name: String,
        /// Everything after the keyword, undecoded. An empty key, or one that ends with a slash, is a WebDAV collection.
        key: String,
    },
}

/// A hash without a size, as a digest of size 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HashInPath {
    /// The hash, with the function that the path names or that its length implies.
    pub like: Digest,
    /// Whether the path names the function.
    pub function_is_named: bool,
}

impl Resource {
    /// Parses a path at its first keyword. An instance whose name contains a keyword as a segment cannot be addressed.
    ///
    /// # Errors
    /// `NotFound` for a path that names nothing; `Invalid` for a malformed hash or key.
    pub fn parse(path: &str) -> Result<Self> {
        let segments: Vec<&str> = path.split('/').skip_while(|segment| segment.is_empty()).collect();
        match segments.as_slice() {
            [] => return Ok(Self::Root),
            ["healthz" | "status"] => return Ok(Self::Health),
            _ => {}
        }
        let nothing = || Error::NotFound(format!("not found. This is {HELP}"));
        let keyword = segments.iter().position(|segment| matches!(*segment, "cas" | "ac" | "cache"));
        let (instance, rest) = segments.split_at(keyword.ok_or_else(nothing)?);
        let instance_name = instance.join("/");
        match rest {
            ["cache", key @ ..] => {
                let key = key.join("/");
                let refuse = || Error::Invalid(format!("a key may have at most {MAX_KEY_BYTES} bytes"));
                (key.len() <= MAX_KEY_BYTES).then_some(Self::Value { instance_name, key }).ok_or_else(refuse)
            }
            ["cas", hash @ ..] => Ok(Self::Blob { instance_name, hash: parse_hash(hash)? }),
            ["ac", hash @ ..] => Ok(Self::Result { instance_name, hash: parse_hash(hash)? }),
            _ => Err(nothing()),
        }
    }

    /// The instance name, for resources within an instance.
    pub fn instance_name(&self) -> Option<&str> {
        match self {
            Self::Root | Self::Health => None,
            Self::Blob { instance_name, .. }
            | Self::Result { instance_name, .. }
            | Self::Value { instance_name, .. } => Some(instance_name),
        }
    }
}

/// Parses a hash. Its function is the segment before it, or follows from its length, as in ByteStream names.
fn parse_hash(segments: &[&str]) -> Result<HashInPath> {
    let (function, hash, function_is_named) = match segments {
        [hash] => (DigestFunction::infer(DigestFunction::ALL, hash.len())?, hash, false),
        [name, hash] => {
            let named = DigestFunction::ALL.iter().find(|function| function.name() == *name);
            let unknown = || Error::Invalid(format!("\"{}\" is not a digest function", name.escape_debug()));
            (*named.ok_or_else(unknown)?, hash, true)
        }
        _ => return Err(Error::invalid("the path must end with one hash")),
    };
    Ok(HashInPath { like: Digest::parse(function, hash, 0)?, function_is_named })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HASH: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn paths_are_taken_apart_at_their_keyword() {
        for (path, instance) in [("", ""), ("/main", "main"), ("/a/b", "a/b"), ("//a", "a")] {
            let blob = Resource::parse(&format!("{path}/cas/{HASH}")).unwrap();
            assert!(
                matches!(&blob, Resource::Blob { instance_name, .. } if instance_name == instance),
                "{blob:?}"
            );
            let named = Resource::parse(&format!("{path}/cas/blake3/{HASH}")).unwrap();
            assert!(matches!(named, Resource::Blob { hash, .. } if hash.function_is_named));
            let result = Resource::parse(&format!("{path}/ac/{HASH}")).unwrap();
            assert_eq!(result.instance_name(), Some(instance));
            let value = Resource::parse(&format!("{path}/cache/ac/0/x")).unwrap();
            assert_eq!(value, Resource::Value { instance_name: instance.into(), key: "ac/0/x".into() });
        }
        for (path, key) in [("/cache", ""), ("/main/cache/", ""), ("/cache/a/b/", "a/b/"), ("/cache//", "/")]
        {
            let value = Resource::parse(path).unwrap();
            assert!(
                matches!(&value, Resource::Value { key: named, .. } if named == key),
                "{path}: {value:?}"
            );
        }
        assert_eq!(Resource::parse("/").unwrap(), Resource::Root);
        assert_eq!(Resource::parse("/healthz").unwrap(), Resource::Health);
    }

    #[test]
    fn what_names_nothing_or_no_hash_is_refused() {
        for path in ["/x", "/metrics", "/CAS/1", "/blobs/1"] {
            assert!(matches!(Resource::parse(path), Err(Error::NotFound(_))), "{path}");
        }
        let upper = HASH.to_uppercase();
        let long = "k".repeat(MAX_KEY_BYTES + 1);
        for path in [
            "/cas".into(),
            "/cas/".into(),
            "/cas/..".into(),
            "/ac/zz".into(),
            format!("/cas/{upper}"),
            format!("/cas/{HASH}/1"),
            format!("/cas/{HASH}/"),
            format!("/cas/nonsense/{HASH}"),
            format!("/cache/{long}"),
            format!("/cache/{long}/"),
        ] {
            assert!(matches!(Resource::parse(&path), Err(Error::Invalid(_))), "{path}");
        }
    }
}
