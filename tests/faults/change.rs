//! The combinators with which faults are written: one small function for the change, one combinator for the place.
//!
//! A combinator names the method that it changes; calls of other methods pass unchanged. Messages are decoded only
//! where the fault changes them.

use super::proxy::{Behaviour, Call, Messages, Reply, Upstream};
use bytes::Bytes;
use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _, stream};
use gorego_client::stubs::ContentAddressableStorageClient;
use gorego_reapi::proto::{
    longrunning::{Operation, operation},
    reapi::{
        Action, ActionResult, BatchReadBlobsRequest, BatchUpdateBlobsRequest, Command, Digest, Directory,
        ExecuteOperationMetadata, ExecuteRequest, ExecuteResponse, OutputDirectory, Tree,
        batch_update_blobs_request,
    },
};
use prost::Message;
use std::{future::Future, sync::Arc};
use tonic::Status;

/// Type names of packed messages.
pub(crate) const METADATA_TYPE: &str =
    "type.googleapis.com/build.bazel.remote.execution.v2.ExecuteOperationMetadata";
pub(crate) const RESPONSE_TYPE: &str = "type.googleapis.com/build.bazel.remote.execution.v2.ExecuteResponse";

/// No fault.
pub(crate) fn nothing() -> Behaviour {
    Arc::new(|call, upstream| async move { upstream.forward(call).await }.boxed())
}

/// Calls of one method go to `handler`, all others to the real server.
pub(crate) fn instead<F>(
    method: &'static str,
    handler: impl Fn(Call, Upstream) -> F + Send + Sync + 'static,
) -> Behaviour
where
    F: Future<Output = Result<Reply, Status>> + Send + 'static,
{
    Arc::new(move |call, upstream| {
        if call.method() == method {
            handler(call, upstream).boxed()
        } else {
            async move { upstream.forward(call).await }.boxed()
        }
    })
}

/// Changes each request message of one method.
pub(crate) fn request<M: Message + Default + 'static>(
    method: &'static str,
    change: impl Fn(&mut M) + Send + Sync + 'static,
) -> Behaviour {
    let change = Arc::new(change);
    instead(method, move |call, upstream| {
        let change = change.clone();
        let messages = call.messages.map(move |message| edit(message, &*change)).boxed();
        async move { upstream.forward(Call { messages, ..call }).await }
    })
}

/// Changes each response message of one method.
pub(crate) fn response<M: Message + Default + 'static>(
    method: &'static str,
    change: impl Fn(&mut M) + Send + Sync + 'static,
) -> Behaviour {
    let change = Arc::new(change);
    messages(method, move |messages| {
        let change = change.clone();
        messages.map(move |message| edit(message, &*change)).boxed()
    })
}

/// Changes the response of a unary method, depending on the request.
pub(crate) fn exchange<Q, R>(
    method: &'static str,
    change: impl Fn(&Q, Result<R, Status>) -> Result<R, Status> + Send + Sync + 'static,
) -> Behaviour
where
    Q: Message + Default + 'static,
    R: Message + Default + 'static,
{
    let change = Arc::new(change);
    instead(method, move |call, upstream| {
        let change = change.clone();
        async move {
            let (question, call) = read_request::<Q>(call).await?;
            let answer = unary::<R>(&upstream, call).await;
            Ok(Reply::of([change(&question, answer)?.encode_to_vec().into()]))
        }
    })
}

/// Replaces the response stream of one method by one made from it.
pub(crate) fn messages(
    method: &'static str,
    change: impl Fn(Messages) -> Messages + Send + Sync + 'static,
) -> Behaviour {
    let change = Arc::new(change);
    instead(method, move |call, upstream| {
        let change = change.clone();
        async move {
            // A call that fails immediately is a stream that ends before its first message.
            let reply = match upstream.forward(call).await {
                Ok(reply) => reply,
                Err(status) => Reply {
                    metadata: Default::default(),
                    messages: stream::once(async { Err(status) }).boxed(),
                },
            };
            Ok(Reply { metadata: reply.metadata, messages: change(reply.messages) })
        }
    })
}

/// Replaces the error with which a call of one method ends by another error, or by a last message and OK.
pub(crate) fn failure(
    method: &'static str,
    change: impl Fn(Status) -> Result<Option<Bytes>, Status> + Send + Sync + 'static,
) -> Behaviour {
    let change = Arc::new(change);
    messages(method, move |messages| {
        let change = change.clone();
        let changed = messages.map(move |message| match message {
            Ok(message) => Ok(Some(message)),
            Err(status) => change(status),
        });
        changed.try_filter_map(|message| async { Ok(message) }).boxed()
    })
}

/// Replaces one error code of a method by another.
pub(crate) fn code(method: &'static str, from: tonic::Code, to: tonic::Code) -> Behaviour {
    failure(method, move |status| {
        Err(if status.code() == from { Status::new(to, status.message()) } else { status })
    })
}

