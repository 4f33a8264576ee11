//! Assembles views. A runner mounts each view once, in a mount namespace of its own, and every cell gets a copy. If the
//! kernel allows it, the finished view is detached from that namespace.
//!
//! In that namespace the runner sees the host as before, except for one directory that it does not need
//! ([`MOUNT_POINTS`]), over which it mounts its views. Paths of a view are resolved as the action will see them, so
//! that no link in the view leads back to the host.

use super::{
    SetupFailure, Step as _, mounts,
    view::{Access, Host, Kind, ViewPiece, ViewPlan},
};
use crate::file_identity::{FileIdentity, file_id};
use rustix::{
    fs::{self as rfs, AtFlags, CWD, FileType, Mode, OFlags, Stat},
    io::Errno,
    mount::{MountAttrFlags, UnmountFlags, unmount},
};
use std::{
    fs,
    io::{self, Read as _, Write as _},
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
};

/// Size of a file system that holds nothing but mount points and a few small files.
const ROOT_BYTES: u64 = 2 * 1024 * 1024;
/// Maximum number of files and directories in such a file system.
const ROOT_FILES: u64 = 4096;
/// Candidates for the directory over which a runner mounts its views. The first one that exists and contains nothing
/// that actions may see is used. The root directory is not among them because the kernel makes no user namespace for a
/// process whose root directory is covered.
const MOUNT_POINTS: &[&str] = &["/sys/kernel", "/sys/fs", "/sys/firmware", "/media", "/mnt"];
/// Maximum total size in bytes of the host files that are copied into a view.
const MAX_COPIED_BYTES: u64 = 1024 * 1024;
/// Maximum size of a file such as /etc/passwd that is read from a root file system.
const MAX_NAMES_BYTES: u64 = 256 * 1024;

/// A tmpfs in which a runner has a mount point for each of its views.
#[derive(Debug)]
pub(super) struct ViewMounts {
    path: PathBuf,
    next: u32,
}

/// A directory of [`ViewMounts`] with a mount on it. It is unmounted and removed on drop.
#[derive(Debug)]
struct MountPoint(PathBuf);

/// The attributes that change when a file is written or replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct FileVersion {
    id: FileIdentity,
    size: u64,
    changed: (i64, i64),
}

/// A view whose mounts are all made.
#[derive(Debug)]
pub(super) struct Assembled {
    tree: OwnedFd,
    /// Where the tree is mounted, if it has to be.
    _point: Option<MountPoint>,
    /// Path and identity of the root file system that is the lower layer.
    root_below: Option<(PathBuf, FileIdentity)>,
    /// Each hidden path with the identity of the file that covers it, or `None` if there was nothing to hide.
    hidden: Vec<(PathBuf, Option<FileIdentity>)>,
    /// The host files that were copied, with their versions at that time.
    copies: Vec<(PathBuf, FileVersion)>,
}

impl ViewMounts {
    /// Mounts the tmpfs at the first candidate that does not overlap with a path in `needed`.
    pub(super) fn new(needed: &[PathBuf]) -> Result<Self, SetupFailure> {
        let path = mount_point(MOUNT_POINTS, needed, |path| path.is_dir()).ok_or(Errno::NOENT);
        let path = path.step("find a mount point")?.to_owned();
        let mount = mounts::tmpfs(ROOT_BYTES, ROOT_FILES, "755").step("make a file system for views")?;
        mounts::attach(mount.as_fd(), CWD, &path).step("mount the file system for views")?;
        Ok(Self { path, next: 0 })
    }

    /// Attaches the mount to a new directory.
    fn attach(&mut self, mount: BorrowedFd<'_>) -> io::Result<MountPoint> {
        let path = self.path.join(self.next.to_string());
        self.next += 1;
        fs::create_dir(&path)?;
        // From here on, dropping the mount point cleans up if a step fails.
        let point = MountPoint(path);
        mounts::attach(mount, CWD, &point.0)?;
        Ok(point)
    }
}

impl Drop for MountPoint {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
        let _ = fs::remove_dir(&self.0);
    }
}

/// The first candidate directory that exists and that neither contains nor lies in a needed path.
fn mount_point<'a>(
    candidates: &[&'a str],
    needed: &[PathBuf],
    exists: impl Fn(&Path) -> bool,
) -> Option<&'a Path> {
    let is_free =
        |path: &&Path| !needed.iter().any(|other| other.starts_with(path) || path.starts_with(other));
    candidates.iter().map(|path| Path::new(*path)).filter(is_free).find(|path| exists(path))
}

