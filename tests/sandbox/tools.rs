//! Bazel's persistent workers in the sandbox. The server exchanges their inputs and takes their outputs while they run.

use crate::{processes_with, support::*, with_each};
use gorego_reapi::{
    digest::Digest,
    proto::reapi::{self, ExecuteResponse},
};
use prost::Message as _;
use std::{fs, path::Path};

/// Settings that enable persistent workers, which are off by default.
const TOOLS: &[(&str, &str)] =
    &[("EXECUTION__PERSISTENT_WORKERS__ENABLED", "true"), ("INSTANCE_NAMES", "[\"\", \"team\"]")];

/// A tool that runs each request as a line of shell, which must not contain double quotes or backslashes, and answers
/// with its output. Without `--persistent_worker` it prints `cold`.
const TOOL: &str = r#"
case " $* " in *" --persistent_worker "*) ;; *) echo cold; exit;; esac
served=0
while read -r line; do
  served=$((served + 1))
  script=${line#*'"arguments":["'}
  script=${script%%'"],'*}
  eval "$script" > /tmp/output 2>&1
  code=$?
  printf '{"exitCode":%s,"output":"%s"}\n' $code "$(tr '\n' ' ' < /tmp/output)"
done
"#;

/// An action that asks the tool to run a script, with an input `src/a`.
async fn action(client: &Client, script: &str, input: &str, outputs: &[&str]) -> Digest {
    let blobs = client.upload_all([TOOL, script, input]).await;
    let mark = reapi::NodeProperty { name: "bazel_tool_input".into(), value: String::new() };
    let tool = reapi::FileNode {
        node_properties: Some(reapi::NodeProperties { properties: vec![mark], ..Default::default() }),
        ..file("tool.sh", blobs[0])
    };
    let src = reapi::Directory { files: vec![file("a", blobs[2])], ..Default::default() };
    let src = client.upload(src.encode_to_vec()).await;
    let root = reapi::Directory {
        files: vec![file("args", blobs[1]), tool],
        directories: vec![subdirectory("src", src)],
        ..Default::default()
    };
    let root = client.upload(root.encode_to_vec()).await;
    let command = reapi::Command {
        arguments: ["/bin/sh", "tool.sh", "@args"].map(str::to_owned).to_vec(),
        output_paths: outputs.iter().map(ToString::to_string).collect(),
        ..sh("")
    };
    let property =
        |name: &str, value: &str| reapi::platform::Property { name: name.into(), value: value.into() };
    let platform = reapi::Platform {
        properties: vec![property("persistentWorkerKey", "k"), property("persistentWorkerProtocol", "json")],
    };
    client
        .action_with(command, root, |action| {
            action.platform = Some(platform);
            action.do_not_cache = true;
        })
        .await
}

async fn run(client: &Client, script: &str, input: &str, outputs: &[&str]) -> ExecuteResponse {
    client.run(action(client, script, input, outputs).await).await
}

/// The output of a script that the tool runs.
async fn says(client: &Client, script: &str) -> String {
    let response = run(client, script, "a", &[]).await;
    let result = response.result.unwrap_or_else(|| panic!("{:?}", response.status));
    let text = client.stderr(&result).await;
    assert_eq!(result.exit_code, 0, "{script}: {text} {}", response.message);
    text.trim().to_owned()
}

#[tokio::test]
async fn a_tool_lives_in_a_sandbox_like_any_action() {
    with_each(TOOLS, async |host| {
        let client = &host.client;
        assert_eq!(
            says(client, "id -u; pwd; cat /proc/sys/kernel/hostname; umask").await,
            "1000 /build build 0022"
        );
        let store = host.server.store().display();
        for forbidden in [
            format!("ls {store}"),
            "cat /etc/shadow".into(),
            "echo > /usr/x".into(),
            "unshare -U true".into(),
            "ls /proc/self/fd | grep -v [0123]".into(),
        ] {
            assert_eq!(
                says(client, &format!("{forbidden} || echo no")).await.split(' ').next_back(),
                Some("no")
            );
        }
        assert_eq!(says(client, "echo $served").await, "7", "one tool served all of these requests");
    })
    .await;
}

/// If the store took over a file that the tool still has open, the stored blob would change.
#[tokio::test]
async fn a_tool_cannot_change_an_output_that_it_has_handed_over() {
    with_each(TOOLS, async |host| {
        let client = &host.client;
        let response = run(client, "exec 5> out; echo first >&5; ln out kept", "a", &["out"]).await;
        let result = response.result.unwrap();
        assert_eq!(client.output(&result, "out").await, "first\n");
        says(client, "echo second >&5; echo served $served").await;
        let digest = client.digest(result.output_files[0].digest.as_ref());
        assert_eq!(client.read(digest).await.unwrap(), b"first\n");
        assert_eq!(client.missing(&[digest]).await, []);
    })
    .await;
}

#[tokio::test]
async fn each_instance_has_its_own_tools() {
    with_each(TOOLS, async |host| {
        let team = Client { instance: "team".into(), ..host.client.clone() };
        assert_eq!(says(&host.client, "echo secret > /tmp/x; echo $served").await, "1");
        assert_eq!(says(&team, "cat /tmp/x; echo $served").await.split(' ').next_back(), Some("1"));
        assert_eq!(says(&host.client, "cat /tmp/x; echo $served").await, "secret 2");
    })
    .await;
}

/// While the server writes inputs and reads outputs, the tool replaces directories by links and links by directories.
#[tokio::test]
async fn a_tool_that_swaps_directories_and_links_cannot_redirect_the_server() {
    with_each(TOOLS, async |host| {
        let client = &host.client;
        let canary = shared_dir();
        let place = canary.path().display();
        let far = if host.is_root { place.to_string() } else { "../../..".into() };
        let game = format!(
            "(while :; do mv src away; ln -s {far} src; mkdir -p o; rm -r o; ln -s {far} o; rm src o; mv away src; mkdir -p o/d; \
             done > /dev/null 2>&1 &); echo played"
        );
        let mut warm = 0;
        for round in 0..15 {
            let input = format!("version {round}");
            let outputs = if round % 2 == 0 { &[][..] } else { &["o/d/x", "src/new"] };
            let response = run(client, &game, &input, outputs).await;
            // If the swapping disturbed the server, the action ran without the tool.
            let result = response.result.unwrap_or_else(|| panic!("{:?}", response.status));
            warm += usize::from(client.stderr(&result).await.contains("played"));
        }
        assert!(warm > 0, "the tool served some of the actions");
        assert_eq!(fs::read_dir(canary.path()).unwrap().count(), 0);
        let names = |path: &Path| -> Vec<_> {
            fs::read_dir(path).unwrap().flatten().map(|entry| entry.file_name().into_string().unwrap()).collect()
        };
        for name in names(&host.server.store().join("build")) {
            assert!(name.starts_with(|c: char| c.is_ascii_digit()) || name.starts_with("a-"), "{name}");
        }
        let strange: Vec<_> = names(host.server.store()).into_iter().filter(|name| name.len() < 2).collect();
        assert!(strange.is_empty(), "{strange:?}");
    })
    .await;
}

#[tokio::test]
async fn tools_end_with_their_server() {
    with_each(TOOLS, async |host| {
        let marker = format!("tool-of-{}", host.server.pid());
        says(&host.client, &format!("(setsid sh -c ': {marker}; sleep 1000' > /dev/null 2>&1 &)")).await;
        // The process belongs to the tool, so it outlives the request.
        says(&host.client, "echo again").await;
        // The shell that starts the process has the marker on its command line, too, until it executes setsid.
        eventually("one process is left", || processes_with(&format!(": {marker}")).len() == 1).await;
        host.server.signal("KILL");
        eventually("its tool is gone", || processes_with(&format!(": {marker}")).is_empty()).await;
    })
    .await;
    // An orderly shutdown also removes the directories.
    let mut server = Server::with(TOOLS).await;
    says(&server.client().await, "echo").await;
    server.signal("TERM");
    assert!(server.exit().await.success());
    assert_eq!(fs::read_dir(server.store().join("build")).unwrap().count(), 0);
}

#[tokio::test]
async fn tools_are_off_by_default() {
    let server = Server::start().await;
    let client = server.client().await;
    let result = run(&client, "echo", "a", &[]).await.result.unwrap();
    assert_eq!(client.stdout(&result).await, "cold\n");
}
