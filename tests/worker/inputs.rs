//! The contents of an input root as a command sees them.

use crate::support::*;
use gorego_reapi::{error::Error, proto::reapi};
use prost::Message as _;
use std::{fs, process};

/// EXE-33 to EXE-39: everything in the tree, and nothing else.
#[test]
fn the_input_root_is_reproduced_exactly() {
    with_each_staging(async |bench| {
        let root = bench.input(&[
            ("f", file("content")),
            ("empty", file("")),
            ("d/x", program("run")),
            ("d/e", Node::Dir),
            ("up", link("../../outside/./x")),
            ("abs", link("/usr/bin/env")),
            ("d/dangling", link("no such thing")),
        ]);
        let job = sh("cd ../..; find . -printf '%P %y %m %l\\n' | LC_ALL=C sort")
            .root(root)
            .workdir("w/d")
            .outputs(&["o/p/q", "../r"]);
        let listed = bench.text(&bench.result(&job).await.stdout_digest);
        let expected = " d 755 \nabs l 777 /usr/bin/env\nd d 755 \nd/dangling l 777 no such thing\nd/e d 755 \n\
            d/x f 755 \nempty f 644 \nf f 644 \nup l 777 ../../outside/./x\nw d 755 \nw/d d 755 \nw/d/o d 755 \n\
            w/d/o/p d 755 \n";
        assert_eq!(listed, expected);
    });
}

/// EXE-37: the input is at fault, so a retry would not help.
#[test]
fn a_working_directory_that_modes_of_the_input_root_make_inaccessible_is_refused() {
    with_each_staging(async |bench| {
        let below = bench.store.put(reapi::Directory::default().encode_to_vec());
        let node = |name: &str, digest: gorego_reapi::digest::Digest| reapi::DirectoryNode {
            name: name.into(),
            digest: Some(digest.to_wire()),
        };
        let closed = reapi::Directory {
            directories: vec![node("below", below)],
            node_properties: Some(reapi::NodeProperties { unix_mode: Some(0), ..Default::default() }),
            ..Default::default()
        };
        let closed = bench.store.put(closed.encode_to_vec());
        let root = reapi::Directory { directories: vec![node("closed", closed)], ..Default::default() };
        let root = bench.store.put(root.encode_to_vec());
        for workdir in ["closed", "closed/below"] {
            let job = sh("echo here").root(root).workdir(workdir);
            // Permissions do not restrict root.
            if rustix::process::geteuid().is_root() && !bench.is_sandboxed {
                assert_eq!(bench.text(&bench.result(&job).await.stdout_digest), "here\n");
                continue;
            }
            let failure = bench.failure(&job).await;
            assert!(matches!(failure.error, Error::Invalid(_)) && !failure.retryable, "{}", failure.error);
            assert!(failure.error.to_string().contains(workdir), "{}", failure.error);
        }
    });
}

/// EXE-33. The files of an action look the same at any time and in any order of writing.
#[test]
fn everything_in_an_input_root_has_the_same_time() {
    with_each_staging(async |bench| {
        let root = bench.input(&[
            ("z/z.c", file("int z;")),
            ("a/e", Node::Dir),
            ("a/link", link("../z/z.c")),
            ("tool", program("#!/bin/sh\n")),
        ]);
        let job = sh("cd ../..; TZ=UTC find . -printf '%P %TF %TT\n' | LC_ALL=C sort")
            .root(root)
            .workdir("w/d")
            .outputs(&["o/p/q", "../../a/b/c", "../../z/z.o", "../../a/e/f/g"]);
        let listed = bench.text(&bench.result(&job).await.stdout_digest);
        assert_eq!(listed.lines().count(), 13, "{listed}");
        for line in listed.lines() {
            assert!(line.ends_with(" 2000-01-01 00:00:00.0000000000"), "{listed}");
        }
    });
}

/// Build results that return as inputs are up to date, wherever they are in the tree.
#[test]
fn make_does_not_rebuild_a_target_that_is_an_input() {
    if process::Command::new("make").arg("--version").output().is_err() {
        eprintln!("skipped: make is not installed");
        return;
    }
    with_each_staging(async |bench| {
        let root = bench.input(&[
            ("Makefile", file("a/a.o: z/z.c Makefile\n\techo rebuilt\n")),
            ("a/a.o", file("object")),
            ("z/z.c", file("source")),
        ]);
        let result = bench.result(&sh("make -s -q a/a.o").root(root)).await;
        assert_eq!(result.exit_code, 0, "{}", bench.text(&result.stderr_digest));
    });
}

