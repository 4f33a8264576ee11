//! [`Material`]: the checked content of the files of `[tls]`, ready for handshakes. Immutable.
//!
//! Files that would make every handshake fail later are refused here, with the configuration key and the file: a key
//! that belongs to another certificate, an encrypted key, a CA without a revocation list if such lists are used.

use super::{TlsFiles, file_versions::FileVersions};
use gorego_reapi::error::{Error, Result};
use rustls::{
    RootCertStore, ServerConfig,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, UnixTime, pem::PemObject},
    server::{WebPkiClientVerifier, danger::ClientCertVerifier},
    sign::{CertifiedKey, SingleCertAndKey},
    version::{TLS12, TLS13},
};
use std::{
    collections::BTreeSet,
    fmt,
    fs::File,
    io::Read as _,
    os::unix::fs::MetadataExt as _,
    path::Path,
    sync::Arc,
    time::{Duration, UNIX_EPOCH},
};
use x509_parser::{
    certificate::X509Certificate, prelude::FromDer as _, revocation_list::CertificateRevocationList,
};

/// Maximum size of a file of certificates or a key. A bundle of all public CAs has 250 KB.
const FILE_MAX_BYTES: u64 = 2 * 1024 * 1024;
/// Maximum size of a file of revocation lists, which is enough for some hundred thousand entries.
const CRL_MAX_BYTES: u64 = 32 * 1024 * 1024;
/// Warnings about the certificate start in the last quarter of its validity, at most [`WARN_MAX`] before its end.
/// Certificates are usually replaced when a third of their validity is left.
const WARN_PART: u64 = 4;
const WARN_MAX: Duration = Duration::from_secs(14 * 24 * 3600);
/// Permission of all other users to read a file.
const OTHERS_READ: u32 = 0o004;

/// The application protocol of a port, as in ALPN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Protocol {
    /// HTTP/2, for the gRPC port.
    Http2,
    /// HTTP/1.1, for the HTTP port.
    Http1,
}

/// The material; see the top of this file.
#[derive(Debug)]
pub(super) struct Material {
    files: TlsFiles,
    /// The versions of the files before they were read.
    versions: FileVersions,
    http2: Arc<ServerConfig>,
    http1: Arc<ServerConfig>,
    /// The verifier of client certificates; `None` if clients are not asked for one.
    verifier: Option<Arc<dyn ClientCertVerifier>>,
    /// The validity of the server's certificate, in seconds since 1970.
    not_before: i64,
    not_after: i64,
    /// The earliest time at which a revocation list should be replaced.
    list_ends: Option<i64>,
    key_is_exposed: bool,
}

impl Material {
    /// Reads the files. Blocks.
    ///
    /// # Errors
    /// `Precondition` that names the key, the file and what is wrong with it.
    pub(super) fn read(files: TlsFiles) -> Result<Self> {
        let versions = FileVersions::of(&files);
        let provider = Arc::new(ring::default_provider());
        let cert = NamedFile::read("tls.cert", &files.cert, FILE_MAX_BYTES)?;
        let key = NamedFile::read("tls.key", &files.key, FILE_MAX_BYTES)?;
        let chain = cert.certificates()?;
        let (not_before, not_after) = cert.validity(&chain)?;
        let certified =
            CertifiedKey::from_der(chain, key.private_key()?, &provider).map_err(|error| match error {
                rustls::Error::InconsistentKeys(_) => key.refuse(format_args!(
                    "belongs to another certificate than tls.cert = {}",
                    cert.path.display()
                )),
                error => key.refuse(format_args!("cannot be used: {error}")),
            })?;
        let ca = files.client_ca.as_ref().map(|path| NamedFile::read("tls.client_ca", path, FILE_MAX_BYTES));
        let ca = ca.transpose()?;
        let lists =
            files.crl.as_ref().map(|path| NamedFile::read("tls.crl", path, CRL_MAX_BYTES)).transpose()?;
        let lists = lists.as_ref().map(RevocationLists::of).transpose()?;
        let verifier = match &ca {
            Some(ca) => Some(verifier(ca, lists.as_ref(), files.client_certificate_required, &provider)?),
            None => None,
        };
        let certified = Arc::new(certified);
        let config = |alpn: &[u8]| server_config(&provider, certified.clone(), verifier.clone(), alpn);
        Ok(Self {
            http2: config(b"h2")?,
            http1: config(b"http/1.1")?,
            verifier,
            not_before,
            not_after,
            list_ends: lists.and_then(|lists| lists.ends),
            key_is_exposed: key.mode & OTHERS_READ != 0,
            versions,
            files,
        })
    }

    /// The files that were read.
    pub(super) fn files(&self) -> &TlsFiles {
        &self.files
    }

