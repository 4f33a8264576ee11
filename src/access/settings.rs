//! [`AccessSettings`]: what the configuration says about access, checked.

use super::{grants::CertificateGrant, jwt::JwtSettings, policy::Policy};
use std::{collections::BTreeMap, path::PathBuf};

/// See the top of this file.
#[derive(Debug, Clone, PartialEq)]
pub struct AccessSettings {
    /// Who may do what.
    pub policy: Policy,
    /// Absolute path of the list of static tokens; `None` for a server without them.
    pub tokens: Option<PathBuf>,
    /// Absolute path of the password file; `None` for a server without passwords.
    pub passwords: Option<PathBuf>,
    /// The names of the roles of users with passwords. All of these roles exist.
    pub users: BTreeMap<String, Vec<String>>,
    /// The roles of holders of certificates. All of these roles exist.
    pub certificates: Vec<CertificateGrant>,
    /// The issuers of signed tokens. All roles that they give exist.
    pub jwt: Vec<JwtSettings>,
}
