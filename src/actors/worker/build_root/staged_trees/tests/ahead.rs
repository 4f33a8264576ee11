//! Trees that are built before their actions run.

use super::*;
use crate::disk::Space;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

const PATIENCE: Duration = Duration::from_secs(20);

/// Inputs that wait for the test before they write a file.
struct Gated<'a> {
    inputs: &'a Counted,
    at: usize,
    reached: SyncSender<()>,
    resumed: Receiver<()>,
}

/// The side of the test.
struct Gate {
    reached: Receiver<()>,
    resume: SyncSender<()>,
}

impl Counted {
    /// The same inputs. Before the file with this number, they wait for the gate.
    fn gated(&self, at: usize) -> (Gated<'_>, Gate) {
        let ((reached, is_reached), (resume, resumed)) = (sync_channel(1), sync_channel(1));
        (Gated { inputs: self, at, reached, resumed }, Gate { reached: is_reached, resume })
    }
}

impl Inputs for Gated<'_> {
    fn tree(&self) -> &Arc<InputTree> {
        self.inputs.tree()
    }

    fn hold_all(&mut self) -> Result<()> {
        Ok(())
    }

    fn hold(&mut self, _: Vec<Digest>) -> Result<()> {
        Ok(())
    }

    fn materialise(&self, digest: &Digest, parent: &fs::File, name: &str, mode: u32) -> Result<()> {
        if self.inputs.files() == self.at {
            self.reached.send(()).unwrap();
            self.resumed.recv_timeout(PATIENCE).unwrap();
        }
        self.inputs.materialise(digest, parent, name, mode)
    }
}

impl Gate {
    fn wait(&self) {
        self.reached.recv_timeout(PATIENCE).unwrap();
    }

    fn open(&self) {
        self.resume.send(()).unwrap();
    }
}

impl Bench {
    fn ahead(&self, inputs: &Counted) -> Result<bool> {
        self.ahead_of(&mut &*inputs, &CancelToken::without_event(), PATIENCE)
    }

    fn ahead_of(&self, inputs: &mut dyn Inputs, cancel: &CancelToken, limit: Duration) -> Result<bool> {
        let tree = inputs.tree().clone();
        let checkpoint = Checkpoint::new(cancel, "a test", limit);
        self.build_root.stage_ahead(inputs, &tree, INSTANCE, || None, &checkpoint)
    }
}

#[test]
fn a_run_finds_the_tree_that_was_built_for_it() {
    let bench = Bench::new(ROOM);
    let inputs = Counted::new(&tree(1, 100));
    assert_eq!(bench.ahead(&inputs), Ok(true));
    assert_eq!(bench.ahead(&inputs), Ok(false), "it is there");
    assert!(bench.base(&inputs).delta.steps.is_empty());
    assert_eq!((inputs.files(), bench.trees()), (100, 1));
}

/// What a run would write as a delta is left to the run, and counts only once.
#[test]
fn no_tree_is_built_that_the_run_would_not_build() {
    let bench = Bench::new(ROOM);
    assert_eq!(bench.ahead(&Counted::new(&tree(1, 5))), Ok(false), "it is copied");
    drop(bench.base(&Counted::new(&tree(1, 1_000))));
    let mut similar = tree(1, 1_000);
    similar.remove("/1-4/44");
    assert_eq!(bench.ahead(&Counted::new(&similar)), Ok(false));
    let mut changed = tree(1, 1_000);
    changed.extend(tree(2, 200));
    let changed = Counted::new(&changed);
    assert_eq!(bench.ahead(&changed), Ok(false));
    assert_eq!(bench.base(&changed).delta.cost.entries, 220);
    assert_eq!((bench.trees(), bench.ahead(&changed)), (1, Ok(true)));
    assert_eq!((changed.files(), bench.base(&changed).delta.cost.entries), (1_200, 0));
}

#[test]
fn the_tree_that_is_due_after_many_large_differences_is_built_ahead_too() {
    let bench = Bench::new(ROOM);
    drop(bench.base(&Counted::new(&tree(1, 1_000))));
    for round in 2..10 {
        assert_eq!(bench.ahead(&much_changed(round)), Ok(false));
        assert_eq!(bench.base(&much_changed(round)).delta.cost.entries, 222);
    }
    assert_eq!(bench.ahead(&much_changed(10)), Ok(true));
    assert_eq!(bench.base(&much_changed(11)).delta.cost.entries, 2);
}

#[test]
fn half_of_the_budget_is_left_to_actions_that_run() {
    let fifty = 61 * NODE_BYTES;
    let bench = Bench::new(4 * fifty);
    let roots: Vec<_> = (1..=6).map(|family| Counted::new(&tree(family, 50))).collect();
    let first = bench.base(&roots[0]);
    assert_eq!(bench.ahead(&roots[1]), Ok(true));
    let second = bench.base(&roots[2]);
    assert_eq!((bench.ahead(&roots[3]), bench.trees()), (Ok(false), 3), "two are in use");
    drop(second);
    assert_eq!(bench.ahead(&roots[3]), Ok(false), "one awaits its run");
    assert_eq!(bench.ahead(&roots[1]), Ok(false), "it is there, and still awaits its run");
    assert_eq!(bench.ahead(&roots[3]), Ok(false));
    drop(bench.base(&roots[1]));
    assert_eq!(roots[1].files(), 50, "its run found it");
    assert_eq!(bench.ahead(&roots[3]), Ok(true));
    assert_eq!(bench.ahead(&roots[4]), Ok(false));
    assert!(first.lease.check_in_place().is_ok(), "a tree in use stays");
}

