//! Scans an output directory.
//!
//! All outputs are scanned before any is stored, because the store may move files away, and another output may be in the same
//! directory. No link is followed, and no file is opened.

use super::{Seen, name_of};
use crate::actors::worker::{
    checkpoint::Checkpoint,
    dir::{self, Cursor, FileId},
};
use gorego_reapi::{
    digest::Digest,
    error::{Error, Result},
};
use rustix::fs::{FileType, Stat};
use std::{ffi::OsStr, fs::File, io};

/// Maximum number of nodes in all outputs of one action. The same number bounds input roots.
pub(crate) const MAX_OUTPUT_NODES: u64 = gorego_reapi::tree::MAX_TREE_NODES;

/// Maximum bytes of all names and link targets in the outputs of one action, which are in memory at the same time: 128 per
/// node.
pub(crate) const MAX_OUTPUT_NAME_BYTES: u64 = 128 * MAX_OUTPUT_NODES;

/// Files take whole blocks on disk.
const BLOCK_BYTES: u64 = 4_096;

/// A file of the directory.
#[derive(Debug, Clone)]
pub(crate) struct FoundFile {
    /// Name in its directory.
    pub name: String,
    /// The identity of the file, which is the same under all of its names.
    pub id: FileId,
    pub seen: Seen,
    /// Set once it is stored.
    pub digest: Option<Digest>,
}

/// A symbolic link of the directory.
#[derive(Debug, Clone)]
pub(crate) struct FoundLink {
    /// Name in its directory.
    pub name: String,
    /// The target, unchanged.
    pub target: String,
    pub seen: Seen,
}

/// A directory of the tree.
#[derive(Debug, Clone)]
pub(crate) struct FoundDirectory {
    /// Name in its parent; empty for the top.
    pub name: String,
    pub seen: Seen,
    /// Its files, by name.
    pub files: Vec<FoundFile>,
    /// Its links, by name.
    pub links: Vec<FoundLink>,
    /// Its directories, by name: positions in [`OutputScan::directories`], each larger than its parent's.
    pub children: Vec<usize>,
}

/// A directory and everything below it; the top comes first.
#[derive(Debug, Clone)]
pub(crate) struct OutputScan {
    /// Every directory, parents before children.
    pub directories: Vec<FoundDirectory>,
}

/// Counts down the nodes from [`MAX_OUTPUT_NODES`] and their names and targets from [`MAX_OUTPUT_NAME_BYTES`], and sums up the
/// sizes of files.
#[derive(Debug)]
pub(crate) struct NodeBudget {
    nodes: u64,
    name_bytes: u64,
    bytes_on_disk: u64,
}

impl NodeBudget {
    pub(crate) fn new() -> Self {
        Self { nodes: MAX_OUTPUT_NODES, name_bytes: MAX_OUTPUT_NAME_BYTES, bytes_on_disk: 0 }
    }

    /// The approximate size on disk of all files found.
    pub(crate) fn bytes_on_disk(&self) -> u64 {
        self.bytes_on_disk
    }

    pub(super) fn count_file(&mut self, stat: &Stat) {
        let bytes = u64::try_from(stat.st_size).unwrap_or_default().next_multiple_of(BLOCK_BYTES);
        self.bytes_on_disk = self.bytes_on_disk.saturating_add(bytes);
    }

    fn take_node(&mut self, name: &str) -> Result<()> {
        self.nodes = self.nodes.checked_sub(1).ok_or_else(|| {
            Error::Precondition(format!("the outputs have more than {MAX_OUTPUT_NODES} nodes"))
        })?;
        self.take_text(name)
    }

    fn take_text(&mut self, text: &str) -> Result<()> {
        self.name_bytes = self.name_bytes.checked_sub(text.len() as u64).ok_or_else(|| {
            Error::Precondition(format!(
                "the names and link targets in the outputs have more than {MAX_OUTPUT_NAME_BYTES} bytes"
            ))
        })?;
        Ok(())
    }
}

impl OutputScan {
    /// Scans the directory `top`. `seen` is its mode and time from before it was opened; `path` names it in errors.
    ///
    /// # Errors
    /// `Precondition` for anything that is not a file, directory or link, for names that are not UTF-8, and for too many nodes.
    pub(crate) fn of(
        top: File,
        seen: Seen,
        path: &str,
        checkpoint: &Checkpoint,
        budget: &mut NodeBudget,
    ) -> Result<Self> {
        let mut scan = Self { directories: vec![FoundDirectory::new(String::new(), seen)] };
        scan.walk(top, path, |scan, at, here| scan.list(at, here, path, checkpoint, budget))?;
        Ok(scan)
    }

