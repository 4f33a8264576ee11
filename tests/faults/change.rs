//! The words in which faults are written: one small function for what is changed, one combinator for where.
//!
//! A combinator names the method that it touches; calls of all other methods pass untouched. Messages are decoded only where
//! the fault looks at them.

use super::proxy::{Behaviour, Call, Messages, Reply, Upstream};
use bytes::Bytes;
use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _, stream};
use gorego::proto::{
    longrunning::{Operation, operation},
    reapi::{
        Action, ActionResult, BatchReadBlobsRequest, BatchUpdateBlobsRequest, Command, Digest, ExecuteRequest,
        ExecuteResponse, batch_update_blobs_request,
        content_addressable_storage_client::ContentAddressableStorageClient,
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

/// Several changes at once, the first one nearest to the client.
pub fn both(outer: Behaviour, inner: Behaviour) -> Behaviour {
    // Only behaviours that differ in the method can be joined: each passes on what is not its own.
    Arc::new(move |call, upstream| {
        let (outer, inner) = (outer.clone(), inner.clone());
        let method = call.method().to_owned();
        async move {
            match method.as_str() {
                "Execute" => outer(call, upstream).await,
                _ => inner(call, upstream).await,
            }
        }
        .boxed()
    })
}

/// Every Operation that Execute and WaitExecution send is changed.
pub fn operation(change: impl Fn(&mut Operation) + Send + Sync + 'static) -> Behaviour {
    let change = Arc::new(change);
    let wait = change.clone();
    both(
        response::<Operation>("Execute", move |operation| change(operation)),
        response::<Operation>("WaitExecution", move |operation| wait(operation)),
    )
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

/// Every Execute runs another Action than the one it names: Action and Command are read, changed and stored, and the request
/// and the metadata of the operation carry the digests that the client expects.
pub fn action(change: impl Fn(&mut Action, &mut Command) + Send + Sync + 'static) -> Behaviour {
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
    change: &(dyn Fn(&mut Action, &mut Command) + Send + Sync),
) -> Option<Digest> {
    let instance = &request.instance_name;
    let action = read_blob(upstream, instance, request.action_digest.clone()?).await?;
    let mut action = Action::decode(action).ok()?;
    let command = read_blob(upstream, instance, action.command_digest.clone()?).await?;
    let mut command = Command::decode(command).ok()?;
    change(&mut action, &mut command);
    action.command_digest = Some(write_blob(upstream, instance, command.encode_to_vec()).await?);
    write_blob(upstream, instance, action.encode_to_vec()).await
}

/// A blob of the real server.
pub async fn read_blob(upstream: &Upstream, instance: &str, digest: Digest) -> Option<Bytes> {
    let request = BatchReadBlobsRequest {
        instance_name: instance.to_owned(),
        digests: vec![digest],
        ..Default::default()
    };
    let answer = ContentAddressableStorageClient::new(upstream.0.clone()).batch_read_blobs(request).await.ok()?;
    let response = answer.into_inner().responses.into_iter().next()?;
    (response.status.unwrap_or_default().code == 0).then_some(response.data)
}

/// Stores a blob at the real server.
pub async fn write_blob(upstream: &Upstream, instance: &str, data: Vec<u8>) -> Option<Digest> {
    let digest = gorego::digest::DigestFunction::Sha256.digest(&data).to_wire();
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
    let message = M::decode(bytes.clone()).map_err(|error| Status::internal(error.to_string()))?;
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
    R::decode(bytes).map_err(|error| Status::internal(error.to_string()))
}

/// Changes one encoded message.
pub fn edit<M: Message + Default>(
    message: Result<Bytes, Status>,
    change: &(impl Fn(&mut M) + ?Sized),
) -> Result<Bytes, Status> {
    let mut message = M::decode(message?).map_err(|error| Status::internal(error.to_string()))?;
    change(&mut message);
    Ok(message.encode_to_vec().into())
}

/// Changes what is packed in the metadata of an operation.
pub fn change_metadata(
    operation: &mut Operation,
    change: impl Fn(&mut gorego::proto::reapi::ExecuteOperationMetadata),
) {
    if let Some(any) = &mut operation.metadata {
        let mut metadata = Message::decode(any.value.as_slice()).unwrap_or_default();
        change(&mut metadata);
        any.value = metadata.encode_to_vec();
    }
}

/// Changes what is packed in the response of an operation.
pub fn change_response(operation: &mut Operation, change: impl Fn(&mut ExecuteResponse)) {
    if let Some(operation::Result::Response(any)) = &mut operation.result {
        let mut response = ExecuteResponse::decode(any.value.as_slice()).unwrap_or_default();
        change(&mut response);
        any.value = response.encode_to_vec();
    }
}
