//! Digests: the names of blobs.
//!
//! A [`Digest`] is valid by construction: its hash has the length of its function, and its size fits the wire's
//! `int64`. Digests from the wire are parsed only here. The parser never changes case and never guesses (GEN-01..05).

pub use hasher::Hasher;

mod hasher;
mod sha256_tree;

use crate::{
    error::{Error, Result},
    proto::reapi,
};
use serde::{Deserialize, Serialize};
use std::{fmt, hash};

/// Longest hash of any supported function, in bytes.
pub const MAX_HASH_BYTES: usize = 64;

/// A hash function for blobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DigestFunction {
    /// SHA-256, the default of every client.
    Sha256,
    /// BLAKE3 with 256 bits.
    Blake3,
    /// SHA-256 of each KiB, joined by a binary tree. A part of the blob can be checked without the rest.
    Sha256Tree,
    /// SHA-384, from the SHA-2 family.
    Sha384,
    /// SHA-512, from the SHA-2 family.
    Sha512,
    /// SHA-1. Collisions are feasible, so use it only for clients that support nothing else.
    Sha1,
    /// The digest of a git blob: SHA-1 of a header with the size, followed by the bytes.
    GitSha1,
    /// MD5. Collisions are easy, so use it only for clients that support nothing else.
    Md5,
}

impl DigestFunction {
    /// Every function that this build supports, in order of preference.
    pub const ALL: &[Self] = &[
        Self::Sha256,
        Self::Blake3,
        Self::Sha256Tree,
        Self::Sha384,
        Self::Sha512,
        Self::Sha1,
        Self::GitSha1,
        Self::Md5,
    ];

    /// The function with this number on the wire, whether or not it is enabled.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the number belongs to no function of this build (GEN-09).
    pub fn from_wire(number: i32) -> Result<Self> {
        Self::ALL.iter().copied().find(|function| function.wire() as i32 == number).ok_or_else(|| {
            match reapi::digest_function::Value::try_from(number) {
                Ok(value) => {
                    Error::Invalid(format!("digest function {} is not supported here", value.as_str_name()))
                }
                Err(_) => Error::Invalid(format!("digest function {number} is unknown")),
            }
        })
    }

    /// The function that a client means if it sends a hash of this length without naming a function. It is chosen
    /// `among` the enabled ones: the only function with this hash length or, if there are several, the one that is
    /// older than the `digest_function` field (GEN-08).
    ///
    /// # Errors
    /// [`Error::Invalid`] when no function matches, or several match and none is the older one.
    pub fn infer(among: &[Self], hash_chars: usize) -> Result<Self> {
        let fits = |function: &&Self| function.hash_bytes() * 2 == hash_chars;
        let mut fitting = among.iter().filter(fits);
        match (
            among.iter().filter(fits).find(|f| f.resource_segment().is_none()),
            fitting.next(),
            fitting.next(),
        ) {
            (Some(legacy), ..) => Ok(*legacy),
            (None, Some(only), None) => Ok(*only),
            (None, Some(one), Some(other)) => Err(Error::Invalid(format!(
                "a hash of {hash_chars} characters may be of {} or {}; set digest_function",
                one.name(),
                other.name()
            ))),
            (None, None, _) => Err(Error::Invalid(format!(
                "no supported digest function has hashes of {hash_chars} characters"
            ))),
        }
    }

    /// The number of this function on the wire.
    pub const fn wire(self) -> reapi::digest_function::Value {
        use reapi::digest_function::Value;
        match self {
            Self::Sha256 => Value::Sha256,
            Self::Blake3 => Value::Blake3,
            Self::Sha256Tree => Value::Sha256tree,
            Self::Sha384 => Value::Sha384,
            Self::Sha512 => Value::Sha512,
            Self::Sha1 => Value::Sha1,
            Self::GitSha1 => Value::Gitsha1,
            Self::Md5 => Value::Md5,
        }
    }

