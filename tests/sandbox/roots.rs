//! Root file systems other than the host's.

use crate::{Host, support::*, with_each};
use gorego_reapi::{
    digest::Digest,
    proto::reapi::{self, Action, Platform, platform::Property},
};
use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{PermissionsExt as _, symlink as link},
    path::{Path, PathBuf},
    process::Command,
};

const PROGRAMS: &[&str] =
    &["sh", "cat", "ls", "id", "touch", "mkdir", "rm", "rmdir", "chmod", "stat", "uname"];

/// Makes a small root file system that all users can read: some programs, the libraries that they need, and its own
/// /etc.
fn root_file_system() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    fs::set_permissions(root, fs::Permissions::from_mode(0o755)).unwrap();
    for program in PROGRAMS {
        let found = ["/bin", "/usr/bin"].map(|bin| Path::new(bin).join(program));
        let found = found.iter().find(|path| path.exists()).unwrap();
        take(root, found, &Path::new("/bin").join(program));
        let libraries = Command::new("ldd").arg(found).output().unwrap();
        let libraries = String::from_utf8(libraries.stdout).unwrap();
        for library in libraries.split_whitespace().filter(|word| word.starts_with('/')) {
            take(root, Path::new(library), Path::new(library));
        }
    }
    fs::create_dir(root.join("etc")).unwrap();
    fs::write(root.join("etc/motd"), "of the image").unwrap();
    fs::write(root.join("etc/passwd"), "lp:x:7:7:lp:/:/bin/sh\n").unwrap();
    directory
}

fn take(root: &Path, from: &Path, to: &Path) {
    let to = root.join(to.strip_prefix("/").unwrap());
    fs::create_dir_all(to.parent().unwrap()).unwrap();
    fs::copy(from, to).unwrap();
}

/// Everything below a directory, with the attributes that show a change.
pub(crate) fn everything_below(top: &Path) -> BTreeSet<(PathBuf, String)> {
    let mut found = BTreeSet::new();
    let mut left = vec![top.to_owned()];
    while let Some(path) = left.pop() {
        let metadata = fs::symlink_metadata(&path).unwrap();
        let facts =
            format!("{:?} {:?} {}", metadata.modified().unwrap(), metadata.permissions(), metadata.len());
        if metadata.is_dir() {
            left.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        found.insert((path, facts));
    }
    found
}

#[tokio::test]
async fn a_directory_can_replace_the_files_of_the_host_and_is_never_changed() {
    let image = root_file_system();
    let root = image.path();
    // An image may have anything at the paths where the sandbox mounts its own files.
    link("/usr", root.join("dev")).unwrap();
    link("/etc", root.join("tmp")).unwrap();
    link("/etc/shadow", root.join("etc/hosts")).unwrap();
    fs::write(root.join("build"), "a file").unwrap();
    let before = everything_below(root);
    with_each(&[("EXECUTION__SANDBOX__ROOTFS", root.to_str().unwrap())], async |host| {
        assert_eq!(host.says("cat /etc/motd; pwd; uname -n").await, "of the image/build\nbuild");
        assert_eq!(host.says("id -un; id -un 7; cat /etc/hostname").await, "build\nlp\nbuild");
        let names = host.says("ls /").await;
        for name in names.split_whitespace() {
            let known = ["bin", "build", "dev", "etc", "proc", "run", "sys", "tmp", "usr", "var"];
            assert!(known.contains(&name) || name.starts_with("lib"), "{names}");
        }
        host.cannot("ls /usr/share").await;
        host.cannot("ls /opt").await;
        host.says(
            "echo x > /tmp/x && echo x > o && echo x > /dev/null && ls /dev/shm /dev/pts /proc/self/fd",
        )
        .await;
        assert!(!host.says("echo /dev/* /tmp/*").await.contains("share"));
        for change in
            ["touch /bin/x", "rm /etc/motd", "chmod 777 /bin/sh", "mkdir /x", "touch /dev/x", "rmdir /sys"]
        {
            let did = host.run(change).await;
            assert!(did.exit_code != 0 && did.stderr.contains("Read-only"), "{change}: {}", did.stderr);
        }
        // /tmp is empty again in the next action.
        assert_eq!(host.says("ls /tmp").await, "");
    })
    .await;
    assert_eq!(everything_below(root), before);
}

#[tokio::test]
async fn a_root_file_system_that_is_replaced_is_found_by_the_next_action() {
    let image = root_file_system();
    let root = image.path().join("current");
    let version = |text: &str| {
        let made = root_file_system().keep();
        fs::write(made.join("etc/motd"), text).unwrap();
        fs::rename(made, &root).unwrap();
    };
    version("first");
    with_each(&[("EXECUTION__SANDBOX__ROOTFS", root.to_str().unwrap())], async |host| {
        let before = host.says("cat /etc/motd").await;
        fs::remove_dir_all(&root).unwrap();
        let next = format!("after {before}");
        version(&next);
        assert_eq!(host.says("cat /etc/motd # again").await, next);
    })
    .await;
}

#[tokio::test]
async fn a_root_file_system_that_cannot_be_used_keeps_the_server_from_starting() {
    let store = tempfile::tempdir().unwrap();
    let refusal = |rootfs: &str| {
        let mut serve = server::command(store.path());
        serve.env("GOREGO_EXECUTION__SANDBOX__ROOTFS", rootfs);
        let output = serve.output().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let missing = refusal("/no/such/directory");
    assert!(missing.contains("rootfs") && missing.contains("/no/such/directory does not exist"), "{missing}");
    let own = refusal(store.path().to_str().unwrap());
    assert!(own.contains("rootfs") && own.contains("the server's own"), "{own}");
}

/// Uploads a directory of this machine.
async fn upload(host: &Host, top: &Path) -> Digest {
    let (mut files, mut directories, mut links) = (vec![], vec![], vec![]);
    let mut entries: Vec<_> = fs::read_dir(top).unwrap().map(|entry| entry.unwrap()).collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let (name, path) = (entry.file_name().into_string().unwrap(), entry.path());
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            directories.push(subdirectory(&name, Box::pin(upload(host, &path)).await));
        } else if kind.is_symlink() {
            links.push(symlink(&name, fs::read_link(&path).unwrap().to_str().unwrap()));
        } else {
            let mut node = file(&name, host.client.upload(fs::read(&path).unwrap()).await);
            node.is_executable = fs::metadata(&path).unwrap().permissions().mode() & 0o100 != 0;
            files.push(node);
        }
    }
    host.client.upload(directory(files, directories, links)).await
}

