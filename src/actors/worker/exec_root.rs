//! [`ExecRoot`]: the files that one action sees. They consist of a layer of the action's own and possibly a staged tree
//! below it.
//!
//! The command sees both as one tree, an overlay. This module reads them from outside, where the overlay is not
//! mounted: the own layer on disk, by the rules of overlayfs, and the staged tree in memory, as the Directories from
//! which it was made. So files that the command left unchanged need no access to the disk and have a known digest. A
//! file that the command wrote is in the own layer, from where the store can take it over.
//!
//! Without a staged tree, the own layer contains all files.

use super::{
    dir::{self, Cursor},
    input_attributes::{self, EXECUTABLE},
    layer,
};
use gorego_reapi::tree::{self, Directory, InputTree};
use rustix::{
    fs::{self as rfs, FileType, Mode, Stat},
    io::Errno,
};
use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io,
    os::unix::ffi::OsStringExt as _,
    path::{Component, Path, PathBuf},
};

/// Maximum number of links on the path to a directory, as in the kernel.
const MAX_LINKS: usize = 40;
/// Maximum number of names on a path, including those in link targets. The path itself can have at most half as many.
const MAX_NAMES: usize = 4_096;

/// The files of one action. Must not be used while a process of the action is alive.
#[derive(Debug, Clone, Copy)]
pub(super) struct ExecRoot<'a> {
    own: &'a File,
    staged: Option<&'a InputTree>,
}

/// A directory of an [`ExecRoot`].
#[derive(Debug)]
pub(super) struct Dir<'a> {
    staged: Option<&'a InputTree>,
    /// Its path from the top, without links.
    path: PathBuf,
    /// A handle for opening entries in it; `None` if the own layer does not have the directory.
    own: Option<File>,
    /// The directory in the staged tree; `None` if that does not have it, or if it is hidden.
    below: Option<&'a Directory>,
}

/// The node with a given name.
#[derive(Debug)]
pub(super) enum ExecNode<'a> {
    /// A node of the own layer.
    Own(Stat),
    /// A file of the staged tree.
    File(&'a tree::File),
    /// A link of the staged tree.
    Link(&'a tree::Symlink),
    /// A directory of the staged tree.
    Directory(&'a Directory),
}

impl ExecNode<'_> {
    /// Whether it is a directory. A link to a directory is not.
    pub(super) fn is_directory(&self) -> bool {
        match self {
            Self::Own(stat) => dir::file_type(stat) == FileType::Directory,
            Self::Directory(_) => true,
            Self::File(_) | Self::Link(_) => false,
        }
    }
}

impl<'a> ExecRoot<'a> {
    /// The files of the layer `own` above the tree `staged`.
    pub(super) fn new(own: &'a File, staged: Option<&'a InputTree>) -> Self {
        Self { own, staged }
    }

    /// The top of the own layer.
    pub(super) fn own(&self) -> &'a File {
        self.own
    }

    /// Finds the directory at `path`. The path may use symbolic links as long as they stay beneath the root.
    ///
    /// # Errors
    /// `EXDEV` if a link leads out of the root; otherwise the errors of openat2(2).
    pub(super) fn resolve(&self, path: &Path) -> io::Result<Dir<'a>> {
        if self.staged.is_none() {
            let own = Some(dir::open_beneath(self.own, path)?);
            return Ok(Dir { staged: None, path: path.to_owned(), own, below: None });
        }
        let mut walk = PathWalk { root: *self, above: Vec::new(), here: self.top()?, links: 0, names: 0 };
        walk.go(path)?;
        Ok(walk.here)
    }

    /// The path of a directory from the top, without links.
    ///
    /// # Errors
    /// As [`ExecRoot::resolve`].
    pub(super) fn real_path(&self, path: &Path) -> io::Result<PathBuf> {
        let found = self.resolve(path)?;
        let (None, Some(open)) = (self.staged, &found.own) else { return Ok(found.path) };
        let [top, below] = [self.own, open].map(dir::path_of);
        below?.strip_prefix(top?).map(Path::to_owned).map_err(|_| Errno::XDEV.into())
    }

    /// Whether the permission bits allow the owner to enter the directory at `path`.
    ///
    /// # Errors
    /// As [`ExecRoot::resolve`].
    pub(super) fn can_enter(&self, path: &Path) -> io::Result<bool> {
        let mut prefix = PathBuf::from(".");
        for name in [None].into_iter().chain(path.iter().map(Some)) {
            prefix.extend(name);
            let mode = match self.resolve(&prefix) {
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Ok(false),
                found => found?.mode()?,
            };
            if !mode.contains(Mode::XUSR) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn top(&self) -> io::Result<Dir<'a>> {
        Ok(Dir {
            staged: self.staged,
            path: PathBuf::new(),
            own: Some(self.own.try_clone()?),
            below: self.staged.map(InputTree::root),
        })
    }

    /// Opens the directory at a path without links in the own layer; `None` if the layer does not have it.
    fn own_at(&self, path: &Path) -> io::Result<Option<File>> {
        if path.as_os_str().is_empty() {
            return self.own.try_clone().map(Some);
        }
        match dir::open_beneath(self.own, path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            opened => opened.map(Some),
        }
    }
}

