//! [`RootTree`]: the root file system of an image while its layers are applied.
//!
//! Layers are hostile. Their entries are created relative to an open directory, and no path leaves the tree: as in the
//! image itself, ".." and absolute links stop at its top (openat2 with RESOLVE_IN_ROOT). An entry never follows a link
//! with its own name. No privileges are needed: all files belong to the user of the server, set-user-id bits and
//! extended attributes are dropped, and devices, pipes and sockets are left out. Directories and files keep their
//! modes, but their owner can always read them.
//!
//! A whiteout hides entries of lower layers, but never of its own layer, in any order of the entries.

use super::problem::{LayerProblem, shown};
use crate::actors::worker::{build_root, dir};
use gorego_reapi::error::Result;
use rustix::{
    fs::{self as rfs, AtFlags, FileType, Mode, OFlags, ResolveFlags, Timespec, Timestamps},
    io::Errno,
};
use std::{
    collections::HashSet,
    ffi::{OsStr, OsString},
    fs::File,
    hash::{BuildHasher as _, RandomState},
    io::{self, Read, Write as _},
    os::unix::ffi::OsStrExt as _,
    sync::Arc,
};

/// Maximum space of an entry on disk, besides its content.
pub(super) const ENTRY_BYTES: u64 = 4096;
/// Maximum number of entries of all layers of an image. Each takes some bytes of memory while its layer is applied.
const MAX_ENTRIES: u64 = 2_000_000;
/// Maximum depth of directories that a whiteout hides.
const MAX_HIDDEN_DEPTH: usize = 256;
/// Number of bytes that are copied at once.
const COPY_BYTES: usize = 128 * 1024;
/// Prefix of the name of a whiteout.
const WHITEOUT: &[u8] = b".wh.";
/// The whiteout that hides everything that lower layers have in a directory.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Prefix of the names that aufs, an old union file system, reserves.
const RESERVED: &[u8] = b".wh..wh.";
/// The mode of directories that no layer describes.
const DIRECTORY_MODE: u32 = 0o755;

pub(super) enum LayerEntry<'a> {
    /// A directory with this mode.
    Directory(u32),
    /// A regular file with its content.
    File {
        /// Permission bits of the file.
        mode: u32,
        /// Modification time in seconds since 1970.
        mtime: u64,
        /// Length of the content.
        size: u64,
        /// The content, `size` bytes long.
        content: &'a mut dyn Read,
    },
    /// A symbolic link to this target.
    Symlink(&'a [u8]),
    /// Another name of the file at this path.
    HardLink(&'a [u8]),
    /// A device, a pipe or a socket, which no action may have.
    Special,
}

/// A tree to which layers are applied.
pub(super) struct RootTree<'a> {
    top: &'a File,
    /// Reserves room for bytes before they are written. Fails if the pull takes too long.
    take: &'a mut dyn FnMut(u64) -> Result<()>,
    /// The entries that the current layer has created: the inode of a directory and the hash of a name in it.
    made: HashSet<(u64, u64)>,
    /// The number of applied entries, including directories that were created without an entry.
    entries: u64,
    hashes: RandomState,
    /// The last opened directory. Entries are ordered by directory, so it is often needed again.
    last: Option<(OsString, Parent)>,
    buffer: Vec<u8>,
}

/// An open directory with its inode number.
#[derive(Clone)]
struct Parent {
    handle: Arc<File>,
    inode: u64,
}

impl Parent {
    fn new(handle: File) -> io::Result<Self> {
        let (_, inode) = dir::file_id(&rfs::fstat(&handle)?);
        Ok(Self { handle: Arc::new(handle), inode })
    }
}

impl<'a> RootTree<'a> {
    /// Starts with an empty directory.
    pub(super) fn new(top: &'a File, take: &'a mut dyn FnMut(u64) -> Result<()>) -> Self {
        Self {
            top,
            take,
            made: HashSet::new(),
            entries: 0,
            hashes: RandomState::new(),
            last: None,
            buffer: vec![0; COPY_BYTES],
        }
    }

    /// Starts the next layer.
    pub(super) fn begin_layer(&mut self) {
        self.made.clear();
    }

    /// Reserves room that belongs to no file.
    pub(super) fn take(&mut self, bytes: u64) -> Result<(), LayerProblem> {
        Ok((self.take)(bytes)?)
    }

