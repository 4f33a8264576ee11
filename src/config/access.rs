//! `[access]`: the settings of access control, and their checks.

use super::{
    Machine,
    checker::Checker,
    jwt::{self, JwtConfig},
};
use crate::access::{
    credential::is_user,
    grants::{CertificateField, CertificateGrant},
    permission::{Permission, PermissionSet},
    policy::Policy,
    role::{InstancePattern, READY_MADE, Role},
    settings::AccessSettings,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// Maximum number of roles, and of patterns of one role.
const ROLES_MAX: usize = 1_000;
/// Maximum length of a role's name in bytes.
const ROLE_NAME_MAX: usize = 64;
/// The key of the roles in messages.
const ROLES: &str = "access.roles";

/// The `[access]` section: the roles of clients, and the sources of their credentials.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AccessConfig {
    /// The file with the static tokens; empty for none.
    pub tokens: PathBuf,
    /// The file with users and the hashes of their passwords; empty for none.
    pub passwords: PathBuf,
    /// The roles of clients without a credential. All other clients have them too.
    pub anonymous: Vec<String>,
    /// The roles of clients with certificates.
    pub certificates: Vec<CertificateConfig>,
    /// The issuers of signed tokens.
    pub jwt: Vec<JwtConfig>,
    /// The roles of users with passwords.
    pub users: BTreeMap<String, Vec<String>>,
    /// The configured roles, in addition to the predefined ones.
    pub roles: BTreeMap<String, RoleConfig>,
}

/// An `[[access.certificates]]` section. It has either a subject or a name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CertificateConfig {
    /// A pattern for the subject.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<String>,
    /// A pattern for one of the alternative names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The names of the roles.
    pub roles: Vec<String>,
}

/// An `[access.roles.NAME]` section: one configured role.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RoleConfig {
    /// The predefined role whose permissions it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub like: Option<String>,
    /// Names of permissions that it has in addition.
    #[serde(default)]
    pub permissions: Vec<String>,
    /// The instances that it applies to.
    #[serde(default = "everywhere")]
    pub instances: Vec<String>,
}

fn everywhere() -> Vec<String> {
    vec!["*".to_owned()]
}

impl AccessConfig {
    /// Whether the configuration has credentials.
    pub(super) fn has_credentials(&self) -> bool {
        !self.tokens.as_os_str().is_empty()
            || !self.passwords.as_os_str().is_empty()
            || !self.certificates.is_empty()
            || !self.jwt.is_empty()
    }
}

/// Checks the section. `is_exposed` says whether the server listens on an address that other machines can reach.
pub(super) fn access(check: &mut Checker<'_>, is_exposed: bool, machine: &Machine) -> AccessSettings {
    let config = &check.loaded.config.access;
    let policy = policy(check, config, is_exposed);
    known_roles(check, "access.anonymous", &config.anonymous, &policy);
    // Without a password file, users are not credentials, and an open server would stay open.
    let has_passwords = !config.passwords.as_os_str().is_empty();
    check.require_with(
        "access.users",
        &["access.passwords"],
        has_passwords || config.users.is_empty(),
        "has no effect without access.passwords",
    );
    for (user, roles) in &config.users {
        check.require(
            "access.users",
            is_user(user),
            &format!("\"{}\" is not a user name", user.escape_debug()),
        );
        known_roles(check, "access.users", roles, &policy);
    }
    let certificates = certificates(check, config, &policy);
    let jwt = jwt::issuers(check, machine);
    for role in jwt.iter().flat_map(|issuer| &issuer.rules.roles) {
        known_roles(check, "access.jwt", std::slice::from_ref(&role.role), &policy);
    }
    let mut file =
        |key: &str, path: &Path| (!path.as_os_str().is_empty()).then(|| check.directory(key, path, machine));
    AccessSettings {
        policy,
        tokens: file("access.tokens", &config.tokens),
        passwords: file("access.passwords", &config.passwords),
        users: config.users.clone(),
        certificates,
        jwt,
    }
}

fn certificates(check: &mut Checker<'_>, config: &AccessConfig, policy: &Policy) -> Vec<CertificateGrant> {
    const KEY: &str = "access.certificates";
    let has_ca = !check.loaded.config.tls.client_ca.as_os_str().is_empty();
    let holds = has_ca || config.certificates.is_empty();
    check.require_with(KEY, &["tls.client_ca"], holds, "has no effect without tls.client_ca");
    let mut grants = Vec::new();
    for CertificateConfig { subject, name, roles } in &config.certificates {
        known_roles(check, KEY, roles, policy);
        let (field, pattern) = match (subject, name) {
            (Some(subject), None) => (CertificateField::Subject, subject),
            (None, Some(name)) => (CertificateField::Name, name),
            _ => {
                check.refuse(KEY, "needs either subject or name in each entry");
                continue;
            }
        };
        match CertificateGrant::parse(field, pattern, roles.clone()) {
            Ok(grant) => grants.push(grant),
            Err(problem) => check.refuse(KEY, &problem),
        }
    }
    grants
}

