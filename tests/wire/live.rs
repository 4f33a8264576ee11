//! The output of commands during and after their runs, and the reports about runs that failed.

use crate::support::{Client, Run, Server, empty, metadata, response, sh, sha256, shared_dir};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    proto::{
        bytestream::{ReadRequest, ReadResponse},
        longrunning::{CancelOperationRequest, GetOperationRequest},
        reapi::{ExecuteResponse, LogFile},
    },
};
use std::{
    io::{BufRead as _, BufReader, Read as _},
    path::Path,
    process::{Command, Stdio},
};
use tokio::task::JoinHandle;
use tonic::{Code, Streaming};

/// A shell loop that ends when the file exists.
fn until(file: &Path) -> String {
    format!("until [ -e '{}' ]; do sleep 0.01; done", file.display())
}

/// The stream names of stdout and stderr once the operation reports them, and the name of the operation.
async fn names(run: &mut Run) -> (String, String, String) {
    let operation = run.until(|operation| !metadata(operation).stdout_stream_name.is_empty()).await;
    let metadata = metadata(&operation);
    assert!(!operation.done);
    (metadata.stdout_stream_name, metadata.stderr_stream_name, operation.name)
}

fn request(name: &str, read_offset: i64) -> ReadRequest {
    ReadRequest { resource_name: name.into(), read_offset, read_limit: 0 }
}

async fn open(client: &Client, name: &str) -> Streaming<ReadResponse> {
    client.bytes.clone().read(request(name, 0)).await.unwrap().into_inner()
}

fn follow(client: &Client, name: &str, offset: i64) -> JoinHandle<Vec<u8>> {
    let (client, request) = (client.clone(), request(name, offset));
    tokio::spawn(async move { client.read_request(request).await.unwrap() })
}

/// The bytes of an open stream up to this length.
async fn first(stream: &mut Streaming<ReadResponse>, length: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    while bytes.len() < length {
        let message = tokio::time::timeout(crate::support::PATIENCE, stream.message()).await;
        bytes.extend_from_slice(&message.expect("bytes in time").unwrap().expect("more to come").data);
    }
    bytes
}

/// EXE-64, LOG-03: all readers get the same bytes, whenever they join, and the stream ends with the command.
#[tokio::test]
async fn readers_that_join_before_during_and_after_the_output_read_the_same() {
    let server = Server::start().await;
    let client = server.client().await;
    let files = shared_dir();
    let (begin, go) = (files.path().join("begin"), files.path().join("go"));
    let script = format!("{}; echo one; echo warning >&2; {}; echo two", until(&begin), until(&go));
    let action = client.action(sh(&script), empty()).await;
    let mut run = client.start(action).await;
    let (stdout, stderr, _) = names(&mut run).await;
    assert_ne!(stdout, stderr);

    let before = follow(&client, &stdout, 0);
    let mut during = open(&client, &stdout).await;
    std::fs::write(&begin, "").unwrap();
    assert_eq!(first(&mut during, 4).await, b"one\n");
    let warned = follow(&client, &stderr, 0);
    // The command waits for this file, so everything read so far was read while it ran.
    let from_two = follow(&client, &stdout, 4);
    std::fs::write(&go, "").unwrap();

    assert_eq!(before.await.unwrap(), b"one\ntwo\n");
    assert_eq!(first(&mut during, 4).await, b"two\n");
    assert!(during.message().await.unwrap().is_none(), "the stream ends");
    assert_eq!(from_two.await.unwrap(), b"two\n");
    assert_eq!(warned.await.unwrap(), b"warning\n");
    let last = run.until(|operation| operation.done).await;
    assert_eq!(metadata(&last).stdout_stream_name, stdout, "the names stay");
    let result = response(&last).result.unwrap();
    assert_eq!(client.stdout(&result).await, "one\ntwo\n");

    let after = |offset| client.read_request(request(&stdout, offset));
    assert_eq!(after(0).await.unwrap(), b"one\ntwo\n");
    assert_eq!(after(5).await.unwrap(), b"wo\n");
    assert_eq!(after(8).await.unwrap(), b"");
    assert_eq!(after(9).await.unwrap_err().code(), Code::OutOfRange);
    let limited = ReadRequest { read_limit: 2, ..request(&stdout, 1) };
    assert_eq!(client.read_request(limited).await.unwrap(), b"ne");

    // A cached result has no run to follow, and a success has nothing to explain.
    let mut hit = client.start(action).await;
    let hit = hit.until(|operation| operation.done).await;
    assert_eq!(metadata(&hit).stdout_stream_name, "");
    let response = response(&last);
    assert!(response.server_logs.is_empty() && response.message.is_empty());
}

