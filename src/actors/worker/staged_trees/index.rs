//! [`TreeIndex`]: which trees are staged, who uses them, and which go first. Pure.
//!
//! A tree takes its part of the budget from before it is built until it is told to go. Trees that are leased stay. The
//! others go in the order of their last use, when a new tree needs the room. So the trees never have more than the budget.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    hash::Hash,
};

/// What trees take on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StagedSize {
    /// Bytes of their files.
    pub bytes: u64,
    /// Files, directories and links.
    pub nodes: u64,
}

impl StagedSize {
    fn plus(self, other: Self) -> Self {
        Self { bytes: self.bytes.saturating_add(other.bytes), nodes: self.nodes.saturating_add(other.nodes) }
    }

    fn minus(self, other: Self) -> Self {
        Self { bytes: self.bytes.saturating_sub(other.bytes), nodes: self.nodes.saturating_sub(other.nodes) }
    }

    fn fits(self, budget: Self) -> bool {
        self.bytes <= budget.bytes && self.nodes <= budget.nodes
    }
}

/// Whether a tree may be built.
#[derive(Debug, PartialEq, Eq)]
pub enum BuildPermit<T> {
    /// It may; these make room for it and are to be removed. [`TreeIndex::finish`] or [`TreeIndex::abandon`] has to follow.
    Build(Vec<T>),
    /// Somebody builds it, or has built it.
    Exists,
    /// It is too large, beside those that are in use.
    NoRoom,
}

/// Staged trees `T` by key.
#[derive(Debug)]
pub struct TreeIndex<K, T> {
    budget: StagedSize,
    charged: StagedSize,
    trees: HashMap<K, StagedEntry<T>>,
    /// Those that nobody uses, and others, by their last use; the number is unique.
    order: BTreeMap<u64, K>,
    last_use: u64,
    building: HashMap<K, StagedSize>,
    /// Roots that were staged without becoming a tree, the oldest first.
    passed: VecDeque<K>,
    is_passed: HashSet<K>,
    max_passed: usize,
}

#[derive(Debug)]
struct StagedEntry<T> {
    tree: T,
    size: StagedSize,
    leases: usize,
    used: u64,
}

impl<K: Copy + Eq + Hash, T: Clone> TreeIndex<K, T> {
    /// An empty one that remembers so many roots that became no trees.
    pub fn new(budget: StagedSize, max_passed: usize) -> Self {
        Self {
            budget,
            charged: StagedSize::default(),
            trees: HashMap::new(),
            order: BTreeMap::new(),
            last_use: 0,
            building: HashMap::new(),
            passed: VecDeque::new(),
            is_passed: HashSet::new(),
            max_passed,
        }
    }

    /// Leases a tree, if there is one.
    pub fn lease(&mut self, key: K) -> Option<T> {
        let entry = self.trees.get_mut(&key)?;
        entry.leases += 1;
        self.order.remove(&entry.used);
        self.last_use += 1;
        entry.used = self.last_use;
        self.order.insert(entry.used, key);
        Some(entry.tree.clone())
    }

    /// Ends a lease.
    pub fn release(&mut self, key: K) {
        if let Some(entry) = self.trees.get_mut(&key) {
            entry.leases = entry.leases.saturating_sub(1);
        }
    }

    /// Asks to build a tree, and takes room for it.
    pub fn begin(&mut self, key: K, size: StagedSize) -> BuildPermit<T> {
        if self.trees.contains_key(&key) || self.building.contains_key(&key) {
            return BuildPermit::Exists;
        }
        let free = |entry: &&StagedEntry<T>| entry.leases == 0;
        let unused =
            self.trees.values().filter(free).fold(StagedSize::default(), |sum, entry| sum.plus(entry.size));
        if !self.charged.minus(unused).plus(size).fits(self.budget) {
            return BuildPermit::NoRoom;
        }
        let mut removed = Vec::new();
        while !self.charged.plus(size).fits(self.budget) {
            let Some(oldest) = self.oldest_unused() else { break };
            removed.extend(self.remove(oldest));
        }
        self.charged = self.charged.plus(size);
        self.building.insert(key, size);
        BuildPermit::Build(removed)
    }

    /// Adds a tree that was built, and leases it.
    pub fn finish(&mut self, key: K, tree: T) {
        let Some(size) = self.building.remove(&key) else { return };
        self.last_use += 1;
        self.order.insert(self.last_use, key);
        self.trees.insert(key, StagedEntry { tree, size, leases: 1, used: self.last_use });
    }

    /// Gives the room of a tree back that could not be built.
    pub fn abandon(&mut self, key: K) {
        if let Some(size) = self.building.remove(&key) {
            self.charged = self.charged.minus(size);
        }
    }

    /// Whether a tree is being built.
    pub fn is_building(&self, key: K) -> bool {
        self.building.contains_key(&key)
    }

    /// The trees that were used last, at most `count`, the latest first.
    pub fn latest(&self, count: usize) -> impl Iterator<Item = (K, &T)> {
        let keys = self.order.values().rev().take(count);
        keys.filter_map(|key| Some((*key, &self.trees.get(key)?.tree)))
    }

    /// Takes all trees out that nobody uses; they are to be removed.
    pub fn take_unused(&mut self) -> Vec<T> {
        let mut removed = Vec::new();
        while let Some(oldest) = self.oldest_unused() {
            removed.extend(self.remove(oldest));
        }
        removed
    }

