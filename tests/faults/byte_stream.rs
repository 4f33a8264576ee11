//! Faults of ByteStream.

use super::{
    Fault,
    change::{self, code, exchange, failure, instead, messages, request, response},
    fault,
    proxy::Call,
};
use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use gorego_reapi::proto::bytestream::{
    QueryWriteStatusRequest, QueryWriteStatusResponse, ReadRequest, ReadResponse, WriteRequest, WriteResponse,
};
use prost::Message as _;
use std::{
    collections::{HashMap, HashSet},
    io::Write as _,
    sync::{Arc, Mutex},
};
use tonic::{Code, Status};

/// The size in the resource name of a request: the number after the hash.
fn size_in(name: &str) -> Option<i64> {
    let mut parts = name.split('/').skip_while(|part| !matches!(*part, "blobs" | "compressed-blobs"));
    parts.find_map(|part| part.parse().ok().filter(|_| part.len() < 20))
}

fn read_response(data: impl Into<Bytes>) -> Bytes {
    ReadResponse { data: data.into() }.encode_to_vec().into()
}

/// The same content in a frame that decoders refuse by default.
fn with_large_window(compressed: &[u8]) -> std::io::Result<Vec<u8>> {
    let content = zstd::stream::decode_all(compressed)?;
    let mut encoder = zstd::stream::Encoder::new(Vec::new(), 1)?;
    encoder.window_log(27)?;
    encoder.write_all(&content)?;
    encoder.finish()
}

pub(crate) fn faults() -> Vec<Fault> {
    let mut faults = names();
    faults.extend(read());
    faults.extend(write());
    faults.extend(query());
    faults
}

fn names() -> Vec<Fault> {
    vec![
        fault("instances of several segments have no blobs", &["BS-01", "GEN-12"], {
            request::<ReadRequest>("Read", |asked| {
                if asked.resource_name.split('/').position(|part| part.ends_with("blobs")) > Some(1) {
                    asked.resource_name.clear();
                }
            })
        }),
        fault("a name ends after the size", &["BS-02"], {
            request::<WriteRequest>("Write", |asked| {
                let mut parts = asked.resource_name.split('/').skip_while(|part| *part != "blobs").skip(3);
                if parts.next().is_some() {
                    asked.resource_name = "malformed".into();
                }
            })
        }),
        fault("digest functions are of any case", &["BS-03"], {
            request::<ReadRequest>("Read", |asked| {
                asked.resource_name = asked.resource_name.replace("BLAKE3/", "").replace("SHA256/", "");
            })
        }),
        fault("an unknown compressor is a missing blob", &["BS-04"], {
            code("Read", Code::InvalidArgument, Code::NotFound)
        }),
        fault(
            "malformed names are missing blobs",
            &["BS-05"],
            change::every(
                |method| code(method, Code::InvalidArgument, Code::NotFound),
                &["Read", "Write", "QueryWriteStatus"],
            ),
        ),
        fault("an upload is known by its uuid alone", &["BS-06"], {
            let seen = Mutex::new(HashMap::new());
            request::<WriteRequest>("Write", move |asked| {
                let name = asked.resource_name.clone();
                let uuid = name.split('/').skip_while(|part| *part != "uploads").nth(1).map(str::to_owned);
                if let Some(uuid) = uuid {
                    asked.resource_name = seen.lock().unwrap().entry(uuid).or_insert(name).clone();
                }
            })
        }),
    ]
}

