//! [`ImageIndex`]: records which images are unpacked and in use, and which are evicted first. Pure.
//!
//! The unpacked size of an image is only known at its end, so the image takes its part of the budget step by step.
//! Leased images stay. The others are evicted in the order of their last use if another image needs the room. So all
//! images together, including those that are being unpacked, never take more than the budget.
//!
//! The caller of a method that evicts entries removes them from the disk afterwards. Until it calls
//! [`ImageIndex::left`], none of them can begin again, so its name on the disk is never used twice at a time.
//!
//! Spare entries are kept as long as no other entry needs their room: they are evicted before all others, and only take
//! free room.

use crate::disk::BudgetUse;
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    hash::Hash,
};

/// Entries that were evicted, in this order.
pub(super) type Evicted<K, T> = Vec<(K, T)>;

/// The answer to a request for more room.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Growth<K, T> {
    /// There is room after these entries are removed.
    Yes(Evicted<K, T>),
    /// The image alone is larger than the budget.
    Never,
    /// Images that are in use leave no room now.
    NotNow,
}

/// Identifies one copy of an image. An image that was discarded and unpacked again is another copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CopyId(u64);

/// The unpacked images `T` by key.
#[derive(Debug)]
pub(super) struct ImageIndex<K, T> {
    budget: u64,
    charged: u64,
    images: HashMap<K, ImageEntry<T>>,
    /// The keys of all images: spare ones first, then in the order of their last use. The numbers are unique.
    order: BTreeMap<EvictionRank, K>,
    last_use: u64,
    unpacking: HashMap<K, Unpacking>,
    /// The evicted entries that may still be on the disk under their names.
    leaving: HashSet<K>,
    copies: u64,
}

/// An image that is being unpacked.
#[derive(Debug, Default)]
struct Unpacking {
    /// The bytes of the budget that it has taken.
    charged: u64,
    /// The bytes that were received for it.
    received: u64,
}

/// A key that may stand for a spare entry.
pub(super) trait Spare {
    /// Whether the entry is kept only as long as no other entry needs its room.
    fn is_spare(&self) -> bool;
}

/// The position of an image in the order of eviction. Entries that are not spare have the greater position.
type EvictionRank = (bool, u64);

#[derive(Debug)]
struct ImageEntry<T> {
    image: T,
    copy: CopyId,
    bytes: u64,
    leases: usize,
    rank: EvictionRank,
}

impl<K: Clone + Eq + Hash + Spare, T: Clone> ImageIndex<K, T> {
    /// The number of images, and the space that they take, including spare entries and images that are being unpacked.
    pub(super) fn usage(&self) -> BudgetUse {
        let images = self.images.keys().filter(|key| !key.is_spare());
        BudgetUse { count: images.count() as u64, bytes: self.charged, max_bytes: self.budget }
    }

    pub(super) fn new(budget: u64) -> Self {
        Self {
            budget,
            charged: 0,
            images: HashMap::new(),
            order: BTreeMap::new(),
            last_use: 0,
            unpacking: HashMap::new(),
            leaving: HashSet::new(),
            copies: 0,
        }
    }

    /// Leases an image, if there is one.
    pub(super) fn lease(&mut self, key: &K) -> Option<(CopyId, T)> {
        let entry = self.images.get_mut(key)?;
        entry.leases += 1;
        self.order.remove(&entry.rank);
        self.last_use += 1;
        entry.rank.1 = self.last_use;
        self.order.insert(entry.rank, key.clone());
        Some((entry.copy, entry.image.clone()))
    }

    /// Ends a lease of this copy.
    pub(super) fn release(&mut self, key: &K, copy: CopyId) {
        if let Some(entry) = self.images.get_mut(key).filter(|entry| entry.copy == copy) {
            entry.leases = entry.leases.saturating_sub(1);
        }
    }

