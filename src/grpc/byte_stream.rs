//! The ByteStream service: blobs of any size, in pieces.
//!
//! Under a compressed name, the stream contains zstd, and offsets refer to the uncompressed blob. The exceptions are
//! the offsets after the first one in a Write, which count compressed bytes (BS-12, BS-27). The store compresses and
//! decompresses.
//!
//! Two structs without IO enforce the rules about offsets: `ReadWindow` and `WriteCheck`. The handlers move bytes
//! between a stream and a handle of the store. A piece is read when the connection has room for it. A slow client has
//! at most two pieces in memory: the one that is being sent and the next. When an upload breaks off, the store keeps
//! its bytes under the resource name, so that the client can resume (BS-20).

mod read_body;
mod route;

pub(super) use route::ByteStreamRoute;

use super::{
    Edge, ReadStream, log_stream, stalled,
    stream_limits::{CLOSE_WAIT, READ_WINDOW_BYTES, WRITE_IDLE_LIMIT},
    write_stream::WriteStream,
};
use crate::{
    actors::cas::{BlobWriter, SmallUpload, Upload, blob::BlobReader, forms::zstd_reader::ZstdReader},
    call::Call,
    config::CommittedSize,
    grpc::services::byte_stream_server::ByteStream,
    instance::Instance,
    log_streams::name::LogName,
};
use futures::stream::{self, StreamExt as _};
use gorego_reapi::{
    digest::Digest,
    error::{Error, Result},
    escape::shown,
    proto::bytestream::{
        QueryWriteStatusRequest, QueryWriteStatusResponse, ReadRequest, ReadResponse, WriteRequest,
        WriteResponse,
    },
    resource_name::{Encoding, ResourceName},
};
use std::{pin::pin, sync::Arc};
use tokio::select;
use tonic::{Request, Response, Status, Streaming};

#[derive(Debug)]
pub(crate) struct ByteStreamService(pub Arc<Edge>);

#[tonic::async_trait]
impl ByteStream for ByteStreamService {
    type ReadStream = ReadStream;

    async fn read(&self, request: Request<ReadRequest>) -> Result<Response<ReadStream>, Status> {
        if let Some(name) = LogName::parse(&request.get_ref().resource_name) {
            let stream =
                log_stream::read(&self.0, &Call::of(request.extensions()), &name?, request.get_ref())?;
            return Ok(Response::new(stream));
        }
        let name = ResourceName::parse_read(&request.get_ref().resource_name)?;
        let call = Call::of(request.extensions());
        let (instance, digest) = self.resolve(&call, &name)?;
        let request = request.into_inner();
        let window = ReadWindow::new(digest, request.read_offset, request.read_limit)?;
        let cas = self.0.cas.on_behalf_of(call.caller()).for_build(call.build());
        // The blob is opened before the response begins, so that its absence is the status of the call (BS-08).
        Ok(Response::new(match name.encoding {
            Encoding::Identity => {
                let reader = cas.open(&instance, digest).await?;
                read_stream(reader, digest, window, call)
            }
            Encoding::Zstd if request.read_limit != 0 => {
                return Err(Error::invalid("read_limit is set on a compressed read").into());
            }
            Encoding::Zstd => zstd_stream(cas.open_zstd(&instance, digest, window.next).await?, call),
        }))
    }

    async fn write(
        &self,
        request: Request<Streaming<WriteRequest>>,
    ) -> Result<Response<WriteResponse>, Status> {
        let call = Call::of(request.extensions());
        self.write_stream(&call, WriteStream::of_messages(request.into_inner(), call.clone())).await
    }

    async fn query_write_status(
        &self,
        request: Request<QueryWriteStatusRequest>,
    ) -> Result<Response<QueryWriteStatusResponse>, Status> {
        let resource = &request.get_ref().resource_name;
        if let Some(name) = LogName::parse(resource) {
            return Ok(Response::new(log_stream::query(&self.0, &Call::of(request.extensions()), &name?)?));
        }
        let name = ResourceName::parse_write(resource)?;
        let call = Call::of(request.extensions());
        let (instance, digest) = self.resolve(&call, &name)?;
        let cas = self.0.cas.on_behalf_of(call.caller()).for_build(call.build());
        let status = cas.query_upload(&instance, resource, digest).await?;
        Ok(Response::new(QueryWriteStatusResponse {
            committed_size: wire_size(status.committed),
            complete: status.complete,
        }))
    }
}

