//! [`SlotTable`]: finds the slot of a key.
//!
//! It consists of many small hash tables, because a hash table moves everything in it when it grows, and nothing can be looked up
//! meanwhile. The parts grow one at a time.

use super::{Key, entry::parts_of, slab::Slab};
use hashbrown::{HashTable, hash_table::Entry};
use std::{
    hash::{BuildHasher as _, Hasher as _, RandomState},
    ops::Range,
    thread,
};

/// The number of parts. With ten million entries, a part has 160,000 of them and grows in some milliseconds.
const PARTS: usize = 64;
/// Threads that fill a table. With more, the memory would be the limit.
const MAX_FILL_THREADS: usize = 4;
/// Slots that are sorted by part before they are added. This takes 16 MiB, and a part stays in the cache for 16,000 of them.
const FILL_AT_ONCE: usize = if cfg!(test) { 64 } else { 1 << 20 };

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

    /// Adds the slot of an entry.
    pub(super) fn insert(&mut self, slot: u32, slab: &Slab) {
        let hasher = &self.hasher;
        let hash = hash_of_entry(hasher, slab, slot);
        let part = &mut self.parts[part_of(hash)];
        part.insert_unique(hash, slot, |&slot| hash_of_entry(hasher, slab, slot));
        self.len += 1;
    }

    /// Adds all entries of a slab to an empty table. Returns the slots that were not added, in order, because another one was there
    /// whose key differs at most in the size of the digest.
    pub(super) fn fill(&mut self, slab: &Slab) -> Vec<u32> {
        let (hasher, len) = (&self.hasher, slab.len());
        let hash_of = |slot: u32| hash_of_entry(hasher, slab, slot);
        let threads = thread::available_parallelism().map_or(1, usize::from).min(MAX_FILL_THREADS);
        let mut refused = Vec::new();
        for part in &mut self.parts {
            part.reserve(len / PARTS, |&slot| hash_of(slot));
        }
        for start in (0..len).step_by(FILL_AT_ONCE) {
            let slots = start..len.min(start + FILL_AT_ONCE);
            let share = slots.len().div_ceil(threads);
            let shares = slots.clone().step_by(share).map(|from| from..slots.end.min(from + share));
            let sorted: Vec<_> = thread::scope(|scope| {
                let sort = |share| scope.spawn(move || sort_by_part(share, hash_of));
                let running: Vec<_> = shares.map(sort).collect();
                running.into_iter().map(outcome_of).collect()
            });
            thread::scope(|scope| {
                let of_thread = self.parts.chunks_mut(PARTS.div_ceil(threads)).enumerate();
                let fill = |(nth, parts)| {
                    let (sorted, first) = (&sorted, nth * PARTS.div_ceil(threads));
                    scope.spawn(move || fill_parts(parts, first, sorted, slab, hash_of))
                };
                let running: Vec<_> = of_thread.map(fill).collect();
                refused.extend(running.into_iter().flat_map(outcome_of));
            });
        }
        self.len = self.parts.iter().map(HashTable::len).sum();
        refused.sort_unstable();
        refused
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
    pub(super) fn memory(&self) -> usize {
        self.parts.iter().map(HashTable::allocation_size).sum()
    }
}

/// The part of a hash. The tables themselves use its lowest and highest bits.
fn part_of(hash: u64) -> usize {
    (hash >> 50) as usize % PARTS
}

/// The outcome of a thread. If it has panicked, so does this one: an entry that is left out would be taken for missing.
fn outcome_of<T>(thread: thread::ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// The hashes of these slots, by part.
fn sort_by_part(slots: Range<usize>, hash_of: impl Fn(u32) -> u64) -> Vec<Vec<(u64, u32)>> {
    let expected = slots.len() / PARTS;
    let part = || Vec::with_capacity(expected + expected / 8);
    let mut sorted: Vec<Vec<_>> = std::iter::repeat_with(part).take(PARTS).collect();
    for slot in slots {
        let hash = hash_of(slot as u32);
        sorted[part_of(hash)].push((hash, slot as u32));
    }
    sorted
}

/// Adds slots to some of the parts, of which the first has this number. Returns those that were not added.
fn fill_parts(
    parts: &mut [HashTable<u32>],
    first: usize,
    sorted: &[Vec<Vec<(u64, u32)>>],
    slab: &Slab,
    hash_of: impl Fn(u32) -> u64,
) -> Vec<u32> {
    let mut refused = Vec::new();
    for (part, number) in parts.iter_mut().zip(first..) {
        for &(hash, slot) in sorted.iter().flat_map(|sorted| &sorted[number]) {
            let is_like = |other: &u32| slab.hot(*other).is_like_entry(slab.hot(slot), &slab.tails);
            match part.entry(hash, is_like, |&slot| hash_of(slot)) {
                Entry::Vacant(place) => _ = place.insert(slot),
                Entry::Occupied(_) => refused.push(slot),
            }
        }
    }
    refused
}

/// The hash of a key. The size is left out, so that an entry can be found by its hash alone.
fn hash_without_size(hasher: &RandomState, key: &Key) -> u64 {
    let (hash, names) = parts_of(key);
    hash_of_parts(hasher, hash, names)
}

/// The same for the key of an entry.
fn hash_of_entry(hasher: &RandomState, slab: &Slab, slot: u32) -> u64 {
    slab.hot(slot).with_parts(&slab.tails, |hash, names| hash_of_parts(hasher, hash, names))
}

fn hash_of_parts(hasher: &RandomState, hash: &[u8], names: u32) -> u64 {
    let mut state = hasher.build_hasher();
    state.write(hash);
    state.write_u32(names);
    state.finish()
}