    /// Begins to unpack an image, unless it is unpacked, being unpacked or leaving the disk. Returns whether the
    /// caller may unpack it; if so, it must call [`ImageIndex::finish`] or [`ImageIndex::abandon`] afterwards.
    pub(super) fn begin(&mut self, key: &K) -> bool {
        let is_new = !self.images.contains_key(key)
            && !self.unpacking.contains_key(key)
            && !self.leaving.contains(key);
        if is_new {
            self.unpacking.insert(key.clone(), Unpacking::default());
        }
        is_new
    }

    /// Whether this many more bytes fit without removing anything.
    pub(super) fn has_room(&self, bytes: u64) -> bool {
        self.charged.saturating_add(bytes) <= self.budget
    }

    /// Takes room for more bytes of an image that is being unpacked.
    pub(super) fn grow(&mut self, key: &K, bytes: u64) -> Growth<K, T> {
        let Some(own) = self.unpacking.get_mut(key) else { return Growth::NotNow };
        let grown = own.charged.saturating_add(bytes);
        if grown > self.budget {
            return Growth::Never;
        }
        let unused = self.images.values().filter(|entry| entry.leases == 0);
        let evictable =
            if key.is_spare() { 0 } else { unused.fold(0u64, |sum, entry| sum.saturating_add(entry.bytes)) };
        let needed = self.charged.saturating_add(bytes);
        if needed.saturating_sub(evictable) > self.budget {
            return Growth::NotNow;
        }
        own.charged = grown;
        self.charged = needed;
        Growth::Yes(self.evict_while(|index| index.charged > index.budget))
    }

    /// Adds an unpacked image, and leases it.
    pub(super) fn finish(&mut self, key: &K, image: T) -> Option<CopyId> {
        let bytes = self.unpacking.remove(key)?.charged;
        Some(self.insert(key.clone(), image, bytes, 1))
    }

    /// How many bytes an image that is being unpacked has taken.
    pub(super) fn taken(&self, key: &K) -> u64 {
        self.unpacking.get(key).map_or(0, |own| own.charged)
    }

    /// Records how many bytes were received for an entry that is being unpacked.
    pub(super) fn note_received(&mut self, key: &K, bytes: u64) {
        if let Some(own) = self.unpacking.get_mut(key) {
            own.received = bytes;
        }
    }

    /// How many bytes were received for an entry; 0 if it is not being unpacked.
    pub(super) fn received(&self, key: &K) -> u64 {
        self.unpacking.get(key).map_or(0, |own| own.received)
    }

    /// Releases the room of an image that could not be unpacked.
    pub(super) fn abandon(&mut self, key: &K) {
        if let Some(own) = self.unpacking.remove(key) {
            self.charged -= own.charged;
        }
    }

    /// Adds an image of an earlier run as the most recently used one. Returns the entries that must be removed for it,
    /// possibly itself.
    pub(super) fn restore(&mut self, key: K, image: T, bytes: u64) -> Evicted<K, T> {
        if self.images.contains_key(&key) || bytes > self.budget {
            return vec![(key, image)];
        }
        self.charged = self.charged.saturating_add(bytes);
        self.insert(key, image, bytes, 0);
        self.evict_while(|index| index.charged > index.budget)
    }

    /// Discards a copy that is no longer on disk, even if it is in use.
    pub(super) fn forget(&mut self, key: &K, copy: CopyId) {
        if self.images.get(key).is_some_and(|entry| entry.copy == copy) {
            self.remove(key);
        }
    }

    /// Takes out a copy that is damaged, even if it is in use. The caller must remove it.
    pub(super) fn discard(&mut self, key: &K, copy: CopyId) -> Evicted<K, T> {
        let is_same = self.images.get(key).is_some_and(|entry| entry.copy == copy);
        let image = if is_same { self.remove(key) } else { None };
        image.map_or_else(Vec::new, |image| {
            self.leaving.insert(key.clone());
            vec![(key.clone(), image)]
        })
    }

    /// Takes out all unused images. The caller must remove them.
    pub(super) fn take_unused(&mut self) -> Evicted<K, T> {
        self.evict_while(|_| true)
    }

