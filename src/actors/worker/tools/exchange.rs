//! Exchanges the inputs in the exec root of a tool while the tool keeps running.
//!
//! The exec root is an ordinary directory that is mounted in the tool's cell. Changes from outside are visible there at
//! once, even to a process whose working directory it is. [`exchange`] turns it into exactly the input root of the next
//! action: leftovers of the previous action are removed, inputs that both actions share stay in place, and all others
//! are written.
//!
//! A hostile tool may change its exec root at any moment. Every step is relative to an open directory and follows no
//! link ([`Cursor`]), and a directory cannot be moved out of a mount. So a tool can corrupt only its own inputs. A file
//! counts as unchanged if its inode, size, mode and times are the same as right after it was written here. No process
//! in a cell can set a file's change time (ctime).

use crate::actors::worker::{
    build_root::remove_while,
    checkpoint::Checkpoint,
    dir::{self, Cursor, FileIdentity},
    input_attributes::{self, EXECUTABLE},
    inputs,
    store::Inputs,
};
use gorego_reapi::{
    digest::Digest,
    error::{Error, Result},
    path::RootPath,
    tree::{self, Directory, InputTree, Symlink},
};
use rustix::{
    fs::{self as rfs, AtFlags, FileType, Mode, Stat, Timespec},
    io::Errno,
};
use std::{
    collections::{HashMap, HashSet},
    ffi::OsStr,
    fs::File,
    io,
    os::unix::ffi::OsStrExt as _,
};

/// The input files that were written into an exec root, by path. The [call](super::call) limits the size of the paths.
#[derive(Debug, Default)]
pub(super) struct PlacedInputs(HashMap<String, PlacedFile>);

/// An input file on disk.
#[derive(Debug, Clone, PartialEq)]
struct PlacedFile {
    digest: Digest,
    mode: u32,
    mtime: Timespec,
    stamp: FileStamp,
}

/// The attributes that show whether a file was changed or replaced.
#[derive(Debug, Clone, Copy, PartialEq)]
struct FileStamp {
    id: FileIdentity,
    size: i64,
    mode: u32,
    changed: Timespec,
    modified: Timespec,
}

/// Why the inputs could not be exchanged.
#[derive(Debug)]
pub(super) enum NotExchanged {
    /// The tool has changed this file, which is one of the tool's own inputs.
    ToolChanged(String),
    /// The exchange failed for another reason.
    Failed(Error),
}

impl From<Error> for NotExchanged {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// Turns `root` into the input root `inputs`, and creates the working directory. Directories that stay keep their
/// inodes, so the working directory of a running tool stays valid.
///
/// # Errors
/// After any error the tool must not be used again.
pub(super) fn exchange(
    contents: &mut PlacedInputs,
    root: &File,
    inputs: &dyn Inputs,
    working_directory: &RootPath,
    is_tool_input: fn(&tree::File) -> bool,
    checkpoint: &Checkpoint<'_>,
) -> std::result::Result<(), NotExchanged> {
    let nothing = Directory::default();
    let mut exchange = Exchange {
        last: std::mem::take(&mut contents.0),
        next: HashMap::new(),
        inputs,
        way: working_directory.segments().collect(),
        nothing: &nothing,
        is_tool_input,
        checkpoint,
    };
    exchange.run(root)?;
    contents.0 = exchange.next;
    Ok(())
}

struct Exchange<'a> {
    /// The files that were written for the previous action.
    last: HashMap<String, PlacedFile>,
    /// The files of the next action.
    next: HashMap<String, PlacedFile>,
    inputs: &'a dyn Inputs,
    /// The names on the path to the working directory.
    way: Vec<&'a str>,
    nothing: &'a Directory,
    is_tool_input: fn(&tree::File) -> bool,
    checkpoint: &'a Checkpoint<'a>,
}

/// A directory that is being exchanged.
struct ExchangeLevel<'a> {
    path: String,
    directory: &'a Directory,
    /// How many components of the path to the working directory lead here; `None` if this directory is not on that
    /// path.
    on_way: Option<usize>,
    /// Subdirectories that were not visited yet.
    below: Vec<(&'a str, &'a Directory)>,
}

