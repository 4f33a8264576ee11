//! The index against a simple model, and its rules one by one.

use super::*;
use proptest::prelude::*;

const BUDGET: StagedSize = StagedSize { bytes: 100, nodes: 10, memory: 50 };
const PLENTY: StagedSize = StagedSize { bytes: u64::MAX, nodes: u64::MAX, memory: u64::MAX };

#[derive(Debug, Clone)]
enum Act {
    Lease(u8),
    /// A lease that ends at once.
    Check(u8),
    /// Ends one of the leases of the tree with this number.
    Release(usize),
    Discard(usize),
    Begin(u8, StagedSize, StagedSize),
    BeginAhead(u8, StagedSize, StagedSize),
    Finish(u8),
    Abandon(u8),
    TakeOldest,
}

fn act() -> impl Strategy<Value = Act> {
    let key = || 0..8u8;
    let size = |most: u64| {
        (0..most, 0..most / 10, 0..most / 2).prop_map(|(bytes, nodes, memory)| StagedSize {
            bytes,
            nodes,
            memory,
        })
    };
    prop_oneof![
        2 => key().prop_map(Act::Lease),
        2 => key().prop_map(Act::Check),
        3 => (0..20usize).prop_map(Act::Release),
        1 => (0..20usize).prop_map(Act::Discard),
        3 => (key(), size(120), size(400)).prop_map(|(key, size, free)| Act::Begin(key, size, free)),
        // Small trees, so that several of them await their runs within half of the budget.
        4 => (key(), size(40), size(800)).prop_map(|(key, size, free)| Act::BeginAhead(key, size, free)),
        3 => key().prop_map(Act::Finish),
        1 => key().prop_map(Act::Abandon),
        1 => Just(Act::TakeOldest),
    ]
}

#[derive(Clone)]
struct ModelTree {
    key: u8,
    number: usize,
    size: StagedSize,
    leases: usize,
    is_discarded: bool,
    awaits_run: bool,
}

/// The rules of the index in a simple but slow form.
#[derive(Default)]
struct Model {
    /// The most recently used tree is last.
    trees: Vec<ModelTree>,
    /// Key, size, and whether it is built ahead.
    building: Vec<(u8, StagedSize, bool)>,
}

impl Model {
    fn total(&self) -> StagedSize {
        let sizes = self.trees.iter().map(|tree| tree.size).chain(self.building.iter().map(|tree| tree.1));
        sizes.fold(StagedSize::default(), StagedSize::plus)
    }

    fn position(&self, key: u8) -> Option<usize> {
        self.trees.iter().position(|tree| tree.key == key && !tree.is_discarded)
    }

    fn oldest_unused(&self) -> Option<usize> {
        self.trees.iter().position(|tree| tree.leases == 0)
    }

    fn begin_ahead(&mut self, key: u8, size: StagedSize, free: StagedSize) -> BuildPermit<usize> {
        let unused = self.trees.iter().filter(|tree| tree.leases == 0 && !tree.awaits_run);
        let unused = unused.map(|tree| tree.size).fold(StagedSize::default(), StagedSize::plus);
        let used = self.total().minus(unused).plus(size);
        if !used.plus(used).fits(BUDGET) {
            return BuildPermit::NoRoom;
        }
        let permit = self.begin(key, size, free);
        if let (BuildPermit::Build(_), Some(begun)) = (&permit, self.building.last_mut()) {
            begun.2 = true;
        }
        permit
    }

    fn begin(&mut self, key: u8, size: StagedSize, free: StagedSize) -> BuildPermit<usize> {
        if self.position(key).is_some() || self.building.iter().any(|tree| tree.0 == key) {
            return BuildPermit::Exists;
        }
        let space = self.total().plus(free);
        let fits = |total: StagedSize| {
            total.fits(BUDGET)
                && 2 * total.bytes <= space.bytes
                && 2 * total.nodes <= space.nodes
                && 2 * total.memory <= space.memory
        };
        let before = self.trees.clone();
        let mut removed = Vec::new();
        while !fits(self.total().plus(size)) {
            let Some(oldest) = self.oldest_unused() else {
                self.trees = before;
                return BuildPermit::NoRoom;
            };
            removed.push(self.trees.remove(oldest).number);
        }
        self.building.push((key, size, false));
        BuildPermit::Build(removed)
    }
}

