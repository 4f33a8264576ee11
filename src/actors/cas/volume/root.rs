//! Opens the directory of a store: its lock, its format, and the directories that always exist.

use super::{durable::replace, names::FileClass};
use crate::{disk::is_full, regular_file};
use gorego_reapi::error::{Error, Result};
use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};
use std::{
    fmt::Display,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

/// The content of `<root>/format`.
const FORMAT: &str = "gorego store 3\n";
/// Earlier formats: without segments, and without checksums of large files and packed files. Such a store is used as it
/// is, and the missing parts are added while it is used.
const OLD_FORMATS: [&str; 2] = ["gorego store 1\n", "gorego store 2\n"];
/// A bound on the size of that file, and of the note.
pub(super) const MAX_FORMAT_BYTES: u64 = 4_096;
/// The directories of a store beside those of [`FileClass`].
const DIRECTORIES: [&str; 5] = ["", "v1", "v1/trash", "segments", "checksums"];
/// The files without which a store is not opened.
const FILES: [&str; 2] = ["lock", "format"];

/// The error for a directory that cannot be used as a store.
pub(super) fn unusable(root: &Path, what: &str, error: &dyn Display) -> Error {
    refusal(root, what, error, "local_cache_dir chooses another directory")
}

/// Like [`unusable`], after an error of the file system.
pub(super) fn failed(root: &Path, what: &str, error: &io::Error) -> Error {
    if is_full(error) {
        refusal(
            root,
            what,
            error,
            "make room on its file system, or set local_cache_dir to a directory on another",
        )
    } else {
        unusable(root, what, error)
    }
}

fn refusal(root: &Path, what: &str, error: &dyn Display, remedy: &str) -> Error {
    Error::Precondition(format!("cannot use {} as the store: {what}: {error} ({remedy})", root.display()))
}

/// Adds its path to an error of the file system.
fn at(path: &Path) -> impl Fn(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// Checks that nothing else is in the place of a directory or file of the store. Such a thing is left alone, because it
/// does not come from this server.
pub(super) fn check_kinds(root: &Path) -> Result<()> {
    let classes = FileClass::ALL.map(|class| Path::new("v1").join(class.directory()));
    let directories = DIRECTORIES.iter().map(Path::new).chain(classes.iter().map(PathBuf::as_path));
    for name in directories {
        // A link to a directory on another disk is fine.
        let path = if name.as_os_str().is_empty() { root.to_owned() } else { root.join(name) };
        if !path.is_dir() {
            refuse_other(root, &path, "a directory")?;
        }
    }
    for name in FILES {
        let path = root.join(name);
        if !fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.is_file()) {
            refuse_other(root, &path, "a file")?;
        }
    }
    Ok(())
}

/// Refuses a path at which there is anything at all, because it is not what is expected there.
fn refuse_other(root: &Path, path: &Path, expected: &str) -> Result<()> {
    let Ok(metadata) = fs::symlink_metadata(path) else { return Ok(()) };
    let kind = metadata.file_type();
    let found = match () {
        () if kind.is_file() => "a file",
        () if kind.is_dir() => "a directory",
        () if kind.is_symlink() => "a symbolic link",
        () if kind.is_fifo() => "a FIFO",
        () if kind.is_socket() => "a socket",
        () => "a device",
    };
    let what = format!("{} is {found}, and the store has {expected} there", path.display());
    Err(unusable(root, &what, &"move it elsewhere and start again; the server makes what is missing"))
}

/// The locks on a store directory, until they are dropped.
#[derive(Debug)]
pub(super) struct StoreLock {
    _file: File,
    /// The directory itself, because another process may remove the lock file. `None` where directories cannot be
    /// locked, such as on NFS.
    _directory: Option<File>,
}

/// Locks a store directory.
pub(super) fn take_lock(root: &Path) -> Result<StoreLock> {
    let lock = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        // A pipe or link in its place must not block the start.
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(root.join("lock"))
        .map_err(|error| failed(root, "it is not writable", &error))?;
    let in_use = || unusable(root, "it is in use", &"another gorego server runs on it");
    flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|error| match error {
        Errno::WOULDBLOCK => in_use(),
        error => failed(root, "it cannot be locked", &error.into()),
    })?;
    let directory = File::open(root).map_err(|error| failed(root, "it cannot be read", &error))?;
    let directory = match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Some(directory),
        Err(Errno::WOULDBLOCK) => return Err(in_use()),
        Err(_) => None,
    };
    Ok(StoreLock { _file: lock, _directory: directory })
}

