//! The files that an action sees and can change.

use crate::{GROUP, USER, support::*, with_each};
use gorego_reapi::proto::reapi;
use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, chown},
};

/// The store, other users' files and the passwords of the machine are not visible.
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
        for path in ["/x", "/usr/x", "/etc/x", "/opt/x", "/dev/x", "/run/x", "/proc/sys/kernel/core_pattern"]
        {
            let did = host.run(&format!(": >> {path}")).await;
            // The reason must not be only the user of the action.
            let is_reason = did.stderr.contains("Read-only file system") || path.starts_with("/proc");
            assert!(did.exit_code != 0 && is_reason, "{path}: {}", did.stderr);
        }
        host.cannot(": >> /etc/passwd").await;
        host.cannot("touch /usr/bin/env").await;
        host.cannot("chmod a+x /usr").await;
        host.cannot("ln /etc/hosts /etc/guests").await;
        host.cannot("ln /usr/bin/env env").await;
    })
    .await;
}

#[tokio::test]
async fn files_in_tmp_vanish_with_their_action() {
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
        for directory in ["/tmp", "/dev/shm"] {
            let files: u64 = host.says(&format!("stat -f -c %c {directory}")).await.parse().unwrap();
            assert!((1..=200_001).contains(&files), "{directory} has room for {files} files");
        }
    })
    .await;
}

/// An input may be a link that leads out of the input root, and a path may contain "..".
#[tokio::test]
async fn links_and_dots_do_not_lead_out_of_the_sandbox() {
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

/// For every user of an action, its outputs belong to the server, and its inputs have the declared attributes.
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
        eventually("the exec directory is removed", || {
            fs::read_dir(host.server.store().join("build")).unwrap().next().is_none()
        })
        .await;
        // No stored file may have a set-user-id bit, because its owner is the server.
        for path in files_below(host.server.store()) {
            let mode = fs::metadata(&path).map_or(0, |metadata| metadata.permissions().mode());
            assert_eq!(mode & 0o6000, 0, "{} has mode {mode:o}", path.display());
        }
    })
    .await;
}

#[tokio::test]
async fn configured_paths_are_visible_hidden_or_writable() {
    let shared = tempfile::tempdir().unwrap();
    // This must not be below /tmp, which is private to each action.
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
        // The mode of the file would allow this.
        let did = host.run(&format!("echo x > {at}/shown/f")).await;
        assert!(did.stderr.contains("Read-only file system"), "{}", did.stderr);
        host.says(&format!("echo -n cache > {at}/cache/f")).await;
    })
    .await;
    fs::remove_dir_all(&base).unwrap();
}

/// A directory on the host that can be made visible. It is not below /tmp, which is private to each action.
fn shown_directory(name: &str) -> Option<tempfile::TempDir> {
    let made = tempfile::Builder::new().prefix(&format!("gorego-{name}-")).tempdir_in("/srv");
    let Ok(directory) = made else {
        eprintln!("skipped: this user cannot make a directory in /srv");
        return None;
    };
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    Some(directory)
}

fn list(paths: &[std::path::PathBuf]) -> String {
    let quoted: Vec<_> = paths.iter().map(|path| format!("\"{}\"", path.display())).collect();
    format!("[{}]", quoted.join(", "))
}

#[tokio::test]
async fn hidden_files_are_also_hidden_behind_links() {
    let Some(directory) = shown_directory("links") else { return };
    let top = directory.path();
    fs::create_dir_all(top.join("real/keys")).unwrap();
    fs::write(top.join("real/keys/k"), "secret").unwrap();
    fs::write(top.join("real/key"), "secret").unwrap();
    std::os::unix::fs::symlink(top.join("real"), top.join("link")).unwrap();
    std::os::unix::fs::symlink("real/key", top.join("key")).unwrap();
    let (visible, hidden) = (list(&[top.to_owned()]), list(&[top.join("link/keys"), top.join("key")]));
    let overrides = [("EXECUTION__SANDBOX__VISIBLE", &*visible), ("EXECUTION__SANDBOX__HIDDEN", &*hidden)];
    with_each(&overrides, async |host| {
        let at = top.display();
        host.says(&format!("ls {at}/link/ {at}/real")).await;
        for path in ["link/keys/k", "real/keys/k", "key", "real/key"] {
            host.cannot(&format!("grep secret {at}/{path}")).await;
        }
    })
    .await;
}

