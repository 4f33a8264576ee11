//! `gorego exec`: what it prints, its exit code, and signals.

use crate::fake::*;
use bytes::Bytes;
use gorego_reapi::proto::{
    reapi::{self, execution_stage::Value as Stage},
    rpc,
};
use prost::Message;
use std::fs;
use tonic::{Code, Status};

/// Runs the real binary with the fake server.
async fn exec(endpoint: &str, args: &[&str]) -> (i32, String, String) {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_gorego"));
    command.args(["exec", "--endpoint", endpoint]).args(args);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

#[tokio::test(flavor = "multi_thread")]
async fn exec_prints_what_the_command_printed_and_exits_as_it_did() {
    let (fake, out) = (Fake::default(), tempfile::tempdir().unwrap());
    let endpoint = fake.serve().await;
    let long = "x".repeat(50_000);
    let result = reapi::ActionResult {
        exit_code: 7,
        stdout_raw: Bytes::from_static(b"hello\n"),
        stderr_digest: Some(fake.store(long.as_bytes())),
        output_files: vec![reapi::OutputFile {
            path: "o".into(),
            digest: Some(fake.store(b"made")),
            ..Default::default()
        }],
        ..Default::default()
    };
    let response = reapi::ExecuteResponse { result: Some(result), ..Default::default() };
    fake.state().scripts = vec![(vec![stage(Stage::Executing), done(&response)], None)].into();
    let dir = out.path().to_str().unwrap();
    let args = ["--output", "o", "--output", "p", "--output-dir", dir, "--", "sh", "-c", "exit 7"];
    let (code, stdout, stderr) = exec(&endpoint, &args).await;
    assert_eq!((code, stdout.as_str()), (7, "hello\n"));
    assert_eq!(
        stderr,
        format!("{long}gorego: the command did not create p\n"),
        "silent in a pipe but for this"
    );
    assert_eq!(fs::read(out.path().join("o")).unwrap(), b"made");

    // The uploaded Action can be run and is canonical.
    let blobs = fake.state().blobs.clone();
    let mut commands = blobs.values().filter_map(|blob| reapi::Command::decode(blob.clone()).ok());
    let command = commands.find(|command| command.arguments == ["sh", "-c", "exit 7"]).unwrap();
    assert_eq!(command.output_paths, ["o", "p"]);
    assert_eq!(command.environment_variables[0].value, "/usr/local/bin:/usr/bin:/bin");
}

/// The live part of the output is everything, the beginning, nothing, or something else.
#[tokio::test(flavor = "multi_thread")]
async fn exec_prints_each_byte_once_however_much_of_it_came_live() {
    let fake = Fake::default();
    let endpoint = fake.serve().await;
    let broken = || Some(Status::not_found("the stream was forgotten"));
    let long = "x".repeat(50_000);
    for (raw, live, end, printed) in [
        ("hello\n", "hello\n", None, "hello\n"),
        ("hello\n", "hel", broken(), "hello\n"),
        ("hello\n", "", broken(), "hello\n"),
        ("", "", None, ""),
        (&*long, &long[..20_001], broken(), &*long),
        (&*long, &*long, None, &*long),
        ("hello\n", "help", broken(), "helphello\n"),
        ("hi", "hello\n", None, "hello\nhi"),
        (&*long, "xxy", broken(), &*format!("xxy{long}")),
    ] {
        let mut result = reapi::ActionResult { exit_code: 7, ..Default::default() };
        match raw.len() {
            50_000 => result.stdout_digest = Some(fake.store(raw.as_bytes())),
            _ => result.stdout_raw = Bytes::copy_from_slice(raw.as_bytes()),
        }
        let response = reapi::ExecuteResponse { result: Some(result), ..Default::default() };
        let live = Bytes::copy_from_slice(live.as_bytes());
        fake.state().logs.insert("logstreams/out".into(), (live.clone(), end));
        fake.state().scripts = vec![(vec![followable(), followable(), done(&response)], None)].into();
        let (code, stdout, stderr) = exec(&endpoint, &["sh"]).await;
        assert_eq!((code, stdout.as_str()), (7, printed), "{live:?}");
        assert_eq!(stderr.contains("run again"), stdout != raw, "{stderr}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn exec_tells_infrastructure_failures_from_those_of_the_command() {
    let fake = Fake::default();
    let endpoint = fake.serve().await;
    let failure = |code: Code, message: &str| {
        let status = Some(rpc::Status { code: code as i32, message: message.into(), ..Default::default() });
        reapi::ExecuteResponse { status, ..success(0) }
    };
    let mut late = failure(Code::DeadlineExceeded, "ran longer than 1 s");
    late.result.as_mut().unwrap().stdout_raw = Bytes::from_static(b"so far");
    for (response, code, stdout, stderr) in [
        (success(0), 0, "", ""),
        (success(256), 1, "", ""),
        (success(-1), 255, "", ""),
        (late, 124, "so far", "ran longer than 1 s"),
        (failure(Code::Internal, "disk on fire"), 125, "", "disk on fire"),
    ] {
        fake.state().scripts = vec![(vec![done(&response)], None)].into();
        let got = exec(&endpoint, &["true"]).await;
        assert_eq!((got.0, got.1.as_str()), (code, stdout));
        assert!(got.2.contains(stderr) && got.2.is_empty() == stderr.is_empty(), "{}", got.2);
    }
    assert_eq!(exec("grpc://127.0.0.1:1", &["true"]).await.0, 125);
    assert_eq!(exec(&endpoint, &["--timeout", "soon", "true"]).await.0, 2);
}

/// EXE-22: a blob that was evicted between upload and start is uploaded again, once.
#[tokio::test(flavor = "multi_thread")]
async fn exec_uploads_again_what_the_server_lost_but_not_for_ever() {
    let fake = Fake::default();
    let endpoint = fake.serve().await;
    let lost = SHA256.digest(b"lost");
    let violation = rpc::precondition_failure::Violation {
        r#type: "MISSING".into(),
        subject: lost.blob_name(),
        ..Default::default()
    };
    let details = rpc::PreconditionFailure { violations: vec![violation] };
    let detail = prost_types::Any {
        type_url: "type.googleapis.com/google.rpc.PreconditionFailure".into(),
        value: details.encode_to_vec(),
    };
    let status =
        rpc::Status { code: Code::FailedPrecondition as i32, message: "".into(), details: vec![detail] };
    let missing = done(&reapi::ExecuteResponse { status: Some(status), ..Default::default() });
    fake.state().scripts = vec![(vec![missing.clone()], None), (vec![done(&success(0))], None)].into();
    assert_eq!(exec(&endpoint, &["true"]).await.0, 0);
    fake.state().scripts = vec![(vec![missing.clone()], None), (vec![missing.clone()], None)].into();
    let (code, _, stderr) = exec(&endpoint, &["true"]).await;
    assert!(code == 125 && stderr.contains(&lost.to_string()), "{stderr}");
}

/// OPS-03: Ctrl-C, a service manager, and a closed terminal.
#[tokio::test(flavor = "multi_thread")]
async fn a_signal_cancels_the_operation_before_exec_leaves() {
    use rustix::process::{Pid, Signal, kill_process};
    for (signal, code) in [(Signal::HUP, 129), (Signal::INT, 130), (Signal::TERM, 143)] {
        let fake = Fake::default();
        let endpoint = fake.serve().await;
        // These tests may run under `nohup`, or in the background of a shell, which ignore signals.
        let mut command = std::process::Command::new("env");
        command.args(["--default-signal", env!("CARGO_BIN_EXE_gorego")]);
        let child = hanging_exec(&fake, command, &endpoint).await;
        // The name of the operation may not have arrived yet.
        kill_process(Pid::from_child(&child), signal).unwrap();
        assert_eq!(exit_code(child).await, Some(code));
        assert_eq!(fake.state().calls.last(), Some(&"CancelOperation"), "{signal:?}");
    }
}

/// As with any other program, `nohup` makes it ignore SIGHUP.
#[tokio::test(flavor = "multi_thread")]
async fn a_signal_that_is_ignored_from_the_start_stops_nothing() {
    use rustix::process::{Pid, Signal, kill_process};
    let fake = Fake::default();
    let endpoint = fake.serve().await;
    let mut command = std::process::Command::new("sh");
    command.args(["-c", "trap '' HUP; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_gorego")]);
    let child = hanging_exec(&fake, command, &endpoint).await;
    kill_process(Pid::from_child(&child), Signal::HUP).unwrap();
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    assert_eq!(exit_code(child).await, Some(143));
}

/// `gorego exec` with an operation that does not end, after the operation was started.
async fn hanging_exec(
    fake: &Fake,
    mut command: std::process::Command,
    endpoint: &str,
) -> std::process::Child {
    fake.state().hang = true;
    fake.state().scripts = vec![(vec![stage(Stage::Queued)], None)].into();
    let child = command.args(["exec", "--endpoint", endpoint, "sleep", "1000"]).spawn().unwrap();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while !fake.state().calls.contains(&"Execute") {
        assert!(std::time::Instant::now() < deadline, "exec does not come to the point");
        tokio::task::yield_now().await;
    }
    child
}

async fn exit_code(mut child: std::process::Child) -> Option<i32> {
    tokio::task::spawn_blocking(move || child.wait().unwrap()).await.unwrap().code()
}

/// The server's message about a timeout repeats the error.
#[tokio::test(flavor = "multi_thread")]
async fn a_timeout_is_told_in_one_line() {
    let fake = Fake::default();
    let endpoint = fake.serve().await;
    let status =
        rpc::Status { code: Code::DeadlineExceeded as i32, message: "ran for 1s".into(), details: vec![] };
    let late = reapi::ExecuteResponse {
        status: Some(status),
        result: Some(reapi::ActionResult::default()),
        message: "it was stopped after 1s".into(),
        ..Default::default()
    };
    fake.state().scripts = vec![(vec![done(&late)], None)].into();
    let (code, _, stderr) = exec(&endpoint, &["true"]).await;
    assert!(code == 124 && stderr.contains("ran for 1s") && stderr.lines().count() == 1, "{stderr}");
}
