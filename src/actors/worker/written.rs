//! [`Written`]: measures what a command has written to its input root so far, for the limits on disk space.
//!
//! It walks the directory that belongs to this action alone: the layer above a staged tree, or a copy of the input
//! root. Files that were there before the command started do not count.

use super::dir::{self, FileIdentity};
use crate::{
    disk::Space,
    limits::{Exceeded, LimitedResource, Limits},
};
use rustix::{
    fs::{self as rfs, FileType, Mode, OFlags, Stat},
    io::Errno,
};
use std::{ffi::OsString, fs::File, io, path::Path};

/// The unit of `st_blocks` in bytes.
const BLOCK: u64 = 512;
/// Maximum number of directories that are kept open on the way down.
const KEPT_OPEN: usize = 8;

/// Measures what an action writes below one directory.
#[derive(Debug)]
pub(super) struct Written {
    root: File,
    before: Use,
    /// The free space when the command started.
    space: Option<Space>,
}

/// The size of the content of a directory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Use {
    bytes: u64,
    nodes: u64,
}

impl Written {
    /// Starts to measure: what is written below this directory from now on counts.
    ///
    /// # Errors
    /// If the directory cannot be opened.
    pub(super) fn begin(root: &Path) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let root = File::from(rfs::open(root, flags, Mode::empty())?);
        let before = measure(&root, &Limits::default(), Use::default());
        let space = Space::of_file(&root).ok();
        Ok(Self { root, before, space })
    }

    /// The limit that is exceeded, if any. The walk ends as soon as it has found enough.
    pub(super) fn exceeded(&self, limits: &Limits) -> Option<Exceeded> {
        let now = measure(&self.root, limits, self.before);
        let bytes = now.bytes.saturating_sub(self.before.bytes);
        let nodes = now.nodes.saturating_sub(self.before.nodes);
        let crossed =
            |resource, used, limit| (limit > 0 && used > limit).then_some(Exceeded { resource, used, limit });
        crossed(LimitedResource::Disk, bytes, limits.disk)
            .or_else(|| crossed(LimitedResource::Files, nodes, limits.files))
    }

    /// Whether the free space has shrunk so much since the start that this command may have exceeded a limit. This
    /// costs one system call.
    pub(super) fn may_exceed(&self, limits: &Limits) -> bool {
        let Some((before, now)) = self.space.zip(Space::of_file(&self.root).ok()) else { return true };
        let used = |before: u64, now: u64| before.saturating_sub(now);
        limits.disk > 0 && used(before.free_bytes, now.free_bytes) >= limits.disk / 2
            || limits.files > 0 && used(before.free_inodes, now.free_inodes) >= limits.files / 2
    }
}

/// The blocks of everything below a directory, in bytes.
pub(super) fn bytes_below(root: &File) -> u64 {
    measure(root, &Limits::default(), Use::default()).bytes
}

/// The size of everything below a directory. Files that vanish meanwhile are not counted. Stops when the size exceeds
/// the size `before` by more than the limits allow.
fn measure(root: &File, limits: &Limits, before: Use) -> Use {
    let mut found = Use::default();
    // A walk that ended early gives a sufficient result.
    let _ = walk(root, &mut |stat| {
        found.nodes += 1;
        found.bytes = found.bytes.saturating_add(share_of_bytes(stat));
        let over = |used: u64, before: u64, limit: u64| limit > 0 && used.saturating_sub(before) > limit;
        !over(found.bytes, before.bytes, limits.disk) && !over(found.nodes, before.nodes, limits.files)
    });
    found
}

/// The bytes of a file that one of its names stands for. All names of a file that was written here are below the root.
#[allow(clippy::unnecessary_cast)]
fn share_of_bytes(stat: &Stat) -> u64 {
    let bytes = (stat.st_blocks.max(0) as u64).saturating_mul(BLOCK);
    match dir::file_type(stat) {
        FileType::Directory => bytes,
        _ => bytes.div_ceil((stat.st_nlink as u64).max(1)),
    }
}

/// A directory on the path from the root to the current directory.
struct Level {
    id: FileIdentity,
    /// `None` while the walk is far below it.
    open: Option<File>,
    /// Directories that are not visited yet.
    left: Vec<OsString>,
}