    /// Walks the directories again and calls `visit` for each with an open handle, parents first.
    ///
    /// # Errors
    /// Those of `visit`, and those of walking.
    pub(crate) fn revisit(
        &mut self,
        top: File,
        path: &str,
        mut visit: impl FnMut(&mut FoundDirectory, &File) -> Result<()>,
    ) -> Result<()> {
        self.walk(top, path, |scan, at, here| visit(&mut scan.directories[at], here))
    }

    /// Visits every directory by position. Children that a visit adds are visited after it.
    fn walk(
        &mut self,
        top: File,
        path: &str,
        mut visit: impl FnMut(&mut Self, usize, &File) -> Result<()>,
    ) -> Result<()> {
        let failed = |error| cannot_look(path, error);
        let mut cursor = Cursor::new(top).map_err(failed)?;
        visit(self, 0, cursor.here().map_err(failed)?)?;
        // (directory, how many of its children were entered)
        let mut open = vec![(0, 0)];
        while let Some((at, entered)) = open.last_mut() {
            if let Some(&child) = self.directories[*at].children.get(*entered) {
                *entered += 1;
                cursor.down(OsStr::new(&self.directories[child].name)).map_err(failed)?;
                visit(self, child, cursor.here().map_err(failed)?)?;
                open.push((child, 0));
            } else {
                open.pop();
                if !open.is_empty() {
                    cursor.up().map_err(failed)?;
                }
            }
        }
        Ok(())
    }

    fn list(
        &mut self,
        at: usize,
        here: &File,
        path: &str,
        checkpoint: &Checkpoint,
        budget: &mut NodeBudget,
    ) -> Result<()> {
        checkpoint.check()?;
        let failed = |error| cannot_look(path, error);
        let mut below = Vec::new();
        for entry in dir::entries(here).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = name_of(dir::entry_name(&entry), path)?;
            budget.take_node(&name)?;
            let stat = dir::stat_at(here, OsStr::new(&name)).map_err(failed)?;
            let seen = Seen::from(&stat);
            match dir::file_type(&stat) {
                FileType::RegularFile => {
                    budget.count_file(&stat);
                    let id = dir::file_id(&stat);
                    self.directories[at].files.push(FoundFile { name, id, seen, digest: None });
                }
                FileType::Symlink => {
                    let target = super::read_link(here, &name, path)?;
                    budget.take_text(&target)?;
                    self.directories[at].links.push(FoundLink { name, target, seen });
                }
                FileType::Directory => below.push(FoundDirectory::new(name, seen)),
                other => return Err(super::not_storable(&format!("{path}/{name}"), other)),
            }
        }
        below.sort_by(|a, b| a.name.cmp(&b.name));
        let directory = &mut self.directories[at];
        directory.files.sort_by(|a, b| a.name.cmp(&b.name));
        directory.links.sort_by(|a, b| a.name.cmp(&b.name));
        for child in below {
            let position = self.directories.len();
            self.directories[at].children.push(position);
            self.directories.push(child);
        }
        Ok(())
    }
}

impl FoundDirectory {
    fn new(name: String, seen: Seen) -> Self {
        Self { name, seen, files: Vec::new(), links: Vec::new(), children: Vec::new() }
    }
}

impl From<&Stat> for Seen {
    #[allow(clippy::unnecessary_cast)]
    fn from(stat: &Stat) -> Self {
        Self {
            mode: stat.st_mode as u32,
            mtime: prost_types::Timestamp { seconds: stat.st_mtime as i64, nanos: stat.st_mtime_nsec as i32 },
        }
    }
}

fn cannot_look(path: &str, error: io::Error) -> Error {
    Error::io(&format!("look at output directory \"{path}\""), &error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::actors::worker::cancel::CancelToken;
    use std::time::Duration;

    #[test]
    fn names_and_targets_of_outputs_are_bounded_together() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("name")).unwrap();
        std::os::unix::fs::symlink("target", directory.path().join("name/link")).unwrap();
        let cancel = CancelToken::new();
        let checkpoint = Checkpoint::new(&cancel, "a test", Duration::from_secs(60));
        let scan = |name_bytes| {
            let top = File::open(directory.path()).unwrap();
            let seen = Seen::from(&rustix::fs::fstat(&top).unwrap());
            OutputScan::of(
                top,
                seen,
                "d",
                &checkpoint,
                &mut NodeBudget { nodes: 2, name_bytes, bytes_on_disk: 0 },
            )
        };
        assert_eq!(scan(14).unwrap().directories.len(), 2);
        assert!(matches!(scan(13), Err(Error::Precondition(_))));
    }
}
