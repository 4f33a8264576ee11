//! Staged trees: whole input roots on disk, made once and never changed, which actions see beneath a layer of their own.
//!
//! ```text
//! <build_root>/t-<number>/root/    an input root, exactly as its Directories say
//! ```
//!
//! An action whose root is staged needs no copy of its inputs. One whose root differs little from a staged one needs the
//! difference only, a [`Delta`] at the bottom of its own layer. So trees are made for roots that have no base to stand on, and
//! for those that come again with a large delta.
//!
//! Invariants: the trees never take more than their budget; a tree that is leased is neither changed nor removed; what is not
//! in the [`TreeIndex`] is used by nobody. A tree is trusted only by the process that made it: the index is kept in memory, and
//! the next start removes what it finds.

pub mod delta;
pub mod index;
#[cfg(test)]
pub mod model;
#[cfg(test)]
mod tests;

use super::{
    checkpoint::Checkpoint,
    inputs,
    store::Inputs,
    workspace::{BuildRoot, RootDirectory},
};
use crate::instance::InstanceId;
use delta::{Cost, Delta};
use gorego_reapi::{
    digest::Digest,
    error::{Error, Result},
    tree::InputTree,
};
use index::{BuildPermit, StagedSize, TreeIndex};
use std::{
    collections::VecDeque,
    ffi::OsString,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// Most files, directories and links of all staged trees together: what they need in memory (about 150 bytes each) and of a
/// disk's inodes.
pub const MAX_STAGED_NODES: u64 = 1_000_000;
/// A root with fewer bytes, and with fewer nodes than [`StagingLimits::min_nodes`], is copied: that takes no longer than a mount.
const MIN_BYTES: u64 = 256 * 1024;
/// How many staged trees are looked at to find a base: those that were used last.
const BASES: usize = 32;
/// With how many of them the root is compared, those that have most in common with it.
const COMPARED_BASES: usize = 3;
/// How many of a root's directories are looked up in each to find out.
const PROBES: usize = 64;
/// A delta that weighs no more than this is written again for each action.
const SMALL_DELTA: u64 = 64;
/// Copying so many bytes takes as long as making one small file.
const BYTES_PER_ENTRY: u64 = 32 * 1024;
/// How many roots that did not become trees are remembered.
const PASSED_ROOTS: usize = 4_096;
/// How often an action that waits for a tree that another one builds looks whether it is to go on.
const BUILD_POLL: Duration = Duration::from_millis(50);
/// What a file or directory takes on disk at most, besides its content.
const NODE_BYTES: u64 = 4_096;

/// What is staged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StagingLimits {
    /// Most bytes of all staged trees together.
    pub max_bytes: u64,
    /// A small root with fewer nodes is copied.
    pub min_nodes: u64,
}

impl Default for StagingLimits {
    fn default() -> Self {
        Self { max_bytes: 5_000_000_000, min_nodes: 12 }
    }
}

/// Whose blobs a tree was made from, and its root.
type Key = (InstanceId, Digest);

/// The staged trees of one directory.
#[derive(Debug)]
pub struct StagedTrees {
    index: Mutex<TreeIndex<Key, Arc<Tree>>>,
    min_nodes: u64,
    /// A tree was built, or could not be.
    built: Condvar,
}

/// One tree.
#[derive(Debug)]
struct Tree {
    name: OsString,
    tree: Arc<InputTree>,
}

/// A tree that stays for as long as this is held.
#[derive(Debug)]
pub struct TreeLease {
    place: Arc<RootDirectory>,
    key: Key,
    tree: Arc<Tree>,
}

impl TreeLease {
    /// What is in it.
    pub fn tree(&self) -> &InputTree {
        &self.tree.tree
    }

    /// Where it is in the build root.
    pub fn path(&self) -> PathBuf {
        Path::new(&self.tree.name).join("root")
    }
}

impl Drop for TreeLease {
    fn drop(&mut self) {
        self.place.trees.lock().release(self.key);
    }
}

/// A base for an input root, and what the root has besides.
#[derive(Debug)]
pub struct Base<'a> {
    /// The base.
    pub lease: TreeLease,
    /// What makes it look like the root; empty if it is the root.
    pub delta: Delta<'a>,
}

