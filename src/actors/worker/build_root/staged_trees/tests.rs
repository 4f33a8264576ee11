//! Tests of staged trees on a real disk.

mod ahead;
mod scrub;

use super::*;
use crate::actors::worker::{
    cancel::CancelToken,
    tree_model::{self, Contents, Shown},
};
use gorego_reapi::error::Error;
use std::{fs, sync::atomic::AtomicUsize, sync::atomic::Ordering, thread, time::Instant};

const INSTANCE: InstanceId = InstanceId(0);

/// Inputs that count how many files were written, and that can fail.
struct Counted {
    contents: Contents,
    files: AtomicUsize,
    fails_at: Option<usize>,
    /// Whether writing panics instead of failing.
    panics: bool,
}

impl Counted {
    fn new(tree: &tree_model::Tree) -> Self {
        let contents = Contents(Arc::new(tree_model::input_tree(tree)));
        Self { contents, files: AtomicUsize::new(0), fails_at: None, panics: false }
    }

    fn files(&self) -> usize {
        self.files.load(Ordering::Relaxed)
    }

    fn tree(&self) -> &Arc<InputTree> {
        &self.contents.0
    }
}

impl Inputs for &Counted {
    fn tree(&self) -> &Arc<InputTree> {
        Counted::tree(self)
    }

    fn hold_all(&mut self) -> Result<()> {
        Ok(())
    }

    fn hold(&mut self, _: Vec<Digest>) -> Result<()> {
        Ok(())
    }

    fn materialise(&self, digest: &Digest, parent: &fs::File, name: &str, mode: u32) -> Result<()> {
        if self.fails_at == Some(self.files.fetch_add(1, Ordering::Relaxed)) {
            assert!(!self.panics, "as the test asked");
            return Err(Error::MissingBlobs(vec![*digest]));
        }
        self.contents.materialise(digest, parent, name, mode)
    }
}

/// A build root in a temporary directory.
struct Bench {
    build_root: BuildRoot,
    directory: tempfile::TempDir,
}

impl Bench {
    fn new(max_bytes: u64) -> Self {
        Self::within(StagingLimits { max_bytes, ..StagingLimits::default() })
    }

