//! Brings an input root into place, exactly as its Directories say (EXE-33 to EXE-37), and then what the command takes for
//! granted: its working directory (EXE-39) and the parents of its outputs (EXE-38).
//!
//! Nothing is followed while the tree is built, so a symbolic link in it cannot redirect a later entry. Absolute link targets
//! are created as given; the server announces that (CAP-14, EXE-36).

use super::{
    checkpoint::Checkpoint,
    dir::{self, Cursor},
    store::Inputs,
};
use crate::{
    action::Command,
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
    time::{SystemTime, UNIX_EPOCH},
};

/// Permission bits of directories, and of files that can be run.
const EXECUTABLE: u32 = 0o755;
/// Permission bits of other files.
const PLAIN: u32 = 0o644;

/// Fills the empty directory `root`.
///
/// # Errors
/// Those of the store; of the checkpoint between two files; `Invalid` when a link or file of the tree is in the way of the
/// working directory or of an output's parent, or a mode in that of the command.
pub fn place(inputs: &dyn Inputs, root: &File, command: &Command, checkpoint: &Checkpoint) -> Result<()> {
    let adorned = write_tree(inputs, root, checkpoint)?;
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
    // Last of all: a directory's own properties may take away the right to write in it, and each new entry changes its time.
    if adorned {
        adorn_directories(inputs, root, checkpoint)?;
        check_way(root, &command.working_directory)?;
    }
    Ok(())
}

/// Whether the command can get to its working directory, now that directories have the modes that were asked for.
fn check_way(root: &File, working_directory: &RootPath) -> Result<()> {
    match rfs::accessat(root, working_directory.as_path(), Access::EXEC_OK, AtFlags::empty()) {
        Err(Errno::ACCESS) => Err(Error::Invalid(format!(
            "the working directory \"{working_directory}\" cannot be entered: the unix_mode of a directory on the way \
             forbids it"
        ))),
        // Any other news comes with the start of the command.
        _ => Ok(()),
    }
}

/// Creates files, links and directories; says whether any directory has properties of its own.
fn write_tree(inputs: &dyn Inputs, root: &File, checkpoint: &Checkpoint) -> Result<bool> {
    let tree = inputs.tree();
    let mut cursor = cursor(root)?;
    fill(inputs, tree.root(), &cursor, checkpoint)?;
    let mut adorned = tree.root().properties != NodeProperties::default();
    let mut open = vec![tree.root().directories.iter()];
    while let Some(remaining) = open.last_mut() {
        let Some(child) = remaining.next() else {
            open.pop();
            if !open.is_empty() {
                cursor.up().map_err(|error| Error::io("go back up in the input root", &error))?;
            }
            continue;
        };
        let directory = tree.directory(&child.digest);
        adorned |= directory.properties != NodeProperties::default();
        make_one(&cursor, &child.name)?;
        cursor.down(child.name.as_ref()).map_err(|error| cannot("enter", &child.name, &error))?;
        if cursor.mode() != Mode::from_raw_mode(EXECUTABLE) {
            let here = cursor.here().map_err(|error| cannot("enter", &child.name, &error))?;
            rfs::fchmod(here, Mode::from_raw_mode(EXECUTABLE))
                .map_err(|error| cannot("set the mode of", &child.name, &error.into()))?;
        }
        fill(inputs, directory, &cursor, checkpoint)?;
        open.push(directory.directories.iter());
    }
    Ok(adorned)
}

/// The files and links of one directory.
fn fill(inputs: &dyn Inputs, directory: &Directory, cursor: &Cursor, checkpoint: &Checkpoint) -> Result<()> {
    let here = cursor.here().map_err(|error| Error::io("write the input root", &error))?;
    for file in &directory.files {
        checkpoint.check()?;
        let mode = file.properties.unix_mode.unwrap_or(if file.executable { EXECUTABLE } else { PLAIN });
        inputs.materialise(&file.digest, here, &file.name, mode)?;
        if let Some(mtime) = file.properties.mtime {
            set_mtime(here, &file.name, mtime)?;
        }
    }
    for link in &directory.symlinks {
        rfs::symlinkat(&*link.target, here, &*link.name)
            .map_err(|error| cannot("make the symbolic link", &link.name, &error.into()))?;
    }
    checkpoint.check()
}