/// A walk along a path that may contain links.
struct PathWalk<'a> {
    root: ExecRoot<'a>,
    /// The directories of the staged tree that are parents of the current one.
    above: Vec<Option<&'a Directory>>,
    here: Dir<'a>,
    links: usize,
    names: usize,
}

impl PathWalk<'_> {
    fn go(&mut self, path: &Path) -> io::Result<()> {
        let mut left: Vec<OsString> = Vec::new();
        self.push(path, &mut left)?;
        while let Some(name) = left.pop() {
            if name == ".." {
                // The path leaves the root.
                self.here.below = self.above.pop().ok_or(Errno::XDEV)?;
                self.here.path.pop();
                self.here.own = self.root.own_at(&self.here.path)?;
                continue;
            }
            let below = self.here.below;
            match self.here.enter(&name)? {
                PathStep::Directory(found) => {
                    self.above.push(below);
                    self.here = found;
                }
                PathStep::Link(target) => {
                    self.links += 1;
                    if self.links > MAX_LINKS {
                        return Err(Errno::LOOP.into());
                    }
                    self.push(Path::new(&target), &mut left)?;
                }
            }
        }
        Ok(())
    }

    /// Puts the names of a path in front of the names that are left.
    fn push(&mut self, path: &Path, left: &mut Vec<OsString>) -> io::Result<()> {
        let first = left.len();
        for component in path.components() {
            match component {
                Component::Normal(name) => left.push(name.to_owned()),
                Component::ParentDir => left.push("..".into()),
                Component::CurDir => {}
                Component::RootDir | Component::Prefix(_) => return Err(Errno::XDEV.into()),
            }
            self.names += 1;
            if self.names > MAX_NAMES {
                return Err(Errno::NAMETOOLONG.into());
            }
        }
        if let Some(new) = left.get_mut(first..) {
            new.reverse();
        }
        Ok(())
    }
}

enum PathStep<'a> {
    Directory(Dir<'a>),
    Link(OsString),
}

impl<'a> Dir<'a> {
    /// A handle of the directory in the own layer, for opening entries in it.
    pub(super) fn own(&self) -> Option<&File> {
        self.own.as_ref()
    }

    /// The permission bits, from the own layer if the directory is there.
    fn mode(&self) -> io::Result<Mode> {
        Ok(match (&self.own, self.below) {
            (Some(own), _) => Mode::from_raw_mode(rfs::fstat(own)?.st_mode),
            (None, Some(below)) => Mode::from_raw_mode(below.properties.unix_mode.unwrap_or(EXECUTABLE)),
            (None, None) => return Err(Errno::NOENT.into()),
        })
    }

    /// Finds the node with this name.
    ///
    /// # Errors
    /// `NotFound` if there is none; otherwise the errors of fstatat(2).
    pub(super) fn look(&self, name: &OsStr) -> io::Result<ExecNode<'a>> {
        if let Some(own) = &self.own {
            match dir::stat_at(own, name) {
                Ok(stat) if self.staged.is_some() && layer::is_whiteout(&stat) => {
                    return Err(Errno::NOENT.into());
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                found => return found.map(ExecNode::Own),
            }
        }
        let found = self.staged.zip(self.below).and_then(|(tree, below)| find(tree, below, name));
        found.ok_or_else(|| Errno::NOENT.into())
    }

