//! [`BindingsFile`]: the file in which bindings survive a restart.

use super::{LOG, bindings::Bindings};
use crate::{logging::Event, state_file};
use std::{
    path::PathBuf,
    sync::{Mutex, PoisonError},
};

/// The largest file that is read. Files that this server writes are far smaller.
const MAX_FILE_BYTES: u64 = 256 * 1024 * 1024;

/// The file of the bindings; see the module documentation.
#[derive(Debug)]
pub(super) struct BindingsFile {
    path: PathBuf,
    /// The number of the newest write, locked by the running one. The last write at the end of the process may find an
    /// earlier one still running.
    newest: Mutex<u64>,
}

impl BindingsFile {
    /// Names the file, without accessing it.
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, newest: Mutex::new(0) }
    }

    /// Reads the bindings. An unreadable file is logged and ignored, because every binding can be made again. Blocks.
    pub(super) fn load(&self) -> Bindings {
        let read = match state_file::read(&self.path, MAX_FILE_BYTES) {
            Ok(Some(bytes)) => Bindings::decode(&bytes).map_err(ToOwned::to_owned),
            Ok(None) => return Bindings::default(),
            Err(error) => Err(error.to_string()),
        };
        read.unwrap_or_else(|problem| {
            Event::warn(LOG, "bindings_lost").with("error", &problem).log(format_args!(
                "the bindings of assets could not be read from {} and are forgotten: {problem}",
                self.path.display()
            ));
            Bindings::default()
        })
    }

    /// Replaces the file, unless a write with a higher number came first. Returns whether this succeeded. Blocks.
    pub(super) fn write(&self, number: u64, bytes: &[u8]) -> bool {
        let mut newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        if number < *newest {
            return true;
        }
        *newest = number;
        let written = state_file::replace(&self.path, bytes);
        if let Err(error) = &written {
            Event::warn(LOG, "bindings_not_saved").with_shown("error", error).log(format_args!(
                "the bindings of assets could not be written to {}: {error}",
                self.path.display()
            ));
        }
        written.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::actors::asset::{bindings::Binding, request::AssetKey};
    use gorego_reapi::digest::DigestFunction;
    use std::{sync::Arc, time::SystemTime};

    #[test]
    fn the_newest_bindings_stay_whichever_write_comes_last_and_a_damaged_file_is_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let file = BindingsFile::new(directory.path().join("bindings"));
        assert!(file.load().is_empty());
        let digest = DigestFunction::Sha256.digest(b"x");
        let now = SystemTime::UNIX_EPOCH;
        let mut bindings = Bindings::default();
        bindings.bind(
            AssetKey([1; 32]),
            Binding { digest, obtained_at: now, expires_at: None, references: Arc::default() },
        );
        assert!(file.write(2, &bindings.encode()));
        assert!(file.write(1, &Bindings::default().encode()));
        assert_eq!(file.load().len(), 1);
        assert!(file.write(3, b"no bindings"));
        assert!(file.load().is_empty());
        let nowhere = BindingsFile::new(directory.path().join("missing/bindings"));
        assert!(!nowhere.write(1, b""));
    }
}
