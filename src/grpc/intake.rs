//! Request messages on their way in: limits on unfinished messages in bytes and time, and when messages are handed on.
//!
//! A message is collected completely before its handler sees it, and HTTP/2 returns flow-control window for the
//! collected bytes. So one connection could leave the largest message unfinished on each of its streams. Here the bytes
//! of unfinished messages are counted ([`UNFINISHED`]) until the handler asks for what follows them. A sender that
//! stops in the middle of a message, or before the end of a request of one message, is given up after a time limit.
//!
//! A message that may take much memory or time to decode is handed on when there is room for it ([`DECODED`] and
//! [`super::request_memory`]). Until then its last piece, and everything after it, is held back. This applies to
//! compressed messages, and to messages above [`UNCOUNTED_BYTES`] whose type contains lists.
//!
//! Most methods take one message. A second one is refused, because the library would decode and discard it.

use super::{
    REQUEST_MAX_BYTES,
    codec::REQUEST_MAX_MEMORY,
    request_memory::{HoldsMemory, RequestMemory},
};
use crate::{
    budget::{Bounds, Budget, Refusal, Share},
    call::Call,
    caller::Caller,
    timer::Timer,
};
use bytes::Bytes;
use futures::future::BoxFuture;
use gorego_reapi::wire::{self, UNCOUNTED_BYTES};
use http::Request;
use http_body::{Body, Frame, SizeHint};
use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::time::{Instant, timeout};
use tonic::Status;
use tower::{Layer, Service};

/// Bytes of messages that are unfinished or that no handler has taken. Sixteen of the largest messages fit, and many
/// more of the usual size.
pub(crate) const UNFINISHED: Bounds =
    Bounds { what: "bytes of unfinished requests", total: 256 * 1024 * 1024, connection: 188 * 1024 * 1024 };
/// Memory for large requests that are being decoded or answered. Two of the largest fit, and many usual ones.
pub(crate) const DECODED: Bounds = Bounds {
    what: "bytes of large requests",
    total: 256 * 1024 * 1024,
    connection: 256 * 1024 * 1024 - LARGEST_REQUEST_MEMORY,
};
/// The most that one request takes of [`DECODED`]: its compressed bytes, its plain bytes, and the decoded message. This
/// much is kept free for other peers.
const LARGEST_REQUEST_MEMORY: u64 = 2 * REQUEST_MAX_BYTES as u64 + REQUEST_MAX_MEMORY;
/// Upper bound of gzip's compression ratio, which is 1,032.
const GZIP_RATIO_MAX: u64 = 1_100;
/// Requests that are a stream of messages. Their handlers limit the pauses.
const STREAMS: [&str; 2] = ["/google.bytestream.ByteStream/Write", "/grpc.reflection."];
/// Requests up to this size are not counted, because the number of calls is limited. So a client that has reached its
/// limit can still send small requests.
const UNHELD_BYTES: u64 = 4 * 1024;
/// Time limit for a silent client before the first message, in the middle of a message, and before the end of a request
/// of one message.
pub(crate) const SILENCE_LIMIT: Duration = Duration::from_secs(60);
/// Time limit for a large message to wait for decoding.
pub(crate) const DECODING_WAIT: Duration = Duration::from_secs(60);
/// Messages of at least this size may take more than a millisecond to decode.
const LABORIOUS_BYTES: u64 = 128 * 1024;
/// Compressed messages of at least this size may take more than a millisecond to decode.
const LABORIOUS_COMPRESSED_BYTES: u64 = 256;

/// Length of the prefix of each message: a flag and four bytes of length.
const PREFIX_BYTES: usize = 5;

/// Puts an [`Intake`] before a service.
#[derive(Debug, Clone, Default)]
pub(crate) struct IntakeLayer {
    budgets: Budgets,
}

#[derive(Debug, Clone)]
struct Budgets {
    unfinished: Budget,
    decoded: Budget,
}

impl Default for Budgets {
    fn default() -> Self {
        let decoded = Budget::keeping_free(DECODED, LARGEST_REQUEST_MEMORY);
        Self { unfinished: Budget::new(UNFINISHED), decoded }
    }
}

