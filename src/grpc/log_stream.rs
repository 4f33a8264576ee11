//! The LogStream service, and log streams in ByteStream: what Read, Write and QueryWriteStatus do with names that have
//! a `logstreams` segment (LOG-01..05, EXE-64).
//!
//! The streams themselves are in [`crate::log_streams`]. A stream is read only when its client reads.

use super::{
    Edge, ReadStream, convert, stalled,
    stream_limits::{CLOSE_WAIT, READ_WINDOW_BYTES, WRITE_IDLE_LIMIT},
    write_stream::WriteStream,
};
use crate::{
    access::permission::Permission,
    actors::{
        cas::{blob::BlobReader, client::Cas},
        scheduler::operation::OperationId,
    },
    call::Call,
    grpc::services::log_stream_service_server as server,
    instance::Instance,
    log_streams::{
        Committed,
        follow::{Follower, Piece},
        name::{LogName, StreamId},
    },
};
use bytes::Bytes;
use futures::stream::{self, StreamExt as _};
use gorego_reapi::{
    error::{Error, Result},
    proto::{
        bytestream::{QueryWriteStatusResponse, ReadRequest, ReadResponse, WriteRequest, WriteResponse},
        logstream::{CreateLogStreamRequest, LogStream},
    },
};
use std::sync::Arc;
use tokio::select;
use tonic::{Request, Response, Status};

#[derive(Debug)]
pub(crate) struct LogStreamService(pub Arc<Edge>);

#[tonic::async_trait]
impl server::LogStreamService for LogStreamService {
    async fn create_log_stream(
        &self,
        request: Request<CreateLogStreamRequest>,
    ) -> Result<Response<LogStream>, Status> {
        let call = Call::of(request.extensions());
        // If the service is disabled, it refuses every request.
        self.0.log_streams.check_creation()?;
        let mut parent = request.into_inner().parent;
        // BuildGrid's `bgd` puts the instance name and a slash before an empty parent.
        if parent.ends_with('/') {
            parent.pop();
        }
        let (instance_name, operation) = parse_parent(&parent)?;
        let instance = self.0.gate.enter(&call, instance_name)?;
        if let Some(id) = operation {
            call.note_operation(id);
            self.check_operation(&call, instance, id).await?;
        }
        let name = self.0.log_streams.create(parent, call.caller())?;
        let write_resource_name = name.to_string();
        Ok(Response::new(LogStream { name: name.for_reading().to_string(), write_resource_name }))
    }
}

impl LogStreamService {
    /// Checks that an operation can be a parent: this server knows it (LOG-01), and the client may see it.
    async fn check_operation(&self, call: &Call, instance: Instance, id: OperationId) -> Result<()> {
        match self.0.watch_in(call, instance, id).await {
            Err(Error::NotFound(unknown)) => Err(Error::Invalid(format!("parent: {unknown}"))),
            known => known.map(drop),
        }
    }
}

/// The instance and the operation that the parent of a stream names. The API leaves it to the server what a parent may
/// be; the empty name is the instance of that name, as in every other call, if the server has one (LOG-01).
fn parse_parent(parent: &str) -> Result<(&str, Option<OperationId>)> {
    let is_operation = parent.split('/').rev().nth(1) == Some("operations");
    if !is_operation {
        return Ok((parent, None));
    }
    let operation = convert::operation_name(parent);
    let (instance_name, id) = operation.map_err(|error| Error::Invalid(format!("parent: {error}")))?;
    Ok((instance_name, Some(id)))
}

/// The instance of a log stream that a method of ByteStream names.
fn enter(edge: &Edge, call: &Call, name: &LogName) -> Result<Instance> {
    let (instance_name, _) = parse_parent(&name.parent)?;
    edge.gate.enter_for(call, instance_name, Permission::Logs)
}

/// The instance of a log stream that a client wants to read. The output of a run requires the same permissions as the
/// operations that wait for the run: principals that were told its name with an operation of their own may read it, and
/// so may principals that may see all operations.
fn enter_to_read(edge: &Edge, call: &Call, name: &LogName) -> Result<Instance> {
    let StreamId::Run(run, _) = name.id else { return enter(edge, call, name) };
    let (instance_name, _) = parse_parent(&name.parent)?;
    let instance = edge.gate.enter_for(call, instance_name, Permission::OperationsOwn)?;
    if !edge.log_streams.was_told(run, call.principal()) {
        edge.gate.require(call, &instance, Permission::OperationsAll)?;
    }
    Ok(instance)
}

