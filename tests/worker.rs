//! What a worker promises about an action, with real processes and a store in memory.

#![allow(clippy::unwrap_used, missing_docs, deprecated)]

mod support;

use actix::System;
use gorego::actors::worker::{
    launcher::protocol::{self, Kill, Order, Run, ToRunner},
    messages::{RunStage, SlotId},
    workspace::BuildRoot,
};
use gorego_reapi::{auxiliary::resource_usage, error::Error, proto::reapi};
use prost::Message as _;
use std::{
    fs,
    io::Write as _,
    os::{fd::OwnedFd, unix::net::UnixStream},
    process,
    time::Duration,
};
use support::*;

/// EXE-41.
#[test]
fn the_environment_is_the_commands_and_nothing_else() {
    with_worker(async |bench| {
        let job = argv(&["/usr/bin/env", "-0"]).env("B", "two words").env("A", "");
        assert_eq!(bench.text(&bench.result(&job).await.stdout_digest), "B=two words\0A=\0");
    });
}

/// EXE-40.
#[test]
fn arguments_arrive_byte_for_byte() {
    with_worker(async |bench| {
        let odd = ["", " ", "a\nb", "$HOME", "'\"\\", "*", "é", "--"];
        let mut arguments = vec!["/usr/bin/printf", "%s\\0"];
        arguments.extend(odd);
        let result = bench.result(&argv(&arguments)).await;
        assert_eq!(bench.text(&result.stdout_digest), odd.map(|a| format!("{a}\0")).concat());
    });
}

/// EXE-40, EXE-42.
#[test]
fn programs_are_found_in_the_path_of_the_command_or_reported_as_a_shell_would() {
    with_worker(async |bench| {
        let root = bench.input(&[
            ("tools/hello", program("#!/bin/sh\necho hello from $0\n")),
            ("tools/plain", file("#!/bin/sh\n")),
            ("tools/garbage", program("not a program")),
            ("tools/orphan", program("#!/no/such/interpreter\n")),
        ]);
        let run = async |name: &str, path: Option<&str>| {
            let mut job = argv(&[name]).root(root);
            if let Some(path) = path {
                job = job.env("PATH", path);
            }
            let result = bench.result(&job).await;
            (result.exit_code, bench.text(&result.stdout_digest), bench.text(&result.stderr_digest))
        };
        assert_eq!(run("hello", Some("/nowhere:tools")).await.1, "hello from tools/hello\n");
        assert_eq!(run("tools/hello", None).await.0, 0);
        assert_eq!(run("true", None).await.0, 0, "the default path is used without PATH");
        for (name, path, code, word) in [
            ("hello", Some("/usr/bin"), 127, "PATH=/usr/bin"),
            ("./nope", None, 127, "No such file"),
            ("/no/such", None, 127, "No such file"),
            ("tools/orphan", None, 127, "interpreter"),
            ("plain", Some("tools"), 126, "not executable"),
            ("tools/garbage", None, 126, "#!"),
            ("tools", None, 127, "PATH"),
            ("./tools", None, 126, "directory"),
        ] {
            let (got, _, stderr) = run(name, path).await;
            assert_eq!(got, code, "{name}: {stderr}");
            assert!(stderr.contains(word) && stderr.starts_with("gorego: "), "{name}: {stderr}");
        }
    });
}

