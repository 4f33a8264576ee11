//! [`Server`]: the real binary on a free port.

use super::{PATIENCE, client::Client, exit_of};
use serde_json::Value;
use std::{
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    os::unix::{fs::PermissionsExt as _, process::ExitStatusExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex},
};
use tempfile::TempDir;

/// A server process.
pub(crate) struct Server {
    child: Child,
    address: String,
    store: Arc<TempDir>,
    log: Arc<Mutex<Vec<Value>>>,
}

impl Server {
    /// Starts a server with defaults on an empty store.
    pub(crate) async fn start() -> Self {
        Self::with(&[]).await
    }

    /// Starts a server on an empty store, with environment overrides such as `("EXECUTION__CONCURRENCY", "1")`.
    pub(crate) async fn with(overrides: &[(&str, &str)]) -> Self {
        Self::on(Arc::new(tempfile::tempdir().unwrap()), overrides).await
    }

    /// Starts a server on this store.
    pub(crate) async fn on(store: Arc<TempDir>, overrides: &[(&str, &str)]) -> Self {
        let mut command = command(store.path());
        command.envs(overrides.iter().map(|(key, value)| (format!("GOREGO_{key}"), value)));
        Self::spawn(command, store)
    }

    /// Starts a server whose store is on a separate disk of this many bytes; see [`Server::on_a_disk`].
    pub(crate) async fn on_a_disk_of(bytes: usize) -> Self {
        Self::on_a_disk(&format!("size={bytes}")).await
    }

    /// Starts a server whose store is on a tmpfs with these mount options, in its own mount namespace; see
    /// [`Server::inside`].
    pub(crate) async fn on_a_disk(options: &str) -> Self {
        Self::on_a_disk_with(options, &[]).await
    }

    /// Like [`Server::on_a_disk`], with environment overrides.
    pub(crate) async fn on_a_disk_with(options: &str, overrides: &[(&str, &str)]) -> Self {
        let store = Arc::new(tempfile::tempdir().unwrap());
        let mount = format!("mount -t tmpfs -o {options} none {}", store.path().display());
        Self::with_own_mounts(&mount, overrides, store)
    }

    /// Starts a server in its own mount namespace, from a shell that has run this script. There, `$STORE` is the store.
    pub(crate) fn in_own_mounts(script: &str) -> Self {
        let store = Arc::new(tempfile::tempdir().unwrap());
        Self::with_own_mounts(&format!("STORE={}; {script}", store.path().display()), &[], store)
    }

    /// Starts a server like [`Server::in_own_mounts`] that ends by itself. Returns its exit code, its output and the
    /// path of the store.
    pub(crate) fn that_ends_in_own_mounts(script: &str) -> (Option<i32>, String, String) {
        let store = tempfile::tempdir().unwrap();
        let path = store.path().display().to_string();
        let mut bounded = Command::new("timeout");
        bounded.arg("60").arg("unshare").args(mount_namespace()).arg("sh");
        let ended = in_shell(bounded, &format!("STORE={path}; {script}"), store.path()).output().unwrap();
        (ended.status.code(), String::from_utf8_lossy(&ended.stderr).into_owned(), path)
    }

    fn with_own_mounts(script: &str, overrides: &[(&str, &str)], store: Arc<TempDir>) -> Self {
        let mut command = in_own_shell(script, store.path());
        command.envs(overrides.iter().map(|(name, value)| (format!("GOREGO_{name}"), value)));
        Self::spawn(command, store)
    }

    /// Starts a server from a shell that has run this script.
    pub(crate) async fn after(script: &str) -> Self {
        let store = Arc::new(tempfile::tempdir().unwrap());
        Self::spawn(in_shell(Command::new("sh"), script, store.path()), store)
    }

    /// The path of a file in the store as the server sees it, including its mounts.
    pub(crate) fn inside(&self, name: &str) -> PathBuf {
        let store = self.store.path().join(name);
        PathBuf::from(format!("/proc/{}/root{}", self.pid(), store.display()))
    }

