//! [`Policy`]: decides which principal has which permission. Pure. Only the [`gate`](crate::gate) uses it, for both
//! ports.
//!
//! A request needs two permissions: from the roles of its principal, and from the settings of the instance
//! ([`InstancePolicy`](crate::instance::InstancePolicy)), which apply to all clients. Roles are checked first, by the
//! name of the instance. So a client without a role for an instance does not learn whether the instance exists.

use super::{
    permission::{Permission, PermissionSet},
    principal::Principal,
    role::{READY_MADE, Role},
};
use crate::instance::Instance;
use gorego_reapi::{
    error::{Error, Result},
    escape::shown,
};
use std::{collections::BTreeMap, sync::Arc};

/// The document to which denials refer.
const HELP: &str = "docs/securing.md";

/// The policy; see the top of this file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    roles: BTreeMap<String, Arc<Role>>,
    /// The roles that all clients have, with and without a credential.
    everybody: Vec<Arc<Role>>,
    /// Whether this server accepts credentials.
    has_credentials: bool,
}

impl Policy {
    /// The policy of a server without credentials: all clients have these permissions in all instances, as far as the
    /// instances allow it.
    pub fn without_credentials(permissions: PermissionSet) -> Self {
        Self::new([], &[], false, Some(permissions))
    }

    /// The policy with the predefined roles and these roles. All clients have the roles with the given names, as far as
    /// these exist, and the permissions in `everything`.
    pub fn new(
        own: impl IntoIterator<Item = Role>,
        everybody: &[String],
        has_credentials: bool,
        everything: Option<PermissionSet>,
    ) -> Self {
        let ready_made =
            READY_MADE.iter().map(|role| Role::everywhere(role.name, PermissionSet::of(role.permissions)));
        let roles: BTreeMap<_, _> =
            ready_made.chain(own).map(|role| (role.name.clone(), Arc::new(role))).collect();
        let everything = everything.map(|permissions| Arc::new(Role::everywhere("everything", permissions)));
        let everybody =
            everybody.iter().filter_map(|name| roles.get(name).cloned()).chain(everything).collect();
        Self { roles, everybody, has_credentials }
    }

    /// The policy of a server with credentials, for tests.
    #[cfg(test)]
    pub(crate) fn with_roles(own: impl IntoIterator<Item = Role>, everybody: &[&str]) -> Self {
        let everybody: Vec<_> = everybody.iter().map(ToString::to_string).collect();
        Self::new(own, &everybody, true, None)
    }

    /// Whether this server accepts credentials.
    pub fn has_credentials(&self) -> bool {
        self.has_credentials
    }

    /// All roles by name, both predefined and configured ones.
    pub fn roles(&self) -> impl Iterator<Item = &Role> {
        self.roles.values().map(|role| &**role)
    }

    /// The roles that all clients have.
    pub fn everybody(&self) -> &[Arc<Role>] {
        &self.everybody
    }

    /// The roles with these names.
    ///
    /// # Errors
    /// `Invalid` if a name is unknown.
    pub fn roles_named(&self, names: &[String]) -> Result<Vec<Arc<Role>>> {
        names.iter().map(|name| self.role(name)).collect()
    }

    fn role(&self, name: &str) -> Result<Arc<Role>> {
        self.roles.get(name).cloned().ok_or_else(|| {
            let known: Vec<_> = self.roles.keys().map(String::as_str).collect();
            Error::Invalid(format!(
                "there is no role \"{}\"; the roles are {}",
                name.escape_debug(),
                known.join(", ")
            ))
        })
    }

    /// Checks that a principal has a permission in the instance with this name.
    ///
    /// # Errors
    /// `Denied`, or `Unauthenticated` if the client has sent no credential but could. The text names the permission and
    /// explains how to get it.
    pub fn permit(&self, principal: &Principal, instance_name: &str, permission: Permission) -> Result<()> {
        if principal.may(instance_name, permission) {
            return Ok(());
        }
        let place = format!("for instance name \"{}\"", shown(instance_name));
        Err(self.denial(principal, &[permission], &place, |role| role.permissions_in(instance_name)))
    }

    /// Checks that a principal has one of these permissions in at least one instance.
    ///
    /// # Errors
    /// As [`Policy::permit`].
    pub fn permit_anywhere(&self, principal: &Principal, permissions: &[Permission]) -> Result<()> {
        if permissions.is_empty() || principal.permissions_anywhere().has_any_of(permissions) {
            return Ok(());
        }
        Err(self.denial(principal, permissions, "here", Role::permissions_anywhere))
    }

    /// Checks that a principal has one of these permissions in the instance with this name.
    ///
    /// # Errors
    /// As [`Policy::permit`].
    pub fn permit_any(
        &self,
        principal: &Principal,
        instance_name: &str,
        permissions: &[Permission],
    ) -> Result<()> {
        if permissions.is_empty() || principal.permissions_in(instance_name).has_any_of(permissions) {
            return Ok(());
        }
        let place = format!("for instance name \"{}\"", shown(instance_name));
        Err(self.denial(principal, permissions, &place, |role| role.permissions_in(instance_name)))
    }