/// Answers the calls of one method without forwarding them to the real server.
pub(crate) fn answer<M: Message>(method: &'static str, message: M) -> Behaviour {
    let message = Bytes::from(message.encode_to_vec());
    instead(method, move |_, _| {
        let message = message.clone();
        async move { Ok(Reply::of([message])) }
    })
}

/// Combines two changes of different methods.
pub(crate) fn both(method: &'static str, first: Behaviour, otherwise: Behaviour) -> Behaviour {
    Arc::new(
        move |call, upstream| {
            if call.method() == method { first(call, upstream) } else { otherwise(call, upstream) }
        },
    )
}

/// Changes the calls of all methods.
pub(crate) fn every(change: impl Fn(&'static str) -> Behaviour, methods: &[&'static str]) -> Behaviour {
    methods.iter().fold(nothing(), |rest, method| both(method, change(method), rest))
}

/// Changes every Operation that Execute and WaitExecution send.
pub(crate) fn operation(change: impl Fn(&mut Operation) + Send + Sync + 'static) -> Behaviour {
    let change = Arc::new(change);
    let on = |method| {
        let change = change.clone();
        response::<Operation>(method, move |operation| change(operation))
    };
    every(on, &["Execute", "WaitExecution"])
}

/// Changes the final response of every Execute and WaitExecution.
pub(crate) fn execute_response(change: impl Fn(&mut ExecuteResponse) + Send + Sync + 'static) -> Behaviour {
    operation(move |operation| change_response(operation, &change))
}

/// Changes the result in every such response.
pub(crate) fn result(change: impl Fn(&mut ActionResult) + Send + Sync + 'static) -> Behaviour {
    execute_response(move |response| {
        if let Some(result) = &mut response.result {
            change(result);
        }
    })
}

/// The action of an Execute, for faults that change it.
pub(crate) struct Job {
    pub(crate) action: Action,
    pub(crate) command: Command,
    /// The root Directory of the inputs.
    pub(crate) root: Directory,
}

/// Executes another Action than the requested one: Action, Command and root are read, changed and stored. The request
/// carries the new digest, and the metadata of the operation the one that the client expects.
pub(crate) fn job(change: impl Fn(&mut Job) + Send + Sync + 'static) -> Behaviour {
    let change = Arc::new(change);
    instead("Execute", move |call, upstream| {
        let change = change.clone();
        async move {
            let (mut request, call) = read_request::<ExecuteRequest>(call).await?;
            let asked = request.action_digest.clone();
            if let Some(changed) = rewrite(&upstream, &request, &*change).await {
                request.action_digest = Some(changed);
            }
            let mut reply = upstream.forward(with_request(call, &request)).await?;
            let named = move |operation: &mut Operation| {
                change_metadata(operation, |metadata| metadata.action_digest = asked.clone());
            };
            reply.messages = reply.messages.map(move |message| edit(message, &named)).boxed();
            Ok(reply)
        }
    })
}

/// The digest of a changed copy of an action; `None` when it cannot be read, because the real server then reports the
/// error.
async fn rewrite(
    upstream: &Upstream,
    request: &ExecuteRequest,
    change: &(dyn Fn(&mut Job) + Send + Sync),
) -> Option<Digest> {
    let instance = &request.instance_name;
    let action: Action = read_message(upstream, instance, request.action_digest.as_ref()?).await?;
    let command = read_message(upstream, instance, action.command_digest.as_ref()?).await?;
    let root = read_message(upstream, instance, action.input_root_digest.as_ref()?).await?;
    let mut job = Job { action, command, root };
    change(&mut job);
    job.action.command_digest = Some(write_blob(upstream, instance, job.command.encode_to_vec()).await?);
    job.action.input_root_digest = Some(write_blob(upstream, instance, job.root.encode_to_vec()).await?);
    write_blob(upstream, instance, job.action.encode_to_vec()).await
}

/// Changes the final result of every Execute with work that may read and write blobs. The last argument is the
/// instance.
pub(crate) fn result_with_blobs<F>(
    change: impl Fn(ActionResult, Upstream, String) -> F + Send + Sync + 'static,
) -> Behaviour
where
    F: Future<Output = ActionResult> + Send + 'static,
{
    let change = Arc::new(change);
    instead("Execute", move |call, upstream| {
        let change = change.clone();
        async move {
            let (request, call) = read_request::<ExecuteRequest>(call).await?;
            let mut reply = upstream.forward(call).await?;
            let change = move |message: Result<Bytes, Status>| {
                let (change, upstream) = (change.clone(), upstream.clone());
                let instance = request.instance_name.clone();
                async move {
                    let mut operation = decode::<Operation>(message?)?;
                    let mut response = ExecuteResponse::default();
                    change_response(&mut operation, |found| response = found.clone());
                    if let Some(result) = response.result.take() {
                        response.result = Some(change(result, upstream, instance).await);
                        change_response(&mut operation, |changed| *changed = response.clone());
                    }
                    Ok(operation.encode_to_vec().into())
                }
            };
            reply.messages = reply.messages.then(change).boxed();
            Ok(reply)
        }
    })
}

