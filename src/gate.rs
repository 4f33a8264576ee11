//! [`Gate`]: the way into an instance, for the requests of both ports.
//!
//! Only the gate gives a handler an [`Instance`], and without one it can neither use the store nor operations. So each
//! request is checked against the [`Policy`](crate::access::policy::Policy). Before its handler runs and before its
//! body is read, the client of a request is identified ([`Gate::identify`]), and must be allowed to make this request
//! in some instance ([`Gate::pass`]).

mod revocation;

pub(crate) use revocation::RevocationCheck;

use crate::{
    access::{
        audit::Denial,
        authenticator::{Authentication, Authenticator, Presented},
        certificate::ClientCertificate,
        permission::{Permission, PermissionSet},
        policy::allowed_by,
        principal::Principal,
        rejection::Rejection,
    },
    call::Call,
    instance::{Instance, Instances},
    quotas::{OperationLimits, Quotas},
    telemetry::{AuthenticationFailure, AuthenticationMetrics},
};
use gorego_reapi::error::{Error, Result};
use http::HeaderMap;
use std::{sync::Arc, time::SystemTime};

/// A token can also be sent as a password, for tools that support only passwords.
const CHALLENGES: &[&str] = &["Bearer realm=\"goREgo\"", "Basic realm=\"goREgo\", charset=\"UTF-8\""];

/// Admits requests to instances. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Gate(Arc<GateState>);

#[derive(Debug)]
struct GateState {
    instances: Instances,
    authenticator: Authenticator,
    quotas: Quotas,
    failures: AuthenticationMetrics,
}

impl Gate {
    /// A gate to these instances, with these rules.
    pub fn new(instances: Instances, authenticator: Authenticator) -> Self {
        Self::counting(instances, authenticator, Quotas::default(), AuthenticationMetrics::default())
    }

    /// A gate that also applies quotas, and counts credentials that are not accepted.
    pub(crate) fn counting(
        instances: Instances,
        authenticator: Authenticator,
        quotas: Quotas,
        failures: AuthenticationMetrics,
    ) -> Self {
        Self(Arc::new(GateState { instances, authenticator, quotas, failures }))
    }

    /// The limits on the operations of the principal of a request.
    pub(crate) fn operation_limits(&self, call: &Call) -> OperationLimits {
        self.0.quotas.operations_of(call.principal())
    }

    /// Identifies the client of a request with these headers, or rejects its credential. For a method that needs no
    /// permission, every client counts as anonymous.
    pub(crate) fn identify(&self, call: &Call, headers: &HeaderMap) -> Authentication {
        if call.permissions().is_some_and(<[Permission]>::is_empty) {
            return Authentication::Done(Ok(self.0.authenticator.anonymous()));
        }
        self.0.authenticator.authenticate(&Presented {
            headers,
            certificate: certificate_of(call),
            caller: call.caller(),
            repeated: call.connection().map(|connection| &connection.state.credential),
        })
    }