    /// Checks that there is no node with this name, not even a dangling link.
    ///
    /// # Errors
    /// `AlreadyExists` if there is one; the errors of fstatat(2).
    pub(super) fn must_lack(&self, name: &OsStr) -> io::Result<()> {
        match self.look(name) {
            Ok(_) => Err(Errno::EXIST.into()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Reads the target of a link that [`Dir::look`] has found in the own layer.
    ///
    /// # Errors
    /// The errors of readlinkat(2).
    pub(super) fn read_link(&self, name: &OsStr) -> io::Result<OsString> {
        let own = self.own.as_ref().ok_or(Errno::NOENT)?;
        Ok(OsString::from_vec(rfs::readlinkat(own, name, Vec::new())?.into_bytes()))
    }

    fn enter(&self, name: &OsStr) -> io::Result<PathStep<'a>> {
        let path = self.path.join(name);
        let (own, below) = match self.look(name)? {
            ExecNode::Own(stat) if dir::file_type(&stat) == FileType::Symlink => {
                return Ok(PathStep::Link(self.read_link(name)?));
            }
            ExecNode::Link(link) => return Ok(PathStep::Link(link.target.clone().into())),
            ExecNode::Own(stat) if dir::file_type(&stat) == FileType::Directory => {
                let own = self.own.as_ref().ok_or(Errno::NOENT)?;
                let own = dir::open_beneath(own, Path::new(name))?;
                let below = below(self.staged, self.below, name, &own)?;
                (Some(own), below)
            }
            ExecNode::Directory(directory) => (None, Some(directory)),
            ExecNode::Own(_) | ExecNode::File(_) => return Err(Errno::NOTDIR.into()),
        };
        Ok(PathStep::Directory(Dir { staged: self.staged, path, own, below }))
    }

    /// Makes sure that the own layer has this directory, and returns a handle of it. Missing directories on the path
    /// are created in the layer with the times of the staged ones. [`super::inputs`] sets their modes.
    ///
    /// # Errors
    /// The errors of the file system.
    pub(super) fn make_own(&self, root: ExecRoot<'a>) -> io::Result<File> {
        if let (None, Some(own)) = (self.staged, &self.own) {
            return own.try_clone();
        }
        let mut here = root.own.try_clone()?;
        let mut below = root.staged.map(InputTree::root);
        for component in self.path.components() {
            let Component::Normal(name) = component else { return Err(Errno::INVAL.into()) };
            let (tree, directory) = (root.staged, below);
            let found = match dir::open_dir(&here, name) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    let name = name.to_str().ok_or(Errno::ILSEQ)?;
                    let of_tree = subdirectory(tree, directory, name.as_ref()).ok_or(Errno::NOENT)?;
                    let before = rfs::fstat(&here)?;
                    let made = layer::make_directory(&here, name)?;
                    input_attributes::set_mtime_at(
                        &made,
                        ".",
                        input_attributes::mtime_of(&of_tree.properties),
                    )?;
                    input_attributes::set_mtime_at(&here, ".", input_attributes::mtime_in(&before))?;
                    made
                }
                opened => opened?,
            };
            below = self::below(tree, directory, name, &found)?;
            here = found;
        }
        Ok(here)
    }
}

/// The node with this name in a directory of the staged tree.
fn find<'a>(tree: &'a InputTree, directory: &'a Directory, name: &OsStr) -> Option<ExecNode<'a>> {
    let text = name.to_str()?;
    let file = || directory.file(text).map(ExecNode::File);
    let link = || directory.symlink(text).map(ExecNode::Link);
    let child = || subdirectory(Some(tree), Some(directory), name).map(ExecNode::Directory);
    file().or_else(link).or_else(child)
}

fn subdirectory<'a>(
    tree: Option<&'a InputTree>,
    directory: Option<&'a Directory>,
    name: &OsStr,
) -> Option<&'a Directory> {
    let child = directory?.subdirectory(name.to_str()?)?;
    tree?.find(&child.digest)
}