    fn within(limits: StagingLimits) -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self { build_root: BuildRoot::with_trees(directory.path(), limits).unwrap(), directory }
    }

    fn stage<'a>(&self, inputs: &'a Counted) -> Result<Option<Base<'a>>> {
        self.stage_within(inputs, Duration::from_secs(60))
    }

    fn stage_within<'a>(&self, inputs: &'a Counted, limit: Duration) -> Result<Option<Base<'a>>> {
        let cancel = CancelToken::new();
        let checkpoint = Checkpoint::new(&cancel, "a test", limit);
        self.build_root.stage(&self.build_root.place()?, &mut &*inputs, inputs.tree(), INSTANCE, &checkpoint)
    }

    fn base<'a>(&self, inputs: &'a Counted) -> Base<'a> {
        self.stage(inputs).unwrap().expect("there is a base")
    }

    fn trees(&self) -> usize {
        fs::read_dir(self.directory.path()).unwrap().count()
    }

    fn wait_for_trees(&self, count: usize) {
        let end = Instant::now() + Duration::from_secs(20);
        while self.trees() != count {
            assert!(Instant::now() < end, "{} trees instead of {count}", self.trees());
            // Other threads remove the trees and send no message when they have.
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Makes a tree of `count` files in directories of ten. A smaller tree of the same family is part of a larger one.
fn tree(family: u64, count: usize) -> tree_model::Tree {
    let mut tree = tree_model::Tree::new();
    for file in 0..count {
        let directory = format!("/{family}-{}", file / 10);
        tree.insert(format!("{directory}/{file}"), Shown::File(family, false));
        tree.insert(directory, Shown::Directory);
    }
    tree
}

const ROOM: u64 = 1 << 40;

#[test]
fn a_root_is_written_once_and_for_a_similar_one_only_the_difference() {
    let bench = Bench::new(ROOM);
    let first = Counted::new(&tree(1, 100));
    let base = bench.base(&first);
    assert_eq!((first.files(), base.delta.steps.len()), (100, 0));
    let again = bench.base(&first);
    assert_eq!((first.files(), again.lease.path()), (100, base.lease.path()));
    let mut changed = tree(1, 100);
    changed.insert("/1-3/33".into(), Shown::File(2, true));
    changed.remove("/1-4/44");
    let changed = Counted::new(&changed);
    let similar = bench.base(&changed);
    assert_eq!(similar.lease.path(), base.lease.path());
    assert_eq!((similar.delta.cost.entries, changed.files()), (4, 0));
    let other = Counted::new(&tree(3, 100));
    assert_ne!(bench.base(&other).lease.path(), base.lease.path());
    assert_eq!(bench.trees(), 2);
}

#[test]
fn a_root_with_a_large_difference_becomes_a_tree_when_it_comes_again() {
    let bench = Bench::new(ROOM);
    let first = Counted::new(&tree(1, 1_000));
    drop(bench.base(&first));
    let mut changed = tree(1, 1_000);
    changed.extend(tree(2, 200));
    let changed = Counted::new(&changed);
    assert_eq!(bench.base(&changed).delta.cost.entries, 220);
    assert_eq!(bench.base(&changed).delta.cost.entries, 0);
    assert_eq!((changed.files(), bench.trees()), (1_200, 2));
}

#[test]
fn a_root_of_a_few_small_files_is_copied() {
    let bench = Bench::new(ROOM);
    assert!(bench.stage(&Counted::new(&tree(1, 5))).unwrap().is_none());
    assert_eq!(bench.trees(), 0);
}

#[test]
fn the_budget_is_kept_and_a_tree_in_use_stays() {
    let fifty = 61 * NODE_BYTES;
    let bench = Bench::new(2 * fifty);
    let roots: Vec<_> = (1..=4).map(|family| Counted::new(&tree(family, 50))).collect();
    let in_use = bench.base(&roots[0]);
    let path = bench.directory.path().join(in_use.lease.path());
    for root in &roots[1..3] {
        drop(bench.base(root));
        bench.wait_for_trees(2);
    }
    let second = bench.base(&roots[1]);
    bench.wait_for_trees(2);
    // Both trees are in use, so the next root is copied.
    assert!(bench.stage(&roots[3]).unwrap().is_none());
    assert!(path.join("1-4/49").exists());
    drop(second);
    bench.build_root.relieve_disk();
    bench.wait_for_trees(2);
    // This is done when the disk is low.
    bench.build_root.remove_unused_trees_while(|| true);
    assert_eq!(bench.trees(), 1, "trees are removed on this thread");
    assert!(path.join("1-4/49").exists());
}

/// Links take almost no bytes on disk, but their targets are in memory.
#[test]
fn the_memory_of_staged_trees_is_bounded() {
    let limits = StagingLimits { max_memory: 20_000, max_bytes: ROOM, ..StagingLimits::default() };
    let bench = Bench::within(limits);
    let roots: Vec<_> = (1..=3).map(|family| Counted::new(&tree(family, 50))).collect();
    assert!((9_000..10_000).contains(&roots[0].tree().memory()), "{}", roots[0].tree().memory());
    let in_use: Vec<_> = roots[..2].iter().map(|root| bench.base(root)).collect();
    assert!(bench.stage(&roots[2]).unwrap().is_none());
    drop(in_use);
    bench.base(&roots[2]);
    bench.wait_for_trees(2);
}

#[test]
fn a_tree_removed_from_disk_is_created_again() {
    let bench = Bench::new(ROOM);
    let inputs = Counted::new(&tree(1, 100));
    let path = bench.base(&inputs).lease.path();
    fs::remove_dir_all(bench.directory.path().join(&path)).unwrap();
    let again = bench.base(&inputs);
    assert_ne!(again.lease.path(), path);
    assert_eq!(inputs.files(), 200);
    bench.wait_for_trees(1);
    // Now the tree is removed while it is in use.
    let top = bench.directory.path().join(again.lease.path());
    assert!(again.lease.check_in_place().is_ok());
    fs::remove_dir_all(top.join("1-3")).unwrap();
    assert!(matches!(again.lease.check_in_place(), Err(Error::Unavailable(_))));
    let changed = Counted::new(&{
        let mut changed = tree(1, 100);
        changed.remove("/1-4/44");
        changed
    });
    assert!(bench.base(&changed).delta.steps.is_empty(), "the damaged tree is not used as a base");
    assert!(top.exists(), "it stays while it is leased");
    drop(again);
    bench.wait_for_trees(1);
    assert!(!top.exists());
}

#[test]
fn inputs_are_copied_for_a_while_after_a_tree_could_not_be_mounted() {
    let bench = Bench::new(ROOM);
    let inputs = Counted::new(&tree(1, 100));
    bench.base(&inputs).lease.note_mount_failure();
    assert!(bench.stage(&inputs).unwrap().is_none());
}

/// An input root that differs much from `tree(1, 1_000)`, and in each round from all other rounds.
fn much_changed(round: u64) -> Counted {
    let mut changed = tree(1, 1_000);
    changed.extend(tree(50, 200));
    changed.insert("/1-3/33".into(), Shown::File(round, true));
    Counted::new(&changed)
}

/// As with sources that always change: no root is requested twice.
#[test]
fn after_many_large_differences_from_one_base_another_base_is_made() {
    let bench = Bench::new(ROOM);
    drop(bench.base(&Counted::new(&tree(1, 1_000))));
    let costs: Vec<_> = (2..20).map(|round| bench.base(&much_changed(round)).delta.cost.entries).collect();
    assert_eq!(costs[..8], [222; 8]);
    assert_eq!(costs[8..], [[0].as_slice(), &[2; 9]].concat());
}

#[test]
fn nothing_is_left_of_a_tree_that_could_not_be_written() {
    let bench = Bench::new(ROOM);
    let broken = Counted { fails_at: Some(70), ..Counted::new(&tree(1, 100)) };
    assert!(matches!(bench.stage(&broken), Err(Error::MissingBlobs(_))));
    bench.wait_for_trees(0);
    let whole = Counted::new(&tree(1, 100));
    assert!(bench.base(&whole).delta.steps.is_empty());
    assert_eq!((whole.files(), bench.trees()), (100, 1));
    let panicking = Counted { fails_at: Some(70), panics: true, ..Counted::new(&tree(2, 100)) };
    let staged = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| bench.stage(&panicking).map(drop)));
    assert!(staged.is_err());
    bench.wait_for_trees(1);
}

