//! The operation stream and the command itself: EXE-01..15, EXE-39..46, EXE-59, EXE-60.

use crate::support::{
    Server, empty, eventually, metadata, missing_subjects, response, sh, sh_with, sha256, shared_dir,
};
use gorego_reapi::proto::{
    longrunning::{
        CancelOperationRequest, DeleteOperationRequest, GetOperationRequest, ListOperationsRequest,
    },
    reapi::{
        Action, Command, ExecuteRequest, ExecutionPolicy, Platform, WaitExecutionRequest,
        command::EnvironmentVariable, platform::Property,
    },
};
use prost::Message as _;
use std::os::unix::fs::PermissionsExt as _;
use tonic::Code;

/// EXE-02..08, EXE-46.
#[tokio::test]
async fn an_action_runs_and_its_stream_ends_with_the_result() {
    let server = Server::start().await;
    let client = server.client().await;
    let action = client.action(sh("echo out; echo err >&2; exit 7"), empty()).await;
    let mut run = client.start(action).await;
    let first = run.next().await.unwrap();
    assert_eq!(metadata(&first).action_digest, Some(action.to_wire()));
    let response = run.finish().await;
    let result = response.result.unwrap();
    assert_eq!(result.exit_code, 7);
    assert_eq!(client.stdout(&result).await, "out\n");
    assert_eq!(client.stderr(&result).await, "err\n");
    assert!(!response.cached_result);
}

/// EXE-46.
#[tokio::test]
async fn death_by_a_signal_is_128_plus_its_number() {
    let server = Server::start().await;
    let client = server.client().await;
    assert_eq!(client.run_command(sh("kill -9 $$")).await.exit_code, 137);
    assert_eq!(client.run_command(sh("exit 255")).await.exit_code, 255);
}

/// EXE-40, EXE-41: no shell is involved, and the server's environment is not inherited.
#[tokio::test]
async fn arguments_and_environment_arrive_byte_for_byte() {
    let server = Server::with(&[]).await;
    let client = server.client().await;
    let arguments = ["/usr/bin/printf", "[%s]", "a b", "", "$HOME", "\"q'", "new\nline", "é", "*"];
    let command =
        Command { arguments: arguments.iter().map(|a| (*a).to_owned()).collect(), ..Default::default() };
    let result = client.run_command(command).await;
    assert_eq!(client.stdout(&result).await, "[a b][][$HOME][\"q'][new\nline][é][*]");

    let variable = |name: &str, value: &str| EnvironmentVariable { name: name.into(), value: value.into() };
    let command = Command {
        arguments: vec!["/usr/bin/env".into(), "-0".into()],
        environment_variables: vec![variable("A", "1\n2"), variable("EMPTY", "")],
        ..Default::default()
    };
    let result = client.run_command(command).await;
    assert_eq!(client.stdout(&result).await, "A=1\n2\0EMPTY=\0");
}

/// The text is executed as Linux would execute it, even if it parses as a message.
#[tokio::test]
async fn a_dozen_arguments_as_long_as_the_system_takes_them_arrive() {
    let server = Server::start().await;
    let client = server.client().await;
    for character in ["0", " ", "x"] {
        let mut command = sh("for argument; do sum=$((sum + ${#argument})); done; echo $# $sum");
        command.arguments.push("sh".into());
        command.arguments.extend(vec![character.repeat(125_000); 12]);
        let result = client.run_command(command).await;
        assert_eq!(client.stdout(&result).await, "12 1500000\n");
    }
}

/// EXE-40, EXE-42.
#[tokio::test]
async fn a_program_that_cannot_be_started_fails_at_once_and_says_why() {
    let server = Server::start().await;
    let client = server.client().await;
    for (program, code) in [("./nope", 127), ("no-such-program", 127), ("/etc/passwd", 126), ("/tmp", 126)] {
        let result = client.run_command(Command { arguments: vec![program.into()], ..sh("") }).await;
        assert_eq!(result.exit_code, code, "{program}");
        assert!(client.stderr(&result).await.contains(program), "{program}");
    }
    // The program is found in the PATH of the command.
    let result = client.run_command(Command { arguments: vec!["true".into()], ..sh("") }).await;
    assert_eq!(result.exit_code, 0);
}

/// EXE-39: the directory is created if it is not in the input root, as one client requires.
#[tokio::test]
async fn a_command_runs_in_its_working_directory() {
    let server = Server::start().await;
    let client = server.client().await;
    let command = Command {
        working_directory: "w/d".into(),
        ..sh_with("pwd > where; echo up > ../up", &["where", "../up"])
    };
    let result = client.run_command(command).await;
    assert!(client.output(&result, "where").await.ends_with("/w/d\n"));
    assert_eq!(client.output(&result, "../up").await, "up\n");
}

