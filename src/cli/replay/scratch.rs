//! [`Scratch`]: the one directory that `gorego replay` writes to.
//!
//! ```text
//! blobs/HASH      the files of the input root, as they came from the server
//! build/          the build root, where the action is staged
//! root/           the input root after the run
//! stdout, stderr  what the command printed
//! recorded/       what the server has recorded in place of outputs that differ
//! ```

use crate::actors::worker::build_root;
use gorego_reapi::error::{Error, Result};
use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

/// The content of a directory that was kept, for users.
pub(super) const CONTENTS: &str = "root is the input root after the run, stdout and stderr is what the command printed, and \
                                   recorded has what the server recorded instead of outputs that differ";

/// The directory; removed by [`Scratch::clear`], at the latest when this is dropped.
#[derive(Debug)]
pub(super) struct Scratch {
    path: PathBuf,
    kept: AtomicBool,
}

impl Scratch {
    /// Creates the directory in the directory for temporary files.
    ///
    /// # Errors
    /// If it cannot be created.
    pub(super) fn new() -> Result<Self> {
        let directory = std::env::temp_dir();
        let made = tempfile::Builder::new().prefix("gorego-replay-").tempdir_in(&directory);
        let path = made.and_then(|made| made.keep().canonicalize()).map_err(|error| {
            Error::Invalid(format!(
                "could not make a directory in {}: {error}; set TMPDIR to a directory that can be written",
                directory.display()
            ))
        })?;
        Ok(Self { path, kept: AtomicBool::new(false) })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn blobs(&self) -> PathBuf {
        self.path.join("blobs")
    }

    pub(super) fn build(&self) -> PathBuf {
        self.path.join("build")
    }

    pub(super) fn root(&self) -> PathBuf {
        self.path.join("root")
    }

    pub(super) fn stdout(&self) -> PathBuf {
        self.path.join("stdout")
    }

    pub(super) fn stderr(&self) -> PathBuf {
        self.path.join("stderr")
    }

    /// The directory for recorded outputs.
    pub(super) fn recorded(&self) -> PathBuf {
        self.path.join("recorded")
    }

    /// Keeps the files for the user.
    pub(super) fn keep(&self) {
        self.kept.store(true, Ordering::SeqCst);
    }

    /// Removes everything that is not kept. Errors are ignored, because the directory is temporary.
    pub(super) fn clear(&self) {
        let remove = |path: &Path| -> io::Result<()> {
            let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(()) };
            build_root::remove(&File::open(parent)?, name)
        };
        if self.kept.load(Ordering::SeqCst) {
            let _ = remove(&self.blobs());
            let _ = remove(&self.build());
        } else {
            let _ = remove(&self.path);
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        self.clear();
    }
}