fn read() -> Vec<Fault> {
    vec![
        fault("Read flips a byte", &["BS-07"], {
            response::<ReadResponse>("Read", |answer| {
                let mut data = answer.data.to_vec();
                if let Some(byte) = data.last_mut() {
                    *byte ^= 1;
                }
                answer.data = data.into();
            })
        }),
        fault("an absent blob is an empty one", &["BS-08"], {
            failure("Read", |status| if status.code() == Code::NotFound { Ok(None) } else { Err(status) })
        }),
        fault("a read of a missing blob is an internal error", &["BS-08"], {
            code("Read", Code::NotFound, Code::Internal)
        }),
        fault("read_offset is ignored", &["BS-07", "BS-09"], {
            request::<ReadRequest>("Read", |asked| asked.read_offset = 0)
        }),
        fault("read_limit is ignored", &["BS-10", "BS-11"], {
            request::<ReadRequest>("Read", |asked| asked.read_limit = 0)
        }),
        fault("an offset counts compressed bytes", &["BS-12"], {
            instead("Read", |call, upstream| async move {
                let (mut asked, call) = change::read_request::<ReadRequest>(call).await?;
                let offset = std::mem::take(&mut asked.read_offset);
                let compressed = asked.resource_name.contains("compressed-blobs/");
                asked.read_offset = if compressed { 0 } else { offset };
                let mut reply = upstream.forward(change::with_request(call, &asked)).await?;
                let mut skip = if compressed { usize::try_from(offset).unwrap_or(0) } else { 0 };
                reply.messages = reply
                    .messages
                    .map(move |message| {
                        let data = change::decode::<ReadResponse>(message?)?.data;
                        let cut = skip.min(data.len());
                        skip -= cut;
                        Ok(read_response(data.slice(cut..)))
                    })
                    .boxed();
                Ok(reply)
            })
        }),
        fault("messages are as small as packets", &["BS-14"], {
            messages("Read", |messages| {
                let pieces = messages.map(|message| {
                    let data = change::decode::<ReadResponse>(message?)?.data;
                    let pieces: Vec<_> =
                        data.chunks(1400).map(|piece| Ok(read_response(piece.to_vec()))).collect();
                    Ok::<_, Status>(stream::iter(pieces))
                });
                pieces.try_flatten().boxed()
            })
        }),
        fault("a message of no bytes shows that the stream lives", &["BS-15"], {
            messages("Read", |messages| {
                messages
                    .enumerate()
                    .flat_map(|(n, message)| {
                        let first = (n == 1).then(|| Ok(read_response(Bytes::new())));
                        stream::iter(first.into_iter().chain([message]))
                    })
                    .boxed()
            })
        }),
        fault("a blob is there a little later", &["CAS-03", "CAS-13"], {
            let tried = Arc::new(Mutex::new(HashSet::new()));
            instead("Read", move |call, upstream| {
                let tried = tried.clone();
                async move {
                    let (asked, call) = change::read_request::<ReadRequest>(call).await?;
                    if tried.lock().unwrap().insert(asked.resource_name) {
                        return Err(Status::not_found("not yet"));
                    }
                    upstream.forward(call).await
                }
            })
        }),
        fault("compressed blobs need a large window", &["BS-13"], {
            instead("Read", |call, upstream| async move {
                let (asked, call) = change::read_request::<ReadRequest>(call).await?;
                let mut reply = upstream.forward(call).await?;
                if !asked.resource_name.contains("compressed-blobs/") {
                    return Ok(reply);
                }
                let mut compressed = Vec::new();
                while let Some(message) = reply.messages.try_next().await? {
                    compressed.extend_from_slice(&change::decode::<ReadResponse>(message)?.data);
                }
                let frames =
                    with_large_window(&compressed).map_err(|error| Status::internal(error.to_string()))?;
                let messages = frames.chunks(64 * 1024).map(|piece| read_response(piece.to_vec()));
                Ok(super::proxy::Reply::of(messages.collect::<Vec<_>>()))
            })
        }),
        fault("a read ends short with OK", &["BS-07"], {
            messages("Read", |messages| {
                let cut = |message: Result<Bytes, Status>| {
                    let data = change::decode::<ReadResponse>(message?)?.data;
                    Ok(read_response(data.slice(..data.len() / 2)))
                };
                messages.take(1).map(cut).boxed()
            })
        }),
        fault("compressed frames are cut", &["BS-12"], {
            instead("Read", |call, upstream| async move {
                let (asked, call) = change::read_request::<ReadRequest>(call).await?;
                let mut reply = upstream.forward(call).await?;
                if asked.resource_name.contains("compressed-blobs/") {
                    reply.messages = reply
                        .messages
                        .map(|message| {
                            let data = change::decode::<ReadResponse>(message?)?.data;
                            Ok(read_response(data.slice(..data.len().saturating_sub(1))))
                        })
                        .boxed();
                }
                Ok(reply)
            })
        }),
    ]
}