/// EXE-44.
#[tokio::test]
async fn nothing_that_a_command_started_survives_it() {
    let server = Server::start().await;
    let client = server.client().await;
    let script = "sleep 7431 & (setsid sh -c 'sleep 7432 & wait' >/dev/null 2>&1 &) ; cat; echo done";
    let result = client.run_command(sh(script)).await;
    assert_eq!(client.stdout(&result).await, "done\n", "stdin is empty");
    for marker in ["sleep 7431", "sleep 7432"] {
        eventually(marker, || !running(marker)).await;
    }
}

/// EXE-45: the time in the queue does not count, the output so far is kept, and all processes are killed.
#[tokio::test]
async fn a_command_past_its_timeout_is_killed_and_reported_with_its_partial_log() {
    let server = Server::with(&[("EXECUTION__CONCURRENCY", "1")]).await;
    let client = server.client().await;
    let second = Some(prost_types::Duration { seconds: 1, nanos: 0 });
    let slow = sh("echo so far; sleep 7433 & sleep 7433");
    let slow = client.action_with(slow, empty(), |action| action.timeout = second).await;
    // It waits longer than its timeout.
    let waits = client.action_with(sh("true"), empty(), |action| action.timeout = second).await;
    let run = client.start(slow).await;
    let queued = client.start(waits).await;
    let response = run.finish().await;
    assert_eq!(response.status.unwrap().code, Code::DeadlineExceeded as i32);
    assert_eq!(client.stdout(&response.result.unwrap()).await, "so far\n");
    assert!(!running("sleep 7433"));
    assert_eq!(client.cached(slow).await, None, "EXE-19");
    assert_eq!(queued.finish().await.status.unwrap_or_default().code, 0);
}

/// EXE-59: every byte arrives. The tests of the worker cover the memory bound.
#[tokio::test]
async fn logs_are_exact_at_any_size_and_inlined_only_on_request() {
    let server = Server::start().await;
    let client = server.client().await;
    let action = client.action(sh("head -c 100000000 /dev/zero; printf '\\377' >&2"), empty()).await;
    let request = ExecuteRequest { inline_stdout: true, inline_stderr: true, ..client.request(action) };
    let result = client.start_request(request).await.unwrap().finish().await.result.unwrap();
    assert_eq!(result.stdout_digest.as_ref().unwrap().size_bytes, 100_000_000);
    assert!(result.stdout_raw.is_empty(), "AC-07: too large to inline, so dropped");
    assert_eq!(&result.stderr_raw[..], b"\xff");
    let again = client.run(action).await.result.unwrap();
    assert!(again.stderr_raw.is_empty());

    let quiet = client.run_command(sh("true")).await;
    assert!(quiet.stdout_digest.is_none_or(|digest| digest == empty().to_wire()));
}

/// EXE-60.
#[tokio::test]
async fn all_nine_timestamps_are_set_and_ordered() {
    let server = Server::start().await;
    let client = server.client().await;
    let metadata = client.run_command(sh("echo x")).await.execution_metadata.unwrap();
    assert!(!metadata.worker.is_empty());
    let times = [
        metadata.queued_timestamp,
        metadata.worker_start_timestamp,
        metadata.input_fetch_start_timestamp,
        metadata.input_fetch_completed_timestamp,
        metadata.execution_start_timestamp,
        metadata.execution_completed_timestamp,
        metadata.output_upload_start_timestamp,
        metadata.output_upload_completed_timestamp,
        metadata.worker_completed_timestamp,
    ]
    .map(|time| time.map(|time| (time.seconds, time.nanos)).expect("set"));
    assert!(times.is_sorted(), "{times:?}");
    let usage = gorego_reapi::auxiliary::resource_usage(&metadata.auxiliary_metadata).unwrap();
    assert!(usage.max_resident_bytes > 0);
}

/// EXE-01, EXE-04, EXE-06.
#[tokio::test]
async fn with_every_slot_taken_the_first_message_still_comes_at_once() {
    let server = Server::with(&[("EXECUTION__CONCURRENCY", "1")]).await;
    let client = server.client().await;
    let blocker = client.action(sh("sleep 7434"), empty()).await;
    let mut running = client.start(blocker).await;
    running.until(|operation| metadata(operation).stage == 3).await;
    let waiting = client.action(sh("echo waiting"), empty()).await;
    let mut queued = client.start(waiting).await;
    assert_eq!(metadata(&queued.next().await.unwrap()).stage, 2);
}

