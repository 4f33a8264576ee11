//! [`IssuerRules`]: decides which tokens of an issuer are accepted and which roles they give. Pure. The keys and the
//! time are arguments.

use super::{
    algorithm::SignatureAlgorithm,
    claims::{ClaimConditions, ClaimSettings},
    keys::{KeySet, MissingKey},
    refusal::{RefusalKind, TokenRefusal, shown},
    signature,
    token::{MAX_NAME_BYTES, UnverifiedToken},
};
use crate::access::authenticator::VerifiedToken;
use sha2::{Digest as _, Sha256};
use std::time::{Duration, SystemTime};

/// Maximum allowed difference between clocks. A larger one would make short-lived tokens long-lived.
pub const MAX_LEEWAY: Duration = Duration::from_secs(10 * 60);
/// Maximum number of audiences, and of role entries, of one issuer.
const MAX_ENTRIES: usize = 64;

/// The configured rules of an issuer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IssuerSettings {
    /// The exact value of `iss`.
    pub issuer: String,
    /// The accepted values of `aud`; a token needs one of them.
    pub audience: Vec<String>,
    /// The names of the accepted algorithms.
    pub algorithms: Vec<String>,
    /// Conditions on claims, all of which a token must meet.
    pub claims: ClaimSettings,
    /// The roles that tokens give.
    pub roles: Vec<ClaimRole>,
    /// How far the clocks of issuer and server may differ.
    pub leeway: Duration,
}

/// A role for the tokens that meet further conditions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClaimRole {
    /// The name of the role.
    pub role: String,
    /// The conditions. Without conditions, all accepted tokens get the role.
    pub claims: ClaimSettings,
}

/// The rules of an issuer; see the top of this file.
#[derive(Debug)]
pub struct IssuerRules {
    issuer: String,
    audiences: Vec<String>,
    algorithms: Vec<SignatureAlgorithm>,
    conditions: ClaimConditions,
    roles: Vec<(String, ClaimConditions)>,
    leeway: Duration,
    mark: u64,
}

impl IssuerRules {
    /// Checks the settings.
    ///
    /// # Errors
    /// All problems, each as a key and a description.
    pub fn new(settings: &IssuerSettings) -> Result<Self, Vec<(&'static str, String)>> {
        let mut problems = Vec::new();
        if settings.issuer.is_empty() || settings.issuer.len() > MAX_NAME_BYTES {
            problems.push(("issuer", "is missing; write the exact iss of the tokens".into()));
        }
        // Principals are named ISSUER#SUBJECT, and an issuer is a URL without a fragment (OpenID Connect Core, section
        // 2).
        if settings.issuer.contains('#') {
            problems.push(("issuer", "contains \"#\", which an issuer must not contain".into()));
        }
        let is_text = |text: &String| !text.is_empty() && text.len() <= MAX_NAME_BYTES;
        if settings.audience.is_empty() || !settings.audience.iter().all(is_text) {
            let problem =
                "is missing; write the aud that clients ask their issuer for, such as the URL of this server";
            problems.push(("audience", problem.into()));
        }
        if settings.leeway > MAX_LEEWAY {
            problems.push(("leeway", format!("is longer than {} minutes", MAX_LEEWAY.as_secs() / 60)));
        }
        if settings.audience.len().max(settings.roles.len()) > MAX_ENTRIES {
            problems.push(("roles", format!("or audience has more than {MAX_ENTRIES} entries")));
        }
        let algorithms = algorithms(&settings.algorithms, &mut problems);
        let own = conditions("claims", &settings.claims, &mut problems);
        if settings.claims.is_empty() {
            let problem = "is missing; every user of a public issuer can get a token with any audience, so name the \
                           holders of accepted tokens, such as { repository_owner = \"my-company\" }";
            problems.push(("claims", problem.into()));
        }
        let mut roles = Vec::new();
        if settings.roles.is_empty() {
            let problem = "is missing; without a role, a token permits nothing: roles = [{ role = \"ci\" }]";
            problems.push(("roles", problem.into()));
        }
        for ClaimRole { role, claims } in &settings.roles {
            if role.is_empty() {
                problems.push(("roles", "has an entry without role".into()));
            }
            roles.extend(
                conditions("roles", claims, &mut problems).map(|conditions| (role.clone(), conditions)),
            );
        }
        let (Some(conditions), []) = (own, &problems[..]) else { return Err(problems) };
        let audiences = settings.audience.clone();
        Ok(Self {
            issuer: settings.issuer.clone(),
            audiences,
            algorithms,
            conditions,
            roles,
            leeway: settings.leeway,
            mark: mark(settings),
        })
    }

    /// A number that identifies these rules. Each rule set has its own number.
    pub(super) fn mark(&self) -> u64 {
        self.mark
    }

    /// The exact value of `iss`.
    pub(super) fn issuer(&self) -> &str {
        &self.issuer
    }

    /// Whether a token was issued for this server.
    pub(super) fn is_audience_of(&self, token: &UnverifiedToken<'_>) -> bool {
        token.audiences.iter().any(|audience| self.audiences.contains(audience))
    }