impl ByteStreamService {
    /// Handles a Write. Its messages may arrive in pieces.
    pub(super) async fn write_stream(
        &self,
        call: &Call,
        mut messages: WriteStream,
    ) -> Result<Response<WriteResponse>, Status> {
        let first = messages.next(WRITE_IDLE_LIMIT).await?;
        let first = first.ok_or_else(|| Error::invalid("the stream has no message"))?;
        if let Some(name) = LogName::parse(&first.resource_name) {
            return log_stream::write(&self.0, call, &name?, messages, first).await;
        }
        let (name, check) = WriteCheck::begin(&first)?;
        let (instance, digest) = self.resolve(call, &name)?;
        let cas = self.0.cas.on_behalf_of(call.caller()).for_build(call.build());
        if check.is_whole(&first)
            && let Some(upload) = cas.begin_small_upload(&instance, digest)?
        {
            store_small(upload, messages, first, check, call).await?;
            return Ok(Response::new(WriteResponse { committed_size: wire_size(digest.size()) }));
        }
        let upload = cas.begin_upload(&instance, &first.resource_name, digest, check.next_offset).await?;
        let end = match (upload, name.encoding) {
            (Upload::Present, _) => UploadEnd::Early,
            (Upload::Writer(writer), Encoding::Identity) => {
                receive(*writer, messages, first, check, call).await?
            }
            (Upload::Writer(writer), Encoding::Zstd) => {
                receive(writer.decoding(), messages, first, check, call).await?
            }
        };
        let committed_size = committed_size(&name, end, self.0.settings.compressed_committed_size);
        Ok(Response::new(WriteResponse { committed_size }))
    }

    /// Enters the instance that a resource name contains, and returns it with the digest of the blob.
    fn resolve(&self, call: &Call, name: &ResourceName) -> Result<(Instance, Digest)> {
        let instance = self.0.gate.enter(call, &name.instance_name)?;
        let digest = instance.digest_in_name(name.digest, name.function_is_named)?;
        call.note_blob(digest);
        Ok((instance, digest))
    }
}

fn wire_size(size: u64) -> i64 {
    i64::try_from(size).unwrap_or(i64::MAX)
}

/// The end of a successful upload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum UploadEnd {
    /// The client sent everything, up to this offset.
    Sent(u64),
    /// The blob is already stored, so the rest was not needed (BS-24).
    Early,
}

/// The `committed_size` of a successful Write (BS-23, BS-24, BS-25).
fn committed_size(name: &ResourceName, end: UploadEnd, convention: CommittedSize) -> i64 {
    let size = wire_size(name.digest.size());
    match (name.encoding, end, convention) {
        (Encoding::Identity, ..) | (_, UploadEnd::Sent(_), CommittedSize::Uncompressed) => size,
        (_, UploadEnd::Sent(offset), CommittedSize::Compressed) => wire_size(offset),
        (_, UploadEnd::Early, _) | (_, _, CommittedSize::MinusOne) => -1,
    }
}

/// The part of a blob that a Read requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct ReadWindow {
    next: u64,
    end: u64,
}

impl ReadWindow {
    /// From `offset` to the end of the blob, or at most `limit` bytes; 0 means no limit (BS-10).
    fn new(digest: Digest, offset: i64, limit: i64) -> Result<Self> {
        let size = digest.size();
        let next = u64::try_from(offset)
            .ok()
            .filter(|offset| *offset <= size)
            .ok_or_else(|| Error::OutOfRange(format!("read_offset {offset} is not within blob {digest}")))?;
        let limit = u64::try_from(limit).map_err(|_| Error::invalid("read_limit is negative"))?;
        let end = if limit == 0 { size } else { size.min(next.saturating_add(limit)) };
        Ok(Self { next, end })
    }

    /// Size of the next message; `None` at the end, so that no message is empty (BS-15).
    fn piece(&self) -> Option<usize> {
        let left = self.end.saturating_sub(self.next);
        (left > 0).then(|| usize::try_from(left).unwrap_or(usize::MAX).min(READ_WINDOW_BYTES))
    }