    /// Length of a hash in bytes. Its hexadecimal form is twice as long.
    pub const fn hash_bytes(self) -> usize {
        match self {
            Self::Md5 => 16,
            Self::Sha1 | Self::GitSha1 => 20,
            Self::Sha256 | Self::Blake3 | Self::Sha256Tree => 32,
            Self::Sha384 => 48,
            Self::Sha512 => 64,
        }
    }

    /// The segment that names this function in resource names; the legacy functions have none (BS-03).
    pub const fn resource_segment(self) -> Option<&'static str> {
        match self {
            Self::Blake3 | Self::Sha256Tree | Self::GitSha1 => Some(self.name()),
            Self::Sha256 | Self::Sha384 | Self::Sha512 | Self::Sha1 | Self::Md5 => None,
        }
    }

    /// The name of this function in the configuration, in paths on disk and in messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Blake3 => "blake3",
            Self::Sha256Tree => "sha256tree",
            Self::Sha384 => "sha384",
            Self::Sha512 => "sha512",
            Self::Sha1 => "sha1",
            Self::GitSha1 => "gitsha1",
            Self::Md5 => "md5",
        }
    }

    /// A hasher for one blob of `size` bytes. [`DigestFunction::GitSha1`] hashes the size before the bytes. If the blob
    /// turns out to have another size, the resulting digest shows that size, but its hash is not the hash of any blob.
    pub fn hasher(self, size: u64) -> Hasher {
        Hasher::new(self, size)
    }

    /// The digest of these bytes.
    pub fn digest(self, bytes: &[u8]) -> Digest {
        let mut hasher = self.hasher(bytes.len() as u64);
        hasher.update(bytes);
        hasher.finish()
    }
}

/// The name of a blob: function, hash and size together (GEN-04).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Digest {
    function: DigestFunction,
    hash: [u8; MAX_HASH_BYTES],
    size: u64,
}

/// Hashes the whole hash: clients choose the digests that they send and can make many with a common prefix. For the
/// same reason, tables of digests use the standard library's keyed SipHash; faster hashers do not resist deliberate
/// collisions.
impl hash::Hash for Digest {
    fn hash<H: hash::Hasher>(&self, state: &mut H) {
        state.write(self.hash());
        state.write_u64(self.size);
    }
}

impl Digest {
    fn new(function: DigestFunction, bytes: &[u8], size: u64) -> Self {
        let mut hash = [0; MAX_HASH_BYTES];
        hash[..bytes.len()].copy_from_slice(bytes);
        Self { function, hash, size }
    }

    /// Creates a digest from the bytes of a hash. Bytes beyond the length of a hash of `function` are not used, and a
    /// size that does not fit the wire becomes the largest one that does.
    pub fn from_array(function: DigestFunction, hash: [u8; MAX_HASH_BYTES], size: u64) -> Self {
        Self::new(function, &hash[..function.hash_bytes()], size.min(i64::MAX as u64))
    }

    /// Creates a digest from a hexadecimal hash and a size.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the hash has the wrong length or is not lower-case hex, or the size is negative.
    pub fn parse(function: DigestFunction, hash: &str, size: i64) -> Result<Self> {
        if hash.len() != function.hash_bytes() * 2 {
            return Err(Error::Invalid(format!(
                "the hash has {} characters; a {} hash has {}",
                hash.len(),
                function.name(),
                function.hash_bytes() * 2
            )));
        }
        let parsed = Self::from_hex(function, hash.as_bytes(), 0).ok_or_else(|| {
            Error::Invalid(format!("hash \"{}\" is not lower-case hexadecimal", hash.escape_debug()))
        })?;
        let size = u64::try_from(size)
            .map_err(|_| Error::Invalid(format!("digest {hash} has the negative size {size}")))?;
        Ok(Self { size, ..parsed })
    }

    /// Creates a digest from the bytes of its hash. `None` if their number is not the hash length of `function`, or the
    /// size does not fit the wire.
    pub fn from_hash(function: DigestFunction, hash: &[u8], size: u64) -> Option<Self> {
        let fits = hash.len() == function.hash_bytes() && i64::try_from(size).is_ok();
        fits.then(|| Self::new(function, hash, size))
    }

