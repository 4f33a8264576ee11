//! Writes an input root exactly as its Directories describe it (EXE-33 to EXE-37). Then creates the directories that the
//! command relies on: its working directory (EXE-39) and the parents of its outputs (EXE-38).
//!
//! A node without an mtime gets [`INPUT_TIME`], so that what a command sees does not depend on when or in which order it was
//! written. Each step preserves the times of the directories that it changes.
//!
//! No link is followed while the tree is written, so a symbolic link in it cannot redirect a later entry. Absolute link targets
//! are created as given; the server announces this (CAP-14, EXE-36).

use super::{
    checkpoint::Checkpoint,
    dir::{self, Cursor},
    store::Inputs,
};
use crate::action::Command;
use gorego_reapi::{
    error::{Error, Result},
    path::RootPath,
    tree::{Directory, NodeProperties},
};
use rustix::{
    fs::{self as rfs, Access, AtFlags, Mode, OFlags, Timespec, Timestamps, UTIME_OMIT},
    io::Errno,
};
use std::{
    collections::HashSet,
    ffi::OsStr,
    fs::File,
    io,
    path::{Path, PathBuf},
    time::{Duration, UNIX_EPOCH},
};

/// Permission bits of directories and executable files.
const EXECUTABLE: u32 = 0o755;
/// Permission bits of other files.
const PLAIN: u32 = 0o644;

/// The mtime of every input, and of every directory that this module creates, unless its node properties name another:
/// 2000-01-01T00:00:00Z. With equal times no file looks newer than its source (make, ninja). The time is after 1980 in every
/// time zone, as zip requires, and its seconds fit into 32 bits, as Python byte code requires.
pub(super) const INPUT_TIME: Timespec = Timespec { tv_sec: 946_684_800, tv_nsec: 0 };

/// Fills the empty directory `root`.
///
/// # Errors
/// Those of the store; those of the checkpoint, which is checked between files; `Invalid` when a link or file of the tree
/// obstructs the working directory or the parent of an output, or when a mode keeps the command from its working directory.
pub(super) fn place(
    inputs: &dyn Inputs,
    root: &File,
    command: &Command,
    checkpoint: &Checkpoint,
) -> Result<()> {
    let has_modes = write_tree(inputs, root, checkpoint)?;
    make_directories(root, &command.working_directory, "the working directory")?;
    let mut made = HashSet::new();
    for output in &command.outputs {
        checkpoint.check()?;
        if let Some(parent) = output.path.parent()
            && made.insert(parent.clone())
        {
            make_directories(root, &parent, &format!("the parent of output \"{}\"", output.requested))?;
        }
    }
    // This comes last, because the mode of a directory may forbid writing in it.
    if has_modes {
        set_directory_modes(inputs, root, checkpoint)?;
        check_way(root, &command.working_directory)?;
    }
    Ok(())
}

/// Checks that the command can enter its working directory, now that directories have their requested modes.
fn check_way(root: &File, working_directory: &RootPath) -> Result<()> {
    match rfs::accessat(root, working_directory.as_path(), Access::EXEC_OK, AtFlags::empty()) {
        Err(Errno::ACCESS) => Err(Error::Invalid(format!(
            "the working directory \"{working_directory}\" cannot be entered: the unix_mode of a directory in its path \
             forbids it"
        ))),
        // Other problems show when the command is started.
        _ => Ok(()),
    }
}