impl Assembled {
    /// Assembles a view, over the root file system at `root_fs` if there is one. `ids` maps the owners of its files.
    pub(super) fn new(
        view_mounts: &mut ViewMounts,
        plan: &ViewPlan,
        root_fs: Option<&Path>,
        ids: Option<BorrowedFd<'_>>,
    ) -> Result<Self, SetupFailure> {
        let root =
            mounts::tmpfs(ROOT_BYTES, ROOT_FILES, "755").step("make the root directory of the view")?;
        // Mounts can be attached only inside of mounts that are attached themselves.
        let mut point = view_mounts.attach(root.as_fd()).step("mount the root directory of the view")?;
        let mut view_root = ViewRoot { root, own: Vec::new(), copies: Vec::new() };
        view_root.put_all(&plan.base)?;
        let mut root_below = None;
        if let Some(path) = root_fs {
            let (overlay, id) = lay_over(view_mounts, &point.0, path, ids)?;
            point = view_mounts.attach(overlay.as_fd()).step("mount the root file system")?;
            (view_root.root, root_below) = (overlay, Some((path.to_owned(), id)));
        }
        view_root.put_all(&plan.rest)?;
        let ViewRoot { root, own, copies } = view_root;
        for mount in own.iter().chain([&root]) {
            mounts::make_read_only(mount.as_fd()).step("make the view read-only")?;
        }
        let hidden = plan.rest.iter().filter_map(|piece| match piece {
            ViewPiece::Hidden(at) => Some((at.clone(), id_in(root.as_fd(), at))),
            _ => None,
        });
        let hidden = hidden.collect();
        let (tree, point) = match detached_copy(root.as_fd()) {
            Some(copy) => (copy, None),
            None => (root, Some(point)),
        };
        Ok(Self { tree, _point: point, root_below, hidden, copies })
    }

    /// The mount tree of this view.
    pub(super) fn tree(&self) -> BorrowedFd<'_> {
        self.tree.as_fd()
    }

    /// Whether all hidden paths are still covered, the root file system is still at its path, and each copy still
    /// equals the host's file. A cover is lost if the host replaces the covered file by a rename.
    pub(super) fn is_current(&self) -> bool {
        self.root_below
            .as_ref()
            .is_none_or(|(path, id)| rfs::stat(path).is_ok_and(|stat| file_id(&stat) == *id))
            && self.hidden.iter().all(|(at, id)| id_in(self.tree(), at) == *id)
            && self
                .copies
                .iter()
                .all(|(path, version)| rfs::lstat(path).is_ok_and(|stat| version_of(&stat) == *version))
    }
}

/// Copies a tree of mounts, so that the original can be unmounted: each mount in the namespace of the runner makes
/// every new cell slower. Returns `None` if the copy cannot be copied in turn, as before Linux 6.15.
fn detached_copy(tree: BorrowedFd<'_>) -> Option<OwnedFd> {
    let copy = mounts::copy_of(tree).ok()?;
    mounts::copy_of(copy.as_fd()).ok()?;
    Some(copy)
}

/// Makes a read-only overlay of the mount at `above` over the directory `below`. Neither is changed.
fn lay_over(
    view_mounts: &mut ViewMounts,
    above: &Path,
    below: &Path,
    ids: Option<BorrowedFd<'_>>,
) -> Result<(OwnedFd, FileIdentity), SetupFailure> {
    let mut lay = || {
        let tree = mounts::copy(CWD, below)?;
        if let Some(ids) = ids {
            // If the owners cannot be mapped, actions can still read all world-readable files.
            let _ = mounts::map_ids(tree.as_fd(), ids);
        }
        let point = view_mounts.attach(tree.as_fd())?;
        let [above, below] = [above, &*point.0].map(|path| mounts::directory(CWD, path));
        let (above, below) = (above?, below?);
        let id = file_id(&rfs::fstat(&below)?);
        // Actions can read the options of their mounts. These paths reveal nothing about the host.
        let layers = format!("/proc/self/fd/{}:/proc/self/fd/{}", above.as_raw_fd(), below.as_raw_fd());
        let options = [("lowerdir", &*layers), ("redirect_dir", "nofollow")];
        Ok::<_, io::Error>((mounts::new("overlay", &options, MountAttrFlags::empty())?, id))
    };
    lay().step(format_args!("use {} as the root file system (an overlay)", below.display()))
}

