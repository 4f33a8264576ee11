//! [`Authenticator`]: determines the principal of a request. It owns the rules in force.
//!
//! The rules ([`AccessRules`]) are immutable and are replaced as a whole by [`Authenticator::replace`]. So every
//! request is judged by one consistent set of rules, and results of checks under earlier rules are not used. Most
//! requests are authenticated at once: they have no credential, the same credential as the previous request of the
//! connection ([`RepeatedCredential`]), a static token, or a credential that was checked before. All other requests get
//! an [`Authentication::Pending`], and wait for it in a separate task ([`Checks`] bounds these tasks).

mod checks;
mod repeated;
mod verified;

pub(crate) use repeated::RepeatedCredential;

use super::{
    audit::Audit,
    basic::UserSet,
    certificate::ClientCertificate,
    credential::Credential,
    grants::{self, CertificateGrant},
    permission::PermissionSet,
    policy::Policy,
    principal::{Principal, PrincipalKind},
    rejection::Rejection,
    tokens::{self, TokenSet},
};
use crate::caller::Caller;
use arc_swap::{ArcSwap, Guard};
use checks::Checks;
use futures::future::{BoxFuture, FutureExt as _};
use http::{HeaderMap, HeaderValue, header::AUTHORIZATION};
use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};
use verified::VerifiedCredentials;

/// How long a correct password is accepted without another check.
const PASSWORD_KEPT: Duration = Duration::from_secs(10 * 60);
/// How long a valid signed token is accepted without another check. So a key that its issuer has withdrawn is accepted
/// for at most this time.
const SIGNED_KEPT: Duration = Duration::from_secs(60);

/// The data of a request that can prove its principal.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Presented<'a> {
    /// The headers of the request, which may contain a credential.
    pub(crate) headers: &'a HeaderMap,
    /// The certificate of its connection, which was verified in the handshake.
    pub(crate) certificate: Option<&'a ClientCertificate>,
    /// The connection and the peer.
    pub(crate) caller: Caller,
    /// The credential that its connection sent before; `None` for a request that does not come from a socket.
    pub(crate) repeated: Option<&'a RepeatedCredential>,
}

impl Presented<'_> {
    /// The value of the only `authorization` header.
    fn header(&self) -> Option<&[u8]> {
        let mut values = self.headers.get_all(AUTHORIZATION).iter();
        values.next().filter(|_| values.next().is_none()).map(HeaderValue::as_bytes)
    }

    /// The principal, if the previous request of the connection had the same header.
    fn repeats(&self, rules: &Arc<AccessRules>, now: SystemTime) -> Option<Principal> {
        self.repeated?.find(self.header()?, rules, now)
    }

    /// Stores the header for the connection until this time.
    fn keep(&self, rules: &Arc<AccessRules>, principal: &Principal, until: Option<SystemTime>) {
        if let (Some(repeated), Some(header)) = (self.repeated, self.header()) {
            repeated.keep(header, principal, until, rules);
        }
    }
}

/// The result of authenticating a request.
pub(crate) enum Authentication {
    /// The result is known now.
    Done(Result<Principal, Rejection>),
    /// The result needs expensive work or an answer from another server.
    Pending(BoxFuture<'static, Result<Principal, Rejection>>),
}

impl fmt::Debug for Authentication {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Done(done) => write!(formatter, "Done({done:?})"),
            Self::Pending(_) => formatter.write_str("Pending"),
        }
    }
}

/// A checker of signed tokens.
pub trait SignedTokens: fmt::Debug + Send + Sync {
    /// Verifies a token. It is not longer than [`CREDENTIAL_MAX_BYTES`](super::credential::CREDENTIAL_MAX_BYTES) and
    /// has not been checked in any other way. The implementation bounds the time and the work of the check.
    ///
    /// # Errors
    /// The reason for the refusal. It must not contain the token.
    fn verify<'a>(
        &'a self,
        token: &'a str,
        now: SystemTime,
    ) -> BoxFuture<'a, Result<VerifiedToken, Rejection>>;

    /// Whether the rules with this mark are still in force ([`VerifiedToken::mark`]).
    fn trusts(&self, mark: u64) -> bool;
}

/// The content of a valid signed token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedToken {
    /// The name of the issuer in the configuration.
    pub issuer: String,
    /// The subject, as the issuer names it.
    pub subject: String,
    /// The names of the roles that its claims map to.
    pub roles: Vec<String>,
    /// The time at which the token expires (`exp`).
    pub expires: SystemTime,
    /// A number that identifies the rules that accepted the token. Each rule set has its own number.
    pub mark: u64,
}

/// The sources of the clients' credentials.
#[derive(Debug, Clone, Default)]
pub struct CredentialSources {
    /// The static tokens; an empty set without a token file.
    pub tokens: Arc<TokenSet>,
    /// The users with passwords; `None` without a password file.
    pub users: Option<Arc<UserSet>>,
    /// The roles of holders of certificates.
    pub certificates: Vec<CertificateGrant>,
    /// The issuers of signed tokens.
    pub signed: Option<Arc<dyn SignedTokens>>,
}

