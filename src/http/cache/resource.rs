//! [`Resource`]: the thing that a path names in an instance. Pure. Paths are hostile until parsed here.

use gorego_reapi::{
    digest::{Digest, DigestFunction},
    error::{Error, Result},
};

/// Longest key of a value, in bytes.
pub const MAX_KEY_BYTES: usize = 1_024;

/// The parsed form of the end of a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resource<'a> {
    /// `cas/[function/]hash`: the blob with this hash.
    Blob(HashInPath),
    /// `ac/[function/]hash`: the action result of the Action with this hash.
    Result(HashInPath),
    /// `cache/key`: a value. The key is everything after the keyword, undecoded. An empty key, or one that ends with a
    /// slash, is a WebDAV collection.
    Value(&'a str),
}

/// A hash without a size, as a digest of size 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HashInPath {
    /// The hash, with the function that the path names or that its length implies.
    pub like: Digest,
    /// Whether the path names the function.
    pub function_is_named: bool,
}

impl<'a> Resource<'a> {
    /// Parses what follows a keyword of the cache in a path.
    ///
    /// # Errors
    /// `NotFound` for an unknown keyword; `Invalid` for a malformed hash or key.
    pub fn parse(keyword: &str, rest: &'a str) -> Result<Self> {
        match keyword {
            "cas" => Ok(Self::Blob(parse_hash(rest)?)),
            "ac" => Ok(Self::Result(parse_hash(rest)?)),
            "cache" if rest.len() <= MAX_KEY_BYTES => Ok(Self::Value(rest)),
            "cache" => Err(Error::Invalid(format!("a key may have at most {MAX_KEY_BYTES} bytes"))),
            _ => Err(Error::NotFound(format!("the cache has no \"{}\"", keyword.escape_debug()))),
        }
    }
}

/// Parses a hash. Its function is the segment before it, or follows from its length, as in ByteStream names.
fn parse_hash(path: &str) -> Result<HashInPath> {
    let segments: Vec<_> = path.split('/').collect();
    let (function, hash, function_is_named) = match segments.as_slice() {
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
    use crate::http::{cache::ROUTES, router::Router};

    const HASH: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    /// Parses a whole path with the instance that it names.
    fn parse<T>(path: &str, check: impl FnOnce(&str, Resource<'_>) -> T) -> Result<T> {
        let mut router = Router::default();
        router.mount(ROUTES, ());
        let (_, place) = router.find("PROPFIND", path).or_else(|_| router.find("GET", path)).unwrap();
        Resource::parse(place.keyword, place.rest).map(|resource| check(place.instance_name, resource))
    }

    #[test]
    fn a_path_names_an_instance_and_a_resource_in_it() {
        for (path, instance) in [("", ""), ("/main", "main"), ("/a/b", "a/b"), ("//a", "a")] {
            let hash = |function_is_named| {
                move |named: &str, resource: Resource<'_>| {
                    assert_eq!(named, instance);
                    let (Resource::Blob(hash) | Resource::Result(hash)) = resource else {
                        panic!("{resource:?}")
                    };
                    assert_eq!(hash.function_is_named, function_is_named);
                    matches!(resource, Resource::Blob(_))
                }
            };
            assert_eq!(parse(&format!("{path}/cas/{HASH}"), hash(false)), Ok(true));
            assert_eq!(parse(&format!("{path}/cas/blake3/{HASH}"), hash(true)), Ok(true));
            assert_eq!(parse(&format!("{path}/ac/{HASH}"), hash(false)), Ok(false));
            let value =
                |named: &str, value: Resource<'_>| (named == instance) && value == Resource::Value("ac/0/x");
            assert_eq!(parse(&format!("{path}/cache/ac/0/x"), value), Ok(true));
        }
        for (path, key) in [("/cache", ""), ("/main/cache/", ""), ("/cache/a/b/", "a/b/"), ("/cache//", "/")]
        {
            assert_eq!(parse(path, |_, value| value == Resource::Value(key)), Ok(true), "{path}");
        }
    }

    #[test]
    fn what_is_no_hash_or_too_long_a_key_is_refused() {
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
            assert!(matches!(parse(&path, |_, _| ()), Err(Error::Invalid(_))), "{path}");
        }
    }
}
