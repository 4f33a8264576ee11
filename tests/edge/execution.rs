//! Execution and google.longrunning.Operations with a scripted scheduler.

use crate::harness::{Die, Refuse, Server, Show, absent, completed, digest, executing};
use crate::support::eventually_async;
use gorego_reapi::{
    auxiliary::queue_status,
    error::Error,
    proto::{
        gorego::QueueStatus,
        longrunning::{
            CancelOperationRequest, DeleteOperationRequest, GetOperationRequest, ListOperationsRequest,
            Operation, WaitOperationRequest, operation,
        },
        reapi::{
            ActionResult, ExecuteOperationMetadata, ExecuteRequest, ExecuteResponse, WaitExecutionRequest,
            execution_stage,
        },
        rpc,
    },
};
use prost::Message as _;
use std::time::Duration;
use tonic::{Code, Streaming};

fn execute() -> ExecuteRequest {
    let action_digest = Some(digest(b"action"));
    ExecuteRequest { instance_name: "a/b/c".into(), action_digest, ..Default::default() }
}

fn stage(operation: &Operation) -> execution_stage::Value {
    let any = operation.metadata.as_ref().unwrap();
    let metadata = ExecuteOperationMetadata::decode(any.value.as_slice()).unwrap();
    assert_eq!(metadata.action_digest, Some(digest(b"action")));
    metadata.stage()
}

fn response(operation: &Operation) -> ExecuteResponse {
    assert!(operation.done);
    let Some(operation::Result::Response(any)) = &operation.result else { panic!("{operation:?}") };
    ExecuteResponse::decode(any.value.as_slice()).unwrap()
}

async fn next(stream: &mut Streaming<Operation>) -> Operation {
    stream.message().await.unwrap().unwrap()
}

/// EXE-01 to EXE-05, EXE-07, EXE-08, EXE-12, EXE-59.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_shows_each_state_and_ends_well_after_the_result() {
    let server = Server::start().await;
    server.store(&[b"said"]).await;
    let mut other = server.cas.clone();
    let request = gorego_reapi::proto::reapi::BatchUpdateBlobsRequest {
        instance_name: "a/b/c".into(),
        requests: vec![gorego_reapi::proto::reapi::batch_update_blobs_request::Request {
            digest: Some(digest(b"said")),
            data: "said".into(),
            compressor: 0,
        }],
        ..Default::default()
    };
    other.batch_update_blobs(request).await.unwrap();

    let request = ExecuteRequest { inline_stdout: true, ..execute() };
    let mut stream = server.execution.clone().execute(request).await.unwrap().into_inner();
    let first = next(&mut stream).await;
    assert_eq!(stage(&first), execution_stage::Value::Queued);
    assert!(first.name.starts_with("a/b/c/operations/"));
    let name = first.name.clone();
    let request = WaitExecutionRequest { name: name.clone() };
    let mut joined = server.execution.clone().wait_execution(request.clone()).await.unwrap().into_inner();
    assert_eq!(next(&mut joined).await.name, name);

    assert_eq!(server.scheduler.send(Show(executing())).await.unwrap(), 2);
    for stream in [&mut stream, &mut joined] {
        let operation = next(stream).await;
        assert_eq!((stage(&operation), operation.done), (execution_stage::Value::Executing, false));
    }
    let result = ActionResult { exit_code: 7, stdout_digest: Some(digest(b"said")), ..Default::default() };
    server.scheduler.send(Show(completed(Some(result), None))).await.unwrap();
    let late = server.execution.clone().wait_execution(request).await.unwrap().into_inner();
    for mut stream in [stream, joined, late] {
        let operation = next(&mut stream).await;
        assert_eq!(stage(&operation), execution_stage::Value::Completed);
        assert_eq!(operation.name, name);
        let response = response(&operation);
        let result = response.result.unwrap();
        assert_eq!((response.status.unwrap().code, result.exit_code), (0, 7));
        assert_eq!(&result.stdout_raw[..], b"said");
        assert!(stream.message().await.unwrap().is_none());
    }
}

