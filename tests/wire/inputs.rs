//! Valid and invalid input roots: EXE-22..29, EXE-33..38, EXE-43.

use crate::support::{
    Client, Server, directory, empty, file, missing_subjects, sh, sh_with, sha256, subdirectory, symlink,
};
use gorego_reapi::{
    digest::Digest,
    proto::reapi::{Action, Command, ExecuteResponse, FileNode, NodeProperties},
};
use prost::Message as _;
use tonic::Code;

/// EXE-33..35: contents, modes, empty files and directories, exact symlink targets.
#[tokio::test]
async fn an_input_root_is_reproduced_exactly() {
    let server = Server::start().await;
    let client = server.client().await;
    let text = client.upload("text").await;
    let script = client.upload("#!/bin/sh\necho ran\n").await;
    let inner = client.upload(directory(vec![file("empty", empty())], vec![], vec![])).await;
    let root = directory(
        vec![FileNode { is_executable: true, ..file("run.sh", script) }, file("text", text)],
        vec![subdirectory("inner", inner), subdirectory("void", empty())],
        vec![
            symlink("absolute", "/usr/bin/env"),
            symlink("dangling", "../nowhere"),
            symlink("link", "inner/empty"),
        ],
    );
    let root = client.upload(root).await;
    let listing = "find . -mindepth 1 -printf '%p %y %s %l\\n' | sort; ./run.sh; test ! -x text && cat text";
    let action = client.action(sh(listing), root).await;
    let result = client.run(action).await.result.unwrap();
    let listed = client.stdout(&result).await;
    let expected = "./absolute l 12 /usr/bin/env\n./dangling l 10 ../nowhere\n";
    assert!(listed.starts_with(expected), "{listed}");
    for line in ["./inner/empty f 0 ", "./link l 11 inner/empty", "./run.sh f 19 ", "./text f 4 "] {
        assert!(listed.lines().any(|l| l == line), "{line:?} in {listed}");
    }
    assert!(listed.ends_with("ran\ntext"), "{listed}");
    assert_eq!(listed.lines().filter(|line| line.starts_with("./")).count(), 8, "{listed}");
}

/// EXE-37.
#[tokio::test]
async fn node_properties_of_inputs_are_applied() {
    let server = Server::start().await;
    let client = server.client().await;
    let properties = NodeProperties {
        mtime: Some(prost_types::Timestamp { seconds: 1_000_000_000, nanos: 0 }),
        unix_mode: Some(0o440),
        ..Default::default()
    };
    let node = FileNode { node_properties: Some(properties), ..file("old", client.upload("x").await) };
    let root = client.upload(directory(vec![node], vec![], vec![])).await;
    let action = client.action(sh("stat -c '%a %Y' old"), root).await;
    let result = client.run(action).await.result.unwrap();
    assert_eq!(client.stdout(&result).await, "440 1000000000\n");
}

/// EXE-38.
#[tokio::test]
async fn parents_of_outputs_exist_and_the_outputs_do_not() {
    let server = Server::start().await;
    let client = server.client().await;
    let result = client.run_command(sh_with("test ! -e a/b/c.o && echo x > a/b/c.o", &["a/b/c.o"])).await;
    assert_eq!(client.output(&result, "a/b/c.o").await, "x\n");
}

/// EXE-43.
#[tokio::test]
async fn what_an_action_does_to_its_inputs_nobody_else_sees() {
    let server = Server::start().await;
    let client = server.client().await;
    let input = client.upload("pristine\n").await;
    let root = client.upload(directory(vec![file("void", empty()), file("in", input)], vec![], vec![])).await;
    let vandal = "chmod 777 in void; echo spoilt >> in; echo x > void; touch left-over";
    for round in 0..2 {
        let action = client.action(sh(&format!("{vandal}; echo {round}")), root).await;
        assert_eq!(client.run(action).await.result.unwrap().exit_code, 0);
    }
    let action = client.action(sh("cat in; stat -c %s void; ls"), root).await;
    let result = client.run(action).await.result.unwrap();
    assert_eq!(client.stdout(&result).await, "pristine\n0\nin\nvoid\n");
    assert_eq!(client.read(input).await.unwrap(), b"pristine\n");
}

/// EXE-22..26: all missing blobs at once, inline, with exact subjects; then the same client can continue.
#[tokio::test]
async fn everything_that_is_missing_is_named_in_one_answer() {
    let server = Server::start().await;
    let client = server.client().await;
    let absent: Vec<Digest> = (0..20).map(|i| sha256(format!("absent {i}").as_bytes())).collect();
    let mut directories = Vec::new();
    for (i, chunk) in absent[1..].chunks(7).enumerate() {
        let files = chunk.iter().enumerate().map(|(n, digest)| file(&format!("f{n}"), *digest)).collect();
        directories
            .push(subdirectory(&format!("d{i}"), client.upload(directory(files, vec![], vec![])).await));
    }
    directories.push(subdirectory("gone", absent[0]));
    let root = client.upload(directory(vec![], directories, vec![])).await;
    let action = client.action(sh("true"), root).await;
    let mut subjects = missing_subjects(&client.run(action).await.status.unwrap());
    subjects.sort();
    let mut expected: Vec<String> = absent.iter().map(Digest::blob_name).collect();
    expected.sort();
    assert_eq!(subjects, expected);
}

