//! What makes a directory a layer of an overlay: whiteouts and opaque directories, as overlayfs reads and writes them.
//!
//! The overlay is mounted with `userxattr`, so none of this takes privileges.

use super::dir;
use rustix::{
    fs::{self as rfs, FileType, Mode, Stat, XattrFlags},
    io::Errno,
};
use std::{ffi::OsStr, fs::File, io, os::fd::AsRawFd as _, path::PathBuf};

/// The extended attribute of a directory that hides the one of the same name beneath it.
const OPAQUE: &str = "user.overlay.opaque";
/// Its value.
const YES: &[u8] = b"y";

/// Whether a node of a layer says that there is nothing under this name.
pub fn is_whiteout(stat: &Stat) -> bool {
    dir::file_type(stat) == FileType::CharacterDevice && stat.st_rdev == 0
}

/// Hides what is beneath under this name.
///
/// # Errors
/// Those of mknod(2).
pub fn make_whiteout(parent: &File, name: &str) -> io::Result<()> {
    Ok(rfs::mknodat(parent, name, FileType::CharacterDevice, Mode::empty(), 0)?)
}

/// Makes a directory hide the one of the same name beneath it.
///
/// # Errors
/// Those of setxattr(2).
pub fn set_opaque(directory: &File) -> io::Result<()> {
    Ok(rfs::fsetxattr(directory, OPAQUE, YES, XattrFlags::empty())?)
}

/// Whether a directory hides the one of the same name beneath it. The handle may be one for naming things only.
///
/// # Errors
/// Those of getxattr(2).
pub fn is_opaque(directory: &File) -> io::Result<bool> {
    let mut value = [0; 4];
    // An O_PATH handle has no attributes, but its name in /proc has.
    let itself = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()));
    let mut read = || rfs::getxattr(&itself, OPAQUE, &mut value[..]);
    let found = match read() {
        // Attributes of users take the permission to read the directory. Its bits are those of the command, and stay.
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
        // What others may write into it is longer than any value that means something.
        Err(Errno::RANGE) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Replaces a whiteout by a directory, which goes on hiding what is beneath under its name.
///
/// # Errors
/// `AlreadyExists` when anything else is there; those of the file system.
pub fn make_opaque(parent: &File, name: &str) -> io::Result<File> {
    if !is_whiteout(&dir::stat_at(parent, OsStr::new(name))?) {
        return Err(Errno::EXIST.into());
    }
    rfs::unlinkat(parent, name, rfs::AtFlags::empty())?;
    let made = make_directory(parent, name)?;
    set_opaque(&made)?;
    Ok(made)
}

/// Makes a directory with the permission bits of every directory, whatever the umask is.
///
/// # Errors
/// Those of the file system.
pub fn make_directory(parent: &File, name: &str) -> io::Result<File> {
    let mode = Mode::from_raw_mode(super::inputs::EXECUTABLE);
    rfs::mkdirat(parent, name, mode)?;
    let made = dir::open_dir(parent, OsStr::new(name))?;
    rfs::fchmod(&made, mode)?;
    Ok(made)
}
