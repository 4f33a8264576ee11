//! The identity of a file, whatever its path is.

use rustix::fs::Stat;

/// Device and inode number.
pub(crate) type FileIdentity = (u64, u64);

/// The identity of the file of a stat.
#[allow(clippy::unnecessary_cast, clippy::useless_conversion)]
pub(crate) fn file_id(stat: &Stat) -> FileIdentity {
    (stat.st_dev as u64, stat.st_ino as u64)
}