/// EXE-22, EXE-25: each of the four kinds of missing blobs.
#[tokio::test]
async fn a_missing_action_command_or_root_is_reported_inline() {
    let server = Server::start().await;
    let client = server.client().await;
    let nothing = sha256(b"never uploaded");
    let subject = |response: ExecuteResponse| missing_subjects(&response.status.unwrap());
    assert_eq!(subject(client.run(nothing).await), [nothing.blob_name()]);
    let without_command = Action {
        command_digest: Some(nothing.to_wire()),
        input_root_digest: Some(empty().to_wire()),
        ..Default::default()
    };
    let without_command = client.upload(without_command.encode_to_vec()).await;
    assert_eq!(subject(client.run(without_command).await), [nothing.blob_name()]);
    let without_root = client.action(sh("true"), nothing).await;
    assert_eq!(subject(client.run(without_root).await), [nothing.blob_name()]);
}

/// Refused with INVALID_ARGUMENT, as a gRPC status or inline. The message contains the word.
async fn refused(client: &Client, action: Digest, word: &str) {
    let (code, message) = match client.start_request(client.request(action)).await {
        Err(status) => (status.code() as i32, status.message().to_owned()),
        Ok(run) => {
            let status = run.finish().await.status.unwrap();
            (status.code, status.message)
        }
    };
    assert_eq!(code, Code::InvalidArgument as i32, "{word}: {message}");
    assert!(message.contains(word), "{word}: {message}");
}

/// EXE-27..29, EXE-32, GEN-05.
#[tokio::test]
async fn malformed_actions_commands_and_directories_are_refused_by_name() {
    let server = Server::start().await;
    let client = server.client().await;
    let x = client.upload("x").await;

    let text = client.upload("\u{1}no message").await;
    refused(&client, text, "Action").await;
    let command_is_text = Action {
        command_digest: Some(text.to_wire()),
        input_root_digest: Some(empty().to_wire()),
        ..Default::default()
    };
    refused(&client, client.upload(command_is_text.encode_to_vec()).await, "Command").await;
    refused(&client, client.action(sh("true"), text).await, "Directory").await;
    refused(&client, client.action(Command::default(), empty()).await, "arguments").await;
    let absolute = Command { working_directory: "/etc".into(), ..sh("true") };
    refused(&client, client.action(absolute, empty()).await, "/etc").await;
    refused(&client, client.action(sh_with("true", &["a/../../b"]), empty()).await, "a/../../b").await;
    let negative =
        |action: &mut Action| action.timeout = Some(prost_types::Duration { seconds: -1, nanos: 0 });
    refused(&client, client.action_with(sh("true"), empty(), negative).await, "timeout").await;

    for name in ["../escape", "a/b", "..", ".", "", "nul\0"] {
        let root = client.upload(directory(vec![file(name, x)], vec![], vec![])).await;
        refused(&client, client.action(sh("true"), root).await, "name").await;
    }
    let twice = directory(vec![file("same", x)], vec![subdirectory("same", empty())], vec![]);
    let twice = client.upload(twice).await;
    refused(&client, client.action(sh("true"), twice).await, "same").await;
    let lying = directory(vec![FileNode { name: "f".into(), ..Default::default() }], vec![], vec![]);
    let lying = client.upload(lying).await;
    refused(&client, client.action(sh("true"), lying).await, "f is not set").await;
}

/// Depth and expansion are checked before anything is written.
#[tokio::test]
async fn a_tree_ten_thousand_deep_and_a_tree_that_doubles_are_refused() {
    let server = Server::start().await;
    let client = server.client().await;
    for (levels, names, word) in [(10_000, &["d"][..], "deep"), (40, &["a", "b"][..], "expand")] {
        let (mut blobs, mut root) = (Vec::new(), empty());
        for _ in 0..levels {
            let nodes = names.iter().map(|name| subdirectory(name, root)).collect();
            blobs.push(directory(vec![], nodes, vec![]));
            root = sha256(blobs.last().unwrap());
        }
        for batch in blobs.chunks(2_000) {
            client.upload_all(batch.iter().cloned()).await;
        }
        refused(&client, client.action(sh("true"), root).await, word).await;
    }
}

/// A symlink in the input root never redirects what the server writes or reads for the action.
#[tokio::test]
async fn a_symlink_does_not_lead_the_server_out_of_the_root() {
    let server = Server::start().await;
    let client = server.client().await;
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("secret"), "secret").unwrap();
    let target = outside.path().to_str().unwrap();
    let root = client.upload(directory(vec![], vec![], vec![symlink("d", target)])).await;
    // The link is the parent of an output that would have to be created, and an output to be collected.
    refused(&client, client.action(sh_with("true", &["d/new/file"]), root).await, "d/new").await;
    assert!(!outside.path().join("new").exists());
    let working = Command { working_directory: "d/w".into(), ..sh("true") };
    refused(&client, client.action(working, root).await, "d/w").await;
    assert!(!outside.path().join("w").exists());
    let script = format!("mkdir e; rmdir e; ln -s {target} e");
    let action = client.action(sh_with(&script, &["e/secret"]), empty()).await;
    let response = client.run(action).await;
    let leaked = response.result.is_some_and(|result| !result.output_files.is_empty());
    assert!(!leaked, "an output was read through a symlink out of the root");
}
