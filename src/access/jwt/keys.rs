//! [`KeySet`]: the public keys of an issuer (a JWKS, RFC 7517). Pure.
//!
//! Keys that cannot be used here are left out and listed with the reason: keys for encryption, symmetric keys, and keys
//! that are too short or of an unknown kind. A set without any usable key is an error, so that a wrong file does not
//! replace a right one.

use super::{
    algorithm::{KeyKind, SignatureAlgorithm},
    json::StrictObject,
    refusal::shown,
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::DecodingKey;
use serde_json::{Map, Value};

/// Maximum size of a key set in bytes. A key takes about 2 KiB with its certificates.
pub const MAX_KEY_SET_BYTES: usize = 256 * 1024;
/// Maximum number of keys in a set. Large issuers publish about ten.
pub const MAX_KEYS: usize = 64;
/// Maximum length of a key id in bytes.
pub(super) const MAX_KEY_ID_BYTES: usize = 256;
/// The allowed lengths of RSA keys in bits, which are those that `ring` accepts.
const RSA_BITS: std::ops::RangeInclusive<usize> = 2048..=8192;
/// Maximum number of reasons that are listed for a set without a usable key.
const NAMED_REASONS: usize = 4;

/// A set of public keys; see the top of this file.
#[derive(Debug)]
pub struct KeySet {
    keys: Vec<VerificationKey>,
    left_out: Vec<String>,
}

/// A public key of an issuer, with which signatures are checked.
#[derive(Debug)]
pub(super) struct VerificationKey {
    id: Option<String>,
    kind: KeyKind,
    /// The algorithm to which the key set restricts this key, if any.
    algorithm: Option<SignatureAlgorithm>,
    pub(super) key: DecodingKey,
}

impl KeySet {
    /// Parses a JWKS document.
    ///
    /// # Errors
    /// Why the document is not valid, or has no usable key.
    pub fn parse(document: &[u8]) -> Result<Self, String> {
        if document.len() > MAX_KEY_SET_BYTES {
            return Err(format!("the key set is larger than {MAX_KEY_SET_BYTES} bytes"));
        }
        let document = StrictObject::parse(document)
            .map_err(|problem| format!("the key set is not JSON of the right form: {problem}"))?;
        let Some(Value::Array(all)) = document.get("keys") else {
            return Err("the key set has no list \"keys\"".into());
        };
        if all.len() > MAX_KEYS {
            return Err(format!("the key set has {} keys, more than {MAX_KEYS}", all.len()));
        }
        let mut set = Self { keys: Vec::new(), left_out: Vec::new() };
        for (number, jwk) in all.iter().enumerate() {
            match VerificationKey::from_jwk(jwk) {
                Ok(key) => set.keys.push(key),
                Err(problem) => {
                    let id = jwk.get("kid").and_then(Value::as_str).map(shown).unwrap_or_default();
                    set.left_out.push(format!("key {} \"{id}\" {problem}", number + 1));
                }
            }
        }
        if set.keys.is_empty() {
            let reasons: Vec<_> = set.left_out.iter().take(NAMED_REASONS).map(String::as_str).collect();
            return Err(format!("the key set has no key that can be used here: {}", reasons.join("; ")));
        }
        Ok(set)
    }

    /// The number of usable keys; at least 1.
    pub fn count(&self) -> usize {
        self.keys.len()
    }

    /// The keys that cannot be used here, each with the reason.
    pub fn left_out(&self) -> &[String] {
        &self.left_out
    }

    /// The keys that may have signed a token with this algorithm and key id.
    ///
    /// # Errors
    /// Why there is none. For a token without a key id, the set must have only one key of its kind.
    pub(super) fn candidates(
        &self,
        id: Option<&str>,
        algorithm: SignatureAlgorithm,
    ) -> Result<Vec<&VerificationKey>, MissingKey> {
        if id.is_some() && !self.keys.iter().any(|key| key.id.as_deref() == id) {
            return Err(MissingKey::Unknown);
        }
        let fits = |key: &&VerificationKey| {
            key.kind == algorithm.key()
                && key.algorithm.is_none_or(|only| only == algorithm)
                && (id.is_none() || key.id.as_deref() == id)
        };
        let fitting: Vec<_> = self.keys.iter().filter(fits).collect();
        match fitting.len() {
            0 => Err(MissingKey::OtherAlgorithm),
            1 => Ok(fitting),
            _ if id.is_some() => Ok(fitting),
            _ => Err(MissingKey::Ambiguous),
        }
    }
}

/// Why no key matches a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MissingKey {
    /// No key has the id.
    Unknown,
    /// The key is for another algorithm.
    OtherAlgorithm,
    /// The token names no key, and several match.
    Ambiguous,
}

