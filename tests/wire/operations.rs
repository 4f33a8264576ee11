//! google.longrunning.Operations: OPS-01..05.

use crate::{
    execution::running,
    support::{Server, empty, eventually, metadata, response, sh, shared_dir},
};
use gorego_reapi::proto::longrunning::{
    CancelOperationRequest, DeleteOperationRequest, GetOperationRequest, ListOperationsRequest,
    WaitOperationRequest,
};
use tonic::Code;

/// OPS-01, OPS-03.
#[tokio::test]
async fn cancelling_kills_the_command_and_ends_the_stream() {
    let server = Server::start().await;
    let client = server.client().await;
    let action = client.action(sh("sleep 7441"), empty()).await;
    let mut run = client.start(action).await;
    let name = run.until(|operation| metadata(operation).stage == 3).await.name;
    eventually("the command runs", || running("sleep 7441")).await;
    let mut operations = client.operations.clone();
    let current = operations.get_operation(GetOperationRequest { name: name.clone() }).await.unwrap();
    assert_eq!(metadata(current.get_ref()).stage, 3);
    for _ in 0..2 {
        operations.cancel_operation(CancelOperationRequest { name: name.clone() }).await.unwrap();
    }
    let status = run.finish().await.status.unwrap();
    assert_eq!(status.code, Code::Cancelled as i32);
    eventually("the command is gone", || !running("sleep 7441")).await;
    let ended = operations.get_operation(GetOperationRequest { name: name.clone() }).await.unwrap();
    assert_eq!(response(ended.get_ref()).status.unwrap().code, Code::Cancelled as i32);
    operations.delete_operation(DeleteOperationRequest { name: name.clone() }).await.unwrap();
    let gone = operations.get_operation(GetOperationRequest { name }).await.unwrap_err();
    assert_eq!(gone.code(), Code::NotFound);
}

/// OPS-04, EXE-14: the loss of a client does not stop work that other clients wait for.
#[tokio::test]
async fn cancelling_one_waiter_leaves_the_others_running() {
    let server = Server::with(&[("EXECUTION__ABANDON_GRACE", "1s")]).await;
    let client = server.client().await;
    let dir = shared_dir();
    let gate = dir.path().join("gate");
    let script = format!("until test -e {}; do sleep 0.02; done; echo whole", gate.display());
    let action = client.action(sh(&script), empty()).await;
    let survivor = client.start(action).await;
    let mut cancelled = client.start(action).await;
    let vanishing = client.start(action).await;
    let name = cancelled.next().await.unwrap().name;
    drop(vanishing);
    client.operations.clone().cancel_operation(CancelOperationRequest { name }).await.unwrap();
    assert_eq!(cancelled.finish().await.status.unwrap().code, Code::Cancelled as i32);
    std::fs::write(&gate, "").unwrap();
    let result = survivor.finish().await.result.unwrap();
    assert_eq!(client.stdout(&result).await, "whole\n");
}

/// If the host of the client is gone, its work stops after the grace period.
#[tokio::test]
async fn work_stops_when_its_last_waiter_is_gone() {
    let server = Server::with(&[("EXECUTION__ABANDON_GRACE", "1s")]).await;
    let client = server.client().await;
    let action = client.action(sh("sleep 7442"), empty()).await;
    let run = client.start(action).await;
    eventually("the command runs", || running("sleep 7442")).await;
    drop(run);
    eventually("the command is gone", || !running("sleep 7442")).await;
}

/// Filter and paging of ListOperations.
#[tokio::test]
async fn operations_are_listed_in_a_stable_order_by_page_and_filter() {
    let server =
        Server::with(&[("EXECUTION__CONCURRENCY", "1"), ("INSTANCE_NAMES", r#"["", "other"]"#)]).await;
    let client = server.client().await;
    let mut names = Vec::new();
    let mut runs = Vec::new();
    for i in 0..5 {
        let action = client.action(sh(&format!("sleep 7443; echo {i}")), empty()).await;
        let mut run = client.start(action).await;
        // The first one gets the only slot before the next one arrives.
        let stage = if i == 0 { 3 } else { 2 };
        names.push(run.until(|operation| metadata(operation).stage == stage).await.name);
        runs.push(run);
    }
    let list = |filter: &str, page_size: i32, page_token: String, name: &str| {
        let request = ListOperationsRequest {
            filter: filter.into(),
            page_size,
            page_token,
            name: name.into(),
            ..Default::default()
        };
        let mut operations = client.operations.clone();
        async move { operations.list_operations(request).await.map(tonic::Response::into_inner) }
    };
    let (mut listed, mut token) = (Vec::new(), String::new());
    loop {
        let page = list("", 2, token, "operations").await.unwrap();
        assert!(page.operations.len() <= 2);
        listed.extend(page.operations.into_iter().map(|operation| operation.name));
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(listed, names);
    let queued = list("stage=QUEUED done=false", 0, String::new(), "").await.unwrap();
    assert_eq!(queued.operations.len(), 4);
    assert_eq!(list("", 0, String::new(), "other/operations").await.unwrap().operations, []);
    for (filter, token) in [("colour=red", ""), ("stage=NOWHERE", ""), ("", "garbled")] {
        let status = list(filter, 0, token.into(), "").await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{filter}{token}");
    }
}

/// OPS-05.
#[tokio::test]
async fn waiting_for_an_operation_ends_with_it_or_with_the_timeout() {
    let server = Server::start().await;
    let client = server.client().await;
    let dir = shared_dir();
    let gate = dir.path().join("gate");
    let script = format!("until test -e {}; do sleep 0.02; done", gate.display());
    let mut run = client.start(client.action(sh(&script), empty()).await).await;
    let name = run.next().await.unwrap().name;
    let wait = |millis: i32| {
        let timeout = Some(prost_types::Duration { seconds: 0, nanos: millis * 1_000_000 });
        let request = WaitOperationRequest { name: name.clone(), timeout };
        let mut operations = client.operations.clone();
        async move { operations.wait_operation(request).await.unwrap().into_inner() }
    };
    assert!(!wait(50).await.done);
    let waiting = tokio::spawn(wait(999));
    std::fs::write(&gate, "").unwrap();
    run.finish().await;
    let ended = waiting.await.unwrap();
    assert!(ended.done || wait(999).await.done);
}
