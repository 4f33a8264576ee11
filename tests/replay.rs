//! `gorego replay` with a real server: its comparisons, the files that it leaves, and its messages if it cannot replay.
//!
//! If root runs them, most tests run twice: as root, and as an ordinary user.

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use gorego_reapi::{
    digest::{Digest, DigestFunction},
    proto::reapi::{self, ActionResult},
};
use rustix::{
    process::{Pid, Signal, kill_process},
    pty::{OpenptFlags, openpt, ptsname, unlockpt},
};
use std::{
    ffi::OsStr,
    fs,
    io::{Read as _, Write as _},
    os::unix::{ffi::OsStrExt as _, fs::chown, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::{Arc, Mutex},
};
use support::*;
use tempfile::TempDir;

/// The ordinary user.
const USER: u32 = 65534;

/// A user who replays actions, with a directory for temporary files.
struct User {
    home: TempDir,
    id: Option<u32>,
}

impl User {
    /// All users as which this process can run commands.
    fn each() -> Vec<Self> {
        let mut ids = vec![None];
        if rustix::process::geteuid().is_root() {
            ids.push(Some(USER));
        }
        ids.into_iter().map(Self::new).collect()
    }

    fn new(id: Option<u32>) -> Self {
        let home = tempfile::tempdir().unwrap();
        fs::create_dir(home.path().join("tmp")).unwrap();
        // The user may not be able to reach the directory of the binary.
        let built = env!("CARGO_BIN_EXE_gorego");
        if fs::hard_link(built, home.path().join("gorego")).is_err() {
            fs::copy(built, home.path().join("gorego")).unwrap();
        }
        if let Some(id) = id {
            for path in [home.path().to_owned(), home.path().join("tmp")] {
                chown(path, Some(id), Some(id)).unwrap();
            }
        }
        Self { home, id }
    }

    fn tmp(&self) -> PathBuf {
        self.home.path().join("tmp")
    }

    fn command(&self, server: &Server, args: &[&str]) -> Command {
        let mut command = Command::new(self.home.path().join("gorego"));
        command
            .args(["replay", "--server", &format!("grpc://{}", server.address())])
            .args(args)
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("TMPDIR", self.tmp())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if let Some(id) = self.id {
            command.uid(id).gid(id);
        }
        command
    }

    async fn replay(&self, server: &Server, args: &[&str]) -> Said {
        Said::new(output(self.command(server, args)).await)
    }

    /// The only directory that was kept.
    fn kept(&self) -> PathBuf {
        let mut entries = fs::read_dir(self.tmp()).unwrap().map(|entry| entry.unwrap().path());
        let kept = entries.next().expect("a directory was kept");
        assert_eq!(entries.next(), None);
        kept
    }

    fn leaves_nothing(&self) {
        assert_eq!(fs::read_dir(self.tmp()).unwrap().count(), 0);
    }
}

/// The output of a replay, and its exit code.
#[derive(Debug)]
struct Said {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Said {
    fn new(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Self { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
    }

    /// Panics unless this was the exit code, and standard output and error together contain these parts.
    fn expect(&self, code: i32, parts: &[&str]) {
        assert_eq!(self.code, Some(code), "{self:#?}");
        for part in parts {
            assert!(self.out.contains(part) || self.err.contains(part), "{part} in {self:#?}");
        }
    }
}

async fn output(mut command: Command) -> Output {
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

/// An input root with a script and a directory.
async fn inputs(client: &Client) -> Digest {
    let text = client.upload("text\n").await;
    let script = client.upload("#!/bin/sh\ncat sub/text; exec \"$@\"\n").await;
    let sub = client.upload(directory(vec![file("text", text)], vec![], vec![symlink("link", "text")])).await;
    let tool = reapi::FileNode { is_executable: true, ..file("tool", script) };
    client.upload(directory(vec![tool], vec![subdirectory("sub", sub)], vec![])).await
}

async fn executed(client: &Client, command: reapi::Command, root: Digest) -> (String, ActionResult) {
    let action = client.action(command, root).await;
    let response = client.run(action).await;
    assert_eq!(response.status.clone().unwrap_or_default().code, 0, "{response:?}");
    (action.to_string(), response.result.unwrap())
}

/// A command in a working directory with outputs of every kind. One of them is above the working directory.
fn deterministic(secret: &Path) -> reapi::Command {
    let script = format!(
        "./../tool pwd; mkdir -p d/e; echo x > d/e/f; chmod +x d/e/f; ln -s e d/l; echo y > ../beside; \
         cat {} 2>/dev/null && echo seen; echo problem >&2",
        secret.display()
    );
    reapi::Command { working_directory: "sub".into(), ..sh_with(&script, &["d", "../beside", "never"]) }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_action_that_does_the_same_in_its_sandbox_is_the_same_and_leaves_nothing() {
    let server = Server::start().await;
    let client = server.client().await;
    let root = inputs(&client).await;
    for user in User::each() {
        // Neither side sees this output.
        let secret = user.home.path().join("secret");
        fs::write(&secret, "secret").unwrap();
        let (action, result) = executed(&client, deterministic(&secret), root).await;
        assert_eq!((result.exit_code, result.output_files.len()), (0, 1), "{result:?}");
        let said = user.replay(&server, &[&action]).await;
        said.expect(
            0,
            &[
                "same as the result in the action cache: exit code 0",
                "5 outputs",
                &action,
                "sub",
                "namespaces",
            ],
        );
        assert_eq!(said.out.lines().count(), 1, "{said:?}");
        user.leaves_nothing();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_difference_is_told_with_both_sides_which_keep_leaves_on_disk() {
    let server = Server::start().await;
    let client = server.client().await;
    for user in User::each() {
        let script = "head -c 8 /dev/urandom | od -An -tx8 | tee d/number; echo same > same; head -c 9 /dev/urandom > b; \
                      mkdir \"d/$(cat d/number)\"";
        let (action, _) =
            executed(&client, sh_with(&format!("mkdir d; {script}"), &["d", "same", "b"]), empty()).await;
        let said = user.replay(&server, &[&action, "--keep"]).await;
        said.expect(1, &["stdout\n", "d/number\n", "  from line 1 on:\n", "b\n  recorded  file, 9 bytes, "]);
        said.expect(
            1,
            &[
                "here      nothing",
                "recorded  nothing",
                "different from the result in the action cache: stdout, 4 of 5",
            ],
        );
        assert!(!said.out.contains("same\n"), "{said:?}");

        let kept = user.kept();
        assert!(said.err.contains(kept.to_str().unwrap()), "{said:?}");
        let mut found: Vec<_> =
            fs::read_dir(&kept).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        found.sort();
        assert_eq!(found, ["recorded", "root", "stderr", "stdout"]);
        assert_ne!(
            fs::read(kept.join("recorded/outputs/d/number")).unwrap(),
            fs::read(kept.join("root/d/number")).unwrap()
        );
        assert_eq!(fs::read_to_string(kept.join("root/same")).unwrap(), "same\n");
        assert_ne!(fs::read(kept.join("recorded/stdout")).unwrap(), fs::read(kept.join("stdout")).unwrap());
    }
}

/// The action cache has no failures, but an operation remembers how it ended.
#[tokio::test(flavor = "multi_thread")]
async fn a_failed_action_is_compared_by_the_name_of_its_operation() {
    let server = Server::start().await;
    let client = server.client().await;
    let user = User::new(None);
    let action = client.action(sh("echo problem >&2; exit 3"), empty()).await;
    let mut run = client.start(action).await;
    let name = run.until(|operation| operation.done).await.name;
    user.replay(&server, &[&name]).await.expect(0, &["same as the result of the operation: exit code 3"]);
    let said = user.replay(&server, &[&action.to_string()]).await;
    said.expect(2, &["nothing to compare with", "exit code  3", "stderr here ends with\n  problem"]);

    let unknown = "operations/6ba7b810-9dad-11d1-80b4-00c04fd430c8";
    user.replay(&server, &[unknown]).await.expect(2, &["unknown or was forgotten", "action_digest"]);
    let unknown = format!("{}/7", action.hash_hex());
    user.replay(&server, &[&unknown]).await.expect(2, &["does not have the action", "--instance"]);
    user.leaves_nothing();
}

/// GEN-08: the length of a hash does not tell BLAKE3 from SHA-256; an operation does.
#[tokio::test(flavor = "multi_thread")]
async fn actions_of_other_digest_functions_are_replayed() {
    let server = Server::start().await;
    let client = Client { function: DigestFunction::Blake3, ..server.client().await };
    let user = User::new(None);
    let text = client.upload("text").await;
    let root = client.upload(directory(vec![file("f", text)], vec![], vec![])).await;
    let action = client.action(sh_with("mkdir d; cp f d/g; cat f", &["d"]), root).await;
    let name = client.start(action).await.until(|operation| operation.done).await.name;
    user.replay(&server, &[&name]).await.expect(0, &["same", "2 outputs"]);
    let digest = action.to_string();
    user.replay(&server, &[&digest, "--digest-function", "blake3"]).await.expect(0, &["same"]);
    user.replay(&server, &[&digest]).await.expect(2, &["does not have the action"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn blobs_that_the_server_lacks_are_named_with_their_paths_and_a_remedy() {
    let server = Server::start().await;
    let client = server.client().await;
    let user = User::new(None);
    let (here, gone) = (client.upload("here").await, sha256(b"gone"));
    let sub = client.upload(directory(vec![file("a", gone), file("b", here)], vec![], vec![])).await;
    let root = client.upload(directory(vec![], vec![subdirectory("sub", sub)], vec![])).await;
    let action = client.action(sh("true"), root).await;
    let said = user.replay(&server, &[&action.to_string()]).await;
    said.expect(2, &[&gone.to_string(), "(sub/a)", "--noremote_accept_cached"]);
    assert!(!said.err.contains(&here.to_string()), "{said:?}");

    let gone = sha256(b"no directory");
    let root = client.upload(directory(vec![], vec![subdirectory("sub", gone)], vec![])).await;
    let action = client.action(sh("true"), root).await;
    user.replay(&server, &[&action.to_string()]).await.expect(2, &[&gone.to_string(), "a directory"]);
    user.leaves_nothing();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_ends_the_command_and_removes_what_was_staged() {
    let server = Server::start().await;
    let client = server.client().await;
    for user in User::each() {
        // The argument identifies the process on this machine.
        let number = format!("10{}", std::process::id());
        let command = sh(&format!("exec sleep {number}"));
        let action = client.action(command, empty()).await.to_string();
        for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143), (Signal::HUP, 129)] {
            let child = user.command(&server, &[&action]).spawn().unwrap();
            let sleeps = || !processes_with(&["sleep", &number]).is_empty();
            eventually("the command runs", sleeps).await;
            kill_process(Pid::from_child(&child), signal).unwrap();
            let output = tokio::task::spawn_blocking(|| child.wait_with_output().unwrap()).await.unwrap();
            Said::new(output).expect(code, &[]);
            eventually("the command has ended", || !sleeps()).await;
            user.leaves_nothing();
        }
    }
}

/// The ids of the processes of this machine with these arguments.
fn processes_with(arguments: &[&str]) -> Vec<String> {
    let wanted: String = arguments.iter().map(|argument| format!("{argument}\0")).collect();
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let is_it = |entry: &fs::DirEntry| {
        fs::read(entry.path().join("cmdline")).is_ok_and(|line| line == wanted.as_bytes())
    };
    entries.filter(is_it).map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// A program at the other end of a terminal.
struct AtTerminal {
    typing: fs::File,
    said: Arc<Mutex<String>>,
}

impl AtTerminal {
    /// A terminal, and the path that opens its other end.
    fn new() -> (Self, impl Fn() -> fs::File) {
        let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        unlockpt(&terminal).unwrap();
        let path = PathBuf::from(OsStr::from_bytes(ptsname(&terminal, vec![]).unwrap().as_bytes()));
        let typing = fs::File::from(terminal);
        let (mut reading, said) = (typing.try_clone().unwrap(), Arc::<Mutex<String>>::default());
        let heard = said.clone();
        std::thread::spawn(move || {
            let mut piece = [0; 1024];
            // An error means that the other end is closed.
            while let Ok(count @ 1..) = reading.read(&mut piece) {
                let text = String::from_utf8_lossy(&piece[..count]).replace('\r', "");
                heard.lock().unwrap().push_str(&text);
            }
        });
        (Self { typing, said }, move || fs::OpenOptions::new().read(true).write(true).open(&path).unwrap())
    }

    fn types(&mut self, text: &str) {
        self.typing.write_all(text.as_bytes()).unwrap();
    }

    async fn sees(&self, text: &str) {
        eventually(text, || self.said.lock().unwrap().contains(text)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_shell_stands_where_the_command_would_run_and_has_a_terminal_of_its_own() {
    let server = Server::start().await;
    let client = server.client().await;
    let root = inputs(&client).await;
    for user in User::each() {
        let command = reapi::Command { working_directory: "sub".into(), ..sh("true") };
        let action = client.action(command, root).await.to_string();
        let (mut terminal, theirs) = AtTerminal::new();
        let mut replay = user.command(&server, &[&action, "--shell", "--keep"]);
        replay.stdin(theirs()).stdout(theirs()).stderr(Stdio::null()).env("TERM", "dumb");
        let mut child = replay.spawn().unwrap();
        drop(replay);
        terminal.sees("bash").await;
        terminal.types("echo at:$PWD; cat text; test -t 0 && : > /dev/tty && echo is:terminal\n");
        for part in ["\nat:/build/sub\n", "\ntext\n", "\nis:terminal\n"] {
            terminal.sees(part).await;
        }
        terminal.types("ls /etc/shadow; echo not:$?\n");
        terminal.sees("\nnot:2\n").await;
        // Ctrl-C ends the program that runs in the shell, but neither the shell nor the replay.
        let number = format!("20{}", std::process::id());
        terminal.types(&format!("sleep {number}\n"));
        eventually("it sleeps", || !processes_with(&["sleep", &number]).is_empty()).await;
        terminal.types("\x03");
        eventually("it is interrupted", || processes_with(&["sleep", &number]).is_empty()).await;
        terminal.types("touch made; echo code:$?; exit 7\n");
        let status = tokio::task::spawn_blocking(move || child.wait().unwrap()).await.unwrap();
        assert_eq!(status.code(), Some(0));
        terminal.sees("\ncode:0\n").await;
        assert!(user.kept().join("root/sub/made").exists());
    }
    let user = User::new(None);
    user.replay(&server, &["ab/1", "--shell"]).await.expect(2, &["needs a terminal"]);
}

/// Otherwise the author of an action would get every file that the user can read.
#[tokio::test(flavor = "multi_thread")]
async fn without_a_sandbox_an_action_runs_only_if_the_user_insists() {
    let server = Server::start().await;
    let client = server.client().await;
    let user = User::new(None);
    let (action, _) = executed(&client, sh("echo hello"), empty()).await;
    let restricted = |args: &[&str]| {
        let replay = user.command(&server, args);
        let mut shell = Command::new("unshare");
        shell
            .args(["--user", "--map-root-user", "sh", "-c"])
            .arg("echo 0 > /proc/sys/user/max_user_namespaces && exec \"$0\" \"$@\"")
            .arg(replay.get_program())
            .args(replay.get_args())
            .env_clear()
            .envs(replay.get_envs().filter_map(|(name, value)| Some((name, value?))))
            .stdin(Stdio::null());
        shell
    };
    let said = Said::new(output(restricted(&[&action])).await);
    said.expect(2, &["outside of a sandbox", "sysctl -w user.max_user_namespaces", "--no-sandbox"]);
    let said = Said::new(output(restricted(&[&action, "--no-sandbox"])).await);
    said.expect(0, &["sandbox  none", "same"]);
    // What the configuration requires of the server's machine is not required here.
    let mut replay = user.command(&server, &[&action, "--no-sandbox"]);
    replay
        .env("GOREGO_EXECUTION__SANDBOX__ROOTFS", "inputs")
        .env("GOREGO_EXECUTION__LIMITS__REQUIRED", "true");
    Said::new(output(replay).await).expect(0, &["sandbox  none", "same"]);
    user.leaves_nothing();
}

#[tokio::test]
async fn a_name_that_cannot_be_right_is_refused_before_the_server_is_asked() {
    let mut replay = Command::new(env!("CARGO_BIN_EXE_gorego"));
    // No server listens on this port.
    replay.args(["replay", "--server", "grpc://127.0.0.1:1", "abc"]).stdin(Stdio::null());
    Said::new(output(replay).await).expect(2, &["\"abc\" is too short for the beginning of an id"]);
}
