//! Pipes to which commands print, and pipes to which `gorego` itself prints.

use crate::execution::running;
use crate::support::{Client, PATIENCE, Server, empty, eventually, exit_of, sh};
use std::{
    io::{BufRead as _, BufReader, Read as _, pipe},
    net::{TcpListener, TcpStream},
    os::unix::process::ExitStatusExt as _,
    process::{Command, Stdio},
    time::Instant,
};
use tonic::Code;

/// If the disk has no space for a log, the failure counts as the server's, even if the command succeeds (EXE-62).
#[tokio::test]
async fn a_disk_that_fills_with_a_log_is_an_infrastructure_failure_and_passes() {
    let server = Server::on_a_disk_of(24 << 20).await;
    let client = server.client().await;
    let chatty = client.action(sh("trap '' PIPE; yes; exit 0"), empty()).await;
    let modest = client.action(sh("echo there is room again"), empty()).await;
    let status = client.run(chatty).await.status.unwrap();
    assert_eq!(status.code, Code::Unavailable as i32, "{}", status.message);
    assert!(status.message.contains("disk of this server"), "{}", status.message);
    assert_eq!(client.cached(chatty).await, None);
    // The log is removed in the background.
    let limit = Instant::now() + PATIENCE;
    let result = loop {
        let response = client.run(modest).await;
        match response.status.filter(|status| status.code != 0) {
            None => break response.result.unwrap(),
            Some(status) => assert!(Instant::now() < limit, "{}", status.message),
        }
    };
    assert_eq!(client.stdout(&result).await, "there is room again\n");
}

/// `gorego exec ... 2>&1 | head -1` ends like any filter, after the command was stopped (OPS-03).
#[tokio::test(flavor = "multi_thread")]
async fn exec_whose_reader_leaves_cancels_the_operation_and_ends_by_sigpipe() {
    let server = Server::start().await;
    let endpoint = format!("grpc://{}", server.address());
    for (n, script) in ["exec yes to-stdout", "exec yes to-stderr >&2"].into_iter().enumerate() {
        let (reader, writer) = pipe().unwrap();
        let mut exec = Command::new(env!("CARGO_BIN_EXE_gorego"));
        exec.args(["exec", "--endpoint", &endpoint, "sh", "-c", script]);
        exec.stdin(Stdio::null()).stdout(writer.try_clone().unwrap()).stderr(writer);
        let mut child = exec.spawn().unwrap();
        // The builder holds its own copies of the write ends.
        drop(exec);
        let mut line = String::new();
        let mut reader = BufReader::new(reader);
        tokio::task::block_in_place(|| reader.read_line(&mut line)).unwrap();
        assert!(line.starts_with("to-std"), "{line}");
        drop(reader);
        assert_eq!(exit_of(&mut child, "the process ends").await.signal(), Some(libc::SIGPIPE), "{script}");
        let cancelled = || {
            let log = server.log();
            let ends = log.iter().filter(|event| event["event"] == "operation_completed");
            ends.filter(|event| event["grpc_code"] == "CANCELLED").count()
        };
        eventually("the operation is cancelled", || cancelled() == n + 1).await;
        let marker = line.trim().replace("to-", "yes to-");
        eventually("the command is killed", || !running(&marker)).await;
    }
}

/// Output of a finished action is printed in another way, but ends the same way.
#[tokio::test(flavor = "multi_thread")]
async fn exec_of_a_cached_result_ends_by_sigpipe_without_a_reader() {
    let server = Server::start().await;
    let endpoint = format!("grpc://{}", server.address());
    for script in ["echo short", "seq 300000"] {
        let mut exec = Command::new(env!("CARGO_BIN_EXE_gorego"));
        exec.args(["exec", "--endpoint", &endpoint, "sh", "-c", script]).stdin(Stdio::null());
        let output = tokio::task::block_in_place(|| exec.output()).unwrap();
        assert!(output.status.success() && output.stdout.len() > 5);
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        let mut child = exec.stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
        assert_eq!(exit_of(&mut child, "the process ends").await.signal(), Some(libc::SIGPIPE), "{script}");
        let mut complaint = String::new();
        child.stderr.take().unwrap().read_to_string(&mut complaint).unwrap();
        assert_eq!(complaint, "", "nothing to tell: it is what was asked for");
    }
}

