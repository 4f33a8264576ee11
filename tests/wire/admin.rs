//! Administration: `gorego ops`, `gorego store`, and the Admin service behind them.

use crate::{
    execution::running,
    support::{Client, Run, Server, empty, eventually, http_client, metadata, sh, sh_with, shared_dir},
};
use gorego_client::stubs::AdminClient;
use gorego_reapi::{
    digest::Digest,
    proto::{
        gorego,
        reapi::{ActionResult, ExecuteRequest, RequestMetadata, UpdateActionResultRequest},
    },
};
use prost::Message as _;
use serde_json::Value;
use std::process::{Command, Output, Stdio};
use tonic::{Code, Request, metadata::MetadataValue};

/// Runs the binary as a client of this server.
pub(crate) async fn gorego(server: &Server, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gorego"));
    command.args(args).env_clear().env("GOREGO_ENDPOINT", server.endpoint()).stdin(Stdio::null());
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

/// Like [`gorego`], and parses the JSON on standard output.
async fn json(server: &Server, args: &[&str]) -> Value {
    let output = gorego(server, args).await;
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Starts an action for a build.
async fn start_for(client: &Client, build: &str, action: Digest) -> Run {
    let metadata = RequestMetadata {
        tool_invocation_id: build.into(),
        target_id: "//app:hello".into(),
        action_mnemonic: "CppCompile".into(),
        ..Default::default()
    };
    let mut request = Request::new(client.request(action));
    let value = MetadataValue::from_bytes(&metadata.encode_to_vec());
    request.metadata_mut().insert_bin("build.bazel.remote.execution.v2.requestmetadata-bin", value);
    Run(client.execution.clone().execute(request).await.unwrap().into_inner())
}

#[tokio::test]
async fn operations_are_listed_with_whose_they_are_and_can_be_cancelled_by_the_beginning_of_their_id() {
    let server = Server::with(&[("EXECUTION__CONCURRENCY", "1")]).await;
    let client = server.client().await;
    let mut first = start_for(&client, "build-1", client.action(sh("sleep 7461"), empty()).await).await;
    first.until(|operation| metadata(operation).stage == 3).await;
    eventually("the command runs", || running("sleep 7461")).await;
    let mut second = start_for(&client, "build-2", client.action(sh("sleep 7462"), empty()).await).await;
    let queued = second.until(|operation| metadata(operation).stage == 2).await.name;

    let list = json(&server, &["ops", "list", "--json"]).await;
    let listed = list["operations"].as_array().unwrap();
    assert_eq!((listed.len(), &list["truncated"]), (2, &Value::Bool(false)));
    let running_one = &listed[0];
    for (key, value) in [
        ("state", "running"),
        ("pool", "local"),
        ("action_mnemonic", "CppCompile"),
        ("target_id", "//app:hello"),
        ("invocation_id", "build-1"),
        ("principal", "anonymous"),
        ("peer", "127.0.0.1"),
    ] {
        assert_eq!(running_one[key], value, "{key}");
    }
    assert_eq!((&listed[1]["state"], &listed[1]["name"]), (&"queued".into(), &queued.as_str().into()));
    let of_one = json(&server, &["ops", "list", "--json", "--invocation", "build-2"]).await;
    assert_eq!(of_one["operations"].as_array().unwrap().len(), 1);
    let table = text(&gorego(&server, &["ops", "list"]).await.stdout);
    let id = queued.rsplit('/').next().unwrap();
    assert_eq!(table.lines().count(), 3, "{table}");
    assert!(table.starts_with("OPERATION") && table.contains(&id[..8]) && table.contains("//app:hello"));

    let shown = text(&gorego(&server, &["ops", "show", &id[..8]]).await.stdout);
    assert!(shown.contains("waits") && shown.contains("build-2"), "{shown}");

    // With a filter, it only shows what it would do, unless `--yes` is given.
    let dry = gorego(&server, &["ops", "cancel", "--invocation", "build-1"]).await;
    assert!(dry.status.success() && text(&dry.stderr).contains("--yes"));
    assert!(running("sleep 7461"));
    let cancelled = gorego(&server, &["ops", "cancel", &id[..8]]).await;
    assert_eq!(text(&cancelled.stdout), format!("cancelled {queued}\n"));
    assert_eq!(second.finish().await.status.unwrap().code, Code::Cancelled as i32);
    let cancelled = gorego(&server, &["ops", "cancel", "--invocation", "build-1", "--yes"]).await;
    assert!(cancelled.status.success());
    assert_eq!(first.finish().await.status.unwrap().code, Code::Cancelled as i32);

    let mut third = start_for(&client, "build-3", client.action(sh("true"), empty()).await).await;
    let ended = third.until(|operation| operation.done).await.name;
    let late = gorego(&server, &["ops", "cancel", &ended, &queued]).await;
    assert_eq!(late.status.code(), Some(1));
    assert!(text(&late.stderr).contains(&format!("{ended} has already ended")), "{}", text(&late.stderr));
    assert_eq!(text(&late.stdout), format!("cancelled {queued}\n"), "it has been cancelled before");

    let unknown = gorego(&server, &["ops", "cancel", "ffffffff"]).await;
    assert_eq!(unknown.status.code(), Some(1));
    assert!(text(&unknown.stderr).contains("no operation"));
}

#[tokio::test]
async fn a_watched_operation_is_followed_to_its_end() {
    let server = Server::start().await;
    let client = server.client().await;
    let dir = shared_dir();
    let gate = dir.path().join("gate");
    let script = format!("until test -e {}; do sleep 0.02; done; exit 3", gate.display());
    let mut run = start_for(&client, "b", client.action(sh(&script), empty()).await).await;
    let name = run.until(|operation| metadata(operation).stage == 3).await.name;
    let mut command = Command::new(env!("CARGO_BIN_EXE_gorego"));
    command.args(["ops", "watch", "--json", &name]).env_clear().env("GOREGO_ENDPOINT", server.endpoint());
    let child = command.stdout(Stdio::piped()).stdin(Stdio::null()).spawn().unwrap();
    // It asks the server periodically while it watches.
    eventually("the operation is watched", || {
        server.log().iter().any(|line| {
            line["event"] == "rpc_finished"
                && line["method"].as_str().is_some_and(|method| method.ends_with("/WaitOperation"))
        })
    })
    .await;
    std::fs::write(&gate, "").unwrap();
    let output = tokio::task::spawn_blocking(move || child.wait_with_output().unwrap()).await.unwrap();
    assert_eq!(output.status.code(), Some(1), "the action failed");
    let lines: Vec<Value> =
        text(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.len() >= 2, "{lines:?}");
    let last = lines.last().unwrap();
    assert_eq!((&last["state"], &last["exit_code"]), (&"completed".into(), &3.into()));
    assert_eq!(last["target_id"], "//app:hello");
    run.finish().await;
}

#[tokio::test]
async fn the_store_tells_its_numbers() {
    let server = Server::start().await;
    let client = server.client().await;
    client.upload("seven..").await;
    client.run_command(sh("echo hello")).await;
    let stats = json(&server, &["store", "stats", "--json"]).await;
    assert!(stats["blobs"].as_u64().unwrap() >= 4 && stats["results"] == 1, "{stats}");
    assert!(stats["used_bytes"].as_u64() <= stats["max_bytes"].as_u64());
    assert!(stats["oldest_use"].is_string() && stats["staged_trees"]["max_bytes"].is_u64(), "{stats}");
    assert_eq!((&stats["images"], &stats["evicted_entries"]), (&Value::Null, &0.into()));
    let words = text(&gorego(&server, &["store", "stats"]).await.stdout);
    assert!(words.contains("blobs") && words.contains("evicted"), "{words}");
}

async fn purge(client: &Client, request: gorego::PurgeResultsRequest) -> gorego::PurgeResultsResponse {
    AdminClient::new(client.channel.clone()).purge_results(request).await.unwrap().into_inner()
}

/// A result that an administrator removes does not come back, even if the server is killed right after the answer.
#[tokio::test]
async fn a_purge_shows_what_it_would_remove_and_removes_it_for_good() {
    let server = Server::start().await;
    let client = server.client().await;
    let mut actions = Vec::new();
    for (build, script) in [("bad", "echo 1"), ("bad", "echo 2"), ("good", "echo 3")] {
        let action = client.action(sh(script), empty()).await;
        start_for(&client, build, action).await.finish().await;
        actions.push(action);
    }
    let dry = gorego(&server, &["store", "purge", "--invocation", "bad", "--json"]).await;
    let lines: Vec<Value> =
        text(&dry.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 3, "{lines:?}");
    assert_eq!(lines[0]["result"]["principal"], "anonymous");
    assert_eq!(lines[2]["summary"]["results"], 2);
    assert_eq!(lines[2]["summary"]["removed"], false);
    assert!(client.cached(actions[0]).await.is_some(), "nothing is removed without --yes");

    let removed = gorego(&server, &["store", "purge", "--invocation", "bad", "--yes"]).await;
    assert!(text(&removed.stderr).contains("2 removed"), "{}", text(&removed.stderr));
    let find = |event| server.log().into_iter().rfind(|line| line["event"] == event);
    eventually("the purge is logged", || find("results_purged").is_some() && find("admin_request").is_some())
        .await;
    let purged = find("results_purged").unwrap();
    assert_eq!(purged["entries"], 2);
    let audit = find("admin_request").unwrap();
    assert_eq!((&audit["method"], &audit["principal"]), (&"PurgeResults".into(), &"anonymous".into()));
    let server = Server::on(server.kill().await, &[]).await;
    let client = server.client().await;
    assert!(client.cached(actions[0]).await.is_none() && client.cached(actions[1]).await.is_none());
    assert!(client.cached(actions[2]).await.is_some());
}

#[tokio::test]
async fn a_purge_keeps_to_its_instance_and_its_conditions() {
    let server = Server::with(&[("INSTANCE_NAMES", r#"["", "other"]"#)]).await;
    let client = server.client().await;
    let other = Client { instance: "other".into(), ..client.clone() };
    let action = client.action(sh("echo x"), empty()).await;
    let again = other.action(sh("echo x"), empty()).await;
    let result = client.run(action).await.result.unwrap();
    other.run(again).await;
    let worker = result.execution_metadata.unwrap().worker;
    let (host, _) = worker.rsplit_once('/').unwrap();

    let all = |request| gorego::PurgeResultsRequest { since: Some(Default::default()), ..request };
    let found = purge(&client, all(Default::default())).await;
    assert_eq!((found.results.len(), found.examined), (1, 1));
    assert_eq!(found.results[0].worker, worker);
    for (request, count) in [
        (gorego::PurgeResultsRequest { worker: host.into(), ..Default::default() }, 1),
        (gorego::PurgeResultsRequest { worker: worker.clone(), ..Default::default() }, 1),
        (gorego::PurgeResultsRequest { worker: host[..host.len() - 1].into(), ..Default::default() }, 0),
        (gorego::PurgeResultsRequest { principal: "anonymous".into(), ..Default::default() }, 1),
        (gorego::PurgeResultsRequest { principal: "token:ci".into(), ..Default::default() }, 0),
        (gorego::PurgeResultsRequest { action_digest: Some(action.to_wire()), ..Default::default() }, 1),
        (
            gorego::PurgeResultsRequest {
                action_digest: Some(action.to_wire()),
                invocation_id: "another".into(),
                ..Default::default()
            },
            0,
        ),
    ] {
        assert_eq!(purge(&client, request.clone()).await.results.len(), count, "{request:?}");
    }
    let mut admin = AdminClient::new(client.channel.clone());
    for request in [
        gorego::PurgeResultsRequest::default(),
        gorego::PurgeResultsRequest { page_size: -1, ..all(Default::default()) },
        gorego::PurgeResultsRequest { page_token: "1-0".into(), ..all(Default::default()) },
        gorego::PurgeResultsRequest { instance_name: "nope".into(), ..all(Default::default()) },
    ] {
        let status = admin.purge_results(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    }
    let removed =
        purge(&client, gorego::PurgeResultsRequest { remove: true, ..all(Default::default()) }).await;
    assert_eq!(removed.results.len(), 1);
    assert!(client.cached(action).await.is_none());
    assert!(other.cached(again).await.is_some(), "other instances are not touched");
}

/// Different outputs of one action are reported, also after a restart, and the later result is served.
#[tokio::test]
async fn an_action_with_different_outputs_is_reported_and_not_silently_overwritten() {
    let mut server = Server::start().await;
    let client = server.client().await;
    let action = client.action(sh_with("date +%N > now; echo same > same", &["now", "same"]), empty()).await;
    let first = client.run(action).await.result.unwrap();
    let request = ExecuteRequest { skip_cache_lookup: true, ..client.request(action) };
    let second = client.start_request(request).await.unwrap().finish().await.result.unwrap();
    assert_ne!(client.output(&first, "now").await, client.output(&second, "now").await);
    assert_eq!(client.cached(action).await.unwrap().output_files, second.output_files);
    let list = async |server: &Server| json(server, &["store", "nondeterminism", "--json"]).await;
    let reported = list(&server).await;
    let report = &reported["reports"][0];
    assert_eq!((&report["times"], &report["differing_outputs"]), (&1.into(), &1.into()), "{reported}");
    assert_eq!(report["outputs"][0]["path"], "now");
    assert_eq!(report["later"]["action_digest"], action.to_string());
    let logged = server.logged("outputs_differ").await;
    assert_eq!(logged["action_digest"], action.to_string());
    let words = text(&gorego(&server, &["store", "nondeterminism"]).await.stdout);
    assert!(words.contains("differing outputs: 1;") && words.contains("  now\n"), "{words}");
    server.signal("TERM");
    server.exit().await;
    let server = Server::on(server.shared_store(), &[]).await;
    assert_eq!(list(&server).await, reported);
}

/// With `client_results`: a client's own result is found over both protocols, and by Execute.
#[tokio::test]
async fn results_of_clients_can_be_private_or_refused() {
    let instances = r#"{ "own" = { client_results = "private" }, "none" = { client_results = "refused" } }"#;
    let server = Server::with(&[("INSTANCES", instances), ("HTTP__LISTEN_ADDR", "127.0.0.1:0")]).await;
    let own = Client { instance: "own".into(), ..server.client().await };
    let none = Client { instance: "none".into(), ..own.clone() };
    let result = ActionResult { stdout_raw: "claimed".into(), ..Default::default() };
    let update = async |client: &Client, action: Digest| {
        let request = UpdateActionResultRequest {
            instance_name: client.instance.clone(),
            action_digest: Some(action.to_wire()),
            action_result: Some(result.clone()),
            ..Default::default()
        };
        client.action_cache.clone().update_action_result(request).await
    };
    let action = own.action(sh("echo run"), empty()).await;
    update(&own, action).await.unwrap();
    assert_eq!(own.stdout(&own.cached(action).await.unwrap()).await, "claimed");
    let executed = own.run(action).await;
    assert!(executed.cached_result);
    let url = format!("http://{}/own/ac/{}", server.http_address(), action.hash_hex());
    let over_http = http_client().get(&url).send().await.unwrap();
    assert_eq!(over_http.status(), 200);
    let purged = purge(
        &own,
        gorego::PurgeResultsRequest {
            instance_name: "own".into(),
            action_digest: Some(action.to_wire()),
            remove: true,
            ..Default::default()
        },
    )
    .await;
    assert!(purged.results.len() == 1 && purged.results[0].is_private, "{purged:?}");
    assert!(own.cached(action).await.is_none());
    assert!(
        !own.run(action).await.cached_result && own.cached(action).await.is_some(),
        "what ran is for all"
    );

    let refused = update(&none, action).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert!(refused.message().contains("client_results"), "{refused}");
}

/// Each page continues where the previous one has ended, until every result was examined once.
#[tokio::test]
async fn a_purge_of_many_results_goes_page_by_page() {
    const RESULTS: usize = 700;
    let server = Server::start().await;
    let client = server.client().await;
    let mut action_cache = client.action_cache.clone();
    for number in 0..RESULTS {
        let action = client.function.digest(format!("action {number}").as_bytes());
        let request = UpdateActionResultRequest {
            action_digest: Some(action.to_wire()),
            action_result: Some(Default::default()),
            ..Default::default()
        };
        action_cache.update_action_result(request).await.unwrap();
    }
    let mut request = gorego::PurgeResultsRequest {
        principal: "anonymous".into(),
        page_size: 100,
        remove: true,
        ..Default::default()
    };
    let (mut pages, mut removed, mut examined) = (0, 0, 0);
    loop {
        let page = purge(&client, request.clone()).await;
        pages += 1;
        removed += page.results.len();
        examined += page.examined;
        request.page_token = page.next_page_token;
        if request.page_token.is_empty() {
            break;
        }
    }
    assert!(pages > 1);
    assert_eq!((removed, examined), (RESULTS, RESULTS as i64));
    // None of them comes back.
    let server = Server::on(server.kill().await, &[]).await;
    request.remove = false;
    assert_eq!(purge(&server.client().await, request).await.examined, 0);
}