/// EXE-12, EXE-13, EXE-14.
#[tokio::test]
async fn an_operation_can_be_joined_by_name_before_and_after_its_end() {
    let server = Server::start().await;
    let client = server.client().await;
    let dir = shared_dir();
    let gate = dir.path().join("gate");
    let script = format!("until test -e {}; do sleep 0.02; done; echo open", gate.display());
    let action = client.action(sh(&script), empty()).await;
    let mut run = client.start(action).await;
    let name = run.next().await.unwrap().name;
    drop(run);
    let wait = |name: &str| {
        let request = WaitExecutionRequest { name: name.into() };
        let mut execution = client.execution.clone();
        async move { execution.wait_execution(request).await.map(|r| crate::support::Run(r.into_inner())) }
    };
    let mut early = wait(&name).await.unwrap();
    assert_eq!(early.next().await.unwrap().name, name);
    std::fs::write(&gate, "").unwrap();
    let response = early.finish().await;
    assert_eq!(client.stdout(&response.result.unwrap()).await, "open\n");
    let mut late = wait(&name).await.unwrap();
    assert!(late.next().await.unwrap().done, "the first message of a finished operation is the final one");
    assert!(late.next().await.is_none());
    for unknown in ["operations/6ba7b810-9dad-11d1-80b4-00c04fd430c8", "operations/x", "nonsense"] {
        let status = wait(unknown).await.err().unwrap();
        assert_eq!(status.code(), Code::NotFound, "{unknown}: {status}");
    }
}

/// EXE-02, EXE-09, EXE-22, EXE-25, EXE-27, OPS-01, OPS-03: a fault of the action, unlike a fault of the request, ends
/// an ordinary operation.
#[tokio::test]
async fn an_action_that_cannot_run_is_an_operation_that_is_over_at_once() {
    let server = Server::start().await;
    let client = server.client().await;
    let absent = sha256(b"an action that nobody has stored");
    let orphan = Action { command_digest: Some(absent.to_wire()), ..Default::default() };
    let orphan = client.upload(orphan.encode_to_vec()).await;
    let malformed = client.upload(*b"\x01 no action").await;
    let mut names = Vec::new();
    for (action, code) in [
        (absent, Code::FailedPrecondition),
        (orphan, Code::FailedPrecondition),
        (malformed, Code::InvalidArgument),
    ] {
        let mut run = client.start(action).await;
        let end = run.next().await.unwrap();
        let status = response(&end).status.unwrap();
        assert_eq!((end.done, metadata(&end).stage, status.code), (true, 4, code as i32), "{status:?}");
        if code == Code::FailedPrecondition {
            assert_eq!(missing_subjects(&status), [absent.blob_name()]);
        }
        let mut operations = client.operations.clone();
        let wait = WaitExecutionRequest { name: end.name.clone() };
        let mut waiting = client.execution.clone().wait_execution(wait).await.unwrap().into_inner();
        assert_eq!(waiting.message().await.unwrap().as_ref(), Some(&end));
        assert_eq!(waiting.message().await.unwrap(), None);
        operations.cancel_operation(CancelOperationRequest { name: end.name.clone() }).await.unwrap();
        let got = operations.get_operation(GetOperationRequest { name: end.name.clone() }).await.unwrap();
        assert_eq!(got.into_inner(), end);
        names.push(end.name);
    }
    let list = ListOperationsRequest { name: "operations".into(), page_size: 9, ..Default::default() };
    let mut operations = client.operations.clone();
    let listed = operations.list_operations(list).await.unwrap().into_inner().operations;
    assert_eq!(listed.into_iter().map(|operation| operation.name).collect::<Vec<_>>(), names);
    let name = names.remove(0);
    operations.delete_operation(DeleteOperationRequest { name: name.clone() }).await.unwrap();
    let gone = operations.get_operation(GetOperationRequest { name }).await.unwrap_err();
    assert_eq!(gone.code(), Code::NotFound);
}

/// EXE-15: one run for many clients, but never for actions that must not be cached.
#[tokio::test]
async fn identical_actions_in_flight_are_run_once() {
    let server = Server::with(&[("EXECUTION__CONCURRENCY", "4")]).await;
    let client = server.client().await;
    let dir = shared_dir();
    for (do_not_cache, expected) in [(false, 1), (true, 8)] {
        let (log, gate) = (dir.path().join(format!("log {do_not_cache}")), dir.path().join("gate"));
        let script = format!(
            "echo ran >> '{}'; until test -e '{}'; do sleep 0.02; done",
            log.display(),
            gate.display()
        );
        let action =
            client.action_with(sh(&script), empty(), |action| action.do_not_cache = do_not_cache).await;
        std::fs::write(&log, "").unwrap();
        // Each slot of a root server has another user.
        std::fs::set_permissions(&log, std::fs::Permissions::from_mode(0o666)).unwrap();
        let mut runs = Vec::new();
        for _ in 0..8 {
            runs.push(client.start(action).await);
        }
        std::fs::write(&gate, "").unwrap();
        for run in runs {
            assert_eq!(run.finish().await.result.unwrap().exit_code, 0);
        }
        let lines = std::fs::read_to_string(&log).unwrap().lines().count();
        assert_eq!(lines, expected, "do_not_cache: {do_not_cache}");
        std::fs::remove_file(gate).unwrap();
    }
}

