//! [`SlotTable`]: finds the slot of a key.
//!
//! It consists of many small hash tables, because a hash table moves everything in it when it grows, and nothing can be looked up
//! meanwhile. The parts grow one at a time.

use super::Key;
use hashbrown::HashTable;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};

/// The number of parts. With ten million entries, a part has 160,000 of them and grows in some milliseconds.
const PARTS: usize = 64;

/// The slots of all entries.
pub(super) struct SlotTable {
    parts: Vec<HashTable<u32>>,
    hasher: RandomState,
    len: usize,
}

impl SlotTable {
    pub(super) fn new() -> Self {
        let parts = std::iter::repeat_with(HashTable::new).take(PARTS).collect();
        Self { parts, hasher: RandomState::new(), len: 0 }
    }

    /// The number of entries.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The slots of all entries, in no order.
    pub(super) fn iter(&self) -> impl Iterator<Item = u32> {
        self.parts.iter().flatten().copied()
    }

    /// The slots of entries that may be stored under this key, whatever the size of its digest.
    pub(super) fn like(&self, key: &Key) -> impl Iterator<Item = u32> {
        let hash = hash_without_size(&self.hasher, key);
        self.parts[part_of(hash)].iter_hash(hash).copied()
    }

    /// The slot of an entry under this key for which `is_it` holds.
    pub(super) fn find(&self, key: &Key, mut is_it: impl FnMut(u32) -> bool) -> Option<u32> {
        let hash = hash_without_size(&self.hasher, key);
        self.parts[part_of(hash)].find(hash, |&slot| is_it(slot)).copied()
    }

    /// Adds the slot of a key. `key_of` has the keys of all slots.
    pub(super) fn insert(&mut self, key: &Key, slot: u32, key_of: impl Fn(u32) -> Key) {
        let hasher = &self.hasher;
        let hash = hash_without_size(hasher, key);
        let part = &mut self.parts[part_of(hash)];
        part.insert_unique(hash, slot, |&slot| hash_without_size(hasher, &key_of(slot)));
        self.len += 1;
    }

    /// Removes the slot of a key.
    pub(super) fn remove(&mut self, key: &Key, slot: u32) {
        let hash = hash_without_size(&self.hasher, key);
        let part = &mut self.parts[part_of(hash)];
        if let Ok(found) = part.find_entry(hash, |&candidate| candidate == slot) {
            found.remove();
            self.len -= 1;
        }
    }

    /// Memory that it takes, in bytes.
    #[cfg(test)]
    pub(super) fn memory(&self) -> usize {
        self.parts.iter().map(HashTable::allocation_size).sum()
    }
}

/// The part of a hash. The tables themselves use its lowest and highest bits.
fn part_of(hash: u64) -> usize {
    (hash >> 50) as usize % PARTS
}

/// The hash of a key. The size is left out, so that an entry can be found by its hash alone.
fn hash_without_size(hasher: &RandomState, key: &Key) -> u64 {
    let Key { digest, instance, kind } = key;
    let mut state = hasher.build_hasher();
    state.write(digest.hash());
    state.write_u32(u32::from(instance.0) << 16 | (*kind as u32) << 8 | digest.function() as u32);
    state.finish()
}
