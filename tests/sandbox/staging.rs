//! Staged inputs with a real store: the effects of a crash, a damaged blob and eviction, and of a wait for a slot.

use crate::{processes_with, support::*, with_each};
use gorego_reapi::{
    digest::Digest,
    proto::{
        longrunning::{CancelOperationRequest, GetOperationRequest},
        reapi,
    },
};
use prost::Message as _;
use std::{fs, path::Path};

/// Uploads an input root with a directory `d` that contains `files` files named `f0`, `f1` and so on. Each contains the
/// text and its number.
async fn root_of(client: &Client, files: usize, text: &str) -> (Digest, Vec<Digest>) {
    let contents = client.upload_all((0..files).map(|at| format!("{text} {at}\n"))).await;
    let files = contents.iter().enumerate().map(|(at, digest)| reapi::FileNode {
        name: format!("f{at}"),
        digest: Some(digest.to_wire()),
        ..Default::default()
    });
    let below = reapi::Directory { files: files.collect(), ..Default::default() };
    let below = client.upload(below.encode_to_vec()).await;
    let node = reapi::DirectoryNode { name: "d".into(), digest: Some(below.to_wire()) };
    let root = reapi::Directory { directories: vec![node], ..Default::default() };
    (client.upload(root.encode_to_vec()).await, contents)
}

/// The output of a script, which must succeed.
async fn says(client: &Client, script: &str, root: Digest) -> String {
    let action = client.action_with(sh(script), root, |action| action.do_not_cache = true).await;
    let response = client.run(action).await;
    let result = response.result.unwrap_or_else(|| panic!("{:?}", response.status));
    assert_eq!(result.exit_code, 0, "{script}: {}", client.stderr(&result).await);
    client.stdout(&result).await
}

/// The numbers of directories in the build root: of runs and their actions, and of staged trees.
fn directories(server: &Server) -> (usize, usize) {
    let names = fs::read_dir(server.store().join("build")).unwrap().flatten();
    let (trees, runs): (Vec<_>, Vec<_>) =
        names.partition(|entry| entry.file_name().as_encoded_bytes().starts_with(b"t-"));
    (runs.len(), trees.len())
}

fn overlays() -> usize {
    fs::read_to_string("/proc/self/mounts").unwrap().lines().filter(|line| line.contains(" overlay ")).count()
}

#[tokio::test]
async fn an_input_root_is_staged_once_and_used_by_all_actions() {
    with_each(&[], async |host| {
        let (root, _) = root_of(&host.client, 50, "text").await;
        for _ in 0..3 {
            let seen = says(&host.client, "cat d/f7; ls d | wc -l; echo spoilt > d/f7; rm d/f8", root).await;
            assert_eq!(seen, "text 7\n50\n");
        }
        assert_eq!(directories(&host.server).1, 1);
        // A root that differs in one file uses the same tree as its base.
        let (other, _) = root_of(&host.client, 51, "text").await;
        assert_eq!(says(&host.client, "cat d/f50; ls d | wc -l", other).await, "text 50\n51\n");
        assert_eq!(directories(&host.server).1, 1);
        eventually("the directories of the runs are removed", || directories(&host.server).0 == 0).await;
    })
    .await;
}

