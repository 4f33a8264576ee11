//! [`ConnectOptions`]: the server to connect to, the trusted CAs, and the credentials of the client. All commands use
//! it.

use crate::{
    credentials::{CredentialHelper, Credentials},
    endpoint::ServerUri,
    header::checked_header,
};
use gorego_reapi::error::{Error, Result};
use http::HeaderMap;
use rustls::{
    ClientConfig, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};
use std::{
    fs::File,
    io::Read as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};

/// Time limit for connecting.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum size of a file of certificates, a key or headers.
const FILE_MAX_BYTES: u64 = 2 * 1024 * 1024;

/// The options of a connection; see the top of this file.
#[derive(Debug, Clone, Default)]
pub struct ConnectOptions {
    /// The server: `grpc://host:port`, or `grpcs://host:port` for TLS.
    pub endpoint: String,
    /// CAs that may have signed the server's certificate, in PEM; `None` for the CAs of this machine.
    pub tls_ca: Option<PathBuf>,
    /// Certificate of the client and its private key, both in PEM.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// Headers that are sent with every request.
    pub headers: HeaderMap,
    /// A program that provides more headers (Bazel's credential helper protocol).
    pub credential_helper: Option<PathBuf>,
}

impl<T: Into<String>> From<T> for ConnectOptions {
    /// The options for this endpoint, without credentials.
    fn from(endpoint: T) -> Self {
        Self { endpoint: endpoint.into(), ..Self::default() }
    }
}

impl ConnectOptions {
    /// Adds a header that is sent with every request.
    ///
    /// # Errors
    /// `Invalid` for a malformed or reserved name, and for a malformed value. The value is not in the message.
    pub fn add_header(&mut self, name: &str, value: &str) -> Result<()> {
        let (name, value) = checked_header(name, value)?;
        self.headers.append(name, value);
        Ok(())
    }

    /// Reads a file with one `NAME=VALUE` in each line. Empty lines and lines that begin with `#` are ignored.
    ///
    /// # Errors
    /// `Invalid` if it cannot be read or a line is malformed; see [`ConnectOptions::add_header`].
    pub fn add_headers_of_file(&mut self, path: &Path) -> Result<()> {
        let text = String::from_utf8(read(path)?);
        let text = text.map_err(|_| Error::Invalid(format!("{} is not UTF-8 text", path.display())))?;
        self.add_headers(&text).map_err(|error| Error::Invalid(format!("{}: {error}", path.display())))
    }

    /// Like [`ConnectOptions::add_headers_of_file`], with the text of such a file.
    ///
    /// # Errors
    /// See [`ConnectOptions::add_headers_of_file`].
    pub fn add_headers(&mut self, text: &str) -> Result<()> {
        let lines = text.lines().map(str::trim).enumerate();
        for (at, line) in lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#')) {
            let (name, value) = line
                .split_once('=')
                .ok_or_else(|| Error::Invalid(format!("line {} is not NAME=VALUE", at + 1)))?;
            self.add_header(name.trim(), value.trim())?;
        }
        Ok(())
    }

    /// The address of the server.
    ///
    /// # Errors
    /// `Invalid` if it is malformed.
    pub fn server(&self) -> Result<ServerUri> {
        ServerUri::parse(&self.endpoint)
    }

    /// The transport settings, for callers that adjust them. Reads the certificates.
    ///
    /// # Errors
    /// `Invalid` for a malformed endpoint, for files that cannot be read, and for TLS options without TLS.
    pub fn transport(&self) -> Result<Endpoint> {
        let server = self.server()?;
        let malformed = |error: tonic::transport::Error| {
            Error::Invalid(format!("endpoint {}: {}", self.endpoint, innermost(&error)))
        };
        let endpoint = Endpoint::from_shared(server.as_str().to_owned()).map_err(malformed)?;
        let endpoint = endpoint.connect_timeout(CONNECT_TIMEOUT).tcp_nodelay(true);
        if server.has_tls() {
            return endpoint
                .tls_config(self.tls_config()?)
                .map_err(|error| self.unusable_tls(&innermost(&error)));
        }
        if self.tls_ca.is_some() || self.identity.is_some() {
            return Err(Error::Invalid(format!(
                "endpoint {} is without TLS, so that certificates have no effect; write grpcs:// instead of grpc://",
                self.endpoint
            )));
        }
        Ok(endpoint)
    }

    fn unusable_tls(&self, problem: &str) -> Error {
        match &self.identity {
            // rustls reports this, but not every layer above preserves its error.
            Some((cert, key)) if problem.contains("KeyMismatch") => {
                Error::Invalid(format!("{} is not the private key of {}", key.display(), cert.display()))
            }
            _ => Error::Invalid(format!("the TLS options cannot be used: {problem}")),
        }
    }

    fn tls_config(&self) -> Result<ClientTlsConfig> {
        let tls = ClientTlsConfig::new();
        let tls = match &self.tls_ca {
            Some(path) => tls.ca_certificate(Certificate::from_pem(pem(path, "CERTIFICATE")?)),
            None => tls.with_native_roots(),
        };
        Ok(match &self.identity {
            Some((cert, key)) => {
                tls.identity(Identity::from_pem(pem(cert, "CERTIFICATE")?, pem(key, "PRIVATE KEY")?))
            }
            None => tls,
        })
    }

    /// The configuration for callers that make TLS connections themselves.
    pub(crate) fn rustls_config(&self) -> Result<ClientConfig> {
        let unusable = |error: rustls::Error| self.unusable_tls(&error.to_string());
        let malformed = |error: rustls::pki_types::pem::Error| Error::Invalid(format!("not PEM: {error}"));
        let mut roots = RootCertStore::empty();
        match &self.tls_ca {
            Some(path) => {
                let bytes = pem(path, "CERTIFICATE")?;
                roots.add_parsable_certificates(CertificateDer::pem_slice_iter(&bytes).flatten());
            }
            None => _ = roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs),
        }
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(unusable)?
            .with_root_certificates(roots);
        let mut config = match &self.identity {
            Some((cert, key)) => {
                let (cert, key) = (pem(cert, "CERTIFICATE")?, pem(key, "PRIVATE KEY")?);
                let chain = CertificateDer::pem_slice_iter(&cert).flatten().collect();
                let key = PrivateKeyDer::from_pem_slice(&key).map_err(malformed)?;
                builder.with_client_auth_cert(chain, key).map_err(unusable)?
            }
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(config)
    }

    /// The headers of every request. The credential helper is not run yet.
    ///
    /// # Errors
    /// `Invalid` for a malformed endpoint.
    pub fn credentials(&self) -> Result<Credentials> {
        let server = self.server()?;
        let helper = self.credential_helper.as_ref().map(|program| {
            // Bazel uses this form of a gRPC server's address for its helpers.
            let uri = server.authority().map(|authority| format!("https://{authority}/"));
            CredentialHelper::new(program.clone(), uri.unwrap_or_else(|| self.endpoint.clone()))
        });
        Ok(Credentials::new(self.headers.clone(), helper))
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(FILE_MAX_BYTES + 1).read_to_end(&mut bytes));
    read.map_err(|error| crate::local("read", path, &error))?;
    if bytes.len() as u64 > FILE_MAX_BYTES {
        return Err(Error::Invalid(format!("{} is larger than {FILE_MAX_BYTES} bytes", path.display())));
    }
    Ok(bytes)
}

