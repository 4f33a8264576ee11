//! Signed tokens (JWT, OpenID Connect): verified with the public keys of their issuer, and mapped to roles.
//!
//! [`JwtVerifier`] is a thin shell: it selects the rules by the issuer and the audience of a token, and fetches keys
//! ([`cache`](self)). [`IssuerRules`] decides whether a token is accepted; the keys and the time are its arguments.
//! Everything in a token is hostile until its signature was checked: its length, its depth and the number of its parts
//! are bounded, and it cannot determine where keys are fetched.

mod algorithm;
mod cache;
mod claims;
mod download;
mod freshness;
mod issuer;
mod json;
mod keys;
mod location;
mod refusal;
mod signature;
#[cfg(test)]
mod tests;
mod token;

pub use algorithm::SignatureAlgorithm;
pub use cache::{KeyLog, KeySettings};
pub use claims::ClaimSettings;
pub use issuer::{ClaimRole, IssuerRules, IssuerSettings, MAX_LEEWAY};
pub use keys::{KeySet, MAX_KEY_SET_BYTES, MAX_KEYS};
pub use location::JwksLocation;
pub use refusal::{RefusalKind, TokenRefusal};
pub use token::MAX_TOKEN_BYTES;

use super::{
    authenticator::{SignedTokens, VerifiedToken},
    rejection::Rejection,
};
use cache::KeyCache;
use futures::future::{BoxFuture, FutureExt as _};
use refusal::shown;
use std::{sync::Arc, time::SystemTime};
use token::UnverifiedToken;
use tokio::runtime::Handle;

/// The settings of an issuer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JwtSettings {
    /// The rules for its tokens.
    pub rules: IssuerSettings,
    /// The location of its keys.
    pub keys: KeySettings,
}

/// Verifies tokens of all configured issuers. A reload creates a new verifier.
#[derive(Debug, Default)]
pub struct JwtVerifier {
    issuers: Vec<TrustedIssuer>,
}

#[derive(Debug)]
struct TrustedIssuer {
    rules: IssuerRules,
    keys: Arc<KeyCache>,
}

/// Checks the key files of issuers. Keys at URLs are not fetched.
///
/// # Errors
/// Which file cannot be used, and why.
pub(super) fn check_key_files(settings: &[JwtSettings]) -> Result<(), String> {
    for JwtSettings { rules, keys } in settings {
        if let JwksLocation::File(path) = &keys.location {
            download::read_file(path, None).map_err(|problem| unusable_keys(rules, keys, &problem))?;
        }
    }
    Ok(())
}

fn unusable_keys(rules: &IssuerSettings, keys: &KeySettings, problem: &str) -> String {
    format!("access.jwt \"{}\": jwks {}: {problem}", shown(&rules.issuer), keys.location)
}

impl JwtVerifier {
    /// Creates a verifier for these issuers. It reuses the keys of the `previous` verifier for issuers with the same
    /// settings.
    ///
    /// # Errors
    /// Which setting is wrong, or which file cannot be read.
    pub fn start(
        settings: &[JwtSettings],
        previous: Option<&Self>,
        now: SystemTime,
        runtime: &Handle,
        log: KeyLog,
    ) -> Result<Self, String> {
        let mut issuers: Vec<TrustedIssuer> = Vec::with_capacity(settings.len());
        for JwtSettings { rules, keys } in settings {
            let issuer = IssuerRules::new(rules).map_err(|problems| {
                let problems: Vec<_> =
                    problems.iter().map(|(key, problem)| format!("{key} {problem}")).collect();
                format!("access.jwt \"{}\": {}", shown(&rules.issuer), problems.join("; "))
            })?;
            let known = issuers.iter().chain(previous.into_iter().flat_map(|previous| &previous.issuers));
            let keys = match known.map(|issuer| &issuer.keys).find(|known| known.settings() == keys) {
                Some(known) => known.clone(),
                None => KeyCache::start(keys.clone(), now, runtime, log)
                    .map_err(|problem| unusable_keys(rules, keys, &problem))?,
            };
            issuers.push(TrustedIssuer { rules: issuer, keys });
        }
        Ok(Self { issuers })
    }

    /// Verifies a token.
    ///
    /// # Errors
    /// Why it is not accepted.
    pub async fn check(&self, token: &str, now: SystemTime) -> Result<VerifiedToken, TokenRefusal> {
        let token = UnverifiedToken::parse(token)?;
        let TrustedIssuer { rules, keys } = self.issuer_of(&token)?;
        rules.check_issued_for_us(&token)?;
        let unavailable = |reason| TokenRefusal::new(RefusalKind::KeysUnavailable, reason);
        let current = keys.current(now).await.map_err(unavailable)?;
        match rules.verify(&token, &current, now) {
            Err(refusal) if refusal.kind == RefusalKind::Key => match keys.newer(now).await {
                Some(newer) => rules.verify(&token, &newer, now),
                None => Err(refusal),
            },
            verified => verified,
        }
    }

    /// The issuer that a token names, with the rules for its audience. If no rules match the audience, returns the
    /// first rules of the issuer, which then report the mismatch.
    fn issuer_of(&self, token: &UnverifiedToken<'_>) -> Result<&TrustedIssuer, TokenRefusal> {
        let of_issuer = || self.issuers.iter().filter(|issuer| issuer.rules.issuer() == token.issuer);
        let found =
            of_issuer().find(|issuer| issuer.rules.is_audience_of(token)).or_else(|| of_issuer().next());
        found.ok_or_else(|| {
            let reason = format!("its issuer \"{}\" is not configured", shown(&token.issuer));
            TokenRefusal::new(RefusalKind::Issuer, reason)
        })
    }
}

impl SignedTokens for JwtVerifier {
    fn verify<'a>(
        &'a self,
        token: &'a str,
        now: SystemTime,
    ) -> BoxFuture<'a, Result<VerifiedToken, Rejection>> {
        async move { Ok(self.check(token, now).await?) }.boxed()
    }

    fn trusts(&self, mark: u64) -> bool {
        self.issuers.iter().any(|issuer| issuer.rules.mark() == mark)
    }
}

impl From<TokenRefusal> for Rejection {
    fn from(refusal: TokenRefusal) -> Self {
        match refusal.kind {
            RefusalKind::Malformed => Self::Malformed(refusal.message()),
            // The reason contains addresses in this server's network.
            RefusalKind::KeysUnavailable => Self::Unavailable(refusal.message()),
            RefusalKind::Expired | RefusalKind::NotYetValid => Self::Expired(refusal.message()),
            RefusalKind::Issuer | RefusalKind::Audience | RefusalKind::Algorithm | RefusalKind::Claims => {
                Self::Unaccepted(refusal.message())
            }
            RefusalKind::Key | RefusalKind::Signature => Self::Refused(refusal.message()),
        }
    }
}

/// Verifies a token of one issuer with these keys. For tests and fuzzing; a server uses [`JwtVerifier`].
///
/// # Errors
/// Why it is not accepted.
pub fn verify_with(
    rules: &IssuerRules,
    keys: &KeySet,
    token: &str,
    now: SystemTime,
) -> Result<VerifiedToken, TokenRefusal> {
    rules.verify(&UnverifiedToken::parse(token)?, keys, now)
}
