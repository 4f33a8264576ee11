//! What an action sees and can change of the file system.

use crate::{support::*, with_each};
use std::{fs, os::unix::fs::PermissionsExt as _};

/// The store, the configuration, other users' files and the passwords of the machine.
#[tokio::test]
async fn only_the_listed_files_of_the_host_exist() {
    with_each(&[], async |host| {
        let secret = tempfile::tempdir().unwrap();
        fs::set_permissions(secret.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let file = secret.path().join("secret");
        fs::write(&file, "secret").unwrap();
        host.cannot(&format!("cat {}", file.display())).await;
        host.cannot(&format!("ls {}", host.server.store().display())).await;
        for path in [
            "/etc/shadow",
            "/etc/ssh",
            "/etc/ssl/private",
            "/root",
            "/home",
            "/var/lib",
            "/run/dbus",
            "/boot",
        ] {
            host.cannot(&format!("ls {path}")).await;
        }
        assert_eq!(host.says("ls -A /tmp /home /root 2>/dev/null || true").await, "/tmp:");
        let root = host.says("ls /").await;
        for name in root.lines() {
            let listed =
                ["bin", "build", "dev", "etc", "opt", "proc", "run", "sbin", "sys", "tmp", "usr", "var"];
            assert!(listed.contains(&name) || name.starts_with("lib"), "/{name} is visible");
        }
    })
    .await;
}

#[tokio::test]
async fn nothing_outside_of_the_exec_root_can_be_changed() {
    with_each(&[], async |host| {
        for path in [
            "/x",
            "/usr/x",
            "/etc/x",
            "/etc/passwd",
            "/opt/x",
            "/dev/x",
            "/proc/sys/kernel/core_pattern",
            "/run/x",
        ] {
            host.cannot(&format!(": >> {path}")).await;
        }
        host.cannot("touch /usr/bin/env").await;
        host.cannot("chmod a+x /usr").await;
        host.cannot("ln /etc/hosts /etc/guests").await;
        host.cannot("ln /usr/bin/env env").await;
    })
    .await;
}

#[tokio::test]
async fn what_is_written_to_tmp_vanishes_with_the_action() {
    with_each(&[("EXECUTION__CONCURRENCY", "1")], async |host| {
        let name = format!("left-by-{}", host.server.pid());
        for directory in ["/tmp", "/var/tmp", "/dev/shm"] {
            host.says(&format!("echo x > {directory}/{name}; cat {directory}/{name}")).await;
            host.cannot(&format!("cat {directory}/{name} # in the next one")).await;
        }
        for directory in ["/tmp", "/var/tmp", "/dev/shm"] {
            assert!(!fs::exists(format!("{directory}/{name}")).unwrap(), "{directory} of the host");
        }
    })
    .await;
}

#[tokio::test]
async fn tmp_is_bounded_in_size_and_in_number_of_files() {
    with_each(&[("EXECUTION__SANDBOX__TMP_SIZE_GB", "1 MB")], async |host| {
        let did = host.run("head -c 2000000 /dev/zero > /tmp/bomb").await;
        assert!(did.exit_code != 0 && did.stderr.contains("No space left"), "{}", did.stderr);
    })
    .await;
}

/// An input is a link that leads out of the input root; so does a path.
#[tokio::test]
async fn links_and_dots_lead_nowhere() {
    with_each(&[], async |host| {
        let outside = tempfile::tempdir().unwrap();
        fs::set_permissions(outside.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(outside.path().join("f"), "secret").unwrap();
        let target = outside.path().join("f");
        let links = vec![symlink("absolute", target.to_str().unwrap()), symlink("shadow", "/etc/shadow")];
        let root = host.client.upload(directory(vec![], vec![], links)).await;
        let relative = format!("../../../../../..{}", target.display());
        let script = format!(
            "! cat absolute && ! cat shadow && ! cat {relative} && ! cat /proc/self/root{0} && ! cat /proc/1/root{0} \
             && ! ls /proc/1/fd/ && ! cat /proc/self/cwd/../..{0} && ! cat /dev/fd/0/..{0} && ls -d .. / >/dev/null",
            target.display()
        );
        let action = host.client.action(sh(&script), root).await;
        let result = host.client.run(action).await.result.unwrap();
        let did = host.did(&result).await;
        assert_eq!(did.exit_code, 0, "{}{}", did.stdout, did.stderr);
        assert!(!did.stdout.contains("secret"), "{}", did.stdout);
    })
    .await;
}

/// Outputs are the server's, and inputs are as they were declared, whoever the action is.
#[tokio::test]
async fn inputs_can_be_read_and_changed_and_outputs_are_collected() {
    with_each(&[], async |host| {
        let text = host.client.upload("in").await;
        let inner = host.client.upload(directory(vec![file("f", text)], vec![], vec![])).await;
        let root = host
            .client
            .upload(directory(vec![file("a", text)], vec![subdirectory("d", inner)], vec![]))
            .await;
        let script =
            "cat a d/f; echo more >> a; rm d/f; mkdir o; echo out > o/x; chmod 4755 o/x; ln -s x o/l; mv d e";
        let mut command = sh_with(script, &["o", "a", "e"]);
        command.working_directory = String::new();
        let action = host.client.action(command, root).await;
        let result = host.client.run(action).await.result.unwrap();
        assert_eq!(host.client.stdout(&result).await, "inin", "{}", host.client.stderr(&result).await);
        assert_eq!(host.client.output(&result, "a").await, "inmore\n");
        assert_eq!(result.output_directories.len(), 2);
        // Nothing that an action made may run as its owner, who is the server, in the store.
        for path in files_below(host.server.store()) {
            let mode = fs::metadata(&path).map_or(0, |metadata| metadata.permissions().mode());
            assert_eq!(mode & 0o6000, 0, "{} has mode {mode:o}", path.display());
        }
        eventually("the exec directory is removed", || {
            fs::read_dir(host.server.store().join("build")).unwrap().next().is_none()
        })
        .await;
    })
    .await;
}

#[tokio::test]
async fn what_is_configured_is_visible_hidden_or_writable() {
    let shared = tempfile::tempdir().unwrap();
    // Not below /tmp, which is the action's own.
    let base = std::path::PathBuf::from(format!("/srv/gorego-sandbox-test-{}", std::process::id()));
    if fs::create_dir_all(&base).is_err() {
        eprintln!("skipped: this user cannot make {}", base.display());
        return;
    }
    drop(shared);
    for name in ["shown", "shown/hidden", "cache", "cache/hidden"] {
        fs::create_dir_all(base.join(name)).unwrap();
        fs::set_permissions(base.join(name), fs::Permissions::from_mode(0o777)).unwrap();
        fs::write(base.join(name).join("f"), name).unwrap();
        fs::set_permissions(base.join(name).join("f"), fs::Permissions::from_mode(0o666)).unwrap();
    }
    let list = |names: &[&str]| {
        let paths: Vec<_> = names.iter().map(|name| format!("\"{}/{name}\"", base.display())).collect();
        format!("[{}]", paths.join(", "))
    };
    let (visible, hidden, writable) =
        (list(&["shown"]), list(&["shown/hidden", "cache/hidden"]), list(&["cache"]));
    let overrides = [
        ("EXECUTION__SANDBOX__VISIBLE", &*visible),
        ("EXECUTION__SANDBOX__HIDDEN", &*hidden),
        ("EXECUTION__SANDBOX__WRITABLE", &*writable),
    ];
    with_each(&overrides, async |host| {
        let at = base.display();
        assert_eq!(host.says(&format!("cat {at}/shown/f {at}/cache/f")).await, "showncache");
        host.cannot(&format!("cat {at}/shown/hidden/f")).await;
        host.cannot(&format!("cat {at}/cache/hidden/f")).await;
        host.cannot(&format!("echo x > {at}/shown/f")).await;
        host.says(&format!("echo -n cache > {at}/cache/f")).await;
    })
    .await;
    fs::remove_dir_all(&base).unwrap();
}
