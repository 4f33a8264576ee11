//! The outputs of a result, and the blobs that are stored for it.

use crate::support::*;
use gorego_reapi::{auxiliary::resource_usage, error::Error, proto::reapi};
use prost::Message as _;
use std::{fs, time::Duration};

/// EXE-47 to EXE-50, EXE-53, EXE-54.
#[test]
fn outputs_of_every_kind_are_reported_once_and_missing_ones_are_left_out() {
    with_each_staging(async |bench| {
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
fn legacy_lists_require_a_kind_of_output_unless_a_path_is_in_both() {
    with_each_staging(async |bench| {
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

/// EXE-52, EXE-54. Nothing outside of the root is read or changed, and nothing hangs.
#[test]
fn outputs_that_escape_or_are_not_files_are_refused_by_name() {
    with_each_staging(async |bench| {
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
        // The server must not change the mode of a link's target outside of the root (clients.md).
        let before = fs::metadata(&secret).unwrap().permissions();
        let result = bench.result(&sh(&format!("ln -s {}/secret l", out)).outputs(&["l"])).await;
        assert_eq!(result.output_symlinks.len(), 1);
        assert_eq!(fs::metadata(&secret).unwrap().permissions(), before);
        let blobs = bench.store.blobs.lock().unwrap();
        assert!(!blobs.values().any(|bytes| bytes == b"secret"));
    });
}

/// GEN-25. The result would not fit into a message.
#[test]
fn outputs_that_do_not_fit_into_a_message_are_refused_and_the_logs_are_kept() {
    with_each_staging(async |bench| {
        let script = "echo so many; t=$(printf '%04000d' 0); seq 600 | while read n; do ln -s $t $n; done";
        let paths: Vec<_> = (1..=600).map(|n| n.to_string()).collect();
        let paths: Vec<_> = paths.iter().map(String::as_str).collect();
        let failure = bench.failure(&sh(script).outputs(&paths)).await;
        assert!(
            matches!(&failure.error, Error::Invalid(m) if m.contains("fit into a message")),
            "{}",
            failure.error
        );
        let partial = failure.partial.unwrap();
        assert!(partial.output_symlinks.is_empty() && partial.stdout_digest.is_some());
    });
}

/// GEN-25. A command can name one file by any number of paths, and the memory is bounded before a result exists.
#[test]
fn a_link_that_many_outputs_name_counts_for_each_of_them() {
    with_each_staging(async |bench| {
        let script = "ln -s $(printf '%04000d' 0) link";
        let segment = |bit: bool| if bit { ".//" } else { "./" };
        let path = |n: u32| (0..16).map(|bit| segment(n >> bit & 1 == 1)).collect::<String>() + "link";
        let paths: Vec<_> = (0..10_000).map(path).collect();
        let paths: Vec<_> = paths.iter().map(String::as_str).collect();
        let failure = bench.failure(&sh(script).outputs(&paths)).await;
        assert!(matches!(&failure.error, Error::Invalid(m) if m.contains("has 412")), "{}", failure.error);
    });
}

/// EXE-55 to EXE-58.
#[test]
fn trees_are_canonical_deterministic_and_without_duplicates() {
    with_each_staging(async |bench| {
        // x/same and y/same are one Directory. It is also a child of z, one level deeper.
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

/// EXE-63: unreadable outputs are stored anyway and report their original mode.
#[test]
fn node_properties_are_reported_on_request_and_modes_do_not_hide_outputs() {
    with_each_staging(async |bench| {
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

/// GEN-20. A fault of the server would cause retries by the server and by the client.
#[test]
fn damage_to_logs_or_to_the_path_of_an_output_is_the_fault_of_the_command() {
    // In a sandbox a command does not see its logs.
    with_worker(async |bench| {
        for script in [
            "cd ../../0-*; rm stdout; ln -s /etc/passwd stdout",
            "cd ../../0-*; rm stdout; mkdir stdout",
            // Permissions do not restrict root, so as root the command makes a link that leads out instead.
            "echo o > p/o; chmod 0 p; [ $(id -u) != 0 ] || { rm -r p; ln -s / p; }",
        ] {
            // There must be exactly one directory.
            let left = || fs::read_dir(&bench.build_root).unwrap().count();
            eventually("the directory of the previous run is removed", || left() == 0).await;
            let failure = bench.failure(&sh(script).outputs(&["p/o"])).await;
            assert!(
                matches!(failure.error, Error::Precondition(_)) && !failure.retryable,
                "{}",
                failure.error
            );
        }
    });
}

/// The tree is deeper than the longest path, and has more files than the process may have descriptors.
#[test]
fn deep_and_wide_outputs_are_collected_and_removed() {
    with_each_staging(async |bench| {
        // The shell enters the directories in steps, because no path may be that long. Without -P, it uses the whole
        // path.
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
        let is_staged = |name: &std::ffi::OsStr| name.as_encoded_bytes().starts_with(b"t-");
        let left = || {
            let all = fs::read_dir(&bench.build_root).unwrap().flatten();
            all.filter(|entry| !is_staged(&entry.file_name())).count()
        };
        eventually("exec directories are removed", || left() == 0).await;
    });
}

/// EXE-18, EXE-19, EXE-60.
#[test]
fn a_success_is_recorded_with_whole_metadata_unless_it_must_not_be_cached() {
    with_each_staging(async |bench| {
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

/// Outputs that are also inputs: some unchanged, others changed, replaced or removed.
#[test]
fn outputs_that_are_also_inputs_are_reported_as_the_command_left_them() {
    with_each_staging(async |bench| {
        let root = bench.input(&[
            ("same", program("same")),
            ("changed", file("before")),
            ("removed", file("gone")),
            ("link", link("d/x")),
            ("to-d", link("d")),
            ("d/x", file("x")),
            ("d/y", file("y")),
            ("d/z/deep", file("deep")),
            ("untouched/a", file("a")),
            ("replaced/old", file("old")),
        ]);
        let script =
            "printf ' and after' >> changed; rm removed d/x; printf new > d/n; rm -r replaced; mkdir replaced
            printf r > replaced/r; chmod 755 d/y";
        let outputs = [
            "same",
            "changed",
            "removed",
            "link",
            "d",
            "untouched",
            "replaced",
            "to-d/y",
            "to-d/x",
            "to-d/z",
            "",
        ];
        let result = bench.result(&sh(script).root(root).outputs(&outputs)).await;
        let files: Vec<_> = result
            .output_files
            .iter()
            .map(|file| (&*file.path, bench.text(&file.digest), file.is_executable))
            .collect();
        assert_eq!(
            files,
            [
                ("same", "same".to_owned(), true),
                ("changed", "before and after".to_owned(), false),
                ("to-d/y", "y".to_owned(), true),
            ]
        );
        assert_eq!((&*result.output_symlinks[0].path, &*result.output_symlinks[0].target), ("link", "d/x"));
        let tree = |path: &str| {
            let of_path = |directory: &&reapi::OutputDirectory| directory.path == path;
            let directory = result.output_directories.iter().find(of_path).unwrap();
            reapi::Tree::decode(&*bench.store.get(directory.tree_digest.as_ref().unwrap())).unwrap()
        };
        let names = |path: &str| {
            let root = tree(path).root.unwrap();
            let files = root.files.into_iter().map(|file| file.name);
            files.chain(root.directories.into_iter().map(|node| node.name)).collect::<Vec<_>>()
        };
        assert_eq!(names("d"), ["n", "y", "z"]);
        assert_eq!(names("untouched"), ["a"]);
        assert_eq!(names("replaced"), ["r"]);
        assert_eq!(names("to-d/z"), ["deep"]);
        assert_eq!(names(""), ["changed", "same", "d", "replaced", "untouched"]);
        // A second run reports the same digests for the same content.
        let again =
            bench.result(&Job { do_not_cache: true, ..sh(script).root(root).outputs(&outputs) }).await;
        assert_eq!(again.output_directories, result.output_directories);
    });
}
