//! Staged trees: complete input roots on disk. Each is made once and never changed. Actions see it below a layer of
//! their own.
//!
//! ```text
//! <build_root>/t-<number>/root/    an input root, exactly as its Directories describe it
//! ```
//!
//! If the input root of an action is staged, the action needs no copy of its inputs. If it differs little from a staged
//! tree, only the difference is written: a [`Delta`] into the action's own layer. A new tree is built for a root
//! without a usable base, for a root that is requested again although its delta is large, and occasionally for one of
//! many roots with large deltas.
//!
//! Invariants: the trees never exceed their budget on disk and in memory. A leased tree is neither changed nor removed.
//! A tree that is not in the [`TreeIndex`] is not used. Only the process that built a tree trusts it: the index is kept
//! in memory, and the next start removes the trees that it finds. A tree whose top directory was removed, replaced or
//! changed by another process is never leased again, and a run that used it fails as this server's fault. Changes
//! further down are noticed by the [scrub].

mod ahead;
pub mod index;
mod scrub;
#[cfg(test)]
mod tests;

use super::{BuildRoot, RootDirectory};
use crate::{
    actors::worker::{
        checkpoint::Checkpoint,
        delta::{Cost, Delta},
        dir::{self, FileIdentity},
        inputs,
        store::Inputs,
    },
    disk::{BudgetUse, Space},
    instance::InstanceId,
};
use gorego_reapi::{
    digest::Digest,
    error::{Error, Result},
    tree::InputTree,
};
use index::{BuildPermit, StagedSize, TreeId, TreeIndex};
use rustix::fs::{self as rfs, AtFlags, Stat};
pub(crate) use scrub::TreeScrub;
use std::{
    collections::VecDeque,
    ffi::OsString,
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

/// Maximum number of files, directories and links in all staged trees together, because a disk has a limited number of
/// inodes.
pub const MAX_STAGED_NODES: u64 = 1_000_000;
/// A root with fewer bytes, and with fewer nodes than [`StagingLimits::min_nodes`], is copied, which takes no longer
/// than a mount.
const MIN_BYTES: u64 = 256 * 1024;
/// How many staged trees are considered as a base; the most recently used ones are chosen.
const BASES: usize = 32;
/// How many of these are compared with the root; those that share the most directories with it are chosen.
const COMPARED_BASES: usize = 3;
/// How many of a root's directories are looked up in each tree to estimate how much they share.
const PROBES: usize = 64;
/// A delta with at most this weight is written anew for each action.
const SMALL_DELTA: u64 = 64;
/// Copying this many bytes takes as long as creating one small file.
const BYTES_PER_ENTRY: u64 = 32 * 1024;
/// How many roots are remembered that were staged without becoming trees.
const MAX_SEEN_ROOTS: usize = 4_096;
/// How often an action checks whether it must stop while it waits for a tree that another action builds.
const BUILD_POLL: Duration = Duration::from_millis(50);
/// Maximum size of a file or directory on disk in addition to its content.
const NODE_BYTES: u64 = 4_096;
/// How long inputs are copied after the mount of an overlay failed although the probe at the start succeeded.
const COPY_AFTER_FAILURE: Duration = Duration::from_secs(60);

/// The limits of the staged trees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StagingLimits {
    /// Maximum number of bytes of all staged trees together.
    pub max_bytes: u64,
    /// Maximum memory in bytes for the Directories of all trees. A file takes about 150 bytes, and more if its name is
    /// long.
    pub max_memory: u64,
    /// Number of nodes below which a root with few bytes is copied.
    pub min_nodes: u64,
}

impl Default for StagingLimits {
    fn default() -> Self {
        Self { max_bytes: 5_000_000_000, max_memory: 256 * 1024 * 1024, min_nodes: 12 }
    }
}

/// The instance whose blobs a tree was made from, and the digest of its root.
type TreeKey = (InstanceId, Digest);

/// The staged trees of one directory.
#[derive(Debug)]
pub struct StagedTrees {
    index: Mutex<TreeIndex<TreeKey, Arc<Tree>>>,
    min_nodes: u64,
    /// Notified when a tree was built or could not be built.
    built: Condvar,
    copy_until: Mutex<Option<Instant>>,
}

