//! Outputs of actions: EXE-47..58, EXE-63.

use crate::support::{Client, Server, empty, sh, sh_with, sha256};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    proto::reapi::{
        Command, Directory, GetTreeRequest, OutputDirectory, Tree, command::OutputDirectoryFormat,
    },
};
use prost::Message as _;
use std::collections::HashMap;
use tonic::Code;

/// EXE-47, EXE-48, EXE-50, EXE-53.
#[tokio::test]
#[allow(deprecated)]
async fn the_kind_of_an_output_path_is_decided_after_the_run() {
    let server = Server::start().await;
    let client = server.client().await;
    let command = Command {
        output_files: vec!["decoy".into()],
        ..sh_with(
            "echo x > 'a file'; mkdir dir; ln -s 'a file' to_file; ln -s dir to_dir; ln -s gone dangling; touch decoy",
            &["a file", "dir", "to_file", "to_dir", "dangling", "never"],
        )
    };
    let result = client.run_command(command).await;
    assert_eq!(paths(result.output_files.iter().map(|f| &f.path)), ["a file"]);
    assert_eq!(paths(result.output_directories.iter().map(|d| &d.path)), ["dir"]);
    let links = |links: &[gorego_reapi::proto::reapi::OutputSymlink]| -> Vec<(String, String)> {
        let mut links: Vec<_> = links.iter().map(|l| (l.path.clone(), l.target.clone())).collect();
        links.sort();
        links
    };
    let pair = |path: &str, target: &str| (path.to_owned(), target.to_owned());
    let expected = [pair("dangling", "gone"), pair("to_dir", "dir"), pair("to_file", "a file")];
    assert_eq!(links(&result.output_symlinks), expected);
    assert_eq!(links(&result.output_directory_symlinks), [pair("to_dir", "dir")]);
    assert_eq!(links(&result.output_file_symlinks), [pair("dangling", "gone"), pair("to_file", "a file")]);
}

/// EXE-49: each nested request appears once, and symlinks inside a directory stay inside its Tree.
#[tokio::test]
async fn nested_outputs_appear_exactly_once_each() {
    let server = Server::start().await;
    let client = server.client().await;
    let script = "mkdir d; echo x > d/f; ln -s f d/l; chmod 000 d/f";
    let result = client.run_command(sh_with(script, &["d", "d/f"])).await;
    assert_eq!(paths(result.output_files.iter().map(|f| &f.path)), ["d/f"]);
    assert_eq!(result.output_directories.len(), 1);
    assert!(result.output_symlinks.is_empty());
    let tree = tree(&client, &result.output_directories[0]).await;
    assert_eq!(tree.root.unwrap().symlinks[0].target, "f");
}

/// EXE-51.
#[tokio::test]
#[allow(deprecated)]
async fn the_legacy_lists_insist_on_their_kind_unless_a_path_is_in_both() {
    let server = Server::start().await;
    let client = server.client().await;
    let wrong = Command { output_files: vec!["d".into()], ..sh("mkdir -p d") };
    let action = client.action(wrong, empty()).await;
    assert_eq!(client.run(action).await.status.unwrap().code, Code::FailedPrecondition as i32);
    let wrong = Command { output_directories: vec!["f".into()], ..sh("touch f") };
    let action = client.action(wrong, empty()).await;
    assert_eq!(client.run(action).await.status.unwrap().code, Code::FailedPrecondition as i32);
    let both = Command {
        output_files: vec!["x".into(), "y".into()],
        output_directories: vec!["x".into(), "y".into()],
        ..sh("touch x; mkdir y")
    };
    let result = client.run_command(both).await;
    assert_eq!(paths(result.output_files.iter().map(|f| &f.path)), ["x"]);
    assert_eq!(paths(result.output_directories.iter().map(|d| &d.path)), ["y"]);
}

/// EXE-54: outputs are also collected after a failure; special files fail fast.
#[tokio::test]
async fn outputs_of_a_failing_command_are_kept_and_special_files_are_refused() {
    let server = Server::start().await;
    let client = server.client().await;
    let result =
        client.run_command(sh_with("echo log > test.log; chmod +x test.log; exit 1", &["test.log"])).await;
    assert_eq!(client.output(&result, "test.log").await, "log\n");
    assert!(result.output_files[0].is_executable);
    for (script, name) in [("mkfifo out", "out"), ("mkdir d; mkfifo d/pipe", "d/pipe")] {
        let output = name.split('/').next().unwrap();
        let action = client.action(sh_with(script, &[output]), empty()).await;
        let status = client.run(action).await.status.unwrap();
        let expected = [Code::FailedPrecondition as i32, Code::InvalidArgument as i32];
        assert!(
            expected.contains(&status.code)
                && status.message.contains("pipe") | status.message.contains("out")
        );
    }
}

