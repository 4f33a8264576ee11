//! [`Permission`] and [`PermissionSet`]: the permissions that requests need. Pure.

use std::fmt;

/// A permission that a request may need. Its text in the configuration is [`Permission::name`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Permission {
    /// To read blobs and trees.
    CasRead,
    /// To upload blobs, at either port.
    CasWrite,
    /// To read action results.
    AcRead,
    /// To write action results.
    AcWrite,
    /// To run actions on the workers of this server.
    Execute,
    /// To see, cancel and delete the operations that the principal itself has begun, and to read their live output.
    OperationsOwn,
    /// The same for the operations of all principals. It includes [`Permission::OperationsOwn`].
    OperationsAll,
    /// To fetch assets. Pushing assets also requires [`Permission::AcWrite`], because pushed assets are served to
    /// others.
    Assets,
    /// To read and write log streams of clients.
    Logs,
    /// To read the metrics of the server.
    Metrics,
    /// To administer the server.
    Admin,
}

/// The permissions of a method. A request needs one of them: usually the first, but the handler may require another
/// one, depending on the resource. A method without permissions is open to all clients without authentication.
pub type Permissions = &'static [Permission];

/// The permissions of a method that requires any one permission.
pub const ANY: Permissions = &Permission::ALL;

impl Permission {
    /// All permissions that exist.
    pub const ALL: [Self; 11] = [
        Self::CasRead,
        Self::CasWrite,
        Self::AcRead,
        Self::AcWrite,
        Self::Execute,
        Self::OperationsOwn,
        Self::OperationsAll,
        Self::Assets,
        Self::Logs,
        Self::Metrics,
        Self::Admin,
    ];

    /// Its name in the configuration and in messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::CasRead => "cas.read",
            Self::CasWrite => "cas.write",
            Self::AcRead => "ac.read",
            Self::AcWrite => "ac.write",
            Self::Execute => "execute",
            Self::OperationsOwn => "operations.own",
            Self::OperationsAll => "operations.all",
            Self::Assets => "assets",
            Self::Logs => "logs",
            Self::Metrics => "metrics",
            Self::Admin => "admin",
        }
    }

    /// The permission with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|permission| permission.name() == name)
    }

    const fn bit(self) -> u16 {
        1 << self as u16
    }
}

impl fmt::Display for Permission {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

/// A set of permissions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PermissionSet(u16);

impl PermissionSet {
    /// The set with every permission.
    pub const ALL: Self = Self::of(&Permission::ALL);

    /// The set of these permissions and those that they include.
    pub const fn of(permissions: &[Permission]) -> Self {
        let (mut bits, mut index) = (0, 0);
        while index < permissions.len() {
            let permission = permissions[index];
            bits |= permission.bit();
            if matches!(permission, Permission::OperationsAll) {
                bits |= Permission::OperationsOwn.bit();
            }
            index += 1;
        }
        Self(bits)
    }

    /// Whether the permission is in the set.
    pub const fn contains(self, permission: Permission) -> bool {
        self.0 & permission.bit() != 0
    }

    /// Whether at least one of these permissions is in the set.
    pub fn has_any_of(self, permissions: &[Permission]) -> bool {
        permissions.iter().any(|permission| self.contains(*permission))
    }

    /// The set as a number, for [`PermissionSet::from_bits`].
    pub(crate) const fn bits(self) -> u16 {
        self.0
    }

    /// The set with this number.
    pub(crate) const fn from_bits(bits: u16) -> Self {
        Self(bits)
    }

    /// The union of both sets.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The set without this permission.
    #[must_use]
    pub const fn without(self, permission: Permission) -> Self {
        Self(self.0 & !permission.bit())
    }

    /// Its permissions in order.
    pub fn iter(self) -> impl Iterator<Item = Permission> {
        Permission::ALL.into_iter().filter(move |permission| self.contains(*permission))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_permission_has_one_name_and_a_place_of_its_own_in_a_set() {
        for permission in Permission::ALL {
            assert_eq!(Permission::from_name(permission.name()), Some(permission));
            let set = PermissionSet::of(&[permission]);
            let all = permission == Permission::OperationsAll;
            assert_eq!(set.iter().count(), if all { 2 } else { 1 }, "{permission}");
            assert!(set.contains(permission) && !set.without(permission).contains(permission));
        }
        assert_eq!(Permission::from_name("CAS.READ"), None);
        assert_eq!(PermissionSet::ALL.iter().count(), Permission::ALL.len());
    }

    #[test]
    fn permission_to_see_all_operations_includes_the_principals_own() {
        assert!(PermissionSet::of(&[Permission::OperationsAll]).contains(Permission::OperationsOwn));
        assert!(!PermissionSet::of(&[Permission::OperationsOwn]).contains(Permission::OperationsAll));
        assert!(!PermissionSet::of(&[Permission::OperationsOwn]).has_any_of(&[Permission::Admin]));
        // A permission that includes another one is not included by it.
        assert!(!PermissionSet::of(&[Permission::OperationsOwn]).has_any_of(&[Permission::OperationsAll]));
    }
}
