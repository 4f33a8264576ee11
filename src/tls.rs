//! TLS on both ports: certificates, handshakes, and the streams behind them.
//!
//! [`ServerTls`] owns the content of the files of `[tls]`: an immutable [`Material`] behind an `ArcSwap`. Each
//! handshake uses the material that is in force at that time, so a reload affects only new connections.
//! [`ServerTls::watch`] notices changes of the files, even behind symbolic links. Material that cannot be used changes
//! nothing.
//!
//! Open connections are checked again: if a client's certificate has expired, was revoked, or its CA was removed, its
//! connection is closed within a minute ([`RECHECK_INTERVAL`]).
//!
//! Tickets for resumed sessions are encrypted and stored by the clients, so they take no memory here. The ticket keys
//! are replaced every six hours and by each reload.

mod file_versions;
mod handshake;
mod material;
mod plaintext;
mod read_ahead;
mod socket;
#[cfg(test)]
mod tests;

pub(crate) use handshake::TlsPort;
pub(crate) use socket::Socket;

use crate::{
    access::certificate::ClientCertificate,
    budget::Budget,
    connections::{Connections, Reason},
    logging::Event,
};
use arc_swap::ArcSwap;
use file_versions::{FileVersions, Looks};
use gorego_reapi::error::{Error, Result};
use material::{Material, Protocol};
use rustls::pki_types::UnixTime;
use std::{collections::HashMap, path::PathBuf, sync::Arc, time::Duration};
use tokio::time::{Instant, MissedTickBehavior, interval};

/// Target of the log lines of this module.
const LOG: &str = "gorego::tls";
/// Interval between checks of the files. They are read when two checks in a row find the same change, because a
/// certificate and its key are rarely replaced at the same moment. If that fails, each check tries it again, because a
/// file may have been unreadable for a moment, and only the first failure of a change is logged.
const WATCH_INTERVAL: Duration = Duration::from_secs(2);
/// Interval between checks of the certificates of open connections.
const RECHECK_INTERVAL: Duration = Duration::from_secs(30);
/// Interval between warnings about a certificate or a revocation list that ends soon.
const REMIND_INTERVAL: Duration = Duration::from_secs(24 * 3600);

/// The files of `[tls]`, as absolute paths.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TlsFiles {
    /// The certificate chain of the server, without its CA, in PEM.
    pub cert: PathBuf,
    /// Its private key, in PEM.
    pub key: PathBuf,
    /// The CAs that sign client certificates, in PEM; `None` if clients are not asked for a certificate.
    pub client_ca: Option<PathBuf>,
    /// The revocation lists of these CAs, in PEM or DER.
    pub crl: Option<PathBuf>,
    /// Whether clients must have a certificate.
    pub client_certificate_required: bool,
}

/// The TLS of a server; see the top of this file. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct ServerTls(Arc<TlsState>);

#[derive(Debug)]
struct TlsState {
    material: ArcSwap<Material>,
    /// Bounds the handshakes at both ports together.
    handshakes: Budget,
}

/// Files that were read and checked, and are not in force yet.
#[derive(Debug)]
pub(crate) struct PreparedTls(Material);

impl PreparedTls {
    /// A description for people.
    pub(crate) fn description(&self) -> String {
        format!("certificate until {}", self.0.not_after_text())
    }
}

/// The warnings about usable files.
struct TlsWarnings {
    certificate: Option<String>,
    list: Option<String>,
    key: Option<String>,
}

impl TlsWarnings {
    fn of(material: &Material) -> Self {
        let now = UnixTime::now().as_secs();
        let certificate = material.ends_soon(now).map(|problem| {
            let not_after = material.not_after_text();
            format!("the certificate of this server (tls.cert) {problem} ({not_after}); replace the file")
        });
        let list = material.outdated_list(now).map(|ended| {
            format!(
                "a list of revoked certificates (tls.crl) should have been replaced by {ended}; it is still used, and later \
                 revocations are unknown"
            )
        });
        let key = material.key_is_exposed().then(|| {
            "every user of this machine can read the private key (tls.key); chmod it to 0600".to_owned()
        });
        Self { certificate, list, key }
    }
}

impl ServerTls {
    /// Reads the files. Blocks.
    ///
    /// # Errors
    /// `Precondition` that names the key, the file and what is wrong with it.
    pub(crate) fn open(files: TlsFiles) -> Result<Self> {
        let material = ArcSwap::from_pointee(Material::read(files)?);
        let tls = Self(Arc::new(TlsState { material, handshakes: Budget::new(handshake::HANDSHAKES) }));
        tls.remind();
        Ok(tls)
    }

    /// Checks files like [`ServerTls::open`], and returns the warnings of a start. Blocks.
    ///
    /// # Errors
    /// See [`ServerTls::open`].
    pub(crate) fn check_files(files: TlsFiles) -> Result<Vec<String>> {
        let TlsWarnings { certificate, list, key } = TlsWarnings::of(&Material::read(files)?);
        Ok([certificate, list, key].into_iter().flatten().collect())
    }