proptest! {
    /// Leased trees stay, the others are evicted in the order of their last use, and the budget is never exceeded.
    #[test]
    fn the_index_follows_its_model(acts in proptest::collection::vec(act(), 0..200)) {
        let mut index = TreeIndex::new(BUDGET, 4);
        let mut model = Model::default();
        let mut ids = Vec::new();
        for act in acts {
            match act {
                Act::Lease(key) => {
                    let leased = index.lease(key);
                    let position = model.position(key);
                    prop_assert_eq!(leased.map(|(_, number)| number), position.map(|at| model.trees[at].number));
                    if let Some(position) = position {
                        let mut tree = model.trees.remove(position);
                        tree.leases += 1;
                        tree.awaits_run = false;
                        model.trees.push(tree);
                    }
                }
                Act::Check(key) => {
                    let leased = index.lease_to_check(key);
                    let position = model.position(key);
                    prop_assert_eq!(leased.map(|(_, number)| number), position.map(|at| model.trees[at].number));
                    if let Some((position, (id, _))) = position.zip(leased) {
                        prop_assert_eq!(index.release(id), None);
                        let tree = model.trees.remove(position);
                        model.trees.push(tree);
                    }
                }
                Act::Release(number) => {
                    // Only leases that were taken are ended.
                    let leased = |tree: &ModelTree| tree.number == number && tree.leases > 0;
                    if let Some(at) = model.trees.iter().position(leased) {
                        model.trees[at].leases -= 1;
                        let goes = model.trees[at].leases == 0 && model.trees[at].is_discarded;
                        prop_assert_eq!(index.release(ids[number]), goes.then_some(number));
                        if goes {
                            model.trees.remove(at);
                        }
                    }
                }
                Act::Discard(number) => {
                    if let Some(at) = model.trees.iter().position(|tree| tree.number == number) {
                        model.trees[at].is_discarded = true;
                        let goes = model.trees[at].leases == 0;
                        prop_assert_eq!(index.discard(ids[number]), goes.then_some(number));
                        if goes {
                            model.trees.remove(at);
                        }
                    }
                }
                Act::Begin(key, size, free) => {
                    prop_assert_eq!(index.begin(key, size, free), model.begin(key, size, free));
                }
                Act::BeginAhead(key, size, free) => {
                    let begun = index.begin_ahead(key, size, free);
                    prop_assert_eq!(begun, model.begin_ahead(key, size, free));
                }
                Act::Finish(key) => {
                    let number = ids.len();
                    let finished = index.finish(key, number);
                    let at = model.building.iter().position(|tree| tree.0 == key);
                    prop_assert_eq!(finished.is_some(), at.is_some());
                    if let Some((at, id)) = at.zip(finished) {
                        ids.push(id);
                        let (key, size, awaits_run) = model.building.remove(at);
                        model.trees.push(ModelTree { key, number, size, leases: 1, is_discarded: false, awaits_run });
                    }
                }
                Act::Abandon(key) => {
                    index.abandon(key);
                    model.building.retain(|tree| tree.0 != key);
                }
                Act::TakeOldest => {
                    let oldest = model.oldest_unused().map(|at| model.trees.remove(at).number);
                    prop_assert_eq!(index.take_oldest_unused(), oldest);
                }
            }
            prop_assert_eq!(index.charged, model.total());
            prop_assert!(index.charged.fits(BUDGET));
            let latest: Vec<_> = index.latest(100).map(|(_, key, _)| key).collect();
            let current = model.trees.iter().rev().filter(|tree| !tree.is_discarded);
            prop_assert_eq!(latest, current.map(|tree| tree.key).collect::<Vec<_>>());
        }
    }
}

#[test]
fn roots_that_did_not_become_trees_are_remembered_for_a_while() {
    let mut index = TreeIndex::<u8, ()>::new(BUDGET, 2);
    assert!(!index.note_seen(1) && index.note_seen(1));
    assert!(!index.note_seen(2) && !index.note_seen(3));
    assert!(!index.note_seen(1), "forgotten");
    assert!(index.note_seen(3));
}

#[test]
fn after_many_large_deltas_over_a_tree_another_base_is_due() {
    let mut index = TreeIndex::new(BUDGET, 2);
    assert_eq!(index.begin(1, StagedSize::default(), PLENTY), BuildPermit::Build(vec![]));
    let id = index.finish(1, ()).unwrap();
    for _ in 0..3 {
        assert!((0..LARGE_DELTAS).all(|_| !index.is_tree_due(2, id) && !index.note_large_delta(id)));
        assert!(index.is_tree_due(2, id) && index.note_large_delta(id));
    }
}