/// The node that a name must have.
enum WantedNode<'a> {
    File(&'a tree::File),
    Link(&'a Symlink),
    Directory,
}

impl<'a> Exchange<'a> {
    fn run(&mut self, root: &File) -> std::result::Result<(), NotExchanged> {
        let inputs = self.inputs;
        let tree: &'a InputTree = inputs.tree();
        let mut cursor = inputs::cursor(root)?;
        let mut levels = vec![self.level(&cursor, String::new(), tree.root(), Some(0))?];
        while let Some(level) = levels.last_mut() {
            if let Some((name, directory)) = level.below.pop() {
                let path = join(&level.path, name);
                let on_way = level.on_way.filter(|&at| self.way.get(at) == Some(&name)).map(|at| at + 1);
                cursor.down(name.as_ref()).map_err(|error| cannot("enter", &path, &error))?;
                levels.push(self.level(&cursor, path, directory, on_way)?);
                continue;
            }
            let properties = &level.directory.properties;
            let here = cursor.here().map_err(|error| cannot("leave", &level.path, &error))?;
            // Creating entries has changed the time.
            input_attributes::set_mtime_at(here, ".", input_attributes::mtime_of(properties))
                .map_err(|error| cannot("set the time of", &level.path, &error))?;
            levels.pop();
            if !levels.is_empty() {
                cursor.up().map_err(|error| cannot("leave", "a directory", &error))?;
            }
        }
        Ok(())
    }

    /// Exchanges the entries of one directory, without the content of its subdirectories.
    fn level(
        &mut self,
        cursor: &Cursor,
        path: String,
        directory: &'a Directory,
        on_way: Option<usize>,
    ) -> std::result::Result<ExchangeLevel<'a>, NotExchanged> {
        let inputs = self.inputs;
        let tree: &'a InputTree = inputs.tree();
        let here = cursor.here().map_err(|error| cannot("enter", &path, &error))?;
        if cursor.mode().bits() & 0o7777 != EXECUTABLE {
            rfs::fchmod(here, Mode::from_raw_mode(EXECUTABLE))
                .map_err(|error| cannot("set the mode of", &path, &error.into()))?;
        }
        let mut below: Vec<_> = directory
            .directories
            .iter()
            .map(|child| (child.name.as_str(), tree.directory(&child.digest)))
            .collect();
        let next_on_way = on_way.and_then(|at| self.way.get(at).copied());
        below.extend(
            next_on_way
                .filter(|name| below.iter().all(|(child, _)| child != name))
                .map(|name| (name, self.nothing)),
        );
        let kept = self.clean(here, &path, directory, &below)?;
        self.fill(here, &path, directory, &below, &kept)?;
        Ok(ExchangeLevel { path, directory, on_way, below })
    }

    /// Removes unwanted entries from a directory. Returns the names of the entries that stay.
    fn clean(
        &mut self,
        here: &File,
        path: &str,
        directory: &'a Directory,
        below: &[(&'a str, &'a Directory)],
    ) -> std::result::Result<HashSet<String>, NotExchanged> {
        let files = directory.files.iter().map(|file| (file.name.as_str(), WantedNode::File(file)));
        let links = directory.symlinks.iter().map(|link| (link.name.as_str(), WantedNode::Link(link)));
        let directories = below.iter().map(|(name, _)| (*name, WantedNode::Directory));
        let wanted: HashMap<&str, WantedNode<'_>> = directories.chain(links).chain(files).collect();
        let mut kept = HashSet::new();
        // The names are not collected first, because a tool may have created any number of entries.
        for entry in dir::entries(here).map_err(|error| cannot("list", path, &error))? {
            self.checkpoint.check()?;
            let entry = entry.map_err(|error| cannot("list", path, &error))?;
            let name = dir::entry_name(&entry);
            let stat = match dir::stat_at(here, name) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                stat => stat.map_err(|error| cannot("look at", path, &error))?,
            };
            let stays = match name.to_str().and_then(|name| wanted.get(name)) {
                Some(WantedNode::File(file)) => self.stays(file, &join(path, &file.name), &stat),
                Some(WantedNode::Link(link)) => is_link(here, link, &stat),
                Some(WantedNode::Directory) => dir::file_type(&stat) == FileType::Directory,
                None => false,
            };
            match name.to_str() {
                Some(name) if stays => _ = kept.insert(name.to_owned()),
                _ => self.remove(here, path, name, &stat)?,
            }
        }
        Ok(kept)
    }

    fn remove(&self, here: &File, path: &str, name: &OsStr, stat: &Stat) -> Result<()> {
        let removed = match dir::file_type(stat) {
            FileType::Directory => remove_while(here, name, &|| self.checkpoint.check().is_ok()),
            _ => match rfs::unlinkat(here, name.as_bytes(), AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => Ok(()),
                Err(error) => Err(error.into()),
            },
        };
        self.checkpoint.check()?;
        removed.map_err(|error| cannot("empty", path, &error))
    }

    /// Whether a file on disk is the wanted file, unchanged.
    fn stays(&self, file: &tree::File, path: &str, stat: &Stat) -> bool {
        self.last.get(path).is_some_and(|last| {
            *last == PlacedFile { stamp: FileStamp::of(stat), ..PlacedFile::wanted(file, last.stamp) }
        })
    }

    /// Creates the missing entries of a directory.
    fn fill(
        &mut self,
        here: &File,
        path: &str,
        directory: &'a Directory,
        below: &[(&'a str, &'a Directory)],
        kept: &HashSet<String>,
    ) -> std::result::Result<(), NotExchanged> {
        for file in &directory.files {
            let at = join(path, &file.name);
            let last = self.last.remove(&at);
            let written = match last {
                Some(last) if kept.contains(&file.name) => last,
                // The digest of a tool input is part of the tool's key, so the next action has the same file. The tool
                // must have changed it.
                Some(_) if (self.is_tool_input)(file) => return Err(NotExchanged::ToolChanged(at)),
                _ => self.write(here, file)?,
            };
            self.next.insert(at, written);
        }
        for link in directory.symlinks.iter().filter(|link| !kept.contains(&link.name)) {
            inputs::write_link(link, here)?;
        }
        for (name, _) in below.iter().filter(|(name, _)| !kept.contains(*name)) {
            rfs::mkdirat(here, *name, Mode::from_raw_mode(EXECUTABLE))
                .map_err(|error| cannot("make", &join(path, name), &error.into()))?;
        }
        Ok(())
    }

    fn write(&self, here: &File, file: &tree::File) -> Result<PlacedFile> {
        self.checkpoint.check()?;
        inputs::write_file(self.inputs, file, here)?;
        let stat =
            dir::stat_at(here, file.name.as_ref()).map_err(|error| cannot("look at", &file.name, &error))?;
        Ok(PlacedFile::wanted(file, FileStamp::of(&stat)))
    }
}

impl PlacedFile {
    fn wanted(file: &tree::File, stamp: FileStamp) -> Self {
        Self {
            digest: file.digest,
            mode: input_attributes::mode_of(file),
            mtime: input_attributes::mtime_of(&file.properties),
            stamp,
        }
    }
}

impl FileStamp {
    #[allow(clippy::unnecessary_cast, clippy::useless_conversion)]
    fn of(stat: &Stat) -> Self {
        Self {
            id: dir::file_id(stat),
            size: stat.st_size as i64,
            mode: stat.st_mode,
            changed: Timespec { tv_sec: stat.st_ctime as i64, tv_nsec: stat.st_ctime_nsec as i64 },
            modified: input_attributes::mtime_in(stat),
        }
    }
}

fn is_link(here: &File, link: &Symlink, stat: &Stat) -> bool {
    dir::file_type(stat) == FileType::Symlink
        && rfs::readlinkat(here, &*link.name, Vec::new())
            .is_ok_and(|target| target.as_bytes() == link.target.as_bytes())
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}/{name}") }
}

fn cannot(doing: &str, path: &str, error: &io::Error) -> Error {
    Error::io(&format!("{doing} \"{}\" in the exec root of a tool", path.escape_debug()), error)
}