    /// The versions of these files.
    pub(super) fn versions(&self) -> &FileVersions {
        &self.versions
    }

    /// The configuration for the handshakes of a port.
    pub(super) fn config(&self, protocol: Protocol) -> &Arc<ServerConfig> {
        match protocol {
            Protocol::Http2 => &self.http2,
            Protocol::Http1 => &self.http1,
        }
    }

    /// Verifies a client's certificate chain.
    ///
    /// # Errors
    /// Why it is not accepted.
    pub(super) fn accepts(&self, chain: &[CertificateDer<'_>], now: UnixTime) -> Result<(), rustls::Error> {
        let (Some(verifier), Some((own, others))) = (&self.verifier, chain.split_first()) else {
            return Err(rustls::Error::NoCertificatesPresented);
        };
        verifier.verify_client_cert(own, others, now).map(|_| ())
    }

    /// Combines the handshakes of one material with the verdicts of another.
    #[cfg(test)]
    pub(super) fn keep_sessions_of(&mut self, sessions: &Self, verdicts: &Self) {
        (self.http2, self.http1) = (sessions.http2.clone(), sessions.http1.clone());
        self.verifier = verdicts.verifier.clone();
    }

    /// The end of the validity of the server's certificate, in seconds since 1970.
    pub(super) fn not_after(&self) -> i64 {
        self.not_after
    }

    /// The same time as text.
    pub(super) fn not_after_text(&self) -> String {
        time_text(self.not_after)
    }

    /// Whether the server's certificate has expired.
    pub(super) fn has_ended(&self, now: u64) -> bool {
        self.not_after < seconds(now)
    }

    /// Why the server's certificate is not valid now; `None` if it is valid.
    pub(super) fn ends_soon(&self, now: u64) -> Option<&'static str> {
        let now = seconds(now);
        let part = (self.not_after - self.not_before) / seconds(WARN_PART);
        let warned = self.not_after - part.min(seconds(WARN_MAX.as_secs()));
        match now {
            _ if now < self.not_before => Some("is not valid yet"),
            _ if now > self.not_after => Some("has expired, so clients refuse it"),
            _ if now >= warned => Some("expires soon"),
            _ => None,
        }
    }

    /// When a revocation list should have been replaced, if that time has passed.
    pub(super) fn outdated_list(&self, now: u64) -> Option<String> {
        self.list_ends.filter(|ends| *ends < seconds(now)).map(time_text)
    }

    /// Whether every user of the machine can read the private key.
    pub(super) fn key_is_exposed(&self) -> bool {
        self.key_is_exposed
    }
}

fn seconds(seconds: u64) -> i64 {
    i64::try_from(seconds).unwrap_or(i64::MAX)
}

fn time_text(time: i64) -> String {
    let time = u64::try_from(time).ok().and_then(|time| UNIX_EPOCH.checked_add(Duration::from_secs(time)));
    time.map_or_else(|| "before 1970".to_owned(), |time| humantime::format_rfc3339_seconds(time).to_string())
}

fn server_config(
    provider: &Arc<CryptoProvider>,
    certified: Arc<CertifiedKey>,
    verifier: Option<Arc<dyn ClientCertVerifier>>,
    alpn: &[u8],
) -> Result<Arc<ServerConfig>> {
    let unusable =
        |error: rustls::Error| Error::Internal(format!("the TLS library cannot be set up: {error}"));
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&TLS13, &TLS12])
        .map_err(unusable)?;
    let builder = match verifier {
        Some(verifier) => builder.with_client_cert_verifier(verifier),
        None => builder.with_no_client_auth(),
    };
    let mut config = builder.with_cert_resolver(Arc::new(SingleCertAndKey::from(certified)));
    config.alpn_protocols = vec![alpn.to_vec()];
    // The server stores no sessions: clients store the tickets.
    config.ticketer = ring::Ticketer::new().map_err(unusable)?;
    Ok(Arc::new(config))
}

fn verifier(
    ca: &NamedFile<'_>,
    lists: Option<&RevocationLists>,
    required: bool,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<dyn ClientCertVerifier>> {
    let mut roots = RootCertStore::empty();
    for certificate in ca.certificates()? {
        if let Some(lists) = lists {
            let (_, parsed) = X509Certificate::from_der(&certificate)
                .map_err(|_| ca.refuse("has a certificate that is malformed"))?;
            if !lists.issuers.contains(parsed.subject().as_raw()) {
                return Err(ca.refuse(format_args!(
                    "has the CA \"{}\", for which tls.crl has no list of revoked certificates, so that all certificates of \
                     this CA would be refused",
                    printable(parsed.subject())
                )));
            }
        }
        roots.add(certificate).map_err(|error| ca.refuse(format_args!("has no usable CA: {error}")))?;
    }
    let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone());
    let builder = match lists {
        Some(lists) => builder.with_crls(lists.lists.iter().cloned()),
        None => builder,
    };
    let builder = if required { builder } else { builder.allow_unauthenticated() };
    builder.build().map_err(|error| ca.refuse(format_args!("cannot be used with tls.crl: {error}")))
}