/// A staged tree on disk, and its Directories in memory.
#[derive(Debug)]
struct Tree {
    name: OsString,
    top: Unchanged,
    tree: Arc<InputTree>,
    /// When it is to be scrubbed next.
    scrub_at: Mutex<Instant>,
    /// Whether the scrub has found a damaged file in it.
    is_damaged: AtomicBool,
}

/// Identity and change time of a directory, which stay the same as long as the directory is not changed.
type Unchanged = (FileIdentity, (i64, i64));

#[allow(clippy::unnecessary_cast, clippy::useless_conversion)]
fn unchanged(stat: &Stat) -> Unchanged {
    (dir::file_id(stat), (stat.st_ctime as i64, stat.st_ctime_nsec as i64))
}

impl Tree {
    fn path(&self) -> PathBuf {
        Path::new(&self.name).join("root")
    }

    fn is_in(&self, place: &RootDirectory) -> bool {
        let stat = rfs::statat(place.handle(), self.path(), AtFlags::SYMLINK_NOFOLLOW);
        stat.is_ok_and(|stat| unchanged(&stat) == self.top)
    }
}

/// A lease of a tree, which keeps the tree from being removed.
#[derive(Debug)]
pub struct TreeLease {
    build_root: BuildRoot,
    place: Arc<RootDirectory>,
    id: TreeId,
    tree: Arc<Tree>,
}

impl TreeLease {
    /// The content of the tree.
    pub fn tree(&self) -> &InputTree {
        &self.tree.tree
    }

    /// Its path, relative to the build root.
    pub fn path(&self) -> PathBuf {
        self.tree.path()
    }

    /// Checks that the tree was not removed or replaced, and that the scrub has not found it damaged. Otherwise it is
    /// not used again.
    ///
    /// # Errors
    /// `Unavailable` if the tree was removed, replaced or changed.
    pub fn check_in_place(&self) -> Result<()> {
        if self.tree.is_in(&self.place) && !self.tree.is_damaged.load(Ordering::SeqCst) {
            return Ok(());
        }
        // The tree is removed with its last lease, which may be this one.
        let _ = self.place.trees.lock().discard(self.id);
        Err(Error::Unavailable(format!(
            "the staged inputs {} were removed or changed while the action ran",
            self.build_root.path().join(self.path()).display()
        )))
    }

    /// Makes later actions copy their inputs for a while, because this tree could not be mounted.
    pub fn note_mount_failure(&self) {
        let until = Instant::now() + COPY_AFTER_FAILURE;
        *self.place.trees.copy_until.lock().unwrap_or_else(PoisonError::into_inner) = Some(until);
    }
}

impl Drop for TreeLease {
    fn drop(&mut self) {
        let discarded = self.place.trees.lock().release(self.id);
        if let Some(tree) = discarded {
            self.build_root.remove_later(&self.place, tree.name.clone());
        }
    }
}

/// A base for an input root, and the difference between both.
#[derive(Debug)]
pub struct Base<'a> {
    /// The lease of the base.
    pub lease: TreeLease,
    /// The changes that make the base look like the root; empty if the base is the root.
    pub delta: Delta<'a>,
}

/// The outcome of a wait for the tree of a root.
#[derive(Debug)]
enum TreeWait {
    Found(TreeLease),
    /// There is no tree, and none is being built.
    NoTree,
    /// The tree is still being built.
    TooLong,
}

impl StagedTrees {
    /// Starts without trees. `limits` bounds those that will be kept.
    pub fn new(limits: StagingLimits) -> Self {
        let budget =
            StagedSize { bytes: limits.max_bytes, nodes: MAX_STAGED_NODES, memory: limits.max_memory };
        let index = Mutex::new(TreeIndex::new(budget, MAX_SEEN_ROOTS));
        Self { index, min_nodes: limits.min_nodes, built: Condvar::new(), copy_until: Mutex::new(None) }
    }

    fn lock(&self) -> MutexGuard<'_, TreeIndex<TreeKey, Arc<Tree>>> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a root is staged now, and not copied.
    fn stages(&self, wanted: &InputTree) -> bool {
        let is_small = wanted.nodes() < self.min_nodes && wanted.bytes() < MIN_BYTES;
        let until = *self.copy_until.lock().unwrap_or_else(PoisonError::into_inner);
        !is_small && until.is_none_or(|until| Instant::now() >= until)
    }
}

