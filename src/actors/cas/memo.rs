//! [`Memo`]: a cache of decoded, immutable values, bounded by their weight in bytes.
//!
//! Two generations approximate the order of use. A value that is used moves to the young generation. When the young
//! generation reaches half of the budget, it replaces the old one, which is dropped. Every operation takes constant
//! time, and there is no linked list to maintain.
//!
//! The locks stay in this file and are held for one map operation. A memo never decides whether a blob is stored: only
//! the index does.

use std::{
    collections::HashMap,
    hash::{BuildHasher, Hash, RandomState},
    sync::{Mutex, MutexGuard, PoisonError},
};

/// Shards, so that threads that stage inputs at the same time seldom contend for one lock.
const SHARDS: usize = 8;
/// A value heavier than `1 / LARGEST_PART` of a shard is not kept: it would displace too many others.
const LARGEST_PART: usize = 4;

/// A bounded cache; see the module documentation.
pub(super) struct Memo<K, V> {
    shards: Vec<Mutex<MemoShard<K, V>>>,
    hasher: RandomState,
    /// The budget of each shard, in bytes.
    budget: usize,
}

struct MemoShard<K, V> {
    young: HashMap<K, (V, usize)>,
    old: HashMap<K, (V, usize)>,
    young_weight: usize,
}

impl<K: Hash + Eq + Clone, V: Clone> Memo<K, V> {
    /// An empty memo that holds at most about `budget` bytes.
    pub(super) fn new(budget: usize) -> Self {
        Self::with_shards(budget, SHARDS)
    }

    /// An empty memo for few, heavy values: each may weigh up to `1 / LARGEST_PART` of the budget.
    pub(super) fn unsharded(budget: usize) -> Self {
        Self::with_shards(budget, 1)
    }

    fn with_shards(budget: usize, shards: usize) -> Self {
        let shard = || MemoShard { young: HashMap::default(), old: HashMap::default(), young_weight: 0 };
        Self {
            shards: (0..shards).map(|_| Mutex::new(shard())).collect(),
            hasher: RandomState::new(),
            budget: budget / shards,
        }
    }

    /// The value of a key, if it is cached.
    pub(super) fn get(&self, key: &K) -> Option<V> {
        let mut shard = self.shard(key);
        if let Some((value, _)) = shard.young.get(key) {
            return Some(value.clone());
        }
        let (value, weight) = shard.old.remove(key)?;
        self.put(&mut shard, key.clone(), value.clone(), weight);
        Some(value)
    }

    /// Caches a value that takes about `weight` bytes.
    pub(super) fn insert(&self, key: K, value: V, weight: usize) {
        if weight <= self.budget / LARGEST_PART {
            let mut shard = self.shard(&key);
            shard.old.remove(&key);
            self.put(&mut shard, key, value, weight);
        }
    }

    #[cfg(test)]
    pub(super) fn clear(&self) {
        for shard in &self.shards {
            let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            (shard.young, shard.old, shard.young_weight) = Default::default();
        }
    }

    fn put(&self, shard: &mut MemoShard<K, V>, key: K, value: V, weight: usize) {
        if shard.young_weight + weight > self.budget / 2 {
            shard.old = std::mem::take(&mut shard.young);
            shard.young_weight = 0;
        }
        shard.young_weight += weight;
        if let Some((_, replaced)) = shard.young.insert(key, (value, weight)) {
            shard.young_weight -= replaced;
        }
    }

    fn shard(&self, key: &K) -> MutexGuard<'_, MemoShard<K, V>> {
        let at = self.hasher.hash_one(key) as usize % self.shards.len();
        // A poisoned lock is fine: a map operation does not panic halfway, and a lost value is only looked up again.
        self.shards[at].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K, V> std::fmt::Debug for Memo<K, V> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Memo").field("budget", &self.budget).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn used_values_stay_and_the_weight_is_bounded() {
        let budget = 8_000;
        let memo = Memo::new(budget);
        for n in 0..10_000u32 {
            memo.insert(n, n, 100);
            assert_eq!(memo.get(&0), Some(0), "used all the time, after {n}");
        }
        let kept = (0..10_000u32).filter(|n| memo.get(n).is_some()).count();
        assert!(kept * 100 <= budget, "{kept} are kept");
        memo.insert(1, 1, budget);
        assert_eq!(memo.get(&1), None, "too heavy to keep");
    }
}