/// EXE-37. The time is exact to the nanosecond, even before 1970 and even if the server creates directories in the
/// directory later.
#[test]
fn a_time_that_is_named_is_exact_on_files_directories_and_links() {
    with_each_staging(async |bench| {
        let named = |seconds, nanos| {
            let mtime = Some(prost_types::Timestamp { seconds, nanos });
            Some(reapi::NodeProperties { mtime, ..Default::default() })
        };
        let file = reapi::FileNode {
            name: "f".into(),
            digest: Some(bench.store.put("x").to_wire()),
            node_properties: named(1_234_567_890, 987_654_321),
            ..Default::default()
        };
        let symlink = reapi::SymlinkNode {
            name: "l".into(),
            target: "f".into(),
            node_properties: named(-1, 500_000_000),
        };
        let child = reapi::Directory {
            files: vec![file],
            symlinks: vec![symlink],
            node_properties: named(-86_400, 0),
            ..Default::default()
        };
        let node = reapi::DirectoryNode {
            name: "d".into(),
            digest: Some(bench.store.put(child.encode_to_vec()).to_wire()),
        };
        let root = reapi::Directory { directories: vec![node.clone()], ..Default::default() };
        let job = sh("stat -c '%.9Y %n' d d/f d/l d/made")
            .root(bench.store.put(root.encode_to_vec()))
            .outputs(&["d/made/by/us"]);
        assert_eq!(
            bench.text(&bench.result(&job).await.stdout_digest),
            "-86400.000000000 d\n1234567890.987654321 d/f\n-0.500000000 d/l\n946684800.000000000 d/made\n"
        );
        let bad = reapi::Directory {
            directories: vec![node],
            node_properties: named(0, 1_000_000_000),
            ..Default::default()
        };
        let failure = bench.failure(&sh("true").root(bench.store.put(bad.encode_to_vec()))).await;
        assert!(matches!(&failure.error, Error::Invalid(m) if m.contains("mtime")), "{}", failure.error);
    });
}

/// EXE-37. This includes directories, whose time would change and whose mode could prevent writing into them.
#[test]
fn mode_and_time_of_inputs_are_applied() {
    with_each_staging(async |bench| {
        let at = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
        let properties = |mode, seconds| {
            Some(reapi::NodeProperties { unix_mode: Some(mode), mtime: at(seconds), ..Default::default() })
        };
        let file = reapi::FileNode {
            name: "f".into(),
            digest: Some(bench.store.put("x").to_wire()),
            node_properties: properties(0o440, 1_000),
            ..Default::default()
        };
        let child = reapi::Directory {
            files: vec![file],
            node_properties: properties(0o550, 2_000),
            ..Default::default()
        };
        let node = reapi::DirectoryNode {
            name: "d".into(),
            digest: Some(bench.store.put(child.encode_to_vec()).to_wire()),
        };
        let root = reapi::Directory { directories: vec![node], ..Default::default() };
        let job = sh("stat -c '%a %Y %n' d d/f")
            .root(bench.store.put(root.encode_to_vec()))
            .outputs(&["d/made/by/us"]);
        assert_eq!(bench.text(&bench.result(&job).await.stdout_digest), "550 2000 d\n440 1000 d/f\n");
    });
}

/// EXE-38, EXE-39. The error names the obstacle in the input root, and nothing is created elsewhere.
#[test]
fn working_directories_and_output_parents_never_leave_the_root() {
    with_each_staging(async |bench| {
        let outside = tempfile::tempdir().unwrap();
        let root = bench.input(&[
            ("out", link(outside.path().to_str().unwrap())),
            ("up", link("../..")),
            ("file", file("")),
            ("gone", link("nothing")),
            ("inside", link("real/dir")),
            ("real/dir", Node::Dir),
        ]);
        for (workdir, output) in [
            ("out/x", "o"),
            ("out", "o"),
            ("up", "o"),
            ("file/x", "o"),
            ("gone", "o"),
            ("", "out/x/o"),
            ("", "up/x/o"),
            ("", "file/o"),
        ] {
            let job = sh("true").root(root).workdir(workdir).outputs(&[output]);
            let failure = bench.failure(&job).await;
            let component = format!("{workdir}{output}");
            let component =
                ["out", "up", "file", "gone"].into_iter().find(|c| component.starts_with(c)).unwrap();
            assert!(
                matches!(&failure.error, Error::Invalid(m) if m.contains(&format!("\"{component}"))),
                "{workdir} {output}: {}",
                failure.error
            );
        }
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
        let job = sh("pwd -P; echo > x/y").root(root).workdir("inside").outputs(&["x/y"]);
        let result = bench.result(&job).await;
        assert!(bench.text(&result.stdout_digest).ends_with("/real/dir\n"));
        assert_eq!(result.output_files[0].path, "x/y");
    });
}

/// EXE-43.
#[test]
fn an_action_that_changes_its_inputs_does_not_affect_the_next() {
    with_each_staging(async |bench| {
        let root = bench.input(&[("f", file("original")), ("d", Node::Dir)]);
        let spoil = sh("cat f; echo spoilt >> f; chmod 0 f; touch d/left").root(root);
        let look = sh("cat f; ls d").root(root);
        for job in [spoil, look] {
            assert_eq!(bench.text(&bench.result(&job).await.stdout_digest), "original");
        }
    });
}

