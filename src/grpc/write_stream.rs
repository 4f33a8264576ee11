//! [`WriteStream`]: the messages of a ByteStream.Write, handed on in pieces as they arrive.
//!
//! tonic collects each message in a buffer of its own before it decodes it. For an upload in messages of a megabyte, this means to
//! copy every byte once more, into memory that the kernel has to clear first. Here the fields before the data are read from the
//! frame in which they arrive, and the data is handed on frame by frame without a copy. Each piece is a [`WriteRequest`] with its
//! own offset, so the rules for messages apply to pieces. Only the first piece of a message has its name, and only the last one
//! its `finish_write`.
//!
//! Every client sends the data as the last field. A message in another form, or one that does not parse, is collected and decoded
//! as a whole, and counts as unfinished until then ([`super::intake`]). So is a small one ([`WHOLE_UP_TO_BYTES`]), because a small
//! blob that is there as a whole is stored at once. Compressed messages take the way through tonic.
//!
//! Bound: a piece keeps the frame in memory that it came in, so a small one is copied ([`COPIED_BELOW_BYTES`]).

use super::{REQUEST_MAX_BYTES, byte_stream::ByteStreamService, claim::Claim, codec};
use crate::{call::Call, grpc::services::byte_stream_server::ByteStreamServer};
use bytes::{Buf as _, Bytes, BytesMut};
use futures::{future::BoxFuture, stream::StreamExt as _};
use gorego_reapi::{
    error::Error,
    proto::bytestream::{WriteRequest, WriteResponse},
    resource_name::{Encoding, ResourceName},
};
use http_body::Body;
use prost::encoding::decode_varint;
use std::{
    convert::Infallible,
    future::poll_fn,
    mem,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::time::{Instant, Sleep, sleep_until};
use tonic::{Code, Request, Response, Status, Streaming, body::Body as TonicBody, server::NamedService};
use tower::Service;

const PATH: &str = "/google.bytestream.ByteStream/Write";
/// Length of the flag and the length before each message.
const PREFIX_BYTES: usize = 5;
/// The fields before the data are looked for in this many bytes. The name of a blob has about 150.
const HEAD_MAX_BYTES: usize = 4 * 1024;
/// Messages up to this size are handed on whole.
const WHOLE_UP_TO_BYTES: usize = 64 * 1024 + HEAD_MAX_BYTES;
/// Pieces below this size are copied: the allocation that they are a part of has the size of the largest frame, 16 KiB.
const COPIED_BELOW_BYTES: usize = 12 * 1024;

/// Tags of the fields of a [`WriteRequest`], with their wire types.
mod tag {
    pub(super) const RESOURCE_NAME: u64 = 1 << 3 | 2;
    pub(super) const WRITE_OFFSET: u64 = 2 << 3;
    pub(super) const FINISH_WRITE: u64 = 3 << 3;
    pub(super) const DATA: u64 = 10 << 3 | 2;
}

/// The messages of one Write.
pub(super) struct WriteStream {
    source: Source,
    /// Since when it waits for the client.
    waits_since: Option<Instant>,
    /// Set for the end of the wait, or for an earlier time.
    alarm: Option<Pin<Box<Sleep>>>,
}

enum Source {
    /// Whole messages.
    Messages(Streaming<WriteRequest>),
    /// The body of the request.
    Pieces(MessagePieces),
}

impl WriteStream {
    /// The messages that tonic collects.
    pub(super) fn of_messages(messages: Streaming<WriteRequest>) -> Self {
        Self { source: Source::Messages(messages), waits_since: None, alarm: None }
    }

    fn of_body(body: TonicBody) -> Self {
        Self { source: Source::Pieces(MessagePieces::new(body)), waits_since: None, alarm: None }
    }

    /// The next piece, or `None` at the end of the stream. No piece is lost if the future is dropped.
    ///
    /// # Errors
    /// Errors of the stream, and `DEADLINE_EXCEEDED` when the client sends nothing for this time.
    pub(super) async fn next(&mut self, limit: Duration) -> Result<Option<WriteRequest>, Status> {
        poll_fn(|context| self.poll_next(context, limit)).await
    }

    fn poll_next(
        &mut self,
        context: &mut Context<'_>,
        limit: Duration,
    ) -> Poll<Result<Option<WriteRequest>, Status>> {
        let polled = match &mut self.source {
            Source::Messages(messages) => messages.poll_next_unpin(context).map(Option::transpose),
            Source::Pieces(pieces) => pieces.poll_next(context),
        };
        if polled.is_ready() {
            self.waits_since = None;
            return polled;
        }
        let end = *self.waits_since.get_or_insert_with(Instant::now) + limit;
        let alarm = self.alarm.get_or_insert_with(|| Box::pin(sleep_until(end)));
        if alarm.deadline() > end {
            alarm.as_mut().reset(end);
        }
        loop {
            ready!(alarm.as_mut().poll(context));
            if Instant::now() >= end {
                return Poll::Ready(Err(silent(limit).into()));
            }
            // Something has arrived since the alarm was set.
            alarm.as_mut().reset(end);
        }
    }
}

fn silent(limit: Duration) -> Error {
    Error::DeadlineExceeded(format!(
        "the upload was silent for {limit:?}; QueryWriteStatus says from where to go on"
    ))
}

/// Reads pieces from the body of a request.
struct MessagePieces {
    body: TonicBody,
    claim: Option<Arc<Claim>>,
    /// What has arrived and is not read yet.
    unread: Bytes,
    state: ReadState,
    /// Whether the stream is an uncompressed upload, as its first message says.
    is_plain: bool,
}

enum ReadState {
    /// Before or within the prefix of a message and the fields before its data.
    Head,
    /// Within the data of a message.
    Data {
        /// The fields of the next piece.
        next: WriteRequest,
        /// Bytes of the data that are still to come.
        left: usize,
    },
    /// Within a message that is decoded as a whole.
    Whole { message: BytesMut, length: usize },
}

impl MessagePieces {
    fn new(body: TonicBody) -> Self {
        let claim = Claim::current();
        let pieces = Self { body, claim, unread: Bytes::new(), state: ReadState::Head, is_plain: false };
        pieces.collect(false);
        pieces
    }

    /// Says whether the bytes of an unfinished message are kept in memory here.
    fn collect(&self, collects: bool) {
        if let Some(claim) = &self.claim {
            claim.pass_on(!collects);
        }
    }

    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Result<Option<WriteRequest>, Status>> {
        loop {
            if let Some(piece) = self.read()? {
                return Poll::Ready(Ok(Some(piece)));
            }
            let frame = match ready!(Pin::new(&mut self.body).poll_frame(context)) {
                Some(Ok(frame)) => frame,
                // The client has cancelled the call.
                Some(Err(status)) if status.code() == Code::Cancelled => return Poll::Ready(Ok(None)),
                Some(Err(status)) => return Poll::Ready(Err(status)),
                None if self.is_between_messages() => return Poll::Ready(Ok(None)),
                None => return Poll::Ready(Err(Status::internal("Unexpected EOF decoding stream."))),
            };
            // Trailers end the stream.
            let Ok(data) = frame.into_data() else { return Poll::Ready(Ok(None)) };
            self.unread = if self.unread.is_empty() {
                data
            } else {
                let mut joined = BytesMut::with_capacity(self.unread.len() + data.len());
                joined.extend_from_slice(&self.unread);
                joined.extend_from_slice(&data);
                joined.freeze()
            };
        }
    }

    fn is_between_messages(&self) -> bool {
        matches!(self.state, ReadState::Head) && self.unread.is_empty()
    }

    /// The beginning of the next message. Small messages are collected, and those of log streams and of compressed uploads: a log
    /// stream takes or refuses each as a whole, and of a compressed upload a message is decoded when it has arrived.
    fn head(&mut self) -> Result<MessageHead, Status> {
        let head = MessageHead::parse(&self.unread)?;
        let MessageHead::Complete { fields, data, length } = &head else { return Ok(head) };
        let whole = length + data - PREFIX_BYTES;
        let is_small = whole <= WHOLE_UP_TO_BYTES;
        if is_small && fields.finish_write {
            // Nothing may follow it, so nobody asks what the name says.
            return Ok(MessageHead::Unusual { length: whole });
        }
        if !fields.resource_name.is_empty() {
            let name = ResourceName::parse_write(&fields.resource_name);
            self.is_plain = name.is_ok_and(|name| name.encoding == Encoding::Identity);
        }
        Ok(if self.is_plain && !is_small { head } else { MessageHead::Unusual { length: whole } })
    }

    /// Reads the next piece from what has arrived, if it is enough for one.
    fn read(&mut self) -> Result<Option<WriteRequest>, Status> {
        loop {
            match &mut self.state {
                ReadState::Head => match self.head()? {
                    MessageHead::Incomplete => return Ok(None),
                    MessageHead::Complete { fields, data, length } => {
                        self.unread.advance(length);
                        if data == 0 {
                            return Ok(Some(fields));
                        }
                        self.state = ReadState::Data { next: fields, left: data };
                    }
                    MessageHead::Unusual { length } => {
                        self.unread.advance(PREFIX_BYTES);
                        self.state = ReadState::Whole { message: BytesMut::with_capacity(length), length };
                        self.collect(true);
                    }
                },
                ReadState::Data { next, left } => {
                    let taken = self.unread.len().min(*left);
                    if taken == 0 {
                        return Ok(None);
                    }
                    let data = self.unread.split_to(taken);
                    let piece = piece(next, data, *left);
                    *left -= taken;
                    if *left == 0 {
                        self.state = ReadState::Head;
                    }
                    return Ok(Some(piece));
                }
                ReadState::Whole { message, length } => {
                    let taken = self.unread.len().min(*length - message.len());
                    message.extend_from_slice(&self.unread.split_to(taken));
                    if message.len() < *length {
                        return Ok(None);
                    }
                    let message = mem::take(message).freeze();
                    self.state = ReadState::Head;
                    self.collect(false);
                    return codec::decode(message).map(Some);
                }
            }
        }
    }
}

/// The piece of a message with this data, of which this many bytes were still to come.
fn piece(next: &mut WriteRequest, data: Bytes, left: usize) -> WriteRequest {
    let is_small = data.len() < COPIED_BELOW_BYTES;
    let data = if is_small { Bytes::copy_from_slice(&data) } else { data };
    let write_offset = next.write_offset;
    next.write_offset = write_offset.saturating_add(data.len() as i64);
    WriteRequest {
        resource_name: mem::take(&mut next.resource_name),
        write_offset,
        finish_write: next.finish_write && data.len() == left,
        data,
    }
}

/// The beginning of a message.
#[derive(Debug, PartialEq)]
enum MessageHead {
    /// More bytes are needed.
    Incomplete,
    /// The fields before the data, the length of the data, and the length of what comes before it.
    Complete { fields: WriteRequest, data: usize, length: usize },
    /// A message of this length that is collected: usually because its data is not its last field, or because it does not parse.
    Unusual { length: usize },
}

impl MessageHead {
    fn parse(bytes: &[u8]) -> Result<Self, Status> {
        let Some((&[flag, a, b, c, d], rest)) = bytes.split_first_chunk::<PREFIX_BYTES>() else {
            return Ok(Self::Incomplete);
        };
        if flag != 0 {
            return Err(compressed(flag));
        }
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        if length > REQUEST_MAX_BYTES {
            return Err(Status::out_of_range(format!(
                "Error, decoded message length too large: found {length} bytes, the limit is: {REQUEST_MAX_BYTES} bytes"
            )));
        }
        let present = rest.get(..length).unwrap_or(rest);
        Ok(match Self::fields(present, length) {
            Some((fields, data)) => {
                let length = PREFIX_BYTES + length - data;
                Self::Complete { fields, data, length }
            }
            None if present.len() < length.min(HEAD_MAX_BYTES) => Self::Incomplete,
            None => Self::Unusual { length },
        })
    }

    /// Reads the fields of a message up to its data, and the length of the data. `None` if that is not the rest of the message, or
    /// if anything is missing or wrong.
    fn fields(mut bytes: &[u8], length: usize) -> Option<(WriteRequest, usize)> {
        let mut fields = WriteRequest::default();
        let mut left = length;
        while left > 0 {
            let before = bytes.len();
            match decode_varint(&mut bytes).ok()? {
                tag::RESOURCE_NAME => {
                    let length = usize::try_from(decode_varint(&mut bytes).ok()?).ok()?;
                    let (name, rest) = bytes.split_at_checked(length)?;
                    fields.resource_name = std::str::from_utf8(name).ok()?.to_owned();
                    bytes = rest;
                }
                tag::WRITE_OFFSET => fields.write_offset = decode_varint(&mut bytes).ok()? as i64,
                tag::FINISH_WRITE => fields.finish_write = decode_varint(&mut bytes).ok()? != 0,
                tag::DATA => {
                    let data = usize::try_from(decode_varint(&mut bytes).ok()?).ok()?;
                    left -= before - bytes.len();
                    return (data == left).then_some((fields, data));
                }
                _ => return None,
            }
            left -= before - bytes.len();
        }
        Some((fields, 0))
    }
}

/// The error for a message that says that it is compressed although the request does not say how. The texts are those of tonic.
fn compressed(flag: u8) -> Status {
    Status::internal(match flag {
        1 => "protocol error: received message with compressed-flag but no grpc-encoding was specified"
            .to_owned(),
        flag => format!(
            "protocol error: received message with invalid compression flag: {flag} (valid flags are 0 and 1), while sending request"
        ),
    })
}

/// The ByteStream service as it is served: Write reads its request itself.
#[derive(Debug, Clone)]
pub(super) struct ByteStreamRoute {
    server: ByteStreamServer<ByteStreamService>,
    service: Arc<ByteStreamService>,
}

impl ByteStreamRoute {
    pub(super) fn new(
        service: ByteStreamService,
        limited: impl FnOnce(ByteStreamServer<ByteStreamService>) -> ByteStreamServer<ByteStreamService>,
    ) -> Self {
        let service = Arc::new(service);
        Self { server: limited(ByteStreamServer::from_arc(service.clone())), service }
    }
}

impl NamedService for ByteStreamRoute {
    const NAME: &'static str = <ByteStreamServer<ByteStreamService> as NamedService>::NAME;
}

impl<B> Service<http::Request<B>> for ByteStreamRoute
where
    B: Body<Data = Bytes, Error = Status> + Send + 'static,
{
    type Response = http::Response<TonicBody>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let is_plain = request.headers().get("grpc-encoding").is_none_or(|encoding| encoding == "identity");
        if request.uri().path() != PATH || !is_plain {
            return self.server.call(request);
        }
        let (head, body) = request.into_parts();
        let write = PlainWrite { service: self.service.clone(), body: Some(TonicBody::new(body)) };
        let request = http::Request::from_parts(head, TonicBody::empty());
        Box::pin(async move {
            let mut grpc = tonic::server::Grpc::new(codec::Codec::<WriteResponse, WriteRequest>::default());
            Ok(grpc.client_streaming(write, request).await)
        })
    }
}

