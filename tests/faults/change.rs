//! The words in which faults are written: one small function for what is changed, one combinator for where.
//!
//! A combinator names the method that it touches; calls of all other methods pass untouched. Messages are decoded only where
//! the fault looks at them.

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

/// Packed types.
pub const METADATA_TYPE: &str =
    "type.googleapis.com/build.bazel.remote.execution.v2.ExecuteOperationMetadata";
pub const RESPONSE_TYPE: &str = "type.googleapis.com/build.bazel.remote.execution.v2.ExecuteResponse";

/// No fault at all.
pub fn nothing() -> Behaviour {
    Arc::new(|call, upstream| async move { upstream.forward(call).await }.boxed())
}

/// Calls of one method go to `handler`, all others to the real server.
pub fn instead<F>(
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

/// Each request message of one method is changed on its way.
pub fn request<M: Message + Default + 'static>(
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

/// Each response message of one method is changed on its way.
pub fn response<M: Message + Default + 'static>(
    method: &'static str,
    change: impl Fn(&mut M) + Send + Sync + 'static,
) -> Behaviour {
    let change = Arc::new(change);
    messages(method, move |messages| {
        let change = change.clone();
        messages.map(move |message| edit(message, &*change)).boxed()
    })
}

/// The answer of a unary method is changed in view of what was asked.
pub fn exchange<Q, R>(
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

/// The whole response stream of one method is replaced by another made of it.
pub fn messages(
    method: &'static str,
    change: impl Fn(Messages) -> Messages + Send + Sync + 'static,
) -> Behaviour {
    let change = Arc::new(change);
    instead(method, move |call, upstream| {
        let change = change.clone();
        async move {
            // A call that fails at once is a stream too: one that ends before its first message.
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

/// The error in which a call of one method ends becomes another, or a last message and OK.
pub fn failure(
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

/// Calls of one method that fail with this code fail with another.
pub fn code(method: &'static str, from: tonic::Code, to: tonic::Code) -> Behaviour {
    failure(method, move |status| {
        Err(if status.code() == from { Status::new(to, status.message()) } else { status })
    })
}

/// Calls of one method are answered like this and never reach the server.
pub fn answer<M: Message>(method: &'static str, message: M) -> Behaviour {
    let message = Bytes::from(message.encode_to_vec());
    instead(method, move |_, _| {
        let message = message.clone();
        async move { Ok(Reply::of([message])) }
    })
}

/// Two changes, each to the calls of a method of its own.
pub fn both(method: &'static str, first: Behaviour, otherwise: Behaviour) -> Behaviour {
    Arc::new(
        move |call, upstream| {
            if call.method() == method { first(call, upstream) } else { otherwise(call, upstream) }
        },
    )
}

/// A change to the calls of every method.
pub fn every(change: impl Fn(&'static str) -> Behaviour, methods: &[&'static str]) -> Behaviour {
    methods.iter().fold(nothing(), |rest, method| both(method, change(method), rest))
}

/// Every Operation that Execute and WaitExecution send is changed.
pub fn operation(change: impl Fn(&mut Operation) + Send + Sync + 'static) -> Behaviour {
    let change = Arc::new(change);
    let on = |method| {
        let change = change.clone();
        response::<Operation>(method, move |operation| change(operation))
    };
    every(on, &["Execute", "WaitExecution"])
}

/// The final response of every Execute and WaitExecution is changed.
pub fn execute_response(change: impl Fn(&mut ExecuteResponse) + Send + Sync + 'static) -> Behaviour {
    operation(move |operation| change_response(operation, &change))
}

/// The result in every such response is changed.
pub fn result(change: impl Fn(&mut ActionResult) + Send + Sync + 'static) -> Behaviour {
    execute_response(move |response| {
        if let Some(result) = &mut response.result {
            change(result);
        }
    })
}

/// What an Execute runs, for faults that change it.
pub struct Job {
    pub action: Action,
    pub command: Command,
    /// The root of the inputs.
    pub root: Directory,
}

/// Every Execute runs another Action than the one it names: Action, Command and root are read, changed and stored; the request
/// carries the new digest, and the metadata of the operation the one that the client expects.
pub fn job(change: impl Fn(&mut Job) + Send + Sync + 'static) -> Behaviour {
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

/// The digest of a changed copy of an action; `None` when it cannot be read, which the real server will say better.
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

/// The final result of every Execute is changed by work that may read and write blobs; the last argument is the instance.
pub fn result_with_blobs<F>(
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

/// The Tree of every output directory of every Execute is replaced by these bytes, made of it.
pub fn trees(change: impl Fn(Tree, &mut OutputDirectory) -> Vec<u8> + Send + Sync + 'static) -> Behaviour {
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

/// A message of the real server's store.
pub async fn read_message<M: Message + Default>(
    upstream: &Upstream,
    instance: &str,
    digest: &Digest,
) -> Option<M> {
    M::decode(read_blob(upstream, instance, digest.clone()).await?).ok()
}

/// A blob of the real server.
pub async fn read_blob(upstream: &Upstream, instance: &str, digest: Digest) -> Option<Bytes> {
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

/// Stores a blob at the real server.
pub async fn write_blob(upstream: &Upstream, instance: &str, data: Vec<u8>) -> Option<Digest> {
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

/// Reads the one request message of a call, and gives the call back as it was.
pub async fn read_request<M: Message + Default>(mut call: Call) -> Result<(M, Call), Status> {
    let bytes = call.messages.next().await.unwrap_or_else(|| Ok(Bytes::new()))?;
    let message = decode(bytes.clone())?;
    let messages = stream::once(async { Ok(bytes) }).chain(call.messages).boxed();
    Ok((message, Call { messages, ..call }))
}

/// The same call with another message.
pub fn with_request(call: Call, message: &impl Message) -> Call {
    let bytes = Bytes::from(message.encode_to_vec());
    Call { messages: stream::once(async { Ok(bytes) }).boxed(), ..call }
}

/// Makes a unary call.
pub async fn unary<R: Message + Default>(upstream: &Upstream, call: Call) -> Result<R, Status> {
    let mut reply = upstream.forward(call).await?;
    let bytes = reply.messages.next().await.unwrap_or_else(|| Err(Status::internal("no answer")))?;
    // The status may still be an error.
    while reply.messages.try_next().await?.is_some() {}
    decode(bytes)
}

/// Changes one encoded message.
pub fn edit<M: Message + Default>(
    message: Result<Bytes, Status>,
    change: &(impl Fn(&mut M) + ?Sized),
) -> Result<Bytes, Status> {
    let mut message = decode::<M>(message?)?;
    change(&mut message);
    Ok(message.encode_to_vec().into())
}

/// Decodes a message that the real server or the suite has made.
pub fn decode<M: Message + Default>(bytes: Bytes) -> Result<M, Status> {
    M::decode(bytes).map_err(|error| Status::internal(format!("the proxy cannot read a message: {error}")))
}

/// Changes what is packed in the metadata of an operation.
pub fn change_metadata(operation: &mut Operation, change: impl FnOnce(&mut ExecuteOperationMetadata)) {
    if let Some(any) = &mut operation.metadata {
        let mut metadata = Message::decode(any.value.as_slice()).unwrap_or_default();
        change(&mut metadata);
        any.value = metadata.encode_to_vec();
    }
}

/// Changes what is packed in the response of an operation.
pub fn change_response(operation: &mut Operation, change: impl FnOnce(&mut ExecuteResponse)) {
    if let Some(operation::Result::Response(any)) = &mut operation.result {
        let mut response = ExecuteResponse::decode(any.value.as_slice()).unwrap_or_default();
        change(&mut response);
        any.value = response.encode_to_vec();
    }
}
