//! Faults of LogStream.

use super::{
    Fault,
    change::{self, exchange, instead, messages, request, response},
    fault,
};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use gorego_reapi::proto::{
    bytestream::{ReadRequest, WriteRequest, WriteResponse},
    logstream::{CreateLogStreamRequest, LogStream},
};
use tonic::Status;

pub(crate) fn faults() -> Vec<Fault> {
    let create = "CreateLogStream";
    vec![
        fault("all streams have one name", &["LOG-01"], {
            response::<LogStream>(create, |created| {
                created.name =
                    created.name.rsplit_once('/').map_or("", |(parent, _)| parent).to_owned() + "/1";
            })
        }),
        fault("the name to write to can be guessed", &["LOG-01"], {
            response::<LogStream>(create, |created| {
                created.write_resource_name = format!("{}/1", created.name)
            })
        }),
        fault("any parent is taken", &["LOG-01"], {
            exchange::<CreateLogStreamRequest, LogStream>(create, |asked, answer| match answer {
                Ok(created) => Ok(created),
                Err(_) => Ok(LogStream {
                    name: format!("{}/logstreams/1", asked.parent),
                    write_resource_name: format!(
                        "{}/logstreams/1/0123456789abcdef0123456789abcdef",
                        asked.parent
                    ),
                }),
            })
        }),
        fault("the name to write to can be read", &["LOG-02"], {
            request::<ReadRequest>("Read", |asked| {
                let parts: Vec<_> = asked.resource_name.split('/').collect();
                if let Some(at) = parts.iter().position(|part| *part == "logstreams") {
                    asked.resource_name = parts[..(at + 2).min(parts.len())].join("/");
                }
            })
        }),
        fault("a reader gets what there is and no more", &["LOG-03"], {
            messages("Read", |messages| {
                messages.take_until(tokio::time::sleep(std::time::Duration::from_millis(300))).boxed()
            })
        }),
        fault("what was written can be written over", &["LOG-04"], {
            instead("Write", |call, upstream| async move {
                let (first, call) = change::read_request::<WriteRequest>(call).await?;
                match upstream.forward(call).await {
                    Err(_) if first.resource_name.contains("logstreams") => {
                        let committed_size = first.write_offset + first.data.len() as i64;
                        let answer = prost::Message::encode_to_vec(&WriteResponse { committed_size });
                        Ok(super::proxy::Reply::of([answer.into()]))
                    }
                    reply => reply,
                }
            })
        }),
        fault("a write that ends finishes the stream", &["LOG-05"], {
            instead("Write", |call, upstream| async move {
                let messages: Vec<_> = call.messages.try_collect().await?;
                let mut messages = messages
                    .into_iter()
                    .map(change::decode::<WriteRequest>)
                    .collect::<Result<Vec<_>, Status>>()?;
                if let Some(last) = messages.last_mut() {
                    last.finish_write = true;
                }
                let bytes = messages.iter().map(|message| Ok(prost::Message::encode_to_vec(message).into()));
                let messages = stream::iter(bytes.collect::<Vec<_>>()).boxed();
                upstream.forward(super::proxy::Call { messages, ..call }).await
            })
        }),
        fault("a write answers what it brought", &["LOG-05"], {
            instead("Write", |call, upstream| async move {
                let (first, call) = change::read_request::<WriteRequest>(call).await?;
                let mut reply = upstream.forward(call).await?;
                if first.resource_name.contains("logstreams") {
                    let brought =
                        move |answer: &mut WriteResponse| answer.committed_size -= first.write_offset;
                    reply.messages =
                        reply.messages.map(move |message| change::edit(message, &brought)).boxed();
                }
                Ok(reply)
            })
        }),
    ]
}