fn with_inputs_as_root(action: &mut Action) {
    let property = |(name, value): (&str, &str)| Property { name: name.into(), value: value.into() };
    let properties = [("rootfs", "inputs"), ("unixGID", "100"), ("unixUID", "0")].map(property).into();
    action.platform = Some(Platform { properties });
}

/// The actions of BuildStream expect this.
#[tokio::test]
async fn the_input_root_can_be_the_root_file_system() {
    let image = root_file_system();
    with_each(&[], async |host| {
        let root = upload(host, image.path()).await;
        let name = format!("made-by-{}", host.server.pid());
        let script = format!(
            "pwd; ls /; echo x > /{name}; cat /{name}; mkdir -p /deep/er; echo y > /deep/er/f; rm /etc/motd; \
             echo z > /tmp/z; echo n > /dev/null; ls /proc/self/fd > /dev/null; id -u; id -g; touch f; stat -c %u:%g f; ! ls /build"
        );
        let mut command = sh_with(&script, &["..", &format!("../{name}"), "../tmp"]);
        command.working_directory = "work".into();
        let action = host.client.action_with(command, root, with_inputs_as_root).await;
        let response = host.client.run(action).await;
        let result = response.result.unwrap_or_else(|| panic!("{:?}", response.status));
        let said = host.client.stdout(&result).await;
        assert_eq!(result.exit_code, 0, "{said}{}", host.client.stderr(&result).await);
        let names: Vec<_> = said.split_whitespace().filter(|name| !name.starts_with("lib")).collect();
        assert_eq!(names, ["/work", "bin", "dev", "etc", "proc", "tmp", "work", "x", "0", "100", "0:100"]);
        assert!(!fs::exists(format!("/{name}")).unwrap(), "the file was created on the host");

        assert_eq!(host.client.output(&result, &format!("../{name}")).await, "x\n");
        // Neither /tmp nor the directories that the sandbox mounts are outputs.
        let tree = &result.output_directories[0];
        assert_eq!((result.output_directories.len(), &*tree.path), (1, ".."));
        let tree = host.client.read(host.client.digest(tree.tree_digest.as_ref())).await.unwrap();
        let tree: reapi::Tree = prost::Message::decode(&*tree).unwrap();
        let names: Vec<_> = tree.root.unwrap().directories.into_iter().map(|node| node.name).collect();
        let names: Vec<_> = names.iter().filter(|name| !name.starts_with("lib")).collect();
        assert_eq!(names, ["bin", "deep", "etc", "work"]);
    })
    .await;
}