impl<S> Layer<S> for IntakeLayer {
    type Service = Intake<S>;

    fn layer(&self, inner: S) -> Intake<S> {
        Intake { inner, budgets: self.budgets.clone() }
    }
}

/// A service whose requests are limited while they arrive.
#[derive(Debug, Clone)]
pub(crate) struct Intake<S> {
    inner: S,
    budgets: Budgets,
}

impl<S: Service<Request<IncomingBody<B>>>, B> Service<Request<B>> for Intake<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = HoldsMemory<S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let caller = Call::of(request.extensions()).caller();
        let kind = RequestKind::of(request.uri().path(), request.headers());
        let (budgets, memory) = (self.budgets.clone(), Arc::<RequestMemory>::default());
        let of_body = memory.clone();
        let request = request.map(|body| IncomingBody::new(body, caller, budgets, of_body, kind));
        HoldsMemory::new(self.inner.call(request), memory)
    }
}

/// The kind of a request, from its headers.
#[derive(Debug, Clone, Copy)]
struct RequestKind {
    /// Whether it is a stream of messages.
    is_stream: bool,
    /// Whether its messages contain lists.
    has_lists: bool,
    /// Whether its compressed messages are in the gzip format.
    is_gzip: bool,
}

impl RequestKind {
    fn of(path: &str, headers: &http::HeaderMap) -> Self {
        Self {
            is_stream: STREAMS.iter().any(|prefix| path.starts_with(prefix)),
            has_lists: wire::request_has_lists(path),
            is_gzip: headers.get("grpc-encoding").is_some_and(|encoding| encoding == "gzip"),
        }
    }

    /// Upper bound of the memory of a message until it is answered; `None` if it is small.
    fn memory(self, message: CompleteMessage) -> Option<u64> {
        let is_large = self.has_lists && message.bytes > UNCOUNTED_BYTES as u64;
        if !is_large && !message.is_compressed {
            return None;
        }
        let length = message.bytes.min(REQUEST_MAX_BYTES as u64);
        let plain = self.decompressed(message);
        let decoded = match self.has_lists {
            true => wire::worst_case(length.max(plain), REQUEST_MAX_MEMORY),
            false => plain,
        };
        Some(length + plain + decoded)
    }

    /// Upper bound of the decompressed size of a message; 0 if it is not compressed.
    fn decompressed(self, message: CompleteMessage) -> u64 {
        let most = REQUEST_MAX_BYTES as u64;
        match message.is_compressed {
            true if self.is_gzip => message.bytes.saturating_mul(GZIP_RATIO_MAX).min(most),
            true => most,
            false => 0,
        }
    }
}

/// The body of a request.
pub(crate) struct IncomingBody<B> {
    body: B,
    /// Whether anything has arrived.
    is_begun: bool,
    message: PartialMessage,
    caller: Caller,
    budgets: Budgets,
    memory: Arc<RequestMemory>,
    kind: RequestKind,
    /// Whether a message is complete.
    is_complete: bool,
    /// Number of bytes that were handed on and that the handler has not taken.
    given: u64,
    /// Whether bytes were handed on since the handler asked for more.
    is_given: bool,
    /// Memory of the buffers for the largest message so far.
    largest: u64,
    /// Room for the bytes of the unfinished message, and for bytes that were handed on and not taken.
    held: Option<Share>,
    /// The end of a message that waits for its turn to be decoded.
    kept_back: Option<KeptBack>,
    /// Bytes that arrived after `kept_back`.
    rest: Bytes,
    last: Instant,
    /// Ends the wait for a silent client.
    timer: Timer,
}

/// The end of a message that waits for its turn to be decoded.
struct KeptBack {
    data: Bytes,
    is_laborious: bool,
    /// The wait for room to decode the message; `None` once the room is there.
    turn: Option<BoxFuture<'static, Result<Share, Status>>>,
}

