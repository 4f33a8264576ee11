//! Static tokens: [`TokenFile`] is the list of tokens without their secrets, and [`TokenSet`] finds the client of a
//! token. Pure, except for [`file`](mod@file), which reads and writes the list.
//!
//! A token is `gorego_ID_SECRET`: a public id, which may be logged, and 256 random bits. The list has the SHA-256 of
//! the whole token. A slow hash is not necessary, because an attacker cannot try 2^256 secrets.

pub mod file;

use super::{
    policy::Policy,
    principal::{Principal, PrincipalKind},
    rejection::Rejection,
    role::Role,
};
use gorego_reapi::{
    error::{Error, Result},
    escape::shown,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    sync::Arc,
    time::SystemTime,
};
use subtle::ConstantTimeEq as _;

/// The prefix of each token, by which people and secret scanners recognise one.
pub const PREFIX: &str = "gorego_";
/// Maximum number of tokens of a server.
pub const TOKENS_MAX: usize = 10_000;
/// Maximum length of a note in bytes.
pub const NOTE_MAX_BYTES: usize = 200;
/// The number of bytes of an id and of a secret.
const ID_BYTES: usize = 8;
const SECRET_BYTES: usize = 32;

/// A new token. It is shown once; the server keeps only its hash.
pub struct NewToken {
    /// The whole token, which is secret.
    pub text: String,
    /// The public id, which is also a part of the token.
    pub id: String,
    /// The SHA-256 of the whole token.
    pub sha256: [u8; 32],
}

impl fmt::Debug for NewToken {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "NewToken({})", self.id)
    }
}

impl NewToken {
    /// Creates a random token.
    ///
    /// # Errors
    /// `Internal` if the system has no random bytes.
    pub fn random() -> Result<Self> {
        let (mut id, mut secret) = ([0; ID_BYTES], [0; SECRET_BYTES]);
        for bytes in [&mut id[..], &mut secret[..]] {
            getrandom::fill(bytes)
                .map_err(|error| Error::Internal(format!("could not get random bytes: {error}")))?;
        }
        let id = const_hex::encode(id);
        let text = format!("{PREFIX}{id}_{}", const_hex::encode(secret));
        let sha256 = hash(&text);
        Ok(Self { text, id, sha256 })
    }
}

/// The first bytes of a hash. They distinguish two tokens with the same id.
fn mark(sha256: &[u8; 32]) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = *sha256;
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}

fn hash(token: &str) -> [u8; 32] {
    Sha256::digest(token.as_bytes()).into()
}

/// The id in a token; `None` if the text is not in the form of a static token.
pub fn id_of(token: &str) -> Option<&str> {
    let (id, secret) = token.strip_prefix(PREFIX)?.split_once('_')?;
    let is_hex = |text: &str, bytes: usize| {
        text.len() == 2 * bytes && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    };
    (is_hex(id, ID_BYTES) && is_hex(secret, SECRET_BYTES)).then_some(id)
}

/// The record of a token in the list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenRecord {
    /// The public id of the token.
    pub id: String,
    /// The SHA-256 of the whole token.
    #[serde(with = "hex_text")]
    pub sha256: [u8; 32],
    /// The names of its roles.
    pub roles: Vec<String>,
    /// When it was made.
    #[serde(with = "humantime_serde")]
    pub created: SystemTime,
    /// When it expires; `None` for never.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "humantime_serde")]
    pub expires: Option<SystemTime>,
    /// A note for people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub note: String,
}

/// Hashes as hexadecimal text.
mod hex_text {
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub(super) fn serialize<S: Serializer>(hash: &[u8; 32], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&const_hex::encode(hash))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[u8; 32], D::Error> {
        let text = String::deserialize(deserializer)?;
        const_hex::decode_to_array(&text).map_err(|_| D::Error::custom("sha256 is not 64 hexadecimal digits"))
    }
}

/// The list of tokens in its stored form.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenFile {
    /// The tokens in the order of their creation.
    #[serde(default, rename = "token", skip_serializing_if = "Vec::is_empty")]
    pub tokens: Vec<TokenRecord>,
}

