//! A local directory that contains all outputs, even if the output names are hostile.
//!
//! Every path is walked from the directory's descriptor, one segment at a time, without following symbolic links, no
//! matter who created them. Files and symlinks are created under a temporary name and renamed into place, so existing
//! entries are replaced and never written through, and an interrupted download leaves no partial file. All operations
//! block.

use super::local;
use gorego_reapi::{
    error::{Error, Result},
    path::RootPath,
};
use rustix::{
    fs::{AtFlags, Mode, OFlags, mkdirat, openat, renameat, symlinkat, unlinkat},
    io::Errno,
};
use std::{
    fs::{self, File},
    io::{self, Seek as _, Write},
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
};

/// The directory for outputs. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Destination {
    root: Arc<OwnedFd>,
    shown: PathBuf,
}

/// A file that is being written. It is removed unless it is committed.
#[derive(Debug)]
pub(crate) struct PendingFile {
    file: File,
    entry: Option<Entry>,
}

/// A temporary name next to the final name.
#[derive(Debug)]
struct Entry {
    parent: OwnedFd,
    temporary: String,
    name: String,
    shown: PathBuf,
}

impl Destination {
    /// Opens the directory and creates it if it does not exist.
    ///
    /// # Errors
    /// `Invalid` if it cannot be created or opened.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        fs::create_dir_all(path).map_err(|error| local("create", path, &error))?;
        let root = File::open(path).map_err(|error| local("open", path, &error))?;
        Ok(Self { root: Arc::new(root.into()), shown: path.to_owned() })
    }

    /// Creates a file under a temporary name.
    ///
    /// # Errors
    /// `Invalid` if the path is the root, or a component of its parent is not a directory.
    pub(crate) fn create(&self, path: &RootPath, executable: bool) -> Result<PendingFile> {
        let entry = self.entry(path)?;
        // The user's umask applies.
        let mode = Mode::from_raw_mode(if executable { 0o777 } else { 0o666 });
        // It is also read if other files have the same content.
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(&entry.parent, &entry.temporary, flags, mode)
            .map_err(|error| local("create", &entry.shown, &error.into()))?;
        Ok(PendingFile { file: file.into(), entry: Some(entry) })
    }

    /// Creates a symlink with exactly this target. It replaces an existing file or symlink.
    ///
    /// # Errors
    /// `Invalid` as in [`Destination::create`], or if the target is not valid.
    pub(crate) fn symlink(&self, path: &RootPath, target: &str) -> Result<()> {
        let entry = self.entry(path)?;
        symlinkat(target, &entry.parent, &entry.temporary)
            .map_err(|error| local("create the symlink", &entry.shown, &error.into()))?;
        entry.rename()
    }

    /// Creates a directory and its parents. It is not an error if it exists.
    ///
    /// # Errors
    /// `Invalid` if a component of the path is not a directory.
    pub(crate) fn directory(&self, path: &RootPath) -> Result<()> {
        self.walk(path).map(|_| ())
    }

    fn entry(&self, path: &RootPath) -> Result<Entry> {
        let (Some(parent), Some(name)) = (path.parent(), path.name()) else {
            return Err(Error::Invalid(format!("{} cannot be an output itself", self.shown.display())));
        };
        let temporary = format!(".gorego-{}", uuid::Uuid::new_v4().simple());
        let shown = self.shown.join(path.as_str());
        Ok(Entry { parent: self.walk(&parent)?, temporary, name: name.to_owned(), shown })
    }

    /// Opens a directory below the root and creates missing components.
    fn walk(&self, path: &RootPath) -> Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut shown = self.shown.clone();
        let failed = |shown: &Path, error: Errno| match error {
            // The error of openat for a symlink depends on the flags; both have the same meaning for the user.
            Errno::LOOP | Errno::NOTDIR => Error::Invalid(format!(
                "{} is not a directory; outputs are not written through symbolic links",
                shown.display()
            )),
            error => local("open", shown, &error.into()),
        };
        let mut open = self.root.try_clone().map_err(|error| local("open", &shown, &error))?;
        for segment in path.segments() {
            shown.push(segment);
            match mkdirat(&open, segment, Mode::from_raw_mode(0o777)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(local("create the directory", &shown, &error.into())),
            }
            open =
                openat(open.as_fd(), segment, flags, Mode::empty()).map_err(|error| failed(&shown, error))?;
        }
        Ok(open)
    }
}

