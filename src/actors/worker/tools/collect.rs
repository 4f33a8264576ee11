//! Copies the outputs of an action out of the exec root of a tool while the tool keeps running.
//!
//! The store may only take over files that no process can change. A tool may keep its output files open. So its outputs
//! are copied into the exec directory of the action, which no process can access, and are stored from there like the
//! outputs of any other action.

use crate::{
    action::OutputRequest,
    actors::worker::{
        checkpoint::Checkpoint,
        dir::{self, Cursor, is_absence},
        input_attributes,
    },
};
use gorego_reapi::{
    error::{Error, Result},
    path::RootPath,
    tree::{MAX_TREE_DEPTH, MAX_TREE_NODES},
};
use rustix::{
    fs::{self as rfs, FileType, Mode, OFlags, Stat},
    io::Errno,
};
use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::{self, Read as _},
    os::unix::ffi::OsStrExt as _,
};

/// Copies the nodes at the output paths from `from` to the same paths in `to`, which no other process can access. Paths
/// that do not exist are skipped.
///
/// # Errors
/// `Unimplemented` or `Precondition` if an output cannot be copied; the errors of the file system and of the
/// checkpoint.
pub(super) fn copy_outputs(
    from: &File,
    to: &File,
    outputs: &[OutputRequest],
    checkpoint: &Checkpoint<'_>,
) -> Result<()> {
    let mut copying = OutputCopy { checkpoint, nodes: 0 };
    let mut links_to_directories = Vec::new();
    for output in outputs {
        let Some((parent, name)) = output.path.parent().zip(output.path.name()) else {
            return Err(Error::internal("the exec root itself is no output of a tool"));
        };
        let failed = |error: io::Error| Error::io(&format!("copy output \"{}\"", output.requested), &error);
        let source = match dir::open_beneath(from, parent.as_path()) {
            Err(error) if is_absence(&error) => continue,
            opened => opened.map_err(failed)?,
        };
        let name = OsStr::new(name);
        let stat = match dir::stat_at(&source, name) {
            Err(error) if is_absence(&error) => continue,
            stat => stat.map_err(failed)?,
        };
        let target = make_parents(to, &parent).map_err(failed)?;
        if dir::stat_at(&target, name).is_ok() {
            // The node was copied as part of another output.
            continue;
        }
        if dir::file_type(&stat) == FileType::Symlink
            && dir::open_beneath(from, output.path.as_path()).is_ok()
        {
            links_to_directories.push(output);
        }
        copying.node((&source, &target), name, &stat)?;
    }
    // The kind of a link's target is reported too, so the target must exist in the copy as well.
    match links_to_directories.into_iter().find(|link| dir::open_beneath(to, link.path.as_path()).is_err()) {
        Some(link) => {
            Err(Error::Unimplemented(format!("output \"{}\" is a link to an input", link.requested)))
        }
        None => Ok(()),
    }
}

/// Creates the directories of a path without following a link.
fn make_parents(to: &File, path: &RootPath) -> io::Result<File> {
    let mut here = to.try_clone()?;
    for segment in path.segments() {
        match rfs::mkdirat(&here, segment, Mode::from_raw_mode(input_attributes::EXECUTABLE)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        here = dir::open_dir(&here, segment.as_ref())?;
    }
    Ok(here)
}

struct OutputCopy<'a> {
    checkpoint: &'a Checkpoint<'a>,
    nodes: u64,
}

/// A directory that is being copied.
struct CopyLevel {
    /// Names of entries that are not copied yet.
    left: Vec<OsString>,
    stat: Stat,
}

