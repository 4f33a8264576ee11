//! Reads a key set: from a file or by https.
//!
//! Only the configured URL is contacted: redirects are not followed, no proxy is used, and neither a token nor the
//! answer can name another address. An answer has at most [`MAX_KEY_SET_BYTES`] and takes at most [`TIME_LIMIT`].

use super::{
    keys::{KeySet, MAX_KEY_SET_BYTES},
    location::JwksLocation,
};
use crate::{http_error::causes, regular_file};
use reqwest::{
    Client, StatusCode,
    header::{ACCEPT, ACCEPT_ENCODING, USER_AGENT},
    redirect::Policy,
};
use std::{fs, io, os::unix::fs::MetadataExt as _, path::Path, time::Duration};
use tokio::time::timeout;

/// Time limit of connecting.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Time limit of a whole download. Requests with unknown keys wait for it.
const TIME_LIMIT: Duration = Duration::from_secs(10);

/// The attributes of a file that change when the file changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileState {
    inode: u64,
    size: u64,
    changed: (i64, i64),
}

/// The result of reading a key set.
pub(super) enum KeyDocument {
    /// The keys, and the state of the file if it is a file.
    Keys(KeySet, Option<FileState>),
    /// The file has not changed.
    Unchanged,
}

/// Reads the keys. A file is read again only if its state is not `known`.
///
/// # Errors
/// Why they cannot be read or used.
pub(super) async fn read(location: &JwksLocation, known: Option<FileState>) -> Result<KeyDocument, String> {
    match location {
        JwksLocation::Url(url) => {
            let limited = timeout(TIME_LIMIT, download(url)).await;
            let bytes = limited.map_err(|_| format!("it took longer than {} s", TIME_LIMIT.as_secs()))??;
            Ok(KeyDocument::Keys(KeySet::parse(&bytes)?, None))
        }
        JwksLocation::File(path) => {
            let path = path.clone();
            let read = tokio::task::spawn_blocking(move || read_file(&path, known)).await;
            read.map_err(|error| error.to_string())?
        }
    }
}

/// Reads the keys of a file, on a thread that may block.
pub(super) fn read_file(path: &Path, known: Option<FileState>) -> Result<KeyDocument, String> {
    let unreadable = |error: io::Error| format!("it cannot be read: {error}");
    let state = FileState::of(&fs::metadata(path).map_err(unreadable)?);
    if known == Some(state) {
        return Ok(KeyDocument::Unchanged);
    }
    // Kubernetes mounts files as symbolic links, which `regular_file` does not follow.
    let target = fs::canonicalize(path).map_err(unreadable)?;
    let bytes = regular_file::read(&target, MAX_KEY_SET_BYTES as u64).map_err(unreadable)?;
    Ok(KeyDocument::Keys(KeySet::parse(&bytes)?, Some(state)))
}

impl FileState {
    fn of(metadata: &fs::Metadata) -> Self {
        Self {
            inode: metadata.ino(),
            size: metadata.size(),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

async fn download(url: &str) -> Result<Vec<u8>, String> {
    let mut response = client(url)?
        .get(url)
        .header(USER_AGENT, concat!("gorego/", env!("CARGO_PKG_VERSION")))
        .header(ACCEPT, "application/json")
        .header(ACCEPT_ENCODING, "identity")
        .send()
        .await
        .map_err(|error| causes(&error))?;
    match response.status() {
        StatusCode::OK => {}
        status if status.is_redirection() => {
            return Err(format!("the server answers {status}; redirects are not followed"));
        }
        status => return Err(format!("the server answers {status}")),
    }
    let mut bytes = Vec::new();
    while let Some(piece) = response.chunk().await.map_err(|error| causes(&error))? {
        if bytes.len() + piece.len() > MAX_KEY_SET_BYTES {
            return Err(format!("the answer is larger than {MAX_KEY_SET_BYTES} bytes"));
        }
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes)
}

/// Creates a client for one download. It is not kept, because downloads are rare, and a new client reads the current CA
/// certificates.
fn client(url: &str) -> Result<Client, String> {
    // An error means that the process already has a provider.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let builder = Client::builder().no_proxy().redirect(Policy::none()).referer(false);
    let builder = builder.connect_timeout(CONNECT_TIMEOUT).https_only(url.starts_with("https:"));
    builder.build().map_err(|error| format!("{}; check that CA certificates are installed", causes(&error)))
}
