//! [`ImageDigest`]: the name of a manifest, a configuration or a layer, such as `sha256:ab12...`. Pure.

use sha2::{Digest as _, Sha256, Sha512};
use std::{fmt, str::FromStr};

/// A hash function of image digests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum ImageHash {
    Sha256,
    Sha512,
}

impl ImageHash {
    /// All functions, each with its name and the number of its hexadecimal digits.
    const ALL: [(Self, &str, usize); 2] = [(Self::Sha256, "sha256", 64), (Self::Sha512, "sha512", 128)];

    fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        }
    }
}

/// A digest with a supported algorithm, written as `ALGORITHM:HEX`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageDigest {
    algorithm: ImageHash,
    /// The hash in lower-case hexadecimal digits.
    hex: String,
}

impl ImageDigest {
    /// The digest of bytes in memory.
    #[cfg(test)]
    pub fn of(bytes: &[u8]) -> Self {
        let mut hasher = Hasher::Sha256(Sha256::new());
        hasher.update(bytes);
        hasher.finish()
    }

    /// The name of its hash function.
    pub fn algorithm(&self) -> &'static str {
        self.algorithm.name()
    }

    /// The hash in hexadecimal digits.
    pub fn hex(&self) -> &str {
        &self.hex
    }

    /// A hasher for checking content against this digest.
    pub fn hasher(&self) -> Hasher {
        match self.algorithm {
            ImageHash::Sha256 => Hasher::Sha256(Sha256::new()),
            ImageHash::Sha512 => Hasher::Sha512(Sha512::new()),
        }
    }

    /// Whether the hasher's content has this digest.
    pub fn is_of(&self, content: &[u8]) -> bool {
        let mut hasher = self.hasher();
        hasher.update(content);
        hasher.finish() == *self
    }
}

impl FromStr for ImageDigest {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let known = text.split_once(':').and_then(|(name, hex)| {
            let (algorithm, _, digits) = ImageHash::ALL.into_iter().find(|(_, known, _)| *known == name)?;
            let is_hex = hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
            (is_hex && hex.len() == digits).then(|| Self { algorithm, hex: hex.to_owned() })
        });
        known.ok_or_else(|| {
            let shown: String = text.escape_debug().take(160).collect();
            format!("\"{shown}\" is not a digest (sha256: and 64 hexadecimal digits, or sha512: and 128)")
        })
    }
}

impl fmt::Display for ImageDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm.name(), self.hex)
    }
}

/// An incremental hash computation.
#[derive(Debug, Clone)]
pub enum Hasher {
    /// A computation of SHA-256.
    Sha256(Sha256),
    /// A computation of SHA-512.
    Sha512(Sha512),
}

impl Hasher {
    /// Adds the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(state) => state.update(bytes),
            Self::Sha512(state) => state.update(bytes),
        }
    }

    /// The digest of all bytes.
    pub fn finish(self) -> ImageDigest {
        match self {
            Self::Sha256(state) => {
                ImageDigest { algorithm: ImageHash::Sha256, hex: const_hex::encode(state.finalize()) }
            }
            Self::Sha512(state) => {
                ImageDigest { algorithm: ImageHash::Sha512, hex: const_hex::encode(state.finalize()) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_names_its_function_and_has_all_digits_in_lower_case() {
        let empty = format!("sha256:{}", const_hex::encode(Sha256::digest(b"")));
        let digest: ImageDigest = empty.parse().unwrap();
        assert!(digest.is_of(b"") && !digest.is_of(b"x"));
        assert_eq!(digest.to_string(), empty);
        let long: ImageDigest =
            format!("sha512:{}", const_hex::encode(Sha512::digest(b"abc"))).parse().unwrap();
        assert!(long.is_of(b"abc"));
        let (upper, short) = (empty.to_uppercase(), &empty[..70]);
        for bad in ["", "sha256:", "latest", &upper, short, &empty[7..], &empty.replace("sha256", "md5")] {
            assert!(bad.parse::<ImageDigest>().is_err(), "{bad}");
        }
    }
}
