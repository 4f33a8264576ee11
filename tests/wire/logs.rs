//! The log lines of a real server, from start to end, compared with `docs/logs.md`.

use crate::{
    log_schema::Schema,
    support::{
        Client, PATIENCE, Server, command, empty, eventually, exit_of, http_client, metadata, sh, sha256,
    },
};
use gorego_client::stubs::CapabilitiesClient;
use gorego_reapi::proto::{
    longrunning::CancelOperationRequest,
    reapi::{
        ExecuteRequest, FindMissingBlobsRequest, GetActionResultRequest, GetCapabilitiesRequest,
        RequestMetadata,
    },
};
use prost::Message as _;
use serde_json::{Map, Value, json};
use std::io::{BufRead as _, BufReader};
use tonic::{Code, Request, metadata::MetadataValue};

type Line = Map<String, Value>;

/// All lines so far, each checked against the page.
fn conforming(server: &Server) -> Vec<Line> {
    let schema = Schema::documented();
    let check = |line: &Value| schema.check(&line.to_string()).unwrap_or_else(|problem| panic!("{problem}"));
    server.log().iter().map(check).collect()
}

/// The lines whose fields have these values.
fn with<'a>(lines: &'a [Line], fields: &Value) -> Vec<&'a Line> {
    let fields = fields.as_object().unwrap();
    lines.iter().filter(|line| fields.iter().all(|(name, value)| line.get(name) == Some(value))).collect()
}

/// The only such line.
fn one<'a>(lines: &'a [Line], fields: &Value) -> &'a Line {
    let found = with(lines, fields);
    assert_eq!(found.len(), 1, "lines with {fields}: {found:#?} of {lines:#?}");
    found[0]
}

/// A request with metadata (GEN-28).
fn of_client<T>(message: T) -> Request<T> {
    let metadata = RequestMetadata {
        tool_invocation_id: "invocation-1".into(),
        target_id: "//app:hello\n".into(),
        action_mnemonic: "CppCompile".into(),
        ..Default::default()
    };
    let mut request = Request::new(message);
    let value = MetadataValue::from_bytes(&metadata.encode_to_vec());
    request.metadata_mut().insert_bin("build.bazel.remote.execution.v2.requestmetadata-bin", value);
    request
}

/// Executes to the end with metadata. Returns the name of the operation.
async fn execute(client: &Client, request: ExecuteRequest) -> String {
    let stream = client.execution.clone().execute(of_client(request)).await.unwrap();
    let mut run = crate::support::Run(stream.into_inner());
    let name = run.until(|operation| operation.done).await.name;
    assert!(run.next().await.is_none());
    name
}