/// EXE-15, EXE-64: one run has one pair of streams, however many clients wait for it.
#[tokio::test]
async fn operations_that_share_a_run_share_its_streams() {
    let server = Server::start().await;
    let client = server.client().await;
    let files = shared_dir();
    let go = files.path().join("go");
    let action = client.action(sh(&format!("echo shared; {}", until(&go))), empty()).await;
    let mut one = client.start(action).await;
    let (stdout, _, _) = names(&mut one).await;
    let mut two = client.start(action).await;
    assert_eq!(names(&mut two).await.0, stdout);
    let reader = follow(&client, &stdout, 0);
    std::fs::write(&go, "").unwrap();
    assert_eq!(reader.await.unwrap(), b"shared\n");
}

/// EXE-64, OPS-03: the output outlives a cancelled operation.
#[tokio::test]
async fn cancelling_ends_the_streams_and_keeps_what_was_printed() {
    let server = Server::start().await;
    let client = server.client().await;
    let action = client.action(sh("echo so far; echo careful >&2; sleep 1000"), empty()).await;
    let mut run = client.start(action).await;
    let (stdout, stderr, operation) = names(&mut run).await;
    let mut reader = open(&client, &stdout).await;
    assert_eq!(first(&mut reader, 7).await, b"so far\n");
    let warned = follow(&client, &stderr, 0);
    let mut operations = client.operations.clone();
    operations.cancel_operation(CancelOperationRequest { name: operation.clone() }).await.unwrap();
    assert!(reader.message().await.unwrap().is_none(), "the stream ends with the command");
    assert_eq!(warned.await.unwrap(), b"careful\n");
    let response = run.finish().await;
    assert_eq!(response.status.unwrap().code, Code::Cancelled as i32);
    let later = operations.get_operation(GetOperationRequest { name: operation }).await.unwrap().into_inner();
    let metadata = metadata(&later);
    for (name, text) in
        [(metadata.stdout_stream_name, "so far\n"), (metadata.stderr_stream_name, "careful\n")]
    {
        assert_eq!(client.read_request(request(&name, 0)).await.unwrap(), text.as_bytes());
    }
}

/// EXE-45, EXE-60, EXE-61, EXE-64.
#[tokio::test]
async fn a_timeout_keeps_what_was_printed_and_explains_itself() {
    let server = Server::start().await;
    let client = server.client().await;
    let timeout = prost_types::Duration { seconds: 1, nanos: 0 };
    let action = client.action_with(sh("echo so far; sleep 1000"), empty(), |action| {
        action.timeout = Some(timeout);
    });
    let mut run = client.start(action.await).await;
    let (stdout, _, _) = names(&mut run).await;
    let reader = follow(&client, &stdout, 0);
    let response = run.finish().await;
    assert_eq!(reader.await.unwrap(), b"so far\n");
    assert_eq!(client.read_request(request(&stdout, 0)).await.unwrap(), b"so far\n");
    assert_eq!(response.status.as_ref().unwrap().code, Code::DeadlineExceeded as i32);
    assert!(response.message.contains("7 bytes of stdout"), "{}", response.message);
    let log = server_log(&client, &response, "run-1.log").await;
    for said in ["command: timed out", "limits: command 1s", "DEADLINE_EXCEEDED", "started the command"] {
        assert!(log.contains(said), "{said:?} is not in:\n{log}");
    }
    let result = response.result.unwrap();
    assert_eq!(client.stdout(&result).await, "so far\n");
    let metadata = result.execution_metadata.unwrap();
    assert!(!metadata.worker.is_empty() && !metadata.auxiliary_metadata.is_empty());
    assert!(
        metadata.worker_completed_timestamp.is_some() && metadata.output_upload_completed_timestamp.is_some()
    );
}

