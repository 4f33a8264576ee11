//! [`Recovery`]: an index that is being filled with the files that are found at start.
//!
//! There may be ten million files, and nothing is served before they are known. So while files are found, entries are
//! only written one after the other, by the threads that find them. The steps that access memory at random are done
//! once, when all files are known: [`SlotTable::fill`](super::table::SlotTable::fill) puts the entries into the hash
//! tables, one table at a time, and then the list in the order of use is linked. The type ensures that an incomplete
//! index has no look-ups.

use super::{EntryKind, FileId, Index, LeaseTimes, Recovered, RunJobs, Stamp, Victim, slab::Slab};
use std::sync::{Mutex, PoisonError, atomic::Ordering::Relaxed};

/// See the module documentation.
pub(crate) struct Recovery {
    index: Mutex<Index>,
}

impl Recovery {
    /// Begins with an empty index; see [`Index::with_leases`].
    pub(crate) fn new(limit: u64, times: LeaseTimes, links: u64) -> Self {
        Self { index: Mutex::new(Index::with_leases(limit, times, links)) }
    }

    /// Adds files that were found.
    pub(crate) fn add(&self, found: &mut dyn Iterator<Item = Recovered>) {
        let (mut slab, mut used, mut counts) = (Slab::new(), 0, EntryKind::ALL.map(|kind| (kind, 0)));
        let (mut packed_blobs, mut packed_content, mut packed_used) = (0, 0, 0);
        for Recovered { file, bytes, touched } in found {
            used += bytes;
            if file.is_packed() {
                packed_blobs += 1;
                packed_content += file.key.digest.size();
                packed_used += bytes;
            }
            counts.iter_mut().filter(|(kind, _)| *kind == file.key.kind).for_each(|(_, count)| *count += 1);
            slab.add(file, bytes, Stamp::UNTRUSTED, touched);
        }
        let mut index = self.index.lock().unwrap_or_else(PoisonError::into_inner);
        index.slab.absorb(slab);
        index.totals.used += used;
        index.totals.packed_blobs += packed_blobs;
        index.totals.packed_content += packed_content;
        index.totals.packed_used += packed_used;
        counts.into_iter().for_each(|(kind, count)| *index.count_of(kind) += count);
    }

    /// Completes the index. Entries are put into the order of their recorded use, and recently used ones are leased.
    /// `now` is in seconds since 1970, and `uptime` is the clock of leases. Of two files for one entry, the newer one
    /// is kept; `is_newer` returns whether its first argument is newer than the second. The caller deletes the files
    /// that are returned.
    pub(crate) fn finish(
        self,
        run: RunJobs<'_>,
        is_newer: &dyn Fn(&FileId, &FileId) -> bool,
        now: u32,
        uptime: u32,
    ) -> (Index, Vec<Victim>) {
        let mut index = self.index.into_inner().unwrap_or_else(PoisonError::into_inner);
        let contested = index.table.fill(&index.slab, run);
        let losers = contested.into_iter().filter_map(|slot| index.settle_contest(slot, is_newer)).collect();
        let mut by_use: Vec<(u32, u32)> = Vec::with_capacity(index.table.len());
        let entries = index.slab.iter().filter(|(_, entry)| entry.generation != 0);
        by_use.extend(entries.map(|(slot, entry)| (entry.touched.load(Relaxed), slot)));
        // The stable sort is fast for entries that were found nearly in the order of their use.
        by_use.sort();
        by_use.iter().for_each(|(_, slot)| index.link_newest(*slot));
        index.lease_earlier(&by_use, now, uptime);
        (index, losers)
    }
}