/// A command that prints for ever to a full disk is stopped.
#[tokio::test(flavor = "multi_thread")]
async fn exec_whose_output_cannot_be_written_cancels_the_operation_and_says_why() {
    let server = Server::start().await;
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let mut exec = Command::new(env!("CARGO_BIN_EXE_gorego"));
    exec.args(["exec", "--endpoint", &format!("grpc://{}", server.address()), "yes", "to-a-full-disk"]);
    let mut child = exec.stdin(Stdio::null()).stdout(full).stderr(Stdio::piped()).spawn().unwrap();
    assert_eq!(exit_of(&mut child, "the process ends").await.code(), Some(125));
    let mut complaint = String::new();
    child.stderr.take().unwrap().read_to_string(&mut complaint).unwrap();
    assert!(complaint.contains("could not print the command's output: No space left"), "{complaint}");
    eventually("the command is killed", || !running("yes to-a-full-disk")).await;
}

/// It ends neither with a panic nor with success.
#[tokio::test(flavor = "multi_thread")]
async fn every_command_that_prints_ends_by_sigpipe_without_a_reader_and_fails_on_a_full_disk() {
    let server = Server::start().await;
    let endpoint = format!("grpc://{}", server.address());
    let config = tempfile::NamedTempFile::new().unwrap();
    let file = config.path().to_str().unwrap();
    for args in [
        &["config", "show"][..],
        &["config", "check", file],
        &["verify", "--list"],
        &["verify", "--only", "CAP-01", &endpoint],
        &["verify", "--only", "CAP-01", "--json", &endpoint],
        &["--help"],
        &["exec", "--help"],
        &["--version"],
    ] {
        let mut gorego = Command::new(env!("CARGO_BIN_EXE_gorego"));
        gorego.args(args).env_clear().stdin(Stdio::null()).stderr(Stdio::piped());
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        let output = tokio::task::block_in_place(|| gorego.stdout(writer).output()).unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.signal(), stderr.as_str()), (Some(libc::SIGPIPE), ""), "{args:?}");
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let output = tokio::task::block_in_place(|| gorego.stdout(full).output()).unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code().is_some_and(|code| code > 0), "{args:?}: {}", output.status);
        assert!(stderr.contains("standard output") && !stderr.contains("panicked"), "{args:?}: {stderr}");
        // A missing reader of the error message changes nothing.
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        let wrong = gorego.arg("--no-such-flag").stdout(Stdio::null()).stderr(writer).status().unwrap();
        assert!(wrong.signal() == Some(libc::SIGPIPE) || wrong.code().is_some_and(|code| code != 101));
    }
}

/// Neither the banner nor a log line needs a reader.
#[tokio::test]
async fn a_server_whose_standard_error_is_closed_serves_and_stops_as_asked() {
    for format in ["text", "json"] {
        let store = tempfile::tempdir().unwrap();
        // The server cannot print the port that it took, so it gets a port that was free a moment ago. Other tests use
        // other addresses.
        let address = TcpListener::bind("127.0.0.77:0").unwrap().local_addr().unwrap().to_string();
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        let mut serve = Command::new(env!("CARGO_BIN_EXE_gorego"));
        serve.args(["serve", "--log-format", format, "--listen-addr", &address, "--local-cache-dir"]);
        serve
            .arg(store.path())
            .env_clear()
            .stdin(Stdio::null())
            .stdout(writer.try_clone().unwrap())
            .stderr(writer);
        let mut child = serve.spawn().unwrap();
        eventually("it listens", || TcpStream::connect(&address).is_ok()).await;
        let client = Client::connect(format!("http://{address}")).await;
        client.upload("and serves").await;
        drop(client);
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        assert_eq!(exit_of(&mut child, "the process ends").await.code(), Some(0), "{format}");
    }
}
