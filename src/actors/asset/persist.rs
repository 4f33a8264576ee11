//! The file in which bindings survive a restart: written whole under another name, then renamed.

use super::{LOG, bindings::Bindings};
use std::{fs, io, path::Path};

/// What the file says. One that cannot be read is no reason not to start: every binding can be made again.
pub fn load(file: &Path) -> Bindings {
    let read = match fs::read(file) {
        Ok(bytes) => Bindings::decode(&bytes).map_err(ToOwned::to_owned),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Bindings::default(),
        Err(error) => Err(error.to_string()),
    };
    read.unwrap_or_else(|problem| {
        log::warn!(target: LOG, event = "bindings_lost", error = problem.as_str();
            "what assets stand for could not be read from {} and is forgotten: {problem}", file.display());
        Bindings::default()
    })
}

/// Replaces the file. Blocks.
pub fn write(file: &Path, bytes: &[u8]) {
    let fresh = file.with_extension("new");
    if let Err(error) = fs::write(&fresh, bytes).and_then(|()| fs::rename(&fresh, file)) {
        log::warn!(target: LOG, event = "bindings_not_saved", error = error.to_string().as_str();
            "what assets stand for could not be written to {}: {error}", file.display());
    }
}