impl TokenFile {
    /// Parses a list.
    ///
    /// # Errors
    /// `Invalid` if it is malformed or too long, or if an id is repeated.
    pub fn parse(text: &str) -> Result<Self> {
        let list: Self = toml::from_str(text).map_err(|error| Error::invalid(error.to_string().trim()))?;
        if list.tokens.len() > TOKENS_MAX {
            return Err(Error::Invalid(format!("it has more than {TOKENS_MAX} tokens")));
        }
        let mut ids = BTreeSet::new();
        match list.tokens.iter().find(|token| !ids.insert(&token.id)) {
            Some(twice) => {
                Err(Error::Invalid(format!("it has the token \"{}\" twice", twice.id.escape_debug())))
            }
            None => Ok(list),
        }
    }

    /// The text of the list.
    ///
    /// # Errors
    /// `Internal` if a time cannot be written.
    pub fn render(&self) -> Result<String> {
        const HEAD: &str = "# The static tokens of a goREgo server, by their hashes. `gorego token` changes this file, and removes other\n\
                            # comments. The server reads it again when it changes.\n\n";
        let text = toml::to_string(self).map_err(Error::internal)?;
        Ok(format!("{HEAD}{text}"))
    }

    /// Adds a token.
    ///
    /// # Errors
    /// `Precondition` if there are too many.
    pub fn add(&mut self, record: TokenRecord) -> Result<()> {
        if self.tokens.len() >= TOKENS_MAX {
            return Err(Error::Precondition(format!(
                "there are {TOKENS_MAX} tokens, the most that are allowed; revoke some"
            )));
        }
        self.tokens.push(record);
        Ok(())
    }

    /// Removes tokens by their ids.
    ///
    /// # Errors
    /// `NotFound` if an id is not in the list. The list is then not changed.
    pub fn revoke(&mut self, ids: &[String]) -> Result<Vec<TokenRecord>> {
        if let Some(unknown) = ids.iter().find(|id| !self.tokens.iter().any(|token| token.id == **id)) {
            return Err(Error::NotFound(format!(
                "there is no token \"{}\"; `gorego token list` shows all",
                shown(unknown)
            )));
        }
        let (gone, kept) =
            std::mem::take(&mut self.tokens).into_iter().partition(|token| ids.contains(&token.id));
        self.tokens = kept;
        Ok(gone)
    }
}

/// The tokens of a server with their principals.
#[derive(Debug, Default)]
pub struct TokenSet(HashMap<String, KnownToken>);

#[derive(Debug)]
struct KnownToken {
    sha256: [u8; 32],
    /// The principal of the token, or why the token cannot be used.
    principal: std::result::Result<Principal, String>,
}

impl TokenSet {
    /// The tokens of a list, with the roles that the policy gives them. A token with an unknown role is refused when it
    /// is used.
    pub fn new(list: &TokenFile, policy: &Policy) -> Self {
        let known = |token: &TokenRecord| {
            let roles = policy.roles_named(&token.roles).map_err(|error| error.to_string());
            let roles: std::result::Result<Vec<Arc<Role>>, String> =
                roles.map(|roles| roles.into_iter().chain(policy.everybody().iter().cloned()).collect());
            let principal = roles.map(|roles| {
                Principal::marked(PrincipalKind::Token, &token.id, roles, token.expires, mark(&token.sha256))
            });
            (token.id.clone(), KnownToken { sha256: token.sha256, principal })
        };
        Self(list.tokens.iter().map(known).collect())
    }

    /// The principal of a token.
    ///
    /// # Errors
    /// Why it is refused. Only the holder of the whole token learns more than that it is not valid.
    pub fn verify(&self, token: &str, now: SystemTime) -> std::result::Result<Principal, Rejection> {
        let unknown = || {
            Rejection::refused(
                "the token is not valid here; it may have been revoked, or created only seconds ago",
            )
        };
        let id = id_of(token).ok_or_else(unknown)?;
        let known = self.0.get(id).ok_or_else(unknown)?;
        if !bool::from(known.sha256.ct_eq(&hash(token))) {
            return Err(unknown());
        }
        let principal = known.principal.as_ref();
        let principal =
            principal.map_err(|why| Rejection::refused(format!("the token {id} cannot be used: {why}")))?;
        if principal.expires().is_some_and(|expires| expires <= now) {
            return Err(Rejection::Expired(format!(
                "the token {id} has expired; ask the operator of this server for a new one"
            )));
        }
        Ok(principal.clone())
    }

