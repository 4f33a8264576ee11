//! [`AccessSettings`]: the checked settings of access control.

use super::{
    grants::CertificateGrant,
    jwt::{JwksLocation, JwtSettings},
    policy::Policy,
};
use std::{collections::BTreeMap, path::PathBuf};

/// The settings of access control.
#[derive(Debug, Clone, PartialEq)]
pub struct AccessSettings {
    /// The roles, and which of them all clients have.
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

impl AccessSettings {
    /// The files that the section names: tokens, passwords and the keys of issuers.
    pub(crate) fn files(&self) -> impl Iterator<Item = &PathBuf> {
        let keys = self.jwt.iter().filter_map(|issuer| match &issuer.keys.location {
            JwksLocation::File(path) => Some(path),
            JwksLocation::Url(_) => None,
        });
        self.tokens.iter().chain(&self.passwords).chain(keys)
    }
}
