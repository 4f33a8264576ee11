//! [`Principal`]: the proven identity of a client. Pure.

use super::{
    permission::{Permission, PermissionSet},
    role::Role,
};
use crate::caller::{Peer, PrincipalId};
use std::{
    fmt,
    sync::{Arc, LazyLock},
    time::SystemTime,
};

/// Maximum length of a principal's name in bytes.
pub const NAME_MAX_BYTES: usize = 256;
/// The name of every client without a credential.
pub const ANONYMOUS: &str = "anonymous";

/// The identity of a client, with its roles. Cheap to clone.
#[derive(Clone)]
pub struct Principal(Arc<PrincipalState>);

struct PrincipalState {
    kind: PrincipalKind,
    name: Box<str>,
    /// The number that stands for the name.
    id: PrincipalId,
    /// The part of the name after the prefix, before it was made printable.
    detail: Box<str>,
    roles: Vec<Arc<Role>>,
    expires: Option<SystemTime>,
    /// A number that differs between two credentials of the same client.
    mark: u64,
}

/// The kind of credential that identifies a principal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PrincipalKind {
    /// The client has sent no credential.
    Anonymous,
    /// A static token of this server.
    Token,
    /// A name and a password.
    Basic,
    /// A client certificate that the handshake has verified.
    Certificate,
    /// A signed token (JWT) of a configured issuer.
    Jwt,
}

impl PrincipalKind {
    const ALL: [Self; 5] = [Self::Anonymous, Self::Token, Self::Basic, Self::Certificate, Self::Jwt];

    const fn prefix(self) -> &'static str {
        match self {
            Self::Anonymous => ANONYMOUS,
            Self::Token => "token:",
            Self::Basic => "basic:",
            Self::Certificate => "cert:",
            Self::Jwt => "jwt:",
        }
    }
}

/// Whether a principal can have this name.
pub(crate) fn is_name(text: &str) -> bool {
    PrincipalKind::ALL.iter().any(|kind| match text.strip_prefix(kind.prefix()) {
        Some(detail) => detail.is_empty() == (*kind == PrincipalKind::Anonymous),
        None => false,
    })
}

/// Whether the name of a principal can begin with this text.
pub(crate) fn begins_a_name(text: &str) -> bool {
    PrincipalKind::ALL.iter().any(|kind| kind.prefix().starts_with(text)) || is_name(text)
}

impl Principal {
    /// A principal with these roles. `detail` is the id of a token, a user, the subject of a certificate, or issuer and
    /// subject of a signed token (`ISSUER#SUBJECT`). It is empty for an anonymous client. In the name, it is made
    /// printable and shortened.
    pub fn new(
        kind: PrincipalKind,
        detail: &str,
        roles: Vec<Arc<Role>>,
        expires: Option<SystemTime>,
    ) -> Self {
        Self::marked(kind, detail, roles, expires, 0)
    }

    /// Like [`Principal::new`], with a number that changes when the client gets another credential.
    pub fn marked(
        kind: PrincipalKind,
        detail: &str,
        roles: Vec<Arc<Role>>,
        expires: Option<SystemTime>,
        mark: u64,
    ) -> Self {
        let name = printable(kind.prefix(), detail).into_boxed_str();
        let id = PrincipalId::of(&name);
        Self(Arc::new(PrincipalState { kind, name, id, detail: detail.into(), roles, expires, mark }))
    }

    /// An anonymous client with these roles.
    pub fn anonymous(roles: Vec<Arc<Role>>) -> Self {
        Self::new(PrincipalKind::Anonymous, "", roles, None)
    }