    /// Creates a digest from the characters of its hash. `None` if these are not a hash of `function` in lower-case
    /// hexadecimal, or the size does not fit the wire.
    pub(crate) fn from_hex(function: DigestFunction, hash: &[u8], size: u64) -> Option<Self> {
        let mut bytes = [0; MAX_HASH_BYTES];
        const_hex::decode_to_slice(hash, &mut bytes[..function.hash_bytes()]).ok()?;
        // The hex decoder also accepts upper case, which is not valid in digests (GEN-01). Of the accepted characters,
        // only letters have bit 6, and only lower-case letters also have bit 5.
        let has_upper_case = hash.iter().fold(false, |found, byte| found | (byte & 0x60 == 0x40));
        (!has_upper_case && i64::try_from(size).is_ok()).then_some(Self { function, hash: bytes, size })
    }

    /// The same hash and size as a digest of another function; `None` if its hashes have another length.
    pub(crate) fn with_function(self, function: DigestFunction) -> Option<Self> {
        (self.function.hash_bytes() == function.hash_bytes()).then_some(Self { function, ..self })
    }

    /// Parses the digest in a wire message; `field` names it in errors. An absent message or an empty hash is an error
    /// and never means the empty blob (GEN-05).
    ///
    /// # Errors
    /// [`Error::Invalid`] for an absent message or an empty hash, and as in [`Digest::parse`].
    pub fn from_wire(
        function: DigestFunction,
        digest: Option<&reapi::Digest>,
        field: impl fmt::Display,
    ) -> Result<Self> {
        match digest {
            Some(digest) if !digest.hash.is_empty() => Self::parse(function, &digest.hash, digest.size_bytes)
                .map_err(|error| Error::Invalid(format!("{field}: {error}"))),
            _ => Err(Error::Invalid(format!("{field} is not set"))),
        }
    }

    /// Converts to the wire message.
    pub fn to_wire(self) -> reapi::Digest {
        reapi::Digest { hash: self.hash_hex(), size_bytes: self.size as i64 }
    }

    /// The digest of the empty blob, which exists on every server (GEN-06).
    pub fn empty(function: DigestFunction) -> Self {
        function.digest(&[])
    }

    /// Whether this is the digest of the empty blob.
    pub fn is_empty(&self) -> bool {
        self.size == 0 && *self == Self::empty(self.function)
    }

    /// A hasher for bytes that are supposed to be this blob.
    pub fn hasher(&self) -> Hasher {
        self.function.hasher(self.size)
    }

    /// The function that computed the hash.
    pub fn function(&self) -> DigestFunction {
        self.function
    }

    /// The bytes of the hash.
    pub fn hash(&self) -> &[u8] {
        &self.hash[..self.function.hash_bytes()]
    }

    /// The hash in lower-case hexadecimal.
    pub fn hash_hex(&self) -> String {
        const_hex::encode(self.hash())
    }

    /// Size of the blob in bytes; at most `i64::MAX`.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// `blobs/[function/]hash/size`: the subject of a MISSING violation (EXE-23), and the end of a resource name.
    pub fn blob_name(&self) -> String {
        match self.function.resource_segment() {
            Some(segment) => format!("blobs/{segment}/{self}"),
            None => format!("blobs/{self}"),
        }
    }
}

