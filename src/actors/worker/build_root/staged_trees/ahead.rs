//! Builds the staged tree of an action that still waits, so that its run finds it.
//!
//! Nothing is built that the run would not build: no small root, no root with a usable base, and no root that is staged
//! or being built. What is built stays in the index without a lease, as a tree does after a run. If the run comes
//! meanwhile, it waits for the tree as for a tree that another action builds, at most for half of its time; if the tree
//! could not be built, it builds the tree itself. Nothing is built while the disk is low, or if the tree, those in use
//! and those that still await their runs would take more than half of the budget.

use super::{BUILD_POLL, BuildPermit, SMALL_DELTA, TreeKey, UNLIMITED, free_of, size_of_tree};
use crate::{
    actors::worker::{
        build_root::{BuildRoot, RootDirectory},
        checkpoint::Checkpoint,
        store::Inputs,
    },
    disk::Space,
    instance::InstanceId,
};
use gorego_reapi::{error::Result, tree::InputTree};
use std::sync::{Arc, PoisonError};

impl BuildRoot {
    /// Makes a staged tree of the input root `wanted` if its run would make one. Returns whether it has made one.
    /// `inputs` has the blobs of `wanted`, and `look` samples the disk. No tree is begun once the checkpoint is
    /// stopped.
    ///
    /// # Errors
    /// The errors of the checkpoint, of the store and of the file system.
    pub(in crate::actors::worker) fn stage_ahead(
        &self,
        inputs: &mut dyn Inputs,
        wanted: &InputTree,
        instance: InstanceId,
        look: impl FnOnce() -> Option<Space>,
        checkpoint: &Checkpoint,
    ) -> Result<bool> {
        let place = self.place()?;
        let key = (instance, wanted.digest());
        if !place.trees.stages(wanted) || self.is_staged(&place, key) {
            return Ok(false);
        }
        wait_for_builds(&place, checkpoint)?;
        let space = look();
        if checkpoint.is_stopped()
            || space.is_some_and(|space| space.is_low())
            || self.is_staged(&place, key)
            || !self.needs_tree(&place, wanted, key)
        {
            return Ok(false);
        }
        let free = space.map_or(UNLIMITED, free_of);
        let begun = place.trees.lock().begin_ahead(key, size_of_tree(wanted), free);
        let BuildPermit::Build(evicted) = begun else { return Ok(false) };
        self.build(&place, key, evicted, inputs, checkpoint)?;
        Ok(true)
    }

    /// Whether this root has a tree, which then counts as used now, or a tree of it is being built.
    fn is_staged(&self, place: &Arc<RootDirectory>, key: TreeKey) -> bool {
        let mut index = place.trees.lock();
        if index.is_building(key) {
            return true;
        }
        let leased = index.lease_to_check(key);
        // The end of a lease locks the index.
        drop(index);
        leased.is_some_and(|(id, tree)| self.leased(place, id, tree).is_some())
    }

    /// Whether a run of this root would make a tree. If it would not, nothing is recorded: the run records its delta.
    fn needs_tree(&self, place: &RootDirectory, wanted: &InputTree, key: TreeKey) -> bool {
        let Some((weight, base, _)) = self.best_base(place, wanted, key.0) else { return true };
        let mut index = place.trees.lock();
        weight > SMALL_DELTA
            && index.is_tree_due(key, base)
            && (index.note_seen(key) || index.note_large_delta(base))
    }
}

/// Waits until the trees that are being built now are built: one of them may become the base of this root. Waits no
/// longer once the checkpoint is stopped.
fn wait_for_builds(place: &RootDirectory, checkpoint: &Checkpoint) -> Result<()> {
    let mut index = place.trees.lock();
    let builds = index.builds();
    while builds.iter().any(|key| index.is_building(*key)) && !checkpoint.is_stopped() {
        checkpoint.check()?;
        let waited = place.trees.built.wait_timeout(index, BUILD_POLL);
        (index, _) = waited.unwrap_or_else(PoisonError::into_inner);
    }
    Ok(())
}