/// Replaces the Tree of every output directory of every Execute by bytes made from it.
pub(crate) fn trees(
    change: impl Fn(Tree, &mut OutputDirectory) -> Vec<u8> + Send + Sync + 'static,
) -> Behaviour {
    let change = Arc::new(change);
    result_with_blobs(move |mut result, upstream, instance| {
        let change = change.clone();
        async move {
            for directory in &mut result.output_directories {
                let Some(digest) = directory.tree_digest.clone() else { continue };
                let Some(tree) = read_message(&upstream, &instance, &digest).await else { continue };
                let bytes = change(tree, directory);
                directory.tree_digest = write_blob(&upstream, &instance, bytes).await;
            }
            result
        }
    })
}

/// Reads a message from the store of the real server.
pub(crate) async fn read_message<M: Message + Default>(
    upstream: &Upstream,
    instance: &str,
    digest: &Digest,
) -> Option<M> {
    M::decode(read_blob(upstream, instance, digest.clone()).await?).ok()
}

/// Reads a blob from the real server.
pub(crate) async fn read_blob(upstream: &Upstream, instance: &str, digest: Digest) -> Option<Bytes> {
    let request = BatchReadBlobsRequest {
        instance_name: instance.to_owned(),
        digests: vec![digest],
        ..Default::default()
    };
    let answer =
        ContentAddressableStorageClient::new(upstream.0.clone()).batch_read_blobs(request).await.ok()?;
    let response = answer.into_inner().responses.into_iter().next()?;
    (response.status.unwrap_or_default().code == 0).then_some(response.data)
}

/// Stores a blob on the real server.
pub(crate) async fn write_blob(upstream: &Upstream, instance: &str, data: Vec<u8>) -> Option<Digest> {
    let digest = gorego_reapi::digest::DigestFunction::Sha256.digest(&data).to_wire();
    let item = batch_update_blobs_request::Request {
        digest: Some(digest.clone()),
        data: data.into(),
        compressor: 0,
    };
    let request = BatchUpdateBlobsRequest {
        instance_name: instance.to_owned(),
        requests: vec![item],
        ..Default::default()
    };
    ContentAddressableStorageClient::new(upstream.0.clone()).batch_update_blobs(request).await.ok()?;
    Some(digest)
}

/// Reads the only request message of a call. Also returns the unchanged call.
pub(crate) async fn read_request<M: Message + Default>(mut call: Call) -> Result<(M, Call), Status> {
    let bytes = call.messages.next().await.unwrap_or_else(|| Ok(Bytes::new()))?;
    let message = decode(bytes.clone())?;
    let messages = stream::once(async { Ok(bytes) }).chain(call.messages).boxed();
    Ok((message, Call { messages, ..call }))
}

/// The same call with another message.
pub(crate) fn with_request(call: Call, message: &impl Message) -> Call {
    let bytes = Bytes::from(message.encode_to_vec());
    Call { messages: stream::once(async { Ok(bytes) }).boxed(), ..call }
}

/// Makes a unary call.
pub(crate) async fn unary<R: Message + Default>(upstream: &Upstream, call: Call) -> Result<R, Status> {
    let mut reply = upstream.forward(call).await?;
    let bytes = reply.messages.next().await.unwrap_or_else(|| Err(Status::internal("no answer")))?;
    // The status may still be an error.
    while reply.messages.try_next().await?.is_some() {}
    decode(bytes)
}

/// Changes one encoded message.
pub(crate) fn edit<M: Message + Default>(
    message: Result<Bytes, Status>,
    change: &(impl Fn(&mut M) + ?Sized),
) -> Result<Bytes, Status> {
    let mut message = decode::<M>(message?)?;
    change(&mut message);
    Ok(message.encode_to_vec().into())
}

/// Decodes a message of the real server or the suite.
pub(crate) fn decode<M: Message + Default>(bytes: Bytes) -> Result<M, Status> {
    M::decode(bytes).map_err(|error| Status::internal(format!("the proxy cannot read a message: {error}")))
}

/// Changes the packed metadata of an operation.
pub(crate) fn change_metadata(operation: &mut Operation, change: impl FnOnce(&mut ExecuteOperationMetadata)) {
    if let Some(any) = &mut operation.metadata {
        let mut metadata = Message::decode(any.value.as_slice()).unwrap_or_default();
        change(&mut metadata);
        any.value = metadata.encode_to_vec();
    }
}

/// Changes the packed response of an operation.
pub(crate) fn change_response(operation: &mut Operation, change: impl FnOnce(&mut ExecuteResponse)) {
    if let Some(operation::Result::Response(any)) = &mut operation.result {
        let mut response = ExecuteResponse::decode(any.value.as_slice()).unwrap_or_default();
        change(&mut response);
        any.value = response.encode_to_vec();
    }
}