    /// Counts bytes that were sent.
    fn advance(&mut self, bytes: usize) {
        self.next = self.next.saturating_add(bytes as u64);
    }
}

/// The bytes of the window. If the blob ends early, the stream ends with an error instead of OK (BS-16).
fn read_stream(reader: BlobReader, digest: Digest, window: ReadWindow, call: Call) -> ReadStream {
    let holds_a_file = reader.is_file();
    let messages = stream::try_unfold((reader, window, call), move |(reader, mut window, call)| async move {
        let Some(piece) = window.piece() else { return Ok(None) };
        let piece = call.reserve_piece(piece).await?;
        let data = reader.read_at(window.next, piece).await?;
        if data.is_empty() {
            let problem = format!("blob {digest} ends at byte {}; upload it again", window.next);
            return Err(Status::from(Error::DataLoss(problem)));
        }
        window.advance(data.len());
        Ok(Some((ReadResponse { data }, (reader, window, call))))
    })
    .boxed();
    // Blobs in memory need no watch: they are small, and no eviction waits for them.
    if holds_a_file { stalled::watched(messages) } else { messages }
}

/// The bytes of a compressed read. All messages except the last have the full size (BS-14).
fn zstd_stream(reader: ZstdReader, call: Call) -> ReadStream {
    let messages = stream::try_unfold((reader, call), |(mut reader, call)| async move {
        let piece = call.reserve_piece(READ_WINDOW_BYTES).await?;
        let data = reader.next(piece).await?;
        Ok(data.map(|data| (ReadResponse { data }, (reader, call))))
    });
    stalled::watched(messages.boxed())
}

/// The rules for the messages of one Write.
#[derive(Debug, Clone, PartialEq, Eq)]
struct WriteCheck {
    resource_name: String,
    /// Largest end of the stream; `None` if it is compressed.
    limit: Option<u64>,
    /// Required offset of the next message.
    next_offset: u64,
    finished: bool,
}

impl WriteCheck {
    /// Parses the name and the first offset of the first message (BS-18). Its data is checked by
    /// [`WriteCheck::accept`].
    fn begin(first: &WriteRequest) -> Result<(ResourceName, Self)> {
        if first.resource_name.is_empty() {
            return Err(Error::invalid("resource_name is not set on the first message"));
        }
        let name = ResourceName::parse_write(&first.resource_name)?;
        let size = name.digest.size();
        let next_offset = u64::try_from(first.write_offset).ok().filter(|offset| *offset <= size);
        let next_offset = next_offset.ok_or_else(|| {
            Error::Invalid(format!("write_offset {} is not within blob {}", first.write_offset, name.digest))
        })?;
        let resource_name = first.resource_name.clone();
        let limit = (name.encoding == Encoding::Identity).then_some(size);
        Ok((name, Self { resource_name, limit, next_offset, finished: false }))
    }

    /// Checks a message before its data is used. The first message is checked, too.
    fn accept(&mut self, message: &WriteRequest) -> Result<()> {
        if self.finished {
            return Err(Error::invalid("a message follows the one with finish_write"));
        }
        if !message.resource_name.is_empty() && message.resource_name != self.resource_name {
            return Err(Error::Invalid(format!(
                "resource_name changes to \"{}\" within the stream",
                shown(&message.resource_name)
            )));
        }
        if u64::try_from(message.write_offset) != Ok(self.next_offset) {
            return Err(Error::Invalid(format!(
                "write_offset is {}; the bytes so far end at {}",
                message.write_offset, self.next_offset
            )));
        }
        let end = self.next_offset.saturating_add(message.data.len() as u64);
        if let Some(size) = self.limit.filter(|size| end > *size) {
            return Err(Error::Invalid(format!(
                "the upload has data up to byte {end}, but its resource_name says that the blob has {size}"
            )));
        }
        self.next_offset = end;
        self.finished = message.finish_write;
        Ok(())
    }

    /// Whether this first message contains a whole, uncompressed blob.
    fn is_whole(&self, first: &WriteRequest) -> bool {
        first.finish_write && self.next_offset == 0 && self.limit == Some(first.data.len() as u64)
    }

    /// The error for a stream that ends without `finish_write` (BS-21).
    fn unfinished(&self) -> Error {
        let of = self.limit.map(|size| format!(" of {size}")).unwrap_or_default();
        Error::Invalid(format!(
            "the stream ends at byte {}{of} without finish_write; the bytes are kept for a while, \
             QueryWriteStatus returns the offset to resume from",
            self.next_offset
        ))
    }
}