#[tokio::test]
async fn no_mount_of_an_action_has_devices_or_set_user_ids() {
    with_each(&[], async |host| {
        let (root, _) = root_of(&host.client, 50, "text").await;
        let mounts = says(&host.client, "cat /proc/self/mounts", root).await;
        assert!(
            mounts.lines().any(|line| line.contains(" /build overlay ")),
            "the inputs are staged: {mounts}"
        );
        for mount in mounts.lines() {
            let [_, path, _, options, ..] = *mount.split(' ').collect::<Vec<_>>() else { panic!("{mount}") };
            let has = |wanted| options.split(',').any(|option| option == wanted);
            assert!(has("nosuid"), "{mount}");
            // Files of /proc are hidden by /dev/null.
            let may_be_device = ["/dev/", "/proc/"].iter().any(|top| path.starts_with(top));
            assert!(has("nodev") || may_be_device, "{mount}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_killed_server_leaves_no_mount_and_its_trees_are_removed_by_the_next() {
    with_each(&[], async |host| {
        let before = overlays();
        let (root, _) = root_of(&host.client, 50, "text").await;
        let marker = format!("until-killed-{}", host.server.pid());
        let action = host.client.action(sh(&format!(": {marker}; sleep 100")), root).await;
        let running = host.client.start(action).await;
        eventually("the action runs", || !processes_with(&format!(": {marker}")).is_empty()).await;
        assert_eq!(overlays(), before, "nothing is mounted in the host's namespace");
        host.server.signal("KILL");
        eventually("the action ends", || processes_with(&format!(": {marker}")).is_empty()).await;
        assert_eq!(overlays(), before);
        drop(running);
        assert_eq!(directories(&host.server).1, 1);
    })
    .await;
    // The next server on the same store starts without staged trees.
    let server = Server::with(&[]).await;
    let client = server.client().await;
    let (root, _) = root_of(&client, 50, "text").await;
    says(&client, "true", root).await;
    assert_eq!(directories(&server).1, 1);
    let server = Server::on(server.kill().await, &[]).await;
    eventually("what was left is removed", || directories(&server) == (0, 0)).await;
    assert_eq!(says(&server.client().await, "cat d/f3", root).await, "text 3\n");
}

#[tokio::test]
async fn a_damaged_blob_is_not_staged() {
    let server = Server::with(&[]).await;
    let client = server.client().await;
    let (root, files) = root_of(&client, 30, &"text ".repeat(20_000)).await;
    let path = stored(&server, files[20]);
    let mut bytes = fs::read(&path).unwrap();
    bytes[100] ^= 1;
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    fs::write(&path, bytes).unwrap();
    let action = client.action(sh("cat d/f20 | cksum"), root).await;
    let status = client.run(action).await.status.unwrap();
    assert_eq!(status.code, tonic::Code::FailedPrecondition as i32, "{status:?}");
    eventually("what was staged of it is removed", || directories(&server) == (0, 0)).await;
    // The status makes a client upload the missing blob.
    assert_eq!(client.missing(&files).await, [files[20]]);
    client.upload(format!("{} 20\n", "text ".repeat(20_000))).await;
    assert_eq!(says(&client, "wc -l < d/f20; ls d | wc -l", root).await.trim(), "1\n30");
}

/// Trees are made and evicted while another action uses one.
#[tokio::test]
async fn eviction_does_not_affect_a_running_action() {
    let settings = [("EXECUTION__STAGED_INPUTS_GB", "1 MB"), ("EXECUTION__CONCURRENCY", "2")];
    let server = Server::with(&settings).await;
    let client = server.client().await;
    let (root, _) = root_of(&client, 100, "kept").await;
    let gate = "while ! cat d/f1 d/f99 > /dev/null || [ $(ls d | wc -l) != 100 ] || [ $i -lt 40 ]; do
        i=$((i+1)); sleep 0.05; done; cat d/f42; ls d | wc -l";
    let script = format!("i=0; {gate}");
    let (seen, ()) = tokio::join!(says(&client, &script, root), async {
        for at in 0..15 {
            let (other, _) = root_of(&client, 100, &format!("other {at}")).await;
            let seen = says(&client, "cat d/f42", other).await;
            assert_eq!(seen, format!("other {at} 42\n"));
        }
    });
    assert_eq!(seen, "kept 42\n100\n");
    // There is room for two of these trees in one megabyte.
    eventually("the others are removed", || directories(&server).1 <= 2).await;
}

/// An operator or a cleanup job may remove old files.
#[tokio::test]
async fn a_removed_tree_is_made_again_and_affects_no_result() {
    with_each(&[], async |host| {
        let remove_trees = || {
            for entry in fs::read_dir(host.server.store().join("build")).unwrap().flatten() {
                if entry.file_name().as_encoded_bytes().starts_with(b"t-") {
                    fs::remove_dir_all(entry.path().join("root/d")).unwrap();
                }
            }
        };
        let (root, _) = root_of(&host.client, 50, "text").await;
        assert_eq!(says(&host.client, "ls d | wc -l", root).await, "50\n");
        remove_trees();
        assert_eq!(says(&host.client, "ls d | wc -l", root).await, "50\n");
        let marker = format!("until-removed-{}", host.server.pid());
        let script = format!(": {marker}; sleep 1; ls d | wc -l");
        let (seen, ()) = tokio::join!(says(&host.client, &script, root), async {
            eventually("the action runs", || !processes_with(&format!(": {marker}")).is_empty()).await;
            remove_trees();
        });
        assert_eq!(seen, "50\n", "the action was tried again");
    })
    .await;
}

/// The attributes of an overlay layer cannot be read from a directory without read permission.
#[tokio::test]
async fn permissions_of_directories_have_the_same_effect_on_staged_inputs() {
    with_each(&[], async |host| {
        let (root, _) = root_of(&host.client, 50, "text").await;
        let command = sh_with("echo made > d/out; chmod 0311 d", &["d/out"]);
        let action = host.client.action(command, root).await;
        let result = host.client.run(action).await.result.unwrap();
        assert_eq!(result.output_files[0].digest, Some(sha256(b"made\n").to_wire()));

        let files: Vec<_> = host.client.upload_all((0..50).map(|at| format!("closed {at}\n"))).await;
        let files = files.iter().enumerate().map(|(at, digest)| file(&format!("f{at}"), *digest));
        let closed = reapi::Directory {
            files: files.collect(),
            node_properties: Some(reapi::NodeProperties { unix_mode: Some(0o111), ..Default::default() }),
            ..Default::default()
        };
        let closed = host.client.upload(closed.encode_to_vec()).await;
        let root = reapi::Directory { directories: vec![subdirectory("d", closed)], ..Default::default() };
        let root = host.client.upload(root.encode_to_vec()).await;
        let command = reapi::Command {
            working_directory: "d".into(),
            ..sh_with("cat f3 && stat -c %a .", &["made/for/the/output"])
        };
        let action = host.client.action(command, root).await;
        let response = host.client.run(action).await;
        let result = response.result.unwrap_or_else(|| panic!("{:?}", response.status));
        assert_eq!(host.client.stdout(&result).await, "closed 3\n111\n");
    })
    .await;
}

/// This is the behaviour of rename(2) that `docs/sandbox.md` describes.
#[tokio::test]
async fn input_directories_can_be_moved_by_mv_and_new_directories_also_by_rename() {
    with_each(&[], async |host| {
        let (root, _) = root_of(&host.client, 50, "text").await;
        let moves = "mv d e && ls e | wc -l && mkdir -p own/x && mv own else && ls else && mv e/f1 e/g && ls d 2>&1";
        let result = host.client.action(sh(moves), root).await;
        let response = host.client.run(result).await;
        let seen = host.client.stdout(&response.result.unwrap()).await;
        assert!(seen.starts_with("50\nx\n") && seen.contains("No such file"), "{seen}");
        let rename = "command -v perl >/dev/null || { echo skipped; exit 0; }
            perl -e 'rename(\"d\", \"e\") or print \"$!\n\"; rename(\"d/f1\", \"d/f\") or die; print \"renamed\n\"'";
        let seen = says(&host.client, rename, root).await;
        assert!(["Invalid cross-device link\nrenamed\n", "skipped\n"].contains(&&*seen), "{seen}");
    })
    .await;
}

#[tokio::test]
async fn without_a_budget_inputs_are_copied() {
    let server = Server::with(&[("EXECUTION__STAGED_INPUTS_GB", "0")]).await;
    let client = server.client().await;
    let (root, _) = root_of(&client, 50, "text").await;
    assert_eq!(says(&client, "cat d/f3; ! grep -q ' /build overlay ' /proc/mounts", root).await, "text 3\n");
    assert_eq!(directories(&server).1, 0);
}

const ONE_SLOT: (&str, &str) = ("EXECUTION__CONCURRENCY", "1");
const DEBUG_LOG: (&str, &str) = ("LOG__FILTER", "info,gorego=debug");

/// An action that holds the only slot until the test ends it.
struct Holder {
    run: Run,
    gate: tempfile::TempDir,
}

impl Holder {
    async fn start(client: &Client) -> Self {
        let gate = shared_dir();
        let script = format!("until test -e {}/open; do sleep 0.02; done", gate.path().display());
        let mut run = client.start(client.action(sh(&script), empty()).await).await;
        run.until(|operation| metadata(operation).stage == 3).await;
        Self { run, gate }
    }

    async fn end(self) {
        fs::write(self.gate.path().join("open"), "").unwrap();
        assert_eq!(self.run.finish().await.result.unwrap().exit_code, 0);
    }
}

/// Starts an action that waits for a slot.
async fn waiting(client: &Client, script: &str, root: Digest) -> Run {
    let action = client.action_with(sh(script), root, |action| action.do_not_cache = true).await;
    client.start(action).await
}

#[tokio::test]
async fn the_inputs_of_a_waiting_action_are_staged_while_the_one_before_it_runs() {
    let server = Server::with(&[ONE_SLOT, DEBUG_LOG]).await;
    let client = server.client().await;
    let holder = Holder::start(&client).await;
    let (root, _) = root_of(&client, 300, "text").await;
    let run = waiting(&client, "cat d/f7; ls d | wc -l", root).await;
    let event = server.logged("staged_ahead").await;
    assert!(event["error"].is_null(), "{event}");
    assert_eq!(directories(&server), (1, 1), "the one before it still runs");
    holder.end().await;
    let result = run.finish().await.result.unwrap();
    assert_eq!(client.stdout(&result).await, "text 7\n300\n");
    assert_eq!(directories(&server).1, 1, "the run uses that tree");
    // The tree of a cancelled action can be used by another one.
    let holder = Holder::start(&client).await;
    let (other, _) = root_of(&client, 300, "other").await;
    let mut cancelled = waiting(&client, "true", other).await;
    let name = cancelled.next().await.unwrap().name;
    eventually("it is staged", || directories(&server) == (1, 2)).await;
    client.operations.clone().cancel_operation(CancelOperationRequest { name }).await.unwrap();
    holder.end().await;
    assert_eq!(says(&client, "cat d/f9", other).await, "other 9\n");
    eventually("nothing but the trees is left", || directories(&server) == (0, 2)).await;
}

#[tokio::test]
async fn a_damaged_blob_fails_the_waiting_action_no_earlier_and_no_differently() {
    let server = Server::with(&[ONE_SLOT, DEBUG_LOG]).await;
    let client = server.client().await;
    let holder = Holder::start(&client).await;
    let (root, files) = root_of(&client, 30, &"text ".repeat(20_000)).await;
    let path = stored(&server, files[20]);
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    fs::write(&path, "damaged").unwrap();
    let mut run = waiting(&client, "true", root).await;
    let event = server.logged("staged_ahead").await;
    assert!(event["error"].is_string(), "{event}");
    eventually("what was staged of it is removed", || directories(&server) == (1, 0)).await;
    let request = GetOperationRequest { name: run.next().await.unwrap().name };
    let now = client.operations.clone().get_operation(request).await.unwrap().into_inner();
    assert_eq!(metadata(&now).stage, 2, "it waits");
    holder.end().await;
    let status = run.finish().await.status.unwrap();
    assert_eq!(status.code, tonic::Code::FailedPrecondition as i32, "{status:?}");
    // The next attempt of a client uploads the blob.
    let holder = Holder::start(&client).await;
    client.upload(format!("{} 20\n", "text ".repeat(20_000))).await;
    let run = waiting(&client, "wc -l < d/f20", root).await;
    eventually("it is staged", || directories(&server) == (1, 1)).await;
    holder.end().await;
    assert_eq!(client.stdout(&run.finish().await.result.unwrap()).await.trim(), "1");
}

/// The budget has room for two of these trees, and half of it for one.
#[tokio::test]
async fn waiting_actions_find_their_inputs_although_their_trees_do_not_fit_together() {
    let server = Server::with(&[ONE_SLOT, ("EXECUTION__STAGED_INPUTS_GB", "1 MB")]).await;
    let client = server.client().await;
    let gate = shared_dir();
    let script =
        format!("until test -e {}/open; do sleep 0.02; done; ls d | wc -l; cat d/f99", gate.path().display());
    let (kept, _) = root_of(&client, 100, "kept").await;
    let mut holder = waiting(&client, &script, kept).await;
    holder.until(|operation| metadata(operation).stage == 3).await;
    let mut runs = Vec::new();
    for at in 0..4 {
        let (root, _) = root_of(&client, 100, &format!("other {at}")).await;
        runs.push(waiting(&client, "cat d/f42", root).await);
    }
    fs::write(gate.path().join("open"), "").unwrap();
    let result = holder.finish().await.result.unwrap();
    assert_eq!(client.stdout(&result).await, "100\nkept 99\n");
    for (at, run) in runs.into_iter().enumerate() {
        let result = run.finish().await.result.unwrap();
        assert_eq!(client.stdout(&result).await, format!("other {at} 42\n"));
    }
    eventually("the others are removed", || directories(&server).1 <= 2).await;
}

/// The path of a stored blob's file.
fn stored(server: &Server, digest: Digest) -> std::path::PathBuf {
    fn find(directory: &Path, prefix: &str) -> Option<std::path::PathBuf> {
        fs::read_dir(directory).ok()?.flatten().find_map(|entry| {
            let path = entry.path();
            let is_it = entry.file_name().to_string_lossy().starts_with(prefix) && path.is_file();
            if is_it { Some(path) } else { find(&path, prefix) }
        })
    }
    find(&server.store().join("v1/blobs"), &digest.hash_hex()).unwrap()
}

/// Each way to write to a file, tried on an input that is in a staged tree. The action changes its own copy, or fails
/// as expected; the tree stays.
#[tokio::test]
async fn no_way_to_write_changes_what_the_next_action_finds() {
    with_each(&[], async |host| {
        let (root, _) = root_of(&host.client, 50, "text").await;
        let look = "cat d/f0 d/f1 d/f2 d/f3 d/f4 d/f5 d/f6 d/f7; stat -c '%n %Y %a %h' d/f* d; ls d | wc -l";
        let before = says(&host.client, look, root).await;
        // Each script prints what it has achieved.
        let ways = [
            ("echo x > d/f0; cat d/f0", "x\n"),
            ("echo x >> d/f1; cat d/f1", "text 1\nx\n"),
            (
                "chmod 777 d/f2; touch d/f2; touch -d @5 d/f3; stat -c %a d/f2; stat -c %Y d/f3; [ d/f2 -nt d/f4 ] && echo newer",
                "777\n5\nnewer\n",
            ),
            (
                "mv d/f4 d/moved; ln d/f5 d/linked; echo x > d/linked; rm d/f6; mkdir d/f6; cat d/moved d/f5; ls -d d/f6; \
                 rm -r d; mkdir d; ls d",
                "text 4\nx\nd/f6\n",
            ),
            // These write through a second name of an open file, and through memory that is shared with it.
            (
                "exec 3< d/f5; echo x > /proc/self/fd/3; echo x > /proc/$$/root/build/d/f7; echo x > /proc/self/cwd/d/f6; \
                 cat d/f5 d/f7 d/f6",
                "x\nx\nx\n",
            ),
            (
                "perl -e 'open F, \"+<\", \"d/f0\" or die; truncate F, 1 or die; seek F, 0, 2; print F \"x\"'; cat d/f0",
                "tx",
            ),
            (
                "perl -e 'open F, \"+<\", \"d/f1\" or die; my $p = syscall(9, 0, 4096, 3, 1, fileno(F), 0); die if $p < 0; \
                 open M, \"+<\", \"/proc/self/mem\" or die; sysseek M, $p, 0; syswrite M, \"XXXX\" or die'; cat d/f1",
                "XXXX 1\n",
            ),
            // A mapping of a file that is open only for reading: EACCES, also for a later change of its protection.
            (
                "perl -e 'open F, \"<\", \"d/f1\" or die; print syscall(9, 0, 4096, 3, 1, fileno(F), 0), \" \", $!+0, \"\\n\"; \
                 my $p = syscall(9, 0, 4096, 1, 1, fileno(F), 0); die if $p < 0; \
                 print syscall(10, $p, 4096, 3), \" \", $!+0, \"\\n\"'",
                "-1 13\n-1 13\n",
            ),
            // The staged tree itself is not visible, under any name.
            ("find / -xdev -path '*/t-*' 2> /dev/null; find / -path '*/d/f0' 2> /dev/null | grep -v ^/proc", "/build/d/f0\n"),
            // The directories of other processes can be entered only for processes of the same action.
            (
                "sleep 9 & for f in /proc/[0-9]*; do for g in $f/root/build/d/f2 $f/cwd/d/f2; do \
                 if (echo x > $g) 2> /dev/null; then [ $f = /proc/1 ] && echo entered; else [ $f = /proc/1 ] && echo refused; fi; \
                 done; done; cat d/f2",
                "refused\nrefused\nx\n",
            ),
        ];
        for (way, achieved) in ways {
            assert_eq!(says(&host.client, way, root).await, achieved, "{way}");
            assert_eq!(says(&host.client, look, root).await, before, "{way}");
        }
        assert_eq!(directories(&host.server).1, 1, "all of them had the same tree");
    })
    .await;
}