    /// Applies an entry of the current layer.
    pub(super) fn apply(&mut self, path: &[u8], entry: LayerEntry<'_>) -> Result<(), LayerProblem> {
        let content = if let LayerEntry::File { size, .. } = &entry { *size } else { 0 };
        self.take(ENTRY_BYTES.saturating_add(content))?;
        self.count()?;
        let names = split(path)?;
        let Some((name, above)) = names.split_last() else {
            // The entry is the top directory, whose mode the server determines.
            return match entry {
                LayerEntry::Directory(_) => Ok(()),
                _ => Err(refuse(path, "is the top of the image but not a directory")),
            };
        };
        let result = match name.as_bytes() {
            OPAQUE => self.empty(above),
            name if name.starts_with(RESERVED) => Ok(()),
            name if name.starts_with(WHITEOUT) => {
                return self.whiteout(above, &name[WHITEOUT.len()..], path);
            }
            _ => match entry {
                LayerEntry::Special => Ok(()),
                entry => self.put(above, name, entry),
            },
        };
        result.map_err(|problem| problem.at(path))
    }

    fn count(&mut self) -> Result<(), LayerProblem> {
        self.entries += 1;
        match self.entries > MAX_ENTRIES {
            true => Err(LayerProblem::Refused(format!("the image has more than {MAX_ENTRIES} entries"))),
            false => Ok(()),
        }
    }