    /// The principal of the token with this id, if the token is still valid.
    pub fn principal(&self, id: &str) -> Option<&Principal> {
        self.0.get(id)?.principal.as_ref().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn record(token: &NewToken, roles: &[&str], expires: Option<u64>) -> TokenRecord {
        TokenRecord {
            id: token.id.clone(),
            sha256: token.sha256,
            roles: roles.iter().map(ToString::to_string).collect(),
            created: at(5),
            expires: expires.map(at),
            note: "a \"note\"".into(),
        }
    }

    #[test]
    fn a_token_is_valid_until_it_expires_or_is_revoked() {
        let [limited, unlimited, odd, other] = std::array::from_fn(|_| NewToken::random().unwrap());
        let mut list = TokenFile::default();
        list.add(record(&limited, &["ci"], Some(100))).unwrap();
        list.add(record(&unlimited, &["reader", "worker"], None)).unwrap();
        list.add(record(&odd, &["nobody"], None)).unwrap();
        let policy = Policy::with_roles([], &["reader"]);
        let set = TokenSet::new(&list, &policy);
        let principal = set.verify(&limited.text, at(99)).unwrap();
        assert_eq!(principal.name(), format!("token:{}", limited.id));
        assert_eq!(principal.expires(), Some(at(100)));
        assert_eq!(principal.roles().iter().map(|role| &*role.name).collect::<Vec<_>>(), ["ci", "reader"]);
        assert!(set.verify(&unlimited.text, at(1 << 40)).is_ok());
        let why = |token: &str, now| set.verify(token, at(now)).unwrap_err().to_string();
        assert!(why(&limited.text, 100).contains("expired"));
        assert!(why(&odd.text, 1).contains("no role \"nobody\""));
        let mixed = format!("{PREFIX}{}_{}", limited.id, other.text.rsplit('_').next().unwrap());
        for wrong in [&other.text, &mixed, "", PREFIX, "gorego__", &limited.text.to_uppercase()] {
            assert!(why(wrong, 1).contains("not valid here"), "{wrong}");
        }
        assert!(list.revoke(&[limited.id.clone(), "x".into()]).is_err());
        assert_eq!(list.tokens.len(), 3);
        assert_eq!(list.revoke(std::slice::from_ref(&limited.id)).unwrap().len(), 1);
        assert!(TokenSet::new(&list, &policy).verify(&limited.text, at(99)).is_err());
    }

    #[test]
    fn the_list_has_no_secret_and_reads_back_as_it_was_written() {
        let [one, other] = std::array::from_fn(|_| NewToken::random().unwrap());
        let tokens = vec![record(&one, &["ci"], Some(100)), record(&other, &[], None)];
        let list = TokenFile { tokens };
        let text = list.render().unwrap();
        assert_eq!(TokenFile::parse(&text).unwrap(), list);
        assert_eq!(TokenFile::parse(&TokenFile::default().render().unwrap()).unwrap(), TokenFile::default());
        let secret = one.text.rsplit('_').next().unwrap();
        assert!(!text.contains(secret) && !format!("{one:?}").contains(secret));
        let twice = TokenFile { tokens: vec![list.tokens[0].clone(), list.tokens[0].clone()] };
        assert!(TokenFile::parse(&twice.render().unwrap()).unwrap_err().to_string().contains("twice"));
        assert!(TokenFile::parse("[[token]]\nid = \"a\"\n").is_err());
    }

    #[test]
    fn secrets_have_256_random_bits_and_ids_do_not_repeat() {
        let tokens: Vec<_> = (0..100).map(|_| NewToken::random().unwrap()).collect();
        assert_eq!(tokens.iter().map(|token| &token.id).collect::<BTreeSet<_>>().len(), 100);
        assert!(tokens.iter().all(|token| token.text.rsplit('_').next().unwrap().len() * 4 == 256));
        assert!(tokens.iter().all(|token| id_of(&token.text) == Some(token.id.as_str())));
    }

    proptest! {
        #[test]
        fn no_text_is_too_strange_to_be_refused(token in "(gorego_)?[0-9a-f_\\PC]{0,100}") {
            prop_assert!(TokenSet::default().verify(&token, at(1)).is_err());
        }
    }
}
