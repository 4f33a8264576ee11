//! The effects of a full disk, a noexec disk and the end of the process on exec directories and results.

use crate::lifecycle::upload;
use crate::support::{
    Client, Server, directory, empty, eventually, eventually_every, file, http_client, metadata, sh, sh_with,
    sha256, shared_dir,
};
use gorego_reapi::{
    digest::Digest,
    proto::{
        reapi::{ActionResult, ExecuteResponse, UpdateActionResultRequest},
        rpc,
    },
};
use prost::Message as _;
use std::{
    fs::{self, File},
    io::Write as _,
    path::PathBuf,
    time::Duration,
};
use tonic::{Code, Status};

/// Free space at the start of an action in these tests.
const LEFT: u64 = 385_024;

/// Fills the disk up to `left` bytes. The caller removes the file to free the space.
fn ballast(server: &Server, left: u64) -> PathBuf {
    let path = server.inside("ballast");
    let mut file = File::create(&path).unwrap();
    // The last write stores as much as fits.
    let filled = (0..64).find_map(|_| file.write_all(&vec![1; 64 << 20]).err()).unwrap();
    assert_eq!(filled.kind(), std::io::ErrorKind::StorageFull);
    file.set_len(file.metadata().unwrap().len() - left).unwrap();
    path
}

/// An action that does not notice that its output is truncated.
async fn careless(client: &Client) -> Digest {
    let script = "head -c 3000000 /dev/zero > o; sleep 1.5; exit 0";
    client.action(sh_with(script, &["o"]), empty()).await
}

fn has_logged(server: &Server, event: &str) -> bool {
    server.log().iter().any(|line| line["event"] == event)
}

fn code(response: &ExecuteResponse) -> Code {
    Code::from_i32(response.status.as_ref().map_or(0, |status| status.code))
}

/// A store that has filled its disk leaves neither space nor inodes to the next start.
#[tokio::test]
async fn a_server_starts_on_a_full_disk_serves_reads_and_recovers_by_itself() {
    let earlier = Server::start().await;
    let kept = earlier.client().await.upload("kept").await;
    let seed = earlier.kill().await;
    let server = Server::in_own_mounts(&format!(
        r#"mount -t tmpfs -o size=8m,nr_inodes=400 none "$STORE"; cp -a {}/. "$STORE"; mkdir "$STORE/ballast"
        head -c 20000000 /dev/zero > "$STORE/ballast/bytes"
        n=0; while touch "$STORE/ballast/$n"; do n=$((n+1)); done; true"#,
        seed.path().display()
    ));
    let client = server.client().await;
    assert_eq!(client.read(kept).await.unwrap(), b"kept");
    let refused = upload(&client, &[1; 100_000]).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    fs::remove_dir_all(server.inside("ballast")).unwrap();
    upload(&client, &[1; 100_000]).await.unwrap();
    let action = client.action(sh_with("echo > f", &["f"]), empty()).await;
    assert_eq!(code(&client.run(action).await), Code::Ok);
}

/// A new store cannot be made there. The message says where, why, and what helps.
#[test]
fn a_first_start_on_a_full_disk_says_which_disk_is_full_and_what_to_do() {
    let script =
        r#"mount -t tmpfs -o size=64k none "$STORE"; head -c 100000 /dev/zero > "$STORE/ballast"; true"#;
    let (code, output, store) = Server::that_ends_in_own_mounts(script);
    assert_eq!(code, Some(1), "{output}");
    for part in [&*store, "No space left on device", "make room on its file system", "local_cache_dir"] {
        assert!(output.contains(part), "{part}: {output}");
    }
}

/// The small blobs of this store lie in a few segments, and a full disk has no room to note which of them are deleted.
#[tokio::test]
async fn a_store_of_small_blobs_that_has_filled_its_disk_evicts_a_part_of_them() {
    let server = Server::on_a_disk_with("size=320m", &[("MAX_SIZE_GB", "50")]).await;
    let client = server.client().await;
    let ballast = ballast(&server, 48 << 20);
    let blob = |n: u32| n.to_le_bytes().repeat(15_000);
    let mut stored = Vec::new();
    let refused = loop {
        let next = blob(stored.len() as u32);
        match upload(&client, &next).await {
            Ok(_) => stored.push(sha256(&next)),
            Err(status) => break status,
        }
    };
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    let shared = &client;
    let is_taken = || async move { upload(shared, &[1; 40_000]).await.is_ok() };
    eventually_every(Duration::from_millis(100), "an upload is taken", is_taken).await;
    // The disk is not low any more, so no more is evicted.
    fs::remove_file(ballast).unwrap();
    upload(&client, &[2; 40_000]).await.unwrap();
    let gone = client.missing(&stored).await;
    assert!((1..=stored.len() / 2).contains(&gone.len()), "{} of {}", gone.len(), stored.len());
    assert!(!has_logged(&server, "delete_failed"), "{:#?}", server.log());
    assert!(has_logged(&server, "store_larger_than_disk"));
    for (n, digest) in stored.iter().enumerate().filter(|(_, digest)| !gone.contains(digest)) {
        assert_eq!(client.read(*digest).await.unwrap(), blob(n as u32));
    }
}

