//! [`TreeIndex`]: records which trees are staged and leased, and which are evicted first. Pure.
//!
//! A tree occupies its part of the budget from before it is built until it is removed from the index. Leased trees
//! stay. The others are evicted, least recently used first, when a new tree needs room. So the trees never exceed the
//! budget. When a tree is begun, they also do not exceed half of the disk space that would be free without them.
//!
//! A tree that turned out to be damaged is not leased again, and is removed with its last lease.

use crate::disk::BudgetUse;
use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    hash::Hash,
};

/// How many large deltas are written over one tree before the next root with a large delta becomes a tree.
const LARGE_DELTAS: u32 = 8;

/// The size of one or more trees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StagedSize {
    /// Bytes on disk.
    pub bytes: u64,
    /// Files, directories and links.
    pub nodes: u64,
    /// Bytes in memory.
    pub memory: u64,
}

impl StagedSize {
    fn with(self, other: Self, merge: impl Fn(u64, u64) -> u64) -> Self {
        Self {
            bytes: merge(self.bytes, other.bytes),
            nodes: merge(self.nodes, other.nodes),
            memory: merge(self.memory, other.memory),
        }
    }

    fn plus(self, other: Self) -> Self {
        self.with(other, u64::saturating_add)
    }

    fn minus(self, other: Self) -> Self {
        self.with(other, u64::saturating_sub)
    }

    fn fits(self, budget: Self) -> bool {
        self.bytes <= budget.bytes && self.nodes <= budget.nodes && self.memory <= budget.memory
    }
}

/// The answer to a request to build a tree.
#[derive(Debug, PartialEq, Eq)]
pub enum BuildPermit<T> {
    /// The caller has to build the tree, and to remove these evicted trees. It must call [`TreeIndex::finish`] or
    /// [`TreeIndex::abandon`] afterwards.
    Build(Vec<T>),
    /// The tree exists, or another caller is building it.
    Exists,
    /// The tree does not fit next to the trees in use.
    NoRoom,
}

/// Identifies one tree in the index. Two trees with the same key have different ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TreeId(u64);

/// The index of the staged trees `T` by key.
#[derive(Debug)]
pub struct TreeIndex<K, T> {
    budget: StagedSize,
    charged: StagedSize,
    trees: HashMap<TreeId, StagedEntry<K, T>>,
    /// The trees that can be leased.
    current: HashMap<K, TreeId>,
    /// The same trees by the unique number of their last use.
    order: BTreeMap<u64, TreeId>,
    last_use: u64,
    last_id: u64,
    building: HashMap<K, TreeInConstruction>,
    /// Roots that were staged without becoming a tree, oldest first.
    seen: VecDeque<K>,
    is_seen: HashSet<K>,
    max_seen: usize,
}

#[derive(Debug, Clone, Copy)]
struct TreeInConstruction {
    size: StagedSize,
    is_ahead: bool,
}

#[derive(Debug)]
struct StagedEntry<K, T> {
    key: K,
    tree: T,
    size: StagedSize,
    leases: usize,
    used: u64,
    /// How many large deltas were written over it since the last time a new tree was due.
    large_deltas: u32,
    is_current: bool,
    /// Whether it was built ahead of a run that has not leased it yet.
    awaits_run: bool,
}

impl<K: Copy + Eq + Hash, T: Clone> TreeIndex<K, T> {
    /// An empty index that remembers up to `max_seen` roots that did not become trees.
    pub fn new(budget: StagedSize, max_seen: usize) -> Self {
        Self {
            budget,
            charged: StagedSize::default(),
            trees: HashMap::new(),
            current: HashMap::new(),
            order: BTreeMap::new(),
            last_use: 0,
            last_id: 0,
            building: HashMap::new(),
            seen: VecDeque::new(),
            is_seen: HashSet::new(),
            max_seen,
        }
    }

    /// The room that the trees take, including those that are being built.
    pub fn usage(&self) -> BudgetUse {
        let count = self.trees.len() as u64;
        BudgetUse { count, bytes: self.charged.bytes, max_bytes: self.budget.bytes }
    }

