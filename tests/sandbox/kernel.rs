//! The requests to the kernel that an action may make.

#![cfg(target_arch = "x86_64")]

use crate::with_each;
use std::{
    fs,
    net::TcpListener,
    os::unix::{fs::PermissionsExt as _, net::UnixListener},
};

const EPERM: i32 = 1;
const ENOSYS: i32 = 38;
const EPROTONOSUPPORT: i32 = 93;
const EAFNOSUPPORT: i32 = 97;

/// System calls by name, number and arguments, with the errno that they must fail with. Next to the filter
/// (`src/sandbox/filter.rs`) there is a test that the filter refuses them, and not only a missing capability.
const CALLS: &[(&str, &str, i32)] = &[
    ("mount", "165, 0, 0, 0, 0, 0", EPERM),
    ("umount", "166, 0, 2", EPERM),
    ("pivot_root", "155, 0, 0", EPERM),
    ("chroot", "161, 0", EPERM),
    ("open_tree", "428, -100, 0, 1", EPERM),
    ("open_tree_attr", "467, -100, 0, 1, 0, 0", EPERM),
    ("quotactl_fd", "443, -1, 0, 0, 0", EPERM),
    ("move_mount", "429, 3, 0, -100, 0, 4", EPERM),
    ("fsopen", "430, 0, 0", EPERM),
    ("mount_setattr", "442, -100, 0, 0, 0, 0", EPERM),
    ("unshare a user namespace", "272, 0x10000000", EPERM),
    ("unshare a mount namespace", "272, 0x20000", EPERM),
    ("clone a network namespace", "56, 0x40000011, 0, 0, 0, 0", EPERM),
    ("clone3", "435, 0, 0", ENOSYS),
    ("setns", "308, 0, 0", EPERM),
    ("keyctl", "250, 0, 0", EPERM),
    ("add_key", "248, 0, 0, 0, 1, -3", EPERM),
    ("bpf", "321, 0, 0, 0", EPERM),
    ("perf_event_open", "298, 0, 0, 0, 0, 0", EPERM),
    ("userfaultfd", "323, 1", EPERM),
    ("io_uring_setup", "425, 1, 0", EPERM),
    ("init_module", "175, 0, 0, 0", EPERM),
    ("clock_settime", "227, 0, 0", EPERM),
    ("reboot", "169, 0, 0, 0, 0", EPERM),
    ("a packet socket", "41, 17, 3, 0", EAFNOSUPPORT),
    ("a raw socket", "41, 2, 3, 1", EPERM),
    ("a vsock", "41, 40, 1, 0", EAFNOSUPPORT),
    ("a TIPC socket", "41, 30, 2, 0", EAFNOSUPPORT),
    ("a pair of TIPC sockets", "53, 30, 2, 0, 0", EAFNOSUPPORT),
    ("a netlink socket for audits", "41, 16, 3, 9", EPROTONOSUPPORT),
    ("open_by_handle_at", "304, -100, 0, 0", EPERM),
];

#[tokio::test]
async fn calls_that_make_mounts_or_namespaces_or_use_risky_kernel_features_are_refused() {
    with_each(&[], async |host| {
        let lines: Vec<_> = CALLS
            .iter()
            .map(|(name, call, _)| {
                format!("$! = 0; my $r = syscall({call}); print \"{name}: $r \", $!+0, \"\\n\";")
            })
            .collect();
        let program =
            format!("use strict; {}", lines.iter().map(|line| format!("{{ {line} }}")).collect::<String>());
        let quoted = program.replace('\'', "'\\''");
        let said = host.says(&format!("perl -e '{quoted}'")).await;
        let expected: Vec<_> = CALLS.iter().map(|(name, _, errno)| format!("{name}: -1 {errno}")).collect();
        assert_eq!(said.lines().collect::<Vec<_>>(), expected);
    })
    .await;
}

/// Debuggers and leak checkers trace their child processes.
#[tokio::test]
async fn an_action_can_trace_only_its_own_processes() {
    with_each(&[], async |host| {
        // PTRACE_TRACEME, then PTRACE_ATTACH to the first process of the sandbox.
        assert_eq!(host.says("perl -e 'print syscall(101, 0, 0, 0, 0)'").await, "0");
        assert_eq!(host.says("perl -e 'print syscall(101, 16, 1, 0, 0), \" \", $!+0'").await, "-1 1");
        host.cannot("cat /proc/1/environ").await;
        host.cannot("cat /proc/1/maps").await;
        // The first process ignores signals from other processes of the cell.
        assert_eq!(host.says("kill -9 1; kill -STOP 1; sleep 0.1; echo alive").await, "alive");
    })
    .await;
}

/// With a low limit on CPU time or open files the first process would end, and the action would fail as if the server
/// were at fault.
#[tokio::test]
async fn the_limits_of_the_first_process_cannot_be_changed() {
    with_each(&[], async |host| {
        let limit = |pid: &str| {
            format!("perl -e 'my $l = pack(\"QQ\", 9, 9); print syscall(302, {pid}, 7, $l, 0), \" \", $!+0'")
        };
        assert_eq!(host.says(&limit("1")).await, "-1 1");
        assert!(host.says(&limit("0")).await.starts_with("0 "));
        assert!(host.says(&limit("$$ + 0")).await.starts_with("0 "));
    })
    .await;
}

