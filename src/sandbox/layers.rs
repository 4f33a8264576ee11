//! The input root of an action as an overlay: a layer of its own above a tree that nobody may change.
//!
//! The runner mounts it, with the rights of the user to whom both layers belong on disk, and hands it to the cell as an open
//! mount. It is `volatile`: nothing waits for the disk, neither when a file is copied up nor at the end (20 ms). Nobody mounts
//! the same layer again. With `userxattr` it takes no privileges.

use super::{SetupFailure, Step as _, mounts, sys};
use prost::Message;
use rustix::{
    fd::BorrowedFd,
    fs::CWD,
    mount::{MountAttrFlags, UnmountFlags, unmount},
};
use std::{
    ffi::OsStr,
    fs,
    io::{self, Write as _},
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

/// The step that fails where an overlay cannot be mounted.
pub(crate) const MOUNT_STEP: &str = "mount the input root (an overlay)";

/// The file of a trial that is changed.
pub(crate) const TRIAL_FILE: &str = "f";
/// The directory of a trial that is replaced; it has a file of that name in it.
pub(crate) const TRIAL_DIRECTORY: &str = "d";
/// A file that a whiteout of the server hides.
pub(crate) const TRIAL_HIDDEN: &str = "w";
/// A directory like [`TRIAL_DIRECTORY`] over which the server has put an opaque one.
pub(crate) const TRIAL_OPAQUE: &str = "o";

/// Where the layers are. Absolute paths.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Layers {
    /// The tree that stays as it is.
    #[prost(bytes = "vec", tag = "1")]
    pub below: Vec<u8>,
    /// The layer that the action changes.
    #[prost(bytes = "vec", tag = "2")]
    pub own: Vec<u8>,
    /// An empty directory beside that layer.
    #[prost(bytes = "vec", tag = "3")]
    pub work: Vec<u8>,
    /// Finds out whether such an overlay behaves.
    #[prost(bool, tag = "4")]
    pub is_trial: bool,
}

/// Mounts the layers; `ids` says how the user of their files shows, and as which user and group, if it does not show as it is.
pub(super) fn mount(
    layers: &Layers,
    ids: Option<(BorrowedFd<'_>, (u32, u32))>,
) -> Result<OwnedFd, SetupFailure> {
    let path = |bytes| Path::new(OsStr::from_bytes(bytes));
    let (below, own) = (path(&layers.below), path(&layers.own));
    let mount = || {
        let [below, own, work] = [&layers.below, &layers.own, &layers.work].map(|bytes| path(bytes));
        let (below, own, work) =
            (NamedDirectory::open(below)?, NamedDirectory::open(own)?, NamedDirectory::open(work)?);
        let options = [
            ("lowerdir", &*below.name),
            ("upperdir", &*own.name),
            ("workdir", &*work.name),
            ("index", "off"),
            ("userxattr", ""),
            ("volatile", ""),
        ];
        mounts::new("overlay", &options, MountAttrFlags::empty())
    };
    let mounted = match (ids, own.parent()) {
        (Some((ids, owner)), Some(beside)) => {
            // An overlay cannot map ids itself, but it shows its layers as they show where they are mounted.
            let _mapped = (Mapped::new(below, ids)?, Mapped::new(beside, ids)?);
            // It changes its layers as the user who mounts it, who has to be one that they know.
            sys::with_files_of(owner, mount)
        }
        _ => mount(),
    };
    mounted.step(MOUNT_STEP)
}

/// An open directory and a name for it that tells nothing, since the action can read the options of its mounts.
struct NamedDirectory {
    _directory: OwnedFd,
    name: String,
}

impl NamedDirectory {
    fn open(path: &Path) -> io::Result<Self> {
        let directory = mounts::directory(CWD, path)?;
        let name = format!("/proc/self/fd/{}", directory.as_raw_fd());
        Ok(Self { _directory: directory, name })
    }
}

/// A directory that shows other users in this process's mounts, for as long as this is held.
struct Mapped<'a>(&'a Path);

impl<'a> Mapped<'a> {
    fn new(path: &'a Path, ids: BorrowedFd<'_>) -> Result<Self, SetupFailure> {
        let map = || {
            let tree = mounts::copy(CWD, path)?;
            mounts::map_ids(tree.as_fd(), ids)?;
            mounts::attach(tree.as_fd(), CWD, path)
        };
        map().step("give a layer of the input root to the action's user (an idmapped mount)")?;
        Ok(Self(path))
    }
}

impl Drop for Mapped<'_> {
    fn drop(&mut self) {
        let _ = unmount(self.0, UnmountFlags::DETACH);
    }
}

/// Does in an overlay what actions do, and looks whether it behaves.
pub(crate) fn try_out(root: &Path) -> Result<(), SetupFailure> {
    let (file, directory) = (root.join(TRIAL_FILE), root.join(TRIAL_DIRECTORY));
    let change = || {
        fs::OpenOptions::new().append(true).open(&file)?.write_all(b"+")?;
        let text = fs::read(&file)?;
        fs::remove_dir_all(&directory)?;
        fs::create_dir(&directory)?;
        let is_empty = |directory: &Path| Ok::<_, io::Error>(fs::read_dir(directory)?.next().is_none());
        let is_hidden = !root.join(TRIAL_HIDDEN).try_exists()?;
        Ok::<_, io::Error>(
            text == b"+" && is_empty(&directory)? && is_hidden && is_empty(&root.join(TRIAL_OPAQUE))?,
        )
    };
    match change().step("change files in an overlay")? {
        true => Ok(()),
        false => {
            Err(io::Error::other("it does not show what was changed")).step("change files in an overlay")
        }
    }
}
