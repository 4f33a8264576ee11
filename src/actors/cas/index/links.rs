//! [`Links`]: which blobs a result needs, and which results need a blob.
//!
//! With links, a result is dropped in the same step as one of its blobs, and a look-up knows without reading files
//! whether a result is complete. Links have a bound of their own, because a result may need any number of blobs. Beyond
//! it, the links of the results that were linked first are forgotten. Such a result and its Trees are read again at the
//! next look-up, which finds out whether it is complete.
//!
//! A link is a node in two lists: the links of its result, and the links of its blob.

use super::order::NIL;
use std::collections::{HashMap, VecDeque};

/// Memory for one link: its node, and its part of the tables when they are emptiest.
const LINK_BYTES: u64 = 48;
/// Memory for one result with links.
const RESULT_BYTES: u64 = 64;
/// A result gets no links if they would take more than this part of the memory for links.
const RESULT_PART: u64 = 4;

/// See the module documentation.
#[derive(Debug)]
pub(super) struct Links {
    /// Bound on the memory, in bytes.
    limit: u64,
    nodes: Vec<LinkNode>,
    free: u32,
    /// The links of all results.
    count: u64,
    /// The first node of each result, with the number under which it was linked.
    of_result: HashMap<u32, (u32, u64)>,
    /// The first node of each blob.
    of_blob: HashMap<u32, u32>,
    /// The results in the order in which they were linked. Entries of results that were unlinked or linked again are
    /// stale.
    by_age: VecDeque<(u32, u64)>,
    /// Number of times that results were linked.
    linked: u64,
}

#[derive(Debug, Clone, Copy)]
struct LinkNode {
    result: u32,
    blob: u32,
    /// The next link of the result, or the next free node.
    next_of_result: u32,
    /// The neighbours among the links of the blob.
    next: u32,
    prev: u32,
}

impl Links {
    pub(super) fn new(limit: u64) -> Self {
        Self {
            limit,
            nodes: Vec::new(),
            free: NIL,
            count: 0,
            of_result: HashMap::new(),
            of_blob: HashMap::new(),
            by_age: VecDeque::new(),
            linked: 0,
        }
    }

