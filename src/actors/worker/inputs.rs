//! Writes an input root exactly as its Directories describe it (EXE-33 to EXE-37). Then creates the directories that
//! the command relies on: its working directory (EXE-39) and the parents of its outputs (EXE-38).
//!
//! A node without an mtime gets [`INPUT_TIME`], so that what a command sees does not depend on when or in which order
//! it was written. Each step preserves the times of the directories that it changes.
//!
//! No link is followed while the tree is written, so a symbolic link in it cannot redirect a later entry. Absolute link
//! targets are created as given; the server announces this (CAP-14, EXE-36).

use super::{
    checkpoint::Checkpoint,
    delta::{Delta, DeltaStep},
    dir::Cursor,
    exec_root::ExecRoot,
    input_attributes::{EXECUTABLE, INPUT_TIME, mode_of, mtime_in, mtime_of, set_mtime_at},
    layer,
    store::Inputs,
};
use crate::action::Command;
use gorego_reapi::{
    error::{Error, Result},
    path::RootPath,
    tree::{self, Directory, InputTree, Symlink},
};
use rustix::{
    fs::{self as rfs, AtFlags, Mode, Timespec},
    io::Errno,
};
use std::{
    collections::HashSet,
    fs::File,
    io,
    path::{Component, Path, PathBuf},
};

/// Writes a whole input root into the empty directory `top`. All its files must be leased. If nothing will be created
/// in it afterwards (`is_complete`), the modes of its directories are set too.
///
/// # Errors
/// The errors of the store and of the checkpoint, which is checked before each file.
pub(super) fn write(
    inputs: &dyn Inputs,
    top: &File,
    is_complete: bool,
    checkpoint: &Checkpoint,
) -> Result<()> {
    let tree = inputs.tree();
    let mut cursor = cursor(top)?;
    write_below(inputs, tree.root(), &mut cursor, checkpoint)?;
    if is_complete && tree.has_directory_modes() {
        set_directory_modes(tree, top, checkpoint)?;
    }
    Ok(())
}

/// Writes a delta into the empty directory `top`, which then is an overlay layer above the base of the delta. The files
/// of the delta must be leased.
///
/// # Errors
/// As [`write()`].
pub(super) fn write_delta(
    inputs: &dyn Inputs,
    delta: &Delta<'_>,
    top: &File,
    checkpoint: &Checkpoint,
) -> Result<()> {
    let tree = inputs.tree();
    let mut cursor = cursor(top)?;
    let mut open = vec![tree.root()];
    for step in &delta.steps {
        checkpoint.check()?;
        let here = cursor.here().map_err(|error| Error::io("write the input root", &error))?;
        match step {
            DeltaStep::File(file) => write_file(inputs, file, here)?,
            DeltaStep::Link(link) => write_link(link, here)?,
            DeltaStep::Hide(name) => {
                layer::make_whiteout(here, name).map_err(|error| cannot("hide", name, &error))?;
            }
            DeltaStep::Enter(node) => {
                enter_new(&mut cursor, &node.name)?;
                open.push(tree.directory(&node.digest));
            }
            DeltaStep::Leave => {
                leave(&mut cursor, open.pop().unwrap_or(tree.root()))?;
            }
            DeltaStep::Tree { node, hides } => {
                enter_new(&mut cursor, &node.name)?;
                if *hides {
                    cursor
                        .here()
                        .and_then(layer::set_opaque)
                        .map_err(|error| cannot("write", &node.name, &error))?;
                }
                let directory = tree.directory(&node.digest);
                write_below(inputs, directory, &mut cursor, checkpoint)?;
                cursor.up().map_err(|error| Error::io("go back up in the input root", &error))?;
            }
        }
    }
    set_mtime(top, ".", mtime_of(&tree.root().properties))
}

/// The directories over which the sandbox mounts file systems of its own if the input root is the root file system.
const MOUNT_POINTS: &[&str] = &["dev", "proc", "tmp"];

/// Checks the working directory of a command whose input root is its root file system. `path` is its path, or its path
/// without links.
///
/// # Errors
/// `Invalid` if a mount of the sandbox hides it.
pub(super) fn check_not_hidden(working_directory: &RootPath, path: &Path) -> Result<()> {
    let first = path.components().find(|part| *part != Component::CurDir);
    match MOUNT_POINTS.iter().find(|name| Some(Component::Normal(name.as_ref())) == first) {
        Some(by) => Err(Error::Invalid(format!(
            "the working directory \"{working_directory}\" is below /{by}, where the sandbox mounts a file system of its own, \
             because the input root is the root file system (rootfs); use another working directory"
        ))),
        None => Ok(()),
    }
}

