//! [`LayerProblem`]: why a layer could not be unpacked.

use gorego_reapi::error::Error;
use rustix::io::Errno;
use std::{error::Error as StdError, ffi::OsStr, io, os::unix::ffi::OsStrExt as _, path::Path};

/// Why a layer could not be unpacked.
#[derive(Debug)]
pub(super) enum LayerProblem {
    /// The layer is damaged or hostile.
    Refused(String),
    /// The layer is not at fault.
    Failed(Error),
}

impl LayerProblem {
    /// Converts an error of reading a layer: an error that the reader of the blob reports stays as it is, and any other
    /// error means a damaged archive.
    pub(super) fn of_reading(error: io::Error) -> Self {
        match inner_error(&error) {
            Some(error) => Self::Failed(error.clone()),
            None => Self::Refused(error.to_string()),
        }
    }

    /// Adds the path of the entry.
    pub(super) fn at(self, path: &[u8]) -> Self {
        match self {
            Self::Refused(problem) => Self::Refused(format!("\"{}\": {problem}", shown(path))),
            failed => failed,
        }
    }
}

/// The [`Error`] inside of an IO error that passed through a library, if there is one.
pub(super) fn inner_error(error: &io::Error) -> Option<&Error> {
    let mut next: Option<&(dyn StdError + 'static)> = Some(error);
    while let Some(error) = next {
        if let Some(inner_error) = error.downcast_ref() {
            return Some(inner_error);
        }
        next = match error.downcast_ref::<io::Error>() {
            Some(error) => error.get_ref().map(|inner| inner as &(dyn StdError + 'static)),
            None => error.source(),
        };
    }
    None
}

impl From<Error> for LayerProblem {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// Converts an error of the file system while an entry was written.
impl From<io::Error> for LayerProblem {
    fn from(error: io::Error) -> Self {
        let of_the_entry = [
            Errno::NAMETOOLONG,
            Errno::LOOP,
            Errno::NOTDIR,
            Errno::ISDIR,
            Errno::NOENT,
            Errno::EXIST,
            Errno::MLINK,
            Errno::XDEV,
            Errno::INVAL,
            Errno::ILSEQ,
        ];
        match error.raw_os_error() {
            Some(errno) if of_the_entry.iter().any(|of_entry| of_entry.raw_os_error() == errno) => {
                Self::Refused(error.to_string())
            }
            _ => Self::Failed(Error::io("unpack an image", &error)),
        }
    }
}

impl From<Errno> for LayerProblem {
    fn from(error: Errno) -> Self {
        io::Error::from(error).into()
    }
}

/// A path in the form for messages.
pub(super) fn shown(path: &[u8]) -> String {
    Path::new(OsStr::from_bytes(path)).to_string_lossy().escape_debug().take(200).collect()
}
