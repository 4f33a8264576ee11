//! [`KnownRoots`]: the input roots that were read, and the time when each was last found complete.
//!
//! A digest identifies contents, so a root that was read never becomes stale. Only the index says whether all of it is
//! still stored. But entries that were just renewed are evicted last. So a root that was checked within the last
//! [`CHECKED_FOR`] is assumed to be complete when its action is queued. A caller that needs a blob holds it, which
//! shows for certain whether it is stored.
//!
//! Bounds: the roots used last are kept within [`INPUT_ROOT_MEMO_BYTES`]. Other roots are known for as long as they are
//! used elsewhere, such as by the staged trees of the workers, which have a budget of their own.

use crate::{
    actors::cas::{memo::Memo, settings::INPUT_ROOT_MEMO_BYTES},
    caller::Owner,
    instance::InstanceId,
};
use gorego_reapi::{digest::Digest, tree::InputTree};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, Instant},
};

/// How long a root that was found complete is not checked again. Renewing the blobs of a root takes 0.4 us for each.
const CHECKED_FOR: Duration = Duration::from_secs(10);
/// Roots that are not used any more are forgotten when there are at least this many roots, and twice as many as were in
/// use the last time.
const MIN_PRUNED: usize = 1_024;

/// The instance of a root's blobs, and the digest of the root.
type RootKey = (InstanceId, Digest);

/// See the module documentation.
#[derive(Debug)]
pub(crate) struct KnownRoots {
    recent: Memo<RootKey, Arc<InputTree>>,
    all: Mutex<AllRoots>,
}

#[derive(Debug)]
struct AllRoots {
    roots: HashMap<RootKey, KnownRoot>,
    prune_at: usize,
}

#[derive(Debug)]
struct KnownRoot {
    tree: Weak<InputTree>,
    /// The build for which the root was checked last.
    build: Option<Owner>,
    checked: Instant,
}

impl KnownRoots {
    pub(crate) fn new() -> Self {
        Self::within(INPUT_ROOT_MEMO_BYTES)
    }

    fn within(budget: usize) -> Self {
        let all = AllRoots { roots: HashMap::new(), prune_at: MIN_PRUNED };
        Self { recent: Memo::unsharded(budget), all: Mutex::new(all) }
    }

    /// The root with this key.
    pub(crate) fn get(&self, key: &RootKey) -> Option<Arc<InputTree>> {
        self.recent.get(key).or_else(|| self.lock().roots.get(key)?.tree.upgrade())
    }

    /// Whether a root need not be checked for this build now. A check for another build does not count, because it has
    /// leased nothing to this build.
    pub(crate) fn was_checked(&self, key: &RootKey, build: Option<Owner>, now: Instant) -> bool {
        let all = self.lock();
        let known = all.roots.get(key).filter(|known| known.tree.strong_count() > 0 && known.build == build);
        known.is_some_and(|known| now.saturating_duration_since(known.checked) < CHECKED_FOR)
    }

    /// Remembers a root that was found complete for this build.
    pub(crate) fn insert(&self, key: RootKey, tree: &Arc<InputTree>, build: Option<Owner>, checked: Instant) {
        self.recent.insert(key, tree.clone(), tree.memory());
        let mut all = self.lock();
        all.roots.insert(key, KnownRoot { tree: Arc::downgrade(tree), build, checked });
        if all.roots.len() >= all.prune_at {
            all.roots.retain(|_, known| known.tree.strong_count() > 0);
            all.prune_at = MIN_PRUNED.max(2 * all.roots.len());
        }
    }

    fn lock(&self) -> MutexGuard<'_, AllRoots> {
        // A panic elsewhere leaves the map intact.
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gorego_reapi::{digest::DigestFunction, proto::reapi, tree::Directory};
    use prost::Message as _;

    /// A root whose only link has a target of this length.
    fn root(number: usize, length: usize) -> (RootKey, Arc<InputTree>) {
        let target = format!("{number:08}").repeat(length / 8 + 1);
        let link = reapi::SymlinkNode { name: "l".into(), target, ..Default::default() };
        let bytes = reapi::Directory { symlinks: vec![link], ..Default::default() }.encode_to_vec();
        let digest = DigestFunction::Sha256.digest(&bytes);
        let directory = Arc::new(Directory::decode(&bytes, DigestFunction::Sha256).unwrap());
        let tree = InputTree::new(digest, HashMap::from([(digest, directory)])).unwrap();
        ((InstanceId(0), digest), Arc::new(tree))
    }

    #[test]
    fn a_root_is_checked_again_after_a_while() {
        let (roots, now) = (KnownRoots::new(), Instant::now());
        let (key, tree) = root(1, 8);
        assert!(!roots.was_checked(&key, None, now) && roots.get(&key).is_none());
        roots.insert(key, &tree, None, now);
        drop(tree);
        assert!(roots.was_checked(&key, None, now + CHECKED_FOR / 2));
        assert!(!roots.was_checked(&key, None, now + CHECKED_FOR));
        assert!(roots.get(&key).is_some(), "it is still known");
        assert!(roots.get(&(InstanceId(1), key.1)).is_none(), "to those who have its blobs");
    }

    #[test]
    fn a_root_that_is_in_use_elsewhere_stays_known_and_all_others_are_bounded() {
        let (roots, now) = (KnownRoots::within(400_000), Instant::now());
        let (key, held) = root(0, 8);
        roots.insert(key, &held, None, now);
        for number in 1..4 * MIN_PRUNED {
            let (key, tree) = root(number, 2_000);
            roots.insert(key, &tree, None, now);
        }
        assert!(Arc::ptr_eq(&roots.get(&key).unwrap(), &held));
        let known = roots.lock().roots.len();
        assert!(known <= MIN_PRUNED, "{known} are known");
        roots.recent.clear();
        drop(held);
        assert!(roots.get(&key).is_none() && !roots.was_checked(&key, None, now));
    }
}