    fn denial(
        &self,
        principal: &Principal,
        needed: &[Permission],
        place: &str,
        permits: impl Fn(&Role) -> PermissionSet,
    ) -> Error {
        let what = match needed {
            [one] => format!("the permission \"{one}\""),
            all if all.len() == Permission::ALL.len() => "any permission".to_owned(),
            several => {
                let names: Vec<_> = several.iter().map(|permission| format!("\"{permission}\"")).collect();
                format!("one of the permissions {}", names.join(", "))
            }
        };
        let having = self.roles.values().filter(|role| permits(role).has_any_of(needed));
        let having: Vec<_> = having.map(|role| role.name.as_str()).collect();
        let roles = if having.is_empty() {
            "no role has it".into()
        } else {
            format!("roles that have it: {}", having.join(", "))
        };
        if principal.is_anonymous() && self.has_credentials {
            return Error::Unauthenticated(format!(
                "this needs a credential with {what} {place}, and the request has none ({roles}); {HELP} says how to \
                 get and send one"
            ));
        }
        Error::Denied(format!(
            "{principal} lacks {what} {place} ({roles}); ask the operator of this server for it ({HELP})"
        ))
    }
}

/// Checks that the settings of an instance allow a permission to its clients, for any roles.
///
/// # Errors
/// `Denied`, with the setting that forbids it.
pub fn allowed_by(instance: &Instance, permission: Permission) -> Result<()> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        access::{principal::PrincipalKind, role::InstancePattern},
        instance::{InstancePolicy, Instances},
    };
    use Permission::{AcRead, AcWrite, CasRead, Execute};

    /// AC-12, CAP-08.
    #[test]
    fn an_instance_forbids_to_everybody_what_it_does_not_allow() {
        for (action_cache_updates, execution, denied) in [
            (true, true, &[][..]),
            (false, true, &[AcWrite]),
            (true, false, &[Execute]),
            (false, false, &[AcWrite, Execute]),
        ] {
            let policy = InstancePolicy { action_cache_updates, execution, ..InstancePolicy::default() };
            let instances = Instances::with_policies([(String::new(), policy)]).unwrap();
            let instance = instances.get("").unwrap();
            for permission in Permission::ALL {
                let allowed = allowed_by(&instance, permission);
                assert_eq!(allowed.is_err(), denied.contains(&permission), "{permission:?}");
                assert!(matches!(allowed, Ok(()) | Err(Error::Denied(_))));
            }
        }
    }

    #[test]
    fn without_credentials_everybody_has_the_permissions_of_the_server() {
        let policy = Policy::without_credentials(PermissionSet::ALL.without(Permission::Admin));
        let anonymous = Principal::anonymous(policy.everybody().to_vec());
        for permission in Permission::ALL {
            let permitted = policy.permit(&anonymous, "main", permission);
            assert_eq!(permitted.is_ok(), permission != Permission::Admin, "{permission}");
            assert!(matches!(permitted, Ok(()) | Err(Error::Denied(_))), "no credential could help");
        }
    }

    #[test]
    fn a_denial_names_the_client_the_permission_and_the_roles_that_have_it() {
        let team = Role {
            name: "team".into(),
            permissions: PermissionSet::of(&[AcWrite]),
            instances: vec![InstancePattern::Below("team/".into())],
        };
        let policy = Policy::with_roles([team], &["reader"]);
        let roles = policy.roles_named(&["team".to_owned()]).unwrap();
        let token = Principal::new(PrincipalKind::Token, "t1", roles, None);
        assert_eq!(policy.permit(&token, "team/a", AcWrite), Ok(()));
        let Err(Error::Denied(why)) = policy.permit(&token, "main", AcWrite) else { panic!() };
        for part in ["token:t1", "\"ac.write\"", "\"main\"", "admin, ci, worker", "docs/securing.md"] {
            assert!(why.contains(part), "{part} is not in {why}");
        }
        assert!(!why.contains("team"), "it would not help: {why}");
        let anonymous = Principal::anonymous(policy.everybody().to_vec());
        assert_eq!(policy.permit(&anonymous, "main", AcRead), Ok(()));
        let denied = policy.permit(&anonymous, "main", AcWrite);
        assert!(
            matches!(&denied, Err(Error::Unauthenticated(why)) if why.contains("ac.write")),
            "{denied:?}"
        );
    }

    #[test]
    fn a_permission_anywhere_is_enough_where_no_instance_is_named() {
        let policy = Policy::with_roles([], &[]);
        let reader = Principal::anonymous(policy.roles_named(&["reader".to_owned()]).unwrap());
        assert_eq!(policy.permit_anywhere(&reader, &[AcWrite, CasRead]), Ok(()));
        assert_eq!(policy.permit_anywhere(&reader, &[]), Ok(()));
        assert!(policy.permit_anywhere(&reader, &[AcWrite]).is_err());
        assert!(policy.permit_anywhere(Principal::nobody(), super::super::permission::ANY).is_err());
        assert!(policy.permit_any(&reader, "a", super::super::permission::ANY).is_ok());
        assert!(policy.roles_named(&["Reader".to_owned()]).unwrap_err().to_string().contains("reader"));
    }
}