    /// Verifies a token of this issuer.
    ///
    /// # Errors
    /// Why it is not accepted. A `Key` refusal may go away when the keys are fetched again.
    pub(super) fn verify(
        &self,
        token: &UnverifiedToken<'_>,
        keys: &KeySet,
        now: SystemTime,
    ) -> Result<VerifiedToken, TokenRefusal> {
        self.check_issued_for_us(token)?;
        check_signature(token, keys)?;
        let expires = self.check_time(token, now)?;
        if let Some(claim) = self.conditions.unmet(&token.claims) {
            let reason = format!("its claim \"{}\" does not meet the condition", shown(claim));
            return Err(TokenRefusal::new(RefusalKind::Claims, reason));
        }
        let mut roles: Vec<String> = Vec::new();
        for (role, conditions) in &self.roles {
            if !roles.contains(role) && conditions.unmet(&token.claims).is_none() {
                roles.push(role.clone());
            }
        }
        let (issuer, subject) = (token.issuer.clone(), token.subject.clone());
        Ok(VerifiedToken { issuer, subject, roles, expires, mark: self.mark })
    }

    /// Checks everything that requires no keys: issuer, audience and algorithm.
    pub(super) fn check_issued_for_us(&self, token: &UnverifiedToken<'_>) -> Result<(), TokenRefusal> {
        if token.issuer != self.issuer {
            let reason = format!("its issuer is \"{}\"", shown(&token.issuer));
            return Err(TokenRefusal::new(RefusalKind::Issuer, reason));
        }
        if !self.is_audience_of(token) {
            let reason = format!("its audience is \"{}\"", shown(&token.audiences.join(", ")));
            return Err(TokenRefusal::new(RefusalKind::Audience, reason));
        }
        if !self.algorithms.contains(&token.algorithm) {
            let reason = format!("its algorithm {} is not accepted for this issuer", token.algorithm);
            return Err(TokenRefusal::new(RefusalKind::Algorithm, reason));
        }
        Ok(())
    }

    /// The time until which the token is accepted.
    fn check_time(&self, token: &UnverifiedToken<'_>, now: SystemTime) -> Result<SystemTime, TokenRefusal> {
        let seconds =
            |late: SystemTime, early: SystemTime| late.duration_since(early).unwrap_or_default().as_secs();
        let Some(end) = token.expires.checked_add(self.leeway) else {
            return Err(TokenRefusal::new(RefusalKind::Malformed, "its exp is not a time"));
        };
        if now >= end {
            let reason = format!("it expired {} s ago", seconds(now, token.expires));
            return Err(TokenRefusal::new(RefusalKind::Expired, reason));
        }
        let latest = now.checked_add(self.leeway).unwrap_or(now);
        for (name, time) in [("nbf", token.not_before), ("iat", token.issued)] {
            if let Some(time) = time.filter(|time| *time > latest) {
                let reason = format!("its {name} is {} s in the future", seconds(time, now));
                return Err(TokenRefusal::new(RefusalKind::NotYetValid, reason));
            }
        }
        Ok(end)
    }
}

fn check_signature(token: &UnverifiedToken<'_>, keys: &KeySet) -> Result<(), TokenRefusal> {
    let id = token.key_id.as_deref();
    let named = id.map(shown).unwrap_or_default();
    let candidates = keys.candidates(id, token.algorithm).map_err(|missing| match missing {
        MissingKey::Unknown => {
            TokenRefusal::new(RefusalKind::Key, format!("its key \"{named}\" is not in the key set"))
        }
        MissingKey::OtherAlgorithm => {
            let reason = format!("the key set has no key \"{named}\" for {}", token.algorithm);
            TokenRefusal::new(RefusalKind::Algorithm, reason)
        }
        MissingKey::Ambiguous => {
            TokenRefusal::new(RefusalKind::Key, "it names no key (kid), and several would fit")
        }
    })?;
    let is_signed =
        candidates.iter().any(|key| signature::check(token.text, token.algorithm, &key.key).is_ok());
    if is_signed {
        Ok(())
    } else {
        Err(TokenRefusal::new(RefusalKind::Signature, format!("its signature by key \"{named}\" is wrong")))
    }
}

fn mark(settings: &IssuerSettings) -> u64 {
    let sha256: [u8; 32] = Sha256::digest(format!("{settings:?}")).into();
    let [a, b, c, d, e, f, g, h, ..] = sha256;
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}

type Problems = Vec<(&'static str, String)>;

fn algorithms(names: &[String], problems: &mut Problems) -> Vec<SignatureAlgorithm> {
    if names.is_empty() {
        problems.push(("algorithms", "is missing; most issuers sign with [\"RS256\"]".into()));
    }
    let mut known = Vec::new();
    for name in names {
        match SignatureAlgorithm::from_name(name) {
            Some(algorithm) => known.push(algorithm),
            None => {
                let all = SignatureAlgorithm::ALL.map(SignatureAlgorithm::name).join(", ");
                let name = shown(name);
                let problem = if name.starts_with("HS") {
                    format!(
                        "has {name}, which is symmetric: every server that can check such a token can also forge one; \
                         use one of {all}"
                    )
                } else {
                    format!("has \"{name}\"; known are {all}")
                };
                problems.push(("algorithms", problem));
            }
        }
    }
    known
}

fn conditions(
    key: &'static str,
    settings: &ClaimSettings,
    problems: &mut Problems,
) -> Option<ClaimConditions> {
    match ClaimConditions::parse(settings) {
        Ok(conditions) => Some(conditions),
        Err(more) => {
            problems.extend(more.into_iter().map(|problem| (key, problem)));
            None
        }
    }
}