/// EXE-22 to EXE-26: 500 missing blobs do not fit into trailers, so they are reported in a final Operation.
#[tokio::test(flavor = "multi_thread")]
async fn missing_blobs_are_reported_inside_a_final_operation() {
    let server = Server::start().await;
    let missing: Vec<_> = (0..500).map(absent).collect();
    let mut stream = server.execution.clone().execute(execute()).await.unwrap().into_inner();
    next(&mut stream).await;
    let end = completed(None, Some(Error::MissingBlobs(missing.clone())));
    server.scheduler.send(Show(end)).await.unwrap();
    let operation = next(&mut stream).await;
    assert_eq!(stage(&operation), execution_stage::Value::Completed);
    let status = response(&operation).status.unwrap();
    assert_eq!((status.code, status.details.len()), (Code::FailedPrecondition as i32, 1));
    let failure = rpc::PreconditionFailure::decode(status.details[0].value.as_slice()).unwrap();
    let subjects: Vec<_> = failure.violations.into_iter().map(|violation| violation.subject).collect();
    assert_eq!(subjects, missing.iter().map(|digest| digest.blob_name()).collect::<Vec<_>>());
    assert!(stream.message().await.unwrap().is_none());
}

/// EXE-09, GEN-05, GEN-14, GEN-17, GEN-21.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_before_the_operation_exists_is_a_status_of_the_call() {
    let server = Server::start().await;
    for bad in [
        ExecuteRequest { instance_name: "nope".into(), ..execute() },
        ExecuteRequest { action_digest: None, ..execute() },
        ExecuteRequest { digest_function: 10, ..execute() },
    ] {
        let status = server.execution.clone().execute(bad).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
    }
    let full =
        Error::Exhausted { message: "the queue is full".into(), retry_after: Some(Duration::from_secs(2)) };
    server.scheduler.send(Refuse(full)).await.unwrap();
    let status = server.execution.clone().execute(execute()).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    let details = rpc::Status::decode(status.details()).unwrap();
    assert_eq!((details.code, details.message.as_str()), (status.code() as i32, status.message()));
    let retry = rpc::RetryInfo::decode(details.details[0].value.as_slice()).unwrap();
    assert_eq!(retry.retry_delay.unwrap().seconds, 2);
}

/// EXE-10, EXE-13.
#[tokio::test(flavor = "multi_thread")]
async fn when_the_scheduler_goes_away_streams_end_unavailable() {
    let server = Server::start().await;
    let mut stream = server.execution.clone().execute(execute()).await.unwrap().into_inner();
    next(&mut stream).await;
    let id = "operations/6ba7b810-9dad-11d1-80b4-00c04fd430c8";
    for name in ["operations/1", "nonsense", id, &format!("a/b/c/{id}"), &format!("nope/{id}")] {
        let unknown = WaitExecutionRequest { name: name.into() };
        let status = server.execution.clone().wait_execution(unknown).await.unwrap_err();
        assert_eq!(status.code(), Code::NotFound, "{name}");
    }
    server.scheduler.send(Die).await.unwrap();
    assert_eq!(stream.message().await.unwrap_err().code(), Code::Unavailable);
    let status = server.execution.clone().execute(execute()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
}

/// A client that disconnects releases its subscription, so that abandoned work is noticed.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_is_no_longer_counted_as_waiting() {
    let server = Server::start().await;
    let mut stream = server.execution.clone().execute(execute()).await.unwrap().into_inner();
    next(&mut stream).await;
    assert_eq!(server.scheduler.send(Show(executing())).await.unwrap(), 1);
    drop(stream);
    eventually_async("nobody waits", || async {
        server.scheduler.send(Show(executing())).await.unwrap() == 0
    })
    .await;
}

