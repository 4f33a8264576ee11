//! The on-disk format of an overlay layer: whiteouts and opaque directories, as overlayfs reads and writes them.
//!
//! Overlays are mounted with `userxattr`, so this needs no privileges.

use super::dir;
use rustix::{
    fs::{self as rfs, FileType, Mode, Stat, XattrFlags},
    io::Errno,
};
use std::{ffi::OsStr, fs::File, io, os::fd::AsRawFd as _, path::PathBuf};

/// The extended attribute that makes a directory opaque: it hides the directory of the same name in the layer below.
const OPAQUE: &str = "user.overlay.opaque";
/// The value of the attribute.
const YES: &[u8] = b"y";

/// Whether a file of a layer is a whiteout, which hides an entry of the layer below.
pub(super) fn is_whiteout(stat: &Stat) -> bool {
    dir::file_type(stat) == FileType::CharacterDevice && stat.st_rdev == 0
}

/// Creates a whiteout, which hides the entry of this name in the layer below.
///
/// # Errors
/// The errors of mknod(2).
pub(super) fn make_whiteout(parent: &File, name: &str) -> io::Result<()> {
    Ok(rfs::mknodat(parent, name, FileType::CharacterDevice, Mode::empty(), 0)?)
}

/// Makes a directory opaque: it hides the directory of the same name in the layer below.
///
/// # Errors
/// The errors of setxattr(2).
pub(super) fn set_opaque(directory: &File) -> io::Result<()> {
    Ok(rfs::fsetxattr(directory, OPAQUE, YES, XattrFlags::empty())?)
}

/// Whether a directory is opaque. The handle may be one that was opened with `O_PATH`.
///
/// # Errors
/// The errors of getxattr(2).
pub(super) fn is_opaque(directory: &File) -> io::Result<bool> {
    let mut value = [0; 4];
    // fgetxattr(2) does not work on an O_PATH handle, but getxattr(2) on its path in /proc does.
    let itself = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()));
    let mut read = || rfs::getxattr(&itself, OPAQUE, &mut value[..]);
    let found = match read() {
        // Reading a user attribute requires read permission on the directory. The command's permission bits are
        // restored.
        Err(Errno::ACCESS) => {
            let mode = Mode::from_raw_mode(rfs::fstat(directory)?.st_mode);
            rfs::chmod(&itself, mode | Mode::RUSR)?;
            let found = read();
            rfs::chmod(&itself, mode)?;
            found
        }
        found => found,
    };
    match found {
        Ok(length) => Ok(value.get(..length) == Some(YES)),
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(false),
        // The attribute was set by another program: it is longer than any valid value.
        Err(Errno::RANGE) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Replaces a whiteout by an opaque directory, which hides the same entry of the layer below.
///
/// # Errors
/// `AlreadyExists` if something other than a whiteout is there; the errors of the file system.
pub(super) fn make_opaque(parent: &File, name: &str) -> io::Result<File> {
    if !is_whiteout(&dir::stat_at(parent, OsStr::new(name))?) {
        return Err(Errno::EXIST.into());
    }
    rfs::unlinkat(parent, name, rfs::AtFlags::empty())?;
    let made = make_directory(parent, name)?;
    set_opaque(&made)?;
    Ok(made)
}

/// Creates a directory with the usual permission bits, whatever the umask is.
///
/// # Errors
/// The errors of the file system.
pub(super) fn make_directory(parent: &File, name: &str) -> io::Result<File> {
    let mode = Mode::from_raw_mode(super::input_attributes::EXECUTABLE);
    rfs::mkdirat(parent, name, mode)?;
    let made = dir::open_dir(parent, OsStr::new(name))?;
    rfs::fchmod(&made, mode)?;
    Ok(made)
}
