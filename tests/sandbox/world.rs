//! The environment that every action finds, which is always the same.

use crate::{Host, support::*, with_each};
use std::fs;

#[tokio::test]
async fn every_action_is_the_same_user_at_the_same_place() {
    with_each(&[], async |host| {
        let said = host.says("id -u; id -g; id -un; id -Gn; pwd; hostname; umask; cat /etc/hostname").await;
        assert_eq!(said, "1000\n1000\nbuild\nbuild\n/build\nbuild\n0022\nbuild");
        let script = "grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status | tr -d '[:blank:]'";
        let status = host.says(script).await;
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert!(status.contains(&format!("{set}:0000000000000000")), "{status}");
        }
        assert!(status.contains("NoNewPrivs:1") && status.contains("Seccomp:2"), "{status}");
        assert_eq!(host.says("cat /proc/sys/user/max_user_namespaces").await, "0");
    })
    .await;
}

#[tokio::test]
async fn a_set_user_id_program_of_the_action_grants_no_rights() {
    with_each(&[], async |host| {
        assert_eq!(host.says("cp /usr/bin/id x && chmod 6755 x && ./x -u && ./x -ru").await, "1000\n1000");
        assert_eq!(
            host.says("touch f; chown 0 f 2>/dev/null; chgrp 0 f 2>/dev/null; stat -c %u:%g f").await,
            "1000:1000"
        );
        host.cannot("mknod disk b 254 0").await;
    })
    .await;
}

/// EXE-41. Descriptors of the server are not inherited either.
#[tokio::test]
async fn nothing_is_inherited_from_the_server() {
    with_each(&[], async |host| {
        assert_eq!(
            host.says("env | grep -v -E '^(PATH|PWD|SHLVL|OLDPWD|_)='; ls /proc/self/fd | tr '\\n' ' '")
                .await,
            "0 1 2 3"
        );
    })
    .await;
}

#[tokio::test]
async fn devices_and_outputs_can_be_opened() {
    with_each(&[], async |host| {
        let script = "echo out > /dev/stdout; echo err > /dev/stderr; echo more >> /proc/self/fd/2; \
                      head -c 1 /dev/zero > /dev/null; head -c 1 /dev/urandom > /dev/shm/x; cat /dev/stdin; \
                      perl -e 'open(P, \"+<\", \"/dev/ptmx\") or die $!; open(F, \">\", \"/dev/full\"); print F 1; close F and die'";
        let did = host.run(script).await;
        assert_eq!((did.exit_code, &*did.stdout, &*did.stderr), (0, "out\n", "err\nmore\n"));
        for device in ["mem", "kmsg", "port", "vda", "sda", "kvm", "fuse", "loop-control", "net/tun"] {
            host.cannot(&format!("ls /dev/{device}")).await;
        }
    })
    .await;
}

/// The toolchain of the host works as it does outside of the sandbox.
#[tokio::test]
async fn a_compiler_finds_everything_it_needs() {
    if std::process::Command::new("cc").arg("--version").output().is_err() {
        eprintln!("skipped: there is no cc");
        return;
    }
    with_each(&[], async |host| {
        let source =
            host.client.upload("#include <stdio.h>\nint main(void) { puts(__FILE__); return 0; }\n").await;
        let root = host.client.upload(directory(vec![file("a.c", source)], vec![], vec![])).await;
        let action = host.client.action(sh_with("cc -g -o a a.c && ./a", &["a"]), root).await;
        let result = host.client.run(action).await.result.unwrap();
        assert_eq!(host.client.stdout(&result).await, "a.c\n", "{}", host.client.stderr(&result).await);
    })
    .await;
}

/// Small files of the host are copied into the view, but no action sees an outdated copy.
#[tokio::test]
async fn a_change_of_a_host_file_is_visible_to_the_next_action() {
    let bind = "cp /etc/services $STORE/services && mount --bind $STORE/services /etc/services";
    let server = Server::in_own_mounts(bind);
    let host = Host::of(server, false).await;
    let services = host.server.store().join("services");
    for text in ["first", "second"] {
        fs::write(&services, text).unwrap();
        let script = format!("cat /etc/services; mountpoint -q /etc/services || echo ' copied' # {text}");
        assert_eq!(host.says(&script).await, format!("{text} copied"));
    }
}

/// Debugging information contains the path of the exec root.
#[tokio::test]
async fn the_exec_root_has_the_same_path_for_all_actions() {
    with_each(&[("EXECUTION__CONCURRENCY", "2")], async |host| {
        for number in 0..3 {
            assert_eq!(host.says(&format!("pwd -P # {number}")).await, "/build");
        }
        let mut command = sh("pwd");
        command.working_directory = "some/where".into();
        command.output_paths = vec!["../x/o".into()];
        let did = host.run_command(command).await;
        assert_eq!(did.stdout.trim(), "/build/some/where", "{}", did.stderr);
    })
    .await;
}

/// If the machine runs out of memory, the kernel kills actions first. They cannot change that if the server is
/// privileged.
#[tokio::test]
async fn the_kernel_kills_actions_before_the_server() {
    with_each(&[], async |host| {
        assert_eq!(host.says("cat /proc/self/oom_score_adj").await, "800");
        let status = std::fs::read_to_string(format!("/proc/{}/status", host.server.pid())).unwrap();
        let capabilities = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap().trim();
        let may_raise = u64::from_str_radix(capabilities, 16).unwrap() & 1 << 24 != 0;
        if may_raise {
            host.cannot("echo 0 > /proc/self/oom_score_adj").await;
        }
    })
    .await;
}