/// The user of the server may read its tokens, and an action of an ordinary user's server has the same user.
#[tokio::test]
async fn the_credentials_of_the_server_are_hidden_in_visible_directories() {
    let Some(directory) = shown_directory("credentials") else { return };
    let top = directory.path();
    let tokens = top.join("tokens");
    fs::write(top.join("other"), "shown").unwrap();
    let visible = list(&[top.to_owned()]);
    let overrides = [
        ("EXECUTION__SANDBOX__VISIBLE", &*visible),
        ("ACCESS__TOKENS", tokens.to_str().unwrap()),
        ("ACCESS__ANONYMOUS", r#"["admin"]"#),
    ];
    let create = ["token", "create", "--role", "ci", "--expires", "1d", "--file", tokens.to_str().unwrap()];
    let created = std::process::Command::new(env!("CARGO_BIN_EXE_gorego")).args(create).output().unwrap();
    assert!(created.status.success(), "{}", String::from_utf8_lossy(&created.stderr));
    if rustix::process::geteuid().is_root() {
        chown(&tokens, Some(USER), Some(GROUP)).unwrap();
    }
    with_each(&overrides, async |host| {
        assert_eq!(host.says(&format!("cat {}/other", top.display())).await, "shown");
        host.cannot(&format!("grep . {}", tokens.display())).await;
    })
    .await;
}

/// The action sees a program of root that has the set-user-id bit.
#[tokio::test]
async fn a_set_user_id_program_of_the_host_grants_no_rights() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can make a program of root");
        return;
    }
    let Some(directory) = shown_directory("set-user-id") else { return };
    let program = directory.path().join("id");
    fs::copy("/usr/bin/id", &program).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o6755)).unwrap();
    let visible = list(&[directory.path().to_owned()]);
    with_each(&[("EXECUTION__SANDBOX__VISIBLE", &*visible)], async |host| {
        let at = program.display();
        assert_eq!(host.says(&format!("{at} -u; {at} -ru; {at} -g")).await, "1000\n1000\n1000");
    })
    .await;
}

/// Editors and key rotation replace files like this. The kernel removes a cover together with the file below it.
#[tokio::test]
async fn hidden_files_stay_hidden_when_the_host_replaces_them() {
    let Some(directory) = shown_directory("renames") else { return };
    let top = directory.path();
    let (visible, hidden) =
        (list(&[top.to_owned()]), list(&[top.join("key"), top.join("keys"), top.join("later")]));
    let overrides = [("EXECUTION__SANDBOX__VISIBLE", &*visible), ("EXECUTION__SANDBOX__HIDDEN", &*hidden)];
    with_each(&overrides, async |host| {
        let at = top.display();
        let look = format!("grep -r secret {at}/key {at}/keys {at}/later");
        fs::write(top.join("key"), "secret").unwrap();
        fs::create_dir_all(top.join("keys")).unwrap();
        fs::write(top.join("keys/k"), "secret").unwrap();
        // In the second round, a cell is already prepared.
        for round in 0..2 {
            host.cannot(&format!("{look} # {round}")).await;
            fs::write(top.join("new"), "secret").unwrap();
            fs::rename(top.join("new"), top.join("key")).unwrap();
            fs::rename(top.join("keys"), top.join(format!("keys.{round}"))).unwrap();
            fs::create_dir(top.join("keys")).unwrap();
            fs::write(top.join("keys/k"), "secret").unwrap();
            fs::write(top.join("later"), "secret").unwrap();
            host.cannot(&format!("{look} # {round}, replaced")).await;
            fs::remove_file(top.join("later")).unwrap();
            fs::remove_dir_all(top.join(format!("keys.{round}"))).unwrap();
        }
        host.says(&format!("ls {at}")).await;
    })
    .await;
}