/// OPS-01, OPS-03, OPS-05.
#[tokio::test(flavor = "multi_thread")]
async fn operations_are_shown_listed_waited_for_cancelled_and_forgotten() {
    let server = Server::start().await;
    let mut operations = server.operations.clone();
    let mut names = Vec::new();
    for _ in 0..3 {
        let mut stream = server.execution.clone().execute(execute()).await.unwrap().into_inner();
        names.push(next(&mut stream).await.name);
    }
    let name = names[2].clone();
    let wait = WaitOperationRequest {
        name: name.clone(),
        timeout: Some(prost_types::Duration { seconds: 0, nanos: 1_000_000 }),
    };
    assert!(!operations.wait_operation(wait.clone()).await.unwrap().into_inner().done);
    operations.cancel_operation(CancelOperationRequest { name: name.clone() }).await.unwrap();
    operations.cancel_operation(CancelOperationRequest { name: name.clone() }).await.unwrap();
    let waited = operations.wait_operation(wait).await.unwrap().into_inner();
    assert_eq!(response(&waited).status.unwrap().code, Code::Cancelled as i32);
    let got = operations.get_operation(GetOperationRequest { name: name.clone() }).await.unwrap();
    assert_eq!(got.into_inner(), waited);

    let list = |page_token: String| ListOperationsRequest {
        name: "a/b/c/operations".into(),
        page_size: 2,
        page_token,
        ..Default::default()
    };
    let first = operations.list_operations(list(String::new())).await.unwrap().into_inner();
    let second = operations.list_operations(list(first.next_page_token.clone())).await.unwrap().into_inner();
    let listed: Vec<_> = first.operations.iter().chain(&second.operations).map(|o| o.name.clone()).collect();
    assert_eq!(listed, names);
    assert!(second.next_page_token.is_empty());
    let bad = ListOperationsRequest { filter: "state=RUNNING".into(), ..Default::default() };
    assert_eq!(operations.list_operations(bad).await.unwrap_err().code(), Code::InvalidArgument);

    operations.delete_operation(DeleteOperationRequest { name: name.clone() }).await.unwrap();
    let gone = operations.get_operation(GetOperationRequest { name }).await.unwrap_err();
    assert_eq!(gone.code(), Code::NotFound);
}

/// EXE-11, OPS-01: a stream reports the same as GetOperation once it is clear that the operation waits.
#[tokio::test(flavor = "multi_thread")]
async fn an_operation_that_waits_says_why() {
    let told = |operation: &Operation| -> Option<QueueStatus> {
        let any = operation.metadata.as_ref().unwrap();
        let metadata = ExecuteOperationMetadata::decode(any.value.as_slice()).unwrap();
        let known = metadata.partial_execution_metadata.unwrap();
        let any = known.auxiliary_metadata.first()?;
        assert_eq!(any.type_url, "type.googleapis.com/google.protobuf.Struct", "what every client can print");
        queue_status(&known.auxiliary_metadata)
    };
    let server = Server::start().await;
    let mut stream = server.execution.clone().execute(execute()).await.unwrap().into_inner();
    let first = next(&mut stream).await;
    assert_eq!(told(&first), None, "the first message waits for nobody");
    let status = told(&next(&mut stream).await).unwrap();
    assert_eq!((status.pool.as_str(), status.position), ("fake", 3));
    let get = GetOperationRequest { name: first.name };
    let got = server.operations.clone().get_operation(get.clone()).await.unwrap().into_inner();
    assert_eq!(told(&got), Some(status));
    server.scheduler.send(Show(executing())).await.unwrap();
    assert_eq!(told(&next(&mut stream).await), None);
    assert_eq!(told(server.operations.clone().get_operation(get).await.unwrap().get_ref()), None);
}

/// GEN-25: a page of long results is shortened, and the rest is on the next page.
#[tokio::test(flavor = "multi_thread")]
async fn a_list_of_long_results_stays_within_a_message() {
    let server = Server::start().await;
    for _ in 0..8 {
        server.execution.clone().execute(execute()).await.unwrap();
        let file =
            gorego_reapi::proto::reapi::OutputFile { path: "x".repeat(1_000_000), ..Default::default() };
        let result = ActionResult { output_files: vec![file], ..Default::default() };
        server.scheduler.send(Show(completed(Some(result), None))).await.unwrap();
    }
    let mut request = ListOperationsRequest { name: "a/b/c/operations".into(), ..Default::default() };
    let mut listed = 0;
    loop {
        let page = server.operations.clone().list_operations(request.clone()).await.unwrap().into_inner();
        listed += page.operations.len();
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    assert_eq!(listed, 8);
}

/// CAP-08, GEN-16.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_only_caches_says_so() {
    let server = Server::with(false).await;
    let status = server.execution.clone().execute(execute()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented);
}