/// One line for each RPC and each step of an operation, with the documented fields and values.
#[tokio::test]
async fn every_line_of_a_server_is_documented_and_says_what_happened() {
    // A store that is larger than its disk would get a warning.
    let size = ("MAX_SIZE_GB", "1");
    let overrides = [("LOG__FILTER", "info,gorego=debug"), ("INSTANCE_NAMES", r#"["", "main/a"]"#), size];
    let mut server = Server::with(&overrides).await;
    let client = Client { instance: "main/a".into(), ..server.client().await };
    let mut rpcs = 0;

    let blobs = client.upload_all((0..1000).map(|n| format!("blob {n}"))).await;
    assert_eq!(client.missing(&blobs).await, []);
    rpcs += 2;
    let missing = sha256(b"never uploaded");
    assert_eq!(client.read(missing).await.unwrap_err().code(), Code::NotFound);
    rpcs += 1;

    let good = client.action(sh("echo out"), empty()).await;
    let failing = client.action(sh("exit 7"), empty()).await;
    let without_root = client.action(sh("true"), missing).await;
    let second = Some(prost_types::Duration { seconds: 1, nanos: 0 });
    let late = client.action_with(sh("sleep 7461"), empty(), |action| action.timeout = second).await;
    let endless = client.action(sh("sleep 7462"), empty()).await;
    rpcs += 5;

    let request = |action| {
        let policy = gorego_reapi::proto::reapi::ExecutionPolicy { priority: 5 };
        ExecuteRequest { execution_policy: Some(policy), ..client.request(action) }
    };
    let fresh = execute(&client, request(good)).await;
    let hit = execute(&client, request(good)).await;
    let failed = execute(&client, request(failing)).await;
    let rootless = execute(&client, request(without_root)).await;
    let timed_out = execute(&client, request(late)).await;
    let unstored = execute(&client, request(missing)).await;
    rpcs += 6;
    let mut run = client.start(endless).await;
    let cancelled = run.until(|operation| metadata(operation).stage == 3).await.name;
    let cancel = CancelOperationRequest { name: cancelled.clone() };
    client.operations.clone().cancel_operation(cancel).await.unwrap();
    run.finish().await;
    rpcs += 2;

    let lookup = GetActionResultRequest {
        instance_name: "main/a".into(),
        action_digest: Some(good.to_wire()),
        ..Default::default()
    };
    client.action_cache.clone().get_action_result(of_client(lookup)).await.unwrap();
    assert_eq!(client.cached(failing).await, None);
    rpcs += 2;
    let malformed = FindMissingBlobsRequest { blob_digests: vec![Default::default()], ..Default::default() };
    let refused = client.cas.clone().find_missing_blobs(malformed).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    rpcs += 1;

    drop(client);
    server.signal("TERM");
    assert_eq!(server.exit().await.code(), Some(0));
    eventually("the last line is read", || {
        server.log().last().is_some_and(|l| l["event"] == "server_stopped")
    })
    .await;

    let lines = conforming(&server);
    assert_eq!(lines[lines.len() - 1]["event"], "server_stopped");
    assert_eq!(one(&lines, &json!({"event": "server_stopping"}))["signal"], "SIGTERM");
    one(&lines, &json!({"event": "server_started", "listen_addr": server.address()}));
    one(&lines, &json!({"event": "store_opened", "blobs": 0}));
    let problems = lines.iter().filter(|line| line["level"] == "WARN" || line["level"] == "ERROR");
    assert_eq!(problems.collect::<Vec<_>>(), Vec::<&Line>::new());
    assert!(lines.len() < 70, "never a line for each of a thousand blobs: {} lines", lines.len());

    rpcs_are_told_once_each(&lines, rpcs, &good.to_string(), &missing.to_string());

    let ok = |exit_code: i32| json!({"grpc_code": "OK", "cached": false, "exit_code": exit_code});
    let told = [
        (&fresh, RAN, ok(0)),
        (&hit, &["operation_completed"], json!({"grpc_code": "OK", "cached": true, "exit_code": 0})),
        (&failed, RAN, ok(7)),
        (&timed_out, RAN, json!({"grpc_code": "DEADLINE_EXCEEDED", "action_digest": late.to_string()})),
        (
            &rootless,
            &["operation_queued", "operation_completed"],
            json!({"grpc_code": "FAILED_PRECONDITION"}),
        ),
        (&unstored, &["operation_completed"], json!({"grpc_code": "FAILED_PRECONDITION", "cached": false})),
    ];
    let who = json!({"instance": "main/a", "priority": 5, "invocation_id": "invocation-1",
        "target_id": "//app:hello\n", "mnemonic": "CppCompile"});
    for (operation, steps, end) in told {
        assert_eq!(with(&steps_of(&lines, operation, steps), &who).len(), steps.len(), "{operation}");
        let mut end = end;
        end["event"] = json!("operation_completed");
        one(&steps_of(&lines, operation, steps), &end);
    }
    let cancelled = steps_of(&lines, &cancelled, RAN);
    let end = one(&cancelled, &json!({"event": "operation_completed", "grpc_code": "CANCELLED"}));
    assert!(!end.contains_key("invocation_id"), "what a client does not say is absent: {end:?}");
    let rpc = one(&lines, &json!({"event": "rpc_finished", "operation": unstored, "grpc_code": "OK"}));
    assert!(!rpc.contains_key("error"), "{rpc:?}");
    let end = one(&steps_of(&lines, &unstored, &["operation_completed"]), &json!({"cached": false})).clone();
    assert!(end["error"].as_str().is_some_and(|error| error.contains(&missing.to_string())), "{end:?}");
    assert!(!end.contains_key("queue_ms") && !end.contains_key("pool"), "it waited for nothing: {end:?}");

    let completed = one(&lines, &json!({"operation": fresh, "event": "operation_completed"}));
    for timed in ["queue_ms", "fetch_ms", "run_ms", "upload_ms", "slot", "pool"] {
        assert!(completed.contains_key(timed), "{timed}: {completed:?}");
    }
    assert!(!completed.contains_key("error"));
    let cut = one(&lines, &json!({"operation": timed_out, "event": "operation_completed"}));
    assert!(cut["run_ms"].as_u64().is_some_and(|ms| (900..10_000).contains(&ms)), "{cut:?}");
    assert!(cut["error"].as_str().is_some_and(|error| error.contains("timeout")), "{cut:?}");
    let hit = one(&lines, &json!({"operation": hit, "event": "operation_completed"}));
    assert!(!hit.contains_key("run_ms") && !hit.contains_key("slot"), "somebody else's run: {hit:?}");
    let ran = with(&lines, &json!({"event": "action_finished"}));
    assert_eq!(ran.len(), 4, "fresh, failing, late, cancelled: {ran:?}");
}

/// The events of an operation that a worker ran.
const RAN: &[&str] = &["operation_queued", "operation_executing", "operation_completed"];

/// The scheduler's lines about this operation, which must be these events in this order.
fn steps_of(lines: &[Line], operation: &str, events: &[&str]) -> Vec<Line> {
    let about = json!({"target": "gorego::scheduler", "operation": operation});
    let steps: Vec<Line> = with(lines, &about).into_iter().cloned().collect();
    let told: Vec<&str> = steps.iter().map(|line| line["event"].as_str().unwrap()).collect();
    assert_eq!(told, events, "{operation}");
    steps
}

fn rpcs_are_told_once_each(lines: &[Line], rpcs: usize, good: &str, missing: &str) {
    assert_eq!(with(lines, &json!({"event": "rpc_finished"})).len(), rpcs);
    let uploads = with(
        lines,
        &json!({"method": "ContentAddressableStorage/BatchUpdateBlobs", "grpc_code": "OK", "instance": "main/a"}),
    );
    assert_eq!(uploads.len(), 6);
    assert!(uploads[0]["bytes_in"].as_u64().is_some_and(|bytes| bytes > 1000 * 70), "{:?}", uploads[0]);
    assert!(uploads[0]["peer"].as_str().is_some_and(|peer| peer.starts_with("127.0.0.1:")));
    let read = one(lines, &json!({"method": "ByteStream/Read", "grpc_code": "NOT_FOUND", "digest": missing}));
    assert!(read["error"].as_str().is_some_and(|error| error.contains(missing)), "{read:?}");
    let refused = one(
        lines,
        &json!({"method": "ContentAddressableStorage/FindMissingBlobs", "grpc_code": "INVALID_ARGUMENT"}),
    );
    assert!(refused.contains_key("error"), "{refused:?}");
    let found = json!({"method": "ActionCache/GetActionResult", "grpc_code": "OK", "cached": true,
        "action_digest": good, "invocation_id": "invocation-1", "mnemonic": "CppCompile"});
    assert!(!one(lines, &found).contains_key("error"));
    one(lines, &json!({"method": "ActionCache/GetActionResult", "grpc_code": "NOT_FOUND", "cached": false}));
    one(lines, &json!({"method": "Operations/CancelOperation", "grpc_code": "OK", "instance": "main/a"}));
    let executes = with(lines, &json!({"method": "Execution/Execute", "grpc_code": "OK"}));
    assert_eq!(executes.len(), 7);
    for execute in executes {
        let operation = execute["operation"].as_str().unwrap();
        assert!(operation.starts_with("main/a/operations/"), "the name that clients know: {operation}");
        assert!(execute.contains_key("action_digest"), "{execute:?}");
    }
}

/// If the log is not read, the server does not notice: RPCs are answered, and a shutdown works.
#[tokio::test]
async fn a_reader_that_stops_reading_stops_nothing() {
    let store = tempfile::tempdir().unwrap();
    let mut child = command(store.path()).spawn().unwrap();
    let mut unread = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    let address = loop {
        line.clear();
        assert_ne!(unread.read_line(&mut line).unwrap(), 0, "the server did not start");
        let event: Value = serde_json::from_str(&line).unwrap();
        if event["event"] == "server_started" {
            break event["listen_addr"].as_str().unwrap().to_owned();
        }
    };
    let channel = tonic::transport::Channel::from_shared(format!("http://{address}")).unwrap();
    let mut capabilities = CapabilitiesClient::new(channel.connect().await.unwrap());
    // More than a pipe of 64 KiB can hold.
    for _ in 0..600 {
        let asked = capabilities.get_capabilities(GetCapabilitiesRequest::default());
        tokio::time::timeout(PATIENCE, asked).await.expect("an answer in time").unwrap();
    }
    drop(capabilities);
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::TERM)
        .unwrap();
    let status = exit_of(&mut child, "the server ends without a reader of its log").await;
    assert_eq!(status.code(), Some(0));
}

/// The second interrupt exits immediately, but its line is written before that.
#[tokio::test]
async fn the_last_word_of_an_interrupted_server_is_written() {
    let mut server = Server::start().await;
    let client = server.client().await;
    let mut run = client.start(client.action(sh("sleep 7463"), empty()).await).await;
    run.until(|operation| metadata(operation).stage == 3).await;
    server.signal("INT");
    eventually("stopping is logged", || server.log().iter().any(|e| e["event"] == "server_stopping")).await;
    server.signal("INT");
    assert_eq!(server.exit().await.code(), Some(130));
    eventually("its line is read", || server.log().iter().any(|line| line["event"] == "server_interrupted"))
        .await;
    one(&conforming(&server), &json!({"event": "server_interrupted", "signal": "SIGINT"}));
}

/// Most requests in a flood of refused ones are only counted, because they cost their client nothing.
#[tokio::test]
async fn http_refusals_are_counted_where_there_are_too_many_to_list() {
    const REFUSED: u64 = 1_000;
    const ORDINARY: usize = 300;
    let server = Server::with(&[("HTTP__LISTEN_ADDR", "127.0.0.1:0")]).await;
    let base = format!("http://{}", server.http_address());
    let client = http_client();
    for at in 0..REFUSED {
        let request = match at % 4 {
            0 => client.get(format!("{base}/cas/no-hash")),
            1 => client.delete(format!("{base}/status")),
            2 => client.get(format!("{base}/no-such-instance/cas/{}", empty().hash_hex())),
            _ => client.get(format!("{base}/status")).header("host", "stranger.example"),
        };
        assert!(request.send().await.unwrap().status().is_client_error());
    }
    for _ in 0..ORDINARY {
        let miss = client.get(format!("{base}/cas/{}", sha256(b"absent").hash_hex()));
        assert_eq!(miss.send().await.unwrap().status(), 404);
    }
    let told = || {
        let lines = conforming(&server);
        let finished = with(&lines, &json!({"event": "http_finished"}));
        let (ordinary, refused): (Vec<&Line>, Vec<_>) =
            finished.into_iter().partition(|line| line.get("instance").is_some());
        let counted = with(&lines, &json!({"event": "http_not_listed", "peer": "127.0.0.1"}));
        let counted: u64 = counted.iter().map(|line| line["requests"].as_u64().unwrap()).sum();
        (ordinary.len(), refused.len() as u64, counted)
    };
    eventually("the log tells of every request", || {
        let (ordinary, listed, counted) = told();
        ordinary == ORDINARY && listed + counted == REFUSED
    })
    .await;
    let (_, listed, counted) = told();
    assert!(listed >= 200 && counted > 0, "{listed} were listed, {counted} were counted");
}

/// The reason why a server could not start is its last line, in the usual format.
#[tokio::test]
async fn a_server_that_cannot_start_says_why_in_its_log() {
    let server = Server::start().await;
    let output = command(server.store()).output().unwrap();
    let schema = Schema::documented();
    let lines: Vec<Line> =
        String::from_utf8(output.stderr).unwrap().lines().map(|line| schema.check(line).unwrap()).collect();
    assert_eq!(lines[lines.len() - 1]["event"], "server_failed");

    // A configuration with several faults is reported as several lines for people, and as one for programs.
    let faulty = |format: &str| {
        let mut server = command(server.store());
        server
            .env("GOREGO_LOG__FORMAT", format)
            .env("GOREGO_MAX_SIZE_GB", "0")
            .env("GOREGO_INSTANCE_NAMES", r#"["a//b"]"#);
        let output = server.output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    for format in ["auto", "json"] {
        let line = schema.check(&faulty(format)).unwrap();
        assert_eq!(line["event"], "server_failed");
        let msg = line["msg"].as_str().unwrap();
        assert!(msg.contains("max_size_gb") && msg.contains("a//b"), "{msg}");
    }
    assert!(faulty("text").starts_with("gorego: "));
}