    /// Leases the tree with this key, if there is one.
    pub fn lease(&mut self, key: K) -> Option<(TreeId, T)> {
        let id = *self.current.get(&key)?;
        Some((id, self.lease_again(id)?))
    }

    /// Like [`TreeIndex::lease`], for a caller that only checks the tree: it still awaits its run, if it did before.
    pub fn lease_to_check(&mut self, key: K) -> Option<(TreeId, T)> {
        let id = *self.current.get(&key)?;
        let awaits_run = self.trees.get(&id)?.awaits_run;
        let tree = self.lease_again(id)?;
        if let Some(entry) = self.trees.get_mut(&id) {
            entry.awaits_run = awaits_run;
        }
        Some((id, tree))
    }

    /// Leases the tree with this id, if it can still be leased.
    pub fn lease_again(&mut self, id: TreeId) -> Option<T> {
        let entry = self.trees.get_mut(&id).filter(|entry| entry.is_current)?;
        entry.leases += 1;
        entry.awaits_run = false;
        self.order.remove(&entry.used);
        self.last_use += 1;
        entry.used = self.last_use;
        self.order.insert(entry.used, id);
        Some(entry.tree.clone())
    }

    /// Ends a lease. Returns the tree if it was discarded meanwhile and this was its last lease; the caller must then
    /// remove it.
    pub fn release(&mut self, id: TreeId) -> Option<T> {
        let entry = self.trees.get_mut(&id)?;
        entry.leases = entry.leases.saturating_sub(1);
        if entry.leases == 0 && !entry.is_current { self.remove(id) } else { None }
    }

    /// Stops further leases of a tree, because it is damaged. Returns the tree if it is not leased; the caller must
    /// then remove it.
    pub fn discard(&mut self, id: TreeId) -> Option<T> {
        let entry = self.trees.get_mut(&id)?;
        if std::mem::take(&mut entry.is_current) {
            self.order.remove(&entry.used);
            self.current.remove(&entry.key);
        }
        if entry.leases == 0 { self.remove(id) } else { None }
    }

    /// Asks for permission to build a tree, and reserves room for it. `free` is the free space of the disk.
    pub fn begin(&mut self, key: K, size: StagedSize, free: StagedSize) -> BuildPermit<T> {
        if self.current.contains_key(&key) || self.building.contains_key(&key) {
            return BuildPermit::Exists;
        }
        let half_of_free = self.charged.with(free, |charged, free| charged.saturating_add(free) / 2);
        let budget = self.budget.with(half_of_free, u64::min);
        if !self.in_use().plus(size).fits(budget) {
            return BuildPermit::NoRoom;
        }
        let mut removed = Vec::new();
        while !self.charged.plus(size).fits(budget) {
            let Some(oldest) = self.take_oldest_unused() else { break };
            removed.push(oldest);
        }
        self.charged = self.charged.plus(size);
        self.building.insert(key, TreeInConstruction { size, is_ahead: false });
        BuildPermit::Build(removed)
    }

    /// Like [`TreeIndex::begin`], for a tree that no action needs yet. It gets room only if it, the trees in use and those
    /// that still await their runs take at most half of the budget. So these trees do not evict each other, and leave room
    /// for actions that run before.
    pub fn begin_ahead(&mut self, key: K, size: StagedSize, free: StagedSize) -> BuildPermit<T> {
        let half = self.budget.with(self.budget, |budget, _| budget / 2);
        let awaiting = self.trees.values().filter(|entry| entry.leases == 0 && entry.awaits_run);
        let awaiting = awaiting.fold(StagedSize::default(), |sum, entry| sum.plus(entry.size));
        if !self.in_use().plus(awaiting).plus(size).fits(half) {
            return BuildPermit::NoRoom;
        }
        let permit = self.begin(key, size, free);
        if matches!(permit, BuildPermit::Build(_)) {
            self.building.insert(key, TreeInConstruction { size, is_ahead: true });
        }
        permit
    }