    /// Starts a server with this command, which comes from [`command`].
    pub(crate) fn spawn(mut command: Command, store: Arc<TempDir>) -> Self {
        let mut child = command.spawn().unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let (started, listening) = std::sync::mpsc::channel();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let lines = log.clone();
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                // A line that is not JSON, such as a panic message, is kept as text for tests that fail.
                let event = serde_json::from_str(&line).unwrap_or(Value::String(line));
                let address = (event["event"] == "server_started")
                    .then(|| event["listen_addr"].as_str().unwrap_or_default().to_owned());
                // The event is stored first, so that a test that learns of the start finds it in the log.
                lines.lock().unwrap().push(event);
                if let Some(address) = address {
                    let _ = started.send(address);
                }
            }
        });
        let Ok(address) = listening.recv_timeout(PATIENCE) else {
            let _ = child.kill();
            panic!("the server did not start: {:#?}", log.lock().unwrap());
        };
        Self { child, address, store, log }
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// Opens a new connection.
    pub(crate) async fn client(&self) -> Client {
        Client::connect(self.endpoint()).await
    }

    /// The directory of blobs and results.
    pub(crate) fn store(&self) -> &Path {
        self.store.path()
    }

    /// The store, for another server after this one has ended.
    pub(crate) fn shared_store(&self) -> Arc<TempDir> {
        self.store.clone()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The records that have been read so far. A record of what a client has just seen may come later: see
    /// [`Server::logged`].
    pub(crate) fn log(&self) -> Vec<Value> {
        self.log.lock().unwrap().clone()
    }

    /// The first record of an event, which the server may be about to write.
    pub(crate) async fn logged(&self, event: &str) -> Value {
        let find = || self.log().into_iter().find(|record| record["event"] == event);
        super::eventually(&format!("{event} is logged"), || find().is_some()).await;
        find().unwrap()
    }

    /// The address on which the HTTP cache listens. The server reports it before it has started.
    pub(crate) fn http_address(&self) -> SocketAddr {
        let started = self.log().into_iter().find(|record| record["event"] == "http_started").unwrap();
        started["listen_addr"].as_str().unwrap().parse().unwrap()
    }

    /// The event of the start.
    pub(crate) fn started(&self) -> Value {
        self.log().into_iter().find(|event| event["event"] == "server_started").unwrap()
    }

    /// Sends a signal by name.
    pub(crate) fn signal(&self, name: &str) {
        let status = Command::new("kill").arg(format!("-{name}")).arg(self.pid().to_string()).status();
        assert!(status.unwrap().success());
    }

    /// Waits for the end of the process.
    pub(crate) async fn exit(&mut self) -> ExitStatus {
        exit_of(&mut self.child, "the server ends").await
    }

    /// Kills the server with SIGKILL and returns its store.
    pub(crate) async fn kill(mut self) -> Arc<TempDir> {
        self.signal("KILL");
        assert_eq!(self.exit().await.signal(), Some(9));
        self.store.clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            for line in self.log().iter().rev().take(20).rev() {
                eprintln!("server log: {line}");
            }
        }
    }
}

/// The directory in which tests and actions find the same files, in spite of the sandbox.
fn shared() -> PathBuf {
    let path = std::env::temp_dir().join("gorego-tests-shared");
    std::fs::create_dir_all(&path).unwrap();
    // This fails if another user made the directory.
    let _ = std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o1777));
    path
}

/// A directory that actions see at the same path and can change.
pub(crate) fn shared_dir() -> TempDir {
    let directory = tempfile::tempdir_in(shared()).unwrap();
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    directory
}

/// `gorego serve` on this store and a free port, in a clean environment.
pub(crate) fn command(store: &Path) -> Command {
    let writable = format!("[\"{}\"]", shared().display());
    let mut command = Command::new(env!("CARGO_BIN_EXE_gorego"));
    command
        .args(["serve", "--listen-addr", "127.0.0.1:0", "--local-cache-dir"])
        .arg(store)
        .env_clear()
        .env("PATH", "/usr/local/bin:/usr/bin:/bin")
        .env("GOREGO_EXECUTION__SANDBOX__WRITABLE", writable)
        .stdin(Stdio::null())
        .stderr(Stdio::piped());
    command
}

/// The unshare(1) command that makes a mount namespace: without privileges if user namespaces are enabled, otherwise as
/// root.
fn mount_namespace() -> &'static [&'static str] {
    let ways: [&[&str]; 2] = [&["--user", "--map-root-user", "--mount"], &["--mount"]];
    let works = |way: &&&[&str]| {
        let tried = Command::new("unshare").args(**way).arg("true").stderr(Stdio::null()).status();
        tried.is_ok_and(|status| status.success())
    };
    ways.iter().find(works).expect(
        "this test mounts a small disk in a mount namespace of its own; that takes unshare(1) and either user namespaces \
         (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns) \
         or root",
    )
}

/// Like [`in_shell`], in a mount namespace of its own.
fn in_own_shell(script: &str, store: &Path) -> Command {
    let mut unshare = Command::new("unshare");
    unshare.args(mount_namespace()).arg("sh");
    in_shell(unshare, script, store)
}

/// Like [`command`], from a shell in which a script has succeeded.
fn in_shell(mut shell: Command, script: &str, store: &Path) -> Command {
    let serve = command(store);
    shell
        .arg("-c")
        .arg(format!("{script} && exec \"$0\" \"$@\""))
        .arg(serve.get_program())
        .args(serve.get_args())
        .env_clear()
        .envs(serve.get_envs().filter_map(|(name, value)| Some((name, value?))))
        .stdin(Stdio::null())
        .stderr(Stdio::piped());
    shell
}

/// Every regular file below a directory.
pub(crate) fn files_below(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut open = vec![directory.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in std::fs::read_dir(&directory).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => open.push(entry.path()),
                Ok(kind) if kind.is_file() => files.push(entry.path()),
                _ => {}
            }
        }
    }
    files
}
