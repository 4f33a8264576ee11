//! Opens files of the store that another process may have replaced.
//!
//! Other processes of the same user can put anything in the place of a stored file. A FIFO or device would block the
//! thread that opens or reads it, and a symbolic link would lead out of the store. So files are opened without
//! following links and without blocking, and only regular files are read.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::Path,
};

/// Opens a regular file for reading.
///
/// # Errors
/// The errors of open(2); [`is_something_else`] recognises the case of another kind of file. `InvalidData` for a file
/// whose permissions do not let this process read it, although its directory can be entered.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
    let opened = OpenOptions::new().read(true).custom_flags(flags).open(path);
    let file = opened.map_err(|error| match error.kind() {
        // The directory can be entered, so the permissions of this file were changed.
        io::ErrorKind::PermissionDenied if fs::symlink_metadata(path).is_ok() => {
            io::Error::new(io::ErrorKind::InvalidData, "this process may not read the file any more")
        }
        _ => error,
    })?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::from_raw_os_error(libc::ENXIO)) }
}

/// Like [`open`], for a file that belongs to this process: if its permissions do not let the owner read it, they are
/// restored.
///
/// # Errors
/// See [`open`].
pub(crate) fn open_own(path: &Path) -> io::Result<File> {
    match open(path) {
        Err(_) if restore_permissions(path, 0o400) => open(path),
        opened => opened,
    }
}

/// Gives the owner of a regular file these permissions, if it does not have them. Returns whether that changed
/// anything. Only the owner can do that.
pub(crate) fn restore_permissions(path: &Path, bits: u32) -> bool {
    let Ok(metadata) = fs::symlink_metadata(path) else { return false };
    let mode = metadata.permissions().mode();
    metadata.is_file()
        && mode & bits != bits
        && fs::set_permissions(path, fs::Permissions::from_mode(mode | bits)).is_ok()
}

/// Whether [`open`] failed because the path is not a regular file: a link, socket, FIFO, device or directory.
pub(crate) fn is_something_else(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ELOOP | libc::ENXIO | libc::ENOTDIR | libc::ENODEV))
}

/// Reads a regular file of at most `max` bytes.
///
/// # Errors
/// The errors of [`open`] and read(2); `FileTooLarge` for a larger file.
pub(crate) fn read(path: &Path, max: u64) -> io::Result<Vec<u8>> {
    read_open(&open(path)?, max)
}

/// Like [`read`], for a file that belongs to this process; see [`open_own`].
///
/// # Errors
/// See [`read`].
pub(crate) fn read_own(path: &Path, max: u64) -> io::Result<Vec<u8>> {
    read_open(&open_own(path)?, max)
}

/// Like [`read`], for an open file.
///
/// # Errors
/// See [`read`].
pub(crate) fn read_open(file: &File, max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(max.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max { Err(io::ErrorKind::FileTooLarge.into()) } else { Ok(bytes) }
}

/// Writes a new file. It replaces anything that exists at its path.
///
/// # Errors
/// The errors of open(2) and write(2).
pub(crate) fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    OpenOptions::new().write(true).create_new(true).open(path)?.write_all(bytes)
}

/// Runs a test on a thread that obeys the permissions of files even if its user is root. Threads that it starts do so
/// too.
#[cfg(test)]
pub(crate) fn obeying_permissions<T: Send + 'static>(test: impl FnOnce() -> T + Send + 'static) -> T {
    use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};
    let run = move || {
        let own = capabilities(None).unwrap();
        let overriding = CapabilitySet::DAC_OVERRIDE | CapabilitySet::DAC_READ_SEARCH;
        set_capabilities(None, CapabilitySets { effective: own.effective - overriding, ..own }).unwrap();
        test()
    };
    std::thread::spawn(run).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{CWD, FileType, Mode, mknodat};

    /// None of the calls blocks.
    #[test]
    fn only_a_regular_file_is_read_and_anything_else_is_recognised() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        fs::write(path("file"), "content").unwrap();
        assert_eq!(read(&path("file"), 7).unwrap(), b"content");
        assert_eq!(read(&path("file"), 6).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        mknodat(CWD, path("fifo"), FileType::Fifo, Mode::RWXU, 0).unwrap();
        fs::create_dir(path("directory")).unwrap();
        std::os::unix::fs::symlink("file", path("link")).unwrap();
        std::os::unix::fs::symlink("/dev/zero", path("device")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
        for name in ["fifo", "directory", "link", "device", "socket", "file/below"] {
            assert!(is_something_else(&open(&path(name)).unwrap_err()), "{name}");
        }
        assert!(!is_something_else(&open(&path("absent")).unwrap_err()));
        for name in ["fifo", "link", "absent"] {
            write(&path(name), b"new").unwrap();
            assert_eq!(read(&path(name), 100).unwrap(), b"new", "{name}");
        }
        assert_eq!(read(&path("file"), 100).unwrap(), b"content", "the link was replaced, not followed");
    }

    /// Root is refused nothing, so the test asks for the permissions themselves.
    #[test]
    fn a_file_without_permissions_gets_them_back() {
        let directory = tempfile::tempdir().unwrap();
        let (file, link) = (directory.path().join("file"), directory.path().join("link"));
        fs::write(&file, "content").unwrap();
        std::os::unix::fs::symlink("file", &link).unwrap();
        let mode = || fs::metadata(&file).unwrap().permissions().mode() & 0o777;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o0)).unwrap();
        for other in [link, directory.path().to_owned(), directory.path().join("absent")] {
            assert!(!restore_permissions(&other, 0o600) && mode() == 0, "{}", other.display());
        }
        assert!(restore_permissions(&file, 0o400) && mode() == 0o400);
        assert!(restore_permissions(&file, 0o600) && mode() == 0o600);
        assert!(!restore_permissions(&file, 0o400) && mode() == 0o600, "nothing is missing");
        assert_eq!(read_own(&file, 7).unwrap(), b"content");
    }
}
