//! The input root of an action as an overlay: a writable upper layer of the action's own over a shared lower tree that
//! never changes.
//!
//! The runner mounts the overlay as the user who owns both layers on disk, and hands it to the cell as an open mount.
//! The overlay is `volatile`: neither a copy-up nor the unmount waits for the disk (which would take 20 ms). This is
//! safe because an upper layer is never mounted a second time. The option `userxattr` makes privileges unnecessary.

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

/// Name of a file that the trial appends to.
pub(crate) const TRIAL_FILE: &str = "f";
/// Name of a directory that the trial removes and makes again. The lower layer has a file in it.
pub(crate) const TRIAL_DIRECTORY: &str = "d";
/// Name of a file of the lower layer that a whiteout made by the server hides.
pub(crate) const TRIAL_HIDDEN: &str = "w";
/// Name of a directory like [`TRIAL_DIRECTORY`] that an opaque directory made by the server covers.
pub(crate) const TRIAL_OPAQUE: &str = "o";

/// Absolute paths of the layers of an overlay.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Layers {
    /// The lower layer, which is never changed.
    #[prost(bytes = "vec", tag = "1")]
    pub below: Vec<u8>,
    /// The upper layer, which receives the action's changes.
    #[prost(bytes = "vec", tag = "2")]
    pub own: Vec<u8>,
    /// The work directory of the overlay: an empty directory next to the upper layer.
    #[prost(bytes = "vec", tag = "3")]
    pub work: Vec<u8>,
    /// Whether this overlay is mounted only to test that overlays behave as required.
    #[prost(bool, tag = "4")]
    pub is_trial: bool,
}

/// Mounts the layers as an overlay. If the owner of the files has to be mapped, `ids` holds the user namespace that
/// maps it and the user and group that it is mapped to.
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
        mounts::new("overlay", &options, MountAttrFlags::MOUNT_ATTR_NODEV)
    };
    let mounted = match (ids, own.parent()) {
        (Some((ids, owner)), Some(beside)) => {
            // An overlay cannot map ids itself, but it uses the mapped ids of the mounts that its layers lie on.
            let _mapped = (Mapped::new(below, ids)?, Mapped::new(beside, ids)?);
            // The overlay changes its layers with the credentials of the process that mounts it, so that must be a user
            // that the mapped mounts know.
            sys::with_file_system_user(owner, mount)
        }
        _ => mount(),
    };
    mounted.step(MOUNT_STEP)
}

/// An open directory and its path below /proc/self/fd. The action can read the options of its mounts, and this path
/// reveals nothing about the host.
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

/// An idmapped mount over a directory in the mount namespace of this process. It is unmounted on drop.
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

/// Changes an overlay as actions do, and checks that the changes are visible.
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
        false => Err(io::Error::other("the changes are not visible")).step("change files in an overlay"),
    }
}