/// The directory of the staged tree that is visible through the own layer's directory `own` with this name.
fn below<'a>(
    tree: Option<&'a InputTree>,
    directory: Option<&'a Directory>,
    name: &OsStr,
    own: &File,
) -> io::Result<Option<&'a Directory>> {
    match subdirectory(tree, directory, name) {
        Some(found) if !layer::is_opaque(own)? => Ok(Some(found)),
        _ => Ok(None),
    }
}

/// A position in a tree of directories, in both layers at once.
#[derive(Debug)]
pub(super) struct LayerWalk<'a> {
    staged: Option<&'a InputTree>,
    own: Option<Cursor>,
    /// How many levels the position is below the last directory that the own layer has.
    deeper: usize,
    below: Vec<Option<&'a Directory>>,
}

/// The current directory of a [`LayerWalk`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Here<'w, 'a> {
    /// The directory in the own layer.
    pub own: Option<&'w File>,
    /// The directory in the staged tree, if it is visible.
    pub below: Option<&'a Directory>,
    /// The staged tree below the own layer, if there is one.
    pub staged: Option<&'a InputTree>,
}

impl<'a> LayerWalk<'a> {
    /// Starts at the top of an exec root.
    ///
    /// # Errors
    /// The errors of the file system.
    pub(super) fn at_top(root: ExecRoot<'a>) -> io::Result<Self> {
        let below = root.staged.map(InputTree::root);
        Ok(Self { staged: root.staged, own: Some(Cursor::at(root.own)?), deeper: 0, below: vec![below] })
    }

    /// Starts at the directory `name` of `parent`.
    ///
    /// # Errors
    /// The errors of openat2(2).
    pub(super) fn at(parent: &Dir<'a>, name: &OsStr) -> io::Result<Self> {
        let staged = parent.staged;
        match parent.look(name)? {
            ExecNode::Own(_) => {
                let own = parent.own.as_ref().ok_or(Errno::NOENT)?;
                let (own, _) = dir::open_accessible(own, name)?;
                let below = below(staged, parent.below, name, &own)?;
                Ok(Self { staged, own: Some(Cursor::new(own)?), deeper: 0, below: vec![below] })
            }
            ExecNode::Directory(directory) => {
                Ok(Self { staged, own: None, deeper: 0, below: vec![Some(directory)] })
            }
            ExecNode::File(_) | ExecNode::Link(_) => Err(Errno::NOTDIR.into()),
        }
    }

    /// The current directory.
    ///
    /// # Errors
    /// None in practice: the current directory is always open.
    pub(super) fn here(&self) -> io::Result<Here<'_, 'a>> {
        let own = match &self.own {
            Some(cursor) if self.deeper == 0 => Some(cursor.here()?),
            _ => None,
        };
        Ok(Here { own, below: self.below.last().copied().flatten(), staged: self.staged })
    }

    /// Enters a subdirectory like [`Cursor::down`].
    ///
    /// # Errors
    /// The errors of [`Cursor::down`].
    pub(super) fn down(&mut self, name: &OsStr) -> io::Result<()> {
        let directory = self.below.last().copied().flatten();
        let entered = match &mut self.own {
            Some(cursor) if self.deeper == 0 => match cursor.down(name) {
                Err(error) if error.kind() == io::ErrorKind::NotFound && directory.is_some() => None,
                entered => {
                    entered?;
                    Some(below(self.staged, directory, name, cursor.here()?)?)
                }
            },
            _ => None,
        };
        let below = match entered {
            Some(below) => below,
            None => {
                self.deeper += 1;
                subdirectory(self.staged, directory, name)
            }
        };
        self.below.push(below);
        Ok(())
    }

    /// Returns to the parent directory.
    ///
    /// # Errors
    /// The errors of [`Cursor::up`].
    pub(super) fn up(&mut self) -> io::Result<()> {
        self.below.pop();
        match &mut self.own {
            Some(cursor) if self.deeper == 0 => cursor.up(),
            _ => {
                self.deeper = self.deeper.saturating_sub(1);
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests;
