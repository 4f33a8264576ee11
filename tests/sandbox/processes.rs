//! The processes that an action sees and leaves behind, and its influence on other processes.

use crate::{processes_with, support::*, with_each};
use std::{fs, time::Duration};

#[tokio::test]
async fn an_action_sees_only_its_own_processes() {
    with_each(&[], async |host| {
        let seen = host.says("for p in /proc/[0-9]*; do echo ${p#/proc/}; done | sort -n | head -n 1; ls -d /proc/[0-9]* | wc -l").await;
        let (first, count) = seen.split_once('\n').unwrap();
        assert_eq!(first, "1");
        assert!(count.trim().parse::<u32>().unwrap() < 10, "{seen}");
        let pid = host.server.pid();
        host.cannot(&format!("kill -0 {pid}")).await;
        host.cannot(&format!("cat /proc/{pid}/cmdline")).await;
    })
    .await;
}

/// Two actions run at the same time. Neither finds the environment, the files or the processes of the other.
#[tokio::test]
async fn an_action_does_not_find_another_one() {
    with_each(&[("EXECUTION__CONCURRENCY", "2")], async |host| {
        let marker = format!("marker-{}", host.server.pid());
        let mut victim = sh(&format!("echo secret > /tmp/{marker}; : {marker}; sleep 100"));
        victim.environment_variables.push(gorego_reapi::proto::reapi::command::EnvironmentVariable {
            name: "SECRET".into(),
            value: marker.clone(),
        });
        let action = host.client.action(victim, empty()).await;
        let running = host.client.start(action).await;
        eventually("the first action runs", || processes_with(&format!(": {marker}")).len() == 1).await;
        let found = host
            .says("cat /proc/*/environ /proc/*/cmdline 2>/dev/null | tr '\\0' '\\n'; ls -R /tmp /build; true")
            .await;
        assert!(!found.contains(&marker), "{found}");
        // A process id of the host does not refer to that process in the sandbox.
        let pid = processes_with(&format!(": {marker}"))[0].split(':').next().unwrap().to_owned();
        host.cannot(&format!("kill -9 {pid}")).await;
        assert_eq!(processes_with(&format!(": {marker}")).len(), 1);
        if host.is_root {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
            let user: u32 =
                status.split("Uid:\t").nth(1).unwrap().split('\t').next().unwrap().parse().unwrap();
            assert!((200_000..200_064).contains(&user), "the action is user {user} of the host");
            assert!(status.contains("Groups:\t \n") || status.contains("Groups:\t\n"), "{status}");
        }
        drop(running);
    })
    .await;
}

/// EXE-44.
#[tokio::test]
async fn a_daemon_does_not_outlive_its_action() {
    with_each(&[], async |host| {
        let marker = format!("daemon-of-{}", host.server.pid());
        host.says(&format!(
            "(setsid sh -c 'trap \"\" TERM HUP INT; : {marker}; sleep 1000' >/dev/null 2>&1 &) ; sleep 0.2"
        ))
        .await;
        eventually("the daemon is gone", || processes_with(&marker).is_empty()).await;
    })
    .await;
}

/// A process that waits for the end of the action in order to act afterwards ends with the action.
#[tokio::test]
async fn nothing_that_waits_for_the_end_of_an_action_outlives_it() {
    with_each(&[], async |host| {
        let marker = format!("waits-in-{}", host.server.pid());
        // A double fork, a child that waits for its parent, and an END block with a closed output.
        host.says(&format!(
            "perl -e 'exit if fork; require POSIX; POSIX::setsid(); exit if fork; $0 = \"{marker}\"; close STDOUT; close STDERR; \
             $SIG{{$_}} = \"IGNORE\" for qw(TERM HUP INT PIPE); END {{ sleep 1000 }} sleep 1 while getppid() != 0; sleep 1000' & \
             (exec >&- 2>&-; trap '' TERM HUP; : {marker}; while [ -e /proc/$$ ]; do sleep 0.05; done; sleep 1000) & sleep 0.3"
        ))
        .await;
        eventually("they are gone", || processes_with(&marker).is_empty()).await;
    })
    .await;
}

/// EXE-45, with several processes that ignore signals.
#[tokio::test]
async fn a_timeout_ends_everything_at_once() {
    with_each(&[], async |host| {
        let marker = format!("slow-of-{}", host.server.pid());
        let script = format!("for i in 1 2 3; do (trap '' TERM; : {marker}; sleep 1000) & done; wait");
        let action = host
            .client
            .action_with(sh(&script), empty(), |action| {
                action.timeout = Some(Duration::from_millis(500).try_into().unwrap());
            })
            .await;
        let response = host.client.run(action).await;
        assert_eq!(response.status.unwrap().code, tonic::Code::DeadlineExceeded as i32);
        assert_eq!(processes_with(&marker), [""; 0]);
    })
    .await;
}

#[tokio::test]
async fn a_fork_bomb_reaches_its_limit_and_affects_no_other_action() {
    with_each(&[("EXECUTION__SANDBOX__PROCESSES", "40")], async |host| {
        let script = "n=0; while [ $n -lt 200 ]; do sleep 5 & n=$((n+1)); done";
        let did = host.run(script).await;
        assert!(did.stderr.contains("fork") && did.exit_code != 0, "{} {}", did.exit_code, did.stderr);
        assert_eq!(host.says("echo fine").await, "fine");
    })
    .await;
}

/// The prepared cell ends with its runner, and the next action gets another runner.
#[tokio::test]
async fn a_killed_runner_leaves_no_cell_and_is_replaced() {
    with_each(&[("EXECUTION__CONCURRENCY", "1")], async |host| {
        let server = host.server.pid();
        let children = |of: u32| -> Vec<u32> {
            let list = fs::read_to_string(format!("/proc/{of}/task/{of}/children")).unwrap_or_default();
            list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
        };
        // Any thread of the server may have started the runner.
        let runners = || -> Vec<u32> {
            let threads = fs::read_dir(format!("/proc/{server}/task")).unwrap().flatten();
            let lists = threads.filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
            lists
                .flat_map(|list| {
                    list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>()
                })
                .collect()
        };
        host.says("true").await;
        let runner = runners()[0];
        eventually("a cell is ready", || !children(runner).is_empty()).await;
        let cell = children(runner)[0];
        rustix::process::kill_process(
            rustix::process::Pid::from_raw(runner.try_into().unwrap()).unwrap(),
            rustix::process::Signal::KILL,
        )
        .unwrap();
        assert_eq!(host.says("echo again").await, "again");
        eventually("the runner and its cell are gone", || {
            [runner, cell].iter().all(|process| !fs::exists(format!("/proc/{process}")).unwrap())
        })
        .await;
        assert!(!runners().is_empty(), "another runner has taken its place");
    })
    .await;
}
