//! The promises of the sandbox (`docs/sandbox.md`), each tested with a real server and hostile commands.
//!
//! If root runs the tests, each test runs twice: with a server that is root, and with one that is an ordinary user. To
//! see that a test notices a missing sandbox, run it with `SANDBOX_MODE=off`. No server is then started as root,
//! because nothing would stop its hostile commands. The commands are written so that they do no lasting harm even then.

#![allow(clippy::unwrap_used)]

mod endings;
mod escapes;
mod exhausted;
mod files;
mod images;
mod kernel;
mod limits;
mod network;
mod processes;
mod roots;
mod staging;
mod start;
#[path = "../support/mod.rs"]
mod support;
mod tools;
mod world;

use gorego_reapi::proto::reapi::{self, ActionResult};
use std::{
    fs,
    os::unix::{fs::chown, process::CommandExt as _},
    process::{Command, Stdio},
    sync::Arc,
};
use support::{
    client::{Client, sh},
    server::{Server, command},
};

/// The ordinary user and its group, whose number differs from the user's.
const USER: u32 = 65534;
const GROUP: u32 = 12345;

/// A server and a client connected to it.
struct Host {
    server: Server,
    client: Client,
    /// Whether the server is root.
    is_root: bool,
}

/// The result of a command.
struct Did {
    exit_code: i32,
    stdout: String,
    stderr: String,
}

/// Runs a test with each kind of server that this user can start.
async fn with_each(overrides: &[(&str, &str)], test: impl AsyncFn(&mut Host)) {
    let mode = std::env::var("SANDBOX_MODE").unwrap_or_else(|_| "required".into());
    // Writable directories are shared with the actions of other tests, so there are none by default.
    let mut all = vec![("EXECUTION__SANDBOX__MODE", &*mode), ("EXECUTION__SANDBOX__WRITABLE", "[]")];
    all.extend_from_slice(overrides);
    let is_root = rustix::process::geteuid().is_root();
    if !is_root || mode != "off" {
        test(&mut Host::of(Server::with(&all).await, is_root).await).await;
    }
    if is_root {
        test(&mut Host::of(ordinary(&all), false).await).await;
    }
}

/// Starts a server as an ordinary user, with an empty store that belongs to this user.
fn ordinary(overrides: &[(&str, &str)]) -> Server {
    let store = tempfile::tempdir().unwrap();
    chown(store.path(), Some(USER), Some(GROUP)).unwrap();
    // The user may have no access to the directory of the binary.
    let binary = store.path().join("gorego");
    let built = env!("CARGO_BIN_EXE_gorego");
    if fs::hard_link(built, &binary).is_err() {
        fs::copy(built, &binary).unwrap();
    }
    let plain = command(store.path());
    let mut serve = Command::new(&binary);
    serve
        .args(plain.get_args())
        .env_clear()
        .envs(plain.get_envs().filter_map(|(name, value)| Some((name, value?))))
        .envs(overrides.iter().map(|(key, value)| (format!("GOREGO_{key}"), value)))
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .uid(USER)
        .gid(GROUP);
    Server::spawn(serve, Arc::new(store))
}

impl Host {
    async fn of(server: Server, is_root: bool) -> Self {
        let client = server.client().await;
        Self { server, client, is_root }
    }

    /// Runs a shell script without inputs.
    async fn run(&self, script: &str) -> Did {
        self.run_command(sh(script)).await
    }

    async fn run_command(&self, command: reapi::Command) -> Did {
        let result = self.client.run_command(command).await;
        self.did(&result).await
    }

    async fn did(&self, result: &ActionResult) -> Did {
        Did {
            exit_code: result.exit_code,
            stdout: self.client.stdout(result).await,
            stderr: self.client.stderr(result).await,
        }
    }

    /// The output of a script, which must succeed.
    async fn says(&self, script: &str) -> String {
        let did = self.run(script).await;
        assert_eq!(did.exit_code, 0, "{script}: {}{}", did.stdout, did.stderr);
        did.stdout.trim_end().to_owned()
    }

    /// Runs a script, which must fail.
    async fn cannot(&self, script: &str) {
        let did = self.run(script).await;
        assert_ne!(did.exit_code, 0, "this must fail: {script}: {}{}", did.stdout, did.stderr);
    }
}

/// The processes of this machine whose command line contains the text.
fn processes_with(text: &str) -> Vec<String> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let line = |entry: fs::DirEntry| {
        let line = fs::read(entry.path().join("cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        line.contains(text).then(|| format!("{}: {line}", entry.file_name().to_string_lossy()))
    };
    entries.filter_map(line).collect()
}
