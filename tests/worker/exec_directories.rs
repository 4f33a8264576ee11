//! The location, ownership and removal of exec directories.

use crate::support::*;
use gorego::actors::worker::{build_root::BuildRoot, messages::SlotId};
use gorego_reapi::error::Error;
use std::{
    fs,
    time::{Duration, Instant},
};

/// Compilers write their working directory into their output. Two concurrent runs cannot share one.
#[test]
fn the_path_of_the_exec_root_is_derived_from_the_action() {
    with_worker(async |bench| {
        let job = Job { do_not_cache: true, ..sh("pwd") };
        let path = async |job: &Job| bench.text(&bench.result(job).await.stdout_digest);
        let first = path(&job).await;
        for _ in 0..3 {
            assert_eq!(path(&job).await, first);
        }
        assert_ne!(path(&sh("pwd -P")).await, first, "another action");

        let root = bench.input(&[("a.c", file("int a(void) { return 1; }"))]);
        let compile = sh("cc -g -c a.c -o a.o").root(root).outputs(&["a.o"]);
        let object = async || bench.result(&compile).await.output_files[0].digest.clone().unwrap();
        assert_eq!(object().await, object().await);

        let action = bench.action(&job).digest;
        let top = bench.build_root.parent().unwrap().join("other");
        let build_root = BuildRoot::open(&top).unwrap();
        let runs = [0, 1, 1].map(|slot| build_root.create(SlotId(slot), &action).unwrap());
        let mut paths: Vec<_> = runs.iter().map(|run| run.root_path().to_owned()).collect();
        paths.dedup();
        assert_eq!(paths.len(), 3);
        for path in &paths {
            // The path of a socket may have 108 bytes.
            assert!(path.strip_prefix(&top).unwrap().as_os_str().len() <= 20, "{}", path.display());
        }
        drop(runs);
        // The path is free at once, even if its old content still exists.
        assert_eq!(build_root.create(SlotId(0), &action).unwrap().root_path(), paths[0]);
        build_root.wait_until_empty(Duration::from_secs(20));
        assert_eq!(fs::read_dir(&top).unwrap().count(), 0);
    });
}

/// A crash leaves the directory of an action behind. The action still runs at its usual path, in a fresh tree.
#[test]
fn leftovers_of_a_crash_do_not_block_the_same_action() {
    with_worker(async |bench| {
        let action = bench.action(&sh("true")).digest;
        let top = bench.build_root.parent().unwrap().join("other");
        let build_root = BuildRoot::open(&top).unwrap();
        let usual = build_root.create(SlotId(0), &action).unwrap().root_path().to_owned();
        build_root.wait_until_empty(Duration::from_secs(20));
        drop(build_root);
        fs::create_dir_all(usual.join("left")).unwrap();
        fs::create_dir(top.join("a-0123456789")).unwrap();
        // The thread that removes directories gives up the lock a moment after its last owner.
        let end = Instant::now() + Duration::from_secs(20);
        let build_root = loop {
            match BuildRoot::open(&top) {
                Ok(build_root) => break build_root,
                Err(error) => assert!(Instant::now() < end, "{error}"),
            }
        };
        let run = build_root.create(SlotId(0), &action).unwrap();
        assert_eq!(run.root_path(), usual);
        assert_eq!(fs::read_dir(&usual).unwrap().count(), 0);
        drop(run);
        let left =
            || fs::read_dir(&top).unwrap().flatten().map(|entry| entry.file_name()).collect::<Vec<_>>();
        eventually("only directories of the server are removed", || left() == ["a-0123456789"]).await;
    });
}

