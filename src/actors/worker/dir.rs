//! Safe ways to open files and directories in an exec directory, in spite of symbolic links, mounts and missing
//! permissions.
//!
//! A hostile command may have made anything in an exec directory. So every step is relative to an open directory: a
//! single step never follows a link, and a path of several steps never leaves the directory that it starts from
//! (openat2, Linux 5.6). A [`Cursor`] walks trees of any depth with a bounded number of descriptors.

pub(crate) use crate::file_identity::{FileIdentity, file_id};
use rustix::{
    fs::{self as rfs, AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, Stat},
    io::Errno,
};
use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io,
    os::fd::AsRawFd as _,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

/// How many directories a [`Cursor`] keeps open. The others are opened again through "..", so this number only affects
/// how many system calls are needed.
const MAX_OPEN: usize = 8;
/// How often a path is opened again because something on the machine was renamed at the same moment.
const OPEN_TRIES: usize = 1_000;

/// The type of the file of a stat.
pub(crate) fn file_type(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

/// Opens the directory `name` in `parent`, never through a symbolic link and never on another file system.
///
/// # Errors
/// The errors of openat2(2).
pub(crate) fn open_dir(parent: &File, name: &OsStr) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    open2(parent, name, flags, ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV)
}

/// Like [`open_dir`], but a directory that its owner may not read, write or search is made accessible first. Also
/// returns the stat from before that.
///
/// # Errors
/// The errors of openat2(2); `EXDEV` for a mount point.
pub(crate) fn open_accessible(parent: &File, name: &OsStr) -> io::Result<(File, Stat)> {
    let opened = match open_dir(parent, name) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let before = stat_at(parent, name)?;
            grant(parent, name, Mode::RWXU)?;
            return Ok((open_dir(parent, name)?, before));
        }
        opened => opened?,
    };
    let stat = rfs::fstat(&opened)?;
    let mode = Mode::from_raw_mode(stat.st_mode);
    if !mode.contains(Mode::RWXU) {
        // If it belongs to another user, the operation that needs the permission fails later.
        let _ = rfs::fchmod(&opened, mode | Mode::RWXU);
    }
    Ok((opened, stat))
}

/// Opens the file `name` in `parent` for reading. Never follows a link and never waits for the other end of a FIFO. The
/// caller checks the type of the file.
///
/// # Errors
/// The errors of openat2(2).
pub(crate) fn open_file(parent: &File, name: &OsStr) -> io::Result<File> {
    match open_unchanged(parent, name) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            grant(parent, name, Mode::RUSR)?;
            open_unchanged(parent, name)
        }
        opened => opened,
    }
}

/// Like [`open_file`], but never changes the permissions of the file.
///
/// # Errors
/// The errors of openat2(2).
pub(super) fn open_unchanged(parent: &File, name: &OsStr) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    open2(parent, name, flags, ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV)
}

/// Opens the directory at `path`, which may go through symbolic links as long as they stay beneath `root`. The handle
/// can only be used to name entries in it (`O_PATH`).
///
/// # Errors
/// `EXDEV` if a link leads out of `root`; otherwise the errors of openat2(2).
pub(crate) fn open_beneath(root: &File, path: &Path) -> io::Result<File> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    open2(root, path.as_os_str(), OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, resolve)
}

/// The stat of `name` in `parent`. A link is not followed.
///
/// # Errors
/// The errors of fstatat(2).
pub(crate) fn stat_at(parent: &File, name: &OsStr) -> io::Result<Stat> {
    Ok(rfs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?)
}