/// Evicting small blobs would free no inode.
#[tokio::test]
async fn another_program_that_takes_all_inodes_costs_no_small_blobs() {
    let server = Server::on_a_disk_with("size=400m,nr_inodes=600", &[("MAX_SIZE_GB", "50")]).await;
    let client = server.client().await;
    let mut stored = Vec::new();
    for n in 0..200u32 {
        stored.push(client.upload(n.to_le_bytes().repeat(2_500)).await);
    }
    let ballast = server.inside("ballast");
    fs::create_dir(&ballast).unwrap();
    let full = (0..1_000).find_map(|n| File::create(ballast.join(n.to_string())).err());
    assert_eq!(full.unwrap().kind(), std::io::ErrorKind::StorageFull);
    eventually("the store is read-only", || has_logged(&server, "store_read_only")).await;
    fs::remove_dir_all(&ballast).unwrap();
    let shared = &client;
    let is_taken = || async move { upload(shared, &[1; 200_000]).await.is_ok() };
    eventually_every(Duration::from_millis(100), "an upload is taken", is_taken).await;
    assert_eq!(client.missing(&stored).await, []);
    assert!(!has_logged(&server, "disk_relieved"), "{:#?}", server.log());
}

/// EXE-62: the command exits with 0 and a truncated output. The action runs again once there is space.
#[tokio::test]
async fn an_output_that_a_full_disk_cut_short_is_no_result() {
    let server = Server::on_a_disk_of(16 << 20).await;
    let client = server.client().await;
    let outside = shared_dir();
    let begun = outside.path().join("begun");
    let script = format!("echo > {}; head -c 3000000 /dev/zero > o; sleep 1.5; exit 0", begun.display());
    let action = client.action(sh_with(&script, &["o"]), empty()).await;
    let ballast = ballast(&server, LEFT);
    let run = client.start(action).await;
    eventually("the command begins", || begun.exists()).await;
    let build_root = server.inside("build");
    let given_up = || fs::read_dir(&build_root).unwrap().count() == 0;
    eventually("the first try is given up, while the command would sleep", given_up).await;
    assert!(!has_logged(&server, "operation_completed"));
    fs::remove_file(ballast).unwrap();
    let response = run.finish().await;
    assert!(has_logged(&server, "operation_requeued"));
    assert_eq!(code(&response), Code::Ok, "{response:?}");
    let whole = sha256(&vec![0; 3_000_000]).to_wire();
    assert_eq!(response.result.unwrap().output_files[0].digest, Some(whole.clone()));
    assert_eq!(client.cached(action).await.unwrap().output_files[0].digest, Some(whole));
}

/// EXE-62: the build of a client that retries is not broken.
#[tokio::test]
async fn an_action_on_a_disk_that_stays_full_is_unavailable_and_not_cached() {
    let server = Server::on_a_disk_of(16 << 20).await;
    let client = server.client().await;
    let action = careless(&client).await;
    let strict = client.action(sh_with("head -c 3000000 /dev/zero > o || exit 1", &["o"]), empty()).await;
    let ballast = ballast(&server, LEFT);
    for action in [action, strict] {
        let response = client.run(action).await;
        assert_eq!(code(&response), Code::Unavailable, "{response:?}");
        assert!(response.status.unwrap().message.contains("disk"));
        assert_eq!(client.cached(action).await, None);
    }
    fs::remove_file(ballast).unwrap();
    for action in [action, strict] {
        let response = client.run(action).await;
        assert_eq!(response.result.unwrap().output_files[0].digest.as_ref().unwrap().size_bytes, 3_000_000);
    }
}

/// The same for files that cannot be created because there are too many.
#[tokio::test]
async fn a_disk_without_inodes_is_full_too() {
    let server = Server::on_a_disk("size=64m,nr_inodes=2000").await;
    let client = server.client().await;
    let script = "for i in $(seq 3000); do : > d/$i; done 2> /dev/null; exit 0";
    let action = client.action(sh_with(script, &["d/3000"]), empty()).await;
    let response = client.run(action).await;
    assert_eq!(code(&response), Code::Unavailable, "{response:?}");
    assert_eq!(client.cached(action).await, None);
    let result = client.run_command(sh("echo well")).await;
    assert_eq!(client.stdout(&result).await, "well\n");
}