/// EXE-55..57: canonical, complete, sorted, and the same in every run.
#[tokio::test]
async fn a_tree_has_every_directory_once_and_equal_directories_give_equal_trees() {
    let server = Server::start().await;
    let client = server.client().await;
    let script = "mkdir -p d/a/same d/b/same d/c/void; echo x > d/a/same/f; echo x > d/b/same/f; ln -s a d/l";
    let first = client.run_command(sh_with(script, &["d"])).await;
    let second = client.run_command(sh_with(&format!("{script}; true"), &["d"])).await;
    let output = &first.output_directories[0];
    assert_eq!(output.tree_digest, second.output_directories[0].tree_digest);
    assert!(output.is_topologically_sorted);
    let tree = tree(&client, output).await;
    let children: HashMap<Digest, &Directory> =
        tree.children.iter().map(|child| (sha256(&child.encode_to_vec()), child)).collect();
    assert_eq!(children.len(), tree.children.len(), "no child twice");
    let mut open = vec![tree.root.as_ref().unwrap()];
    let mut seen = 0;
    while let Some(directory) = open.pop() {
        let names: Vec<_> = directory.directories.iter().map(|d| &d.name).collect();
        assert!(names.is_sorted());
        for node in &directory.directories {
            let digest = parse(node.digest.as_ref());
            open.push(children.get(&digest).expect("every reference is among the children"));
            seen += 1;
        }
        for node in &directory.files {
            client.read(parse(node.digest.as_ref())).await.expect("every file is in the CAS");
        }
    }
    assert_eq!(seen, 6);

    let void = client.run_command(sh_with("mkdir void", &["void"])).await;
    let digest = parse(void.output_directories[0].tree_digest.as_ref());
    assert_eq!(client.read(digest).await.unwrap(), b"\x0a\x00", "EXE-56");
}

/// EXE-58.
#[tokio::test]
async fn output_directories_come_in_the_format_asked_for() {
    let server = Server::start().await;
    let client = server.client().await;
    for (format, has_tree, has_root) in [
        (OutputDirectoryFormat::TreeOnly, true, false),
        (OutputDirectoryFormat::DirectoryOnly, false, true),
        (OutputDirectoryFormat::TreeAndDirectory, true, true),
    ] {
        let command = Command {
            output_directory_format: format as i32,
            ..sh_with("mkdir -p d/e; echo x > d/e/f", &["d"])
        };
        let result = client.run_command(command).await;
        let output = &result.output_directories[0];
        assert_eq!(output.tree_digest.is_some(), has_tree, "{format:?}");
        assert_eq!(output.root_directory_digest.is_some(), has_root, "{format:?}");
        if let Some(root) = &output.root_directory_digest {
            let request = GetTreeRequest { root_digest: Some(root.clone()), ..Default::default() };
            let mut pages = client.cas.clone().get_tree(request).await.unwrap().into_inner();
            let page = pages.message().await.unwrap().unwrap();
            assert_eq!(page.directories.len(), 2);
        }
    }
}

/// EXE-63.
#[tokio::test]
async fn node_properties_of_outputs_are_reported_when_asked_for() {
    let server = Server::start().await;
    let client = server.client().await;
    let command = Command {
        output_node_properties: vec!["unix_mode".into(), "mtime".into()],
        ..sh_with("touch -d @1000000000 f; chmod 640 f", &["f"])
    };
    let result = client.run_command(command).await;
    let properties = result.output_files[0].node_properties.as_ref().unwrap();
    assert_eq!(properties.unix_mode.map(|mode| mode & 0o777), Some(0o640));
    assert_eq!(properties.mtime.unwrap().seconds, 1_000_000_000);
}

/// BuildStream's form: the root itself, and paths that go up from a deep working directory (clients.md).
#[tokio::test]
async fn the_whole_root_can_be_an_output_and_paths_may_climb_within_it() {
    let server = Server::start().await;
    let client = server.client().await;
    let command = Command {
        working_directory: "deep/er/down".into(),
        ..sh_with("echo up > ../../../top; echo here > here", &[".", "../../../top"])
    };
    let result = client.run_command(command).await;
    assert_eq!(client.output(&result, "../../../top").await, "up\n");
    assert_eq!(result.output_directories[0].path, ".");
    let tree = tree(&client, &result.output_directories[0]).await;
    assert_eq!(tree.root.unwrap().files[0].name, "here");
}

/// EXE-48: Pants sends "" for the working directory; it means the same as ".".
#[tokio::test]
async fn an_empty_output_path_is_the_working_directory_as_a_tree() {
    let server = Server::start().await;
    let client = server.client().await;
    let command = Command {
        working_directory: "w/d".into(),
        ..sh_with("mkdir sub; echo here > here; echo up > ../up", &[""])
    };
    let action = client.action(command, empty()).await;
    for cached in [false, true] {
        let response = client.run(action).await;
        assert_eq!(response.cached_result, cached);
        let result = response.result.unwrap();
        assert_eq!(paths(result.output_directories.iter().map(|d| &d.path)), [""]);
        assert!(result.output_files.is_empty());
        let root = tree(&client, &result.output_directories[0]).await.root.unwrap();
        assert_eq!((&*root.files[0].name, &*root.directories[0].name), ("here", "sub"));
        assert_eq!((root.files.len(), root.directories.len()), (1, 1));
    }
}

/// A host file behind an output symlink is reported as a link and not changed (clients.md).
#[tokio::test]
async fn an_absolute_output_symlink_is_reported_and_never_followed() {
    let server = Server::start().await;
    let client = server.client().await;
    let outside = tempfile::NamedTempFile::new().unwrap();
    let before = std::fs::metadata(outside.path()).unwrap().permissions();
    let target = outside.path().to_str().unwrap();
    let result = client.run_command(sh_with(&format!("ln -s {target} out"), &["out"])).await;
    assert_eq!(result.output_symlinks[0].target, target);
    assert!(result.output_files.is_empty());
    assert_eq!(std::fs::metadata(outside.path()).unwrap().permissions(), before);
}

fn paths<'a>(paths: impl Iterator<Item = &'a String>) -> Vec<&'a str> {
    paths.map(String::as_str).collect()
}

fn parse(digest: Option<&gorego_reapi::proto::reapi::Digest>) -> Digest {
    Digest::from_wire(DigestFunction::Sha256, digest, "digest").unwrap()
}

async fn tree(client: &Client, output: &OutputDirectory) -> Tree {
    Tree::decode(&*client.read(parse(output.tree_digest.as_ref())).await.unwrap()).unwrap()
}