impl BuildRoot {
    /// Finds a base for the input root `wanted` among the trees of `place`, or makes a tree of it. `None` if the root
    /// should be copied. A root is also copied if its tree has been under construction elsewhere for too long. `inputs`
    /// has the blobs of `wanted`.
    ///
    /// # Errors
    /// The errors of the checkpoint, of the store and of the file system.
    pub(super) fn stage<'a>(
        &self,
        place: &Arc<RootDirectory>,
        inputs: &mut dyn Inputs,
        wanted: &'a InputTree,
        instance: InstanceId,
        checkpoint: &Checkpoint,
    ) -> Result<Option<Base<'a>>> {
        if !place.trees.stages(wanted) {
            return Ok(None);
        }
        let key = (instance, wanted.digest());
        loop {
            match self.wait_for(place, key, checkpoint)? {
                TreeWait::Found(lease) => return Ok(Some(Base { lease, delta: Delta::default() })),
                TreeWait::NoTree => {}
                TreeWait::TooLong => return Ok(None),
            }
            if let Some(base) = self.similar(place, wanted, key) {
                return Ok(Some(base));
            }
            let free = self.disk().look().map_or(UNLIMITED, free_of);
            let begun = place.trees.lock().begin(key, size_of_tree(wanted), free);
            match begun {
                BuildPermit::NoRoom => return Ok(None),
                BuildPermit::Exists => {}
                BuildPermit::Build(evicted) => {
                    let lease = self.build(place, key, evicted, inputs, checkpoint)?;
                    return Ok(Some(Base { lease, delta: Delta::default() }));
                }
            }
        }
    }

    /// Builds a tree that the index has permitted, and removes the trees that were evicted for it.
    fn build(
        &self,
        place: &Arc<RootDirectory>,
        key: TreeKey,
        evicted: Vec<Arc<Tree>>,
        inputs: &mut dyn Inputs,
        checkpoint: &Checkpoint,
    ) -> Result<TreeLease> {
        let building = Building { build_root: self, place, key, name: None };
        evicted.iter().for_each(|tree| self.remove_later(place, tree.name.clone()));
        building.build(inputs, checkpoint)
    }

    /// The space that the staged trees take.
    pub fn staged_usage(&self) -> BudgetUse {
        self.last_place().trees.lock().usage()
    }

    /// Removes staged trees that no action uses, the least recently used first, until the disk is not low any more.
    pub fn relieve_disk(&self) {
        self.remove_unused_trees_while(|| self.disk().look().is_some_and(|space| space.is_low()));
    }

    fn remove_unused_trees_while(&self, is_needed: impl Fn() -> bool) {
        let Ok(place) = self.place() else { return };
        while is_needed() {
            let Some(tree) = place.trees.lock().take_oldest_unused() else { return };
            self.remove_here(&place, tree.name.clone());
        }
    }

    /// Leases a tree that was found in the index. If the tree is no longer in place, it is discarded and the result is
    /// `None`.
    fn leased(&self, place: &Arc<RootDirectory>, id: TreeId, tree: Arc<Tree>) -> Option<TreeLease> {
        let lease = TreeLease { build_root: self.clone(), place: place.clone(), id, tree };
        lease.check_in_place().is_ok().then_some(lease)
    }

    /// Leases the tree of this root. Waits if it is being built, at most for half of the time that the checkpoint
    /// allows, so that there is time left to copy the inputs.
    fn wait_for(
        &self,
        place: &Arc<RootDirectory>,
        key: TreeKey,
        checkpoint: &Checkpoint,
    ) -> Result<TreeWait> {
        let mut index = place.trees.lock();
        loop {
            if let Some((id, tree)) = index.lease(key) {
                drop(index);
                if let Some(lease) = self.leased(place, id, tree) {
                    return Ok(TreeWait::Found(lease));
                }
                index = place.trees.lock();
                continue;
            }
            if !index.is_building(key) {
                return Ok(TreeWait::NoTree);
            }
            if checkpoint.is_half_over() {
                return Ok(TreeWait::TooLong);
            }
            let waited = place.trees.built.wait_timeout(index, BUILD_POLL);
            (index, _) = waited.unwrap_or_else(PoisonError::into_inner);
            checkpoint.check()?;
        }
    }

    /// A lease of the best base; `None` if the root should become a tree of its own.
    fn similar<'a>(
        &self,
        place: &Arc<RootDirectory>,
        wanted: &'a InputTree,
        key: TreeKey,
    ) -> Option<Base<'a>> {
        let (weight, base, delta) = self.best_base(place, wanted, key.0)?;
        let mut index = place.trees.lock();
        if weight > SMALL_DELTA && (index.note_seen(key) || index.note_large_delta(base)) {
            return None;
        }
        // It may have been evicted meanwhile.
        let tree = index.lease_again(base)?;
        drop(index);
        Some(Base { lease: self.leased(place, base, tree)?, delta })
    }

    /// The most recently used tree with the smallest delta, the delta, and its weight. `None` if no delta is worth it.
    fn best_base<'a>(
        &self,
        place: &RootDirectory,
        wanted: &'a InputTree,
        instance: InstanceId,
    ) -> Option<(u64, TreeId, Delta<'a>)> {
        let latest: Vec<_> = {
            let index = place.trees.lock();
            let of_instance = index.latest(BASES).filter(|(_, (of, _), _)| *of == instance);
            of_instance.map(|(id, _, tree)| (id, tree.clone())).collect()
        };
        let probes = probes(wanted);
        let mut scored: Vec<_> = latest
            .into_iter()
            .map(|(id, tree)| {
                let common = probes.iter().filter(|digest| tree.tree.find(digest).is_some()).count();
                (common, id, tree)
            })
            .collect();
        // The sort is stable, so of equal trees the most recent one stays first.
        scored.sort_by_key(|(common, ..)| std::cmp::Reverse(*common));
        // If more than half of the root would have to be written, building a tree costs about the same.
        let limit = Cost { entries: wanted.nodes() / 2, bytes: u64::MAX };
        let compared = scored.iter().take(COMPARED_BASES).filter_map(|(_, id, tree)| {
            let delta = Delta::between(wanted, &tree.tree, limit)?;
            Some((weight(delta.cost), *id, delta))
        });
        compared.min_by_key(|(weight, ..)| *weight)
    }
}