impl VerificationKey {
    /// Parses a key. The errors are the part of a sentence that follows the name of the key.
    fn from_jwk(jwk: &Value) -> Result<Self, String> {
        let Value::Object(jwk) = jwk else { return Err("is not an object".into()) };
        check_purpose(jwk)?;
        let id = text(jwk, "kid")?;
        if id.is_some_and(|id| id.is_empty() || id.len() > MAX_KEY_ID_BYTES) {
            return Err(format!("has an id that is empty or longer than {MAX_KEY_ID_BYTES} bytes"));
        }
        let (kind, key) = match (text(jwk, "kty")?, text(jwk, "crv")?) {
            (Some("RSA"), _) => (KeyKind::Rsa, rsa(jwk)?),
            (Some("EC"), Some("P-256")) => (KeyKind::P256, point(jwk, 32)?),
            (Some("EC"), Some("P-384")) => (KeyKind::P384, point(jwk, 48)?),
            (Some("OKP"), Some("Ed25519")) => {
                (KeyKind::Ed25519, DecodingKey::from_ed_der(&coordinate(jwk, "x", 32)?))
            }
            (Some("oct"), _) => return Err("is symmetric; tokens need a public key".into()),
            (Some(kind), curve) => {
                let curve = curve.map(shown).unwrap_or_default();
                return Err(format!("is of an unknown kind: {} {curve}", shown(kind)));
            }
            (None, _) => return Err("has no kty".into()),
        };
        let algorithm = match text(jwk, "alg")? {
            None => None,
            Some(name) => Some(
                SignatureAlgorithm::from_name(name)
                    .filter(|algorithm| algorithm.key() == kind)
                    .ok_or_else(|| format!("is for the algorithm {}", shown(name)))?,
            ),
        };
        Ok(Self { id: id.map(str::to_owned), kind, algorithm, key })
    }
}

/// Refuses keys that are not for checking signatures, and keys that must not be in a public set.
fn check_purpose(jwk: &Map<String, Value>) -> Result<(), String> {
    if jwk.contains_key("d") {
        return Err("is a private key; publish only its public part, and replace the key".into());
    }
    match text(jwk, "use")? {
        None | Some("sig") => {}
        Some(_) => return Err("is not for signatures".into()),
    }
    match jwk.get("key_ops") {
        None => Ok(()),
        Some(Value::Array(all)) if all.iter().any(|one| one.as_str() == Some("verify")) => Ok(()),
        Some(_) => Err("is not for checking signatures".into()),
    }
}

fn rsa(jwk: &Map<String, Value>) -> Result<DecodingKey, String> {
    let (modulus, exponent) = (number(jwk, "n")?, number(jwk, "e")?);
    let bits = modulus.len() * 8 - modulus.first().map_or(0, |byte| byte.leading_zeros() as usize);
    if !RSA_BITS.contains(&bits) {
        let (least, most) = (RSA_BITS.start(), RSA_BITS.end());
        return Err(format!("has {bits} bits; an RSA key needs {least} to {most}"));
    }
    Ok(DecodingKey::from_rsa_raw_components(&modulus, &exponent))
}

/// A point of a curve, uncompressed.
fn point(jwk: &Map<String, Value>, length: usize) -> Result<DecodingKey, String> {
    let mut point = vec![4];
    point.extend(coordinate(jwk, "x", length)?);
    point.extend(coordinate(jwk, "y", length)?);
    Ok(DecodingKey::from_ec_der(&point))
}

fn coordinate(jwk: &Map<String, Value>, name: &str, length: usize) -> Result<Vec<u8>, String> {
    let bytes = decoded(jwk, name)?;
    if bytes.len() == length { Ok(bytes) } else { Err(format!("has an {name} of the wrong length")) }
}

/// A number without leading zeros.
fn number(jwk: &Map<String, Value>, name: &str) -> Result<Vec<u8>, String> {
    let bytes = decoded(jwk, name)?;
    let first = bytes.iter().position(|byte| *byte != 0).unwrap_or(bytes.len());
    Ok(bytes[first..].to_vec())
}

fn decoded(jwk: &Map<String, Value>, name: &str) -> Result<Vec<u8>, String> {
    let encoded = text(jwk, name)?.ok_or_else(|| format!("has no {name}"))?;
    URL_SAFE_NO_PAD.decode(encoded).map_err(|_| format!("has an {name} that is not base64url"))
}

fn text<'a>(jwk: &'a Map<String, Value>, name: &str) -> Result<Option<&'a str>, String> {
    match jwk.get(name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(format!("has a {name} that is not a string")),
    }
}