    /// The memory that the links count for, in bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.count * LINK_BYTES + self.of_result.len() as u64 * RESULT_BYTES
    }

    /// Links a result to its blobs, each of which is given once. Returns whether it is linked.
    pub(super) fn add(&mut self, result: u32, blobs: &[u32]) -> bool {
        self.remove(result);
        let wanted = blobs.len() as u64 * LINK_BYTES + RESULT_BYTES;
        if wanted > self.limit / RESULT_PART {
            return false;
        }
        while self.bytes() + wanted > self.limit {
            let Some((oldest, number)) = self.by_age.pop_front() else { break };
            if self.of_result.get(&oldest).is_some_and(|(_, linked)| *linked == number) {
                self.remove(oldest);
            }
        }
        let mut first = NIL;
        for &blob in blobs {
            first = self.add_node(result, blob, first);
        }
        self.linked += 1;
        self.of_result.insert(result, (first, self.linked));
        self.by_age.push_back((result, self.linked));
        self.drop_stale();
        true
    }

    /// The blobs of a result, if it is linked.
    pub(super) fn blobs(&self, result: u32) -> Option<impl Iterator<Item = u32>> {
        let (first, _) = *self.of_result.get(&result)?;
        let node = |at: u32| self.nodes.get(at as usize);
        let all = std::iter::successors(node(first), move |of| node(of.next_of_result));
        Some(all.map(|node| node.blob))
    }

    /// The result that needs a blob and was linked last, if there is any.
    pub(super) fn newest_result(&self, blob: u32) -> Option<u32> {
        let first = self.of_blob.get(&blob)?;
        Some(self.nodes.get(*first as usize)?.result)
    }

    /// The results that need a blob.
    pub(super) fn results(&self, blob: u32) -> Vec<u32> {
        let node = |at: u32| self.nodes.get(at as usize);
        let first = self.of_blob.get(&blob).and_then(|first| node(*first));
        std::iter::successors(first, |of| node(of.next)).map(|node| node.result).collect()
    }

    /// Forgets the links of a result.
    pub(super) fn remove(&mut self, result: u32) {
        let Some((mut at, _)) = self.of_result.remove(&result) else { return };
        while at != NIL {
            let node = self.nodes[at as usize];
            self.unlink(node);
            (self.nodes[at as usize].next_of_result, self.free) = (self.free, at);
            self.count -= 1;
            at = node.next_of_result;
        }
    }

    fn add_node(&mut self, result: u32, blob: u32, next_of_result: u32) -> u32 {
        let next = self.of_blob.get(&blob).copied().unwrap_or(NIL);
        let node = LinkNode { result, blob, next_of_result, next, prev: NIL };
        let at = if self.free == NIL {
            if self.nodes.len() == self.nodes.capacity() {
                self.nodes.reserve_exact((self.nodes.len() / 4).max(1_024));
            }
            self.nodes.push(node);
            (self.nodes.len() - 1) as u32
        } else {
            let at = self.free;
            self.free = self.nodes[at as usize].next_of_result;
            self.nodes[at as usize] = node;
            at
        };
        if next != NIL {
            self.nodes[next as usize].prev = at;
        }
        self.of_blob.insert(blob, at);
        self.count += 1;
        at
    }

    /// Takes a node out of the links of its blob.
    fn unlink(&mut self, LinkNode { blob, next, prev, .. }: LinkNode) {
        if next != NIL {
            self.nodes[next as usize].prev = prev;
        }
        match (prev, next) {
            (NIL, NIL) => _ = self.of_blob.remove(&blob),
            (NIL, next) => _ = self.of_blob.insert(blob, next),
            (prev, next) => self.nodes[prev as usize].next = next,
        }
    }

    /// Bounds the queue of results by age.
    fn drop_stale(&mut self) {
        if self.by_age.len() > 2 * self.of_result.len() + 1_024 {
            let of_result = &self.of_result;
            self.by_age
                .retain(|(result, number)| of_result.get(result).is_some_and(|(_, linked)| linked == number));
        }
    }

    /// Memory that it takes, in bytes.
    #[cfg(test)]
    pub(super) fn memory(&self) -> usize {
        self.nodes.capacity() * size_of::<LinkNode>()
            + self.of_result.capacity() * (size_of::<(u32, (u32, u64))>() + 1) * 8 / 7
            + self.of_blob.capacity() * (size_of::<(u32, u32)>() + 1) * 8 / 7
            + self.by_age.capacity() * size_of::<(u32, u64)>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet};

    proptest! {
        /// Compared with a map of sets, without a bound that matters.
        #[test]
        fn links_behave_like_a_map_of_sets(
            ops in proptest::collection::vec((0u32..8, proptest::collection::btree_set(0u32..12, 0..6), any::<bool>()), 1..100),
        ) {
            let mut links = Links::new(1 << 20);
            let mut model: BTreeMap<u32, BTreeSet<u32>> = BTreeMap::new();
            for (result, blobs, is_added) in ops {
                if is_added {
                    prop_assert!(links.add(result, &blobs.iter().copied().collect::<Vec<_>>()));
                    model.insert(result, blobs);
                } else {
                    links.remove(result);
                    model.remove(&result);
                }
                for result in 0..8 {
                    let blobs = links.blobs(result).map(|blobs| blobs.collect::<BTreeSet<_>>());
                    prop_assert_eq!(blobs.as_ref(), model.get(&result));
                }
                for blob in 0..12 {
                    let results: BTreeSet<u32> = links.results(blob).into_iter().collect();
                    let expected = model.iter().filter(|(_, blobs)| blobs.contains(&blob)).map(|(result, _)| *result);
                    prop_assert_eq!(results, expected.collect::<BTreeSet<_>>());
                }
                let count: usize = model.values().map(BTreeSet::len).sum();
                prop_assert_eq!(links.count, count as u64);
            }
        }
    }

    #[test]
    fn links_stay_within_their_memory_and_the_oldest_go_first() {
        const LIMIT: u64 = 4 << 20;
        for blobs_each in [1, 20, 1_000] {
            let mut links = Links::new(LIMIT);
            let mut next = 0;
            for result in 0..100_000 / blobs_each {
                let blobs: Vec<u32> = (next..next + blobs_each).collect();
                next += blobs_each;
                assert!(links.add(result, &blobs));
                assert!(links.bytes() <= LIMIT);
            }
            assert!(links.memory() as u64 <= LIMIT, "{blobs_each}: {}", links.memory());
            let is_linked = |result: u32| links.blobs(result).is_some();
            let kept = (0..100_000 / blobs_each).filter(|result| is_linked(*result)).count();
            assert!(kept > 10 && is_linked(100_000 / blobs_each - 1));
        }
        let too_many: Vec<u32> = (0..LIMIT as u32 / 100).collect();
        assert!(!Links::new(LIMIT).add(1, &too_many), "a result does not push out all others");
    }
}
