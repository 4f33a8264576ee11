//! [`Gate`]: the way into an instance, for the requests of both ports.
//!
//! A handler gets an [`Instance`] only here, and can do nothing in the store or with operations without one. So each request
//! is checked against the [`Policy`].

use crate::{
    call::Call,
    instance::{Instance, Instances},
    policy::{Permission, Policy},
};
use gorego_reapi::error::{Error, Result};

/// See the top of this file. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Gate {
    instances: Instances,
    policy: Policy,
}

impl Gate {
    /// A gate to these instances.
    pub fn new(instances: Instances) -> Self {
        Self { instances, policy: Policy }
    }

    /// The instance that a request names, if its principal has the permission that the method needs. It is recorded in the
    /// call.
    ///
    /// # Errors
    /// `Invalid` for a malformed or unknown name; `Denied`.
    pub(crate) fn enter(&self, call: &Call, name: &str) -> Result<Instance> {
        let needed = call.permissions().ok_or_else(no_row)?.first().copied();
        self.admit(call, name, needed)
    }

    /// Like [`Gate::enter`], with another permission of the method than its first one.
    ///
    /// # Errors
    /// See [`Gate::enter`]; `Internal` if it is none of the method.
    pub(crate) fn enter_for(&self, call: &Call, name: &str, permission: Permission) -> Result<Instance> {
        let is_listed = call.permissions().is_some_and(|permissions| permissions.contains(&permission));
        self.admit(call, name, Some(is_listed.then_some(permission).ok_or_else(no_row)?))
    }

    /// Lets a request act on the server as a whole, if its principal is an administrator of every instance.
    ///
    /// # Errors
    /// `Denied`.
    pub(crate) fn administer(&self, call: &Call) -> Result<()> {
        self.instances.all().iter().try_for_each(|instance| self.check(call, instance, Permission::Admin))
    }

    /// Whether the principal of a request has a permission in an instance.
    pub(crate) fn permits(&self, call: &Call, instance: &Instance, permission: Permission) -> bool {
        self.check(call, instance, permission).is_ok()
    }

    fn admit(&self, call: &Call, name: &str, needed: Option<Permission>) -> Result<Instance> {
        let instance = self.instances.get(name)?;
        call.note_instance(&instance);
        needed.map_or(Ok(()), |needed| self.check(call, &instance, needed))?;
        Ok(instance)
    }

    fn check(&self, call: &Call, instance: &Instance, permission: Permission) -> Result<()> {
        if permission == Permission::Admin && !call.is_local() {
            return Err(Error::Denied(
                "only clients on this machine may administer the server (permission admin); use a loopback address".into(),
            ));
        }
        self.policy.permit(call.principal(), instance, permission)
    }
}

fn no_row() -> Error {
    Error::internal("the table of permissions does not have what this method needs")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{instance::InstancePolicy, policy::Permissions};

    fn gate() -> Gate {
        let readers = InstancePolicy { action_cache_updates: false, ..InstancePolicy::default() };
        let instances = [(String::new(), InstancePolicy::default()), ("readers".into(), readers)];
        Gate::new(Instances::with_policies(instances).unwrap())
    }

    fn call(permissions: Permissions) -> Call {
        Call::begin(None, Default::default(), Some(permissions), None)
    }

    #[test]
    fn a_request_enters_with_the_first_permission_of_its_method_or_another_one_of_it() {
        use Permission::{AcRead, AcWrite};
        let gate = gate();
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
        for call in [Call::default(), call(&[]), call(&[Permission::CasRead])] {
            let entered = gate.enter_for(&call, "", Permission::Logs);
            assert!(matches!(entered, Err(Error::Internal(_))));
        }
    }

    #[test]
    fn the_instance_is_recorded_also_for_a_denied_request() {
        let denied = call(&[Permission::AcWrite]);
        assert!(gate().enter(&denied, "readers").is_err());
        assert_eq!(denied.instance().unwrap().name(), "readers");
    }
}