/// Adds permission bits to a file or directory, never through a symbolic link.
///
/// # Errors
/// If it is a link, belongs to another user, or does not exist.
pub(super) fn grant(parent: &File, name: &OsStr, bits: Mode) -> io::Result<()> {
    // An O_PATH handle needs no permission on the file, and its name in /proc refers to exactly this inode.
    let handle = rfs::openat(parent, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    let stat = rfs::fstat(&handle)?;
    if !matches!(file_type(&stat), FileType::RegularFile | FileType::Directory) {
        return Err(Errno::ACCESS.into());
    }
    let itself = format!("/proc/self/fd/{}", handle.as_raw_fd());
    rfs::chmodat(CWD, itself, Mode::from_raw_mode(stat.st_mode) | bits, AtFlags::empty())?;
    Ok(())
}

fn open2(parent: &File, path: &OsStr, flags: OFlags, resolve: ResolveFlags) -> io::Result<File> {
    for _ in 1..OPEN_TRIES {
        match rfs::openat2(parent, path, flags, Mode::empty(), resolve) {
            // AGAIN: the kernel could not rule out an escape because something was renamed meanwhile.
            Err(Errno::AGAIN | Errno::INTR) => {}
            opened => return Ok(opened?.into()),
        }
    }
    Ok(rfs::openat2(parent, path, flags, Mode::empty(), resolve)?.into())
}

/// The entries of an open directory, without "." and "..".
///
/// # Errors
/// The errors of getdents(2), also as items of the iterator.
pub(crate) fn entries(dir: &File) -> io::Result<impl Iterator<Item = io::Result<rfs::DirEntry>>> {
    Ok(rfs::Dir::read_from(dir)?
        .filter(|entry| !matches!(entry, Ok(e) if matches!(e.file_name().to_bytes(), b"." | b"..")))
        .map(|entry| Ok(entry?)))
}

/// The names in an open directory.
///
/// # Errors
/// The errors of getdents(2).
pub(super) fn names(dir: &File) -> io::Result<Vec<OsString>> {
    entries(dir)?.map(|entry| Ok(entry_name(&entry?).to_owned())).collect()
}

/// The path of an open directory.
///
/// # Errors
/// The errors of readlink(2).
pub(super) fn path_of(directory: &File) -> io::Result<PathBuf> {
    std::fs::read_link(format!("/proc/self/fd/{}", directory.as_raw_fd()))
}

/// The name of a directory entry.
pub(crate) fn entry_name(entry: &rfs::DirEntry) -> &OsStr {
    OsStr::from_bytes(entry.file_name().to_bytes())
}

/// Whether the error means that there is nothing at a path.
pub(super) fn is_absence(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::NOENT | Errno::NOTDIR | Errno::LOOP))
}

/// A position in a tree of directories.
#[derive(Debug)]
pub(super) struct Cursor {
    levels: Vec<CursorLevel>,
}

#[derive(Debug)]
struct CursorLevel {
    id: FileIdentity,
    mode: Mode,
    open: Option<File>,
}

impl Cursor {
    /// A cursor at the top of a tree.
    ///
    /// # Errors
    /// The errors of fstat(2).
    pub(super) fn new(top: File) -> io::Result<Self> {
        let stat = rfs::fstat(&top)?;
        Ok(Self { levels: vec![CursorLevel::new(top, &stat)] })
    }

    /// A cursor at an open directory, through a second handle with its own file position.
    ///
    /// # Errors
    /// The errors of openat(2) and fstat(2).
    pub(super) fn at(directory: &File) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Self::new(rfs::openat(directory, ".", flags, Mode::empty())?.into())
    }

    /// The current directory.
    ///
    /// # Errors
    /// None in practice: the current directory is always open.
    pub(super) fn here(&self) -> io::Result<&File> {
        self.levels.last().and_then(|level| level.open.as_ref()).ok_or_else(|| Errno::BADF.into())
    }

    /// The permission bits of the current directory when it was entered.
    pub(super) fn mode(&self) -> Mode {
        self.levels.last().map_or(Mode::empty(), |level| level.mode)
    }

    /// Enters a subdirectory. A directory that its owner may not read, write or search is made accessible first.
    ///
    /// # Errors
    /// The errors of openat2(2); `EXDEV` for a mount point.
    pub(super) fn down(&mut self, name: &OsStr) -> io::Result<()> {
        let (open, stat) = open_accessible(self.here()?, name)?;
        self.enter(open, &stat);
        Ok(())
    }

    /// Enters a subdirectory without a change of its permissions.
    ///
    /// # Errors
    /// The errors of openat2(2); `EXDEV` for a mount point.
    pub(super) fn down_unchanged(&mut self, name: &OsStr) -> io::Result<()> {
        let open = open_dir(self.here()?, name)?;
        let stat = rfs::fstat(&open)?;
        self.enter(open, &stat);
        Ok(())
    }

    fn enter(&mut self, open: File, stat: &Stat) {
        self.levels.push(CursorLevel::new(open, stat));
        if let Some(far) = self.levels.len().checked_sub(MAX_OPEN + 1) {
            self.levels[far].open = None;
        }
    }

    /// Returns to the parent directory.
    ///
    /// # Errors
    /// If the parent is no longer the directory that the cursor came from.
    pub(super) fn up(&mut self) -> io::Result<()> {
        let Some(left) = self.levels.pop() else { return Err(Errno::NOENT.into()) };
        let Some(parent) = self.levels.last_mut() else { return Err(Errno::NOENT.into()) };
        if parent.open.is_none() {
            let below = left.open.as_ref().ok_or(Errno::BADF)?;
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let found = rfs::openat(below, "..", flags, Mode::empty())?;
            if file_id(&rfs::fstat(&found)?) != parent.id {
                return Err(Errno::STALE.into());
            }
            parent.open = Some(found.into());
        }
        Ok(())
    }
}

impl CursorLevel {
    fn new(open: File, stat: &Stat) -> Self {
        Self { id: file_id(stat), mode: Mode::from_raw_mode(stat.st_mode), open: Some(open) }
    }
}
