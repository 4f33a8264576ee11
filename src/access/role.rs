//! [`Role`]: a named set of permissions for instances, and the predefined roles. Pure.

use super::permission::{
    Permission::{self, AcRead, AcWrite, Assets, CasRead, CasWrite, Execute, Logs, OperationsOwn},
    PermissionSet,
};
use gorego_reapi::instance_name::check_instance_name;

/// The instances that a role applies to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InstancePattern {
    /// All instances, written as `*`.
    Every,
    /// The instance with this name.
    Named(String),
    /// `NAME/*`: the instances whose names begin with this name and a slash. The stored text includes the slash.
    Below(String),
}

impl InstancePattern {
    /// Parses a pattern; `None` if it is not valid.
    pub fn parse(text: &str) -> Option<Self> {
        if text == "*" {
            return Some(Self::Every);
        }
        let name = text.strip_suffix("/*");
        let is_name = |name: &str| !name.contains('*') && check_instance_name(name).is_ok();
        match name {
            Some(name) if !name.is_empty() && is_name(name) => Some(Self::Below(format!("{name}/"))),
            None if is_name(text) => Some(Self::Named(text.to_owned())),
            _ => None,
        }
    }

    /// Whether the pattern matches the instance with this name.
    pub fn covers(&self, name: &str) -> bool {
        match self {
            Self::Every => true,
            Self::Named(own) => own == name,
            Self::Below(start) => name.starts_with(start.as_str()),
        }
    }
}

/// The role; see the top of this file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Role {
    /// The name that is used to assign it to principals.
    pub name: String,
    /// The permissions that it gives.
    pub permissions: PermissionSet,
    /// The instances that it applies to. Permissions for the whole server, such as `metrics`, are given if any instance
    /// is listed.
    pub instances: Vec<InstancePattern>,
}

/// A role that every server has.
#[derive(Debug, Clone, Copy)]
pub struct ReadyMade {
    /// The name. The configuration may use it like the name of a configured role.
    pub name: &'static str,
    /// Its permissions, in all instances.
    pub permissions: &'static [Permission],
    /// A description of its users.
    pub purpose: &'static str,
}

/// The roles that every server has.
pub const READY_MADE: [ReadyMade; 5] = [
    ReadyMade {
        name: "reader",
        permissions: &[CasRead, AcRead],
        purpose: "uses cached results and writes nothing",
    },
    ReadyMade {
        name: "developer",
        permissions: &[CasRead, CasWrite, AcRead, Execute, OperationsOwn, Assets, Logs],
        purpose: "uploads inputs and runs actions, but may not write action results",
    },
    ReadyMade {
        name: "ci",
        permissions: &[CasRead, CasWrite, AcRead, AcWrite, Execute, OperationsOwn, Assets, Logs],
        purpose: "a developer that may also write action results, such as a build machine",
    },
    ReadyMade {
        name: "worker",
        permissions: &[CasRead, CasWrite, AcRead, AcWrite, Logs],
        purpose: "runs actions for a server and stores their results",
    },
    ReadyMade { name: "admin", permissions: &Permission::ALL, purpose: "may do everything" },
];

impl Role {
    /// A role for all instances.
    pub fn everywhere(name: &str, permissions: PermissionSet) -> Self {
        Self { name: name.to_owned(), permissions, instances: vec![InstancePattern::Every] }
    }

    /// Its permissions in the instance with this name.
    pub fn permissions_in(&self, instance_name: &str) -> PermissionSet {
        let covers = self.instances.iter().any(|pattern| pattern.covers(instance_name));
        if covers { self.permissions } else { PermissionSet::default() }
    }

    /// Its permissions in any instance.
    pub fn permissions_anywhere(&self) -> PermissionSet {
        if self.instances.is_empty() { PermissionSet::default() } else { self.permissions }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_is_every_instance_one_or_those_below_a_name() {
        let covers = |pattern: &str| {
            let pattern = InstancePattern::parse(pattern).unwrap();
            ["", "a", "a/b", "a/b/c", "ab"].map(|name| pattern.covers(name))
        };
        assert_eq!(covers("*"), [true; 5]);
        assert_eq!(covers(""), [true, false, false, false, false]);
        assert_eq!(covers("a"), [false, true, false, false, false]);
        assert_eq!(covers("a/*"), [false, false, true, true, false]);
        assert_eq!(covers("a/b/*"), [false, false, false, true, false]);
        for text in ["/*", "a*", "*/a", "a/*/b", "**", "a/", "/a", "blobs", "a//b", "a/**"] {
            assert_eq!(InstancePattern::parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_developer_may_do_all_that_ci_may_but_write_results() {
        let [developer, ci] = [1, 2].map(|index| PermissionSet::of(READY_MADE[index].permissions));
        assert_eq!(developer, ci.without(AcWrite));
        assert!(ci.contains(AcWrite));
        assert!(
            READY_MADE
                .iter()
                .all(|role| role.name == "admin" || !role.permissions.contains(&Permission::Admin))
        );
    }

    #[test]
    fn the_documentation_has_the_ready_made_roles() {
        let documented = crate::access::documented::table("## What a client may do");
        let roles = READY_MADE.iter().map(|role| {
            (vec![role.name], role.permissions.iter().map(|permission| permission.name()).collect::<Vec<_>>())
        });
        assert_eq!(documented, roles.collect::<Vec<_>>());
    }
}