/// The number is a call of the x32 ABI, which has the same architecture as x86-64.
#[tokio::test]
async fn a_call_of_a_foreign_abi_kills_the_process() {
    with_each(&[], async |host| {
        let did = host.run("exec perl -e 'syscall(0x40000000 + 39); print \"survived\"'").await;
        assert_eq!((did.exit_code, &*did.stdout), (128 + 31, ""), "{}", did.stderr);
        // The number that tracers use to skip a call does not belong to any ABI.
        assert_eq!(host.says("perl -e 'print syscall(-1), \" \", $!+0'").await, format!("-1 {ENOSYS}"));
    })
    .await;
}

#[tokio::test]
async fn an_action_has_no_network_except_its_own_loopback() {
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = tcp.local_addr().unwrap().port();
    let name = format!("gorego-test-{}", std::process::id());
    let address = {
        use std::os::linux::net::SocketAddrExt as _;
        std::os::unix::net::SocketAddr::from_abstract_name(&name).unwrap()
    };
    let _abstract = UnixListener::bind_addr(&address).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let _path = UnixListener::bind(&path).unwrap();
    // The modes allow the access, so they are not what keeps actions away.
    for (path, mode) in [(directory.path(), 0o755), (&path, 0o777)] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
    with_each(&[], async |host| {
        let connect = |rest: &str| format!("perl -MSocket -e '{rest} or die $!'");
        let to_tcp = format!("socket(S, PF_INET, SOCK_STREAM, 0); connect(S, sockaddr_in({port}, inet_aton(\"127.0.0.1\")))");
        host.cannot(&connect(&to_tcp)).await;
        let to_unix = |name: &str| format!("socket(S, PF_UNIX, SOCK_STREAM, 0); connect(S, sockaddr_un(\"{name}\"))");
        host.cannot(&connect(&to_unix(&format!("\\0{name}")))).await;
        host.cannot(&connect(&to_unix(path.to_str().unwrap()))).await;
        let own = "socket(S, PF_INET, SOCK_STREAM, 0); bind(S, sockaddr_in(8080, INADDR_ANY)) and listen(S, 1) and \
                   socket(C, PF_INET, SOCK_STREAM, 0) and connect(C, sockaddr_in(8080, inet_aton(\"127.0.0.1\")))";
        host.says(&connect(own)).await;
    })
    .await;
}

#[tokio::test]
async fn no_action_finds_traces_of_another_one_in_its_network() {
    with_each(&[("EXECUTION__CONCURRENCY", "1")], async |host| {
        let traces = "tail -n +3 /proc/net/dev; md5sum < /proc/net/snmp; tail -n +2 /proc/net/unix; \
                      head -1 /proc/net/sockstat";
        let unused = host.says(traces).await;
        for talk in [
            // The first connection leaves a socket in the state TIME_WAIT.
            "socket(S, PF_INET, SOCK_STREAM, 0); bind(S, sockaddr_in(8080, INADDR_ANY)) and listen(S, 1) and \
             socket(C, PF_INET, SOCK_STREAM, 0) and connect(C, sockaddr_in(8080, inet_aton(\"127.0.0.1\"))) and \
             accept(A, S) and close(A) and close(C)",
            "socket(S, PF_INET, SOCK_DGRAM, 0); send(S, \"x\", 0, sockaddr_in(8080, inet_aton(\"127.0.0.1\")))",
            "socket(S, PF_UNIX, SOCK_DGRAM, 0); bind(S, sockaddr_un(\"\\0name\"))",
        ] {
            host.says(&format!("perl -MSocket -e '{talk} or die $!'")).await;
            for run in 0..4 {
                let traces = format!("{traces} # {run}, {talk}");
                assert_eq!(host.says(&traces).await, unused, "{talk}");
            }
        }
        let mut interface = unused.lines().next().unwrap().split_whitespace();
        assert!(interface.next() == Some("lo:") && interface.all(|count| count == "0"), "{unused}");
        assert!(unused.ends_with("sockets: used 0"), "{unused}");
    })
    .await;
}

/// With another limit, the host's core handler would run for the action.
#[tokio::test]
async fn a_crash_leaves_no_core_whatever_limit_the_action_sets() {
    with_each(&[], async |host| {
        let did = host.run("ulimit -c 0; ulimit -c unlimited; perl -e 'kill 11, $$'; ls").await;
        assert_eq!(did.stdout, "");
        let limit = host.says("ulimit -c 0; grep core /proc/self/limits").await;
        // At a limit of 1, the kernel does not run piped core handlers.
        let numbers: Vec<_> = limit.split_whitespace().filter(|word| word.parse::<u64>().is_ok()).collect();
        assert_eq!(numbers, ["1", "1"], "{limit}");
    })
    .await;
}