/// A view that is being assembled.
struct ViewRoot {
    root: OwnedFd,
    /// Mounts of the sandbox that become read-only when the view is complete.
    own: Vec<OwnedFd>,
    /// The host files that were copied, as in [`Assembled::copies`].
    copies: Vec<(PathBuf, FileVersion)>,
}

impl ViewRoot {
    fn put_all(&mut self, pieces: &[ViewPiece]) -> Result<(), SetupFailure> {
        pieces.iter().try_for_each(|piece| self.put(piece))
    }

    fn put(&mut self, piece: &ViewPiece) -> Result<(), SetupFailure> {
        match piece {
            ViewPiece::Directory(at) => {
                self.directory(at).map(drop).step(format_args!("make {}", at.display()))
            }
            ViewPiece::Own(at) => self.put_own(at).step(format_args!("make {}", at.display())),
            ViewPiece::Link { at, target } => self
                .parent(at)
                .and_then(|(parent, name)| Ok(rfs::symlinkat(target, parent, name)?))
                .step(format_args!("make the link {}", at.display())),
            ViewPiece::File { at, text } => {
                self.file(at, text.as_bytes()).step(format_args!("make {}", at.display()))
            }
            ViewPiece::Host { from, at, is_directory, access } => self
                .show(from, at, *is_directory, *access)
                .step(format_args!("show {} of the host", from.display())),
            ViewPiece::Copy(path) => {
                self.copy(path).step(format_args!("copy {} of the host", path.display()))
            }
            ViewPiece::Hidden(at) => self.hide(at).step(format_args!("hide {}", at.display())),
        }
    }

    fn put_own(&mut self, at: &Path) -> io::Result<()> {
        let mount = mounts::tmpfs(ROOT_BYTES, ROOT_FILES, "755")?;
        mounts::attach_to(mount.as_fd(), self.directory(at)?.as_fd())?;
        self.own.push(mount);
        Ok(())
    }

    fn show(&self, from: &Path, at: &Path, is_directory: bool, access: Access) -> io::Result<()> {
        let tree = match mounts::copy(CWD, from) {
            // The file existed when the view was planned and has been removed since.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            tree => tree?,
        };
        mounts::restrict(tree.as_fd(), access == Access::Write, access == Access::Device)?;
        let target = if is_directory {
            self.directory(at)?
        } else {
            match mounts::open_in(self.root.as_fd(), at) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    self.file(at, b"")?;
                    mounts::open_in(self.root.as_fd(), at)?
                }
                there => there?,
            }
        };
        mounts::attach_to(tree.as_fd(), target.as_fd())
    }

    /// Covers the file or directory at a path of the view, if there is one.
    fn hide(&self, at: &Path) -> io::Result<()> {
        let target = match mounts::open_in(self.root.as_fd(), at) {
            // An action cannot reach a path that this user cannot reach.
            Err(error) if is_unreachable(&error) => return Ok(()),
            target => target?,
        };
        let cover = match FileType::from_raw_mode(rfs::fstat(&target)?.st_mode) {
            FileType::Directory => mounts::tmpfs(4096, 0, "555")?,
            _ => mounts::copy(self.root.as_fd(), Path::new("dev/null"))?,
        };
        mounts::restrict(cover.as_fd(), false, false)?;
        mounts::attach_to(cover.as_fd(), target.as_fd())
    }

    /// Opens the directory at a path. Creates it and its parents if they do not exist.
    fn directory(&self, at: &Path) -> io::Result<OwnedFd> {
        let mut path = PathBuf::from("/");
        let mut here = mounts::open_in(self.root.as_fd(), &path)?;
        for name in at.iter().skip(1) {
            path.push(name);
            here = match mounts::open_in(self.root.as_fd(), &path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    rfs::mkdirat(&here, name, Mode::from_raw_mode(0o755))?;
                    mounts::open_in(self.root.as_fd(), &path)?
                }
                there => there?,
            };
        }
        Ok(here)
    }

    /// Opens the parent directory of a path, and returns the file name.
    fn parent<'a>(&self, at: &'a Path) -> io::Result<(OwnedFd, &'a Path)> {
        let (parent, name) = at.parent().zip(at.file_name()).ok_or(Errno::INVAL)?;
        Ok((self.directory(parent)?, Path::new(name)))
    }

    /// Copies a small file that every user may read. Mounts any other file.
    fn copy(&mut self, path: &Path) -> io::Result<()> {
        let file = match open_regular(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            opened => opened?,
        };
        let copied: u64 = self.copies.iter().map(|(_, version)| version.size).sum();
        let fits = |(_, stat): &(_, Stat)| stat.st_size.unsigned_abs() <= MAX_COPIED_BYTES - copied;
        let Some((file, stat)) = file.filter(fits) else {
            return self.show(path, path, false, Access::Read);
        };
        let version = version_of(&stat);
        let mut bytes = Vec::new();
        // If the file grows meanwhile, its version changes and the view is not current any more.
        fs::File::from(file).take(version.size).read_to_end(&mut bytes)?;
        self.file(path, &bytes)?;
        self.copies.push((path.to_owned(), version));
        Ok(())
    }

    fn file(&self, at: &Path, text: &[u8]) -> io::Result<()> {
        let (parent, name) = self.parent(at)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = rfs::openat(parent, name, flags, Mode::from_raw_mode(0o644))?;
        fs::File::from(file).write_all(text)
    }
}