    /// Takes out unused images, the oldest first.
    fn evict_while(&mut self, is_needed: impl Fn(&Self) -> bool) -> Evicted<K, T> {
        let mut evicted = Vec::new();
        while is_needed(self)
            && let Some(oldest) = self.oldest_unused()
            && let Some(image) = self.remove(&oldest)
        {
            self.leaving.insert(oldest.clone());
            evicted.push((oldest, image));
        }
        evicted
    }

    /// Ends the eviction of entries: their names on the disk are free.
    pub(super) fn left(&mut self, evicted: &[(K, T)]) {
        evicted.iter().for_each(|(key, _)| {
            self.leaving.remove(key);
        });
    }

    fn insert(&mut self, key: K, image: T, bytes: u64, leases: usize) -> CopyId {
        self.last_use += 1;
        self.copies += 1;
        let copy = CopyId(self.copies);
        let rank = (!key.is_spare(), self.last_use);
        self.order.insert(rank, key.clone());
        self.images.insert(key, ImageEntry { image, copy, bytes, leases, rank });
        copy
    }

    fn oldest_unused(&self) -> Option<K> {
        let is_unused = |key: &&K| self.images.get(*key).is_some_and(|entry| entry.leases == 0);
        self.order.values().find(is_unused).cloned()
    }

