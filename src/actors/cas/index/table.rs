//! [`SlotTable`]: finds the slot of a key.
//!
//! It consists of many small hash tables, the parts, which grow one at a time. A hash table moves all of its entries
//! when it grows, and nothing can be looked up meanwhile.

use super::{Key, entry::parts_of, slab::Slab};
use hashbrown::{HashTable, hash_table::Entry};
use std::{
    hash::{BuildHasher as _, Hasher as _, RandomState},
    ops::Range,
    sync::{Mutex, OnceLock, PoisonError},
};

/// The number of parts. With ten million entries, a part has 160,000 of them and grows in a few milliseconds.
const PARTS: usize = 64;
/// Number of jobs that fill a table at the same time, each a part of it. With more jobs, memory would be the limit.
const JOBS: usize = 4;
/// Slots that are sorted by part before they are added. This takes 16 MiB, and a part stays in the cache for 16,000 of
/// them.
const FILL_AT_ONCE: usize = if cfg!(test) { 64 } else { 1 << 20 };

/// Runs this many jobs, each given its number, at the same time if it can. Returns when all of them have ended.
pub(crate) type RunJobs<'a> = &'a dyn Fn(usize, &(dyn Fn(usize) + Sync));

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

    /// Adds all entries of a slab to an empty table. Returns, in order, the slots that were not added because the table
    /// has an entry whose key differs at most in the size of the digest.
    pub(super) fn fill(&mut self, slab: &Slab, run: RunJobs<'_>) -> Vec<u32> {
        let (hasher, len) = (&self.hasher, slab.len());
        let hash_of = |slot: u32| hash_of_entry(hasher, slab, slot);
        for part in &mut self.parts {
            part.reserve(len / PARTS, |&slot| hash_of(slot));
        }
        // Each job has its own parts, so no job waits for another one.
        let parts: Vec<_> =
            self.parts.chunks_mut(PARTS / JOBS).map(|parts| Mutex::new((parts, Vec::new()))).collect();
        for start in (0..len).step_by(FILL_AT_ONCE) {
            let end = len.min(start + FILL_AT_ONCE);
            let share = (end - start).div_ceil(JOBS);
            let sorted: Vec<_> = std::iter::repeat_with(OnceLock::new).take(JOBS).collect();
            let sorted_by = |job: usize| {
                let from = end.min(start + job * share);
                sorted[job].get_or_init(|| sort_by_part(from..end.min(from + share), hash_of))
            };
            run(JOBS, &|job| _ = sorted_by(job));
            run(JOBS, &|job| {
                let (parts, refused) = &mut *parts[job].lock().unwrap_or_else(PoisonError::into_inner);
                for (part, number) in parts.iter_mut().zip(job * (PARTS / JOBS)..) {
                    let slots = (0..JOBS).flat_map(|job| &sorted_by(job)[number]);
                    fill_part(part, slots, refused, slab, hash_of);
                }
            });
        }
        let refused =
            |part: Mutex<(_, Vec<u32>)>| part.into_inner().unwrap_or_else(PoisonError::into_inner).1;
        let mut refused: Vec<u32> = parts.into_iter().flat_map(refused).collect();
        refused.sort_unstable();
        self.len = self.parts.iter().map(HashTable::len).sum();
        refused
    }

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

/// Adds slots to a part. Returns the slots that cannot be added.
fn fill_part<'a>(
    part: &mut HashTable<u32>,
    slots: impl Iterator<Item = &'a (u64, u32)>,
    refused: &mut Vec<u32>,
    slab: &Slab,
    hash_of: impl Fn(u32) -> u64,
) {
    for &(hash, slot) in slots {
        let is_like = |other: &u32| slab.hot(*other).is_like_entry(slab.hot(slot), &slab.tails);
        match part.entry(hash, is_like, |&slot| hash_of(slot)) {
            Entry::Vacant(place) => _ = place.insert(slot),
            Entry::Occupied(_) => refused.push(slot),
        }
    }
}

/// The hash of a key. The size is left out, so that an entry can be found by its hash alone.
fn hash_without_size(hasher: &RandomState, key: &Key) -> u64 {
    let (hash, names) = parts_of(key);
    hash_of_parts(hasher, hash, names)
}

/// The hash of the key of an entry, without its size.
fn hash_of_entry(hasher: &RandomState, slab: &Slab, slot: u32) -> u64 {
    slab.hot(slot).with_parts(&slab.tails, |hash, names| hash_of_parts(hasher, hash, names))
}

fn hash_of_parts(hasher: &RandomState, hash: &[u8], names: u32) -> u64 {
    let mut state = hasher.build_hasher();
    state.write(hash);
    state.write_u32(names);
    state.finish()
}