/// A runner mounts its views below /sys, but not over a directory that actions may see.
#[tokio::test]
async fn parts_of_sys_can_be_visible() {
    let visible = [("EXECUTION__SANDBOX__VISIBLE", "[\"/sys/kernel/mm\", \"/sys/fs\"]")];
    with_each(&visible, async |host| {
        assert_eq!(host.says("ls /sys/kernel").await, "mm");
        let there: Vec<_> = fs::read_dir("/sys/kernel/mm").unwrap().map(|e| e.unwrap().file_name()).collect();
        let said = host.says("ls /sys/kernel/mm").await;
        assert_eq!(said.lines().count(), there.len(), "{said}");
    })
    .await;
}

/// The modes of parent directories restrict the action even if the server is root.
#[tokio::test]
async fn a_working_directory_that_cannot_be_entered_is_the_fault_of_the_action() {
    with_each(&[], async |host| {
        let inner = host.client.upload(directory(vec![], vec![], vec![])).await;
        let closed = reapi::Directory {
            directories: vec![subdirectory("e", inner)],
            node_properties: Some(reapi::NodeProperties { unix_mode: Some(0), ..Default::default() }),
            ..Default::default()
        };
        let closed = host.client.upload(prost::Message::encode_to_vec(&closed)).await;
        let root = host.client.upload(directory(vec![], vec![subdirectory("d", closed)], vec![])).await;
        for path in ["d", "d/e"] {
            let mut command = sh("true");
            command.working_directory = path.into();
            let action = host.client.action(command, root).await;
            let status = host.client.run(action).await.status.unwrap();
            assert_eq!(status.code, tonic::Code::InvalidArgument as i32, "{path}: {}", status.message);
        }
    })
    .await;
}

/// Neither a program that the action has just written, nor one that is an input, is ever busy (ETXTBSY). A hundred
/// actions are started at once; half of the input roots are copies and half are staged trees.
#[tokio::test]
async fn a_program_that_was_just_written_can_always_be_run() {
    with_each(&[("EXECUTION__CONCURRENCY", "8")], async |host| {
        let program = host.client.upload(fs::read("/bin/true").unwrap()).await;
        let tool = reapi::FileNode { is_executable: true, ..file("tool", program) };
        let others = host.client.upload_all((0..40).map(|number| format!("{number}"))).await;
        let others = others.iter().enumerate().map(|(at, digest)| file(&format!("other{at}"), *digest));
        let small = host.client.upload(directory(vec![tool.clone()], vec![], vec![])).await;
        let files = others.chain([tool]).collect();
        let large = host.client.upload(directory(files, vec![], vec![])).await;
        let mut running = Vec::new();
        for number in 0..100 {
            let script = format!(
                "set -e; ./tool; cp tool own; ./own; cp /bin/true again; ./again; \
                 printf '#!/bin/sh\\necho ran\\n' > script; chmod +x script; ./script # {number}"
            );
            let action = host.client.action(sh(&script), if number % 2 == 0 { small } else { large }).await;
            running.push(host.client.start(action).await);
        }
        for action in running {
            let result = action.finish().await.result.unwrap();
            let did = host.did(&result).await;
            assert_eq!((did.exit_code, &*did.stdout, &*did.stderr), (0, "ran\n", ""));
        }
        // A program that is open for writing is busy.
        let action = host.client.action(sh("exec 3>> tool; ./tool"), small).await;
        let result = host.client.run(action).await.result.unwrap();
        assert!(host.client.stderr(&result).await.contains("Text file busy"), "{result:?}");
    })
    .await;
}
