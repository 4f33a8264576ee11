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
    /// Bytes that the files take on disk.
    pub bytes: u64,
    /// Files, directories and links.
    pub nodes: u64,
    /// Bytes of memory that the Directories take.
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

    /// Leases the tree with this id, if it can still be leased. The lease does not count as a use.
    pub fn lease_aside(&mut self, id: TreeId) -> Option<T> {
        let entry = self.trees.get_mut(&id).filter(|entry| entry.is_current)?;
        entry.leases += 1;
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
        self.permit(key, TreeInConstruction { size, is_ahead: false }, free)
    }

    fn permit(&mut self, key: K, tree: TreeInConstruction, free: StagedSize) -> BuildPermit<T> {
        let size = tree.size;
        if self.current.contains_key(&key) || self.building.contains_key(&key) {
            return BuildPermit::Exists;
        }
        let half_of_free = self.charged.with(free, |charged, free| charged.saturating_add(free) / 2);
        let budget = self.budget.with(half_of_free, u64::min);
        if !self.room_without(|entry| entry.leases == 0).plus(size).fits(budget) {
            return BuildPermit::NoRoom;
        }
        let mut removed = Vec::new();
        while !self.charged.plus(size).fits(budget) {
            let Some(oldest) = self.take_oldest_unused() else { break };
            removed.push(oldest);
        }
        self.charged = self.charged.plus(size);
        self.building.insert(key, tree);
        BuildPermit::Build(removed)
    }

    /// Like [`TreeIndex::begin`], for a tree that no action needs yet. It gets room only if it, the trees in use and
    /// those that still await their runs take at most half of the budget. So these trees do not evict each other, and
    /// leave room for actions that run before. A tree whose run never comes counts until it is evicted.
    pub fn begin_ahead(&mut self, key: K, size: StagedSize, free: StagedSize) -> BuildPermit<T> {
        let half = self.budget.with(self.budget, |budget, _| budget / 2);
        if !self.room_without(|entry| entry.leases == 0 && !entry.awaits_run).plus(size).fits(half) {
            return BuildPermit::NoRoom;
        }
        self.permit(key, TreeInConstruction { size, is_ahead: true }, free)
    }

    /// The room of the trees without those that `is_left_out` matches. Trees that are being built count.
    fn room_without(&self, is_left_out: impl Fn(&StagedEntry<K, T>) -> bool) -> StagedSize {
        let left_out = self.trees.values().filter(|entry| is_left_out(entry));
        self.charged.minus(left_out.fold(StagedSize::default(), |sum, entry| sum.plus(entry.size)))
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
mod tests;