/// EXE-43. Each action tries another way to change its inputs.
#[test]
fn no_action_can_change_the_inputs_of_another() {
    with_each_staging(async |bench| {
        let root = bench.input(&[
            ("f", file("original")),
            ("d/g", program("#!/bin/sh\n")),
            ("d/link", link("../f")),
            ("e/f/h", file("deep")),
        ]);
        let look = sh("find . -mindepth 1 -printf '%P %y %m %T@ %n %l\n' | LC_ALL=C sort; cat f d/g e/f/h")
            .root(root);
        let look = Job { do_not_cache: true, ..look };
        let before = bench.text(&bench.result(&look).await.stdout_digest);
        for script in [
            "printf more >> f; printf new > d/g; : > e/f/h",
            "chmod 777 f d/g e; chmod 0 e/f/h",
            "touch -d @1 f d/g e/f/h d",
            "mv f moved; mv e/f/h e/h; mv d/g f",
            "rm -r d e f",
            "ln f second; printf more >> second; ln d/g e/g; chmod 600 e/g",
            "rm f; mkdir f; rm -r d; ln -s / d; mkdir -p e/f/i/j",
            "truncate -s 0 f; truncate -s 1000000 e/f/h",
            "setfattr -n user.x -v y f; setfattr -n user.overlay.opaque -v y e; true",
            "exec 3<>f; printf more >&3; cat < /proc/self/fd/3 > /dev/null; printf x > /proc/self/fd/3",
            "mknod e/f/g c 0 0; rm -r e/f; mknod e/f c 0 0; true",
            MAPPED_WRITE,
        ] {
            bench.result(&sh(script).root(root)).await;
            assert_eq!(bench.text(&bench.result(&look).await.stdout_digest), before, "{script}");
        }
    });
}

/// Writes to an input through a memory mapping, if Python is available.
const MAPPED_WRITE: &str = "command -v python3 || exit 0; exec python3 -c '
import mmap
with open(\"f\", \"r+b\") as file, mmap.mmap(file.fileno(), 0) as memory:
    memory[0:4] = b\"XXXX\"
    memory.flush()
assert open(\"f\").read() == \"XXXXinal\"'";

/// The roots differ in a few entries. The order in which they are used does not matter.
#[test]
fn each_of_several_similar_roots_is_seen_exactly() {
    with_each_staging(async |bench| {
        let common: Vec<(String, Node)> =
            (0..40).map(|at| (format!("d{}/f{at}", at % 4), file(&format!("{at}")))).collect();
        let with = |more: &[(&str, Node)], without: &[&str]| {
            let kept = common.iter().filter(|(path, _)| !without.iter().any(|gone| path.starts_with(gone)));
            let kept = kept.map(|(path, node)| (path.as_str(), node.clone()));
            let changed = kept.filter(|(path, _)| more.iter().all(|(other, _)| other != path));
            bench.input(&changed.chain(more.iter().cloned()).collect::<Vec<_>>())
        };
        let roots = [
            with(&[], &[]),
            with(&[("d1/f1", file("changed")), ("d1/f5", program("39"))], &[]),
            with(&[("d1", file("a file now"))], &["d1/"]),
            with(&[("d1/f1", Node::Dir), ("d2", link("d3"))], &["d1/f1", "d2/"]),
            with(&[("new/a/b", file("new"))], &["d0/", "d3/f3"]),
            with(&[], &["d1/"]),
        ];
        let script = "find . -mindepth 1 | LC_ALL=C sort | while read -r path; do
            stat -c '%n %f %Y' $path; [ -d $path ] || cat $path; readlink $path; done; true";
        let look = |root| Job { do_not_cache: true, ..sh(script).root(root) };
        let mut seen = Vec::new();
        for root in roots {
            seen.push(bench.text(&bench.result(&look(root)).await.stdout_digest));
        }
        assert!(
            seen[1].contains("changed") && seen[2].contains("a file now") && !seen[4].contains("./d3/f3 ")
        );
        for at in [3, 0, 5, 1, 4, 2] {
            assert_eq!(bench.text(&bench.result(&look(roots[at])).await.stdout_digest), seen[at], "{at}");
        }
    });
}

/// The first change to a staged input copies it up, and the kernel counts that as a write of the command.
#[test]
fn an_input_larger_than_commands_may_write_can_be_changed_like_any_other() {
    with_staging(1 << 20, async |bench| {
        let root = bench.input(&[("big", file(&"x".repeat(3 << 20)))]);
        let job = sh("chmod +x big && ln big link && wc -c < link").root(root);
        assert_eq!(bench.text(&bench.result(&job).await.stdout_digest).trim(), "3145728");
    });
}

#[test]
fn inputs_that_a_result_refers_to_are_held_until_it_is_stored() {
    with_staging(1 << 30, async |bench| {
        let nodes = [("o/a", "1"), ("o/d/b", "2"), ("f", "3"), ("o/changed", "4"), ("other", "5")];
        let root = bench.input(&nodes.map(|(path, text)| (path, file(text))));
        let job = sh("echo 6 > o/changed").root(root).outputs(&["o", "f", "no/such"]);
        let result = bench.result(&job).await;
        assert_eq!(result.output_files[0].path, "f");
        let held = bench.store.held.lock().unwrap();
        let mut held: Vec<_> = held.iter().map(|digest| bench.text(&Some(digest.to_wire()))).collect();
        held.sort();
        assert_eq!(held, ["1", "2", "3"]);
    });
}
