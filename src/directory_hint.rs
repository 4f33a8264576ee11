//! A hint to the file system for directories whose subdirectories have a high turnover of files.

use rustix::{
    fd::AsFd,
    fs::{IFlags, ioctl_getflags, ioctl_setflags},
};

/// Asks the file system to place the subdirectories of `directory` far apart.
///
/// ext4 places the files of a directory near it and does not reuse inodes that were freed in the last minutes. Where
/// many files were just deleted, each new file costs up to a millisecond of searching. Spread over the disk, the
/// searches are short. Other file systems ignore the flag. Failures are ignored because this is only a hint.
pub(crate) fn spread_subdirectories(directory: impl AsFd) {
    if let Ok(flags) = ioctl_getflags(&directory)
        && !flags.contains(IFlags::TOPDIR)
    {
        let _ = ioctl_setflags(&directory, flags | IFlags::TOPDIR);
    }
}