/// An immutable set of rules.
#[derive(Debug)]
pub(crate) struct AccessRules {
    policy: Policy,
    /// The principal of clients without a credential.
    anonymous: Principal,
    sources: CredentialSources,
    verified: VerifiedCredentials,
}

impl AccessRules {
    /// Creates rules with an empty cache of checked credentials.
    pub(crate) fn new(policy: Policy, sources: CredentialSources) -> Self {
        let anonymous = Principal::anonymous(policy.everybody().to_vec());
        Self { policy, anonymous, sources, verified: VerifiedCredentials::default() }
    }

    pub(crate) fn policy(&self) -> &Policy {
        &self.policy
    }

    pub(crate) fn sources(&self) -> &CredentialSources {
        &self.sources
    }

    /// Whether this static token is accepted.
    #[cfg(test)]
    pub(crate) fn knows_token(&self, token: &str) -> bool {
        self.sources.tokens.verify(token, SystemTime::now()).is_ok()
    }

    /// The principal of the same client with its current roles. Roles that no longer exist are left out.
    fn with_current_roles(&self, principal: &Principal) -> Principal {
        let named = principal.roles().iter().map(|role| std::slice::from_ref(&role.name));
        let roles = named.filter_map(|name| self.policy.roles_named(name).ok()).flatten();
        let roles = roles.chain(self.policy.everybody().iter().cloned()).collect();
        Principal::marked(principal.kind(), principal.detail(), roles, principal.expires(), principal.mark())
    }

    /// The holder of a certificate, or an anonymous client.
    fn without_header(&self, certificate: Option<&ClientCertificate>) -> Result<Principal, Rejection> {
        let Some(certificate) = certificate else { return Ok(self.anonymous.clone()) };
        let now = SystemTime::now();
        if let Some((principal, _)) = self.verified.get(certificate.fingerprint(), now) {
            return Ok(principal);
        }
        let principal = grants::principal(certificate, &self.sources.certificates, &self.policy);
        let principal = principal.map_err(|error| Rejection::refused(error.to_string()))?;
        self.verified.put(*certificate.fingerprint(), principal.clone(), grants::end(certificate));
        Ok(principal)
    }

    async fn signed(
        &self,
        signed: &dyn SignedTokens,
        token: &str,
        now: SystemTime,
    ) -> Result<(Principal, SystemTime), Rejection> {
        let VerifiedToken { issuer, subject, roles, expires, mark } = signed.verify(token, now).await?;
        let roles = self.policy.roles_named(&roles).map_err(|error| Rejection::refused(error.to_string()))?;
        let roles = roles.into_iter().chain(self.policy.everybody().iter().cloned()).collect();
        let name = format!("{issuer}#{subject}");
        Ok((Principal::marked(PrincipalKind::Jwt, &name, roles, Some(expires), mark), expires))
    }
}

/// Authenticates requests; see the top of this file. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Authenticator(Arc<AuthenticatorState>);

#[derive(Debug)]
struct AuthenticatorState {
    rules: ArcSwap<AccessRules>,
    checks: Checks,
    audit: Audit,
}

impl Authenticator {
    /// Creates an authenticator with these rules.
    pub(crate) fn new(rules: AccessRules) -> Self {
        let rules = ArcSwap::from_pointee(rules);
        Self(Arc::new(AuthenticatorState { rules, checks: Checks::default(), audit: Audit::default() }))
    }

    /// Creates an authenticator without credentials: all clients are anonymous and may do everything.
    pub fn open() -> Self {
        Self::new(AccessRules::new(
            Policy::without_credentials(PermissionSet::ALL),
            CredentialSources::default(),
        ))
    }

    /// Replaces the rules in force.
    pub(crate) fn replace(&self, rules: AccessRules) {
        self.0.rules.store(Arc::new(rules));
    }

    /// The rules in force.
    pub(crate) fn rules(&self) -> Guard<Arc<AccessRules>> {
        self.0.rules.load()
    }

    /// The audit log of refusals.
    pub(crate) fn audit(&self) -> &Audit {
        &self.0.audit
    }

