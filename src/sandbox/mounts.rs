//! Wrappers of the mount system calls. They work on open mounts: a tree of mounts is a file descriptor until it is
//! attached to a path.

use super::{SetupFailure, Step as _, sys};
use rustix::{
    fd::{AsFd, BorrowedFd},
    fs::{CWD, Mode, OFlags, ResolveFlags},
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
        UnmountFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount_change,
        move_mount, open_tree, unmount,
    },
};
use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd},
    path::Path,
};

/// Attributes of every mount that an action sees.
const HARMLESS: u64 = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;

/// Copies the mount at a path and the mounts below it. The copy is not attached anywhere.
pub(super) fn copy(parent: BorrowedFd<'_>, path: &Path) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE
        | OpenTreeFlags::AT_SYMLINK_NOFOLLOW;
    Ok(open_tree(parent, path, flags)?)
}

/// Copies an open mount and the mounts below it.
pub(super) fn copy_of(mount: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE
        | OpenTreeFlags::AT_EMPTY_PATH;
    Ok(open_tree(mount, c"", flags)?)
}

pub(super) fn attach(mount: BorrowedFd<'_>, parent: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    Ok(move_mount(mount, c"", parent, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

/// Attaches a mount to an open file or directory.
pub(super) fn attach_to(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(move_mount(mount, c"", target, c"", flags)?)
}

/// Opens an absolute path in the tree that starts at `root`. Symbolic links in the tree, including absolute ones, are
/// resolved as if `root` were the root directory.
pub(super) fn open_in(root: BorrowedFd<'_>, path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    Ok(rustix::fs::openat2(root, path, flags, Mode::empty(), resolve)?)
}

/// Opens the directory at a relative path. Fails if a component of the path is a symbolic link.
pub(super) fn directory_without_links(root: BorrowedFd<'_>, path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    Ok(rustix::fs::openat2(root, path, flags, Mode::empty(), resolve)?)
}

/// Makes a file system of a kind that needs no device. The mount is `nosuid`.
pub(super) fn new(kind: &str, options: &[(&str, &str)], attributes: MountAttrFlags) -> io::Result<OwnedFd> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (name, value) in options {
        if value.is_empty() {
            fsconfig_set_flag(&context, *name)?;
        } else {
            fsconfig_set_string(&context, *name, *value)?;
        }
    }
    fsconfig_create(&context)?;
    let attributes = attributes | MountAttrFlags::MOUNT_ATTR_NOSUID;
    Ok(fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}

/// Makes a tmpfs of this size with room for this many files and directories.
pub(super) fn tmpfs(bytes: u64, files: u64, mode: &str) -> io::Result<OwnedFd> {
    // The root directory takes one inode.
    let (bytes, files) = (bytes.to_string(), files.saturating_add(1).to_string());
    new("tmpfs", &[("size", &bytes), ("nr_inodes", &files), ("mode", mode)], MountAttrFlags::MOUNT_ATTR_NODEV)
}

/// Restricts an open tree of mounts: `nosuid`, `nodev` unless `devices`, and read-only unless `writable`. Later mounts
/// and unmounts on the host no longer propagate to it.
pub(super) fn restrict(mount: BorrowedFd<'_>, writable: bool, devices: bool) -> io::Result<()> {
    let mut attributes = HARMLESS;
    if devices {
        attributes &= !libc::MOUNT_ATTR_NODEV;
    }
    if !writable {
        attributes |= libc::MOUNT_ATTR_RDONLY;
    }
    set_attributes(mount, attributes, libc::AT_RECURSIVE, None)
}

/// Makes one open mount read-only, but not the mounts below it.
pub(super) fn make_read_only(mount: BorrowedFd<'_>) -> io::Result<()> {
    set_attributes(mount, HARMLESS | libc::MOUNT_ATTR_RDONLY, 0, None)
}

/// Maps the owners of files in an open mount by a user namespace. The mount must not be attached yet.
pub(super) fn map_ids(mount: BorrowedFd<'_>, namespace: BorrowedFd<'_>) -> io::Result<()> {
    set_attributes(mount, HARMLESS | libc::MOUNT_ATTR_IDMAP, 0, Some(namespace))
}

fn set_attributes(
    mount: BorrowedFd<'_>,
    set: u64,
    depth: libc::c_int,
    namespace: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: set,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: namespace.map_or(0, |namespace| namespace.as_raw_fd().unsigned_abs().into()),
    };
    sys::set_mount_attributes(mount, &attributes, depth)
}

/// Stops mounts of this process from propagating to the host. Unmounts on the host still propagate to this process.
pub(super) fn stop_propagation_to_host() -> io::Result<()> {
    Ok(mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?)
}

/// Makes an open tree of mounts the root directory of this process and removes everything else from its mount
/// namespace.
pub(super) fn become_root(tree: BorrowedFd<'_>) -> Result<(), SetupFailure> {
    attach(tree, CWD, Path::new("/")).step("mount the view of the action")?;
    rustix::process::fchdir(tree).step("enter the view of the action")?;
    // pivot_root stacks the old root on top of the new one, from where it is unmounted.
    rustix::process::pivot_root(".", ".").step("change the root directory (pivot_root)")?;
    unmount(".", UnmountFlags::DETACH).step("unmount the host's file systems")?;
    rustix::process::chdir("/").step("enter the new root directory")
}

/// Opens a directory, as the start of relative paths.
pub(super) fn directory(parent: impl AsFd, path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(parent, path, flags, Mode::empty())?)
}