    /// The room of the trees that are leased or being built.
    fn in_use(&self) -> StagedSize {
        let unused = self.trees.values().filter(|entry| entry.leases == 0);
        self.charged.minus(unused.fold(StagedSize::default(), |sum, entry| sum.plus(entry.size)))
    }

    /// Adds a tree that was built, and leases it. `None` if [`TreeIndex::begin`] has not permitted it.
    pub fn finish(&mut self, key: K, tree: T) -> Option<TreeId> {
        let TreeInConstruction { size, is_ahead: awaits_run } = self.building.remove(&key)?;
        self.last_use += 1;
        self.last_id += 1;
        let id = TreeId(self.last_id);
        self.order.insert(self.last_use, id);
        self.current.insert(key, id);
        let used = self.last_use;
        let entry =
            StagedEntry { key, tree, size, leases: 1, used, large_deltas: 0, is_current: true, awaits_run };
        self.trees.insert(id, entry);
        Some(id)
    }

    /// Gives back the room of a tree that could not be built.
    pub fn abandon(&mut self, key: K) {
        if let Some(tree) = self.building.remove(&key) {
            self.charged = self.charged.minus(tree.size);
        }
    }

    /// Whether a tree is being built.
    pub fn is_building(&self, key: K) -> bool {
        self.building.contains_key(&key)
    }

    /// The trees that are being built.
    pub fn builds(&self) -> Vec<K> {
        self.building.keys().copied().collect()
    }

    /// Whether a root with a large delta over this tree would become a tree if it came now. Records nothing.
    pub fn is_tree_due(&self, key: K, base: TreeId) -> bool {
        let over_base = self.trees.get(&base).map_or(0, |entry| entry.large_deltas);
        self.is_seen.contains(&key) || over_base >= LARGE_DELTAS
    }

    /// The `count` most recently used trees, the most recent first.
    pub fn latest(&self, count: usize) -> impl Iterator<Item = (TreeId, K, &T)> {
        let ids = self.order.values().rev().take(count);
        ids.filter_map(|id| self.trees.get(id).map(|entry| (*id, entry.key, &entry.tree)))
    }

    /// Takes out the least recently used tree that is not leased; the caller must remove it.
    pub fn take_oldest_unused(&mut self) -> Option<T> {
        let is_unused = |id: &&TreeId| self.trees.get(id).is_some_and(|entry| entry.leases == 0);
        let oldest = self.order.values().find(is_unused).copied()?;
        self.discard(oldest)
    }

    /// Records that a root was staged without becoming a tree. Returns whether this root was recorded before.
    pub fn note_seen(&mut self, key: K) -> bool {
        if !self.is_seen.insert(key) {
            return true;
        }
        self.seen.push_back(key);
        if self.seen.len() > self.max_seen
            && let Some(oldest) = self.seen.pop_front()
        {
            self.is_seen.remove(&oldest);
        }
        false
    }

    /// Records that a large delta will be written over this tree. Returns whether there were so many that a new tree
    /// should be built.
    pub fn note_large_delta(&mut self, id: TreeId) -> bool {
        let Some(entry) = self.trees.get_mut(&id) else { return false };
        entry.large_deltas += 1;
        let is_due = entry.large_deltas > LARGE_DELTAS;
        if is_due {
            entry.large_deltas = 0;
        }
        is_due
    }