    /// A principal without roles, for requests that were not authenticated.
    pub fn nobody() -> &'static Self {
        static NOBODY: LazyLock<Principal> = LazyLock::new(|| Principal::anonymous(Vec::new()));
        &NOBODY
    }

    /// The kind of its credential.
    pub fn kind(&self) -> PrincipalKind {
        self.0.kind
    }

    /// Its name: `anonymous`, `token:ID`, `basic:USER`, `cert:SUBJECT` or `jwt:ISSUER#SUBJECT`. It is printable, has at
    /// most [`NAME_MAX_BYTES`], and is not secret.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The id of the token, the user, the subject of the certificate, or issuer and subject of the signed token.
    pub fn detail(&self) -> &str {
        &self.0.detail
    }

    /// A number that changes when the client gets another credential.
    pub fn mark(&self) -> u64 {
        self.0.mark
    }

    /// The roles that determine the permissions of this principal.
    pub fn roles(&self) -> &[Arc<Role>] {
        &self.0.roles
    }

    /// When its credential expires.
    pub fn expires(&self) -> Option<SystemTime> {
        self.0.expires
    }

    /// Whether the client has sent no credential.
    pub fn is_anonymous(&self) -> bool {
        self.0.kind == PrincipalKind::Anonymous
    }

    /// The peer that its shares belong to: the principal itself, or the calling peer if the client is anonymous.
    pub(crate) fn peer(&self, caller: Peer) -> Peer {
        if self.is_anonymous() { caller } else { Peer::Principal(self.0.id) }
    }

    /// Whether both are the same client, as far as this server can tell. Their roles may differ after a change of the
    /// rules.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.name() == other.name()
    }

    /// Its permissions in the instance with this name.
    pub fn permissions_in(&self, instance_name: &str) -> PermissionSet {
        let roles = self.roles().iter();
        roles.fold(PermissionSet::default(), |all, role| all.and(role.permissions_in(instance_name)))
    }

    /// Its permissions in any instance.
    pub fn permissions_anywhere(&self) -> PermissionSet {
        let roles = self.roles().iter();
        roles.fold(PermissionSet::default(), |all, role| all.and(role.permissions_anywhere()))
    }

    /// Whether it has a permission in the instance with this name.
    pub fn may(&self, instance_name: &str, permission: Permission) -> bool {
        self.permissions_in(instance_name).contains(permission)
    }
}

impl Default for Principal {
    fn default() -> Self {
        Self::nobody().clone()
    }
}

impl fmt::Debug for Principal {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Principal({})", self.name())
    }
}

impl fmt::Display for Principal {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

impl PartialEq for Principal {
    fn eq(&self, other: &Self) -> bool {
        self.is_same(other)
    }
}

impl Eq for Principal {}

/// Makes a name printable and bounded. Two details could be shortened to the same name, so a shortened name ends with a
/// hash of the whole detail.
fn printable(prefix: &str, detail: &str) -> String {
    const CUT_HASH_CHARS: usize = 32;
    let mut name = String::from(prefix);
    for character in detail.chars() {
        match character {
            // The escape character is escaped too, so that different details have different names.
            '\\' => name.push_str("\\\\"),
            ' '..='~' => name.push(character),
            other => name.extend(other.escape_unicode()),
        }
    }
    // Only shortened names have the maximum length, so no other detail can produce the same name.
    if name.len() >= NAME_MAX_BYTES {
        let hash = gorego_reapi::digest::DigestFunction::Sha256.digest(detail.as_bytes()).hash_hex();
        name.truncate(NAME_MAX_BYTES - CUT_HASH_CHARS - 3);
        name.push_str("...");
        name.push_str(hash.get(..CUT_HASH_CHARS).unwrap_or_default());
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::role::InstancePattern;
    use proptest::prelude::*;

    fn named(detail: &str) -> Principal {
        Principal::new(PrincipalKind::Jwt, detail, Vec::new(), None)
    }

    proptest! {
        #[test]
        fn names_are_printable_bounded_and_different_for_different_clients(
            one in "(\\PC|\\\\|[\u{0}-\u{20}]){0,300}",
            other in "(\\PC|\\\\|[\u{0}-\u{20}]){0,300}",
        ) {
            let (a, b) = (named(&one), named(&other));
            for principal in [&a, &b] {
                prop_assert!(principal.name().starts_with("jwt:") && principal.name().len() <= NAME_MAX_BYTES);
                prop_assert!(principal.name().bytes().all(|byte| (b' '..=b'~').contains(&byte)));
            }
            prop_assert_eq!(a.is_same(&b), one == other);
        }
    }

    #[test]
    fn a_long_name_is_not_mistaken_for_another_one_that_begins_like_it() {
        let (a, b) = (named(&format!("{}a", "x".repeat(400))), named(&format!("{}b", "x".repeat(400))));
        assert_eq!(a.name().len(), NAME_MAX_BYTES);
        assert!(!a.is_same(&b));
    }

    #[test]
    fn a_principal_may_do_what_one_of_its_roles_permits_there() {
        use Permission::{AcWrite, CasRead, Metrics};
        let readers = Role::everywhere("readers", PermissionSet::of(&[CasRead]));
        let writers = Role {
            name: "writers".into(),
            permissions: PermissionSet::of(&[AcWrite, Metrics]),
            instances: vec![InstancePattern::Named("main".into())],
        };
        let principal = Principal::anonymous(vec![readers.into(), writers.into()]);
        assert!(
            principal.may("", CasRead) && principal.may("main", CasRead) && principal.may("main", AcWrite)
        );
        assert!(!principal.may("", AcWrite) && principal.permissions_anywhere().contains(Metrics));
        assert_eq!(Principal::nobody().permissions_anywhere(), PermissionSet::default());
    }
}