/// The text of a server log, which is an ordinary blob (EXE-61).
async fn server_log(client: &Client, response: &ExecuteResponse, name: &str) -> String {
    let found = response.server_logs.get(name);
    let LogFile { digest, human_readable } = found.unwrap_or_else(|| panic!("no {name} in {response:?}"));
    assert!(human_readable);
    let digest = Digest::from_wire(DigestFunction::Sha256, digest.as_ref(), "log").unwrap();
    String::from_utf8(client.read(digest).await.unwrap()).unwrap()
}

/// EXE-42, EXE-46, EXE-61: a message if the exit code alone would be unclear, and none if it is the command's own.
#[tokio::test]
async fn a_message_explains_what_an_exit_code_does_not() {
    let server = Server::with(&[("EXECUTION__MAX_OUTPUT_FILE_GB", "1")]).await;
    let client = server.client().await;
    for (script, exit_code, said, logged) in [
        ("exit 3", 3, "", false),
        ("kill -SEGV $$", 139, "signal 11 (SIGSEGV)", true),
        ("kill -9 $$", 137, "it may have run out of memory", true),
        ("exec truncate -s 2000000000 f", 153, "a file larger than the 1000000000 bytes allowed", true),
        ("truncate -s 2000000000 f; exit $?", 153, "a file larger than the 1000000000 bytes allowed", false),
    ] {
        let action = client.action(sh(script), empty()).await;
        let response = client.run(action).await;
        assert_eq!(response.status.as_ref().unwrap().code, 0, "EXE-46");
        assert_eq!(response.result.as_ref().unwrap().exit_code, exit_code, "{script}");
        assert!(response.message.contains(said), "{script}: {}", response.message);
        assert_eq!(response.message.is_empty(), said.is_empty(), "{script}: {}", response.message);
        assert_eq!(response.server_logs.contains_key("run-1.log"), logged, "{script}");
    }
    let mut absent = sh("");
    absent.arguments = vec!["no-such-program".into()];
    let response = client.run(client.action(absent, empty()).await).await;
    assert!(response.message.contains("could not be started"), "{}", response.message);
}

/// EXE-61, EXE-62, EXE-64: each try has a log; its streams end although no worker finished them.
#[tokio::test]
async fn runs_that_are_lost_leave_an_account_of_each_try() {
    // In the sandbox, no command can kill the process that runs it.
    let server = Server::with(&[("EXECUTION__MAX_ATTEMPTS", "2"), ("EXECUTION__SANDBOX__MODE", "off")]).await;
    let client = server.client().await;
    let files = shared_dir();
    let go = files.path().join("go");
    // $PPID is the process that runs commands for the worker.
    let script = format!("echo so far; {}; kill -9 $PPID; sleep 1000", until(&go));
    let mut run = client.start(client.action(sh(&script), empty()).await).await;
    let (stdout, _, _) = names(&mut run).await;
    let mut reader = open(&client, &stdout).await;
    assert_eq!(first(&mut reader, 7).await, b"so far\n");
    std::fs::write(&go, "").unwrap();
    assert!(reader.message().await.unwrap().is_none(), "the stream ends with the try");
    assert_eq!(client.read_request(request(&stdout, 0)).await.unwrap(), b"so far\n");
    let response = run.finish().await;
    assert_eq!(response.status.as_ref().unwrap().code, Code::Unavailable as i32);
    for name in ["run-1.log", "run-2.log"] {
        let log = server_log(&client, &response, name).await;
        assert!(log.contains("INTERNAL: the process that runs commands was lost"), "{log}");
    }
    assert_eq!(response.server_logs.len(), 2);
}