impl OutputCopy<'_> {
    /// Copies a node and everything below it.
    fn node(&mut self, (source, target): (&File, &File), name: &OsStr, stat: &Stat) -> Result<()> {
        if dir::file_type(stat) != FileType::Directory {
            return self.leaf((source, target), name, stat);
        }
        let failed = |error: io::Error| Error::io("copy an output directory of a tool", &error);
        // The cursors start at the parent directories, so that leaving the output itself is like leaving any other
        // directory.
        let (mut from, mut to) = (Cursor::at(source).map_err(failed)?, Cursor::at(target).map_err(failed)?);
        let mut levels = vec![self.enter((&mut from, &mut to), name).map_err(failed)?];
        while let Some(level) = levels.last_mut() {
            self.checkpoint.check()?;
            let Some(name) = level.left.pop() else {
                let here = to.here().map_err(failed)?;
                rfs::fchmod(here, Mode::from_raw_mode(level.stat.st_mode & 0o777))
                    .map_err(|error| failed(error.into()))?;
                input_attributes::set_mtime_at(here, ".", input_attributes::mtime_in(&level.stat))
                    .map_err(failed)?;
                levels.pop();
                from.up().and_then(|()| to.up()).map_err(failed)?;
                continue;
            };
            let source = from.here().map_err(failed)?;
            let stat = dir::stat_at(source, &name).map_err(failed)?;
            if dir::file_type(&stat) == FileType::Directory {
                if levels.len() > MAX_TREE_DEPTH {
                    return Err(too_large());
                }
                self.count_node()?;
                levels.push(self.enter((&mut from, &mut to), &name).map_err(failed)?);
            } else {
                self.leaf((source, to.here().map_err(failed)?), &name, &stat)?;
            }
        }
        Ok(())
    }

    fn enter(&mut self, (from, to): (&mut Cursor, &mut Cursor), name: &OsStr) -> io::Result<CopyLevel> {
        from.down(name)?;
        rfs::mkdirat(to.here()?, name.as_bytes(), Mode::RWXU)?;
        to.down(name)?;
        let here = from.here()?;
        let stat = rfs::fstat(here)?;
        let mut left = Vec::new();
        for entry in dir::entries(here)? {
            left.push(dir::entry_name(&entry?).to_owned());
            if left.len() as u64 > MAX_TREE_NODES {
                return Err(io::ErrorKind::FileTooLarge.into());
            }
        }
        Ok(CopyLevel { left, stat })
    }

    fn count_node(&mut self) -> Result<()> {
        self.nodes += 1;
        if self.nodes > MAX_TREE_NODES { Err(too_large()) } else { Ok(()) }
    }

    fn leaf(&mut self, (source, target): (&File, &File), name: &OsStr, stat: &Stat) -> Result<()> {
        self.checkpoint.check()?;
        self.count_node()?;
        let failed =
            |error: io::Error| Error::io(&format!("copy output \"{}\" of a tool", name.display()), &error);
        match dir::file_type(stat) {
            FileType::RegularFile => copy_file((source, target), name).map_err(failed),
            FileType::Symlink => copy_link((source, target), name, stat).map_err(failed),
            _ => Err(Error::Unimplemented(format!("output \"{}\" of a tool is no file", name.display()))),
        }
    }
}

fn copy_file((source, target): (&File, &File), name: &OsStr) -> io::Result<()> {
    let from = dir::open_file(source, name)?;
    let stat = rfs::fstat(&from)?;
    if dir::file_type(&stat) != FileType::RegularFile {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut to = File::from(rfs::openat(target, name.as_bytes(), flags, Mode::RUSR | Mode::WUSR)?);
    if rfs::ioctl_ficlone(&to, &from).is_err() {
        // A file that still grows is cut at this size. Its tool has not finished its work.
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        io::copy(&mut (&from).take(size), &mut to)?;
    }
    rfs::fchmod(&to, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
    input_attributes::set_mtime_at(target, name, input_attributes::mtime_in(&stat))
}

fn copy_link((source, target): (&File, &File), name: &OsStr, stat: &Stat) -> io::Result<()> {
    let leads_to = rfs::readlinkat(source, name.as_bytes(), Vec::new())?;
    rfs::symlinkat(leads_to, target, name.as_bytes())?;
    input_attributes::set_mtime_at(target, name, input_attributes::mtime_in(stat))
}

fn too_large() -> Error {
    Error::Precondition("the output directories of a tool are too deep or have too many files".into())
}