/// ByteStream.Read of a log stream: the existing bytes from the offset, then new ones until the end (LOG-03).
pub(super) fn read(edge: &Edge, call: &Call, name: &LogName, request: &ReadRequest) -> Result<ReadStream> {
    let instance = enter_to_read(edge, call, name)?;
    let offset = u64::try_from(request.read_offset)
        .map_err(|_| Error::OutOfRange(format!("read_offset {} is negative", request.read_offset)))?;
    let limit = u64::try_from(request.read_limit).map_err(|_| Error::invalid("read_limit is negative"))?;
    let reading = Reading {
        follower: edge.log_streams.follow(name, call.caller())?,
        blob: None,
        cas: edge.cas.on_behalf_of(call.caller()).for_build(call.build()),
        instance,
        offset,
        left: if limit == 0 { u64::MAX } else { limit },
    };
    let messages = stream::try_unfold((reading, call.clone()), |(mut reading, call)| async move {
        let Some(data) = reading.next().await? else { return Ok(None) };
        // Room is reserved only now, because the next output may come after hours.
        call.reserve(data.len()).await?;
        Ok(Some((ReadResponse { data }, (reading, call))))
    });
    Ok(stalled::watched(messages.boxed()))
}

/// The position of a Read.
struct Reading {
    follower: Follower,
    /// The blob, once the stream is stored as one.
    blob: Option<BlobReader>,
    cas: Cas,
    instance: Instance,
    offset: u64,
    left: u64,
}

impl Reading {
    /// The next bytes, which are never empty; `None` at the end.
    async fn next(&mut self) -> Result<Option<Bytes>> {
        let max = usize::try_from(self.left).unwrap_or(usize::MAX).min(READ_WINDOW_BYTES);
        if max == 0 {
            return Ok(None);
        }
        let data = loop {
            if let Some(blob) = &self.blob {
                break blob.read_at(self.offset, max).await?;
            }
            match self.follower.next(self.offset, max).await? {
                Piece::Bytes(data) => break data,
                Piece::End => return Ok(None),
                Piece::Stored(digest) if self.offset > digest.size() => {
                    return Err(Error::OutOfRange(format!(
                        "read_offset {} is not within the log stream, which ended at byte {}",
                        self.offset,
                        digest.size()
                    )));
                }
                Piece::Stored(digest) => self.blob = Some(self.cas.open(&self.instance, digest).await?),
            }
        };
        self.offset = self.offset.saturating_add(data.len() as u64);
        self.left = self.left.saturating_sub(data.len() as u64);
        // A read of a blob is empty only at its end.
        Ok((!data.is_empty()).then_some(data))
    }
}

/// ByteStream.Write to a log stream: appends each message as it arrives, so that readers get it at once. A Write that
/// ends without `finish_write` leaves the stream open (LOG-05). It may be silent for as long as the stream is kept.
pub(super) async fn write(
    edge: &Edge,
    call: &Call,
    name: &LogName,
    mut messages: WriteStream,
    first: WriteRequest,
) -> Result<Response<WriteResponse>, Status> {
    enter(edge, call, name)?;
    let writer = edge.log_streams.writer(name)?;
    let idle_limit = writer.idle_limit().unwrap_or(WRITE_IDLE_LIMIT);
    let resource_name = first.resource_name.clone();
    let mut message = Some(first);
    let mut committed = writer.committed();
    while let Some(WriteRequest { resource_name: named, write_offset, data, finish_write }) = message {
        if !named.is_empty() && named != resource_name {
            return Err(Error::invalid("resource_name changes within the stream").into());
        }
        let offset = u64::try_from(write_offset)
            .map_err(|_| Error::Invalid(format!("write_offset {write_offset} is negative")))?;
        call.count_upload()?;
        committed = writer.append(offset, data, finish_write).await?;
        if finish_write {
            if let Ok(Some(_)) = messages.next(CLOSE_WAIT).await {
                return Err(Error::invalid("a message follows the one with finish_write").into());
            }
            break;
        }
        message = select! {
            next = messages.next(idle_limit) => next?,
            closing = writer.closing() => return Err(closing.into()),
        };
    }
    Ok(Response::new(WriteResponse { committed_size: wire_size(committed) }))
}

/// QueryWriteStatus of a log stream, by its write name.
pub(super) fn query(edge: &Edge, call: &Call, name: &LogName) -> Result<QueryWriteStatusResponse> {
    enter(edge, call, name)?;
    let committed = edge.log_streams.writer(name)?.committed();
    Ok(QueryWriteStatusResponse { committed_size: wire_size(committed), complete: committed.finished })
}

fn wire_size(committed: Committed) -> i64 {
    i64::try_from(committed.bytes).unwrap_or(i64::MAX)
}
