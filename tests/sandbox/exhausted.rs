//! Limits that do not end an action but make its system calls fail, and memory that no process maps.

use crate::{
    Host,
    limits::{ended_by, run},
    with_each,
};
use gorego_reapi::{digest::Digest, proto::reapi::ExecuteResponse};

/// Runs a script that fails because a limit is reached, and checks its result.
async fn fails_at(host: &Host, script: &str, exit_code: i32, parts: &[&str]) {
    failed_at(host, run(host, script, &[]).await, script, exit_code, parts).await;
}

/// Checks that the command's own exit code stays and that the message contains these parts.
async fn failed_at(
    host: &Host,
    (action, response): (Digest, ExecuteResponse),
    script: &str,
    exit_code: i32,
    parts: &[&str],
) {
    assert_eq!(response.result.as_ref().unwrap().exit_code, exit_code, "{script}: {response:?}");
    for part in parts {
        assert!(response.message.contains(part), "{script}: {part} in {}", response.message);
    }
    assert_eq!(host.client.cached(action).await, None, "it is not cached");
}

#[tokio::test]
async fn a_failure_with_a_full_tmp_or_shm_names_limit_use_and_setting() {
    let settings = [
        ("EXECUTION__SANDBOX__TMP_SIZE_GB", "2 MB"),
        ("EXECUTION__SANDBOX__SHM_SIZE_GB", "1 MB"),
        ("EXECUTION__SANDBOX__TMP_FILES", "300"),
    ];
    with_each(&settings, async |host| {
        let tmp = ["/tmp was full: 2 MB of the 2 MB allowed", "execution.sandbox.tmp_size_gb"];
        let shm = ["/dev/shm was full: 1 MB of the 1 MB allowed", "execution.sandbox.shm_size_gb"];
        let files = |at: &str| format!("{at} was full: it had 300 of the 300 files and directories allowed");
        fails_at(host, "head -c 9M /dev/zero > /tmp/x || exit 7", 7, &tmp).await;
        fails_at(host, "head -c 9M /dev/zero > /dev/shm/x || exit 7", 7, &shm).await;
        for at in ["/tmp", "/dev/shm"] {
            let bomb = format!("n=0; while true > {at}/$n; do n=$((n+1)); done; exit 7");
            fails_at(host, &bomb, 7, &[&files(at), "execution.sandbox.tmp_files"]).await;
        }
        let both = "head -c 9M /dev/zero > /tmp/x; head -c 9M /dev/zero > /dev/shm/x; exit 7";
        fails_at(host, both, 7, &[tmp, shm].concat()).await;
        // The file has no name any more, and only a process in the background has it open.
        let removed = "exec 3> /tmp/x; rm /tmp/x; sleep 100 & head -c 9M /dev/zero >&3 || exit 7";
        fails_at(host, removed, 7, &tmp).await;
        let killed = ["killed by signal 15 (SIGTERM): ", tmp[0], tmp[1]];
        fails_at(host, "head -c 9M /dev/zero > /tmp/x; kill $$", 128 + 15, &killed).await;
        // The program writes through a mapping.
        let mapped = "perl -e 'open F, \"+>\", \"/dev/shm/x\" or die; truncate F, 9e6 or die; \
                      my $p = syscall(9, 0, 9000000, 3, 1, fileno(F), 0); die if $p < 0; open Z, \"<\", \"/dev/zero\"; \
                      syscall(0, fileno(Z), $p, 9000000) < 9000000 and exit 7'";
        fails_at(host, mapped, 7, &shm).await;
    })
    .await;
}