/// EXE-33 to EXE-39: everything in the tree, and nothing else.
#[test]
fn the_input_root_is_reproduced_exactly() {
    with_worker(async |bench| {
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

/// EXE-37: it is the input's fault, and no other try would do better.
#[test]
fn a_working_directory_that_modes_of_the_input_root_close_is_refused_at_once() {
    with_worker(async |bench| {
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
            // Nothing is closed to root.
            if rustix::process::geteuid().is_root() {
                assert_eq!(bench.text(&bench.result(&job).await.stdout_digest), "here\n");
                continue;
            }
            let failure = bench.failure(&job).await;
            assert!(matches!(failure.error, Error::Invalid(_)) && !failure.retryable, "{}", failure.error);
            assert!(failure.error.to_string().contains(workdir), "{}", failure.error);
        }
    });
}

/// EXE-33: the same action sees the same world, whenever and in whatever order it was written.
#[test]
fn everything_in_an_input_root_carries_one_time() {
    with_worker(async |bench| {
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

/// What was built and uploaded is up to date when it comes back as inputs, wherever it lies in the tree.
#[test]
fn make_does_not_rebuild_what_is_among_its_inputs() {
    if process::Command::new("make").arg("--version").output().is_err() {
        eprintln!("skipped: make is not installed");
        return;
    }
    with_worker(async |bench| {
        let root = bench.input(&[
            ("Makefile", file("a/a.o: z/z.c Makefile\n\techo rebuilt\n")),
            ("a/a.o", file("object")),
            ("z/z.c", file("source")),
        ]);
        let result = bench.result(&sh("make -s -q a/a.o").root(root)).await;
        assert_eq!(result.exit_code, 0, "{}", bench.text(&result.stderr_digest));
    });
}

/// EXE-37: to the nanosecond, also before 1970, also where the server makes directories in a directory afterwards.
#[test]
fn a_time_that_is_named_is_exact_on_files_directories_and_links() {
    with_worker(async |bench| {
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

/// Compilers write their directory into what they make. Two runs at once cannot share one.
#[test]
fn the_path_of_the_exec_root_follows_from_the_action() {
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
            // A socket's path may have 108 bytes.
            assert!(path.strip_prefix(&top).unwrap().as_os_str().len() <= 20, "{}", path.display());
        }
        drop(runs);
        // At once, although what was in it may still be there.
        assert_eq!(build_root.create(SlotId(0), &action).unwrap().root_path(), paths[0]);
        build_root.wait_until_empty(Duration::from_secs(20));
        assert_eq!(fs::read_dir(&top).unwrap().count(), 0);
    });
}

/// A crash leaves the directory of an action behind; the action runs at its usual path nevertheless, from a fresh tree.
#[test]
fn what_a_crash_left_is_not_in_the_way_of_the_same_action() {
    with_worker(async |bench| {
        let action = bench.action(&sh("true")).digest;
        let top = bench.build_root.parent().unwrap().join("other");
        let build_root = BuildRoot::open(&top).unwrap();
        let usual = build_root.create(SlotId(0), &action).unwrap().root_path().to_owned();
        build_root.wait_until_empty(Duration::from_secs(20));
        drop(build_root);
        fs::create_dir_all(usual.join("left")).unwrap();
        fs::create_dir(top.join("a-0123456789")).unwrap();
        let build_root = BuildRoot::open(&top).unwrap();
        let run = build_root.create(SlotId(0), &action).unwrap();
        assert_eq!(run.root_path(), usual);
        assert_eq!(fs::read_dir(&usual).unwrap().count(), 0);
        drop(run);
        let left =
            || fs::read_dir(&top).unwrap().flatten().map(|entry| entry.file_name()).collect::<Vec<_>>();
        eventually("what is ours is removed, and nothing else", || left() == ["a-0123456789"]).await;
    });
}

/// Somebody cleans up where the server works. What ran then has failed by no fault of its own; the next action runs.
#[test]
fn a_build_root_that_is_removed_is_made_again() {
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
        // Also when it was moved away and not removed.
        fs::rename(&bench.build_root, bench.build_root.with_extension("old")).unwrap();
        assert_eq!(bench.result(&job).await.output_files.len(), 1);
    });
}

/// A link at its path leads to the directory that is used, and one that was moved away may come back while runs in it go on.
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

/// EXE-37: also for directories, whose time would change and whose mode would be in the way while they are filled.
#[test]
fn mode_and_time_of_inputs_are_applied() {
    with_worker(async |bench| {
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

/// EXE-38, EXE-39: what the input root puts in the way is named, and nothing is made elsewhere.
#[test]
fn working_directories_and_output_parents_never_leave_the_root() {
    with_worker(async |bench| {
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
        assert!(bench.text(&result.stdout_digest).ends_with("/root/real/dir\n"));
        assert_eq!(result.output_files[0].path, "x/y");
    });
}

/// EXE-47 to EXE-50, EXE-53, EXE-54.
#[test]
fn outputs_of_every_kind_are_reported_once_and_absent_ones_left_out() {
    with_worker(async |bench| {
        let job = sh("echo a > a; echo x > x; chmod +x x; mkdir -p d/sub; echo f > d/f; ln -s ../nowhere d/l
            ln -s d dirlink; ln -s a filelink; ln -s nothing dangling; ln -s /usr/bin/env abs; exit 3")
        .outputs(&[
            "a", "./x", "d", "d/f", "d/sub", "dirlink", "filelink", "dangling", "abs", "absent", "e/b",
        ]);
        let result = bench.result(&job).await;
        assert_eq!(result.exit_code, 3);
        let files: Vec<_> = result.output_files.iter().map(|f| (&*f.path, f.is_executable)).collect();
        assert_eq!(files, [("a", false), ("./x", true), ("d/f", false)]);
        assert_eq!(bench.store.get(result.output_files[2].digest.as_ref().unwrap()), b"f\n");
        let directories: Vec<_> = result.output_directories.iter().map(|d| &*d.path).collect();
        assert_eq!(directories, ["d", "d/sub"]);
        let links = |links: &[reapi::OutputSymlink]| -> Vec<_> {
            links.iter().map(|l| format!("{}>{}", l.path, l.target)).collect()
        };
        let all = ["dirlink>d", "filelink>a", "dangling>nothing", "abs>/usr/bin/env"];
        assert_eq!(links(&result.output_symlinks), all);
        assert_eq!(links(&result.output_directory_symlinks), all[..1]);
        assert_eq!(links(&result.output_file_symlinks), all[1..]);
        let tree = reapi::Tree::decode(
            &*bench.store.get(result.output_directories[0].tree_digest.as_ref().unwrap()),
        );
        let root = tree.unwrap().root.unwrap();
        assert_eq!((&*root.files[0].name, &*root.symlinks[0].target), ("f", "../nowhere"));
        assert_eq!(bench.store.results.lock().unwrap().len(), 0, "EXE-20: a failure is not recorded");
    });
}

/// EXE-51.
#[test]
fn legacy_lists_insist_on_the_kind_unless_a_path_is_in_both() {
    with_worker(async |bench| {
        let job = |files: &[&str], directories: &[&str]| {
            let mut job = sh("mkdir d; echo > f");
            job.command.output_files = files.iter().map(|p| (*p).to_owned()).collect();
            job.command.output_directories = directories.iter().map(|p| (*p).to_owned()).collect();
            job
        };
        for (files, directories, path) in [(&["d"][..], &[][..], "d"), (&[], &["f"], "f")] {
            let failure = bench.failure(&job(files, directories)).await;
            assert!(matches!(&failure.error, Error::Precondition(m) if m.contains(&format!("\"{path}\""))));
        }
        let result = bench.result(&job(&["d", "f"], &["d", "f"])).await;
        assert_eq!((result.output_files.len(), result.output_directories.len()), (1, 1));
    });
}

/// EXE-52, EXE-54: nothing outside is read or changed, nothing hangs.
#[test]
fn outputs_that_escape_or_are_not_files_are_refused_by_name() {
    with_worker(async |bench| {
        let outside = tempfile::tempdir().unwrap();
        let secret = outside.path().join("secret");
        fs::write(&secret, "secret").unwrap();
        let out = outside.path().display();
        for (script, output) in [
            (format!("rm -r d; ln -s {out} d"), "d/secret"),
            (format!("rm -r d; ln -s ../../../../../../../../..{out} d"), "d/secret"),
            ("rm -r d; mkfifo d".into(), "d"),
            ("mkfifo d/fifo".into(), "d"),
            ("perl -MIO::Socket::UNIX -e 'IO::Socket::UNIX->new(Local=>\"d/s\",Listen=>1)'".into(), "d/s"),
        ] {
            let root = bench.input(&[("d", Node::Dir)]);
            let failure = bench.failure(&sh(&script).root(root).outputs(&[output])).await;
            let named = |m: &str| m.contains(&format!("\"{output}"));
            assert!(
                matches!(&failure.error, Error::Precondition(m) if named(m)),
                "{script}: {}",
                failure.error
            );
            assert!(failure.partial.is_some() && !failure.retryable);
        }
        // The mode of the target of an unreadable link stays as it is (clients.md).
        let before = fs::metadata(&secret).unwrap().permissions();
        let result = bench.result(&sh(&format!("ln -s {}/secret l", out)).outputs(&["l"])).await;
        assert_eq!(result.output_symlinks.len(), 1);
        assert_eq!(fs::metadata(&secret).unwrap().permissions(), before);
        let blobs = bench.store.blobs.lock().unwrap();
        assert!(!blobs.values().any(|bytes| bytes == b"secret"));
    });
}

/// GEN-25: nobody could be told of it.
#[test]
fn outputs_that_fit_no_message_are_refused_with_the_logs_kept() {
    with_worker(async |bench| {
        let script = "echo so many; t=$(printf '%04000d' 0); seq 600 | while read n; do ln -s $t $n; done";
        let paths: Vec<_> = (1..=600).map(|n| n.to_string()).collect();
        let paths: Vec<_> = paths.iter().map(String::as_str).collect();
        let failure = bench.failure(&sh(script).outputs(&paths)).await;
        assert!(matches!(&failure.error, Error::Invalid(m) if m.contains("room")), "{}", failure.error);
        let partial = failure.partial.unwrap();
        assert!(partial.output_symlinks.is_empty() && partial.stdout_digest.is_some());
    });
}

/// EXE-55 to EXE-58.
#[test]
fn trees_are_canonical_deterministic_and_without_duplicates() {
    with_worker(async |bench| {
        // x/same and y/same are one Directory; it also is a child of z, below another one.
        let script = |order: &str| {
            format!(
                "mkdir d; for n in {order}; do mkdir -p d/$n/same; echo s > d/$n/same/f; done; mkdir d/empty"
            )
        };
        let tree = async |script: &str, format: i32| {
            let mut job = sh(script).outputs(&["d", "."]);
            job.command.output_directory_format = format;
            bench.result(&job).await.output_directories.swap_remove(0)
        };
        let first = tree(&script("x y z/deep"), 0).await;
        let second = tree(&script("z/deep y x"), 2).await;
        assert_eq!(first.tree_digest, second.tree_digest);
        assert!(first.is_topologically_sorted && first.root_directory_digest.is_none());

        let bytes = bench.store.get(first.tree_digest.as_ref().unwrap());
        let decoded = reapi::Tree::decode(&*bytes).unwrap();
        assert_eq!(decoded.encode_to_vec(), bytes, "the encoding is the canonical one");
        let all: Vec<_> = decoded.root.iter().chain(&decoded.children).collect();
        let digests: Vec<_> = all.iter().map(|d| SHA256.digest(&d.encode_to_vec()).to_wire()).collect();
        for (at, directory) in all.iter().enumerate() {
            assert!(directory.directories.is_sorted_by(|a, b| a.name < b.name));
            for child in &directory.directories {
                let position = digests.iter().position(|d| Some(d) == child.digest.as_ref()).unwrap();
                assert!(position > at, "parents come before children");
                assert_eq!(digests.iter().filter(|d| Some(*d) == child.digest.as_ref()).count(), 1);
            }
        }
        // root, {same} (x, y and z/deep are equal), {f}, z, empty
        assert_eq!(all.len(), 5);
        assert_eq!(second.root_directory_digest.as_ref(), Some(&digests[0]));
        digests.iter().for_each(|digest| drop(bench.store.get(digest)));

        let only = tree(&script("x"), 1).await;
        assert!(only.tree_digest.is_none() && only.root_directory_digest.is_some());

        let empty = bench.result(&sh("mkdir d").outputs(&["d"])).await.output_directories.swap_remove(0);
        assert_eq!(bench.store.get(empty.tree_digest.as_ref().unwrap()), [0x0a, 0x00]);
    });
}

/// EXE-63; unreadable things are stored all the same and report the mode they had.
#[test]
fn node_properties_are_reported_on_request_and_modes_do_not_hide_outputs() {
    with_worker(async |bench| {
        let mut job =
            sh("mkdir d; echo a > d/a; touch -d @5 d/a; chmod 0 d/a d; echo b > b; chmod 0200 b; chmod 0 .. .; echo c")
                .outputs(&["d", "b"]);
        job.command.output_node_properties = vec!["unix_mode".into(), "mtime".into()];
        let result = bench.result(&job).await;
        let tree = result.output_directories[0].tree_digest.as_ref().unwrap();
        let root = reapi::Tree::decode(&*bench.store.get(tree)).unwrap().root.unwrap();
        let a = root.files[0].node_properties.clone().unwrap();
        assert_eq!((a.unix_mode, a.mtime.unwrap().seconds), (Some(0), 5));
        assert_eq!(root.node_properties.unwrap().unix_mode, Some(0));
        assert_eq!(result.output_files[0].node_properties.clone().unwrap().unix_mode, Some(0o200));
        assert_eq!(bench.text(&result.stdout_digest), "c\n");
    });
}

/// GEN-20: a fault of the server would be tried again, and by the client once more.
#[test]
fn what_a_command_does_to_its_logs_or_to_the_way_to_an_output_is_its_own_fault() {
    with_worker(async |bench| {
        for script in [
            "cd ../../0-*; rm stdout; ln -s /etc/passwd stdout",
            "cd ../../0-*; rm stdout; mkdir stdout",
            // Nothing stops root, who gets a link that leads out instead.
            "echo o > p/o; chmod 0 p; [ $(id -u) != 0 ] || { rm -r p; ln -s / p; }",
        ] {
            // There must be one directory to choose from.
            let left = || fs::read_dir(&bench.build_root).unwrap().count();
            eventually("the directory of the run before is removed", || left() == 0).await;
            let failure = bench.failure(&sh(script).outputs(&["p/o"])).await;
            assert!(
                matches!(failure.error, Error::Precondition(_)) && !failure.retryable,
                "{}",
                failure.error
            );
        }
    });
}

/// A tree deeper than any path may be long, and more files than descriptors.
#[test]
fn deep_and_wide_outputs_are_collected_and_removed() {
    with_worker(async |bench| {
        // In steps, because no path may be that long; without -P, a shell goes by the whole one.
        let script = "step=$(printf 'dddddddd/%.0s' $(seq 300))
            for i in $(seq 10); do mkdir -p $step && cd -P $step || exit; done; printf leaf > leaf";
        let result = bench.result(&sh(script).outputs(&["dddddddd"])).await;
        let tree = result.output_directories[0].tree_digest.as_ref().unwrap();
        let tree = reapi::Tree::decode(&*bench.store.get(tree)).unwrap();
        assert_eq!(tree.children.len(), 2_999);
        assert_eq!(tree.children[2_998].files[0].name, "leaf");

        let wide = sh("mkdir w; cd w; seq 1 5000 | xargs touch").outputs(&["w"]);
        let result = bench.result(&wide).await;
        let tree = result.output_directories[0].tree_digest.as_ref().unwrap();
        assert_eq!(reapi::Tree::decode(&*bench.store.get(tree)).unwrap().root.unwrap().files.len(), 5_000);
        eventually("exec directories are removed", || fs::read_dir(&bench.build_root).unwrap().count() == 0)
            .await;
    });
}

/// EXE-46.
#[test]
fn exit_codes_and_signals_are_passed_on() {
    with_worker(async |bench| {
        for (script, code) in [("exit 0", 0), ("exit 42", 42), ("exit 255", 255), ("kill -9 $$", 137)] {
            assert_eq!(bench.result(&sh(script)).await.exit_code, code, "{script}");
        }
        // A writer to a closed pipe must die of it, as it would anywhere else.
        let result = bench.result(&sh("(yes; echo $? >&2) | head -n 1")).await;
        assert_eq!(bench.text(&result.stderr_digest), "141\n");
    });
}

/// EXE-44, EXE-45.
#[test]
fn a_command_past_its_timeout_is_killed_with_all_it_started_and_keeps_its_log() {
    with_worker(async |bench| {
        let job = sh("echo begun; sh -c 'echo $$; exec sleep 600' & sleep 600")
            .timeout(Duration::from_secs(2))
            .outputs(&["o"]);
        let failure = bench.failure(&job).await;
        assert!(matches!(failure.error, Error::DeadlineExceeded(_)) && !failure.retryable);
        let partial = failure.partial.unwrap();
        let log = bench.text(&partial.stdout_digest);
        let (begun, pid) = log.split_once('\n').unwrap();
        assert_eq!(begun, "begun");
        assert!(pid.trim().parse::<u32>().is_ok() && !is_alive(pid), "{log}");
        let run = partial.execution_metadata.unwrap().virtual_execution_duration.unwrap();
        assert!(Duration::try_from(run).unwrap() >= Duration::from_millis(1_990));
        assert!(bench.store.results.lock().unwrap().is_empty(), "EXE-19");
    });
}

/// EXE-44: also a daemon that has left session, group and parents behind.
#[test]
fn nothing_survives_the_command() {
    with_worker(async |bench| {
        let daemon = "setsid sh -c 'setsid sh -c \"echo \\$\\$ > daemon; exec sleep 600\" & exit' & \
            sleep 600 & echo $! > background; while ! [ -s daemon ]; do :; done; cat daemon background";
        let pids = bench.text(&bench.result(&sh(daemon)).await.stdout_digest);
        assert_eq!(pids.lines().count(), 2);
        pids.lines().for_each(|pid| assert!(!is_alive(pid), "{pid} lives"));
        // stdin is empty.
        assert_eq!(bench.result(&argv(&["/bin/cat"])).await.exit_code, 0);
    });
}

#[test]
fn a_cancelled_command_stops_at_once_and_keeps_its_log() {
    with_worker(async |bench| {
        let job = sh("echo begun; sleep 600");
        let cancel = job.cancel.clone();
        let stages = bench.stages.clone();
        let build_root = bench.build_root.clone();
        actix::spawn(async move {
            let begun = || {
                let mut logs = fs::read_dir(&build_root).unwrap().flatten().map(|d| d.path().join("stdout"));
                logs.any(|log| fs::metadata(log).is_ok_and(|m| m.len() > 0))
            };
            eventually("the command begins", begun).await;
            cancel.cancel();
        });
        let failure = bench.failure(&job).await;
        assert!(matches!(failure.error, Error::Cancelled(_)) && !failure.retryable);
        assert_eq!(bench.text(&failure.partial.unwrap().stdout_digest), "begun\n");
        let expected = [RunStage::Fetching, RunStage::Running, RunStage::Uploading];
        eventually("the stages are heard of", || *stages.lock().unwrap() == expected).await;
        // And before it begins, nothing is done at all.
        assert!(matches!(bench.failure(&job).await.error, Error::Cancelled(_)));
        assert_eq!(stages.lock().unwrap().len(), 3);
    });
}

/// Service managers send SIGTERM to every process, and scripts signal their parents; what runs is not lost by that.
#[test]
fn signals_that_can_be_blocked_do_not_reach_the_runner_and_its_commands_do_not_inherit_that() {
    with_worker(async |bench| {
        let signalled =
            "for s in HUP INT TERM TSTP USR1 ALRM; do kill -$s $PPID; done; echo through; kill $$";
        let result = bench.result(&sh(signalled).timeout(Duration::from_secs(10))).await;
        assert_eq!(bench.text(&result.stdout_digest), "through\n");
        assert_eq!(result.exit_code, 128 + 15);
    });
}

/// A command can reach its runner, since both run as one user; the worker must come through, and what the command left in
/// sessions and directories of its own must not.
#[test]
fn a_command_that_kills_its_runner_is_reported_and_the_next_one_runs() {
    with_worker(async |bench| {
        let pids = bench.build_root.parent().unwrap().join("pids");
        let script = format!(
            "f() {{ f & exit; }}; for i in 1 2 3 4 5 6 7 8; do f & done; sleep 600 & echo $! > {0}; cd /; \
             setsid sleep 600 & echo $! >> {0}; kill -9 $PPID; sleep 600",
            pids.display()
        );
        let failure = bench.failure(&sh(&script)).await;
        assert!(matches!(failure.error, Error::Internal(_)) && failure.retryable, "{}", failure.error);
        let left = fs::read_to_string(pids).unwrap();
        assert_eq!(left.lines().count(), 2);
        for pid in left.lines() {
            eventually("what the command started is killed", || !is_alive(pid)).await;
        }
        let processes = fs::read_dir("/proc").unwrap().flatten();
        let mut places = processes.filter_map(|process| fs::read_link(process.path().join("cwd")).ok());
        assert!(!places.any(|cwd| cwd.starts_with(&bench.build_root)), "something keeps forking");
        assert_eq!(bench.result(&sh("true")).await.exit_code, 0);
    });
}

#[test]
fn a_panic_becomes_a_report_and_the_worker_goes_on() {
    with_worker(async |bench| {
        *bench.store.panic_next.lock().unwrap() = true;
        let failure = bench.failure(&sh("true")).await;
        assert!(failure.retryable && failure.error.to_string().contains("as the test asked"));
        assert_eq!(bench.result(&sh("true")).await.exit_code, 0);
    });
}

/// EXE-43.
#[test]
fn an_action_that_changes_its_inputs_changes_nothing_for_the_next() {
    with_worker(async |bench| {
        let root = bench.input(&[("f", file("original")), ("d", Node::Dir)]);
        let spoil = sh("cat f; echo spoilt >> f; chmod 0 f; touch d/left").root(root);
        let look = sh("cat f; ls d").root(root);
        for job in [spoil, look] {
            assert_eq!(bench.text(&bench.result(&job).await.stdout_digest), "original");
        }
    });
}

/// EXE-18, EXE-19, EXE-60.
#[test]
fn a_success_is_recorded_with_whole_metadata_unless_it_must_not_be_cached() {
    with_worker(async |bench| {
        let job = sh("i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo out; echo err >&2");
        let result = bench.result(&job).await;
        assert_eq!(bench.store.results.lock().unwrap().values().next(), Some(&result));
        let metadata = result.execution_metadata.unwrap();
        assert_eq!(metadata.worker, "testhost/0");
        let types: Vec<_> = metadata.auxiliary_metadata.iter().map(|any| any.type_url.as_str()).collect();
        assert_eq!(types, ["type.googleapis.com/google.protobuf.Struct"], "what every client can print");
        let usage = resource_usage(&metadata.auxiliary_metadata).unwrap();
        assert!(Duration::try_from(usage.user_time.unwrap()).unwrap() > Duration::ZERO);
        assert!(usage.max_resident_bytes > 0);

        let silent = Job { do_not_cache: true, ..sh("true") };
        let result = bench.result(&silent).await;
        assert_eq!((result.stdout_digest, result.stderr_digest), (None, None), "EXE-59");
        assert_eq!(bench.store.results.lock().unwrap().len(), 1);
    });
}

/// Also one with closed permissions, links to elsewhere and great depth.
#[test]
fn what_a_crashed_run_left_is_swept_and_nothing_else() {
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

/// Servers with stores of their own may be told to use one build root: the second must not sweep what the first runs in.
#[test]
fn a_build_root_has_one_owner_and_nobody_else_sweeps_it() {
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

/// A command cannot fill the disk with one file; the limit of these tests is 1 GiB.
#[test]
fn files_beyond_the_limit_end_the_command() {
    with_worker(async |bench| {
        let result = bench.result(&argv(&["/usr/bin/truncate", "-s", "2G", "big"])).await;
        assert_ne!(result.exit_code, 0);
    });
}

/// As from a shell: through a pipe, so that nothing is overwritten or cut off by another open.
#[test]
fn a_command_may_open_its_standard_output_and_error_again_in_any_mode() {
    with_worker(async |bench| {
        let script = "echo 1 > /dev/stderr; echo 2 >> /dev/stderr; echo 3 > /dev/fd/2; echo 4 > /proc/self/fd/2
            echo 5 | tee /dev/stderr; echo 6 1<> /dev/stderr; echo 7 >&2; echo 8 > /dev/stdout; echo 9 > /proc/$$/fd/1
            dd if=/dev/stdin of=/dev/stderr conv=notrunc status=none <<end
10
end";
        let result = bench.result(&sh(script)).await;
        assert_eq!(bench.text(&result.stdout_digest), "5\n8\n9\n");
        let expected: String = [1, 2, 3, 4, 5, 6, 7, 10].map(|n| format!("{n}\n")).concat();
        assert_eq!(bench.text(&result.stderr_digest), expected);
    });
}

/// EXE-59: from many processes at once, a little and a lot, up to the last word before the end.
#[test]
fn all_output_is_kept_in_the_order_of_its_pipe() {
    with_worker(async |bench| {
        let script =
            "seq 1000000; printf 'last word'; for i in $(seq 50); do printf $i, >&2; done; kill -9 $$";
        let result = bench.result(&sh(script)).await;
        let expected: String = (1..=1_000_000).map(|n| format!("{n}\n")).collect();
        assert!(bench.text(&result.stdout_digest) == expected + "last word");
        let expected: String = (1..=50).map(|n| format!("{n},")).collect();
        assert_eq!(bench.text(&result.stderr_digest), expected);
        // Many print at the same time; each line is written at once and stays whole.
        let script = "for i in 1 2 3 4; do for n in $(seq 2000); do echo $n; done & done; wait";
        let lines = bench.text(&bench.result(&sh(script)).await.stdout_digest);
        let mut lines: Vec<u32> = lines.lines().map(|line| line.parse().unwrap()).collect();
        lines.sort_unstable();
        assert_eq!(lines, (1..=2_000).flat_map(|n| [n; 4]).collect::<Vec<_>>());
    });
}

/// A descriptor can be handed to a process that the command did not start, a build daemon for example.
#[test]
fn an_output_that_somebody_else_holds_open_delays_no_result_and_the_next_one_is_not_his() {
    with_worker(async |bench| {
        let job = sh("echo mine; echo $$ > pid; while ! [ -e ../../gate ]; do :; done");
        let (report, held) = tokio::join!(bench.report(&job), async {
            let pid = || {
                let mut runs = fs::read_dir(&bench.build_root).unwrap().flatten();
                runs.find_map(|run| fs::read_to_string(run.path().join("root/pid")).ok()).unwrap_or_default()
            };
            eventually("the command begins", || pid().ends_with('\n')).await;
            let mut held =
                fs::File::options().write(true).open(format!("/proc/{}/fd/1", pid().trim())).unwrap();
            held.write_all(b"and his\n").unwrap();
            fs::write(bench.build_root.join("gate"), "").unwrap();
            held
        });
        assert_eq!(bench.text(&report.unwrap().result.stdout_digest), "mine\nand his\n");
        let mut held = held;
        let refused = held.write_all(b"too late").unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::BrokenPipe);
        assert_eq!(bench.text(&bench.result(&sh("echo next")).await.stdout_digest), "next\n");
    });
}

/// EXE-59: the limit of a file holds for a log too, and no command can turn a log that is cut off into a success.
#[test]
fn a_command_that_prints_more_than_a_log_may_hold_is_killed_and_told_the_setting() {
    const LIMIT: usize = 300_000;
    with_worker_of(LIMIT as u64, async |bench| {
        let exact = bench.result(&sh(&format!("head -c {LIMIT} /dev/zero"))).await;
        assert_eq!((exact.exit_code, exact.stdout_digest.unwrap().size_bytes), (0, LIMIT as i64));
        bench.store.results.lock().unwrap().clear();
        for (script, name) in [
            ("trap '' PIPE XFSZ; yes; sleep 600", "stdout"),
            ("yes >&2", "stderr"),
            // By a byte, with the last that it writes.
            (&*format!("head -c {LIMIT} /dev/zero; printf x; exit 0"), "stdout"),
        ] {
            let report = bench.report(&sh(script)).await.unwrap();
            assert_eq!(report.result.exit_code, 128 + libc::SIGXFSZ, "{script}");
            let told = &report.account.message;
            assert!(told.contains(name) && told.contains("execution.max_output_file_gb"), "{told}");
            let log =
                if name == "stdout" { report.result.stdout_digest } else { report.result.stderr_digest };
            assert_eq!(log.unwrap().size_bytes, LIMIT as i64, "what fits is kept");
        }
        assert!(bench.store.results.lock().unwrap().is_empty(), "EXE-20");
    });
}

/// A command that waits for room in its pipe is one like any other.
#[test]
fn a_chatty_command_is_stopped_by_its_timeout() {
    /// A fast machine prints a gigabyte before the timeout, and the limit of a log must not end the command first.
    const UNREACHED: u64 = 1 << 40;
    with_worker_of(UNREACHED, async |bench| {
        let begun = std::time::Instant::now();
        let job = sh("while :; do echo spam; done & yes spam").timeout(Duration::from_secs(1));
        let failure = bench.failure(&job).await;
        assert!(matches!(failure.error, Error::DeadlineExceeded(_)), "{}", failure.error);
        assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
        let log = bench.text(&failure.partial.unwrap().stdout_digest);
        assert!(log.starts_with("spam\n") && log.len() > 100_000, "{} bytes", log.len());
    });
}

/// The server can be killed at any time; what ran for it must not go on.
#[test]
fn a_runner_whose_server_dies_kills_what_it_started_and_ends() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).into_os_string().into_encoded_bytes();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut runner = process::Command::new(env!("CARGO_BIN_EXE_gorego"))
        .arg("runner")
        .stdin(OwnedFd::from(theirs))
        .spawn()
        .unwrap();
    // A kill that finds nothing to kill is not an error.
    protocol::write(&ours, &ToRunner { order: Some(Order::Kill(Kill {})) }).unwrap();
    let script = "setsid sleep 600 & echo $! > pids; echo $$ >> pids; sleep 600";
    let run = Run {
        programs: vec![b"/bin/sh".into()],
        arguments: [&b"sh"[..], b"-c", script.as_bytes()].map(Vec::from).into(),
        root: path(""),
        working_directory: b".".into(),
        stdout: path("stdout"),
        stderr: path("stderr"),
        max_file_bytes: u64::MAX,
        ..Default::default()
    };
    protocol::write(&ours, &ToRunner { order: Some(Order::Run(run)) }).unwrap();
    let pids = || fs::read_to_string(directory.path().join("pids")).unwrap_or_default();
    System::new().block_on(async {
        eventually("the command runs", || pids().lines().count() == 2).await;
        drop(ours);
        for pid in pids().lines() {
            eventually("it is killed", || !is_alive(pid)).await;
        }
        eventually("the runner ends", || runner.try_wait().unwrap().is_some()).await;
    });
}