    fn remove(&mut self, key: &K) -> Option<T> {
        let entry = self.images.remove(key)?;
        self.order.remove(&entry.rank);
        self.charged -= entry.bytes;
        Some(entry.image)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BUDGET: u64 = 100;

    /// The last two keys of the model are spare.
    impl Spare for u8 {
        fn is_spare(&self) -> bool {
            *self >= 4
        }
    }

    #[derive(Debug, Clone)]
    enum Act {
        Lease(u8),
        Release(u8),
        Begin(u8),
        Grow(u8, u64),
        Finish(u8),
        Abandon(u8),
        Forget(u8),
        Clear,
        Left,
    }

    fn act() -> impl Strategy<Value = Act> {
        prop_oneof![
            (0u8..6).prop_map(Act::Lease),
            (0u8..6).prop_map(Act::Release),
            (0u8..6).prop_map(Act::Begin),
            (0u8..6, 0u64..60).prop_map(|(key, bytes)| Act::Grow(key, bytes)),
            (0u8..6).prop_map(Act::Finish),
            (0u8..6).prop_map(Act::Abandon),
            (0u8..6).prop_map(Act::Forget),
            Just(Act::Clear),
            Just(Act::Left),
        ]
    }

    /// The same as lists of (key, bytes, leases): spare entries first, then in the order of their last use.
    #[derive(Debug, Default)]
    struct Model {
        images: Vec<(u8, u64, Vec<CopyId>)>,
        unpacking: Vec<(u8, u64)>,
        leaving: Evicted<u8, u8>,
        forgotten: Vec<CopyId>,
    }

    impl Model {
        fn position(&self, key: u8) -> Option<usize> {
            self.images.iter().position(|image| image.0 == key)
        }

        fn total(&self) -> u64 {
            self.images.iter().map(|image| image.1).sum::<u64>()
                + self.unpacking.iter().map(|own| own.1).sum::<u64>()
        }

        fn sort(&mut self) {
            self.images.sort_by_key(|image| !image.0.is_spare());
        }

        fn grow(&mut self, key: u8, bytes: u64) -> Growth<u8, u8> {
            let Some(at) = self.unpacking.iter().position(|own| own.0 == key) else { return Growth::NotNow };
            if self.unpacking[at].1 + bytes > BUDGET {
                return Growth::Never;
            }
            let leased: u64 =
                self.images.iter().filter(|image| !image.2.is_empty()).map(|image| image.1).sum();
            let building: u64 = self.unpacking.iter().map(|own| own.1).sum();
            let stays = if key.is_spare() { self.total() } else { leased + building };
            if stays + bytes > BUDGET {
                return Growth::NotNow;
            }
            self.unpacking[at].1 += bytes;
            let mut removed = Vec::new();
            while self.total() > BUDGET {
                let oldest = self.images.iter().position(|image| image.2.is_empty()).unwrap();
                let key = self.images.remove(oldest).0;
                removed.push((key, key));
            }
            self.leaving.extend(&removed);
            Growth::Yes(removed)
        }
    }

    proptest! {
        #[test]
        fn an_index_does_what_the_lists_do_and_never_exceeds_its_budget(acts in prop::collection::vec(act(), 0..80)) {
            let (mut index, mut model) = (ImageIndex::<u8, u8>::new(BUDGET), Model::default());
            for act in acts {
                match act {
                    Act::Lease(key) => {
                        let leased = index.lease(&key);
                        prop_assert_eq!(leased.map(|(_, image)| image), model.position(key).map(|_| key));
                        if let (Some((copy, _)), Some(at)) = (leased, model.position(key)) {
                            let (key, bytes, mut leases) = model.images.remove(at);
                            leases.push(copy);
                            model.images.push((key, bytes, leases));
                            model.sort();
                        }
                    }
                    Act::Release(key) => {
                        // Only leases that were taken end. Ending a lease of a forgotten copy has no effect.
                        if let Some(copy) = model.forgotten.pop() {
                            index.release(&key, copy);
                        }
                        if let Some(at) = model.position(key)
                            && let Some(copy) = model.images[at].2.pop()
                        {
                            index.release(&key, copy);
                        }
                    }
                    Act::Begin(key) => {
                        let is_new = model.position(key).is_none()
                            && model.unpacking.iter().all(|own| own.0 != key)
                            && model.leaving.iter().all(|(leaving, _)| *leaving != key);
                        if is_new {
                            model.unpacking.push((key, 0));
                        }
                        prop_assert_eq!(index.begin(&key), is_new);
                    }
                    Act::Grow(key, bytes) => prop_assert_eq!(index.grow(&key, bytes), model.grow(key, bytes)),
                    Act::Finish(key) => {
                        let copy = index.finish(&key, key);
                        let at = model.unpacking.iter().position(|own| own.0 == key);
                        prop_assert_eq!(copy.is_some(), at.is_some());
                        if let (Some(copy), Some(at)) = (copy, at) {
                            let (key, bytes) = model.unpacking.remove(at);
                            model.images.push((key, bytes, vec![copy]));
                            model.sort();
                        }
                    }
                    Act::Abandon(key) => {
                        index.abandon(&key);
                        model.unpacking.retain(|own| own.0 != key);
                    }
                    Act::Forget(key) => {
                        if let Some(at) = model.position(key) {
                            let (copy, _) = index.lease(&key).unwrap();
                            index.forget(&key, copy);
                            let (_, _, leases) = model.images.remove(at);
                            model.forgotten.extend(leases);
                        }
                    }
                    Act::Clear => {
                        let unused: Vec<_> =
                            model.images.iter().filter(|image| image.2.is_empty()).map(|image| (image.0, image.0)).collect();
                        model.leaving.extend(&unused);
                        prop_assert_eq!(index.take_unused(), unused);
                        model.images.retain(|image| !image.2.is_empty());
                    }
                    Act::Left => index.left(&std::mem::take(&mut model.leaving)),
                }
                prop_assert_eq!(index.charged, model.total());
                prop_assert!(index.charged <= BUDGET);
            }
        }
    }

    #[test]
    fn images_of_an_earlier_run_that_do_not_fit_any_more_go_oldest_first() {
        let mut index = ImageIndex::<u8, _>::new(BUDGET);
        assert!(index.restore(1, "old", 50).is_empty());
        assert!(index.restore(2, "new", 50).is_empty());
        assert_eq!(index.restore(3, "newest", 30), [(1, "old")]);
        assert_eq!(index.restore(0, "too large", 101), [(0, "too large")]);
        assert_eq!(index.charged, 80);
    }
}
