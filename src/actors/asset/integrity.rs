//! Subresource integrity: the `checksum.sri` qualifier (AST-04). Pure.

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use gorego_reapi::error::{Error, Result};
use sha2::{Digest as _, Sha256, Sha384, Sha512};

/// Checksums of which content has to match at least one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Integrity(Vec<(Algorithm, Vec<u8>)>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Algorithm {
    Sha256,
    Sha384,
    Sha512,
}

impl Algorithm {
    const ALL: [(Self, &str, usize); 3] =
        [(Self::Sha256, "sha256", 32), (Self::Sha384, "sha384", 48), (Self::Sha512, "sha512", 64)];
}

impl Integrity {
    /// Parses `algorithm-base64` values separated by whitespace. Options after a "?" are ignored.
    ///
    /// # Errors
    /// `Invalid` for a malformed value, for an algorithm other than sha256, sha384 and sha512, and without any value.
    pub fn parse(text: &str) -> Result<Self> {
        let mut checksums = Vec::new();
        for value in text.split_ascii_whitespace() {
            let refuse = |problem: &str| {
                Error::Invalid(format!("qualifier checksum.sri: \"{}\" {problem}", value.escape_debug()))
            };
            let (name, rest) =
                value.split_once('-').ok_or_else(|| refuse("is not of the form algorithm-base64"))?;
            let (algorithm, _, length) = (Algorithm::ALL.into_iter())
                .find(|(_, known, _)| *known == name)
                .ok_or_else(|| refuse("names none of sha256, sha384 and sha512"))?;
            let encoded = rest.split('?').next().unwrap_or_default();
            let hash = BASE64.decode(encoded).ok().filter(|hash| hash.len() == length);
            checksums
                .push((algorithm, hash.ok_or_else(|| refuse("has no base64 hash of the right length"))?));
        }
        if checksums.is_empty() {
            return Err(Error::invalid("qualifier checksum.sri is empty"));
        }
        Ok(Self(checksums))
    }

    /// Creates a hasher, which must get every byte of the content.
    pub fn witness(&self) -> Witness {
        let asks = |wanted| self.0.iter().any(|(algorithm, _)| *algorithm == wanted);
        Witness {
            sha256: asks(Algorithm::Sha256).then(Sha256::new),
            sha384: asks(Algorithm::Sha384).then(Sha384::new),
            sha512: asks(Algorithm::Sha512).then(Sha512::new),
        }
    }

    /// Whether the content that was hashed with [`Self::witness`] matches one of the checksums.
    pub fn is_met_by(&self, witness: Witness) -> bool {
        let seen = [
            (Algorithm::Sha256, witness.sha256.map(|state| state.finalize().to_vec())),
            (Algorithm::Sha384, witness.sha384.map(|state| state.finalize().to_vec())),
            (Algorithm::Sha512, witness.sha512.map(|state| state.finalize().to_vec())),
        ];
        self.0.iter().any(|(algorithm, hash)| {
            seen.iter().any(|(seen_by, seen)| seen_by == algorithm && seen.as_ref() == Some(hash))
        })
    }
}

/// Hashes content with the algorithms of an [`Integrity`]. The default one hashes nothing.
#[derive(Debug, Clone, Default)]
pub struct Witness {
    sha256: Option<Sha256>,
    sha384: Option<Sha384>,
    sha512: Option<Sha512>,
}

impl Witness {
    /// Hashes the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        if let Some(state) = &mut self.sha256 {
            state.update(bytes);
        }
        if let Some(state) = &mut self.sha384 {
            state.update(bytes);
        }
        if let Some(state) = &mut self.sha512 {
            state.update(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sri(name: &str, hash: &[u8]) -> String {
        format!("{name}-{}", BASE64.encode(hash))
    }

    /// AST-04.
    #[test]
    fn any_of_several_checksums_is_enough() {
        let right256 = sri("sha256", &Sha256::digest(b"hello"));
        let right384 = sri("sha384", &Sha384::digest(b"hello"));
        let right512 = sri("sha512", &Sha512::digest(b"hello"));
        let wrong = sri("sha256", &[7; 32]);
        let met = |text: &str| {
            let integrity = Integrity::parse(text).unwrap();
            let mut witness = integrity.witness();
            witness.update(b"hel");
            witness.update(b"lo");
            integrity.is_met_by(witness)
        };
        for right in [right256, right384, right512] {
            assert!(met(&right));
            assert!(met(&format!("{right}?option")));
            assert!(met(&format!(" {wrong}\t{right}\n")));
        }
        assert!(!met(&wrong));
    }

    #[test]
    fn malformed_and_weak_checksums_are_refused() {
        let short = sri("sha256", &[7; 31]);
        for text in ["", " ", "sha256", "sha256-", "sha256-!", "md5-AAAA", "sha1-AAAA", &short] {
            assert!(Integrity::parse(text).is_err(), "{text:?}");
        }
    }
}