/// One Write. tonic reads the head of the request and writes the answer; the body is read here.
struct PlainWrite {
    service: Arc<ByteStreamService>,
    body: Option<TonicBody>,
}

impl Service<Request<Streaming<WriteRequest>>> for PlainWrite {
    type Response = Response<WriteResponse>;
    type Error = Status;
    type Future = BoxFuture<'static, Result<Response<WriteResponse>, Status>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Streaming<WriteRequest>>) -> Self::Future {
        let call = Call::of(request.extensions());
        let (service, body) = (self.service.clone(), self.body.take().unwrap_or_default());
        Box::pin(async move { service.write_stream(&call, WriteStream::of_body(body)).await })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::executor::block_on;
    use http_body::Frame;
    use proptest::prelude::*;
    use prost::Message as _;
    use std::collections::VecDeque;

    /// A body of these frames, and then this error if there is one.
    struct Frames(VecDeque<Bytes>, Option<Status>);

    impl Body for Frames {
        type Data = Bytes;
        type Error = Status;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
            let frame = self.0.pop_front().map(|data| Ok(Frame::data(data)));
            Poll::Ready(frame.or_else(|| self.1.take().map(Err)))
        }
    }

    /// All pieces of a body, and how it ends.
    fn read(
        frames: impl IntoIterator<Item = Bytes>,
        error: Option<Status>,
    ) -> (Vec<WriteRequest>, Option<Status>) {
        let mut pieces = MessagePieces::new(TonicBody::new(Frames(frames.into_iter().collect(), error)));
        let mut read = Vec::new();
        loop {
            match block_on(poll_fn(|context| pieces.poll_next(context))) {
                Ok(Some(piece)) => read.push(piece),
                Ok(None) => return (read, None),
                Err(status) => return (read, Some(status)),
            }
        }
    }

    fn framed(message: &[u8]) -> Vec<u8> {
        let length = u32::try_from(message.len()).unwrap();
        [&[0][..], &length.to_be_bytes(), message].concat()
    }

    fn cut(bytes: &[u8], frame: usize) -> Vec<Bytes> {
        bytes.chunks(frame).map(Bytes::copy_from_slice).collect()
    }

    /// The name of an uncompressed upload.
    fn upload(number: usize) -> String {
        let hash = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        format!("uploads/6ba7b810-9dad-11d1-80b4-00c04fd430c8/blobs/{hash}/{number}")
    }

    fn message(resource_name: &str, write_offset: i64, bytes: usize, finish_write: bool) -> WriteRequest {
        let data = (0..bytes).map(|at| (at % 251) as u8).collect();
        WriteRequest { resource_name: resource_name.into(), write_offset, finish_write, data }
    }

    /// Joins the pieces of messages that follow each other.
    fn joined(pieces: Vec<WriteRequest>) -> Vec<WriteRequest> {
        let mut messages: Vec<WriteRequest> = Vec::new();
        for piece in pieces {
            match messages.last_mut() {
                Some(last)
                    if piece.resource_name.is_empty()
                        && !last.finish_write
                        && !piece.data.is_empty()
                        && last.write_offset + last.data.len() as i64 == piece.write_offset =>
                {
                    last.data = [&last.data[..], &piece.data].concat().into();
                    last.finish_write = piece.finish_write;
                }
                _ => messages.push(piece),
            }
        }
        messages
    }

    proptest! {
        #[test]
        fn pieces_are_the_messages_however_they_are_cut(
            sizes in proptest::collection::vec(prop_oneof![Just(0usize), 1usize..300, 60_000usize..100_000], 1..4),
            frame in prop_oneof![400usize..600, 1_000usize..20_000],
            form in 0u8..3,
        ) {
            let name = |at: usize| if form == 1 && at > 0 { String::new() } else { upload(at) };
            // The offsets have gaps, so that what was not sent together is not joined.
            let messages: Vec<_> = sizes
                .iter()
                .enumerate()
                .map(|(at, bytes)| message(&name(at), 1_000_000 * at as i64, *bytes, at + 1 == sizes.len()))
                .collect();
            let encode = |message: &WriteRequest| {
                let mut bytes = message.encode_to_vec();
                if form == 2 {
                    // An unknown field after the data.
                    bytes.extend([0x78, 1]);
                }
                framed(&bytes)
            };
            let wire: Vec<u8> = messages.iter().flat_map(encode).collect();
            let (pieces, error) = read(cut(&wire, frame), None);
            prop_assert!(error.is_none());
            if form == 2 {
                prop_assert_eq!(pieces.len(), messages.len());
            }
            prop_assert_eq!(joined(pieces), messages);
        }
    }

    #[test]
    fn data_is_handed_on_before_its_message_is_complete_and_without_a_copy() {
        let wire = framed(&message(&upload(0), 0, 100_000, true).encode_to_vec());
        let frames = cut(&wire, 16_384);
        let places: Vec<_> = frames.iter().map(|frame| frame.as_ptr_range()).collect();
        let (pieces, error) = read(frames.into_iter().take(5), None);
        assert_eq!(error.unwrap().message(), "Unexpected EOF decoding stream.");
        assert_eq!(pieces.len(), 5);
        for (piece, place) in pieces.iter().zip(places) {
            assert!(place.contains(&piece.data.as_ptr()) && !piece.finish_write);
        }
        assert_eq!(pieces[1].write_offset, pieces[0].data.len() as i64);
    }

    /// Otherwise an upload in tiny frames could keep a thousand times its size in memory.
    #[test]
    fn small_pieces_do_not_keep_their_frames() {
        let wire = framed(&message(&upload(0), 0, 100_000, true).encode_to_vec());
        let frames = cut(&wire, 500);
        let places: Vec<_> = frames.iter().map(|frame| frame.as_ptr_range()).collect();
        for piece in read(frames.clone(), None).0 {
            assert!(places.iter().all(|place| !place.contains(&piece.data.as_ptr())));
        }
    }

    #[test]
    fn a_small_message_is_handed_on_whole() {
        let small = message(&upload(0), 0, 64 * 1024, true);
        let (pieces, error) = read(cut(&framed(&small.encode_to_vec()), 10_000), None);
        assert!(error.is_none());
        assert_eq!(pieces, [small]);
    }

    #[test]
    fn a_message_that_is_too_long_compressed_or_malformed_is_refused_as_tonic_does() {
        let refusal = |wire: &[u8]| read(cut(wire, 7), None).1.unwrap();
        let too_long = refusal(&[0, 0xff, 0, 0, 0]);
        assert_eq!(too_long.code(), Code::OutOfRange);
        assert!(
            too_long.message().starts_with("Error, decoded message length too large: found 4278190080 bytes")
        );
        assert!(refusal(&[1, 0, 0, 0, 0]).message().contains("no grpc-encoding was specified"));
        assert!(refusal(&[7, 0, 0, 0, 0]).message().contains("invalid compression flag: 7"));
        for malformed in [&b"\x0a\x01\xff"[..], b"\x52\x05ab", b"\x08\x01", b"\xff\xff"] {
            let expected = WriteRequest::decode(malformed).unwrap_err().to_string();
            let status = refusal(&framed(malformed));
            assert_eq!((status.code(), status.message()), (Code::Internal, &*expected));
        }
        assert_eq!(refusal(&[0, 0, 0]).code(), Code::Internal);
    }

    #[test]
    fn a_stream_that_the_client_cancels_ends_and_another_error_is_passed_on() {
        let wire = framed(&message(&upload(0), 0, 100_000, false).encode_to_vec());
        let cut_off = || cut(&wire[..wire.len() - 50], 20_000);
        let (pieces, error) = read(cut_off(), Some(Status::cancelled("reset")));
        assert!(!pieces.is_empty() && error.is_none());
        let (_, error) = read(cut_off(), Some(Status::deadline_exceeded("silent")));
        assert_eq!(error.unwrap().code(), Code::DeadlineExceeded);
    }
}
