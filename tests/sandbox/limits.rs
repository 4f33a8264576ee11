//! The resource limits of actions, and how an action that exceeds one is ended.

use crate::{Host, support::*, with_each};
use gorego_reapi::{
    digest::Digest,
    proto::reapi::{ExecuteResponse, Platform, platform::Property},
};
use std::fs;

/// Reads zeros into memory until there is no more memory.
const MEMORY_BOMB: &str = "tail /dev/zero";

/// Uploads the action of a script with these platform properties.
pub(crate) async fn action(host: &Host, script: &str, properties: &[(&str, &str)]) -> Digest {
    let property = |(name, value): &(&str, &str)| Property { name: (*name).into(), value: (*value).into() };
    let platform = Platform { properties: properties.iter().map(property).collect() };
    host.client.action_with(sh(script), empty(), |action| action.platform = Some(platform)).await
}

/// Runs a script with these platform properties.
pub(crate) async fn run(host: &Host, script: &str, properties: &[(&str, &str)]) -> (Digest, ExecuteResponse) {
    let action = action(host, script, properties).await;
    (action, host.client.run(action).await)
}

/// Checks that a limit ended an action, and that the message contains these parts.
pub(crate) async fn ended_by(host: &Host, (action, response): (Digest, ExecuteResponse), parts: &[&str]) {
    let message = &response.message;
    assert_eq!(response.status.as_ref().map_or(0, |status| status.code), 0, "{response:?}");
    assert_eq!(response.result.as_ref().unwrap().exit_code, 137, "{response:?}");
    for part in parts {
        assert!(message.contains(part), "{part} in {message}");
    }
    assert_eq!(host.client.cached(action).await, None, "it is not cached");
    assert_eq!(host.says("echo fine").await, "fine");
}

/// Whether the kernel bounds the memory of this server's actions.
pub(crate) fn has_groups(host: &Host) -> bool {
    host.server.started()["limits"].as_str().unwrap().contains("memory: cgroup")
}

/// EXE-20. Another action that runs at the same time is not affected.
#[tokio::test]
async fn a_memory_bomb_is_ended_and_the_message_names_limit_and_setting() {
    let limits = [("EXECUTION__LIMITS__MEMORY_GB", "100 MB"), ("EXECUTION__CONCURRENCY", "2")];
    with_each(&limits, async |host| {
        let neighbour = host.client.action(sh("sleep 1; echo alive"), empty()).await;
        let neighbour = host.client.start(neighbour).await;
        let bomb = run(host, &format!("echo before; {MEMORY_BOMB}"), &[]).await;
        let result = bomb.1.result.clone().unwrap();
        ended_by(host, bomb, &["memory", "of the 100 MB allowed", "execution.limits.memory_gb"]).await;
        assert_eq!(host.client.stdout(&result).await, "before\n", "its output is kept");
        let response = neighbour.finish().await;
        assert_eq!(host.client.stdout(&response.result.unwrap()).await, "alive\n");
    })
    .await;
}

/// The command itself succeeds, but one of its processes was killed.
#[tokio::test]
async fn a_command_that_lost_a_process_to_the_limit_fails() {
    with_each(&[("EXECUTION__LIMITS__MEMORY_GB", "100 MB")], async |host| {
        let script = format!("{MEMORY_BOMB}; echo ignored; exit 0");
        ended_by(host, run(host, &script, &[]).await, &["100 MB"]).await;
    })
    .await;
}

/// EXE-31.
#[tokio::test]
async fn an_action_can_ask_for_memory_up_to_the_maximum() {
    let limits = [("EXECUTION__LIMITS__MEMORY_GB", "2 GB"), ("EXECUTION__LIMITS__MAX_MEMORY_GB", "4 GB")];
    with_each(&limits, async |host| {
        let bomb = run(host, MEMORY_BOMB, &[("memory", "64Mi")]).await;
        ended_by(host, bomb, &["of the 67.1 MB allowed", "property \"memory\""]).await;
        let request = host.client.request(action(host, "true", &[("memory", "5G")]).await);
        let Err(status) = host.client.start_request(request).await else { panic!("no pool has that much") };
        assert_eq!(status.code(), tonic::Code::FailedPrecondition);
        for part in ["memory (asked for \"5G\", offered up to 4 GB)", "no pool can run"] {
            assert!(status.message().contains(part), "{part} in {}", status.message());
        }
        let (_, other) = run(host, "true", &[("memory-silo", "x"), ("cores", "many")]).await;
        assert_eq!(other.result.unwrap().exit_code, 0, "similar properties have no effect");
    })
    .await;
}

#[tokio::test]
async fn all_actions_together_leave_memory_to_the_server() {
    with_each(&[("EXECUTION__LIMITS__TOTAL_MEMORY_GB", "200 MB")], async |host| {
        let bomb = run(host, MEMORY_BOMB, &[]).await;
        ended_by(host, bomb, &["200 MB", "execution.limits.total_memory_gb"]).await;
    })
    .await;
}

/// An action gets as many processes as it asks for, up to a limit, and other actions get the default.
#[tokio::test]
async fn an_action_may_start_as_many_processes_as_it_has_asked_for() {
    let limits = [("EXECUTION__SANDBOX__PROCESSES", "40"), ("EXECUTION__LIMITS__MAX_PROCESSES", "100")];
    with_each(&limits, async |host| {
        let script = "n=0; while [ $n -lt 60 ]; do sleep 2 & n=$((n+1)); done";
        for (asked, is_enough) in [(&[][..], false), (&[("pids", "50")], false), (&[("pids", "100")], true)] {
            let (_, response) = run(host, script, asked).await;
            let exit_code = response.result.as_ref().unwrap().exit_code;
            assert_eq!(exit_code == 0, is_enough, "{asked:?}: {response:?}");
        }
    })
    .await;
}