    fn put(&mut self, above: &[&OsStr], name: &OsStr, entry: LayerEntry<'_>) -> Result<(), LayerProblem> {
        let parent = self.make(above)?;
        match entry {
            LayerEntry::Directory(mode) => {
                self.clear(&parent, name, true)?;
                let mode = Mode::from_raw_mode(mode & 0o1777 | 0o700);
                match rfs::mkdirat(&parent.handle, name, mode) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(error) => return Err(error.into()),
                }
                rfs::fchmod(dir::open_dir(&parent.handle, name)?, mode)?;
            }
            LayerEntry::File { mode, mtime, size, content } => {
                self.clear(&parent, name, false)?;
                self.write(&parent, name, (mode, mtime, size), content)?;
            }
            LayerEntry::Symlink(target) => {
                self.clear(&parent, name, false)?;
                rfs::symlinkat(OsStr::from_bytes(target), &parent.handle, name)?;
            }
            LayerEntry::HardLink(target) => self.link(&parent, name, target)?,
            LayerEntry::Special => return Ok(()),
        }
        self.note(&parent, name);
        Ok(())
    }

    fn write(
        &mut self,
        parent: &Parent,
        name: &OsStr,
        (mode, mtime, size): (u32, u64, u64),
        content: &mut dyn Read,
    ) -> Result<(), LayerProblem> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut file = File::from(rfs::openat(&parent.handle, name, flags, Mode::RUSR)?);
        let mut left = size;
        while left > 0 {
            let most = self.buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            let read = content.read(&mut self.buffer[..most]).map_err(LayerProblem::of_reading)?;
            if read == 0 {
                return Err(LayerProblem::Refused("it ends within a file".into()));
            }
            file.write_all(&self.buffer[..read])?;
            left -= read as u64;
            // Checks the time limit.
            (self.take)(0)?;
        }
        rfs::fchmod(&file, Mode::from_raw_mode(mode & 0o777 | 0o400))?;
        let time = Timespec { tv_sec: i64::try_from(mtime).unwrap_or(i64::MAX), tv_nsec: 0 };
        // Times that the file system cannot store are ignored.
        let _ = rfs::futimens(&file, &Timestamps { last_access: time, last_modification: time });
        Ok(())
    }

    fn link(&mut self, parent: &Parent, name: &OsStr, target: &[u8]) -> Result<(), LayerProblem> {
        let missing =
            || LayerProblem::Refused(format!("it is a link to \"{}\", which is no file", shown(target)));
        let names = split(target)?;
        let (of_target, above) = names.split_last().ok_or_else(missing)?;
        let beside = self.find(above)?.ok_or_else(missing)?;
        match dir::stat_at(&beside.handle, of_target) {
            Ok(stat) if matches!(dir::file_type(&stat), FileType::RegularFile | FileType::Symlink) => {}
            Ok(_) => return Err(missing()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(missing()),
            Err(error) => return Err(error.into()),
        }
        if beside.inode == parent.inode && *of_target == name {
            return Ok(());
        }
        self.clear(parent, name, false)?;
        Ok(rfs::linkat(&beside.handle, *of_target, &parent.handle, name, AtFlags::empty())?)
    }

    /// Removes the existing node at the path of a new entry. A directory may stay.
    fn clear(&mut self, parent: &Parent, name: &OsStr, keeps_directory: bool) -> Result<(), LayerProblem> {
        let stat = match dir::stat_at(&parent.handle, name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            stat => stat?,
        };
        match dir::file_type(&stat) {
            FileType::Directory if keeps_directory => Ok(()),
            FileType::Directory => {
                self.last = None;
                Ok(build_root::remove(&parent.handle, name)?)
            }
            _ => Ok(rfs::unlinkat(&parent.handle, name, AtFlags::empty())?),
        }
    }

    fn whiteout(&mut self, above: &[&OsStr], name: &[u8], path: &[u8]) -> Result<(), LayerProblem> {
        if matches!(name, b"" | b"." | b"..") {
            return Err(refuse(path, "hides nothing that can be in a directory"));
        }
        let hide = |tree: &mut Self| {
            let Some(parent) = tree.find(above)? else { return Ok(()) };
            tree.last = None;
            tree.hide(&parent, OsStr::from_bytes(name), 0).map(drop)
        };
        hide(self).map_err(|problem: LayerProblem| problem.at(path))
    }

    /// Hides everything that lower layers have in a directory.
    fn empty(&mut self, names: &[&OsStr]) -> Result<(), LayerProblem> {
        let parent = self.make(names)?;
        self.last = None;
        for name in names_in(&parent.handle)? {
            self.hide(&parent, &name, 0)?;
        }
        Ok(())
    }

    /// Removes the nodes of lower layers with this name. Returns whether a node of the current layer stays.
    fn hide(&self, parent: &Parent, name: &OsStr, depth: usize) -> Result<bool, LayerProblem> {
        let stat = match dir::stat_at(&parent.handle, name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            stat => stat?,
        };
        let mut stays = self.made.contains(&self.key(parent, name));
        let is_directory = dir::file_type(&stat) == FileType::Directory;
        if is_directory {
            if depth == MAX_HIDDEN_DEPTH {
                return Err(LayerProblem::Refused(format!(
                    "it hides directories that are more than {MAX_HIDDEN_DEPTH} deep"
                )));
            }
            let inside = Parent::new(dir::open_dir(&parent.handle, name)?)?;
            for name in names_in(&inside.handle)? {
                stays |= self.hide(&inside, &name, depth + 1)?;
            }
        }
        if !stays {
            let flags = if is_directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
            rfs::unlinkat(&parent.handle, name, flags)?;
        }
        Ok(stays)
    }

    /// Opens the directory at a path. Missing directories are created.
    fn make(&mut self, names: &[&OsStr]) -> Result<Parent, LayerProblem> {
        if let Some(found) = self.find(names)? {
            return Ok(found);
        }
        let mut here = self.open(OsStr::new("."))?;
        for (count, name) in names.iter().enumerate() {
            let path = joined(&names[..=count]);
            let there = match self.open(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    self.take(ENTRY_BYTES)?;
                    self.count()?;
                    rfs::mkdirat(&here.handle, *name, Mode::from_raw_mode(DIRECTORY_MODE))?;
                    let made = dir::open_dir(&here.handle, name)?;
                    rfs::fchmod(&made, Mode::from_raw_mode(DIRECTORY_MODE))?;
                    self.note(&here, name);
                    Parent::new(made)?
                }
                opened => opened?,
            };
            here = there;
        }
        self.last = Some((joined(names), here.clone()));
        Ok(here)
    }

    /// Opens the directory at a path; `None` if there is none.
    fn find(&mut self, names: &[&OsStr]) -> Result<Option<Parent>, LayerProblem> {
        let path = joined(names);
        if let Some((last, parent)) = &self.last
            && *last == path
        {
            return Ok(Some(parent.clone()));
        }
        match self.open(&path) {
            Ok(parent) => {
                self.last = Some((path, parent.clone()));
                Ok(Some(parent))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn open(&self, path: &OsStr) -> io::Result<Parent> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
        loop {
            match rfs::openat2(self.top, path, flags, Mode::empty(), resolve) {
                Ok(fd) => return Parent::new(fd.into()),
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn note(&mut self, parent: &Parent, name: &OsStr) {
        let key = self.key(parent, name);
        self.made.insert(key);
    }

    fn key(&self, parent: &Parent, name: &OsStr) -> (u64, u64) {
        (parent.inode, self.hashes.hash_one(name))
    }
}

fn names_in(directory: &File) -> io::Result<Vec<OsString>> {
    dir::entries(directory)?.map(|entry| Ok(dir::entry_name(&entry?).to_owned())).collect()
}

fn joined(names: &[&OsStr]) -> OsString {
    if names.is_empty() { ".".into() } else { names.join(OsStr::new("/")) }
}

/// The components of a path in an image; none for the top directory.
fn split(path: &[u8]) -> Result<Vec<&OsStr>, LayerProblem> {
    let mut names = Vec::new();
    for name in path.split(|byte| *byte == b'/') {
        match name {
            b"" | b"." => {}
            b".." => return Err(refuse(path, "contains \"..\"")),
            name if name.contains(&0) => return Err(refuse(path, "contains a NUL")),
            name => names.push(OsStr::from_bytes(name)),
        }
    }
    Ok(names)
}

fn refuse(path: &[u8], problem: &str) -> LayerProblem {
    LayerProblem::Refused(format!("\"{}\" {problem}", shown(path)))
}

#[cfg(test)]
mod tests;