/// The permission to build a tree. If it is dropped before the tree is finished, the reserved space is released.
struct Building<'a> {
    build_root: &'a BuildRoot,
    place: &'a Arc<RootDirectory>,
    key: TreeKey,
    /// The directory of the tree until the tree is finished.
    name: Option<OsString>,
}

impl Building<'_> {
    fn build(mut self, inputs: &mut dyn Inputs, checkpoint: &Checkpoint) -> Result<TreeLease> {
        let doing = |error: io::Error| Error::io("stage an input root", &error);
        inputs.hold_all()?;
        let (name, root) = self.build_root.create_tree(self.place).map_err(doing)?;
        self.name = Some(name.clone());
        inputs::write(inputs, &root, true, checkpoint)?;
        let top = unchanged(&rfs::fstat(&root).map_err(|error| doing(error.into()))?);
        let tree = Arc::new(Tree {
            name,
            top,
            tree: inputs.tree().clone(),
            scrub_at: Mutex::new(Instant::now() + scrub::EVERY),
            is_damaged: AtomicBool::new(false),
        });
        let id = self.place.trees.lock().finish(self.key, tree.clone());
        let id = id.ok_or_else(|| Error::internal("a staged tree was not expected"))?;
        self.name = None;
        Ok(TreeLease { build_root: self.build_root.clone(), place: self.place.clone(), id, tree })
    }
}

impl Drop for Building<'_> {
    fn drop(&mut self) {
        // Has no effect if the tree is finished.
        self.place.trees.lock().abandon(self.key);
        self.place.trees.built.notify_all();
        if let Some(name) = self.name.take() {
            self.build_root.remove_later(self.place, name);
        }
    }
}

/// Upper bound of the size of a tree.
fn size_of_tree(tree: &InputTree) -> StagedSize {
    StagedSize {
        bytes: tree.nodes().saturating_mul(NODE_BYTES).saturating_add(tree.bytes()),
        nodes: tree.nodes().saturating_add(1),
        memory: tree.memory() as u64,
    }
}

const UNLIMITED: StagedSize = StagedSize { bytes: u64::MAX, nodes: u64::MAX, memory: u64::MAX };

/// The free space of a disk as a size. Memory is not part of the disk, so it is unlimited.
fn free_of(space: Space) -> StagedSize {
    let nodes = if space.total_inodes > 0 { space.free_inodes } else { u64::MAX };
    let bytes = if space.total_bytes > 0 { space.free_bytes } else { u64::MAX };
    StagedSize { bytes, nodes, ..UNLIMITED }
}

/// How long it takes to write a delta, in units of small files.
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