/// Creates files, links and directories. Returns whether any directory has a requested mode.
fn write_tree(inputs: &dyn Inputs, root: &File, checkpoint: &Checkpoint) -> Result<bool> {
    let tree = inputs.tree();
    let mut cursor = cursor(root)?;
    fill(inputs, tree.root(), &cursor, checkpoint)?;
    let mut has_modes = tree.root().properties.unix_mode.is_some();
    let mut open = vec![(tree.root(), tree.root().directories.iter())];
    while let Some((directory, remaining)) = open.last_mut() {
        let Some(child) = remaining.next() else {
            // Each new entry has changed the time.
            let here = cursor.here().map_err(|error| Error::io("write the input root", &error))?;
            set_mtime(here, ".", mtime_of(&directory.properties))?;
            open.pop();
            if !open.is_empty() {
                cursor.up().map_err(|error| Error::io("go back up in the input root", &error))?;
            }
            continue;
        };
        let directory = tree.directory(&child.digest);
        has_modes |= directory.properties.unix_mode.is_some();
        make_one(&cursor, &child.name)?;
        cursor.down(child.name.as_ref()).map_err(|error| cannot("enter", &child.name, &error))?;
        if cursor.mode() != Mode::from_raw_mode(EXECUTABLE) {
            let here = cursor.here().map_err(|error| cannot("enter", &child.name, &error))?;
            rfs::fchmod(here, Mode::from_raw_mode(EXECUTABLE))
                .map_err(|error| cannot("set the mode of", &child.name, &error.into()))?;
        }
        fill(inputs, directory, &cursor, checkpoint)?;
        open.push((directory, directory.directories.iter()));
    }
    Ok(has_modes)
}

/// Creates the files and links of one directory.
fn fill(inputs: &dyn Inputs, directory: &Directory, cursor: &Cursor, checkpoint: &Checkpoint) -> Result<()> {
    let here = cursor.here().map_err(|error| Error::io("write the input root", &error))?;
    for file in &directory.files {
        checkpoint.check()?;
        let mode = file.properties.unix_mode.unwrap_or(if file.executable { EXECUTABLE } else { PLAIN });
        inputs.materialise(&file.digest, here, &file.name, mode)?;
        set_mtime(here, &file.name, mtime_of(&file.properties))?;
    }
    for link in &directory.symlinks {
        rfs::symlinkat(&*link.target, here, &*link.name)
            .map_err(|error| cannot("make the symbolic link", &link.name, &error.into()))?;
        set_mtime(here, &link.name, mtime_of(&link.properties))?;
    }
    checkpoint.check()
}

fn make_one(cursor: &Cursor, name: &str) -> Result<()> {
    cursor
        .here()
        .and_then(|here| Ok(rfs::mkdirat(here, name, Mode::from_raw_mode(EXECUTABLE))?))
        .map_err(|error| cannot("make the directory", name, &error))
}

/// Sets the requested modes of directories, each after everything in it.
fn set_directory_modes(inputs: &dyn Inputs, root: &File, checkpoint: &Checkpoint) -> Result<()> {
    let tree = inputs.tree();
    let mut cursor = cursor(root)?;
    let mut open = vec![("", tree.root(), tree.root().directories.iter())];
    while let Some((name, directory, remaining)) = open.last_mut() {
        if let Some(child) = remaining.next() {
            checkpoint.check()?;
            cursor.down(child.name.as_ref()).map_err(|error| cannot("enter", &child.name, &error))?;
            let directory = tree.directory(&child.digest);
            open.push((&child.name, directory, directory.directories.iter()));
            continue;
        }
        let (name, mode) = (*name, directory.properties.unix_mode);
        open.pop();
        if open.is_empty() {
            set_mode(root, ".", mode)?;
        } else {
            cursor.up().map_err(|error| Error::io("go back up in the input root", &error))?;
            let here = cursor.here().map_err(|error| cannot("enter", name, &error))?;
            set_mode(here, name, mode)?;
        }
    }
    Ok(())
}

/// Sets the mode of a directory that this module created, so `name` is not a link.
fn set_mode(parent: &File, name: &str, mode: Option<u32>) -> Result<()> {
    let Some(mode) = mode else { return Ok(()) };
    rfs::chmodat(parent, name, Mode::from_raw_mode(mode), AtFlags::empty())
        .map_err(|error| cannot("set the mode of", name, &error.into()))
}