/// The disk is smaller than the configured size of the store.
#[tokio::test]
async fn the_store_makes_room_for_an_action_that_found_none() {
    let server = Server::on_a_disk_of(32 << 20).await;
    let client = server.client().await;
    let mut blobs = Vec::new();
    for n in 0..20u8 {
        blobs.push(client.upload(vec![n; 1 << 20]).await);
    }
    let action = careless(&client).await;
    ballast(&server, LEFT);
    let response = client.run(action).await;
    assert_eq!(code(&response), Code::Ok, "{response:?}");
    assert_eq!(response.result.unwrap().output_files[0].digest.as_ref().unwrap().size_bytes, 3_000_000);
    assert!(has_logged(&server, "disk_relieved"));
    let missing = client.missing(&blobs).await;
    assert!(missing.contains(&blobs[0]) && !missing.contains(&blobs[19]), "{missing:?}");
    assert!(missing.len() <= 10, "at most a part of the store goes: {missing:?}");
}

/// The limit of the store is what its disk has, so uploads evict before the disk is full, and no lease has to be
/// broken.
#[tokio::test]
async fn a_store_that_was_allowed_more_than_its_disk_holds_keeps_some_of_it_free() {
    let overrides = [("MAX_SIZE_GB", "50"), ("HTTP__LISTEN_ADDR", "127.0.0.1:0")];
    let server = Server::on_a_disk_with("size=16m", &overrides).await;
    let client = server.client().await;
    let blob = |n: u8| vec![n; 1 << 20];
    for n in 0..60 {
        upload(&client, &blob(n)).await.unwrap();
    }
    let missing = client.missing(&[sha256(&blob(0)), sha256(&blob(59))]).await;
    assert_eq!(missing, [sha256(&blob(0))]);
    for event in ["disk_relieved", "store_read_only", "delete_failed"] {
        assert!(!has_logged(&server, event), "{event}: {:#?}", server.log());
    }
    let url = format!("http://{}/metrics", server.http_address());
    let metrics = http_client().get(url).send().await.unwrap().text().await.unwrap();
    let broken = metrics.lines().find(|line| line.starts_with("gorego_broken_promises_total")).unwrap();
    assert!(broken.ends_with(" 0"), "{broken}");
    let limit = server.logged("store_limit_changed").await["limit_bytes"].as_u64().unwrap();
    assert!((12 << 20..16 << 20).contains(&limit), "{limit}");
}

/// Checks a refusal for a full disk: it says when to try again, where the disk is full, and what is free (GEN-21).
fn assert_read_only(refusal: &Status, server: &Server) {
    assert_eq!(refusal.code(), Code::ResourceExhausted, "{refusal}");
    let details = rpc::Status::decode(refusal.details()).unwrap().details;
    assert!(details.iter().any(|any| any.type_url.ends_with("google.rpc.RetryInfo")), "{refusal:?}");
    let file_system = format!("file system of {}", server.store().display());
    assert!(refusal.message().contains(&file_system), "{refusal}");
    assert!(refusal.message().contains("were free"), "{refusal}");
}

async fn store_result(client: &Client, action: Digest) -> Result<(), Status> {
    let request = UpdateActionResultRequest {
        action_digest: Some(action.to_wire()),
        action_result: Some(ActionResult { stdout_raw: "said".into(), ..Default::default() }),
        ..Default::default()
    };
    client.action_cache.clone().update_action_result(request).await.map(drop)
}

/// User-asks failure modes 20, 21 and 38: another program fills the disk, and evicting the few stored blobs would not
/// help. Stored blobs are served, no new blob is stored completely or partly, and the store recovers by itself.
#[tokio::test]
async fn a_store_whose_disk_others_fill_is_read_only_until_there_is_room() {
    let server = Server::on_a_disk_of(64 << 20).await;
    let client = server.client().await;
    let stored = client.upload(vec![7; 20_000]).await;
    let (old, new) = (sha256(b"old action"), sha256(b"new action"));
    store_result(&client, old).await.unwrap();
    let ballast = ballast(&server, 0);
    eventually("the store is read-only", || has_logged(&server, "store_read_only")).await;

    assert_eq!(client.read(stored).await.unwrap(), vec![7; 20_000]);
    assert!(client.missing(&[stored]).await.is_empty());
    assert!(client.cached(old).await.is_some());
    for size in [1_000, 2 << 20] {
        let blob = vec![8; size];
        assert_read_only(&upload(&client, &blob).await.unwrap_err(), &server);
        assert_eq!(client.missing(&[sha256(&blob)]).await, [sha256(&blob)]);
    }
    assert_read_only(&store_result(&client, new).await.unwrap_err(), &server);
    assert!(client.cached(new).await.is_none());
    let temporary = fs::read_dir(server.inside("v1/tmp")).unwrap().count();
    assert_eq!(temporary, 0, "nothing is left of what was refused");

    fs::remove_file(ballast).unwrap();
    eventually("there is room", || has_logged(&server, "store_writable")).await;
    for size in [1_000, 2 << 20] {
        upload(&client, &vec![8; size]).await.unwrap();
    }
    store_result(&client, new).await.unwrap();
    assert!(client.cached(new).await.is_some());
    assert!(!has_logged(&server, "disk_relieved"), "nothing was evicted");
}