/// The processes of the sandbox itself do not count.
#[tokio::test]
async fn an_action_with_room_for_a_single_process_runs() {
    with_each(&[("EXECUTION__LIMITS__MAX_PROCESSES", "100")], async |host| {
        for (asked, script) in [("1", "exit 3"), ("2", "/bin/sh -c 'exit 3'; exit $?")] {
            let (_, response) = run(host, script, &[("pids", asked)]).await;
            let result = response.result.as_ref().unwrap_or_else(|| panic!("{asked}: {response:?}"));
            assert_eq!(result.exit_code, 3, "{asked}: {response:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_disk_bomb_and_an_inode_bomb_are_ended_and_the_message_names_limit_and_setting() {
    let limits = [
        ("EXECUTION__LIMITS__DISK_GB", "50 MB"),
        ("EXECUTION__LIMITS__MAX_DISK_GB", "1 GB"),
        ("EXECUTION__LIMITS__FILES", "500"),
    ];
    with_each(&limits, async |host| {
        let disk = "while :; do head -c 1M /dev/zero >> large; done";
        ended_by(host, run(host, disk, &[]).await, &["the 50 MB allowed", "execution.limits.disk_gb"]).await;
        let inodes = "n=0; while :; do : > $n; n=$((n+1)); done";
        ended_by(host, run(host, inodes, &[]).await, &["the 500 allowed", "execution.limits.files"]).await;
        // This command may end before the first measurement.
        ended_by(host, run(host, "head -c 90M /dev/zero > large", &[]).await, &["the 50 MB allowed"]).await;
        let (_, more) = run(host, "head -c 90M /dev/zero > large", &[("disk", "100M")]).await;
        assert_eq!(more.result.unwrap().exit_code, 0);
    })
    .await;
}

/// The bomb itself is bounded, because nothing else would stop it here.
#[tokio::test]
async fn limits_are_enforced_without_a_sandbox() {
    let limits = [("EXECUTION__SANDBOX__MODE", "off"), ("EXECUTION__LIMITS__MEMORY_GB", "100 MB")];
    let server = Server::with(&limits).await;
    let client = server.client().await;
    let host = Host { server, client, is_root: rustix::process::geteuid().is_root() };
    let bomb = run(&host, "head -c 400M /dev/zero | tail | wc -c; sleep 1", &[]).await;
    ended_by(&host, bomb, &["of the 100 MB allowed"]).await;
}

/// The control groups of a server in all hierarchies.
fn groups_of(server: u32) -> Vec<std::path::PathBuf> {
    fn find(directory: &std::path::Path, name: &str, found: &mut Vec<std::path::PathBuf>) {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                if entry.file_name().to_string_lossy().starts_with(name) {
                    found.push(entry.path());
                }
                find(&entry.path(), name, found);
            }
        }
    }
    let mut found = Vec::new();
    find("/sys/fs/cgroup".as_ref(), &format!("gorego-{server}-"), &mut found);
    found
}

#[tokio::test]
async fn control_groups_are_removed_on_shutdown_and_after_a_crash() {
    with_each(&[], async |host| {
        if !has_groups(host) {
            return;
        }
        host.says("true").await;
        let killed = host.server.pid();
        assert!(!groups_of(killed).is_empty());
        host.server.signal("KILL");
        eventually("the server is gone", || !fs::exists(format!("/proc/{killed}/exe")).unwrap()).await;
        // The next server removes the leftovers of the first, unless another server of this machine is doing so.
        let mut next = Server::start().await;
        eventually("the groups are gone", || groups_of(killed).is_empty()).await;
        next.client().await.run_command(sh("true")).await;
        let stopped = next.pid();
        assert!(!groups_of(stopped).is_empty());
        next.signal("TERM");
        assert!(next.exit().await.success());
        assert_eq!(groups_of(stopped).len(), 0);
    })
    .await;
}

/// The limit applies to each process, so the bomb does not use up descriptors of the server or of other actions.
#[tokio::test]
async fn a_descriptor_bomb_reaches_its_own_limit_and_harms_nobody() {
    with_each(&[("EXECUTION__CONCURRENCY", "2")], async |host| {
        let script = "perl -e 'my @f; while (open my $f, \"<\", \"/dev/null\") { push @f, $f; last if @f > 2_000_000 } \
                      print scalar(@f) > 2_000_000 ? \"endless\" : \"$!\"'";
        assert_eq!(host.says(script).await, "Too many open files");
        assert_eq!(host.says("echo fine").await, "fine");
    })
    .await;
}

#[tokio::test]
async fn a_log_bomb_is_ended_with_the_limit_and_the_setting() {
    with_each(&[("EXECUTION__MAX_OUTPUT_FILE_GB", "2 MB")], async |host| {
        for stream in ["1", "2"] {
            let action = host.client.action(sh(&format!("yes >&{stream}")), empty()).await;
            let response = host.client.run(action).await;
            let result = response.result.clone().unwrap();
            assert_eq!(result.exit_code, 128 + 25, "{response:?}");
            assert!(response.message.contains("execution.max_output_file_gb"), "{}", response.message);
            assert_eq!(host.client.cached(action).await, None);
        }
        assert_eq!(host.says("echo fine").await, "fine");
    })
    .await;
}
