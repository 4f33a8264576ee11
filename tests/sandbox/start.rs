//! What a server reports about the sandbox when it starts, and how it behaves if protections are missing.

use crate::{Host, limits::ended_by, support::*, with_each};
use gorego_reapi::proto::reapi;
use std::{
    process::{Command, Stdio},
    sync::Arc,
};

/// Runs the server in a user namespace in which no further namespace can be created.
fn without_namespaces(mode: &str) -> (tempfile::TempDir, Command) {
    let store = tempfile::tempdir().unwrap();
    let serve = command(store.path());
    let mut shell = Command::new("unshare");
    shell
        .args(["--user", "--map-root-user", "sh", "-c"])
        .arg("echo 0 > /proc/sys/user/max_user_namespaces && exec \"$0\" \"$@\"")
        .arg(serve.get_program())
        .args(serve.get_args())
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("GOREGO_EXECUTION__SANDBOX__MODE", mode)
        .stdin(Stdio::null())
        .stderr(Stdio::piped());
    (store, shell)
}

#[tokio::test]
async fn required_refuses_to_start_if_a_protection_is_missing_and_says_what_enables_it() {
    let (_store, mut serve) = without_namespaces("required");
    let output = serve.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("execution.sandbox.mode") && said.contains("namespaces is off"), "{said}");
    assert!(said.contains("sysctl -w user.max_user_namespaces=15000"), "{said}");
}

/// The system call filter and Landlock work without namespaces.
#[tokio::test]
async fn auto_starts_with_the_available_protections_and_says_what_is_missing() {
    let (store, serve) = without_namespaces("auto");
    let host = Host::of(Server::spawn(serve, Arc::new(store)), false).await;
    let started = host.server.started();
    let log = host.server.log();
    let missing: Vec<_> = log.iter().filter(|event| event["event"] == "protection_missing").collect();
    let namespaces = missing.iter().find(|event| event["protection"] == "namespaces").unwrap();
    assert!(namespaces["remedy"].as_str().unwrap().contains("max_user_namespaces"), "{namespaces}");
    assert_eq!(started["sandbox"], "filter, landlock");

    assert_eq!(host.says("echo out > o; cat o; grep -c 'Seccomp:.2' /proc/self/status").await, "out\n1");
    // The server could write there if this user can. Its actions cannot.
    if let Ok(beside) = tempfile::tempdir_in("/run") {
        host.cannot(&format!("echo x > {}/f", beside.path().display())).await;
    }
    host.cannot(&format!("kill -0 {}", host.server.pid())).await;
    // The capabilities that the actions of a root server keep.
    let capabilities = host.says("grep -E '^Cap(Eff|Bnd)' /proc/self/status | tr -d '[:blank:]'").await;
    for set in capabilities.lines() {
        let (_, bits) = set.split_once(':').unwrap();
        let bits = u64::from_str_radix(bits, 16).unwrap();
        assert_eq!(bits & !0xfb, 0, "CHOWN to SETUID at most: {capabilities}");
    }
    let device = host.run("mknod d c 1 3 2>&1").await;
    assert!(device.exit_code != 0, "{}", device.stdout);
}

/// The error is returned at once and names the setting that would allow it.
#[tokio::test]
async fn an_action_gets_the_network_of_the_host_only_if_its_pool_allows_it() {
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = tcp.local_addr().unwrap().port();
    let connect = format!(
        "perl -MSocket -e 'socket(S, PF_INET, SOCK_STREAM, 0); connect(S, sockaddr_in({port}, inet_aton(\"127.0.0.1\"))) or die $!'"
    );
    let asking = async |host: &Host, name: &str, value: &str| {
        let property = reapi::platform::Property { name: name.into(), value: value.into() };
        let change = |action: &mut reapi::Action| {
            action.platform = Some(reapi::Platform { properties: vec![property] });
        };
        let action = host.client.action_with(sh(&connect), empty(), change).await;
        match host.client.start_request(host.client.request(action)).await {
            Ok(run) => {
                let response = run.finish().await;
                response.result.map(|result| result.exit_code).ok_or(response.status.unwrap().message)
            }
            Err(status) => {
                assert_eq!(status.code(), tonic::Code::FailedPrecondition);
                Err(status.message().to_owned())
            }
        }
    };
    with_each(&[("EXECUTION__SANDBOX__NETWORK", "host")], async |host| {
        assert_eq!(asking(host, "network", "on").await, Ok(0));
        assert_eq!(asking(host, "dockerNetwork", "standard").await, Ok(0));
        assert_ne!(asking(host, "network", "off").await, Ok(0));
        host.cannot(&connect).await;
    })
    .await;
    with_each(&[], async |host| {
        let refused = asking(host, "network", "on").await.unwrap_err();
        assert!(refused.contains("execution.sandbox.network"), "{refused}");
        assert_ne!(asking(host, "network", "off").await, Ok(0));
    })
    .await;
}

