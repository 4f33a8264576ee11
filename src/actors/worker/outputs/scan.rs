//! Scans an output directory.
//!
//! All outputs are scanned before any is stored, because the store may move files away, and another output may be in
//! the same directory. No link is followed, and no file is opened. Inputs that the command left unchanged are found in
//! memory.

use super::{Seen, name_of};
use crate::actors::worker::{
    checkpoint::Checkpoint,
    dir::{self, FileIdentity},
    exec_root::{Here, LayerWalk},
    input_attributes, layer,
};
use gorego_reapi::{
    digest::Digest,
    error::{Error, Result},
    tree::{self, Directory, InputTree, NodeProperties, Symlink},
};
use rustix::fs::{self as rfs, FileType, Stat};
use std::{
    collections::HashSet,
    ffi::{OsStr, OsString},
    fs::File,
    io,
    os::unix::ffi::OsStringExt as _,
};

/// Maximum number of nodes in all outputs of one action. The same number bounds input roots.
pub(crate) const MAX_OUTPUT_NODES: u64 = gorego_reapi::tree::MAX_TREE_NODES;

/// Maximum number of bytes of all names and link targets in the outputs of one action, which are in memory at the same
/// time: 128 per node.
pub(crate) const MAX_OUTPUT_NAME_BYTES: u64 = 128 * MAX_OUTPUT_NODES;

/// Permission bits of every symbolic link.
const LINK_MODE: u32 = 0o777;

/// Size of a disk block. Files take up whole blocks.
const BLOCK_BYTES: u64 = 4_096;

/// A file of the directory.
#[derive(Debug, Clone)]
pub(crate) struct FoundFile {
    /// Name in its directory.
    pub name: String,
    /// Its content, and whether that is stored.
    pub content: Content,
    /// Mode and time when it was found.
    pub seen: Seen,
}

/// The content of a file that was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    /// A file that is not stored yet, with its identity, which does not depend on the name.
    Own(FileIdentity),
    /// A file that is stored.
    Stored(Digest),
}

impl Content {
    /// Its digest, if it is stored.
    pub(crate) fn digest(self) -> Option<Digest> {
        match self {
            Self::Own(_) => None,
            Self::Stored(digest) => Some(digest),
        }
    }
}

/// A symbolic link of the directory.
#[derive(Debug, Clone)]
pub(crate) struct FoundLink {
    /// Name in its directory.
    pub name: String,
    /// The target exactly as the link has it.
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

/// Counts down the nodes from [`MAX_OUTPUT_NODES`] and their names and targets from [`MAX_OUTPUT_NAME_BYTES`], and sums
/// up the sizes of files.
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
    /// `Precondition` for anything that is not a file, directory or link, for names that are not UTF-8, and for too
    /// many nodes.
    pub(crate) fn of(
        top: LayerWalk<'_>,
        seen: Seen,
        path: &str,
        checkpoint: &Checkpoint,
        budget: &mut NodeBudget,
    ) -> Result<Self> {
        let mut scan = Self { directories: vec![FoundDirectory::new(String::new(), seen)] };
        scan.walk(top, path, |scan, at, here| scan.list(at, here, path, checkpoint, budget))?;
        Ok(scan)
    }

    /// Walks the directories again, parents first. Passes each to `visit`, with a handle of it in the action's own
    /// layer, if the layer has it.
    ///
    /// # Errors
    /// The errors of `visit`, of the checkpoint, and of walking.
    pub(crate) fn revisit(
        &mut self,
        top: LayerWalk<'_>,
        path: &str,
        checkpoint: &Checkpoint,
        mut visit: impl FnMut(&mut FoundDirectory, Option<&File>) -> Result<()>,
    ) -> Result<()> {
        self.walk(top, path, |scan, at, here| {
            checkpoint.check()?;
            visit(&mut scan.directories[at], here.own)
        })
    }

    /// The unchanged inputs among its files, which are stored already.
    pub(crate) fn inputs(&self) -> impl Iterator<Item = Digest> {
        let files = self.directories.iter().flat_map(|directory| &directory.files);
        files.filter_map(|file| file.content.digest())
    }