    fn remove(&mut self, id: TreeId) -> Option<T> {
        let entry = self.trees.remove(&id)?;
        self.charged = self.charged.minus(entry.size);
        Some(entry.tree)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BUDGET: StagedSize = StagedSize { bytes: 100, nodes: 10, memory: 50 };
    const PLENTY: StagedSize = StagedSize { bytes: u64::MAX, nodes: u64::MAX, memory: u64::MAX };

    #[derive(Debug, Clone)]
    enum Act {
        /// By a run, or to check the tree.
        Lease(u8, bool),
        /// Ends one of the leases of the tree with this number.
        Release(usize),
        Discard(usize),
        Begin(u8, StagedSize, StagedSize),
        BeginAhead(u8, StagedSize, StagedSize),
        Finish(u8),
        Abandon(u8),
        TakeOldest,
    }

    fn act() -> impl Strategy<Value = Act> {
        let key = || 0..8u8;
        let size = |most: u64| {
            (0..most, 0..most / 10, 0..most / 2).prop_map(|(bytes, nodes, memory)| StagedSize {
                bytes,
                nodes,
                memory,
            })
        };
        prop_oneof![
            3 => (key(), any::<bool>()).prop_map(|(key, runs)| Act::Lease(key, runs)),
            3 => (0..20usize).prop_map(Act::Release),
            1 => (0..20usize).prop_map(Act::Discard),
            3 => (key(), size(120), size(400)).prop_map(|(key, size, free)| Act::Begin(key, size, free)),
            2 => (key(), size(80), size(400)).prop_map(|(key, size, free)| Act::BeginAhead(key, size, free)),
            3 => key().prop_map(Act::Finish),
            1 => key().prop_map(Act::Abandon),
            1 => Just(Act::TakeOldest),
        ]
    }

    #[derive(Clone)]
    struct ModelTree {
        key: u8,
        number: usize,
        size: StagedSize,
        leases: usize,
        is_discarded: bool,
        awaits_run: bool,
    }

    /// The rules of the index in a simple but slow form.
    #[derive(Default)]
    struct Model {
        /// The most recently used tree is last.
        trees: Vec<ModelTree>,
        /// Key, size, and whether it is built ahead.
        building: Vec<(u8, StagedSize, bool)>,
    }

    impl Model {
        fn total(&self) -> StagedSize {
            let sizes =
                self.trees.iter().map(|tree| tree.size).chain(self.building.iter().map(|tree| tree.1));
            sizes.fold(StagedSize::default(), StagedSize::plus)
        }

        fn position(&self, key: u8) -> Option<usize> {
            self.trees.iter().position(|tree| tree.key == key && !tree.is_discarded)
        }

        fn oldest_unused(&self) -> Option<usize> {
            self.trees.iter().position(|tree| tree.leases == 0)
        }

        fn begin_ahead(&mut self, key: u8, size: StagedSize, free: StagedSize) -> BuildPermit<usize> {
            let unused = self.trees.iter().filter(|tree| tree.leases == 0 && !tree.awaits_run);
            let unused = unused.map(|tree| tree.size).fold(StagedSize::default(), StagedSize::plus);
            let used = self.total().minus(unused).plus(size);
            if !used.plus(used).fits(BUDGET) {
                return BuildPermit::NoRoom;
            }
            let permit = self.begin(key, size, free);
            if let (BuildPermit::Build(_), Some(begun)) = (&permit, self.building.last_mut()) {
                begun.2 = true;
            }
            permit
        }

        fn begin(&mut self, key: u8, size: StagedSize, free: StagedSize) -> BuildPermit<usize> {
            if self.position(key).is_some() || self.building.iter().any(|tree| tree.0 == key) {
                return BuildPermit::Exists;
            }
            let space = self.total().plus(free);
            let fits = |total: StagedSize| {
                total.fits(BUDGET)
                    && 2 * total.bytes <= space.bytes
                    && 2 * total.nodes <= space.nodes
                    && 2 * total.memory <= space.memory
            };
            let before = self.trees.clone();
            let mut removed = Vec::new();
            while !fits(self.total().plus(size)) {
                let Some(oldest) = self.oldest_unused() else {
                    self.trees = before;
                    return BuildPermit::NoRoom;
                };
                removed.push(self.trees.remove(oldest).number);
            }
            self.building.push((key, size, false));
            BuildPermit::Build(removed)
        }
    }

    proptest! {
        /// Leased trees stay, the others are evicted in the order of their last use, and the budget is never exceeded.
        #[test]
        fn the_index_follows_its_model(acts in proptest::collection::vec(act(), 0..200)) {
            let mut index = TreeIndex::new(BUDGET, 4);
            let mut model = Model::default();
            let mut ids = Vec::new();
            for act in acts {
                match act {
                    Act::Lease(key, runs) => {
                        let leased = if runs { index.lease(key) } else { index.lease_to_check(key) };
                        let position = model.position(key);
                        prop_assert_eq!(leased.map(|(_, number)| number), position.map(|at| model.trees[at].number));
                        if let Some(position) = position {
                            let mut tree = model.trees.remove(position);
                            tree.leases += 1;
                            tree.awaits_run &= !runs;
                            model.trees.push(tree);
                        }
                    }
                    Act::Release(number) => {
                        // Only leases that were taken are ended.
                        let leased = |tree: &ModelTree| tree.number == number && tree.leases > 0;
                        if let Some(at) = model.trees.iter().position(leased) {
                            model.trees[at].leases -= 1;
                            let goes = model.trees[at].leases == 0 && model.trees[at].is_discarded;
                            prop_assert_eq!(index.release(ids[number]), goes.then_some(number));
                            if goes {
                                model.trees.remove(at);
                            }
                        }
                    }
                    Act::Discard(number) => {
                        if let Some(at) = model.trees.iter().position(|tree| tree.number == number) {
                            model.trees[at].is_discarded = true;
                            let goes = model.trees[at].leases == 0;
                            prop_assert_eq!(index.discard(ids[number]), goes.then_some(number));
                            if goes {
                                model.trees.remove(at);
                            }
                        }
                    }
                    Act::Begin(key, size, free) => {
                        prop_assert_eq!(index.begin(key, size, free), model.begin(key, size, free));
                    }
                    Act::BeginAhead(key, size, free) => {
                        let begun = index.begin_ahead(key, size, free);
                        prop_assert_eq!(begun, model.begin_ahead(key, size, free));
                    }
                    Act::Finish(key) => {
                        let number = ids.len();
                        let finished = index.finish(key, number);
                        let at = model.building.iter().position(|tree| tree.0 == key);
                        prop_assert_eq!(finished.is_some(), at.is_some());
                        if let Some((at, id)) = at.zip(finished) {
                            ids.push(id);
                            let (key, size, awaits_run) = model.building.remove(at);
                            model.trees.push(ModelTree { key, number, size, leases: 1, is_discarded: false, awaits_run });
                        }
                    }
                    Act::Abandon(key) => {
                        index.abandon(key);
                        model.building.retain(|tree| tree.0 != key);
                    }
                    Act::TakeOldest => {
                        let oldest = model.oldest_unused().map(|at| model.trees.remove(at).number);
                        prop_assert_eq!(index.take_oldest_unused(), oldest);
                    }
                }
                prop_assert_eq!(index.charged, model.total());
                prop_assert!(index.charged.fits(BUDGET));
                let latest: Vec<_> = index.latest(100).map(|(_, key, _)| key).collect();
                let current = model.trees.iter().rev().filter(|tree| !tree.is_discarded);
                prop_assert_eq!(latest, current.map(|tree| tree.key).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn roots_that_did_not_become_trees_are_remembered_for_a_while() {
        let mut index = TreeIndex::<u8, ()>::new(BUDGET, 2);
        assert!(!index.note_seen(1) && index.note_seen(1));
        assert!(!index.note_seen(2) && !index.note_seen(3));
        assert!(!index.note_seen(1), "forgotten");
        assert!(index.note_seen(3));
    }

    #[test]
    fn after_many_large_deltas_over_a_tree_another_base_is_due() {
        let mut index = TreeIndex::new(BUDGET, 2);
        assert_eq!(index.begin(1, StagedSize::default(), PLENTY), BuildPermit::Build(vec![]));
        let id = index.finish(1, ()).unwrap();
        for _ in 0..3 {
            assert!((0..LARGE_DELTAS).all(|_| !index.is_tree_due(2, id) && !index.note_large_delta(id)));
            assert!(index.is_tree_due(2, id) && index.note_large_delta(id));
        }
    }
}