    /// A root was staged without becoming a tree. Returns whether that happened before, as far as it is remembered.
    pub fn pass(&mut self, key: K) -> bool {
        if !self.is_passed.insert(key) {
            return true;
        }
        self.passed.push_back(key);
        if self.passed.len() > self.max_passed
            && let Some(oldest) = self.passed.pop_front()
        {
            self.is_passed.remove(&oldest);
        }
        false
    }

    fn oldest_unused(&self) -> Option<K> {
        let is_unused = |key: &&K| self.trees.get(key).is_some_and(|entry| entry.leases == 0);
        self.order.values().find(is_unused).copied()
    }

    fn remove(&mut self, key: K) -> Option<T> {
        let entry = self.trees.remove(&key)?;
        self.order.remove(&entry.used);
        self.charged = self.charged.minus(entry.size);
        Some(entry.tree)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BUDGET: StagedSize = StagedSize { bytes: 100, nodes: 10 };

    #[derive(Debug, Clone)]
    enum Act {
        Lease(u8),
        Release(u8),
        Begin(u8, StagedSize),
        Finish(u8),
        Abandon(u8),
        Clear,
    }

    fn act() -> impl Strategy<Value = Act> {
        let key = || 0..8u8;
        let size = (0..120u64, 0..12u64).prop_map(|(bytes, nodes)| StagedSize { bytes, nodes });
        prop_oneof![
            3 => key().prop_map(Act::Lease),
            3 => key().prop_map(Act::Release),
            3 => (key(), size).prop_map(|(key, size)| Act::Begin(key, size)),
            3 => key().prop_map(Act::Finish),
            1 => key().prop_map(Act::Abandon),
            1 => Just(Act::Clear),
        ]
    }

    /// What the index promises, written down without regard to cost.
    #[derive(Default)]
    struct Model {
        /// (key, size, leases), the one that was used last at the end.
        trees: Vec<(u8, StagedSize, usize)>,
        building: Vec<(u8, StagedSize)>,
    }

    impl Model {
        fn total(&self) -> StagedSize {
            let sizes = self.trees.iter().map(|tree| tree.1).chain(self.building.iter().map(|tree| tree.1));
            sizes.fold(StagedSize::default(), StagedSize::plus)
        }

        fn position(&self, key: u8) -> Option<usize> {
            self.trees.iter().position(|tree| tree.0 == key)
        }

        fn begin(&mut self, key: u8, size: StagedSize) -> BuildPermit<u8> {
            if self.position(key).is_some() || self.building.iter().any(|tree| tree.0 == key) {
                return BuildPermit::Exists;
            }
            let before = self.trees.clone();
            let mut removed = Vec::new();
            while !self.total().plus(size).fits(BUDGET) {
                let Some(oldest) = self.trees.iter().position(|tree| tree.2 == 0) else {
                    self.trees = before;
                    return BuildPermit::NoRoom;
                };
                removed.push(self.trees.remove(oldest).0);
            }
            self.building.push((key, size));
            BuildPermit::Build(removed)
        }
    }

    proptest! {
        /// Trees in use stay, the others go in the order of their last use, and the budget holds.
        #[test]
        fn the_index_follows_its_model(acts in proptest::collection::vec(act(), 0..200)) {
            let mut index = TreeIndex::new(BUDGET, 4);
            let mut model = Model::default();
            for act in acts {
                match act {
                    Act::Lease(key) => {
                        let position = model.position(key);
                        prop_assert_eq!(index.lease(key).is_some(), position.is_some());
                        if let Some(position) = position {
                            let (key, size, leases) = model.trees.remove(position);
                            model.trees.push((key, size, leases + 1));
                        }
                    }
                    Act::Release(key) => {
                        // Only leases that were taken end.
                        if let Some(at) = model.position(key).filter(|at| model.trees[*at].2 > 0) {
                            model.trees[at].2 -= 1;
                            index.release(key);
                        }
                    }
                    Act::Begin(key, size) => {
                        prop_assert_eq!(index.begin(key, size), model.begin(key, size));
                    }
                    Act::Finish(key) => {
                        index.finish(key, key);
                        if let Some(at) = model.building.iter().position(|tree| tree.0 == key) {
                            let (key, size) = model.building.remove(at);
                            model.trees.push((key, size, 1));
                        }
                    }
                    Act::Abandon(key) => {
                        index.abandon(key);
                        model.building.retain(|tree| tree.0 != key);
                    }
                    Act::Clear => {
                        let unused: Vec<_> =
                            model.trees.iter().filter(|tree| tree.2 == 0).map(|tree| tree.0).collect();
                        prop_assert_eq!(index.take_unused(), unused);
                        model.trees.retain(|tree| tree.2 > 0);
                    }
                }
                prop_assert_eq!(index.charged, model.total());
                prop_assert!(index.charged.fits(BUDGET));
                let latest: Vec<_> = index.latest(100).map(|(key, _)| key).collect();
                let expected: Vec<_> = model.trees.iter().rev().map(|tree| tree.0).collect();
                prop_assert_eq!(latest, expected);
            }
        }
    }

    #[test]
    fn roots_that_became_no_tree_are_remembered_for_a_while() {
        let mut index = TreeIndex::<u8, ()>::new(BUDGET, 2);
        assert!(!index.pass(1) && index.pass(1));
        assert!(!index.pass(2) && !index.pass(3));
        assert!(!index.pass(1), "forgotten");
        assert!(index.pass(3));
    }
}