/// Checks the format of a store directory. A new directory gets the current format. So does an older store before its
/// first segment or packed file is made, so that no older version opens it and misses their contents.
pub(super) fn check_format(root: &Path) -> Result<()> {
    let format = root.join("format");
    match regular_file::read(&format, MAX_FORMAT_BYTES) {
        Ok(text) if text == FORMAT.as_bytes() => Ok(()),
        Ok(text) if OLD_FORMATS.iter().any(|old| text == old.as_bytes()) => {
            let upgraded = replace(&format, FORMAT.as_bytes()).map_err(at(&format));
            upgraded.map_err(|error| failed(root, "it cannot be upgraded", &error))
        }
        Ok(text) => {
            let text = String::from_utf8_lossy(&text).chars().take(40).collect::<String>();
            Err(unusable(root, "it is of a format that this version does not know", &text.escape_debug()))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let written = replace(&format, FORMAT.as_bytes()).map_err(at(&format));
            written.map_err(|error| failed(root, "it is not writable", &error))
        }
        Err(error) => Err(failed(root, "its format cannot be read", &at(&format)(error))),
    }
}

/// Creates the directories that always exist. Moves temporary files, instances that are no longer served, and anything
/// else in their place, to the trash, because their bytes would not be counted. On a full disk, empties the trash
/// first, which otherwise happens in the background.
pub(super) fn prepare(base: &Path, instances: &[String]) -> io::Result<()> {
    let trash = base.join("trash");
    fs::create_dir_all(&trash).map_err(at(&trash))?;
    let mut thrown = 0u64;
    let mut throw = |path: &Path| -> io::Result<()> {
        loop {
            thrown += 1;
            let target = trash.join(thrown.to_string());
            if !target.try_exists()? {
                return fs::rename(path, target).map_err(at(path));
            }
        }
    };
    let tmp = base.join("tmp");
    if fs::symlink_metadata(&tmp).is_ok() {
        throw(&tmp)?;
    }
    match fs::create_dir(&tmp) {
        Err(error) if is_full(&error) => {
            for entry in fs::read_dir(&trash)? {
                remove(&entry?.path())?;
            }
            fs::create_dir(&tmp).map_err(at(&tmp))?;
        }
        created => created.map_err(at(&tmp))?,
    }
    for class in FileClass::ALL {
        let parent = base.join(class.directory());
        fs::create_dir_all(&parent).map_err(at(&parent))?;
        for entry in fs::read_dir(&parent)? {
            let entry = entry?;
            let is_served = instances.iter().any(|name| entry.file_name() == **name);
            if !is_served || !entry.path().is_dir() {
                throw(&entry.path())?;
            }
        }
    }
    Ok(())
}

/// Removes a file, or a directory with its content.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    let is_directory = fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir());
    if is_directory { fs::remove_dir_all(path) } else { fs::remove_file(path) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        actors::cas::volume::{durable::SyncPolicy, files::Files},
        instance::Instances,
    };

    #[test]
    fn a_directory_in_use_or_of_another_format_is_refused_with_the_reason() {
        let root = tempfile::tempdir().unwrap();
        let instances = Instances::new([""]).unwrap();
        let first = Files::open(root.path(), &instances, SyncPolicy::Never).unwrap();
        let error = Files::open(root.path(), &instances, SyncPolicy::Never).unwrap_err();
        assert!(error.to_string().contains("another gorego server runs on it"), "{error}");
        // A second server stays out even if the lock file was removed.
        fs::remove_file(root.path().join("lock")).unwrap();
        let error = Files::open(root.path(), &instances, SyncPolicy::Never).unwrap_err();
        assert!(error.to_string().contains("another gorego server runs on it"), "{error}");
        drop(first);
        Files::open(root.path(), &instances, SyncPolicy::Never).unwrap();
        fs::write(root.path().join("format"), "gorego store 4\n").unwrap();
        let error = Files::open(root.path(), &instances, SyncPolicy::Never).unwrap_err();
        assert!(error.to_string().contains("gorego store 4"), "{error}");
        fs::write(root.path().join("plain"), "").unwrap();
        let error = Files::open(&root.path().join("plain"), &instances, SyncPolicy::Never).unwrap_err();
        assert!(matches!(error, Error::Precondition(_)), "{error}");
    }
}