/// Stores a small blob that came in one message.
async fn store_small(
    upload: SmallUpload,
    mut messages: WriteStream,
    first: WriteRequest,
    mut check: WriteCheck,
    call: &Call,
) -> Result<(), Status> {
    check.accept(&first)?;
    call.count_upload()?;
    if let Ok(Some(extra)) = messages.next(CLOSE_WAIT).await {
        check.accept(&extra)?;
    }
    Ok(upload.store(first.data).await?)
}

/// Receives an upload until it is complete, or until another request has stored the blob.
async fn receive(
    mut writer: BlobWriter,
    mut messages: WriteStream,
    first: WriteRequest,
    mut check: WriteCheck,
    call: &Call,
) -> Result<UploadEnd, Status> {
    let mut message = first;
    let mut superseded = pin!(writer.superseded());
    loop {
        check.accept(&message)?;
        call.count_upload()?;
        let finish = message.finish_write;
        if !message.data.is_empty() {
            writer.write(message.data).await?;
        }
        if finish {
            if let Ok(Some(extra)) = messages.next(CLOSE_WAIT).await {
                check.accept(&extra)?;
            }
            writer.finish().await?;
            return Ok(UploadEnd::Sent(check.next_offset));
        }
        message = select! {
            biased;
            // This ends the upload at once, even if the client sends nothing (BS-24).
            () = &mut superseded => return Ok(UploadEnd::Early),
            next = messages.next(WRITE_IDLE_LIMIT) => next?.ok_or_else(|| check.unfinished())?,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use gorego_reapi::digest::DigestFunction;
    use proptest::prelude::*;

    const HASH: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    const UUID: &str = "6ba7b810-9dad-11d1-80b4-00c04fd430c8";

    fn digest(size: i64) -> Digest {
        Digest::parse(DigestFunction::Sha256, HASH, size).unwrap()
    }

    fn upload(size: i64) -> String {
        format!("uploads/{UUID}/blobs/{HASH}/{size}")
    }

    fn message(name: &str, write_offset: i64, data: &'static [u8], finish_write: bool) -> WriteRequest {
        let data = Bytes::from_static(data);
        WriteRequest { resource_name: name.into(), write_offset, finish_write, data }
    }

    /// Checks a stream of messages up to its end.
    fn stream(messages: &[WriteRequest]) -> Result<WriteCheck> {
        let (_, mut check) = WriteCheck::begin(&messages[0])?;
        for message in messages {
            check.accept(message)?;
        }
        if check.finished { Ok(check) } else { Err(check.unfinished()) }
    }

    /// BS-09, BS-10.
    #[test]
    fn offsets_and_limits_outside_the_blob_are_refused() {
        let window = |offset, limit| ReadWindow::new(digest(10), offset, limit);
        assert_eq!(window(0, 0), Ok(ReadWindow { next: 0, end: 10 }));
        assert_eq!(window(10, 0).unwrap().piece(), None);
        assert_eq!(window(4, 3), Ok(ReadWindow { next: 4, end: 7 }));
        assert_eq!(window(4, i64::MAX), Ok(ReadWindow { next: 4, end: 10 }));
        for offset in [11, -1, i64::MAX, i64::MIN] {
            assert!(matches!(window(offset, 0), Err(Error::OutOfRange(_))));
        }
        assert!(matches!(window(0, -1), Err(Error::Invalid(_))));
    }

    proptest! {
        /// BS-07, BS-10, BS-14, BS-15. Reads of the blob may be of any length.
        #[test]
        fn the_pieces_of_a_read_are_never_empty_or_large_and_sum_up_to_the_range(
            size in 0i64..1_000_000, offset in 0i64..1_000_000, limit in 0i64..1_000_000,
            short in proptest::collection::vec(1usize..200_000, 1..20),
        ) {
            prop_assume!(offset <= size);
            let mut window = ReadWindow::new(digest(size), offset, limit).unwrap();
            let mut short = short.iter().cycle();
            let mut sum = 0;
            while let Some(piece) = window.piece() {
                prop_assert!(piece > 0 && piece <= READ_WINDOW_BYTES);
                let read = piece.min(*short.next().unwrap());
                window.advance(read);
                sum += read as i64;
            }
            let rest = size - offset;
            prop_assert_eq!(sum, if limit == 0 { rest } else { rest.min(limit) });
        }
    }

    /// BS-23, BS-24, BS-25.
    #[test]
    fn what_a_finished_upload_answers_depends_on_its_name_its_end_and_the_convention() {
        use CommittedSize::{Compressed, MinusOne, Uncompressed};
        let plain = ResourceName::parse_write(&upload(10)).unwrap();
        let packed = ResourceName { encoding: Encoding::Zstd, ..plain.clone() };
        for convention in [Compressed, Uncompressed, MinusOne] {
            assert_eq!(committed_size(&plain, UploadEnd::Sent(10), convention), 10);
            assert_eq!(committed_size(&plain, UploadEnd::Early, convention), 10);
            assert_eq!(committed_size(&packed, UploadEnd::Early, convention), -1);
        }
        assert_eq!(committed_size(&packed, UploadEnd::Sent(7), Compressed), 7);
        assert_eq!(committed_size(&packed, UploadEnd::Sent(7), Uncompressed), 10);
        assert_eq!(committed_size(&packed, UploadEnd::Sent(7), MinusOne), -1);
    }

    /// BS-27: the first offset counts bytes of the blob. The later ones count compressed bytes, and may exceed the size
    /// of the blob.
    #[test]
    fn offsets_of_a_compressed_upload_go_on_by_what_is_sent() {
        let name = format!("uploads/{UUID}/compressed-blobs/zstd/{HASH}/4");
        let resumed = [message(&name, 3, b"abcdef", false), message("", 9, b"gh", true)];
        assert_eq!(stream(&resumed).unwrap().next_offset, 11);
        assert!(stream(&[message(&name, 5, b"ab", true)]).is_err());
        assert!(stream(&[message(&name, 0, b"ab", false), message("", 4, b"", true)]).is_err());
    }

    /// BS-18.
    #[test]
    fn the_name_is_needed_first_may_be_repeated_and_never_changes() {
        let name = upload(4);
        let first = message(&name, 0, b"ab", false);
        assert!(stream(&[first.clone(), message("", 2, b"cd", true)]).is_ok());
        assert!(stream(&[first.clone(), message(&name, 2, b"cd", true)]).is_ok());
        assert!(stream(&[first, message(&upload(5), 2, b"cd", true)]).is_err());
        assert!(stream(&[message("", 0, b"abcd", true)]).is_err());
    }

    /// BS-19, BS-20, BS-30.
    #[test]
    fn each_message_starts_where_the_last_one_ended() {
        let name = upload(4);
        let split = |first: i64, second: i64| {
            stream(&[message(&name, first, b"ab", false), message("", second, b"cd", true)])
        };
        assert_eq!(split(0, 2).unwrap().next_offset, 4);
        for (first, second) in [(0, 3), (0, 1), (0, 0), (0, -1), (-1, 1), (5, 7), (i64::MAX, 0)] {
            assert!(matches!(split(first, second), Err(Error::Invalid(_))), "{first} {second}");
        }
        let resumed = stream(&[message(&name, 2, b"cd", true)]).unwrap();
        assert_eq!(resumed.next_offset, 4);
        let empty_in_between =
            [message(&name, 0, b"abcd", false), message("", 4, b"", false), message("", 4, b"", true)];
        assert!(stream(&empty_in_between).is_ok());
        assert!(stream(&[message(&upload(0), 0, b"", true)]).is_ok());
    }

    /// BS-21, BS-22.
    #[test]
    fn data_after_the_end_and_ends_without_finish_are_refused() {
        let name = upload(4);
        let whole = message(&name, 0, b"abcd", true);
        assert!(stream(std::slice::from_ref(&whole)).is_ok());
        assert!(stream(&[whole.clone(), message("", 4, b"", false)]).is_err());
        assert!(stream(&[whole, message("", 4, b"", true)]).is_err());
        assert!(stream(&[message(&name, 0, b"abcde", true)]).is_err());
        let error = stream(&[message(&name, 0, b"abc", false)]).unwrap_err();
        assert!(error.to_string().contains("byte 3 of 4"), "{error}");
    }
}