/// A success has no message, and neither has a failure that no limit explains.
#[tokio::test]
async fn limits_that_explain_nothing_are_not_named() {
    let settings = [("EXECUTION__SANDBOX__TMP_SIZE_GB", "2 MB"), ("EXECUTION__SANDBOX__PROCESSES", "40")];
    with_each(&settings, async |host| {
        for (script, exit_code) in [
            ("head -c 9M /dev/zero > /tmp/x; exit 0", 0),
            ("head -c 1M /dev/zero > /tmp/x; exit 3", 3),
            ("for i in 1 2 3 4 5 6 7 8 9 10; do sleep 5 & done; exit 3", 3),
        ] {
            let (_, response) = run(host, script, &[]).await;
            assert_eq!(response.result.as_ref().unwrap().exit_code, exit_code, "{script}: {response:?}");
            assert_eq!(response.message, "", "{script}");
        }
    })
    .await;
}

/// The processes still run when the command fails, or they ran for a while before. Without a control group, the server
/// sees the latter only if it counts them in time. Nothing shows when it has, so they run longer
/// until the message comes.
#[tokio::test]
async fn the_result_of_a_fork_bomb_names_its_limit() {
    with_each(&[("EXECUTION__SANDBOX__PROCESSES", "40")], async |host| {
        let names = ["limit of processes: it had ", " of the 40 processes and threads allowed"];
        let names = [names[0], names[1], "execution.sandbox.processes"];
        let running = "n=0; while [ $n -lt 200 ]; do sleep 5 & n=$((n+1)); done";
        fails_at(host, running, 2, &names).await;
        let ended = "perl -e 'my @p; while (defined(my $p = fork)) { if (!$p) { sleep 100; exit } push @p, $p; \
                     last if @p > 200 } select undef, undef, undef, shift; kill 9, @p; waitpid $_, 0 for @p; \
                     exit(@p > 200 ? 0 : 3)'";
        for seconds in ["0.5", "2", "8", "30"] {
            let ended = format!("{ended} {seconds}");
            let ran = run(host, &ended, &[]).await;
            if !ran.1.message.is_empty() || seconds == "30" {
                failed_at(host, ran, &ended, 3, &names).await;
                break;
            }
        }
        assert_eq!(host.says("echo fine").await, "fine");
    })
    .await;
}

/// Files in memory count as memory, whether or not they have a name and a process maps them.
#[tokio::test]
async fn files_in_memory_count_as_memory() {
    let settings =
        [("EXECUTION__LIMITS__MEMORY_GB", "100 MB"), ("EXECUTION__SANDBOX__SHM_SIZE_GB", "400 MB")];
    with_each(&settings, async |host| {
        for script in [
            "head -c 300M /dev/zero > /tmp/large; sleep 30",
            "head -c 300M /dev/zero > /dev/shm/large; sleep 30",
            "exec 3> /tmp/large; rm /tmp/large; head -c 300M /dev/zero >&3; sleep 30",
            "perl -e 'my $fd = syscall(319, my $name = \"bomb\", 0); open my $file, \">&=\", $fd or die; \
             my $text = \"x\" x 1048576; for (1..300) { syswrite $file, $text or die } sleep 30'",
        ] {
            ended_by(host, run(host, script, &[]).await, &["memory", "of the 100 MB allowed"]).await;
        }
        // The memory is free again for the next action.
        assert_eq!(host.says("head -c 60M /dev/zero > /tmp/large; sleep 0.3; echo $?").await, "0");
    })
    .await;
}

/// This is promised for a server that is root. An ordinary user may not set these limits.
#[tokio::test]
async fn shared_memory_and_message_queues_of_system_v_have_limits() {
    with_each(&[("EXECUTION__SANDBOX__SHM_SIZE_GB", "4 MB")], async |host| {
        let script = "perl -e 'for (1..3) { push @s, defined shmget(0, 1_500_000, 0600) ? 0 : $!+0 } \
                      $n++ while $n < 5000 and defined msgget(0, 0600); print \"@s $n\"'";
        let said = host.says(script).await;
        let expected = if host.is_root { "0 0 28 1000" } else { "0 0 0 5000" };
        assert_eq!(said, expected);
    })
    .await;
}