/// Another process removes the server's directories. The running action fails without being at fault, and the next one
/// runs.
#[test]
fn a_removed_build_root_is_created_again() {
    with_worker(async |bench| {
        let gate = bench.build_root.parent().unwrap().join("gate");
        let job = sh(&format!("echo out > o; while ! [ -e {} ]; do :; done", gate.display())).outputs(&["o"]);
        let (report, ()) = tokio::join!(bench.report(&job), async {
            let begun = || {
                let mut runs = fs::read_dir(&bench.build_root).unwrap().flatten();
                runs.any(|run| run.path().join("root/o").exists())
            };
            eventually("the command begins", begun).await;
            fs::remove_dir_all(&bench.build_root).unwrap();
            fs::write(&gate, "").unwrap();
        });
        let failure = report.unwrap_err();
        assert!(matches!(failure.error, Error::Unavailable(_)) && failure.retryable, "{}", failure.error);
        let result = bench.result(&job).await;
        assert_eq!((result.exit_code, result.output_files.len()), (0, 1));
        // It may also be moved away instead of removed.
        fs::rename(&bench.build_root, bench.build_root.with_extension("old")).unwrap();
        assert_eq!(bench.result(&job).await.output_files.len(), 1);
    });
}

/// If there is a link at the path, the directory that it points to is used. A directory that was moved away may return
/// while runs in it continue.
#[test]
fn a_build_root_may_become_a_link_and_come_back() {
    let parent = tempfile::tempdir().unwrap();
    let [top, away, elsewhere] = ["build", "away", "elsewhere"].map(|name| parent.path().join(name));
    let build_root = BuildRoot::open(&top).unwrap();
    let action = gorego_reapi::digest::Digest::empty(SHA256);
    let create = || build_root.create(SlotId(0), &action).unwrap();
    let first = create();
    fs::rename(&top, &away).unwrap();
    fs::create_dir(&elsewhere).unwrap();
    std::os::unix::fs::symlink(&elsewhere, &top).unwrap();
    let of_link = [create(), create()];
    assert!(of_link.iter().all(|run| elsewhere.join(run.path().file_name().unwrap()).exists()));
    fs::remove_file(&top).unwrap();
    fs::rename(&away, &top).unwrap();
    let back = create();
    assert!(first.check_in_place().is_ok() && back.check_in_place().is_ok());
    assert!(of_link[0].check_in_place().is_err());
}

/// The leftovers have directories without permissions and links to other places.
#[test]
fn leftovers_of_a_crashed_run_are_removed_and_nothing_else() {
    with_worker(async |bench| {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("kept"), "").unwrap();
        let top = bench.build_root.parent().unwrap().join("other");
        let left = top.join("3-17/root/a/b");
        fs::create_dir_all(&left).unwrap();
        std::os::unix::fs::symlink(outside.path(), left.join("link")).unwrap();
        fs::set_permissions(left, std::os::unix::fs::PermissionsExt::from_mode(0o000)).unwrap();
        fs::create_dir(top.join("not-ours")).unwrap();
        let build_root = BuildRoot::open(&top).unwrap();
        let fresh = build_root.create(SlotId(3), &gorego_reapi::digest::Digest::empty(SHA256)).unwrap();
        eventually("leftovers are removed", || !top.join("3-17").exists()).await;
        assert!(top.join("not-ours").exists() && fresh.path().exists());
        assert!(outside.path().join("kept").exists());
    });
}

/// Servers with different stores may use one build root. The second must not remove the directories of the first.
#[test]
fn a_build_root_has_one_owner_and_no_other_server_sweeps_it() {
    with_worker(async |bench| {
        let job = sh("echo kept > kept; while ! [ -e ../../gate ]; do :; done; cat kept");
        let (report, refused) = tokio::join!(bench.report(&job), async {
            let begun = || {
                let mut runs = fs::read_dir(&bench.build_root).unwrap().flatten();
                runs.any(|run| run.path().join("root/kept").exists())
            };
            eventually("the command begins", begun).await;
            let second = BuildRoot::open(&bench.build_root);
            fs::write(bench.build_root.join("gate"), "").unwrap();
            second.map(drop)
        });
        let named = bench.build_root.to_str().unwrap();
        assert!(matches!(&refused, Err(Error::Precondition(m)) if m.contains(named)), "{refused:?}");
        assert_eq!(bench.text(&report.unwrap().result.stdout_digest), "kept\n");
    });
}