/// Opens a regular file of the host that every user may read; `None` for any other file.
fn open_regular(path: &Path) -> io::Result<Option<(OwnedFd, Stat)>> {
    let everybody = Mode::RUSR | Mode::RGRP | Mode::ROTH;
    let is_open_to_all = |stat: &Stat| {
        FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
            && Mode::from_raw_mode(stat.st_mode).contains(everybody)
    };
    // Opening other kinds of files may block.
    if !is_open_to_all(&rfs::lstat(path)?) {
        return Ok(None);
    }
    let file = rfs::open(
        path,
        OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let stat = rfs::fstat(&file)?;
    Ok(is_open_to_all(&stat).then_some((file, stat)))
}

fn is_unreachable(error: &io::Error) -> bool {
    let kinds = [io::ErrorKind::NotFound, io::ErrorKind::NotADirectory, io::ErrorKind::PermissionDenied];
    kinds.contains(&error.kind())
}

fn id_in(root: BorrowedFd<'_>, at: &Path) -> Option<FileIdentity> {
    let file = mounts::open_in(root, at).ok()?;
    Some(file_id(&rfs::statat(file, "", AtFlags::EMPTY_PATH).ok()?))
}

#[allow(clippy::unnecessary_cast)]
fn version_of(stat: &Stat) -> FileVersion {
    let changed = (stat.st_ctime as i64, stat.st_ctime_nsec as i64);
    FileVersion { id: file_id(stat), size: stat.st_size.unsigned_abs(), changed }
}

/// Reads a file with names of users, groups or hosts from an untrusted root file system; `None` if there is no usable
/// one.
pub(super) fn read_names(root: &Path, path: &str) -> Option<String> {
    let root = mounts::directory(CWD, root).ok()?;
    let found = mounts::open_in(root.as_fd(), Path::new(path)).ok()?;
    if FileType::from_raw_mode(rfs::fstat(&found).ok()?.st_mode) != FileType::RegularFile {
        return None;
    }
    let readable = rfs::open(
        format!("/proc/self/fd/{}", found.as_raw_fd()),
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    );
    let mut bytes = Vec::new();
    fs::File::from(readable.ok()?).take(MAX_NAMES_BYTES).read_to_end(&mut bytes).ok()?;
    String::from_utf8(bytes).ok()
}

/// The host as this process sees it.
pub(super) struct ThisHost;

impl Host for ThisHost {
    fn kind(&self, path: &Path) -> Option<Kind> {
        let metadata = fs::symlink_metadata(path).ok()?;
        Some(match metadata.file_type() {
            kind if kind.is_dir() => Kind::Directory,
            kind if kind.is_symlink() => Kind::Link(fs::read_link(path).ok()?),
            _ => Kind::Other,
        })
    }

    fn names(&self, path: &Path) -> Vec<String> {
        let entries = fs::read_dir(path).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
    }

    fn real(&self, path: &Path) -> Option<PathBuf> {
        path.canonicalize().ok()
    }

    fn permissions(&self, path: &Path) -> Option<u32> {
        Some(fs::symlink_metadata(path).ok()?.mode() & 0o7777)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_are_mounted_where_nothing_is_shown() {
        let chosen = |needed: &[&str]| {
            let needed: Vec<_> = needed.iter().map(PathBuf::from).collect();
            mount_point(MOUNT_POINTS, &needed, |path| path != Path::new("/sys/fs"))
        };
        assert_eq!(chosen(&["/usr"]), Some(Path::new("/sys/kernel")));
        assert_eq!(chosen(&["/sys/kernel/mm"]), Some(Path::new("/sys/firmware")));
        assert_eq!(chosen(&["/sys", "/media/store"]), Some(Path::new("/mnt")));
        assert_eq!(chosen(&["/"]), None);
    }
}
