//! What is left when an action ends, and when the server is killed while actions run.

use crate::{Host, processes_with, support::*, with_each};
use std::fs;

/// Memory, disk and processes are bounded, so that a bomb does no harm if it is not ended.
const BOUNDED: &[(&str, &str)] = &[
    ("EXECUTION__LIMITS__MEMORY_GB", "1 GB"),
    ("EXECUTION__LIMITS__DISK_GB", "4 GB"),
    ("EXECUTION__SANDBOX__PROCESSES", "60"),
];

/// Runs a script, kills the server when the condition holds, and checks that neither processes nor mounts remain and
/// that the next server removes the directories. The processes of the script have the marker in their command lines.
async fn is_gone_after_a_kill(host: &Host, script: &str, marker: &str, has_begun: impl Fn(&Host) -> bool) {
    let action = host.client.action(sh(script), empty()).await;
    let _running = host.client.start(action).await;
    eventually("the action runs", || has_begun(host)).await;
    let killed = host.server.pid();
    host.server.signal("KILL");
    // Until then it holds the lock of its store.
    eventually("the server is gone", || !fs::exists(format!("/proc/{killed}/exe")).unwrap()).await;
    eventually("its processes are gone", || processes_with(marker).is_empty()).await;
    let store = host.server.store().to_str().unwrap();
    let mounted = || {
        let processes = fs::read_dir("/proc").unwrap().flatten().map(|process| process.path());
        // Processes that have ended since have no mounts.
        let mounts = processes.filter_map(|process| fs::read_to_string(process.join("mountinfo")).ok());
        mounts.filter(|mounts| mounts.contains(store)).count()
    };
    eventually("its mounts are gone", || mounted() == 0).await;
    let next = Host::of(Server::on(host.server.shared_store(), &[]).await, host.is_root).await;
    assert_eq!(next.says("echo again; ls").await, "again");
    let build = next.server.store().join("build");
    eventually("its directories are gone", || fs::read_dir(&build).unwrap().next().is_none()).await;
}

#[tokio::test]
async fn a_killed_server_leaves_no_processes_mounts_or_directories() {
    with_each(&[], async |host| {
        let marker = format!("orphan-of-{}", host.server.pid());
        let script = format!("(setsid sh -c ': {marker}; sleep 1000' &); : {marker}; sleep 1000");
        is_gone_after_a_kill(host, &script, &marker, |_| processes_with(&marker).len() >= 2).await;
    })
    .await;
}

#[tokio::test]
async fn a_server_killed_during_a_fork_bomb_leaves_nothing() {
    with_each(BOUNDED, async |host| {
        let marker = format!("forks-of-{}", host.server.pid());
        // Each process goes on after the limit is reached.
        let script = format!(
            "exec perl -e '$0 = \"{marker}\"; while (1) {{ fork; select undef, undef, undef, 0.01 }}'"
        );
        is_gone_after_a_kill(host, &script, &marker, |_| processes_with(&marker).len() >= 40).await;
    })
    .await;
}

#[tokio::test]
async fn a_server_killed_during_a_memory_bomb_leaves_nothing() {
    with_each(BOUNDED, async |host| {
        let marker = format!("eats-in-{}", host.server.pid());
        let script = format!(
            "exec perl -e '$0 = \"{marker}\"; while (1) {{ push @a, \"x\" x 1e6; open F, \">>\", \"/tmp/f\"; \
             print F \"x\" x 1e6; close F; select undef, undef, undef, 0.01 }}'"
        );
        let resident = |process: &String| {
            let pid = process.split(':').next().unwrap();
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let size = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
            size.and_then(|size| size.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()).unwrap_or(0)
        };
        let has_begun = |_: &Host| processes_with(&marker).iter().any(|process| resident(process) > 50_000);
        is_gone_after_a_kill(host, &script, &marker, has_begun).await;
    })
    .await;
}

#[tokio::test]
async fn a_server_killed_during_a_disk_bomb_leaves_nothing() {
    with_each(BOUNDED, async |host| {
        let marker = format!("fills-of-{}", host.server.pid());
        let script = format!(
            "n=0; while : {marker}; do head -c 100K /dev/zero > {marker}-$n; mkdir d$n; n=$((n+1)); done"
        );
        let has_begun = |host: &Host| {
            let files = files_below(&host.server.store().join("build"));
            files.iter().filter(|file| file.to_string_lossy().contains(&marker)).count() >= 50
        };
        is_gone_after_a_kill(host, &script, &marker, has_begun).await;
    })
    .await;
}

/// A daemon that hears of every change of the action's directories, and writes into all of them when it does, changes
/// neither the outputs nor anything else once the action has ended.
#[tokio::test]
async fn a_daemon_that_watches_files_does_nothing_after_the_end() {
    with_each(&[], async |host| {
        let marker = format!("watches-{}", host.server.pid());
        let script = format!(
            "mkdir out; echo whole > out/f; perl -e 'exit if fork; require POSIX; POSIX::setsid(); exit if fork; \
             $0 = \"{marker}\"; $SIG{{$_}} = \"IGNORE\" for qw(TERM HUP INT PIPE); \
             my $events = syscall({}, 0); open my $in, \"<&=\", $events or die; opendir my $kept, \"out\" or die; \
             for my $path (qw(/build /build/out /tmp /dev/shm)) {{ \
             my $name = $path; syscall({}, $events, $name, 0xfff) < 0 and die }} \
             open F, \">\", \"/tmp/ready\"; close F; while (sysread $in, my $event, 65536) {{ \
             for my $path (qw(/build /build/out /tmp), \"/proc/self/fd/\" . fileno $kept) {{ \
             open F, \">\", \"$path/{marker}\" and close F }} }}' ; \
             while [ ! -e /tmp/ready ]; do sleep 0.05; done; echo x > /tmp/x; \
             while [ ! -e /build/{marker} ]; do sleep 0.05; done; mv out kept; mkdir out; echo whole > out/f",
            call_number("inotify_init1"),
            call_number("inotify_add_watch"),
        );
        let action = host.client.action(sh_with(&script, &["out/f"]), empty()).await;
        let result = host.client.run(action).await.result.unwrap();
        assert_eq!(result.exit_code, 0, "{}", host.client.stderr(&result).await);
        assert_eq!(host.client.output(&result, "out/f").await, "whole\n");
        eventually("the daemon is gone", || processes_with(&marker).is_empty()).await;
        eventually("the exec directory is removed", || {
            fs::read_dir(host.server.store().join("build")).unwrap().next().is_none()
        })
        .await;
        for directory in ["/tmp", "/dev/shm", "/var/tmp"] {
            assert!(!fs::exists(format!("{directory}/{marker}")).unwrap(), "{directory} of the host");
        }
        let left = files_below(host.server.store());
        assert!(!left.iter().any(|file| file.to_string_lossy().contains(&marker)), "{left:?}");
        // The next action finds nothing of it either.
        assert_eq!(host.says("ls -A /build /tmp /dev/shm | grep -v -e : -e '^$'; true").await, "");
    })
    .await;
}

/// The number of a system call on this architecture.
fn call_number(name: &str) -> u32 {
    match (name, cfg!(target_arch = "x86_64")) {
        ("inotify_init1", true) => 294,
        ("inotify_init1", false) => 26,
        ("inotify_add_watch", true) => 254,
        _ => 27,
    }
}