/// The mount points in such an input root are made for each action, so no persistent worker can serve the action.
#[tokio::test]
async fn an_action_whose_input_root_is_the_root_file_system_does_not_try_a_persistent_worker() {
    let image = root_file_system();
    let settings = [
        ("EXECUTION__SANDBOX__ROOTFS", "inputs"),
        ("EXECUTION__PERSISTENT_WORKERS__ENABLED", "true"),
        ("EXECUTION__PERSISTENT_WORKERS__REQUEST_TIMEOUT", "1s"),
    ];
    with_each(&settings, async |host| {
        let root = upload(host, image.path()).await;
        let mut root: reapi::Directory =
            prost::Message::decode(&*host.client.read(root).await.unwrap()).unwrap();
        let mark = reapi::NodeProperty { name: "bazel_tool_input".into(), value: String::new() };
        let tool = reapi::FileNode {
            node_properties: Some(reapi::NodeProperties { properties: vec![mark], ..Default::default() }),
            ..file("tool.sh", host.client.upload("echo alone").await)
        };
        root.files.extend([file("args", host.client.upload("x").await), tool]);
        let root = host.client.upload(prost::Message::encode_to_vec(&root)).await;
        let arguments = ["/bin/sh", "/tool.sh", "@args"].map(str::to_owned).to_vec();
        let command = reapi::Command { arguments, ..sh("") };
        let property = Property { name: "persistentWorkerKey".into(), value: "k".into() };
        let action = host
            .client
            .action_with(command, root, |action| {
                action.platform = Some(Platform { properties: vec![property] });
            })
            .await;
        let response = host.client.run(action).await;
        let result = response.result.unwrap_or_else(|| panic!("{:?}", response.status));
        assert_eq!(host.client.stdout(&result).await, "alone\n");
        assert_eq!(response.message, "", "no persistent worker failed");
    })
    .await;
}

#[tokio::test]
async fn an_input_root_that_hides_its_mount_points_is_refused() {
    with_each(&[], async |host| {
        let root = host.client.upload(directory(vec![], vec![], vec![symlink("dev", "/etc")])).await;
        let action = host.client.action_with(sh("true"), root, with_inputs_as_root).await;
        let status = host.client.run(action).await.status.unwrap();
        assert_eq!(status.code, tonic::Code::InvalidArgument as i32, "{}", status.message);
        assert!(status.message.contains("\"dev\""), "{}", status.message);
        // The working directory would be hidden, too.
        let mut command = sh("true");
        command.working_directory = "tmp/work".into();
        let root = host.client.upload(directory(vec![], vec![], vec![])).await;
        let action = host.client.action_with(command, root, with_inputs_as_root).await;
        let status = host.client.run(action).await.status.unwrap();
        assert_eq!(status.code, tonic::Code::InvalidArgument as i32, "{}", status.message);
        assert!(status.message.contains("\"tmp/work\" is below /tmp"), "{}", status.message);
        // The same through a link.
        let mut command = sh("true");
        command.working_directory = "build/work".into();
        let root = host.client.upload(directory(vec![], vec![], vec![symlink("build", "tmp")])).await;
        let action = host.client.action_with(command, root, with_inputs_as_root).await;
        let status = host.client.run(action).await.status.unwrap();
        assert_eq!(status.code, tonic::Code::InvalidArgument as i32, "{}", status.message);
        assert!(status.message.contains("\"build/work\" is below /tmp"), "{}", status.message);
    })
    .await;
}
