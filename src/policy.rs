//! [`Policy`]: who may do what. Pure. It is asked by the [`gate`](crate::gate) alone, for both ports.

use crate::instance::Instance;
use gorego_reapi::error::{Error, Result};

/// The identity of a client, as far as it has proved one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Principal {
    /// It has shown no credentials.
    #[default]
    Anonymous,
}

impl Principal {
    /// The name in logs and in the provenance of results.
    pub(crate) fn name(&self) -> &str {
        match self {
            Self::Anonymous => "anonymous",
        }
    }
}

/// What a request may need.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Permission {
    /// To read blobs and trees.
    CasRead,
    /// To write blobs.
    CasWrite,
    /// To read action results.
    AcRead,
    /// To write action results.
    AcWrite,
    /// To run actions.
    Execute,
    /// To see, cancel and delete operations.
    Operations,
    /// To fetch and push assets.
    Assets,
    /// To read and write log streams.
    Logs,
    /// To administer the server.
    Admin,
}

/// The permissions of a method. A request needs the first one, unless its handler asks for another of them, which depends on
/// the resource. A method without permissions is open to everybody.
pub(crate) type Permissions = &'static [Permission];

/// The rules of this server. There are no roles yet: a principal may do what the instance allows to its clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Policy;

impl Policy {
    /// Checks that a principal has a permission in an instance.
    ///
    /// # Errors
    /// `Denied`, with the reason.
    pub(crate) fn permit(
        self,
        principal: Principal,
        instance: &Instance,
        permission: Permission,
    ) -> Result<()> {
        let Principal::Anonymous = principal;
        let rules = instance.policy();
        let reason = match permission {
            Permission::AcWrite if !rules.action_cache_updates => {
                "clients may not write action results under this instance name (action_cache_updates = false, or \
                 client_results = \"refused\")"
            }
            Permission::Execute if !rules.execution => {
                "no actions are run under this instance name (execution = false)"
            }
            _ => return Ok(()),
        };
        Err(Error::Denied(reason.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instance::{InstancePolicy, Instances};

    /// AC-12, CAP-08.
    #[test]
    fn an_anonymous_client_may_do_all_that_the_instance_allows() {
        use Permission::*;
        let all = [CasRead, CasWrite, AcRead, AcWrite, Execute, Operations, Assets, Logs, Admin];
        for (action_cache_updates, execution, denied) in [
            (true, true, &[][..]),
            (false, true, &[AcWrite]),
            (true, false, &[Execute]),
            (false, false, &[AcWrite, Execute]),
        ] {
            let policy = InstancePolicy { action_cache_updates, execution, ..InstancePolicy::default() };
            let instances = Instances::with_policies([(String::new(), policy)]).unwrap();
            let instance = instances.get("").unwrap();
            for permission in all {
                let permitted = Policy.permit(Principal::Anonymous, &instance, permission);
                assert_eq!(permitted.is_err(), denied.contains(&permission), "{permission:?}");
                assert!(matches!(permitted, Ok(()) | Err(Error::Denied(_))));
            }
        }
    }
}