fn write() -> Vec<Fault> {
    let write = "Write";
    vec![
        fault("a resource name may change on the way", &["BS-18"], {
            instead(write, |call, upstream| async move {
                let mut first = None::<String>;
                let messages = call
                    .messages
                    .map(move |message| {
                        let mut message = change::decode::<WriteRequest>(message?)?;
                        first.get_or_insert_with(|| message.resource_name.clone());
                        message.resource_name = first.clone().unwrap_or_default();
                        Ok(message.encode_to_vec().into())
                    })
                    .boxed();
                upstream.forward(Call { messages, ..call }).await
            })
        }),
        fault("the name has to be on every message", &["BS-18"], {
            instead(write, |call, upstream| async move {
                let messages: Vec<_> = call.messages.collect().await;
                for message in messages.iter().flatten() {
                    if change::decode::<WriteRequest>(message.clone())?.resource_name.is_empty() {
                        return Err(Status::invalid_argument("no resource_name"));
                    }
                }
                upstream.forward(Call { messages: stream::iter(messages).boxed(), ..call }).await
            })
        }),
        fault("write_offset is not looked at", &["BS-19"], {
            instead(write, |call, upstream| async move {
                let mut next = None::<i64>;
                let messages = call
                    .messages
                    .map(move |message| {
                        let mut message = change::decode::<WriteRequest>(message?)?;
                        let offset = next.unwrap_or(message.write_offset);
                        next = Some(offset + message.data.len() as i64);
                        message.write_offset = offset;
                        Ok(message.encode_to_vec().into())
                    })
                    .boxed();
                upstream.forward(Call { messages, ..call }).await
            })
        }),
        fault("an upload cannot be resumed", &["BS-20"], {
            instead(write, |call, upstream| async move {
                let (first, call) = change::read_request::<WriteRequest>(call).await?;
                match first.write_offset {
                    0 => upstream.forward(call).await,
                    _ => Err(Status::invalid_argument("uploads start at 0")),
                }
            })
        }),
        fault("an upload is finished by its end", &["BS-21"], {
            instead(write, |call, upstream| async move {
                let messages: Vec<_> = call.messages.try_collect().await?;
                let mut messages: Vec<WriteRequest> =
                    messages.into_iter().map(change::decode).collect::<Result<_, _>>()?;
                if let Some(last) = messages.last_mut() {
                    last.finish_write = true;
                }
                let messages = messages.into_iter().map(|message| Ok(message.encode_to_vec().into()));
                let messages: Vec<_> = messages.collect();
                upstream.forward(Call { messages: stream::iter(messages).boxed(), ..call }).await
            })
        }),
        fault("any bytes are taken for the blob", &["BS-22", "BS-26"], {
            instead(write, |call, upstream| async move {
                let (first, call) = change::read_request::<WriteRequest>(call).await?;
                match upstream.forward(call).await {
                    Err(status) if status.code() == Code::InvalidArgument => {
                        let committed_size = size_in(&first.resource_name).unwrap_or(0);
                        let message = WriteResponse { committed_size }.encode_to_vec();
                        Ok(super::proxy::Reply::of([message.into()]))
                    }
                    reply => reply,
                }
            })
        }),
        fault("content that does not match is an internal error", &["BS-22", "GEN-20"], {
            code(write, Code::InvalidArgument, Code::Internal)
        }),
        fault("committed_size is what was sent last", &["BS-23"], {
            response::<WriteResponse>(write, |answer| answer.committed_size /= 2)
        }),
        fault("an upload of what is stored is refused", &["BS-24", "BS-28"], {
            let seen = Arc::new(Mutex::new(HashSet::new()));
            instead(write, move |call, upstream| {
                let seen = seen.clone();
                async move {
                    let (first, call) = change::read_request::<WriteRequest>(call).await?;
                    let blob = first.resource_name.split("blobs/").last().map(str::to_owned);
                    let reply = upstream.forward(call).await?;
                    if !seen.lock().unwrap().insert(blob) {
                        return Err(Status::already_exists("it is stored"));
                    }
                    Ok(reply)
                }
            })
        }),
        fault("committed_size of a compressed upload is a guess", &["BS-25"], {
            instead(write, |call, upstream| async move {
                let (first, call) = change::read_request::<WriteRequest>(call).await?;
                let mut reply = upstream.forward(call).await?;
                if first.resource_name.contains("compressed-blobs/") {
                    let guess = |answer: &mut WriteResponse| answer.committed_size += 7;
                    reply.messages = reply.messages.map(move |message| change::edit(message, &guess)).boxed();
                }
                Ok(reply)
            })
        }),
        fault("a compressed frame comes in one message", &["BS-27"], {
            instead(write, |call, upstream| async move {
                let messages: Vec<_> = call.messages.collect().await;
                let first = messages.iter().flatten().next().cloned().unwrap_or_default();
                let name = change::decode::<WriteRequest>(first)?.resource_name;
                if name.contains("compressed-blobs/") && messages.len() > 1 {
                    return Err(Status::invalid_argument("cannot decode the frame"));
                }
                upstream.forward(Call { messages: stream::iter(messages).boxed(), ..call }).await
            })
        }),
        fault("an empty blob cannot be uploaded", &["BS-30"], {
            instead(write, |call, upstream| async move {
                let (first, call) = change::read_request::<WriteRequest>(call).await?;
                if first.data.is_empty() {
                    return Err(Status::invalid_argument("no data"));
                }
                upstream.forward(call).await
            })
        }),
    ]
}

fn query() -> Vec<Fault> {
    let query = "QueryWriteStatus";
    vec![
        fault("no upload is ever complete", &["BS-31"], {
            response::<QueryWriteStatusResponse>(query, |answer| answer.complete = false)
        }),
        fault("every upload is complete", &["BS-31", "BS-32"], {
            response::<QueryWriteStatusResponse>(query, |answer| answer.complete = true)
        }),
        fault("an unknown upload is an internal error", &["BS-32"], {
            exchange::<QueryWriteStatusRequest, QueryWriteStatusResponse>(query, |_, answer| match answer {
                Ok(answer) if answer.committed_size == 0 => Err(Status::internal("no such upload")),
                answer => answer,
            })
        }),
        fault("a compressed upload counts more than was kept", &["BS-33"], {
            exchange::<QueryWriteStatusRequest, QueryWriteStatusResponse>(query, |asked, answer| {
                let mut answer = answer?;
                if asked.resource_name.contains("compressed-blobs/") && !answer.complete {
                    answer.committed_size += 1000;
                }
                Ok(answer)
            })
        }),
    ]
}