#[test]
fn nothing_is_built_while_the_disk_is_low() {
    let bench = Bench::new(ROOM);
    let inputs = Counted::new(&tree(1, 100));
    let cancel = CancelToken::without_event();
    let checkpoint = Checkpoint::new(&cancel, "a test", PATIENCE);
    let with = |free_bytes| {
        let space = Space { free_bytes, total_bytes: 1 << 40, free_inodes: 0, total_inodes: 0 };
        bench.build_root.stage_ahead(&mut &inputs, inputs.tree(), INSTANCE, || Some(space), &checkpoint)
    };
    let reserve = Space { free_bytes: 0, total_bytes: 1 << 40, free_inodes: 0, total_inodes: 0 }.reserve();
    assert_eq!((with(2 * reserve.bytes), inputs.files()), (Ok(false), 0));
    assert_eq!((with(1 << 39), inputs.files()), (Ok(true), 100));
}

#[test]
fn a_run_that_comes_meanwhile_waits_for_the_tree() {
    let bench = Bench::new(ROOM);
    let inputs = Counted::new(&tree(1, 100));
    let (mut gated, gate) = inputs.gated(50);
    let cancel = CancelToken::without_event();
    thread::scope(|scope| {
        let ahead = scope.spawn(|| bench.ahead_of(&mut gated, &cancel, PATIENCE));
        gate.wait();
        assert_eq!(bench.ahead(&inputs), Ok(false), "it does not wait for its own tree");
        let run = scope.spawn(|| bench.base(&inputs).delta.steps.len());
        cancel.stop();
        gate.open();
        assert_eq!((run.join().unwrap(), ahead.join().unwrap()), (0, Ok(true)));
    });
    assert_eq!((inputs.files(), bench.trees()), (100, 1));
}

#[test]
fn a_run_builds_the_tree_itself_if_it_could_not_be_built_before() {
    for panics in [false, true] {
        let bench = Bench::new(ROOM);
        let broken = Counted { fails_at: Some(70), panics, ..Counted::new(&tree(1, 100)) };
        let (mut gated, gate) = broken.gated(50);
        let whole = Counted::new(&tree(1, 100));
        thread::scope(|scope| {
            let ahead = scope.spawn(|| bench.ahead_of(&mut gated, &CancelToken::without_event(), PATIENCE));
            gate.wait();
            let run = scope.spawn(|| bench.base(&whole).delta.steps.len());
            gate.open();
            assert!(!matches!(ahead.join(), Ok(Ok(_))));
            assert_eq!(run.join().unwrap(), 0);
        });
        assert_eq!(whole.files(), 100);
        bench.wait_for_trees(1);
    }
}

#[test]
fn a_run_copies_its_inputs_if_the_tree_takes_too_long() {
    let bench = Bench::new(ROOM);
    let inputs = Counted::new(&tree(1, 100));
    let (mut gated, gate) = inputs.gated(50);
    thread::scope(|scope| {
        let ahead = scope.spawn(|| bench.ahead_of(&mut gated, &CancelToken::without_event(), PATIENCE));
        gate.wait();
        let run = bench.stage_within(&inputs, Duration::from_secs(5));
        gate.open();
        assert!(matches!(run, Ok(None)), "{run:?}");
        assert_eq!(ahead.join().unwrap(), Ok(true));
    });
    assert_eq!((inputs.files(), bench.trees()), (100, 1));
}

#[test]
fn nothing_is_left_of_a_tree_whose_action_has_ended_and_none_is_begun_for_an_action_that_runs() {
    let bench = Bench::new(ROOM);
    let inputs = Counted::new(&tree(1, 100));
    let (mut gated, gate) = inputs.gated(50);
    let cancel = CancelToken::without_event();
    thread::scope(|scope| {
        let ahead = scope.spawn(|| bench.ahead_of(&mut gated, &cancel, PATIENCE));
        gate.wait();
        cancel.cancel();
        gate.open();
        assert!(matches!(ahead.join().unwrap(), Err(Error::Cancelled(_))));
    });
    assert_eq!(inputs.files(), 51);
    bench.wait_for_trees(0);
    assert_eq!(bench.build_root.staged_usage().bytes, 0);
    let cancel = CancelToken::without_event();
    cancel.stop();
    assert_eq!(bench.ahead_of(&mut &inputs, &cancel, PATIENCE), Ok(false));
    assert_eq!(inputs.files(), 51);
}

/// Of several similar roots that are new, one becomes a tree and the others need only a delta.
#[test]
fn a_tree_that_is_being_built_may_become_the_base() {
    let bench = Bench::new(ROOM);
    let inputs = Counted::new(&tree(1, 1_000));
    let mut similar = tree(1, 1_000);
    similar.remove("/1-4/44");
    let similar = Counted::new(&similar);
    let (mut gated, gate) = inputs.gated(500);
    thread::scope(|scope| {
        let first = scope.spawn(|| bench.ahead_of(&mut gated, &CancelToken::without_event(), PATIENCE));
        gate.wait();
        let limit = Duration::from_millis(60);
        let second = bench.ahead_of(&mut &similar, &CancelToken::without_event(), limit);
        assert!(matches!(second, Err(Error::Unavailable(_))), "it waits: {second:?}");
        let second = scope.spawn(|| bench.ahead(&similar));
        gate.open();
        assert_eq!((first.join().unwrap(), second.join().unwrap()), (Ok(true), Ok(false)));
    });
    assert_eq!((similar.files(), bench.trees()), (0, 1));
}