/// The output of a command about a full disk is ignored; only the disk is checked.
#[tokio::test]
async fn a_failure_on_a_healthy_disk_is_the_commands_own() {
    let server = Server::on_a_disk_of(16 << 20).await;
    let client = server.client().await;
    let action = client.action(sh("echo o: No space left on device >&2; exit 1"), empty()).await;
    let response = client.run(action).await;
    assert_eq!((code(&response), response.result.unwrap().exit_code), (Code::Ok, 1));
    assert!(!has_logged(&server, "operation_requeued"));
}

#[tokio::test]
async fn a_build_root_that_is_mounted_noexec_is_named_at_start_and_in_the_failure() {
    let server = Server::on_a_disk("size=16m,noexec").await;
    let client = server.client().await;
    eventually("it is said at start", || has_logged(&server, "build_root_noexec")).await;
    let tool = client.upload("#!/bin/sh\necho ran\n").await;
    let mut node = file("tool", tool);
    node.is_executable = true;
    let root = client.upload(directory(vec![node], vec![], vec![])).await;
    let mut direct = sh("");
    direct.arguments = vec!["./tool".into()];
    let result = client.run(client.action(direct, root).await).await.result.unwrap();
    assert_eq!(result.exit_code, 126);
    let stderr = client.stderr(&result).await;
    assert!(stderr.contains("noexec") && stderr.contains("execution.build_root"), "{stderr}");
    let response = client.run(client.action(sh("./tool"), root).await).await;
    assert_eq!(response.result.as_ref().unwrap().exit_code, 126);
    assert!(response.message.contains("noexec"), "{response:?}");
}

/// Removing large directories takes a while. They are gone when the process is.
#[tokio::test]
async fn exec_directories_of_actions_that_are_cancelled_at_exit_are_gone() {
    let mut server = Server::with(&[("EXECUTION__CONCURRENCY", "3")]).await;
    let client = server.client().await;
    let mut runs = Vec::new();
    for n in 0..3 {
        let script = format!("mkdir d; cd d; seq 1 2000 | xargs touch; : > ../ready; sleep 745{n}");
        let mut run = client.start(client.action(sh(&script), empty()).await).await;
        run.until(|operation| metadata(operation).stage == 3).await;
        runs.push(run);
    }
    let build_root = server.store().join("build");
    let ready = || {
        let runs = fs::read_dir(&build_root).unwrap().flatten();
        runs.filter(|run| run.path().join("root/ready").exists()).count() == 3
    };
    eventually("the actions have filled their directories", ready).await;
    // Nothing else delays the exit.
    drop((runs, client));
    server.signal("TERM");
    assert_eq!(server.exit().await.code(), Some(0));
    let left: Vec<_> = fs::read_dir(&build_root).unwrap().flatten().map(|entry| entry.path()).collect();
    assert_eq!(left, Vec::<PathBuf>::new());
}

/// Staged inputs only save time, so they leave room for everything else.
#[tokio::test]
async fn staged_inputs_take_at_most_half_of_the_space_that_is_free_without_them() {
    let server = Server::on_a_disk_of(64 << 20).await;
    let client = server.client().await;
    let content = client.upload(vec![7; 3_900_000]).await;
    for at in 0..12 {
        let root = directory(vec![file(&format!("f{at}"), content)], vec![], vec![]);
        let root = client.upload(root).await;
        let response = client.run(client.action(sh("cat f* | wc -c"), root).await).await;
        let result = response.result.unwrap_or_else(|| panic!("{:?}", response.status));
        assert_eq!(client.stdout(&result).await.trim(), "3900000");
    }
    if has_logged(&server, "inputs_copied") {
        eprintln!("skipped: there are no overlays here");
        return;
    }
    let trees = || {
        let names = fs::read_dir(server.inside("build")).unwrap().flatten();
        names.filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b"t-")).count()
    };
    eventually("trees are removed", || trees() <= 8).await;
    assert!(trees() >= 4, "{}", trees());
}
