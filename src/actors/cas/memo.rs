//! [`Memo`]: decoded, immutable things kept at hand, bounded by their weight in bytes.
//!
//! Two generations stand in for an exact order of use: what is used moves to the young one, and when the young one has
//! half of the budget, the old one is dropped and the young one takes its place. Anything used since the last two turns
//! is kept, every operation takes constant time, and there are no links to maintain.
//!
//! The locks stay in this file and are held for a map operation only. It never decides whether a thing is stored: that is
//! the index's to say.

use std::{
    collections::HashMap,
    hash::{BuildHasher, Hash, RandomState},
    sync::{Mutex, MutexGuard, PoisonError},
};

/// So that threads that stage inputs at the same time seldom meet.
const SHARDS: usize = 8;
/// A thing heavier than this part of its shard is not kept: it would push out too much.
const LARGEST_PART: usize = 4;

/// A bounded cache; see the top of this file.
pub struct Memo<K, V> {
    shards: Vec<Mutex<Shard<K, V>>>,
    hasher: RandomState,
    budget: usize,
}

struct Shard<K, V> {
    young: HashMap<K, (V, usize)>,
    old: HashMap<K, (V, usize)>,
    young_weight: usize,
}

impl<K: Hash + Eq + Clone, V: Clone> Memo<K, V> {
    /// An empty memo that holds about `budget` bytes at most.
    pub fn new(budget: usize) -> Self {
        let shard = || Shard { young: HashMap::default(), old: HashMap::default(), young_weight: 0 };
        Self {
            shards: (0..SHARDS).map(|_| Mutex::new(shard())).collect(),
            hasher: RandomState::new(),
            budget,
        }
    }

    /// What is kept under a key.
    pub fn get(&self, key: &K) -> Option<V> {
        let mut shard = self.shard(key);
        if let Some((value, _)) = shard.young.get(key) {
            return Some(value.clone());
        }
        let (value, weight) = shard.old.remove(key)?;
        self.put(&mut shard, key.clone(), value.clone(), weight);
        Some(value)
    }

    /// Keeps a thing that takes about `weight` bytes.
    pub fn insert(&self, key: K, value: V, weight: usize) {
        if weight <= self.budget / LARGEST_PART / SHARDS {
            let mut shard = self.shard(&key);
            shard.old.remove(&key);
            self.put(&mut shard, key, value, weight);
        }
    }

    /// Forgets everything.
    #[cfg(test)]
    pub fn clear(&self) {
        for shard in &self.shards {
            let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            (shard.young, shard.old, shard.young_weight) = Default::default();
        }
    }

    fn put(&self, shard: &mut Shard<K, V>, key: K, value: V, weight: usize) {
        if shard.young_weight + weight > self.budget / SHARDS / 2 {
            shard.old = std::mem::take(&mut shard.young);
            shard.young_weight = 0;
        }
        shard.young_weight += weight;
        if let Some((_, replaced)) = shard.young.insert(key, (value, weight)) {
            shard.young_weight -= replaced;
        }
    }

    fn shard(&self, key: &K) -> MutexGuard<'_, Shard<K, V>> {
        let at = self.hasher.hash_one(key) as usize % SHARDS;
        // A map operation does not panic half-way; and what is lost here is only looked up again.
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
    fn what_is_used_stays_and_the_weight_is_bounded() {
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