/// The mount points that were missing in an input root and were created in its own layer. They are not outputs of the
/// command.
#[derive(Debug)]
pub(super) struct MountPoints<'a> {
    root: &'a File,
    made: Vec<&'static str>,
}

impl<'a> MountPoints<'a> {
    /// Creates the missing mount points.
    ///
    /// # Errors
    /// `Invalid` if the input root has something other than a directory there.
    pub(super) fn make(root: ExecRoot<'a>) -> Result<Self> {
        let failed = |error: io::Error| Error::io("make mount points in the input root", &error);
        let top = root.resolve(Path::new(".")).map_err(failed)?;
        let mut made = Vec::new();
        for name in MOUNT_POINTS {
            match top.look(name.as_ref()) {
                Ok(node) if node.is_directory() => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    make_beneath(root.own(), name).map_err(failed)?;
                    made.push(*name);
                }
                Ok(_) => {
                    return Err(Error::Invalid(format!(
                        "the input root is to be the root file system, but \"{name}\" in it is not a directory"
                    )));
                }
                Err(error) => return Err(failed(error)),
            }
        }
        Ok(Self { root: root.own(), made })
    }

    /// Removes the mount points that were created.
    pub(super) fn remove(self) {
        for name in self.made {
            // The removal fails if the command has put something into the directory or replaced it; it then stays.
            let _ = rfs::unlinkat(self.root, name, AtFlags::REMOVEDIR);
        }
    }
}

/// Creates the directories that the command relies on in an exec root whose files are in place. `is_root` means that
/// permissions do not restrict the command.
///
/// # Errors
/// `Invalid` if a link or file of the tree is in the way of the working directory or of an output's parent, or if a
/// mode forbids the command to enter its working directory; the errors of the checkpoint.
pub(super) fn prepare(
    tree: &InputTree,
    root: ExecRoot<'_>,
    command: &Command,
    is_root: bool,
    checkpoint: &Checkpoint,
) -> Result<()> {
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
    // This comes last, because a directory's mode may forbid writing into it.
    if tree.has_directory_modes() {
        set_directory_modes(tree, root.own(), checkpoint)?;
        if !is_root {
            check_working_directory(root, &command.working_directory)?;
        }
    }
    Ok(())
}

/// Checks that the command can enter its working directory, now that the requested modes are set.
fn check_working_directory(root: ExecRoot<'_>, working_directory: &RootPath) -> Result<()> {
    match root.can_enter(working_directory.as_path()) {
        Ok(false) => Err(Error::Invalid(format!(
            "the working directory \"{working_directory}\" cannot be entered: the unix_mode of a directory on the way \
             forbids it"
        ))),
        // Other problems are reported when the command is started.
        _ => Ok(()),
    }
}

/// Creates the files, links and directories of `top` in the current directory of the cursor, and returns the cursor to
/// it.
fn write_below(
    inputs: &dyn Inputs,
    top: &Directory,
    cursor: &mut Cursor,
    checkpoint: &Checkpoint,
) -> Result<()> {
    let tree = inputs.tree();
    fill(inputs, top, cursor, checkpoint)?;
    let mut open = vec![(top, top.directories.iter())];
    while let Some((directory, remaining)) = open.last_mut() {
        if let Some(child) = remaining.next() {
            let directory = tree.directory(&child.digest);
            enter_new(cursor, &child.name)?;
            fill(inputs, directory, cursor, checkpoint)?;
            open.push((directory, directory.directories.iter()));
            continue;
        }
        let directory = *directory;
        open.pop();
        if open.is_empty() {
            // Creating entries has changed the time.
            let here = cursor.here().map_err(|error| Error::io("write the input root", &error))?;
            set_mtime(here, ".", mtime_of(&directory.properties))?;
        } else {
            leave(cursor, directory)?;
        }
    }
    Ok(())
}

/// Creates a directory and enters it.
fn enter_new(cursor: &mut Cursor, name: &str) -> Result<()> {
    cursor
        .here()
        .and_then(|here| Ok(rfs::mkdirat(here, name, Mode::from_raw_mode(EXECUTABLE))?))
        .map_err(|error| cannot("make the directory", name, &error))?;
    cursor.down(name.as_ref()).map_err(|error| cannot("enter", name, &error))?;
    if cursor.mode() != Mode::from_raw_mode(EXECUTABLE) {
        let here = cursor.here().map_err(|error| cannot("enter", name, &error))?;
        rfs::fchmod(here, Mode::from_raw_mode(EXECUTABLE))
            .map_err(|error| cannot("set the mode of", name, &error.into()))?;
    }
    Ok(())
}