    /// Reads and checks files if their paths or contents differ from those in force. Blocks.
    ///
    /// # Errors
    /// See [`ServerTls::open`]. A certificate that has expired is also an error, unless the one in force has expired
    /// too.
    pub(crate) fn prepare(&self, files: TlsFiles) -> Result<Option<PreparedTls>> {
        let current = self.material();
        if *current.files() == files && *current.versions() == FileVersions::of(&files) {
            return Ok(None);
        }
        let next = Material::read(files)?;
        let now = UnixTime::now().as_secs();
        if next.has_ended(now) && !current.has_ended(now) {
            return Err(Error::Precondition(format!(
                "tls.cert = {}: the certificate has expired ({}), and the earlier one has not",
                next.files().cert.display(),
                next.not_after_text()
            )));
        }
        Ok(Some(PreparedTls(next)))
    }

    /// Uses prepared files for new connections.
    pub(crate) fn install(&self, prepared: PreparedTls) {
        let not_after = prepared.0.not_after_text();
        self.0.material.store(Arc::new(prepared.0));
        Event::info(LOG, "tls_reloaded")
            .with("not_after", &*not_after)
            .log(format_args!("new connections use the certificate that is valid until {not_after}"));
        self.remind();
    }

    /// Reads the files again if they have changed, and uses them for new connections. Blocks.
    ///
    /// # Errors
    /// See [`ServerTls::prepare`]. The material in force is then not changed.
    fn reload(&self) -> Result<()> {
        if let Some(prepared) = self.prepare(self.material().files().clone())? {
            self.install(prepared);
        }
        Ok(())
    }

    /// The expiry of the server's certificate, in seconds since 1970.
    pub(crate) fn certificate_expiry(&self) -> i64 {
        self.material().not_after()
    }

    pub(crate) fn grpc_port(&self) -> TlsPort {
        TlsPort::new(self.clone(), Protocol::Http2)
    }

    pub(crate) fn http_port(&self) -> TlsPort {
        TlsPort::new(self.clone(), Protocol::Http1)
    }

    fn material(&self) -> arc_swap::Guard<Arc<Material>> {
        self.0.material.load()
    }

    /// Logs a warning if the certificate expires soon, a revocation list is outdated, or other users can read the key.
    fn remind(&self) {
        let material = self.material();
        let TlsWarnings { certificate, list, key } = TlsWarnings::of(&material);
        if let Some(warning) = certificate {
            Event::warn(LOG, "tls_certificate_expires")
                .with("not_after", &*material.not_after_text())
                .log(format_args!("{warning}"));
        }
        if let Some(warning) = list {
            let ended = material.outdated_list(UnixTime::now().as_secs()).unwrap_or_default();
            Event::warn(LOG, "tls_crl_outdated").with("not_after", &*ended).log(format_args!("{warning}"));
        }
        if let Some(warning) = key {
            Event::warn(LOG, "tls_key_exposed")
                .with_shown("path", &material.files().key.display())
                .log(format_args!("{warning}"));
        }
    }

    /// Reloads the files when they change, closes connections whose certificate is no longer accepted, and warns about
    /// an expiring certificate and outdated revocation lists. Runs as long as the server.
    pub(crate) async fn watch(self, connections: Connections) {
        let mut ticks = interval(WATCH_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut looks = Looks::default();
        let (mut checked, mut reminded) = (Instant::now(), Instant::now());
        let mut checked_with = self.0.material.load_full();
        loop {
            ticks.tick().await;
            let current = self.0.material.load_full();
            let found = self.versions(current.files().clone()).await;
            if looks.is_due(&found, current.versions()) {
                let tls = self.clone();
                let reloaded = tokio::task::spawn_blocking(move || tls.reload()).await;
                let reloaded = reloaded.map_err(Error::internal).and_then(|reloaded| reloaded);
                if let Err(error) = reloaded
                    && looks.is_new_failure(&found, &error.to_string())
                {
                    Event::error(LOG, "tls_not_reloaded").with_shown("error", &error).log(format_args!(
                        "the files of [tls] have changed and cannot be used; the earlier ones stay in force: {error}"
                    ));
                }
            }
            let current = self.0.material.load_full();
            if !Arc::ptr_eq(&checked_with, &current) || checked.elapsed() >= RECHECK_INTERVAL {
                let (tls, connections) = (self.clone(), connections.clone());
                let _ = tokio::task::spawn_blocking(move || tls.check(&connections)).await;
                (checked, checked_with) = (Instant::now(), current);
            }
            if reminded.elapsed() >= REMIND_INTERVAL {
                self.remind();
                reminded = Instant::now();
            }
        }
    }

    async fn versions(&self, files: TlsFiles) -> FileVersions {
        tokio::task::spawn_blocking(move || FileVersions::of(&files)).await.unwrap_or_default()
    }

    /// Closes connections whose certificate is no longer accepted.
    fn check(&self, connections: &Connections) {
        let material = self.material();
        let now = UnixTime::now();
        // A build tool opens many connections with the same certificate.
        let mut verdicts: HashMap<[u8; 32], bool> = HashMap::new();
        let mut is_accepted = |certificate: &ClientCertificate| {
            *verdicts
                .entry(*certificate.fingerprint())
                .or_insert_with(|| material.accepts(certificate.chain(), now).is_ok())
        };
        for (state, certificate) in connections.certified() {
            if !is_accepted(&certificate) {
                connections.close(&state, Reason::Certificate);
            }
        }
    }
}
