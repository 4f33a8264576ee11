//! [`WriteStream`]: the messages of a ByteStream.Write, handed on in pieces as they arrive.
//!
//! tonic collects each message in a buffer of its own before it decodes it. For an upload in messages of a megabyte,
//! this copies every byte once more, into memory that the kernel has to clear first. Here, the fields before the data
//! are read from the frame in which they arrive ([`head`]), and the data is handed on frame by frame without a copy.
//! Each piece is a [`WriteRequest`] with its own offset, so the rules for messages apply to pieces. Only the first
//! piece of a message has its name, and only the last one has its `finish_write`.
//!
//! Messages of an unusual form are collected and decoded as a whole, and count as unfinished until then
//! ([`super::intake`]). Small messages are collected as well ([`WHOLE_UP_TO_BYTES`]), because a small blob that has
//! arrived as a whole is stored at once. Messages with gRPC compression are read by tonic
//! ([`super::byte_stream`]).
//!
//! Bound: a piece keeps the frame in memory that it came in, so a small piece is copied ([`COPIED_BELOW_BYTES`]).

mod head;

use self::head::{HEAD_MAX_BYTES, MessageHead, PREFIX_BYTES};
use super::{codec, request_memory::RequestMemory};
use crate::{call::Call, timer::Timer};
use bytes::{Buf as _, Bytes, BytesMut};
use futures::stream::StreamExt as _;
use gorego_reapi::{
    error::Error,
    proto::bytestream::WriteRequest,
    resource_name::{Encoding, ResourceName},
};
use http_body::Body;
use std::{
    future::poll_fn,
    mem,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::time::Instant;
use tonic::{Code, Status, Streaming, body::Body as TonicBody};

/// Messages up to this size are handed on as a whole.
const WHOLE_UP_TO_BYTES: usize = 64 * 1024 + HEAD_MAX_BYTES;
/// Pieces below this size are copied. Frames of the default size of HTTP/2 (16 KiB) are not. In the largest frames
/// ([`super::FRAME_MAX_BYTES`]), a piece can keep about five times its own bytes in memory.
const COPIED_BELOW_BYTES: usize = 12 * 1024;

/// The messages of one Write.
pub(super) struct WriteStream {
    source: Source,
    call: Call,
    /// Number of bytes of the request at the last poll.
    received: u64,
    /// The time since which the stream waits for the client.
    waits_since: Option<Instant>,
    /// Ends the wait for the client.
    timer: Timer,
}

enum Source {
    /// Complete messages, which tonic decodes.
    Messages(Streaming<WriteRequest>),
    /// The body of the request.
    Pieces(MessagePieces),
}

impl WriteStream {
    /// A stream of messages that tonic collects.
    pub(super) fn of_messages(messages: Streaming<WriteRequest>, call: Call) -> Self {
        Self::new(Source::Messages(messages), call)
    }

    pub(super) fn of_body(body: TonicBody, call: Call) -> Self {
        Self::new(Source::Pieces(MessagePieces::new(body)), call)
    }

    fn new(source: Source, call: Call) -> Self {
        Self { source, call, received: 0, waits_since: None, timer: Timer::default() }
    }

    /// The next piece, or `None` at the end of the stream. No piece is lost if the future is dropped.
    ///
    /// # Errors
    /// Errors of the stream, and `DEADLINE_EXCEEDED` when the client sends nothing for the time `limit`.
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
        // The bytes that have arrived may be a part of a message.
        let received = self.call.bytes_in();
        if polled.is_ready() || mem::replace(&mut self.received, received) != received {
            self.waits_since = None;
        }
        if polled.is_ready() {
            return polled;
        }
        let end = *self.waits_since.get_or_insert_with(Instant::now) + limit;
        ready!(self.timer.poll(context, end));
        Poll::Ready(Err(silent(limit).into()))
    }
}

fn silent(limit: Duration) -> Error {
    Error::DeadlineExceeded(format!(
        "the client sent nothing for {limit:?}; QueryWriteStatus returns the offset to resume from"
    ))
}

