//! Pools, fairness between builds, and the reported reasons for waiting: EXE-11, EXE-31, OPS-01, CAP-18.

use crate::support::{Client, Run, Server, empty, eventually, metadata, sh, shared_dir};
use gorego_reapi::{
    digest::Digest,
    proto::{
        gorego::QueueStatus,
        longrunning::{GetOperationRequest, ListOperationsRequest, Operation},
        reapi::{Platform, RequestMetadata, platform::Property},
        rpc,
    },
};
use prost::Message as _;
use std::{fs, path::Path};
use tonic::{Code, Request, metadata::MetadataValue};

const POOLS: &str = r#"{
    plain = { slots = 1, properties = { OSFamily = "linux", cores = { minimum = 4 } } },
    gpu = { slots = 1, properties = { OSFamily = "linux", cores = { minimum = 16 }, gpu = ["a100", "h100"] } },
}"#;

async fn asking(client: &Client, script: &str, platform: &[(&str, &str)]) -> Digest {
    let property = |(name, value): &(&str, &str)| Property { name: (*name).into(), value: (*value).into() };
    let properties = platform.iter().map(property).collect();
    client.action_with(sh(script), empty(), |action| action.platform = Some(Platform { properties })).await
}

fn until(gate: &Path) -> String {
    format!("until test -e {}; do sleep 0.02; done", gate.display())
}

fn queue_status(operation: &Operation) -> Option<QueueStatus> {
    let known = metadata(operation).partial_execution_metadata?;
    gorego_reapi::auxiliary::queue_status(&known.auxiliary_metadata)
}

/// EXE-31.
#[tokio::test]
async fn an_action_runs_in_a_pool_that_offers_what_it_asks_for_or_is_told_which_comes_nearest() {
    let server = Server::with(&[("EXECUTION__POOLS", &POOLS.replace('\n', " "))]).await;
    let client = server.client().await;
    for (platform, worker) in [
        (&[("OSFamily", "Linux")][..], "/plain/0"),
        (&[("cores", "4"), ("cache-silo-key", "x")], "/plain/0"),
        (&[("gpu", "h100"), ("cores", "5")], "/gpu/0"),
    ] {
        let action = asking(&client, "true", platform).await;
        let metadata = client.run(action).await.result.unwrap().execution_metadata.unwrap();
        assert!(metadata.worker.ends_with(worker), "{platform:?}: {}", metadata.worker);
    }
    let action = asking(&client, "true", &[("gpu", "tpu"), ("cores", "5")]).await;
    let status = client.start_request(client.request(action)).await.err().unwrap();
    assert_eq!(status.code(), Code::FailedPrecondition);
    for part in
        ["the nearest, \"gpu\", differs in gpu (asked for \"tpu\", offered \"a100\" or \"h100\")", "cores"]
    {
        assert_eq!(status.message().contains(part), part != "cores", "{part} in {status}");
    }
    let details = rpc::Status::decode(status.details()).unwrap_or_default().details;
    assert!(details.is_empty(), "no client may take it for missing blobs: {details:?}");
}

/// EXE-11, OPS-01: a configured pool that is busy.
#[tokio::test]
async fn an_operation_that_waits_says_in_which_pool_at_which_position_and_why() {
    let server = Server::with(&[("EXECUTION__POOLS", &POOLS.replace('\n', " "))]).await;
    let client = server.client().await;
    let dir = shared_dir();
    let gate = dir.path().join("gate");
    let special = [("gpu", "a100")];
    let mut running = client.start(asking(&client, &until(&gate), &special).await).await;
    let ran = running.until(|operation| metadata(operation).stage == 3).await;
    let worker = metadata(&ran).partial_execution_metadata.unwrap().worker;
    assert!(worker.ends_with("/gpu/0"), "{worker}");
    let _first = client.start(asking(&client, "echo 1", &special).await).await;
    let mut second = client.start(asking(&client, "echo 2", &special).await).await;
    // The stream reports it without a request.
    let told = second.until(|operation| queue_status(operation).is_some()).await;
    let mut operations = client.operations.clone();
    let mut status = queue_status(&told).unwrap();
    while status.position == 0 {
        let asked = operations.get_operation(GetOperationRequest { name: told.name.clone() }).await.unwrap();
        status = queue_status(asked.get_ref()).unwrap();
    }
    assert_eq!((status.pool.as_str(), status.position, status.waiting), ("gpu", 2, 2));
    assert_eq!((status.busy_slots, status.slots), (1, 1));
    assert!(status.reason.contains("1 of 1 slots of pool \"gpu\" are busy"), "{}", status.reason);

    let list = |filter: String| {
        let request = ListOperationsRequest { filter, ..Default::default() };
        let mut operations = client.operations.clone();
        async move { operations.list_operations(request).await.map(|page| page.into_inner().operations.len()) }
    };
    assert_eq!(list("pool=gpu stage=QUEUED".into()).await.unwrap(), 2);
    assert_eq!(list("pool=plain".into()).await.unwrap(), 0);
    assert_eq!(list(format!("worker={worker} AND instance=\"\"")).await.unwrap(), 1);
    assert_eq!(list("pool=nope".into()).await.unwrap_err().code(), Code::InvalidArgument);

    // The other pool is free and stays so for actions that need no more.
    let plain = asking(&client, "true", &[]).await;
    assert!(client.run(plain).await.result.unwrap().execution_metadata.unwrap().worker.ends_with("/plain/0"));
    fs::write(&gate, "").unwrap();
    let done = second.until(|operation| operation.done).await;
    assert_eq!(queue_status(&done), None);
    drop(running);
}

/// A client of one run of a build tool.
async fn start_of(client: &Client, invocation: &str, action: Digest) -> Run {
    let metadata = RequestMetadata { tool_invocation_id: invocation.into(), ..Default::default() };
    let mut request = Request::new(client.request(action));
    let value = MetadataValue::from_bytes(&metadata.encode_to_vec());
    request.metadata_mut().insert_bin("build.bazel.remote.execution.v2.requestmetadata-bin", value);
    Run(client.execution.clone().execute(request).await.unwrap().into_inner())
}

#[tokio::test]
async fn a_big_build_does_not_starve_a_small_one() {
    let server = Server::with(&[("EXECUTION__CONCURRENCY", "1")]).await;
    let client = server.client().await;
    let dir = shared_dir();
    let gate = dir.path().join("gate");
    let mut big = vec![start_of(&client, "big", client.action(sh(&until(&gate)), empty()).await).await];
    for i in 0..40 {
        big.push(start_of(&client, "big", client.action(sh(&format!("echo {i}")), empty()).await).await);
    }
    let mut small = Vec::new();
    for i in 0..3 {
        small.push(
            start_of(&client, "small", client.action(sh(&format!("echo small {i}")), empty()).await).await,
        );
    }
    fs::write(&gate, "").unwrap();
    for run in small.into_iter().chain(big) {
        assert_eq!(run.finish().await.result.unwrap().exit_code, 0);
    }
    let is_executing = |line: &serde_json::Value| line["event"] == "operation_executing";
    eventually("all are logged", || server.log().iter().filter(|line| is_executing(line)).count() == 44)
        .await;
    let order: Vec<_> =
        server.log().iter().filter(|l| is_executing(l)).map(|l| l["invocation_id"].clone()).collect();
    let last = order.iter().rposition(|invocation| invocation == "small").unwrap();
    assert!(last <= 7, "with two builds, each gets every second turn: {order:?}");
}