/// Visits everything below a directory until a visit returns false. It changes nothing, keeps few descriptors open, and
/// gives up if directories are moved away meanwhile.
fn walk(root: &File, visit: &mut dyn FnMut(&Stat) -> bool) -> io::Result<()> {
    let mut levels = vec![enter(root.try_clone()?, visit)?];
    while let Some(level) = levels.last_mut() {
        if let Some(name) = level.left.pop() {
            let open = level.open.as_ref().and_then(|open| dir::open_dir(open, &name).ok());
            let Some(open) = open else { continue };
            levels.push(enter(open, visit)?);
            if let Some(far) = levels.len().checked_sub(KEPT_OPEN + 1) {
                levels[far].open = None;
            }
            continue;
        }
        let below = levels.pop().and_then(|level| level.open);
        if let (Some(level), Some(below)) = (levels.last_mut(), below)
            && level.open.is_none()
        {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let found = rfs::openat(&below, "..", flags, Mode::empty())?;
            if dir::file_id(&rfs::fstat(&found)?) != level.id {
                return Err(Errno::STALE.into());
            }
            level.open = Some(found.into());
        }
    }
    Ok(())
}

/// Visits the entries of a directory. An error ends the walk.
fn enter(open: File, visit: &mut dyn FnMut(&Stat) -> bool) -> io::Result<Level> {
    let mut left = Vec::new();
    for entry in dir::entries(&open)?.map_while(io::Result::ok) {
        let name = dir::entry_name(&entry);
        let Ok(stat) = dir::stat_at(&open, name) else { continue };
        if !visit(&stat) {
            return Err(Errno::CANCELED.into());
        }
        if dir::file_type(&stat) == FileType::Directory {
            left.push(name.to_owned());
        }
    }
    Ok(Level { id: dir::file_id(&rfs::fstat(&open)?), open: Some(open), left })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, path::PathBuf};

    fn limits(disk: u64, files: u64) -> Limits {
        Limits { disk, files, ..Limits::default() }
    }

    #[test]
    fn only_files_that_are_written_after_the_start_count() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("input"), vec![1; 3 << 20]).unwrap();
        let written = Written::begin(directory.path()).unwrap();
        assert_eq!(written.exceeded(&limits(1 << 20, 1)), None);
        fs::write(directory.path().join("output"), vec![1; 2 << 20]).unwrap();
        let exceeded = written.exceeded(&limits(1 << 20, 0)).unwrap();
        assert_eq!((exceeded.resource, exceeded.limit), (LimitedResource::Disk, 1 << 20));
        assert!(exceeded.used >= 2 << 20, "{exceeded:?}");
        assert_eq!(written.exceeded(&limits(4 << 20, 1)), None);
    }

    #[test]
    fn a_file_with_many_names_takes_its_bytes_once() {
        let directory = tempfile::tempdir().unwrap();
        let written = Written::begin(directory.path()).unwrap();
        fs::write(directory.path().join("file"), vec![1; 1 << 20]).unwrap();
        for number in 1..100 {
            fs::hard_link(directory.path().join("file"), directory.path().join(number.to_string())).unwrap();
        }
        assert_eq!(written.exceeded(&limits(2 << 20, 0)), None);
        assert_eq!(written.exceeded(&limits(0, 99)).unwrap().used, 100, "each name counts as a file");
        let bytes = bytes_below(&File::open(directory.path()).unwrap());
        assert!((1 << 20..2 << 20).contains(&bytes), "{bytes}");
    }

    /// The path is longer than any system call accepts. The link must not be followed.
    #[test]
    fn files_are_counted_at_any_depth() {
        let directory = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/usr", directory.path().join("link")).unwrap();
        let written = Written::begin(directory.path()).unwrap();
        let mut at = File::open(directory.path()).unwrap();
        for _ in 0..1500 {
            rfs::mkdirat(&at, "long-name", Mode::RWXU).unwrap();
            at = dir::open_dir(&at, "long-name".as_ref()).unwrap();
        }
        assert_eq!(written.exceeded(&limits(0, 1500)), None);
        let _ = rfs::openat(&at, "last", OFlags::CREATE | OFlags::WRONLY, Mode::RWXU).unwrap();
        assert_eq!(written.exceeded(&limits(0, 1500)).unwrap().used, 1501);
        drop(at);
        // More than remove_dir_all can hold open.
        let top: PathBuf = directory.path().into();
        assert!(std::process::Command::new("rm").arg("-rf").arg(top).status().unwrap().success());
    }
}
