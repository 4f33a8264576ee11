//! Fairness with untrusted metadata: an address queues thousands of actions, each with the most urgent priority and its
//! own build id.

use crate::{
    harness::{Bystander, assert_memory_is_bounded, connect_from},
    support::{Client, Run, Server, empty, metadata, sh},
};
use gorego_reapi::proto::reapi::{ExecutionPolicy, RequestMetadata};
use prost::Message as _;
use std::time::{Duration, Instant};
use tonic::{Code, Request, metadata::MetadataValue};

/// Number of actions that the hostile client queues.
const ACTIONS: usize = 3_000;
/// Run time of each of them.
const RUN_TIME: &str = "0.2";
/// How long the single action of the other peer may wait: two runs, and a margin for a busy machine. In order of
/// arrival it would wait five minutes.
const FAIR_WAIT: Duration = Duration::from_secs(15);

/// Starts an Execute with this metadata.
async fn start(client: &Client, script: &str, invocation: &str, priority: i32) -> Result<Run, tonic::Status> {
    let action = client.action_with(sh(script), empty(), |action| action.do_not_cache = true).await;
    let policy = ExecutionPolicy { priority };
    let mut request = Request::new(gorego_reapi::proto::reapi::ExecuteRequest {
        execution_policy: Some(policy),
        ..client.request(action)
    });
    let said =
        RequestMetadata { tool_invocation_id: invocation.into(), ..Default::default() }.encode_to_vec();
    let name = "build.bazel.remote.execution.v2.requestmetadata-bin";
    request.metadata_mut().insert_bin(name, MetadataValue::from_bytes(&said));
    Ok(Run(client.execution.clone().execute(request).await?.into_inner()))
}

async fn waits(client: &Client, priority: i32) -> Duration {
    let begin = Instant::now();
    let run = start(client, "true", "bystander", priority).await.unwrap();
    let response = run.finish().await;
    assert_eq!(response.status.unwrap_or_default().code, Code::Ok as i32);
    begin.elapsed()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_urgent_builds_does_not_hold_up_a_single_action_of_another_peer() {
    let server = Server::with(&[("EXECUTION__CONCURRENCY", "2")]).await;
    let bystander = Bystander::beside(&server).await;
    let hostile = Client::over(connect_from("127.0.0.1", &server).await);
    let mut flood = Vec::new();
    for number in 0..ACTIONS {
        let script = format!("sleep {RUN_TIME}");
        flood.push(start(&hostile, &script, &format!("build {number}"), i32::MIN).await.unwrap());
    }
    flood[0].until(|operation| metadata(operation).stage >= 3).await;
    let other = Client::over(connect_from("127.0.0.2", &server).await);
    for priority in [0, 0, -3, 0] {
        let waited = waits(&other, priority).await;
        assert!(waited < FAIR_WAIT, "{waited:?}");
    }
    // Low-priority work is not starved; it waits until its age outweighs its priority.
    let mut yielding = start(&other, "true", "nightly", 50).await.unwrap();
    assert_eq!(metadata(&yielding.next().await.unwrap()).stage, 2);
    drop((flood, yielding));
    bystander.leave().await;
    assert_memory_is_bounded(&server);
}

/// GEN-21: places in the queue are shared like slots.
#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_fills_the_queue_with_builds_of_one_action_leaves_room_to_another() {
    let limits = [("EXECUTION__CONCURRENCY", "1"), ("EXECUTION__QUEUE_SIZE", "90")];
    let server = Server::with(&limits).await;
    let hostile = Client::over(connect_from("127.0.0.1", &server).await);
    let mut flood = Vec::new();
    let refusal = loop {
        match start(&hostile, "sleep 1", &format!("build {}", flood.len()), 0).await {
            Ok(run) => flood.push(run),
            Err(status) => break status,
        }
        assert!(flood.len() <= 90, "the queue has no end");
    };
    assert_eq!(refusal.code(), Code::ResourceExhausted);
    assert!(refusal.message().contains("your address has its share"), "{refusal}");
    let other = Client::over(connect_from("127.0.0.2", &server).await);
    let waited = waits(&other, 0).await;
    assert!(waited < FAIR_WAIT, "{waited:?}");
}