    /// The ways in which a client can authenticate, as values of `WWW-Authenticate`.
    pub(crate) fn challenges(&self) -> &'static [&'static str] {
        CHALLENGES
    }

    /// Records the client of a request, and checks that it may call the method in some instance. So the body of a
    /// request that is denied in every instance is not read.
    ///
    /// # Errors
    /// `Unauthenticated` or `Denied`, as [`Gate::identify`] has found.
    pub(crate) fn pass(&self, call: &Call, identified: Result<Principal, Rejection>) -> Result<()> {
        let principal = identified.inspect_err(|rejection| self.0.failures.failed(kind(rejection)))?;
        call.identify(principal);
        let needed = call.permissions().unwrap_or_default();
        self.0.authenticator.rules().policy().permit_anywhere(call.principal(), needed)
    }

    /// Checks that a request may go on: the credential of its principal is still valid, and the principal still has all
    /// permissions that the request has needed so far.
    ///
    /// # Errors
    /// `Unauthenticated` or `Denied`.
    pub(crate) fn pass_again(&self, call: &Call) -> Result<()> {
        let principal =
            self.0.authenticator.renew(call.principal(), certificate_of(call), SystemTime::now())?;
        let rules = self.0.authenticator.rules();
        let used = call.used_permissions();
        match call.instance() {
            Some(instance) if used != PermissionSet::default() => used
                .iter()
                .try_for_each(|permission| rules.policy().permit(&principal, instance.name(), permission)),
            _ => rules.policy().permit_anywhere(&principal, call.permissions().unwrap_or_default()),
        }
    }

    /// Records that a request was refused.
    pub(crate) fn record(&self, denial: &Denial<'_>) {
        self.0.authenticator.audit().denied(denial);
    }

    /// The instance that a request names, if its principal has the permission that the method needs. It is recorded in
    /// the call.
    ///
    /// # Errors
    /// `Invalid` for a malformed or unknown name; `Denied`; `Unauthenticated`; `OverQuota`.
    pub(crate) fn enter(&self, call: &Call, name: &str) -> Result<Instance> {
        let needed = call.permissions().ok_or_else(no_row)?.first().copied();
        self.admit(call, name, needed.as_slice())
    }

    /// Like [`Gate::enter`], with a permission of the method that is not its first one.
    ///
    /// # Errors
    /// See [`Gate::enter`]; `Internal` if the permission is not one of the method's.
    pub(crate) fn enter_for(&self, call: &Call, name: &str, permission: Permission) -> Result<Instance> {
        let is_listed = call.permissions().is_some_and(|permissions| permissions.contains(&permission));
        self.admit(call, name, &[is_listed.then_some(permission).ok_or_else(no_row)?])
    }

    /// Like [`Gate::enter`], but any one of the permissions of the method is enough.
    ///
    /// # Errors
    /// See [`Gate::enter`].
    pub(crate) fn enter_for_any(&self, call: &Call, name: &str) -> Result<Instance> {
        self.admit(call, name, call.permissions().ok_or_else(no_row)?)
    }

    /// Checks that the principal of a request has a further permission in the instance that it has entered.
    ///
    /// # Errors
    /// `Denied`, `Unauthenticated`.
    pub(crate) fn require(&self, call: &Call, instance: &Instance, permission: Permission) -> Result<()> {
        self.permit(call, instance.name(), &[permission])?;
        call.note_permission(permission);
        Ok(())
    }

    /// Checks that a request may store entries that all clients of the instance are served from.
    ///
    /// # Errors
    /// `Denied`, `Unauthenticated`.
    pub(crate) fn require_to_publish(&self, call: &Call, instance: &Instance) -> Result<()> {
        self.require(call, instance, Permission::AcWrite)?;
        allowed_by(instance, Permission::AcWrite)?;
        if instance.policy().private_results {
            return Err(Error::Denied(
                "results of clients under this instance name are private (client_results = \"private\"), but this \
                 would be served to all clients"
                    .into(),
            ));
        }
        Ok(())
    }

    /// Lets a request act on the server as a whole, if its principal is an administrator of every instance.
    ///
    /// # Errors
    /// `Denied`.
    pub(crate) fn administer(&self, call: &Call) -> Result<()> {
        let instances = self.0.instances.all();
        instances.iter().try_for_each(|instance| self.require(call, instance, Permission::Admin))
    }

    /// Whether the principal of a request has a permission in an instance.
    pub(crate) fn permits(&self, call: &Call, instance: &Instance, permission: Permission) -> bool {
        self.permit(call, instance.name(), &[permission]).is_ok() && allowed_by(instance, permission).is_ok()
    }

    /// Enters with one of these permissions. If there is only one, an instance that forbids it to all clients refuses
    /// it.
    fn admit(&self, call: &Call, name: &str, needed: &[Permission]) -> Result<Instance> {
        let found = self.0.instances.get(name);
        if let Ok(instance) = &found {
            call.note_instance(instance);
        }
        self.permit(call, name, needed)?;
        let instance = found?;
        if let [needed] = needed {
            allowed_by(&instance, *needed)?;
            call.note_permission(*needed);
        }
        self.count(call, &instance, needed)?;
        Ok(instance)
    }

    /// Counts a request for the quotas of its principal, once. An upload counts with the bytes that it has sent so far;
    /// the rest is counted as it arrives ([`Call::count_upload`]). Administration is not counted, so that quotas cannot
    /// lock an operator out.
    fn count(&self, call: &Call, instance: &Instance, needed: &[Permission]) -> Result<()> {
        let quotas = &self.0.quotas;
        if quotas.are_off() || call.is_counted() || needed == [Permission::Admin] {
            return Ok(());
        }
        let (principal, caller) = (call.principal(), call.caller());
        quotas.count_request(principal, caller, instance)?;
        let uploads = matches!(needed, [Permission::CasWrite | Permission::AcWrite | Permission::Logs]);
        call.note_counted(uploads.then(|| quotas.upload_meter(principal, caller, instance)).flatten());
        call.count_upload()
    }

    /// Checks that the principal has one of these permissions in the instance with this name.
    fn permit(&self, call: &Call, name: &str, needed: &[Permission]) -> Result<()> {
        if needed == [Permission::Admin] && call.principal().is_anonymous() && !call.is_local() {
            return Err(Error::Denied(
                "clients without a credential may administer the server (permission admin) from its own machine only; use a \
                 loopback address, or a credential with that permission (docs/securing.md)"
                    .into(),
            ));
        }
        self.0.authenticator.rules().policy().permit_any(call.principal(), name, needed)
    }
}