impl Index {
    /// Decides about an entry that was not added to the table, because the table has entries that differ from it at
    /// most in the size of the digest. One of them may have to be removed. No entry is in the order of use yet.
    fn settle_contest(&mut self, slot: u32, is_newer: &dyn Fn(&FileId, &FileId) -> bool) -> Option<Victim> {
        let file = self.file_at(slot);
        let loser = match self.slot_of(&file.key) {
            Some(other) if is_newer(&self.file_at(other), &file) => Some(slot),
            Some(other) => Some(other),
            None => self
                .oldest_of_too_many(&file.key)
                .map(|oldest| if self.slab.hot(oldest).generation < file.generation { oldest } else { slot }),
        };
        if loser != Some(slot) {
            if let Some(other) = loser {
                self.table.remove(&self.slab.key(other), other);
            }
            self.table.insert(slot, &self.slab);
        }
        let loser = loser?;
        let victim = Victim { file: self.file_at(loser), bytes: self.slab.cold(loser).bytes };
        self.count_packed(loser, false);
        self.slab.free(loser);
        self.totals.used -= victim.bytes;
        *self.count_of(victim.file.key.kind) -= 1;
        Some(victim)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::{
        actors::cas::index::{EntryKind, Key, MAX_ALIKE},
        instance::InstanceId,
    };
    use gorego_reapi::digest::{Digest, DigestFunction};
    use proptest::prelude::*;
    use std::collections::HashMap;

    const NOW: u32 = 1_000_000;

    /// A file that is found: its key, the order in which it was stored, its bytes, and its last use.
    type Found = (Key, u32, u64, u32);

    fn key() -> impl Strategy<Value = Key> {
        let function = prop_oneof![
            6 => Just(DigestFunction::Sha256),
            1 => Just(DigestFunction::Sha512),
            1 => Just(DigestFunction::Md5),
        ];
        let kind = prop_oneof![
            3 => Just(EntryKind::Blob),
            2 => Just(EntryKind::Result),
            1 => Just(EntryKind::Zstd),
        ];
        let name = prop_oneof![1 => Just(0), 2 => 1u8..40];
        let size = prop_oneof![3 => 0i64..3, 2 => 0i64..20, 1 => (1i64 << 40)..(1 << 40) + 3];
        let instance = prop_oneof![4 => Just(0), 1 => Just(1)];
        (function, kind, name, size, instance).prop_map(|(function, kind, name, size, instance)| {
            let hash = function.digest(&[name]).hash_hex();
            let digest = Digest::parse(function, &hash, size).unwrap();
            Key { digest, instance: InstanceId(instance), kind }
        })
    }

    /// The files that are kept, and the files that are deleted.
    fn expected(found: &[(FileId, Found)]) -> (Vec<(FileId, Found)>, Vec<FileId>) {
        let (mut kept, mut lost): (Vec<(FileId, Found)>, Vec<FileId>) = (vec![], vec![]);
        for new @ (file, (key, stored, ..)) in found {
            match kept.iter_mut().find(|(_, (other, ..))| other == key) {
                Some((_, (_, other, ..))) if *other > *stored => lost.push(*file),
                Some(same) => lost.push(std::mem::replace(same, *new).0),
                None => kept.push(*new),
            }
        }
        let all = kept.clone();
        kept.retain(|(file, (key, ..))| {
            let is_newer_and_like = |(other, _): &&(FileId, Found)| {
                (other.key.instance, other.key.kind, other.key.digest.function(), other.key.digest.hash())
                    == (key.instance, key.kind, key.digest.function(), key.digest.hash())
                    && other.generation > file.generation
            };
            let stays =
                key.kind == EntryKind::Blob || all.iter().filter(is_newer_and_like).count() < MAX_ALIKE;
            lost.extend((!stays).then_some(*file));
            stays
        });
        (kept, lost)
    }

    proptest! {
        /// Files are found in any order and in parts of any size, and some keys have two or more files. The index has
        /// the newest file of each key, unless too many keys differ only in the size of the digest. The totals and the
        /// order of eviction are right.
        #[test]
        fn of_all_files_that_were_found_the_newest_of_each_key_are_recovered(
            found in proptest::collection::vec((key(), any::<u16>(), 1u64..50, 0u32..30), 0..400),
            at_once in 1usize..300,
        ) {
            // No two files were stored at the same moment. A blob that was moved has a greater generation than newer
            // ones.
            let found: Vec<(FileId, Found)> = (found.into_iter().enumerate())
                .map(|(at, (key, stored, bytes, touched))| {
                    let stored = u32::from(stored) << 10 | at as u32;
                    let generation = if key.kind == EntryKind::Blob { at as u64 + 1 } else { 1 << 30 | u64::from(stored) };
                    (FileId { key, generation }, (key, stored, bytes, touched))
                })
                .collect();
            let of: HashMap<FileId, Found> = found.iter().copied().collect();
            let is_newer = |one: &FileId, other: &FileId| of[one].1 > of[other].1;
            let recovery = Recovery::new(1 << 20, LeaseTimes::default(), 0);
            let recovered = |(file, (_, _, bytes, touched)): &(FileId, Found)| {
                Recovered { file: *file, bytes: *bytes, touched: *touched }
            };
            for part in found.chunks(at_once) {
                recovery.add(&mut part.iter().map(recovered));
            }
            let (mut index, losers) = recovery.finish(&in_turn, &is_newer, NOW, 0);

            let (kept, mut lost) = expected(&found);
            let mut gone: Vec<FileId> = losers.iter().map(|loser| loser.file).collect();
            gone.sort_by_key(|file| file.generation);
            lost.sort_by_key(|file| file.generation);
            prop_assert_eq!(gone, lost);
            prop_assert!(losers.iter().all(|loser| loser.bytes == of[&loser.file].2));
            for (file, _) in &found {
                let expected = kept.iter().find(|(_, (key, ..))| *key == file.key).map(|(file, _)| *file);
                let place = index.place_of(&file.key);
                prop_assert_eq!(place.and_then(|at| index.at(at)).map(|found| found.file), expected);
            }
            let totals = index.totals();
            let count = |kind| kept.iter().filter(|(file, _)| file.key.kind == kind).count() as u64;
            let of_kinds = [totals.blobs, totals.results, totals.zstd_forms];
            prop_assert_eq!(of_kinds, [EntryKind::Blob, EntryKind::Result, EntryKind::Zstd].map(count));
            prop_assert_eq!(totals.used, kept.iter().map(|(_, (_, _, bytes, _))| bytes).sum::<u64>());
            prop_assert_eq!((totals.deleting, totals.held, totals.reserved), (0, 0, 0));
            // Afterwards, the index works as usual: a new entry is added, and all entries are evicted in the order of
            // use.
            let new = Key { instance: InstanceId(9), ..found.first().map_or_else(some_key, |(file, _)| file.key) };
            let new = FileId { key: new, generation: 1 << 40 };
            index.reserve(1).unwrap();
            prop_assert_eq!(index.commit(new, 1, Stamp::UNTRUSTED, NOW), None);
            let evicted: Vec<FileId> =
                index.evict(u64::MAX, 0, &mut { super::super::HoldBudget::UNLIMITED }).into_iter().map(|victim| victim.file).collect();
            let uses: Vec<u32> =
                evicted.iter().map(|file| if *file == new { NOW } else { of[file].3 }).collect();
            prop_assert_eq!(evicted.len(), kept.len() + 1);
            prop_assert!(uses.is_sorted(), "{:?}", uses);
            prop_assert_eq!(index.totals().used, 0);
        }
    }

    /// Runs jobs one after the other, the last one first.
    pub(in super::super) fn in_turn(jobs: usize, job: &(dyn Fn(usize) + Sync)) {
        (0..jobs).rev().for_each(job);
    }

    fn some_key() -> Key {
        let digest = DigestFunction::Sha256.digest(b"");
        Key { digest, instance: InstanceId(0), kind: EntryKind::Blob }
    }

    /// The tables get full to any degree, and some grow while they are filled. The parts in which files are found
    /// differ in size from the chunks of the slab.
    #[test]
    fn a_recovered_index_finds_everything_and_takes_no_more_memory_than_any_other() {
        let empty = Index::with_leases(1 << 40, LeaseTimes::default(), 0).memory() as u64;
        let found = |generation: u64| {
            let digest = DigestFunction::Sha256.digest(&generation.to_le_bytes());
            let file = FileId { key: Key { digest, ..some_key() }, generation };
            Recovered { file, bytes: 1, touched: NOW }
        };
        for count in [28_672u64, 32_768, 57_344, 61_440] {
            let recovery = Recovery::new(1 << 40, LeaseTimes::default(), 0);
            let all: Vec<u64> = (1..=count).collect();
            for (part, length) in all.chunks(13_000).zip([13_000, 1, 5_000, 9_000, 13_000]) {
                part.chunks(length).for_each(|part| recovery.add(&mut part.iter().map(|at| found(*at))));
            }
            let (index, losers) = recovery.finish(&in_turn, &|_, _| false, NOW, 0);
            assert!(losers.is_empty() && index.totals().blobs == count);
            let is_there = |at: &u64| {
                let Recovered { file, .. } = found(*at);
                index.entry_of(&file).and_then(|at| index.at(at)).is_some_and(|found| found.file == file)
            };
            assert!(all.iter().all(is_there));
            let each = (index.memory() as u64 - empty) as f64 / count as f64;
            assert!(each <= 100.0, "{each} bytes for each of {count}");
        }
    }
}