/// Each pool has its own mode.
#[tokio::test]
async fn a_pool_can_switch_the_sandbox_off_while_others_use_it() {
    let pools = "{ bare = { slots = 1, properties = { kind = \"bare\" }, sandbox = { mode = \"off\" } }, \
                 usual = { slots = 1, properties = { kind = \"usual\" } } }";
    with_each(&[("EXECUTION__POOLS", pools)], async |host| {
        let pid = async |kind: &str| {
            let property = reapi::platform::Property { name: "kind".into(), value: kind.into() };
            let change = |action: &mut reapi::Action| {
                action.platform = Some(reapi::Platform { properties: vec![property] });
            };
            let action = host.client.action_with(sh("echo $$"), empty(), change).await;
            let result = host.client.run(action).await.result.unwrap();
            host.client.stdout(&result).await.trim().parse::<u32>().unwrap()
        };
        assert!(pid("usual").await < 10, "it has process ids of its own");
        assert!(pid("bare").await > 10);
    })
    .await;
}

/// On a build root without idmapped mounts, the actions of a root server are root of the host. The kernel does not
/// limit the processes of this user, so the server counts them if there are no control groups.
#[tokio::test]
async fn without_identity_the_actions_of_a_root_server_cannot_change_devices_and_files_of_proc() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only a root server has users for its slots");
        return;
    }
    let store = tempfile::tempdir().unwrap();
    let serve = command(store.path());
    let mut shell = Command::new("unshare");
    shell
        .args(["--mount", "sh", "-c"])
        .arg("mkdir \"$RAM\" && mount -t ramfs none \"$RAM\" && mount -t tmpfs none /sys/fs/cgroup && exec \"$0\" \"$@\"")
        .arg(serve.get_program())
        .args(serve.get_args())
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("RAM", store.path().join("ram"))
        .env("GOREGO_EXECUTION__BUILD_ROOT", store.path().join("ram/build"))
        .env("GOREGO_EXECUTION__SANDBOX__MODE", "auto")
        .env("GOREGO_EXECUTION__SANDBOX__PROCESSES", "40")
        .stdin(Stdio::null())
        .stderr(Stdio::piped());
    let host = Host::of(Server::spawn(shell, Arc::new(store)), true).await;
    let sandbox = host.server.started()["sandbox"].as_str().unwrap().to_owned();
    assert!(sandbox.starts_with("namespaces, network, filter"), "{sandbox}");

    let limits = host.server.started()["limits"].as_str().unwrap().to_owned();
    assert!(limits.contains("processes: best effort"), "{limits}");
    let bomb = sh("n=0; while [ $n -lt 200 ]; do sleep 1000 & n=$((n+1)); done; wait");
    let action = host.client.action(bomb, empty()).await;
    let ended = host.client.run(action).await;
    ended_by(&host, (action, ended), &["of the 40 processes and threads allowed"]).await;

    assert_eq!(host.says("stat -c %u /dev/full").await, "1000", "the action owns the devices");
    for change in ["touch /dev/full", "chmod 666 /dev/full", "touch /proc/slabinfo", "chmod 666 /proc/keys"] {
        let did = host.run(change).await;
        assert!(did.exit_code != 0 && did.stderr.contains("Read-only"), "{change}: {}", did.stderr);
    }
    assert_eq!(host.says("echo x > /dev/null; head -c 1 /dev/zero | wc -c").await, "1");
    assert_eq!(host.says("cat /proc/slabinfo /proc/vmallocinfo /proc/kpagecount | wc -c").await, "0");
}

#[tokio::test]
async fn a_start_names_the_protections_that_are_on() {
    let server = Server::with(&[("EXECUTION__SANDBOX__MODE", "required")]).await;
    let started_with = server.started();
    let sandbox = started_with["sandbox"].as_str().unwrap();
    assert!(sandbox.starts_with("namespaces, network") && sandbox.contains("filter"), "{sandbox}");
    let off = Server::with(&[("EXECUTION__SANDBOX__MODE", "off")]).await;
    assert_eq!(off.started()["sandbox"], "none");
}