#[test]
fn actions_that_start_together_share_the_work() {
    let bench = Bench::new(ROOM);
    let inputs = Counted::new(&tree(1, 300));
    thread::scope(|scope| {
        let staged: Vec<_> = (0..8).map(|_| scope.spawn(|| bench.base(&inputs).lease.path())).collect();
        let mut paths: Vec<_> = staged.into_iter().map(|path| path.join().unwrap()).collect();
        paths.dedup();
        assert_eq!(paths.len(), 1);
    });
    assert_eq!(inputs.files(), 300);
}

#[test]
fn the_trees_of_an_earlier_process_are_removed_and_never_used() {
    let bench = Bench::new(ROOM);
    let inputs = Counted::new(&tree(1, 100));
    drop(bench.base(&inputs));
    let Bench { build_root, directory } = bench;
    drop(build_root);
    fs::create_dir(directory.path().join("t-x")).unwrap();
    let bench = Bench { build_root: BuildRoot::open(directory.path()).unwrap(), directory };
    bench.wait_for_trees(1);
    drop(bench.base(&inputs));
    assert_eq!(inputs.files(), 200);
}

/// The build root is removed while the server runs.
#[test]
fn trees_that_were_removed_with_the_build_root_are_made_again() {
    let bench = Bench::new(ROOM);
    let inputs = Counted::new(&tree(1, 100));
    let held = bench.base(&inputs);
    fs::remove_dir_all(bench.directory.path()).unwrap();
    let base = bench.base(&inputs);
    assert!(bench.directory.path().join(base.lease.path()).join("1-0/0").exists());
    drop(held);
    assert_eq!(inputs.files(), 200);
}
