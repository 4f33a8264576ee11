//! One hint to the file system, for directories whose subdirectories see many files come and go.

use rustix::{
    fd::AsFd,
    fs::{IFlags, ioctl_getflags, ioctl_setflags},
};

/// Asks the file system to place the subdirectories of `directory` far from one another.
///
/// ext4 keeps a directory's files near it and does not reuse what was deleted there in the last minutes: where many files
/// were just deleted, each new one costs up to a millisecond of searching. Spread over the disk, the searches are short.
/// Other file systems do not know the flag, and need not: this is a hint, and its failure is nothing.
pub fn spread_subdirectories(directory: impl AsFd) {
    if let Ok(flags) = ioctl_getflags(&directory)
        && !flags.contains(IFlags::TOPDIR)
    {
        let _ = ioctl_setflags(&directory, flags | IFlags::TOPDIR);
    }
}
