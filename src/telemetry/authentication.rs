//! [`AuthenticationMetrics`]: requests whose credentials were not accepted.

use super::kinds::{KindCounters, LabelValue};
use prometheus_client::registry::Registry;
use std::sync::Arc;

/// Why the credentials of a request were not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AuthenticationFailure {
    /// They cannot be parsed.
    Malformed,
    /// There is no such token, user or key, or the password is wrong.
    Unknown,
    /// They are expired, revoked or not valid yet.
    Expired,
    /// They are genuine, but not for this server: issuer, audience, algorithm or a claim is not accepted.
    Unaccepted,
    /// They could not be checked, because the keys of their issuer could not be fetched.
    Unchecked,
}

impl LabelValue for AuthenticationFailure {
    const LABEL: &'static str = "reason";
    const ALL: &'static [Self] =
        &[Self::Malformed, Self::Unknown, Self::Expired, Self::Unaccepted, Self::Unchecked];

    fn name(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Unknown => "unknown",
            Self::Expired => "expired",
            Self::Unaccepted => "unaccepted",
            Self::Unchecked => "unchecked",
        }
    }
}

/// Counts failed authentications. Cheap to clone.
#[derive(Debug, Clone)]
pub struct AuthenticationMetrics(Arc<KindCounters<AuthenticationFailure>>);

impl AuthenticationMetrics {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let help = "Requests and connections whose credentials were not accepted";
        Self(Arc::new(KindCounters::register(registry, "authentication_failures", help)))
    }

    /// Counts a request or connection whose credentials were not accepted.
    pub fn failed(&self, why: AuthenticationFailure) {
        self.0.count(why);
    }
}

impl Default for AuthenticationMetrics {
    /// Counters that are not part of a text.
    fn default() -> Self {
        Self::register(&mut Registry::default())
    }
}