impl<B> IncomingBody<B> {
    fn new(body: B, caller: Caller, budgets: Budgets, memory: Arc<RequestMemory>, kind: RequestKind) -> Self {
        Self {
            body,
            is_begun: false,
            message: PartialMessage::default(),
            caller,
            budgets,
            memory,
            kind,
            is_complete: false,
            given: 0,
            is_given: false,
            largest: 0,
            held: None,
            kept_back: None,
            rest: Bytes::new(),
            last: Instant::now(),
            timer: Timer::default(),
        }
    }

    /// Accepts bytes up to the end of the first message that has to wait for its turn to be decoded, and returns the
    /// bytes to hand on. If there is such a message, its end is kept back and the result is `None`.
    fn take(&mut self, mut data: Bytes) -> Result<Option<Bytes>, Status> {
        if self.is_complete && !self.kind.is_stream && !data.is_empty() {
            return Err(Status::invalid_argument("the request has more than the one message of this method"));
        }
        let (mut at, mut turn) = (0, None);
        while let Some(rest) = data.get(at..).filter(|rest| !rest.is_empty()) {
            let (taken, finished) = self.message.take(rest);
            at += taken;
            self.is_complete |= finished.is_some();
            let buffers = finished.map_or(0, |message| message.bytes + self.kind.decompressed(message));
            self.largest = self.largest.max(buffers);
            turn = finished.and_then(|message| self.turn(message));
            if turn.is_some() || (self.is_complete && !self.kind.is_stream) {
                break;
            }
        }
        self.rest = data.split_off(at);
        self.is_given = true;
        if !self.memory.passes_on() {
            self.given += data.len() as u64;
            self.hold(self.given)?;
        }
        if let Some(turn) = turn {
            self.kept_back = Some(KeptBack { data, ..turn });
            return Ok(None);
        }
        Ok(Some(data))
    }

    /// Gives back the room of the bytes that were handed on, because a handler that asks for more has taken them. The
    /// bytes of a request of one message are held until its end, because it is answered only then.
    fn let_go(&mut self) -> Result<(), Status> {
        if self.kind.is_stream && std::mem::take(&mut self.is_given) {
            self.memory.let_go();
            self.given = if self.memory.passes_on() { 0 } else { self.message.bytes };
            return self.hold(self.given);
        }
        Ok(())
    }