/// Actions with lower values run first; equal ones run in order of arrival.
#[tokio::test]
async fn queued_actions_run_by_priority() {
    let server = Server::with(&[("EXECUTION__CONCURRENCY", "1")]).await;
    let client = server.client().await;
    let dir = shared_dir();
    let (log, gate) = (dir.path().join("log"), dir.path().join("gate"));
    let wait = format!("until test -e {}; do sleep 0.02; done", gate.display());
    let mut blocker = client.start(client.action(sh(&wait), empty()).await).await;
    blocker.until(|operation| metadata(operation).stage == 3).await;
    let mut runs = Vec::new();
    for (name, priority) in [("a", 5), ("b", 0), ("c", -3), ("d", 0)] {
        let action = client.action(sh(&format!("echo {name} >> {}", log.display())), empty()).await;
        let execution_policy = Some(ExecutionPolicy { priority });
        let request = ExecuteRequest { execution_policy, ..client.request(action) };
        let mut run = client.start_request(request).await.unwrap();
        run.next().await.unwrap();
        runs.push(run);
    }
    std::fs::write(&gate, "").unwrap();
    for run in runs {
        run.finish().await;
    }
    assert_eq!(std::fs::read_to_string(log).unwrap(), "c\nb\nd\na\n");
}

/// GEN-21: RESOURCE_EXHAUSTED with RetryInfo.
#[tokio::test]
async fn a_full_queue_says_when_to_come_back() {
    let server = Server::with(&[("EXECUTION__CONCURRENCY", "1"), ("EXECUTION__QUEUE_SIZE", "1")]).await;
    let client = server.client().await;
    let mut runs = Vec::new();
    let mut refused = None;
    for i in 0..3 {
        let action = client.action(sh(&format!("sleep 7435; echo {i}")), empty()).await;
        match client.start_request(client.request(action)).await {
            Ok(mut run) if i == 0 => {
                run.until(|operation| metadata(operation).stage == 3).await;
                runs.push(run);
            }
            Ok(run) => runs.push(run),
            Err(status) => refused = Some(status),
        }
    }
    let status = refused.expect("one running, one queued, one refused");
    assert_eq!((runs.len(), status.code()), (2, Code::ResourceExhausted));
    let details = gorego_reapi::proto::rpc::Status::decode(status.details()).unwrap();
    assert_eq!((details.code, details.message.as_str()), (8, status.message()), "GEN-17");
    let retry = details.details.iter().find(|any| any.type_url == "type.googleapis.com/google.rpc.RetryInfo");
    assert!(retry.is_some());
}

/// EXE-31: from Action or Command; an unlisted property is ignored, because clients use such properties to separate
/// caches.
#[tokio::test]
#[allow(deprecated)]
async fn a_platform_that_no_pool_offers_is_refused_at_once() {
    let server = Server::start().await;
    let client = server.client().await;
    let platform = |name: &str, value: &str| {
        let property = Property { name: name.into(), value: value.into() };
        Some(Platform { properties: vec![property] })
    };
    let plan9 = Command { platform: platform("OSFamily", "plan9"), ..sh("true") };
    let action = client.action(plan9, empty()).await;
    let status = client.start_request(client.request(action)).await.err().unwrap();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("OSFamily") && status.message().contains("plan9"), "{status}");
    for (name, value) in [("OSFamily", "Linux"), ("cache-silo-key", "x")] {
        let action =
            client.action_with(sh("true"), empty(), |action| action.platform = platform(name, value)).await;
        assert_eq!(client.run(action).await.result.unwrap().exit_code, 0);
    }
}

/// Whether a process with this text in its command line is running.
pub(crate) fn running(marker: &str) -> bool {
    let args = marker.replace(' ', "\0");
    std::fs::read_dir("/proc").unwrap().flatten().any(|entry| {
        std::fs::read_to_string(entry.path().join("cmdline")).is_ok_and(|line| line.contains(&args))
    })
}
