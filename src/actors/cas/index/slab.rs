//! [`Slab`]: the memory of the entries.
//!
//! It grows by chunks of a fixed size. So an entry never moves, growing takes microseconds for any number of entries,
//! and at most one chunk is unused.

use super::{
    FileId, Key, Stamp,
    entry::{Cold, Hot, KeyTails},
    order::NIL,
};
use std::sync::atomic::AtomicU32;

/// Entries of a chunk, which takes 352 KiB.
const CHUNK: usize = 4_096;

/// The entries, each at a slot.
pub(super) struct Slab {
    hot: Vec<Vec<Hot>>,
    cold: Vec<Vec<Cold>>,
    pub(super) tails: KeyTails,
    /// The first free slot.
    free: u32,
    /// The number of slots that were ever used.
    len: usize,
}

impl Slab {
    pub(super) fn new() -> Self {
        Self { hot: Vec::new(), cold: Vec::new(), tails: KeyTails::default(), free: NIL, len: 0 }
    }

    /// The number of slots that were ever used.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn hot(&self, slot: u32) -> &Hot {
        &self.hot[slot as usize / CHUNK][slot as usize % CHUNK]
    }

    pub(super) fn hot_mut(&mut self, slot: u32) -> &mut Hot {
        &mut self.hot[slot as usize / CHUNK][slot as usize % CHUNK]
    }

    pub(super) fn cold(&self, slot: u32) -> &Cold {
        &self.cold[slot as usize / CHUNK][slot as usize % CHUNK]
    }

    pub(super) fn cold_mut(&mut self, slot: u32) -> &mut Cold {
        &mut self.cold[slot as usize / CHUNK][slot as usize % CHUNK]
    }

    /// The entry in a slot, if the slot exists.
    pub(super) fn get(&self, slot: u32) -> Option<&Hot> {
        self.hot.get(slot as usize / CHUNK)?.get(slot as usize % CHUNK)
    }

    /// The key of the entry in a slot.
    pub(super) fn key(&self, slot: u32) -> Key {
        self.hot(slot).key(&self.tails)
    }

    /// Adds an entry that is not in the list yet, and returns its slot.
    pub(super) fn add(&mut self, file: FileId, bytes: u64, stamp: Stamp, touched: u32) -> u32 {
        let FileId { key, generation } = file;
        let hot = Hot::new(&key, generation, touched, &mut self.tails);
        let cold = Cold { bytes, seal: stamp.seal(), prev: AtomicU32::new(NIL), next: NIL };
        if self.free != NIL {
            let slot = self.free;
            self.free = self.cold(slot).next;
            (*self.hot_mut(slot), *self.cold_mut(slot)) = (hot, cold);
            return slot;
        }
        self.push(hot, cold)
    }

    /// Takes over the entries of another slab. No slot is free in either of them. Full chunks are moved as they are.
    pub(super) fn absorb(&mut self, mut other: Self) {
        let tails = self.tails.append(std::mem::take(&mut other.tails));
        if !tails.is_empty() {
            other.hot.iter_mut().flatten().for_each(|entry| entry.renumber_tail(tails.start));
        }
        let (own, rest) = (self.pop_partial(), other.pop_partial());
        self.hot.append(&mut other.hot);
        self.cold.append(&mut other.cold);
        self.len += other.len;
        if let Some((hot, cold)) = own {
            self.len += hot.len();
            self.hot.push(hot);
            self.cold.push(cold);
        }
        for (hot, cold) in rest.into_iter().flat_map(|(hot, cold)| hot.into_iter().zip(cold)) {
            self.push(hot, cold);
        }
    }

    /// All slots that were ever used.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &Hot)> {
        (0..).zip(self.hot.iter().flatten())
    }

    fn push(&mut self, hot: Hot, cold: Cold) -> u32 {
        if self.len.is_multiple_of(CHUNK) {
            self.hot.push(Vec::with_capacity(CHUNK));
            self.cold.push(Vec::with_capacity(CHUNK));
        }
        let chunk = self.len / CHUNK;
        self.hot[chunk].push(hot);
        self.cold[chunk].push(cold);
        self.len += 1;
        (self.len - 1) as u32
    }

    /// Removes and returns the last chunk, unless it is full.
    fn pop_partial(&mut self) -> Option<(Vec<Hot>, Vec<Cold>)> {
        if self.len.is_multiple_of(CHUNK) {
            return None;
        }
        let chunk = self.hot.pop().zip(self.cold.pop())?;
        self.len -= chunk.0.len();
        Some(chunk)
    }

    /// Frees the slot of an entry that is in no list any more.
    pub(super) fn free(&mut self, slot: u32) {
        let Self { hot, tails, .. } = self;
        hot[slot as usize / CHUNK][slot as usize % CHUNK].free(tails);
        self.cold_mut(slot).next = self.free;
        self.free = slot;
    }

    /// Memory that it takes, in bytes.
    pub(super) fn memory(&self) -> usize {
        let hot = self.hot.iter().map(|chunk| chunk.capacity() * size_of::<Hot>()).sum::<usize>();
        let cold = self.cold.iter().map(|chunk| chunk.capacity() * size_of::<Cold>()).sum::<usize>();
        let chunks = (self.hot.capacity() + self.cold.capacity()) * size_of::<Vec<Hot>>();
        hot + cold + chunks + self.tails.memory()
    }
}