    /// The current principal of a request that was authenticated before, according to the rules in force now.
    /// `certificate` is the certificate of its connection.
    ///
    /// # Errors
    /// If its credential has expired, or was revoked or replaced.
    pub(crate) fn renew(
        &self,
        principal: &Principal,
        certificate: Option<&ClientCertificate>,
        now: SystemTime,
    ) -> Result<Principal, Rejection> {
        if principal.expires().is_some_and(|expires| expires <= now) {
            return Err(Rejection::Expired(format!("the credential of {principal} has expired")));
        }
        let rules = self.rules();
        let current = match principal.kind() {
            PrincipalKind::Anonymous => Some(rules.anonymous.clone()),
            PrincipalKind::Token => rules.sources.tokens.principal(principal.detail()).cloned(),
            PrincipalKind::Basic => {
                rules.sources.users.as_ref().and_then(|users| users.principal(principal.detail()).cloned())
            }
            // The token is valid until its expiry as long as the rules for its issuer stay the same.
            PrincipalKind::Jwt => {
                let signed = rules.sources.signed.as_ref();
                if !signed.is_some_and(|signed| signed.trusts(principal.mark())) {
                    return Err(Rejection::Unavailable(format!(
                        "the rules for the token of {principal} have changed; send the request again"
                    )));
                }
                Some(rules.with_current_roles(principal))
            }
            // Connections whose certificates have expired or were revoked are closed.
            PrincipalKind::Certificate => rules.without_header(certificate).ok(),
        };
        let current = current.filter(|current| current.mark() == principal.mark());
        current.ok_or_else(|| Rejection::refused(format!("the credential of {principal} was revoked")))
    }

    /// The principal of a request that needs no authentication, because its method is open to all clients.
    pub(crate) fn anonymous(&self) -> Principal {
        self.rules().anonymous.clone()
    }

    /// Determines the principal of a request from its headers and its connection.
    pub(crate) fn authenticate(&self, presented: &Presented<'_>) -> Authentication {
        let rules = self.rules();
        // A server without credentials ignores the header, which may be meant for a proxy in front of it.
        if !rules.policy.has_credentials() {
            return Authentication::Done(rules.without_header(presented.certificate));
        }
        let now = SystemTime::now();
        if let Some(principal) = presented.repeats(&rules, now) {
            return Authentication::Done(Ok(principal));
        }
        match Credential::parse(presented.headers) {
            Ok(None) => Authentication::Done(rules.without_header(presented.certificate)),
            Ok(Some(Credential::Bearer(token))) => self.bearer(&rules, token, presented, now),
            Ok(Some(Credential::Basic { user, password })) => {
                self.basic(&rules, user, password, presented, now)
            }
            Err(rejection) => Authentication::Done(Err(rejection)),
        }
    }

    fn bearer(
        &self,
        rules: &Arc<AccessRules>,
        token: &str,
        presented: &Presented<'_>,
        now: SystemTime,
    ) -> Authentication {
        let Some(signed) = rules.sources.signed.as_ref().filter(|_| tokens::id_of(token).is_none()) else {
            return Self::static_token(rules, token, presented, now);
        };
        let hash = rules.verified.hash(&[b"bearer", token.as_bytes()]);
        if let Some((principal, until)) = rules.verified.get(&hash, now) {
            presented.keep(rules, &principal, Some(until));
            return Authentication::Done(Ok(principal));
        }
        let check = || {
            let (rules, signed, token) = (rules.clone(), signed.clone(), token.to_owned());
            async move {
                let (principal, expires) = rules.signed(&*signed, &token, now).await?;
                rules.verified.put(hash, principal.clone(), expires.min(now + SIGNED_KEPT));
                Ok(principal)
            }
            .boxed()
        };
        Authentication::Pending(self.0.checks.share(hash, check).boxed())
    }

    fn static_token(
        rules: &Arc<AccessRules>,
        token: &str,
        presented: &Presented<'_>,
        now: SystemTime,
    ) -> Authentication {
        let verified = rules.sources.tokens.verify(token, now);
        if let Ok(principal) = &verified {
            presented.keep(rules, principal, principal.expires());
        }
        Authentication::Done(verified)
    }

    /// A static token is also accepted as the password of any user, for tools that only support passwords.
    fn basic(
        &self,
        rules: &Arc<AccessRules>,
        user: String,
        password: Vec<u8>,
        presented: &Presented<'_>,
        now: SystemTime,
    ) -> Authentication {
        if let Some(token) =
            std::str::from_utf8(&password).ok().filter(|token| tokens::id_of(token).is_some())
        {
            return Self::static_token(rules, token, presented, now);
        }
        let Some(users) = &rules.sources.users else {
            return Authentication::Done(Err(Rejection::refused(
                "this server knows no users with passwords; send a token as the password, or as authorization: Bearer TOKEN",
            )));
        };
        let hash = rules.verified.hash(&[b"basic", user.as_bytes(), b":", &password]);
        if let Some((principal, until)) = rules.verified.get(&hash, now) {
            presented.keep(rules, &principal, Some(until));
            return Authentication::Done(Ok(principal));
        }
        let caller = presented.caller;
        let check = || {
            let (rules, users, state) = (rules.clone(), users.clone(), self.0.clone());
            async move {
                let principal = state.checks.password(users, user, password, caller).await?;
                rules.verified.put(hash, principal.clone(), now + PASSWORD_KEPT);
                Ok(principal)
            }
            .boxed()
        };
        Authentication::Pending(self.0.checks.share(hash, check).boxed())
    }
}