impl StagedTrees {
    /// None yet.
    pub fn new(limits: StagingLimits) -> Self {
        let budget = StagedSize { bytes: limits.max_bytes, nodes: MAX_STAGED_NODES };
        let index = Mutex::new(TreeIndex::new(budget, PASSED_ROOTS));
        Self { index, min_nodes: limits.min_nodes, built: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, TreeIndex<Key, Arc<Tree>>> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BuildRoot {
    /// Finds a base for an input root among the trees of `place`, or makes a tree of it. `None` when it is better copied.
    ///
    /// # Errors
    /// Those of the checkpoint, of the store and of the file system.
    pub(super) fn stage<'a>(
        &self,
        place: &Arc<RootDirectory>,
        inputs: &'a dyn Inputs,
        instance: InstanceId,
        checkpoint: &Checkpoint,
    ) -> Result<Option<Base<'a>>> {
        let wanted = inputs.tree();
        if wanted.nodes() < place.trees.min_nodes && wanted.bytes() < MIN_BYTES {
            return Ok(None);
        }
        let key = (instance, wanted.digest());
        loop {
            if let Some(tree) = wait_for(place, key, checkpoint)? {
                let lease = TreeLease { place: place.clone(), key, tree };
                return Ok(Some(Base { lease, delta: Delta::default() }));
            }
            if let Some(base) = similar(place, wanted, key) {
                return Ok(Some(base));
            }
            let size = StagedSize {
                bytes: wanted.nodes().saturating_mul(NODE_BYTES).saturating_add(wanted.bytes()),
                nodes: wanted.nodes().saturating_add(1),
            };
            let begun = place.trees.lock().begin(key, size);
            match begun {
                BuildPermit::NoRoom => return Ok(None),
                BuildPermit::Exists => {}
                BuildPermit::Build(evicted) => {
                    self.remove_trees(place, evicted);
                    let lease = self.build(place, key, inputs, checkpoint)?;
                    return Ok(Some(Base { lease, delta: Delta::default() }));
                }
            }
        }
    }

    /// Removes the trees that no action uses, for a disk that is full.
    pub(super) fn remove_unused_trees(&self, place: &Arc<RootDirectory>) {
        let unused = place.trees.lock().take_unused();
        self.remove_trees(place, unused);
    }

    fn remove_trees(&self, place: &Arc<RootDirectory>, trees: Vec<Arc<Tree>>) {
        for tree in trees {
            self.remove_later(place, tree.name.clone());
        }
    }

    fn build(
        &self,
        place: &Arc<RootDirectory>,
        key: Key,
        inputs: &dyn Inputs,
        checkpoint: &Checkpoint,
    ) -> Result<TreeLease> {
        let building = Building { place, key };
        let doing = |error: std::io::Error| Error::io("stage an input root", &error);
        let (name, root) = self.create_tree(place).map_err(doing)?;
        if let Err(error) = inputs::write(inputs, &root, true, checkpoint) {
            self.remove_later(place, name);
            return Err(error);
        }
        let tree = Arc::new(Tree { name, tree: inputs.tree().clone() });
        Ok(building.finish(tree))
    }
}

/// The right and the duty to build a tree.
struct Building<'a> {
    place: &'a Arc<RootDirectory>,
    key: Key,
}

impl Building<'_> {
    fn finish(self, tree: Arc<Tree>) -> TreeLease {
        self.place.trees.lock().finish(self.key, tree.clone());
        TreeLease { place: self.place.clone(), key: self.key, tree }
    }
}

impl Drop for Building<'_> {
    fn drop(&mut self) {
        // Changes nothing for a tree that is finished.
        self.place.trees.lock().abandon(self.key);
        self.place.trees.built.notify_all();
    }
}

/// Leases the tree of this root, after somebody else has built it if that is going on. `None` when there is none.
fn wait_for(place: &Arc<RootDirectory>, key: Key, checkpoint: &Checkpoint) -> Result<Option<Arc<Tree>>> {
    let mut index = place.trees.lock();
    loop {
        if let Some(tree) = index.lease(key) {
            return Ok(Some(tree));
        }
        if !index.is_building(key) {
            return Ok(None);
        }
        let waited = place.trees.built.wait_timeout(index, BUILD_POLL);
        (index, _) = waited.unwrap_or_else(PoisonError::into_inner);
        checkpoint.check()?;
    }
}

/// The best base among the trees that were used last; `None` when the root had better be a tree of its own.
fn similar<'a>(place: &Arc<RootDirectory>, wanted: &'a InputTree, key: Key) -> Option<Base<'a>> {
    let latest: Vec<_> = {
        let index = place.trees.lock();
        let of_instance = index.latest(BASES).filter(|((instance, _), _)| *instance == key.0);
        of_instance.map(|(key, tree)| (key, tree.clone())).collect()
    };
    let probes = probes(wanted);
    let mut scored: Vec<_> = latest
        .into_iter()
        .map(|(key, tree)| {
            let common = probes.iter().filter(|digest| tree.tree.find(digest).is_some()).count();
            (common, key, tree)
        })
        .collect();
    // Of equals the latest stays first.
    scored.sort_by_key(|(common, ..)| std::cmp::Reverse(*common));
    // More than half would be as well a tree of its own.
    let limit = Cost { entries: wanted.nodes() / 2, bytes: u64::MAX };
    let compared = scored.iter().take(COMPARED_BASES).filter_map(|(_, key, tree)| {
        let delta = Delta::between(wanted, &tree.tree, limit)?;
        Some((weight(delta.cost), *key, delta))
    });
    let (weight, base, delta) = compared.min_by_key(|(weight, ..)| *weight)?;
    let mut index = place.trees.lock();
    if weight > SMALL_DELTA && index.pass(key) {
        return None;
    }
    // It may have been evicted since.
    let tree = index.lease(base)?;
    drop(index);
    Some(Base { lease: TreeLease { place: place.clone(), key: base, tree }, delta })
}

/// How long a delta takes to write, in small files.
fn weight(cost: Cost) -> u64 {
    cost.entries.saturating_add(cost.bytes / BYTES_PER_ENTRY)
}

/// The digests of the uppermost directories below the root.
fn probes(wanted: &InputTree) -> Vec<Digest> {
    let mut probes = Vec::new();
    let mut level = VecDeque::from([wanted.root()]);
    while let Some(directory) = level.pop_front() {
        for child in &directory.directories {
            if probes.len() == PROBES {
                return probes;
            }
            probes.push(child.digest);
            level.push_back(wanted.directory(&child.digest));
        }
    }
    probes
}