    /// Visits every directory by position. Children that a visit adds are visited after it.
    fn walk(
        &mut self,
        mut top: LayerWalk<'_>,
        path: &str,
        mut visit: impl FnMut(&mut Self, usize, Here<'_, '_>) -> Result<()>,
    ) -> Result<()> {
        let failed = |error| cannot_list(path, error);
        let cursor = &mut top;
        visit(self, 0, cursor.here().map_err(failed)?)?;
        // Each open directory with the number of its children that were entered.
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
        here: Here<'_, '_>,
        path: &str,
        checkpoint: &Checkpoint,
        budget: &mut NodeBudget,
    ) -> Result<()> {
        checkpoint.check()?;
        let mut found = FoundEntries::default();
        // Names that are in the own layer, or that it hides.
        let mut names = HashSet::new();
        if let Some(own) = here.own {
            let hides = here.below.is_some().then_some(&mut names);
            found.list_own(own, here.staged.is_some(), hides, path, budget)?;
        }
        if let Some(below) = here.below {
            found.list_staged(below, here.staged, &names, budget)?;
        }
        let FoundEntries { files, links, directories: mut below } = found;
        below.sort_by(|a, b| a.name.cmp(&b.name));
        self.directories[at].files = files;
        self.directories[at].links = links;
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

/// The entries of one directory, in any order.
#[derive(Debug, Default)]
struct FoundEntries {
    files: Vec<FoundFile>,
    links: Vec<FoundLink>,
    directories: Vec<FoundDirectory>,
}

impl FoundEntries {
    /// Lists the own layer. Whiteouts are skipped in a layer (`is_layer`), and are ordinary nodes elsewhere. `hides`
    /// receives all names.
    fn list_own(
        &mut self,
        own: &File,
        is_layer: bool,
        mut hides: Option<&mut HashSet<String>>,
        path: &str,
        budget: &mut NodeBudget,
    ) -> Result<()> {
        let failed = |error| cannot_list(path, error);
        for entry in dir::entries(own).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = name_of(dir::entry_name(&entry), path)?;
            let stat = dir::stat_at(own, OsStr::new(&name)).map_err(failed)?;
            if let Some(hides) = &mut hides {
                hides.insert(name.clone());
            }
            if is_layer && layer::is_whiteout(&stat) {
                continue;
            }
            budget.take_node(&name)?;
            let seen = Seen::from(&stat);
            match dir::file_type(&stat) {
                FileType::RegularFile => {
                    budget.count_file(&stat);
                    self.files.push(FoundFile { name, content: Content::Own(dir::file_id(&stat)), seen });
                }
                FileType::Symlink => {
                    let target = rfs::readlinkat(own, &*name, Vec::new())
                        .map_err(|error| super::cannot_read(&name, path, &error.into()))?;
                    let target = OsString::from_vec(target.into_bytes());
                    let target = super::checked_target(target, &name, path)?;
                    budget.take_text(&target)?;
                    self.links.push(FoundLink { name, target, seen });
                }
                FileType::Directory => self.directories.push(FoundDirectory::new(name, seen)),
                other => return Err(super::not_storable(&format!("{path}/{name}"), other)),
            }
        }
        Ok(())
    }

    /// Lists the visible part of the staged tree.
    fn list_staged(
        &mut self,
        below: &Directory,
        staged: Option<&InputTree>,
        hidden: &HashSet<String>,
        budget: &mut NodeBudget,
    ) -> Result<()> {
        for file in below.files.iter().filter(|file| !hidden.contains(&file.name)) {
            budget.take_node(&file.name)?;
            let (name, content) = (file.name.clone(), Content::Stored(file.digest));
            self.files.push(FoundFile { name, content, seen: Seen::of_file(file) });
        }
        for link in below.symlinks.iter().filter(|link| !hidden.contains(&link.name)) {
            budget.take_node(&link.name)?;
            budget.take_text(&link.target)?;
            let (name, target) = (link.name.clone(), link.target.clone());
            self.links.push(FoundLink { name, target, seen: Seen::of_link(link) });
        }
        for node in below.directories.iter().filter(|node| !hidden.contains(&node.name)) {
            budget.take_node(&node.name)?;
            let Some(directory) = staged.and_then(|tree| tree.find(&node.digest)) else { continue };
            self.directories.push(FoundDirectory::new(node.name.clone(), Seen::of_directory(directory)));
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

impl Seen {
    /// A file of a staged tree.
    pub(crate) fn of_file(file: &tree::File) -> Self {
        Self::staged(FileType::RegularFile, input_attributes::mode_of(file), &file.properties)
    }

    /// A link of a staged tree.
    pub(crate) fn of_link(link: &Symlink) -> Self {
        Self::staged(FileType::Symlink, LINK_MODE, &link.properties)
    }

    /// A directory of a staged tree.
    pub(crate) fn of_directory(directory: &Directory) -> Self {
        let mode = directory.properties.unix_mode.unwrap_or(input_attributes::EXECUTABLE);
        Self::staged(FileType::Directory, mode, &directory.properties)
    }

    fn staged(kind: FileType, mode: u32, properties: &NodeProperties) -> Self {
        let time = input_attributes::mtime_of(properties);
        let nanos = i32::try_from(time.tv_nsec).unwrap_or_default();
        let mtime = prost_types::Timestamp { seconds: time.tv_sec, nanos };
        Self { mode: kind.as_raw_mode() | mode, mtime }
    }
}

fn cannot_list(path: &str, error: io::Error) -> Error {
    Error::io(&format!("look at output directory \"{path}\""), &error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::actors::worker::{cancel::CancelToken, exec_root::ExecRoot};
    use std::time::Duration;

    #[test]
    fn a_second_walk_ends_soon_after_a_cancellation() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("d")).unwrap();
        let own = File::open(directory.path()).unwrap();
        let cancel = CancelToken::new();
        let checkpoint = Checkpoint::new(&cancel, "a test", Duration::from_secs(60));
        let top = || LayerWalk::at_top(ExecRoot::new(&own, None)).unwrap();
        let seen = Seen::from(&rustix::fs::fstat(&own).unwrap());
        let mut scan = OutputScan::of(top(), seen, "d", &checkpoint, &mut NodeBudget::new()).unwrap();
        let mut visited = 0;
        let outcome = scan.revisit(top(), "d", &checkpoint, |_, _| {
            visited += 1;
            cancel.cancel();
            Ok(())
        });
        assert!(matches!(outcome, Err(Error::Cancelled(_))));
        assert_eq!(visited, 1);
    }

    #[test]
    fn names_and_targets_of_outputs_are_bounded_together() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("name")).unwrap();
        std::os::unix::fs::symlink("target", directory.path().join("name/link")).unwrap();
        let cancel = CancelToken::new();
        let checkpoint = Checkpoint::new(&cancel, "a test", Duration::from_secs(60));
        let scan = |name_bytes| {
            let own = File::open(directory.path()).unwrap();
            let seen = Seen::from(&rustix::fs::fstat(&own).unwrap());
            let top = LayerWalk::at_top(ExecRoot::new(&own, None)).unwrap();
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
