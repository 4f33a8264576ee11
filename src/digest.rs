//! Digests: the names of blobs.
//!
//! A [`Digest`] in hand is valid: its hash has the length of its function and its size fits the wire's `int64`. Parsing
//! from the wire happens once, here; nothing folds case or guesses (GEN-01..05).

use crate::{
    error::{Error, Result},
    proto::reapi,
};
use sha2::{Digest as _, Sha256};
use std::fmt;

/// Longest hash of any supported function, in bytes.
const MAX_HASH_BYTES: usize = 32;

/// A function that makes hashes out of blobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DigestFunction {
    /// SHA-256, the default of every client.
    Sha256,
}

impl DigestFunction {
    /// Every function that this build supports, the preferred one first.
    pub const ALL: &[Self] = &[Self::Sha256];

    /// The function that a request means: the number it sent or, where that is 0, what the length of its hashes says
    /// (GEN-08, GEN-09).
    ///
    /// # Errors
    /// [`Error::Invalid`] when the number or the length belongs to no supported function.
    pub fn from_wire(number: i32, hash_chars: Option<usize>) -> Result<Self> {
        let found = match number {
            0 => match hash_chars {
                None => Some(Self::Sha256),
                Some(chars) => Self::ALL.iter().copied().find(|f| f.hash_bytes() * 2 == chars),
            },
            _ => Self::ALL.iter().copied().find(|f| f.wire() as i32 == number),
        };
        found.ok_or_else(|| match reapi::digest_function::Value::try_from(number) {
            Ok(reapi::digest_function::Value::Unknown) => Error::Invalid(format!(
                "no supported digest function has hashes of {} characters",
                hash_chars.unwrap_or(0)
            )),
            Ok(value) => {
                Error::Invalid(format!("digest function {} is not supported here", value.as_str_name()))
            }
            Err(_) => Error::Invalid(format!("digest function {number} is unknown")),
        })
    }

    /// The number of this function on the wire.
    pub const fn wire(self) -> reapi::digest_function::Value {
        match self {
            Self::Sha256 => reapi::digest_function::Value::Sha256,
        }
    }

    /// Length of a hash in bytes; half its length in hex characters.
    pub const fn hash_bytes(self) -> usize {
        match self {
            Self::Sha256 => 32,
        }
    }

    /// The segment that names this function in resource names; the legacy functions have none (BS-03).
    pub const fn resource_segment(self) -> Option<&'static str> {
        match self {
            Self::Sha256 => None,
        }
    }

    /// The name of this function in paths on disk and in messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
        }
    }

    /// A hasher for one blob.
    pub fn hasher(self) -> Hasher {
        match self {
            Self::Sha256 => Hasher { size: 0, state: State::Sha256(Sha256::new()) },
        }
    }

    /// The digest of bytes at hand.
    pub fn digest(self, bytes: &[u8]) -> Digest {
        let mut hasher = self.hasher();
        hasher.update(bytes);
        hasher.finish()
    }
}

/// Computes the [`Digest`] of a blob that arrives in pieces.
#[derive(Clone)]
pub struct Hasher {
    size: u64,
    state: State,
}

#[derive(Clone)]
enum State {
    Sha256(Sha256),
}

impl Hasher {
    /// Takes the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.size += bytes.len() as u64;
        match &mut self.state {
            State::Sha256(state) => state.update(bytes),
        }
    }

    /// How many bytes were taken so far.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The digest of everything taken.
    pub fn finish(self) -> Digest {
        match self.state {
            State::Sha256(state) => Digest::new(DigestFunction::Sha256, &state.finalize(), self.size),
        }
    }
}

impl fmt::Debug for Hasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hasher").field("size", &self.size).finish_non_exhaustive()
    }
}

/// The name of a blob: function, hash and size together (GEN-04).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest {
    function: DigestFunction,
    hash: [u8; MAX_HASH_BYTES],
    size: u64,
}

impl Digest {
    fn new(function: DigestFunction, bytes: &[u8], size: u64) -> Self {
        let mut hash = [0; MAX_HASH_BYTES];
        hash[..bytes.len()].copy_from_slice(bytes);
        Self { function, hash, size }
    }