/// Reads pieces from the body of a request.
struct MessagePieces {
    body: TonicBody,
    memory: Option<Arc<RequestMemory>>,
    /// Bytes that have arrived and are not read yet.
    unread: Bytes,
    state: ReadState,
    /// Whether the stream is an upload of uncompressed data, according to its first message.
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
        let memory = RequestMemory::current();
        let pieces = Self { body, memory, unread: Bytes::new(), state: ReadState::Head, is_plain: false };
        pieces.collect(false);
        pieces
    }

    /// Sets whether the bytes of an unfinished message are kept in memory here.
    fn collect(&self, collects: bool) {
        if let Some(memory) = &self.memory {
            memory.pass_on(!collects);
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

    /// The beginning of the next message. Three kinds of messages are collected: small ones, messages to log streams,
    /// which accept or refuse each as a whole, and messages with zstd data, which are decompressed when they have
    /// arrived.
    fn head(&mut self) -> Result<MessageHead, Status> {
        let head = MessageHead::parse(&self.unread)?;
        let MessageHead::Complete { fields, data, length } = &head else { return Ok(head) };
        let whole = length + data - PREFIX_BYTES;
        let is_small = whole <= WHOLE_UP_TO_BYTES;
        if is_small && fields.finish_write {
            // No message may follow, so the name is not needed here.
            return Ok(MessageHead::Whole { length: whole });
        }
        if !fields.resource_name.is_empty() {
            let name = ResourceName::parse_write(&fields.resource_name);
            self.is_plain = name.is_ok_and(|name| name.encoding == Encoding::Identity);
        }
        Ok(if self.is_plain && !is_small { head } else { MessageHead::Whole { length: whole } })
    }

    /// Reads the next piece from the bytes that have arrived, if they are enough.
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
                    MessageHead::Whole { length } => {
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

/// Makes the piece of a message with this data. `left` is the length of the rest of the message's data, including this
/// piece.
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

#[cfg(test)]
mod tests {
    use super::*;
    use futures::executor::block_on;
    use http_body::Frame;
    use proptest::prelude::*;
    use prost::Message as _;
    use std::collections::VecDeque;
    use tokio::time::{Sleep, sleep};

    /// A body that has these frames and ends with this error, if there is one.
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

    /// All pieces of a body, and the error at its end, if there is one.
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
            // The offsets have gaps, so that separate messages are not joined.
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

    /// A body with a pause before each of its frames, and before its end.
    struct SlowFrames {
        frames: VecDeque<Bytes>,
        call: Call,
        pause: Duration,
        timer: Pin<Box<Sleep>>,
    }

    impl Body for SlowFrames {
        type Data = Bytes;
        type Error = Status;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            context: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
            ready!(self.timer.as_mut().poll(context));
            let next = Instant::now() + self.pause;
            self.timer.as_mut().reset(next);
            let frame = self.frames.pop_front();
            self.call.received(frame.as_ref().map_or(0, Bytes::len));
            Poll::Ready(frame.map(|data| Ok(Frame::data(data))))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_is_silent_only_while_none_of_its_bytes_arrive() {
        const LIMIT: Duration = Duration::from_secs(100);
        let small = message(&upload(0), 0, 1_000, true);
        let body = |pause| {
            let (call, timer) = (Call::default(), Box::pin(sleep(pause)));
            let frames = cut(&framed(&small.encode_to_vec()), 300).into();
            let body = SlowFrames { frames, call: call.clone(), pause, timer };
            WriteStream::of_body(TonicBody::new(body), call)
        };
        let whole = body(LIMIT - Duration::from_secs(1)).next(LIMIT).await.unwrap();
        assert_eq!(whole, Some(small.clone()));
        let silent = body(LIMIT + Duration::from_secs(1)).next(LIMIT).await.unwrap_err();
        assert_eq!(silent.code(), Code::DeadlineExceeded);
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