/// The certificate of the connection of a request.
fn certificate_of(call: &Call) -> Option<&ClientCertificate> {
    call.connection().and_then(|connection| connection.state.certificate()).map(|certificate| &**certificate)
}

fn kind(rejection: &Rejection) -> AuthenticationFailure {
    match rejection {
        Rejection::Malformed(_) => AuthenticationFailure::Malformed,
        Rejection::Refused(_) | Rejection::TooMany(..) => AuthenticationFailure::Unknown,
        Rejection::Expired(_) => AuthenticationFailure::Expired,
        Rejection::Unaccepted(_) => AuthenticationFailure::Unaccepted,
        Rejection::Unavailable(_) => AuthenticationFailure::Unchecked,
    }
}

fn no_row() -> Error {
    Error::internal("the table of permissions does not have what this method needs")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        access::{
            authenticator::{AccessRules, CredentialSources},
            permission::{ANY, Permissions},
            policy::Policy,
        },
        instance::InstancePolicy,
        quotas::limits::{QuotaLimits, QuotaRules},
    };

    fn instances() -> Instances {
        let readers = InstancePolicy { action_cache_updates: false, ..InstancePolicy::default() };
        let instances = [(String::new(), InstancePolicy::default()), ("readers".into(), readers)];
        Instances::with_policies(instances).unwrap()
    }

    fn gate() -> Gate {
        Gate::new(instances(), Authenticator::open())
    }

    fn call(gate: &Gate, permissions: Permissions) -> Call {
        let call = Call::begin(None, Default::default(), Some(permissions), None);
        call.identify(gate.0.authenticator.anonymous());
        call
    }

    #[test]
    fn a_request_enters_with_the_first_permission_of_its_method_or_another_one_of_it() {
        use Permission::{AcRead, AcWrite};
        let gate = gate();
        let call = |permissions| call(&gate, permissions);
        assert!(gate.enter(&call(&[AcWrite]), "").is_ok());
        assert!(matches!(gate.enter(&call(&[AcWrite]), "readers"), Err(Error::Denied(_))));
        assert!(gate.enter(&call(&[AcRead, AcWrite]), "readers").is_ok());
        assert!(gate.enter(&call(&[]), "readers").is_ok(), "it is open");
        let denied = gate.enter_for(&call(&[AcRead, AcWrite]), "readers", AcWrite);
        assert!(matches!(denied, Err(Error::Denied(_))));
    }

    #[test]
    fn a_method_that_the_table_does_not_have_enters_nowhere() {
        let gate = gate();
        assert!(matches!(gate.enter(&Call::default(), ""), Err(Error::Internal(_))));
        for call in [Call::default(), call(&gate, &[]), call(&gate, &[Permission::CasRead])] {
            let entered = gate.enter_for(&call, "", Permission::Logs);
            assert!(matches!(entered, Err(Error::Internal(_))));
        }
    }

    #[test]
    fn requests_for_which_any_permission_is_enough_are_counted_and_administration_is_not() {
        let limits = QuotaLimits { requests: Some(1), ..QuotaLimits::default() };
        let quotas = Quotas::new(QuotaRules { default: limits, ..QuotaRules::default() });
        let metrics = AuthenticationMetrics::default();
        let gate = Gate::counting(instances(), Authenticator::open(), quotas, metrics);
        let instance = gate.0.instances.get("").unwrap();
        let is_limited = |permissions: Permissions| {
            let mut requests =
                (0..1_000).map(|_| gate.count(&call(&gate, permissions), &instance, permissions));
            requests.any(|counted| matches!(counted, Err(Error::OverQuota { .. })))
        };
        assert!(!is_limited(&[Permission::Admin]));
        assert!(is_limited(ANY));
    }

    #[test]
    fn the_instance_is_recorded_also_for_a_denied_request() {
        let gate = gate();
        let denied = call(&gate, &[Permission::AcWrite]);
        assert!(gate.enter(&denied, "readers").is_err());
        assert_eq!(denied.instance().unwrap().name(), "readers");
    }

    #[test]
    fn a_caller_without_permission_does_not_learn_which_instances_exist() {
        let rules = AccessRules::new(Policy::with_roles([], &[]), CredentialSources::default());
        let gate = Gate::new(instances(), Authenticator::new(rules));
        let call = call(&gate, &[Permission::CasRead]);
        for name in ["", "readers", "unknown"] {
            assert!(matches!(gate.enter(&call, name), Err(Error::Unauthenticated(_))), "{name}");
        }
        let identified = gate.pass(&call, Ok(gate.0.authenticator.anonymous()));
        assert!(matches!(identified, Err(Error::Unauthenticated(_))));
    }
}