/// Formats the digest as `hash/size`, with the hash in lower-case hexadecimal.
impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.hash_hex(), self.size)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    /// GEN-06, and section 0 of the rules.
    #[test]
    fn the_empty_blob_has_its_well_known_digest_under_every_function() {
        for (function, hash) in [
            (DigestFunction::Sha256, EMPTY),
            (DigestFunction::Sha256Tree, EMPTY),
            (DigestFunction::Blake3, "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"),
            (DigestFunction::Sha1, "da39a3ee5e6b4b0d3255bfef95601890afd80709"),
            (DigestFunction::GitSha1, "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"),
            (DigestFunction::Md5, "d41d8cd98f00b204e9800998ecf8427e"),
        ] {
            assert_eq!(Digest::empty(function).hash_hex(), hash);
        }
        for &function in DigestFunction::ALL {
            let empty = Digest::empty(function);
            assert!(empty.is_empty());
            assert_eq!(Digest::parse(function, &empty.hash_hex(), 0), Ok(empty));
            assert_eq!(empty.hash_hex().len(), function.hash_bytes() * 2);
        }
    }

    /// GEN-01, GEN-02, GEN-03.
    #[test]
    fn malformed_digests_are_refused_and_never_folded() {
        let parse = |hash: &str, size| Digest::parse(DigestFunction::Sha256, hash, size);
        assert!(parse(EMPTY, 0).is_ok());
        for (hash, size) in [
            (EMPTY.to_uppercase(), 0),
            (EMPTY[1..].to_owned(), 0),
            (format!("{EMPTY}0"), 0),
            (EMPTY.replace('e', "g"), 0),
            (format!("0x{}", &EMPTY[2..]), 0),
            (EMPTY.replacen("e3", "é", 1), 0),
            (String::new(), 0),
            (EMPTY.to_owned(), -1),
        ] {
            assert!(matches!(parse(&hash, size), Err(Error::Invalid(_))), "{hash} {size}");
        }
    }

    /// GEN-03.
    #[test]
    fn a_hash_of_any_length_has_a_short_error() {
        for length in [63, 64, 65, 16 * 1024 * 1024] {
            let error = Digest::parse(DigestFunction::Sha256, &"\u{7f}".repeat(length), 0).unwrap_err();
            assert!(error.to_string().len() < 1024, "{error}");
        }
    }

    /// Clients can ask for many digests with a common prefix.
    #[test]
    fn digests_that_differ_at_the_end_only_have_other_hashes_in_tables() {
        use std::hash::{BuildHasher as _, RandomState};
        let (state, start) = (RandomState::new(), "0".repeat(60));
        let digest = |n: u32| Digest::parse(DigestFunction::Sha256, &format!("{start}{n:04x}"), 1).unwrap();
        let hashes: std::collections::HashSet<u64> = (0..1_000).map(|n| state.hash_one(digest(n))).collect();
        assert_eq!(hashes.len(), 1_000);
    }

    /// GEN-05.
    #[test]
    fn an_absent_digest_is_an_error_and_not_the_empty_blob() {
        for digest in [None, Some(&reapi::Digest::default())] {
            let error = Digest::from_wire(DigestFunction::Sha256, digest, "action_digest").unwrap_err();
            assert_eq!(error, Error::Invalid("action_digest is not set".into()));
        }
    }

    /// GEN-08.
    #[test]
    fn an_unnamed_digest_function_is_inferred_from_the_hash_length() {
        use DigestFunction::{Blake3, GitSha1, Md5, Sha1, Sha256, Sha256Tree, Sha384, Sha512};
        for (chars, function) in [(32, Md5), (40, Sha1), (64, Sha256), (96, Sha384), (128, Sha512)] {
            assert_eq!(DigestFunction::infer(DigestFunction::ALL, chars), Ok(function));
        }
        assert_eq!(DigestFunction::infer(&[Blake3, GitSha1], 64), Ok(Blake3));
        assert_eq!(DigestFunction::infer(&[Blake3, GitSha1], 40), Ok(GitSha1));
        for (among, chars) in [(&[Blake3, Sha256Tree][..], 64), (&[Sha256], 40), (&[Sha256], 0), (&[], 64)] {
            assert!(
                matches!(DigestFunction::infer(among, chars), Err(Error::Invalid(_))),
                "{among:?} {chars}"
            );
        }
    }

    /// GEN-09.
    #[test]
    fn numbers_are_those_of_the_api_and_others_are_refused() {
        for &function in DigestFunction::ALL {
            assert_eq!(DigestFunction::from_wire(function.wire() as i32), Ok(function));
        }
        for number in [0, 4, 7, 11, 99, -1] {
            assert!(matches!(DigestFunction::from_wire(number), Err(Error::Invalid(_))), "{number}");
        }
    }
}