    /// Counts these bytes as unfinished, unless they are too few to be counted.
    fn hold(&mut self, bytes: u64) -> Result<(), Status> {
        let bytes = if bytes > UNHELD_BYTES { bytes } else { 0 };
        match &mut self.held {
            Some(held) if bytes > held.amount() => held.grow(bytes - held.amount()).map_err(too_much),
            Some(held) => {
                held.shrink_to(bytes);
                Ok(())
            }
            None if bytes > 0 => {
                self.held = Some(self.budgets.unfinished.take(self.caller, bytes).map_err(too_much)?);
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Makes a large message wait for its turn.
    fn turn(&self, message: CompleteMessage) -> Option<KeptBack> {
        let needed = self.kind.memory(message)?;
        let (budget, caller) = (self.budgets.decoded.clone(), self.caller);
        let turn = Box::pin(async move {
            let share = timeout(DECODING_WAIT, budget.wait_for(caller, needed)).await;
            share.map_err(|_| Status::resource_exhausted(BUSY))?.map_err(too_much)
        });
        let laborious = if message.is_compressed { LABORIOUS_COMPRESSED_BYTES } else { LABORIOUS_BYTES };
        Some(KeptBack { data: Bytes::new(), is_laborious: message.bytes >= laborious, turn: Some(turn) })
    }

    /// Hands on the end of a message when its turn has come.
    fn poll_kept_back(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let Some(kept_back) = &mut self.kept_back else { return Poll::Ready(None) };
        if let Some(turn) = &mut kept_back.turn {
            let share = ready!(turn.as_mut().poll(context))?;
            let is_laborious = kept_back.is_laborious;
            kept_back.turn = None;
            self.memory.hold(share, is_laborious);
            if is_laborious {
                // The message is decoded in the next poll of the call, which is marked as long.
                context.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
        self.last = Instant::now();
        Poll::Ready(self.kept_back.take().map(|kept_back| Ok(Frame::data(kept_back.data))))
    }

    /// Whether the client, not the handler of a stream, is expected to act.
    fn is_waited_for(&self) -> bool {
        !self.kind.is_stream || !self.is_begun || self.message.is_begun()
    }

    /// Ready when nothing has arrived for the time `limit`.
    fn poll_silence(&mut self, context: &mut Context<'_>, limit: Duration) -> Poll<()> {
        self.timer.poll(context, self.last + limit)
    }
}

const BUSY: &str = "the server is busy with other large requests; try again later, or send smaller ones";

fn silent() -> Status {
    let problem = format!("the request is incomplete, and nothing has arrived for {SILENCE_LIMIT:?}");
    Status::deadline_exceeded(problem)
}

fn too_much(refusal: Refusal) -> Status {
    gorego_reapi::error::Error::from(refusal).into()
}

impl<B: Body<Data = Bytes, Error = Status> + Unpin> Body for IncomingBody<B> {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.kept_back.is_none() {
            self.let_go()?;
        }
        loop {
            if self.kept_back.is_some() {
                return self.poll_kept_back(context);
            }
            let data = if self.rest.is_empty() {
                match Pin::new(&mut self.body).poll_frame(context) {
                    Poll::Ready(Some(Ok(frame))) => {
                        self.last = Instant::now();
                        self.is_begun = true;
                        match frame.into_data() {
                            Ok(data) => data,
                            Err(frame) => return Poll::Ready(Some(Ok(frame))),
                        }
                    }
                    Poll::Pending if self.is_waited_for() => {
                        return self.poll_silence(context, SILENCE_LIMIT).map(|()| Some(Err(silent())));
                    }
                    Poll::Pending => {
                        // The library reuses the buffer of the largest message for the next one.
                        let most = if self.memory.passes_on() { 0 } else { self.largest.max(self.given) };
                        self.hold(most)?;
                        return Poll::Pending;
                    }
                    other => return other,
                }
            } else {
                std::mem::take(&mut self.rest)
            };
            if let Some(data) = self.take(data)? {
                return Poll::Ready(Some(Ok(Frame::data(data))));
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.kept_back.is_none() && self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let is_all = self.kept_back.is_none() && self.rest.is_empty();
        if is_all { self.body.size_hint() } else { SizeHint::default() }
    }
}

/// A message that has arrived completely.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct CompleteMessage {
    bytes: u64,
    is_compressed: bool,
}

/// The message that is currently arriving.
#[derive(Debug, Default)]
struct PartialMessage {
    prefix: [u8; PREFIX_BYTES],
    /// Number of prefix bytes that have arrived.
    seen: usize,
    /// Number of bytes of the message that have not arrived.
    left: u64,
    /// Number of bytes of the message that have arrived.
    bytes: u64,
}

impl PartialMessage {
    fn is_begun(&self) -> bool {
        self.seen > 0
    }

    /// Consumes bytes up to the end of the message. Returns their number, and the message if it is complete.
    fn take(&mut self, data: &[u8]) -> (usize, Option<CompleteMessage>) {
        let mut taken = 0;
        while let Some(place) = self.prefix.get_mut(self.seen) {
            let Some(&next) = data.get(taken) else { return (taken, None) };
            *place = next;
            self.seen += 1;
            taken += 1;
            let [_, length @ ..] = self.prefix;
            self.left = u32::from_be_bytes(length).into();
        }
        let part = usize::try_from(self.left).unwrap_or(usize::MAX).min(data.len() - taken);
        self.left -= part as u64;
        self.bytes += part as u64;
        taken += part;
        if self.left > 0 {
            return (taken, None);
        }
        let [flag, ..] = self.prefix;
        let finished = CompleteMessage { bytes: self.bytes, is_compressed: flag != 0 };
        *self = Self::default();
        (taken, Some(finished))
    }
}

#[cfg(test)]
mod tests;