/// The log of a command that prints nothing is never created, and that is not a loss.
#[tokio::test]
async fn the_streams_of_a_silent_run_that_is_lost_end_without_bytes() {
    let server = Server::with(&[("EXECUTION__SANDBOX__MODE", "off"), ("EXECUTION__MAX_ATTEMPTS", "1")]).await;
    let client = server.client().await;
    let files = shared_dir();
    let go = files.path().join("go");
    // Without a sandbox, $PPID is the process that runs commands for the worker.
    let action = client.action(sh(&format!("{}; kill -9 $PPID; sleep 600", until(&go))), empty()).await;
    let mut run = client.start(action).await;
    let (stdout, stderr, _) = names(&mut run).await;
    let followed = [follow(&client, &stdout, 0), follow(&client, &stderr, 0)];
    std::fs::write(&go, "").unwrap();
    for bytes in followed {
        assert_eq!(bytes.await.unwrap(), b"");
    }
}

/// EXE-59, EXE-64.
#[tokio::test]
async fn ten_megabytes_arrive_live_as_they_are_stored() {
    let server = Server::start().await;
    let client = server.client().await;
    let files = shared_dir();
    let go = files.path().join("go");
    let script = format!("head -c 10000000 /dev/urandom; {}; echo end", until(&go));
    let mut run = client.start(client.action(sh(&script), empty()).await).await;
    let (stdout, _, _) = names(&mut run).await;
    let mut reader = open(&client, &stdout).await;
    let mut bytes = first(&mut reader, 10_000_000).await;
    std::fs::write(&go, "").unwrap();
    bytes.extend(first(&mut reader, 4).await);
    assert!(reader.message().await.unwrap().is_none());
    let result = run.finish().await.result.unwrap();
    assert_eq!(result.stdout_digest, Some(sha256(&bytes).to_wire()));
}

/// EXE-64, LOG-03: a stream only grows, even if the command truncates or reopens its standard error.
#[tokio::test]
async fn a_reader_gets_each_byte_of_a_command_that_truncates_its_output() {
    let server = Server::start().await;
    let client = server.client().await;
    let files = shared_dir();
    let go = files.path().join("go");
    let script = format!(
        "echo a longer line > /dev/stderr; {}; echo two > /dev/stderr; echo three | tee /dev/stderr",
        until(&go)
    );
    let mut run = client.start(client.action(sh(&script), empty()).await).await;
    let (_, stderr, _) = names(&mut run).await;
    let mut reader = open(&client, &stderr).await;
    assert_eq!(first(&mut reader, 14).await, b"a longer line\n");
    std::fs::write(&go, "").unwrap();
    assert_eq!(first(&mut reader, 10).await, b"two\nthree\n");
    assert!(reader.message().await.unwrap().is_none());
    let result = run.finish().await.result.unwrap();
    assert_eq!(client.stderr(&result).await, "a longer line\ntwo\nthree\n");
}

/// In a pipe, as in a build script: the first line is printed while the command still runs, and nothing is printed
/// twice.
#[tokio::test(flavor = "multi_thread")]
async fn exec_shows_the_first_line_before_the_command_ends() {
    let server = Server::start().await;
    let files = shared_dir();
    let go = files.path().join("go");
    let script = format!("echo first; echo warning >&2; {}; echo last; exit 3", until(&go));
    let mut exec = Command::new(env!("CARGO_BIN_EXE_gorego"))
        .args(["exec", "--endpoint", &format!("grpc://{}", server.address()), "sh", "-c", &script])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = BufReader::new(exec.stdout.take().unwrap());
    let mut line = String::new();
    // If it were printed only at the end, this would block for ever, because the command waits for the file.
    tokio::task::block_in_place(|| stdout.read_line(&mut line)).unwrap();
    assert_eq!(line, "first\n");
    std::fs::write(&go, "").unwrap();
    let (mut rest, mut stderr) = (String::new(), String::new());
    tokio::task::block_in_place(|| stdout.read_to_string(&mut rest)).unwrap();
    exec.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    assert_eq!((rest.as_str(), stderr.as_str()), ("last\n", "warning\n"));
    assert_eq!(exec.wait().unwrap().code(), Some(3));
}
