//! [`RepeatedCredential`]: the last credential that a connection has sent.
//!
//! Build tools send thousands of requests a second with the same header. The hash of a header is compared with the hash
//! of the last accepted header of its connection. This costs less than parsing and checking it.
//!
//! A connection keeps one hash with a random key of this process ([`HeaderHash`]), and not the header. The hash is
//! valid until its credential expires or must be checked again, and only under the rules that accepted it.

use super::AccessRules;
use crate::access::principal::Principal;
use arc_swap::ArcSwapOption;
use polyval::{Polyval, universal_hash::UniversalHash as _};
use std::{
    fmt,
    sync::{Arc, LazyLock, Weak},
    time::SystemTime,
};
use uuid::Uuid;

/// The last accepted credential; see the top of this file.
#[derive(Default)]
pub(crate) struct RepeatedCredential(ArcSwapOption<AcceptedHeader>);

struct AcceptedHeader {
    hash: HeaderHash,
    principal: Principal,
    until: Option<SystemTime>,
    /// The rules that accepted it. The weak reference ensures that no other rules get the same address.
    rules: Weak<AccessRules>,
}

/// The POLYVAL hash of a header, and its length. Two different headers of at most 64 KiB have the same hash with a
/// probability below 2^-100 for a key of 122 random bits, and only this process knows the key and the hashes.
#[derive(PartialEq, Eq)]
struct HeaderHash {
    hash: u128,
    length: usize,
}

impl HeaderHash {
    fn of(header: &[u8]) -> Self {
        static KEYED: LazyLock<Polyval> = LazyLock::new(|| Polyval::new(&Uuid::new_v4().into_bytes().into()));
        let mut hash = KEYED.clone();
        // The padding with zeros is unambiguous beside the length.
        hash.update_padded(header);
        Self { hash: u128::from_le_bytes(hash.finalize().into()), length: header.len() }
    }
}

impl fmt::Debug for RepeatedCredential {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("RepeatedCredential").finish_non_exhaustive()
    }
}

impl RepeatedCredential {
    /// Returns the principal of a header, if it equals the last accepted header and that is still valid.
    pub(super) fn find(&self, header: &[u8], rules: &Arc<AccessRules>, now: SystemTime) -> Option<Principal> {
        let last = self.0.load();
        let last = last.as_ref()?;
        let is_valid =
            last.until.is_none_or(|until| now < until) && last.rules.as_ptr() == Arc::as_ptr(rules);
        (is_valid && last.hash == HeaderHash::of(header)).then(|| last.principal.clone())
    }

    /// Stores the hash of a header that these rules have accepted until this time.
    pub(super) fn keep(
        &self,
        header: &[u8],
        principal: &Principal,
        until: Option<SystemTime>,
        rules: &Arc<AccessRules>,
    ) {
        let (hash, principal, rules) = (HeaderHash::of(header), principal.clone(), Arc::downgrade(rules));
        self.0.store(Some(Arc::new(AcceptedHeader { hash, principal, until, rules })));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        access::{
            authenticator::{Authentication, Authenticator, CredentialSources, Presented},
            policy::Policy,
            rejection::Rejection,
            tokens::{NewToken, TokenFile, TokenRecord, TokenSet},
        },
        caller::Caller,
    };
    use http::{HeaderMap, HeaderValue, header::AUTHORIZATION};
    use std::time::Duration;

    fn rules() -> Arc<AccessRules> {
        Arc::new(AccessRules::new(Policy::with_roles([], &[]), CredentialSources::default()))
    }

    #[test]
    fn only_the_same_header_counts_and_only_in_its_time_and_by_its_rules() {
        let (repeated, rules, other_rules) = (RepeatedCredential::default(), rules(), rules());
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let finds = |value: &[u8], rules, seconds| repeated.find(value, rules, at(seconds)).is_some();
        assert!(!finds(b"", &rules, 1));
        repeated.keep(b"Bearer secret", Principal::nobody(), Some(at(10)), &rules);
        assert!(finds(b"Bearer secret", &rules, 9) && !finds(b"Bearer secret", &rules, 10));
        assert!(!finds(b"Bearer secret", &other_rules, 9));
        for other in [&b""[..], b"Bearer secre", b"Bearer secrets", b"Bearer Secret", b"bearer secret"] {
            assert!(!finds(other, &rules, 9), "{other:?}");
        }
        assert!(!format!("{repeated:?}").contains("secret"));
        repeated.keep(b"Bearer other", Principal::nobody(), None, &rules);
        assert!(finds(b"Bearer other", &rules, 1 << 40) && !finds(b"Bearer secret", &rules, 9));
    }

    /// The rules of a server that knows this token.
    fn knowing(token: &NewToken, expires: SystemTime) -> AccessRules {
        let policy = Policy::with_roles([], &[]);
        let record = TokenRecord {
            id: token.id.clone(),
            sha256: token.sha256,
            roles: vec!["ci".into()],
            created: SystemTime::UNIX_EPOCH,
            expires: Some(expires),
            note: String::new(),
        };
        let tokens = Arc::new(TokenSet::new(&TokenFile { tokens: vec![record] }, &policy));
        AccessRules::new(policy, CredentialSources { tokens, ..Default::default() })
    }

    #[test]
    fn a_repeated_token_is_refused_as_soon_as_it_is_revoked_or_has_expired() {
        let [token, other] = std::array::from_fn(|_| NewToken::random().unwrap());
        let soon = SystemTime::now() + Duration::from_secs(3_600);
        let authenticator = Authenticator::new(knowing(&token, soon));
        let repeated = RepeatedCredential::default();
        let ask = |token: &NewToken| {
            let mut headers = HeaderMap::new();
            headers.insert(AUTHORIZATION, HeaderValue::try_from(format!("Bearer {}", token.text)).unwrap());
            let caller = Caller::default();
            let presented =
                Presented { headers: &headers, certificate: None, caller, repeated: Some(&repeated) };
            match authenticator.authenticate(&presented) {
                Authentication::Done(outcome) => outcome,
                pending @ Authentication::Pending(_) => panic!("{pending:?}"),
            }
        };
        for _ in 0..3 {
            assert_eq!(ask(&token).unwrap().detail(), token.id);
            assert!(ask(&other).is_err(), "one that is refused is not kept");
        }
        authenticator.replace(knowing(&other, soon));
        assert!(matches!(ask(&token), Err(Rejection::Refused(_))));
        assert_eq!(ask(&other).unwrap().detail(), other.id);
        authenticator.replace(knowing(&other, SystemTime::UNIX_EPOCH));
        assert!(matches!(ask(&other), Err(Rejection::Expired(_))));
    }
}