fn policy(check: &mut Checker<'_>, config: &AccessConfig, is_exposed: bool) -> Policy {
    check.require(
        "access.roles",
        config.roles.len() <= ROLES_MAX,
        &format!("has more than {ROLES_MAX} roles"),
    );
    let roles: Vec<Role> =
        config.roles.iter().filter_map(|(name, role)| own_role(check, name, role)).collect();
    // Without credentials, all clients keep the permissions of servers without access control.
    let permissions =
        if is_exposed { PermissionSet::ALL.without(Permission::Admin) } else { PermissionSet::ALL };
    let everything = (!config.has_credentials() && config.anonymous.is_empty()).then_some(permissions);
    Policy::new(roles, &config.anonymous, config.has_credentials(), everything)
}

fn own_role(check: &mut Checker<'_>, name: &str, role: &RoleConfig) -> Option<Role> {
    let problems = check.problems.len();
    let is_name = !name.is_empty()
        && name.len() <= ROLE_NAME_MAX
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    check.require(
        ROLES,
        is_name,
        &format!(
            "\"{}\" is not a name of a role: letters, digits and \"-_.\", at most 64",
            name.escape_debug()
        ),
    );
    let is_ready_made = READY_MADE.iter().any(|ready_made| ready_made.name == name);
    check.require(
        ROLES,
        !is_ready_made,
        &format!("\"{name}\" is a predefined role; give your role another name"),
    );
    let (permissions, instances) = (role_permissions(check, name, role), role_instances(check, name, role));
    (check.problems.len() == problems).then(|| Role { name: name.to_owned(), permissions, instances })
}

/// The permissions of a role: its own, and the permissions of the predefined role in `like`.
fn role_permissions(check: &mut Checker<'_>, name: &str, role: &RoleConfig) -> PermissionSet {
    let mut permissions = PermissionSet::default();
    if let Some(like) = &role.like {
        match READY_MADE.iter().find(|ready_made| ready_made.name == like) {
            Some(ready_made) => permissions = PermissionSet::of(ready_made.permissions),
            None => {
                let known: Vec<_> = READY_MADE.iter().map(|ready_made| ready_made.name).collect();
                check.refuse(
                    ROLES,
                    &format!(
                        "{name}.like = \"{}\" is not a predefined role: {}",
                        like.escape_debug(),
                        known.join(", ")
                    ),
                );
            }
        }
    }
    for text in &role.permissions {
        match Permission::from_name(text) {
            Some(permission) => permissions = permissions.and(PermissionSet::of(&[permission])),
            None => {
                let known: Vec<_> = Permission::ALL.iter().map(|permission| permission.name()).collect();
                check.refuse(
                    ROLES,
                    &format!(
                        "{name}.permissions has \"{}\", which is no permission; there are {}",
                        text.escape_debug(),
                        known.join(", ")
                    ),
                );
            }
        }
    }
    permissions
}

fn role_instances(check: &mut Checker<'_>, name: &str, role: &RoleConfig) -> Vec<InstancePattern> {
    let parsed: Vec<_> = role.instances.iter().map(|text| (text, InstancePattern::parse(text))).collect();
    for (text, _) in parsed.iter().filter(|(_, pattern)| pattern.is_none()) {
        check.refuse(
            ROLES,
            &format!(
                "{name}.instances has \"{}\"; the forms are an instance name, \"NAME/*\" for all below it, and \"*\"",
                text.escape_debug()
            ),
        );
    }
    check.require(
        ROLES,
        !role.instances.is_empty() && parsed.len() <= ROLES_MAX,
        &format!("{name}.instances is empty or too long"),
    );
    parsed.into_iter().filter_map(|(_, pattern)| pattern).collect()
}

/// Refuses names of roles that do not exist.
fn known_roles(check: &mut Checker<'_>, key: &str, names: &[String], policy: &Policy) {
    for name in names {
        // A configured role with another problem is reported only once.
        let is_own = check.loaded.config.access.roles.contains_key(name);
        if let (Err(error), false) = (policy.roles_named(std::slice::from_ref(name)), is_own) {
            check.require_with(key, &[ROLES], false, &error.to_string());
        }
    }
}
