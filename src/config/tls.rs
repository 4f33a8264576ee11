//! `[tls]`: the settings of TLS, and their checks.

use super::{Machine, checker::Checker};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// The `[tls]` section: the certificate of both ports, and those of clients.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TlsConfig {
    /// Certificate chain of the server, without its CA, in PEM; empty for no TLS.
    pub cert: PathBuf,
    /// Private key of the certificate, in PEM.
    pub key: PathBuf,
    /// CAs that sign client certificates, in PEM; empty if clients are not asked for a certificate.
    pub client_ca: PathBuf,
    /// Revocation lists of these CAs, in PEM or DER; empty for none.
    pub crl: PathBuf,
    /// Whether a client must have a certificate.
    pub client_auth: ClientAuth,
}

/// Whether a client must have a certificate, if `client_ca` is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClientAuth {
    /// A connection without a certificate is refused.
    #[default]
    Required,
    /// A client without a certificate may have other credentials. A certificate that is presented must be valid.
    Optional,
}

/// The section after all checks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsSettings {
    /// Absolute path of the certificate.
    pub cert: PathBuf,
    /// Absolute path of the private key.
    pub key: PathBuf,
    /// Absolute path of the CAs of clients; `None` if clients are not asked for a certificate.
    pub client_ca: Option<PathBuf>,
    /// Absolute path of the revocation lists.
    pub crl: Option<PathBuf>,
    /// Whether a client must have a certificate.
    pub client_auth: ClientAuth,
}

impl TlsSettings {
    /// The files that the section names.
    pub(crate) fn files(&self) -> impl Iterator<Item = &PathBuf> {
        [Some(&self.cert), Some(&self.key), self.client_ca.as_ref(), self.crl.as_ref()].into_iter().flatten()
    }
}

/// Checks the section; `None` without TLS.
pub(super) fn tls(check: &mut Checker<'_>, machine: &Machine) -> Option<TlsSettings> {
    let TlsConfig { cert, key, client_ca, crl, client_auth } = &check.loaded.config.tls;
    let is_set = |path: &Path| !path.as_os_str().is_empty();
    check.require("tls.key", is_set(key) || !is_set(cert), "is needed, because tls.cert is set");
    for (name, path) in [("tls.key", key), ("tls.client_ca", client_ca), ("tls.crl", crl)] {
        let holds = is_set(cert) || !is_set(path);
        check.require_with(name, &["tls.cert"], holds, "has no effect without tls.cert");
    }
    let is_optional = *client_auth == ClientAuth::Optional;
    for (name, is_set_too) in [("tls.crl", is_set(crl)), ("tls.client_auth", is_optional)] {
        let holds = is_set(client_ca) || !is_set_too;
        check.require_with(name, &["tls.client_ca"], holds, "has no effect without tls.client_ca");
    }
    if !is_set(cert) {
        return None;
    }
    let mut path = |name: &str, path: &Path| is_set(path).then(|| check.directory(name, path, machine));
    Some(TlsSettings {
        cert: path("tls.cert", cert).unwrap_or_default(),
        key: path("tls.key", key).unwrap_or_default(),
        client_ca: path("tls.client_ca", client_ca),
        crl: path("tls.crl", crl),
        client_auth: *client_auth,
    })
}