/// Sets the time of a finished directory and returns to its parent.
fn leave(cursor: &mut Cursor, directory: &Directory) -> Result<()> {
    // Creating entries has changed the time.
    let here = cursor.here().map_err(|error| Error::io("write the input root", &error))?;
    set_mtime(here, ".", mtime_of(&directory.properties))?;
    cursor.up().map_err(|error| Error::io("go back up in the input root", &error))
}

/// Creates the files and links of one directory.
fn fill(inputs: &dyn Inputs, directory: &Directory, cursor: &Cursor, checkpoint: &Checkpoint) -> Result<()> {
    let here = cursor.here().map_err(|error| Error::io("write the input root", &error))?;
    for file in &directory.files {
        checkpoint.check()?;
        write_file(inputs, file, here)?;
    }
    for link in &directory.symlinks {
        write_link(link, here)?;
    }
    checkpoint.check()
}

pub(super) fn write_file(inputs: &dyn Inputs, file: &tree::File, here: &File) -> Result<()> {
    inputs.materialise(&file.digest, here, &file.name, mode_of(file))?;
    set_mtime(here, &file.name, mtime_of(&file.properties))
}

pub(super) fn write_link(link: &Symlink, here: &File) -> Result<()> {
    rfs::symlinkat(&*link.target, here, &*link.name)
        .map_err(|error| cannot("make the symbolic link", &link.name, &error.into()))?;
    set_mtime(here, &link.name, mtime_of(&link.properties))
}

/// Sets the modes of the directories for which one is requested, each after those below it. Directories that a layer
/// does not have are skipped.
fn set_directory_modes(tree: &InputTree, root: &File, checkpoint: &Checkpoint) -> Result<()> {
    let mut cursor = cursor(root)?;
    let mut open = vec![("", tree.root(), tree.root().directories.iter())];
    while let Some((name, directory, remaining)) = open.last_mut() {
        if let Some(child) = remaining.next() {
            checkpoint.check()?;
            match cursor.down(child.name.as_ref()) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                entered => entered.map_err(|error| cannot("enter", &child.name, &error))?,
            }
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

/// Sets the mtime of `name` itself, even if it is a link. "." means `parent`.
fn set_mtime(parent: &File, name: &str, mtime: Timespec) -> Result<()> {
    set_mtime_at(parent, name, mtime).map_err(|error| cannot("set the time of", name, &error))
}

/// Creates the directories of `path` that do not exist. The path may use links of the input root as long as they stay
/// beneath the root. `what` describes the path in errors.
fn make_directories(root: ExecRoot<'_>, path: &RootPath, what: &str) -> Result<()> {
    if root.resolve(path.as_path()).is_ok() {
        return Ok(());
    }
    // One component at a time, also to find out which one is in the way.
    let failed = |error: io::Error| Error::io("make directories", &error);
    let mut above = root.resolve(Path::new(".")).map_err(failed)?;
    let mut prefix = PathBuf::new();
    for segment in path.segments() {
        prefix.push(segment);
        above = match root.resolve(&prefix) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => above
                .must_lack(segment.as_ref())
                .and_then(|()| above.make_own(root))
                .and_then(|own| make_beneath(&own, segment))
                .and_then(|()| root.resolve(&prefix))
                .map_err(|error| blocked(what, path, &prefix, &error))?,
            found => found.map_err(|error| blocked(what, path, &prefix, &error))?,
        };
    }
    Ok(())
}

/// Creates one directory and preserves the time of its parent.
fn make_beneath(above: &File, name: &str) -> io::Result<()> {
    let before = rfs::fstat(above)?;
    let made = match layer::make_directory(above, name) {
        // A whiteout counts as a missing entry.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => layer::make_opaque(above, name)?,
        made => made?,
    };
    set_mtime_at(&made, ".", INPUT_TIME)?;
    set_mtime_at(above, ".", mtime_in(&before))
}

fn blocked(what: &str, path: &RootPath, prefix: &Path, error: &io::Error) -> Error {
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

pub(super) fn cursor(root: &File) -> Result<Cursor> {
    Cursor::at(root).map_err(|error| Error::io("open the input root", &error))
}

fn cannot(doing: &str, name: &str, error: &io::Error) -> Error {
    Error::io(&format!("{doing} \"{}\" of the input root", name.escape_debug()), error)
}