    /// A digest from its parts as text and number.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the hash has the wrong length or anything but lower-case hex, or the size is negative.
    pub fn parse(function: DigestFunction, hash: &str, size: i64) -> Result<Self> {
        let mut bytes = [0; MAX_HASH_BYTES];
        if hash.len() != function.hash_bytes() * 2 {
            return Err(Error::Invalid(format!(
                "hash \"{}\" has {} characters; a {} hash has {}",
                hash.escape_debug(),
                hash.len(),
                function.name(),
                function.hash_bytes() * 2
            )));
        }
        // The decoder takes upper case too, which is no digest of this API (GEN-01).
        let lower_case = !hash.bytes().any(|byte| byte.is_ascii_uppercase());
        if !lower_case || const_hex::decode_to_slice(hash, &mut bytes[..function.hash_bytes()]).is_err() {
            return Err(Error::Invalid(format!(
                "hash \"{}\" is not lower-case hexadecimal",
                hash.escape_debug()
            )));
        }
        let size = u64::try_from(size)
            .map_err(|_| Error::Invalid(format!("digest {hash} has the negative size {size}")))?;
        Ok(Self { function, hash: bytes, size })
    }

    /// The digest in a wire message; `field` names it in errors. An absent message or an empty hash is an error, not the
    /// empty blob (GEN-05).
    ///
    /// # Errors
    /// [`Error::Invalid`] as above and as in [`Digest::parse`].
    pub fn from_wire(function: DigestFunction, digest: Option<&reapi::Digest>, field: &str) -> Result<Self> {
        match digest {
            Some(digest) if !digest.hash.is_empty() => Self::parse(function, &digest.hash, digest.size_bytes)
                .map_err(|error| Error::Invalid(format!("{field}: {error}"))),
            _ => Err(Error::Invalid(format!("{field} is not set"))),
        }
    }

    /// The wire form.
    pub fn to_wire(self) -> reapi::Digest {
        reapi::Digest { hash: self.hash_hex(), size_bytes: self.size as i64 }
    }

    /// The digest of the blob without bytes, which exists everywhere (GEN-06).
    pub fn empty(function: DigestFunction) -> Self {
        function.hasher().finish()
    }

    /// Whether this names the blob without bytes.
    pub fn is_empty(&self) -> bool {
        self.size == 0 && *self == Self::empty(self.function)
    }

    /// The function of the hash.
    pub fn function(&self) -> DigestFunction {
        self.function
    }

    /// The bytes of the hash.
    pub fn hash(&self) -> &[u8] {
        &self.hash[..self.function.hash_bytes()]
    }

    /// The hash as lower-case hex.
    pub fn hash_hex(&self) -> String {
        const_hex::encode(self.hash())
    }

    /// Size of the blob in bytes; at most `i64::MAX`.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// `blobs/[function/]hash/size`: the subject of a MISSING violation (EXE-23) and the tail of a resource name.
    pub fn blob_name(&self) -> String {
        match self.function.resource_segment() {
            Some(segment) => format!("blobs/{segment}/{self}"),
            None => format!("blobs/{self}"),
        }
    }
}

/// `hash/size`.
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

    #[test]
    fn the_empty_blob_has_its_well_known_digest() {
        assert_eq!(Digest::empty(DigestFunction::Sha256).to_string(), format!("{EMPTY}/0"));
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

    /// GEN-05.
    #[test]
    fn an_absent_digest_is_an_error_and_not_the_empty_blob() {
        for digest in [None, Some(&reapi::Digest::default())] {
            let error = Digest::from_wire(DigestFunction::Sha256, digest, "action_digest").unwrap_err();
            assert_eq!(error, Error::Invalid("action_digest is not set".into()));
        }
    }

    /// GEN-08, GEN-09.
    #[test]
    fn the_digest_function_is_taken_from_the_request_or_from_the_length_of_the_hash() {
        assert_eq!(DigestFunction::from_wire(0, Some(64)), Ok(DigestFunction::Sha256));
        assert_eq!(DigestFunction::from_wire(1, Some(64)), Ok(DigestFunction::Sha256));
        for (number, chars) in [(0, 40), (10, 64), (99, 64), (-1, 64)] {
            assert!(matches!(DigestFunction::from_wire(number, Some(chars)), Err(Error::Invalid(_))));
        }
    }
}
