//! The scrub of staged trees.

use super::{super::scrub::TreeScrubber, *};
use std::{
    os::unix::fs::{PermissionsExt as _, symlink},
    path::Path,
    sync::mpsc,
};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Runs `test` with a build root, its scrubber, and the time of a call that finds all trees due.
fn with_scrubber(test: impl FnOnce(&Bench, &mut TreeScrubber, Instant)) {
    let bench = Bench::new(ROOM);
    let (_stop, stopped) = mpsc::channel();
    let mut scrubber = TreeScrubber::new(bench.build_root.clone(), u64::MAX, stopped);
    test(&bench, &mut scrubber, Instant::now() + DAY * 2);
}

fn deep_tree() -> tree_model::Tree {
    let mut content = tree(1, 50);
    content.insert("/deep".into(), Shown::Directory);
    content.insert("/deep/deeper".into(), Shown::Directory);
    content.insert("/deep/deeper/file".into(), Shown::File(8, true));
    content.insert("/deep/link".into(), Shown::Link(7));
    content
}

/// What happens to a tree.
type Change<'a> = (&'a str, &'a dyn Fn(&Path));

#[test]
fn a_tree_is_not_used_again_once_any_of_its_nodes_has_changed() {
    let changes: [Change<'_>; 9] = [
        ("a bit has flipped", &|tree| {
            let file = tree.join("1-3/33");
            let mut content = fs::read(&file).unwrap();
            content[0] ^= 1;
            fs::write(&file, content).unwrap();
        }),
        ("a file is longer", &|tree| fs::write(tree.join("1-3/33"), [0; 99]).unwrap()),
        ("another file", &|tree| fs::write(tree.join("1-3/other"), "").unwrap()),
        ("a file is executable", &|tree| {
            fs::set_permissions(tree.join("1-3/33"), fs::Permissions::from_mode(0o755)).unwrap();
        }),
        ("a file is gone", &|tree| fs::remove_file(tree.join("1-4/49")).unwrap()),
        ("a link in place of a file", &|tree| {
            fs::rename(tree.join("1-4/49"), tree.join("1-3/other")).unwrap();
            symlink("../1-3/other", tree.join("1-4/49")).unwrap();
        }),
        ("a directory in place of a file", &|tree| {
            fs::remove_file(tree.join("1-4/49")).unwrap();
            fs::create_dir(tree.join("1-4/49")).unwrap();
        }),
        ("a directory is gone", &|tree| fs::remove_dir_all(tree.join("deep/deeper")).unwrap()),
        ("another link", &|tree| {
            fs::remove_file(tree.join("deep/link")).unwrap();
            symlink("elsewhere", tree.join("deep/link")).unwrap();
        }),
    ];
    for (change, make) in changes {
        with_scrubber(|bench, scrubber, later| {
            let root = Counted::new(&deep_tree());
            let in_use = bench.base(&root);
            let path = bench.directory.path().join(in_use.lease.path());
            make(&path);
            assert!(in_use.lease.check_in_place().is_ok(), "{change}: only the scrub notices it");
            assert_eq!(scrubber.round(later), 1, "{change}");
            let error = in_use.lease.check_in_place().unwrap_err();
            assert!(matches!(error, Error::Unavailable(_)), "{change}: {error}");
            let again = bench.base(&root);
            assert_ne!(again.lease.path(), in_use.lease.path(), "{change}");
            drop(in_use);
            bench.wait_for_trees(1);
        });
    }
}

#[test]
fn a_tree_as_it_was_built_stays_and_is_checked_once_a_day() {
    with_scrubber(|bench, scrubber, later| {
        let root = Counted::new(&deep_tree());
        let path = bench.base(&root).lease.path();
        assert_eq!(scrubber.round(Instant::now() + DAY / 2), 0, "it is not due yet");
        assert_eq!(scrubber.round(later), 1);
        assert_eq!(scrubber.round(later + DAY / 2), 0, "it was checked");
        assert_eq!(scrubber.round(later + DAY), 1);
        assert_eq!((bench.base(&root).lease.path(), root.files()), (path, 51));
    });
}

#[test]
fn a_check_is_no_use_of_a_tree() {
    let fifty = 61 * NODE_BYTES;
    let bench = Bench::new(2 * fifty);
    let (_stop, stopped) = mpsc::channel();
    let mut scrubber = TreeScrubber::new(bench.build_root.clone(), u64::MAX, stopped);
    let roots: Vec<_> = (1..=3).map(|family| Counted::new(&tree(family, 50))).collect();
    let paths: Vec<_> = roots[..2].iter().map(|root| bench.base(root).lease.path()).collect();
    drop(bench.base(&roots[0]));
    // The tree that was built last is checked last.
    assert_eq!(scrubber.round(Instant::now() + DAY * 2), 2);
    drop(bench.base(&roots[2]));
    bench.wait_for_trees(2);
    assert_eq!(bench.base(&roots[0]).lease.path(), paths[0], "the tree that was used last is still there");
    assert_eq!(roots[0].files(), 50);
}

#[test]
fn a_scrub_ends_with_its_server() {
    let bench = Bench::new(ROOM);
    let root = Counted::new(&tree(1, 50));
    let lease = bench.base(&root).lease;
    let (stop, stopped) = mpsc::channel();
    let mut scrubber = TreeScrubber::new(bench.build_root.clone(), u64::MAX, stopped);
    drop(stop);
    assert_eq!(scrubber.round(Instant::now() + DAY * 2), 0);
    assert!(lease.check_in_place().is_ok(), "an interrupted check says nothing about a tree");
}
