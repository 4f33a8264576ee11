//! [`AuthenticationMetrics`]: requests whose credentials were not accepted.

use super::kinds::{KindCounters, LabelValue};
use prometheus_client::registry::Registry;
use std::sync::Arc;

/// Why the credentials of a request were not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AuthenticationFailure {
    /// They cannot be understood.
    Malformed,
    /// They are unknown, wrong, expired, revoked or not trusted.
    Refused,
    /// Too many credentials were being checked, or were wrong.
    TooMany,
    /// They could not be checked, for example because the keys of their issuer could not be had.
    Unavailable,
}

impl LabelValue for AuthenticationFailure {
    const LABEL: &'static str = "reason";
    const ALL: &'static [Self] = &[Self::Malformed, Self::Refused, Self::TooMany, Self::Unavailable];

    fn name(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Refused => "refused",
            Self::TooMany => "too_many",
            Self::Unavailable => "unavailable",
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
    /// Counters that nobody reads.
    fn default() -> Self {
        Self::register(&mut Registry::default())
    }
}