/// The mtime of a node.
fn mtime_of(properties: &NodeProperties) -> Timespec {
    let Some(mtime) = properties.mtime else { return INPUT_TIME };
    // The seconds of a SystemTime are an i64, so neither conversion fails.
    let seconds = |since: Duration| i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
    match mtime.duration_since(UNIX_EPOCH) {
        Ok(since) => Timespec { tv_sec: seconds(since), tv_nsec: since.subsec_nanos().into() },
        // Nanoseconds always count forward.
        Err(before) => match (seconds(before.duration()), before.duration().subsec_nanos()) {
            (seconds, 0) => Timespec { tv_sec: -seconds, tv_nsec: 0 },
            (seconds, nanos) => Timespec { tv_sec: -seconds - 1, tv_nsec: i64::from(1_000_000_000 - nanos) },
        },
    }
}

/// Sets the mtime of `name` itself, which may be a link. "." means `parent`.
fn set_mtime(parent: &File, name: &str, mtime: Timespec) -> Result<()> {
    set_mtime_at(parent, name, mtime).map_err(|error| cannot("set the time of", name, &error))
}

fn set_mtime_at(parent: &File, name: &str, mtime: Timespec) -> io::Result<()> {
    let times =
        Timestamps { last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT }, last_modification: mtime };
    Ok(rfs::utimensat(parent, name, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

/// Creates the missing directories of `path`, which may go through links of the input root as long as they stay beneath it.
/// `what` describes the path in errors.
fn make_directories(root: &File, path: &RootPath, what: &str) -> Result<()> {
    if dir::open_beneath(root, path.as_path()).is_ok() {
        return Ok(());
    }
    // One step at a time, to find out which component is in the way.
    let mut above = root.try_clone().map_err(|error| Error::io("make directories", &error))?;
    let mut prefix = PathBuf::new();
    for segment in path.segments() {
        prefix.push(segment);
        above = match dir::open_beneath(root, &prefix) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                make_beneath(&above, segment).map_err(|error| in_the_way(what, path, &prefix, &error))?
            }
            Err(error) => return Err(in_the_way(what, path, &prefix, &error)),
        };
    }
    Ok(())
}

/// Creates one directory and preserves the time of its parent.
#[allow(clippy::unnecessary_cast, clippy::useless_conversion)]
fn make_beneath(above: &File, name: &str) -> io::Result<File> {
    let before = rfs::fstat(above)?;
    rfs::mkdirat(above, name, Mode::from_raw_mode(EXECUTABLE))?;
    let made = dir::open_dir(above, OsStr::new(name))?;
    // Regardless of the umask of the server.
    rfs::fchmod(&made, Mode::from_raw_mode(EXECUTABLE))?;
    set_mtime_at(&made, ".", INPUT_TIME)?;
    let mtime = Timespec { tv_sec: before.st_mtime as i64, tv_nsec: before.st_mtime_nsec as i64 };
    set_mtime_at(above, ".", mtime)?;
    Ok(made)
}

fn in_the_way(what: &str, path: &RootPath, prefix: &Path, error: &io::Error) -> Error {
    let problem = match Errno::from_io_error(error) {
        Some(Errno::NOTDIR) => "is not a directory",
        Some(Errno::XDEV) => "is a symbolic link that leaves the input root",
        Some(Errno::LOOP) => "is a loop of symbolic links",
        Some(Errno::EXIST) => "is a dangling symbolic link",
        Some(Errno::NAMETOOLONG) => "is too long for this server's file system",
        _ => return Error::io(&format!("make {what} \"{path}\""), error),
    };
    Error::Invalid(format!("{what} \"{path}\" cannot be made: \"{}\" {problem}", prefix.display()))
}

fn cursor(root: &File) -> Result<Cursor> {
    // A second handle, with its own file position.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rfs::openat(root, ".", flags, Mode::empty())
        .map_err(io::Error::from)
        .and_then(|root| Cursor::new(root.into()))
        .map_err(|error| Error::io("open the input root", &error))
}

fn cannot(doing: &str, name: &str, error: &io::Error) -> Error {
    Error::io(&format!("{doing} \"{}\" of the input root", name.escape_debug()), error)
}