impl PendingFile {
    /// Appends the content that was written to this file to another one.
    ///
    /// # Errors
    /// `Invalid` if a file cannot be read or written.
    pub(crate) fn copy_to(&self, other: &mut Self) -> Result<()> {
        let mut copy = || {
            let mut content = &self.file;
            content.rewind()?;
            io::copy(&mut content, &mut other.file)
        };
        let shown = self.entry.as_ref().map_or(Path::new(""), |entry| &entry.shown);
        copy().map(drop).map_err(|error| local("copy", shown, &error))
    }

    /// Renames the file to its final name. It replaces an existing file or symlink.
    ///
    /// # Errors
    /// `Invalid` if a directory has that name.
    pub(crate) fn commit(mut self) -> Result<()> {
        self.entry.take().map_or(Ok(()), Entry::rename)
    }
}

impl Write for PendingFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Drop for PendingFile {
    fn drop(&mut self) {
        if let Some(entry) = self.entry.take() {
            entry.remove();
        }
    }
}

impl Entry {
    fn rename(self) -> Result<()> {
        renameat(&self.parent, &self.temporary, &self.parent, &self.name).map_err(|error| {
            self.remove();
            local("put in place", &self.shown, &error.into())
        })
    }

    /// Errors are ignored: there is no further remedy for a temporary file that cannot be removed.
    fn remove(&self) {
        let _ = unlinkat(&self.parent, &self.temporary, AtFlags::empty());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    fn path(text: &str) -> RootPath {
        RootPath::root().join(text).unwrap()
    }

    fn write(destination: &Destination, at: &str, content: &str) -> Result<()> {
        let mut file = destination.create(&path(at), false)?;
        file.write_all(content.as_bytes()).unwrap();
        file.commit()
    }

    #[test]
    fn a_server_that_sends_a_symlink_and_then_a_file_below_it_gets_nowhere() {
        let (dir, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let destination = Destination::open(&dir.path().join("out")).unwrap();
        destination.symlink(&path("d"), outside.path().to_str().unwrap()).unwrap();
        let error = write(&destination, "d/evil", "x").unwrap_err().to_string();
        assert!(error.contains("symbolic links"), "{error}");
        assert!(destination.directory(&path("d/sub")).is_err());
        assert!(destination.symlink(&path("d/link"), "x").is_err());
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    }

    #[test]
    fn existing_files_are_replaced_and_never_written_through() {
        let dir = tempfile::tempdir().unwrap();
        let precious = dir.path().join("precious");
        fs::write(&precious, "old").unwrap();
        let out = dir.path().join("out");
        fs::create_dir(&out).unwrap();
        symlink(&precious, out.join("a")).unwrap();
        fs::hard_link(&precious, out.join("b")).unwrap();
        let destination = Destination::open(&out).unwrap();
        for name in ["a", "b", "x/y/z"] {
            write(&destination, name, "new").unwrap();
            assert_eq!(fs::read(out.join(name)).unwrap(), b"new");
        }
        assert_eq!(fs::read(&precious).unwrap(), b"old");
        assert!(!out.join("a").is_symlink());
        assert!(write(&destination, "x", "a directory is in the way").is_err());
        assert!(destination.create(&RootPath::root(), false).is_err());
    }

    #[test]
    fn a_file_that_is_not_finished_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let destination = Destination::open(dir.path()).unwrap();
        drop(destination.create(&path("half"), true).unwrap());
        assert!(write(&destination, "done", "x").is_ok());
        let _ = write(&destination, "done/below", "x").unwrap_err();
        let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["done"]);
        let mode = fs::metadata(dir.path().join("done")).unwrap().permissions().mode();
        assert_eq!(mode & 0o111, 0);
    }
}