/// Reads a PEM file that contains such an item.
fn pem(path: &Path, item: &str) -> Result<Vec<u8>> {
    let bytes = read(path)?;
    let text = String::from_utf8_lossy(&bytes);
    let is_item =
        |line: &str| line.starts_with("-----BEGIN ") && line.trim_end().ends_with(&format!("{item}-----"));
    if text.contains("-----BEGIN ENCRYPTED PRIVATE KEY") {
        return Err(Error::Invalid(format!(
            "{} is encrypted; decrypt it with `openssl pkey -in FILE -out NEW`",
            path.display()
        )));
    }
    if !text.lines().any(is_item) {
        return Err(Error::Invalid(format!("{} has no {item} in PEM", path.display())));
    }
    Ok(bytes)
}

/// The innermost cause. The outer errors only say "transport error".
pub(crate) fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_read_from_text_and_their_values_are_never_shown() {
        let mut options = ConnectOptions::from("grpc://a:1");
        options.add_headers("# comment\n\nAuthorization = Bearer s=cret\nx-team=a\nx-team=b\n").unwrap();
        assert_eq!(options.headers.get("authorization").unwrap(), "Bearer s=cret");
        assert_eq!(options.headers.get_all("x-team").iter().count(), 2);
        assert!(!format!("{options:?}").contains("cret"));
        for (text, hint) in [
            ("authorization", "line 1"),
            ("x=1\na b=s3cret", "malformed name"),
            ("x=s3cret\u{1}", "characters"),
            ("grpc-timeout=s3cret", "protocol"),
            ("Content-Type=s3cret", "protocol"),
        ] {
            let error = options.add_headers(text).unwrap_err().to_string();
            assert!(error.contains(hint) && !error.contains("s3cret"), "{text}: {error}");
        }
    }

    #[test]
    fn files_that_cannot_be_used_are_named_before_anything_is_sent() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        for (name, content) in [
            ("empty", ""),
            ("locked", "-----BEGIN ENCRYPTED PRIVATE KEY-----"),
            ("cert", "-----BEGIN CERTIFICATE-----\nMA==\n-----END CERTIFICATE-----\n"),
        ] {
            std::fs::write(at(name), content).unwrap();
        }
        let with = |endpoint: &str, ca: Option<&str>, identity: Option<(&str, &str)>| {
            let options = ConnectOptions {
                tls_ca: ca.map(at),
                identity: identity.map(|(cert, key)| (at(cert), at(key))),
                ..endpoint.into()
            };
            options.transport().unwrap_err().to_string()
        };
        let secure = "grpcs://localhost:1";
        for (error, hint) in [
            (with("grpc://localhost:1", Some("cert"), None), "grpcs://"),
            (with("grpc://localhost:1", None, Some(("cert", "cert"))), "grpcs://"),
            (with(secure, Some("absent"), None), "absent"),
            (with(secure, Some("empty"), None), "no CERTIFICATE"),
            (with(secure, Some("cert"), Some(("cert", "locked"))), "openssl pkey"),
            (with(secure, Some("cert"), Some(("cert", "cert"))), "no PRIVATE KEY"),
        ] {
            assert!(error.contains(hint), "{hint}: {error}");
        }
    }
}
