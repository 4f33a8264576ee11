//! [`RevocationCheck`]: whether an open request may go on. A token may be revoked, or expire, while a stream is open.
//!
//! It is checked every [`LOOK_INTERVAL`], whether the request waits or makes progress. Short requests cost nothing.
//! Requests of anonymous clients are checked only when they make progress, so they need no timer: streams that clients
//! keep open make progress at least every half minute.

use super::Gate;
use crate::{call::Call, timer::Timer};
use gorego_reapi::error::Error;
use std::{
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::time::Instant;

/// How often the credential of an open request is checked.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);

/// Says whether an open request may go on.
#[derive(Debug)]
pub(crate) struct RevocationCheck {
    gate: Gate,
    call: Call,
    next_look: Option<Instant>,
    /// Wakes the request when it waits.
    timer: Timer,
}

impl RevocationCheck {
    /// The check of a request that has just begun.
    pub(crate) fn new(gate: Gate, call: Call) -> Self {
        Self { gate, call, next_look: None, timer: Timer::default() }
    }

    /// Ready, with the reason, when the request has to end. Must be called after each poll of the request; `waits` says
    /// whether the request is pending.
    pub(crate) fn poll(&mut self, context: &mut Context<'_>, waits: bool) -> Poll<Error> {
        let waits = waits && !self.call.principal().is_anonymous();
        loop {
            let now = Instant::now();
            let mut next = *self.next_look.get_or_insert(now + LOOK_INTERVAL);
            if now >= next {
                if let Err(error) = self.gate.pass_again(&self.call) {
                    return Poll::Ready(error);
                }
                next = now + LOOK_INTERVAL;
                self.next_look = Some(next);
            }
            if !waits {
                return Poll::Pending;
            }
            ready!(self.timer.poll(context, next));
        }
    }

    /// Waits until the request has to end.
    pub(crate) async fn ended(&mut self) -> Error {
        std::future::poll_fn(|context| self.poll(context, true)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        access::{
            authenticator::{AccessRules, Authentication, Authenticator, CredentialSources},
            certificate::ClientCertificate,
            grants::{CertificateField, CertificateGrant},
            permission::Permission,
            policy::Policy,
            tokens::{NewToken, TokenFile, TokenRecord, TokenSet},
        },
        call::ConnectionInfo,
        connections::Connections,
        instance::Instances,
    };
    use std::{sync::Arc, time::SystemTime};
    use tokio::time::timeout;

    fn rules(policy: &Policy, list: &TokenFile) -> AccessRules {
        let tokens = Arc::new(TokenSet::new(list, policy));
        AccessRules::new(policy.clone(), CredentialSources { tokens, ..Default::default() })
    }

    fn record(token: &NewToken, role: &str) -> TokenRecord {
        TokenRecord {
            id: token.id.clone(),
            sha256: token.sha256,
            roles: vec![role.to_owned()],
            created: SystemTime::UNIX_EPOCH,
            expires: None,
            note: String::new(),
        }
    }

    /// The check of a request to run an action, and the authenticator.
    fn begun(list: &TokenFile, token: &NewToken) -> (RevocationCheck, Authenticator) {
        let policy = Policy::with_roles([], &["reader"]);
        let authenticator = Authenticator::new(rules(&policy, list));
        let gate = Gate::new(Instances::new([""]).unwrap(), authenticator.clone());
        let call = Call::begin(None, Default::default(), Some(&[Permission::Execute]), None);
        let set = TokenSet::new(list, &policy);
        gate.pass(&call, set.verify(&token.text, SystemTime::now())).unwrap();
        gate.enter(&call, "").unwrap();
        (RevocationCheck::new(gate, call), authenticator)
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_ends_when_its_token_is_revoked_or_loses_the_permission() {
        let policy = Policy::with_roles([], &["reader"]);
        let token = NewToken::random().unwrap();
        let list = TokenFile { tokens: vec![record(&token, "ci")] };
        let more = TokenFile { tokens: vec![record(&token, "developer")] };
        let less = TokenFile { tokens: vec![record(&token, "reader")] };
        let other = NewToken { id: token.id.clone(), ..NewToken::random().unwrap() };
        let replaced = TokenFile { tokens: vec![record(&other, "ci")] };
        for (next, part) in [
            (&list, None),
            (&more, None),
            (&less, Some("\"execute\"")),
            (&replaced, Some("revoked")),
            (&TokenFile::default(), Some("revoked")),
        ] {
            let (mut revocation, authenticator) = begun(&list, &token);
            authenticator.replace(rules(&policy, next));
            let ended = timeout(Duration::from_secs(60), revocation.ended()).await.ok();
            assert_eq!(ended.is_some(), part.is_some(), "{ended:?}");
            if let (Some(error), Some(part)) = (ended, part) {
                assert!(error.to_string().contains(part), "{error}");
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_of_an_anonymous_client_ends_when_it_moves_and_anonymous_clients_lost_the_permission() {
        let policy = Policy::with_roles([], &["reader"]);
        let authenticator = Authenticator::new(rules(&policy, &TokenFile::default()));
        let gate = Gate::new(Instances::new([""]).unwrap(), authenticator.clone());
        let call = Call::begin(None, Default::default(), Some(&[Permission::CasRead]), None);
        gate.pass(&call, Ok(authenticator.anonymous())).unwrap();
        gate.enter(&call, "").unwrap();
        let mut revocation = RevocationCheck::new(gate, call);
        let mut poll =
            async || futures::poll!(std::future::poll_fn(|context| revocation.poll(context, true)));
        assert!(poll().await.is_pending());
        authenticator.replace(rules(&Policy::with_roles([], &[]), &TokenFile::default()));
        tokio::time::advance(LOOK_INTERVAL).await;
        let Poll::Ready(error) = poll().await else { panic!("it goes on") };
        assert!(matches!(error, Error::Unauthenticated(_)), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_over_a_certificate_ends_when_its_holder_lost_the_role() {
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name.push(rcgen::DnType::CommonName, "alice");
        let made = params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap();
        let certificate = ClientCertificate::parse(&[made.der().clone()]).unwrap();
        let pattern = certificate.subject().to_owned();
        let with = |role: &str| {
            let grant = CertificateGrant::parse(CertificateField::Subject, &pattern, vec![role.to_owned()]);
            let sources = CredentialSources { certificates: vec![grant.unwrap()], ..Default::default() };
            AccessRules::new(Policy::with_roles([], &[]), sources)
        };
        let authenticator = Authenticator::new(with("admin"));
        let gate = Gate::new(Instances::new([""]).unwrap(), authenticator.clone());
        let admitted = Connections::default().admit(([127, 0, 0, 1], 1).into()).unwrap();
        admitted.state().set_certificate(Arc::new(certificate));
        let connection = Some(ConnectionInfo::of(&admitted));
        let call = Call::begin(connection, Default::default(), Some(&[Permission::AcWrite]), None);
        let Authentication::Done(holder) = gate.identify(&call, &Default::default()) else { panic!() };
        gate.pass(&call, holder).unwrap();
        gate.enter(&call, "").unwrap();
        let mut revocation = RevocationCheck::new(gate, call);
        authenticator.replace(with("ci"));
        assert!(timeout(Duration::from_secs(60), revocation.ended()).await.is_err(), "it still may");
        authenticator.replace(with("reader"));
        let ended = timeout(Duration::from_secs(60), revocation.ended()).await.unwrap();
        assert!(ended.to_string().contains("ac.write"), "{ended}");
    }

    #[tokio::test]
    async fn a_request_of_an_anonymous_client_has_no_timer() {
        let gate = Gate::new(Instances::new([""]).unwrap(), Authenticator::open());
        let mut revocation = RevocationCheck::new(gate, Call::default());
        assert!(futures::poll!(std::future::poll_fn(|context| revocation.poll(context, true))).is_pending());
        assert!(revocation.timer.is_unused());
    }
}