/// The revocation lists in a file.
struct RevocationLists {
    lists: Vec<CertificateRevocationListDer<'static>>,
    /// The encoded names of their issuers.
    issuers: BTreeSet<Vec<u8>>,
    /// The time at which the first of them should be replaced.
    ends: Option<i64>,
}

impl RevocationLists {
    fn of(file: &NamedFile<'_>) -> Result<Self> {
        let lists = if file.is_pem() {
            let lists =
                CertificateRevocationListDer::pem_slice_iter(&file.bytes).collect::<Result<Vec<_>, _>>();
            lists.map_err(|error| file.refuse(format_args!("is malformed: {error}")))?
        } else {
            vec![CertificateRevocationListDer::from(file.bytes.clone())]
        };
        if lists.is_empty() {
            return Err(file.refuse("has no list of revoked certificates (BEGIN X509 CRL)"));
        }
        let (mut issuers, mut ends) = (BTreeSet::new(), None::<i64>);
        for list in &lists {
            let (_, parsed) = CertificateRevocationList::from_der(list)
                .map_err(|_| file.refuse("is no list of revoked certificates in PEM or DER"))?;
            issuers.insert(parsed.issuer().as_raw().to_vec());
            let end = parsed.next_update().map(|time| time.timestamp());
            ends = [ends, end].into_iter().flatten().min();
        }
        Ok(Self { lists, issuers, ends })
    }
}

/// The content of a configured file.
struct NamedFile<'a> {
    key: &'static str,
    path: &'a Path,
    bytes: Vec<u8>,
    mode: u32,
}

impl<'a> NamedFile<'a> {
    fn read(key: &'static str, path: &'a Path, max_bytes: u64) -> Result<Self> {
        let mut file = Self { key, path, bytes: Vec::new(), mode: 0 };
        let read = |bytes: &mut Vec<u8>| {
            let opened = File::open(path)?;
            let found = opened.metadata()?;
            opened.take(max_bytes + 1).read_to_end(bytes)?;
            Ok::<_, std::io::Error>(found.mode())
        };
        file.mode =
            read(&mut file.bytes).map_err(|error| file.refuse(format_args!("cannot be read: {error}")))?;
        if file.bytes.len() as u64 > max_bytes {
            return Err(file.refuse(format_args!("is larger than {max_bytes} bytes")));
        }
        Ok(file)
    }

    fn refuse(&self, problem: impl fmt::Display) -> Error {
        Error::Precondition(format!("{} = {}: {problem}", self.key, self.path.display()))
    }

    fn is_pem(&self) -> bool {
        self.bytes.windows(10).any(|part| part == b"-----BEGIN")
    }

    fn certificates(&self) -> Result<Vec<CertificateDer<'static>>> {
        let found = CertificateDer::pem_slice_iter(&self.bytes).collect::<Result<Vec<_>, _>>();
        let found = found.map_err(|error| self.refuse(format_args!("is malformed: {error}")))?;
        if found.is_empty() {
            return Err(self.refuse("has no certificate in PEM (BEGIN CERTIFICATE)"));
        }
        Ok(found)
    }

    fn private_key(&self) -> Result<PrivateKeyDer<'static>> {
        PrivateKeyDer::from_pem_slice(&self.bytes).map_err(|_| {
            let is_encrypted = self.bytes.windows(9).any(|part| part == b"ENCRYPTED");
            self.refuse(if is_encrypted {
                "is encrypted, and the server cannot ask for the passphrase; decrypt it with `openssl pkey -in FILE \
                 -out NEW`"
            } else {
                "has no private key in PEM (BEGIN PRIVATE KEY)"
            })
        })
    }

    /// The validity of the first certificate of a chain, in seconds since 1970.
    fn validity(&self, chain: &[CertificateDer<'_>]) -> Result<(i64, i64)> {
        let first = chain.first().map(|first| X509Certificate::from_der(first));
        let Some(Ok((_, first))) = first else { return Err(self.refuse("is malformed")) };
        let validity = first.validity();
        Ok((validity.not_before.timestamp(), validity.not_after.timestamp()))
    }
}

/// A name for an error message, with special characters escaped.
fn printable(name: &x509_parser::x509::X509Name<'_>) -> String {
    name.to_string().escape_debug().to_string()
}