fn make_one(cursor: &Cursor, name: &str) -> Result<()> {
    cursor
        .here()
        .and_then(|here| Ok(rfs::mkdirat(here, name, Mode::from_raw_mode(EXECUTABLE))?))
        .map_err(|error| cannot("make the directory", name, &error))
}

/// Sets mode and time of the directories that ask for it, each after everything in it.
fn adorn_directories(inputs: &dyn Inputs, root: &File, checkpoint: &Checkpoint) -> Result<()> {
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
        let (name, properties) = (*name, directory.properties);
        open.pop();
        if open.is_empty() {
            adorn(root, ".", properties)?;
        } else {
            cursor.up().map_err(|error| Error::io("go back up in the input root", &error))?;
            let here = cursor.here().map_err(|error| cannot("enter", name, &error))?;
            adorn(here, name, properties)?;
        }
    }
    Ok(())
}

/// `name` is a directory that this module made, not a link.
fn adorn(parent: &File, name: &str, properties: NodeProperties) -> Result<()> {
    if let Some(mode) = properties.unix_mode {
        rfs::chmodat(parent, name, Mode::from_raw_mode(mode), AtFlags::empty())
            .map_err(|error| cannot("set the mode of", name, &error.into()))?;
    }
    properties.mtime.map_or(Ok(()), |mtime| set_mtime(parent, name, mtime))
}

fn set_mtime(parent: &File, name: &str, mtime: SystemTime) -> Result<()> {
    // The tree's constructor lets no time before 1970 in.
    let since = mtime.duration_since(UNIX_EPOCH).unwrap_or_default();
    let times = Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec {
            tv_sec: since.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: since.subsec_nanos().into(),
        },
    };
    rfs::utimensat(parent, name, &times, AtFlags::SYMLINK_NOFOLLOW)
        .map_err(|error| cannot("set the time of", name, &error.into()))
}

/// Makes the directories of `path` that do not exist. Links of the input root may be part of the way as long as they stay
/// beneath it. `what` says in errors whose path it is.
fn make_directories(root: &File, path: &RootPath, what: &str) -> Result<()> {
    if dir::open_beneath(root, path.as_path()).is_ok() {
        return Ok(());
    }
    // Step by step, also to find out which component is in the way.
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

fn make_beneath(above: &File, name: &str) -> io::Result<File> {
    rfs::mkdirat(above, name, Mode::from_raw_mode(EXECUTABLE))?;
    let made = dir::open_dir(above, OsStr::new(name))?;
    // Whatever the umask of the server says.
    rfs::fchmod(&made, Mode::from_raw_mode(EXECUTABLE))?;
    Ok(made)
}

fn in_the_way(what: &str, path: &RootPath, prefix: &Path, error: &io::Error) -> Error {
    let problem = match Errno::from_io_error(error) {
        Some(Errno::NOTDIR) => "is not a directory",
        Some(Errno::XDEV) => "is a symbolic link that leaves the input root",
        Some(Errno::LOOP) => "is a symbolic link that leads nowhere",
        Some(Errno::EXIST) => "is a symbolic link to nothing",
        Some(Errno::NAMETOOLONG) => "is too long for this server's file system",
        _ => return Error::io(&format!("make {what} \"{path}\""), error),
    };
    Error::Invalid(format!("{what} \"{path}\" cannot be made: \"{}\" {problem}", prefix.display()))
}

fn cursor(root: &File) -> Result<Cursor> {
    // A second handle with a position of its own.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rfs::openat(root, ".", flags, Mode::empty())
        .map_err(io::Error::from)
        .and_then(|root| Cursor::new(root.into()))
        .map_err(|error| Error::io("open the input root", &error))
}

fn cannot(doing: &str, name: &str, error: &io::Error) -> Error {
    Error::io(&format!("{doing} \"{}\" of the input root", name.escape_debug()), error)
}
