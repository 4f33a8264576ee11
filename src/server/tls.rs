//! TLS of the server: its files from the settings, and their reload.

use crate::{
    config::{ClientAuth, Settings},
    reload::{PreparedChange, Reloadable},
    tls::{ServerTls, TlsFiles},
};
use gorego_reapi::error::Result;

/// Reads the files of `[tls]`, if there is such a section. Blocks.
///
/// # Errors
/// See [`ServerTls::open`].
pub(super) fn open(settings: &Settings) -> Result<Option<ServerTls>> {
    files(settings).map(ServerTls::open).transpose()
}

/// Checks the files of `[tls]`, without a server, and returns what a start would warn about. Blocks.
///
/// # Errors
/// See [`ServerTls::open`].
pub(crate) fn check_tls_files(settings: &Settings) -> Result<Vec<String>> {
    files(settings).map_or(Ok(Vec::new()), ServerTls::check_files)
}

fn files(settings: &Settings) -> Option<TlsFiles> {
    let tls = settings.tls.clone()?;
    Some(TlsFiles {
        cert: tls.cert,
        key: tls.key,
        client_ca: tls.client_ca,
        crl: tls.crl,
        client_certificate_required: tls.client_auth == ClientAuth::Required,
    })
}

/// Reloads the files of `[tls]`. TLS cannot be switched on or off while the server runs.
pub(super) struct ReloadTls(pub(super) Option<ServerTls>);

impl Reloadable for ReloadTls {
    fn keys(&self) -> &'static [&'static str] {
        if self.0.is_some() { &["tls"] } else { &[] }
    }

    fn prepare(&self, next: &Settings) -> Result<Vec<PreparedChange>> {
        let change = |description, apply| vec![PreparedChange { key: "tls".into(), description, apply }];
        let (Some(tls), Some(files)) = (&self.0, files(next)) else {
            let off = self.0.is_some() && next.tls.is_none();
            return Ok(if off { change("switched off".into(), None) } else { Vec::new() });
        };
        let Some(prepared) = tls.prepare(files)? else { return Ok(Vec::new()) };
        let description = prepared.description();
        let tls = tls.clone();
        let apply = async move {
            tls.install(prepared);
            Ok(())
        };
        Ok(change(description, Some(Box::pin(apply))))
    }
}
