//! Request messages on their way in: how much of unfinished ones is held, for how long, and when they are handed on.
//!
//! A message is collected completely before its handler sees it, and HTTP/2 hands the sender new room for what is collected. So
//! one connection could leave as much unfinished as streams times the largest message. Here the bytes of unfinished messages
//! are counted ([`UNFINISHED`]), and a sender that stops in the middle of one is not waited for without end.
//!
//! A message that may take much memory or time to decode is handed on when there is room for it ([`DECODED`], and
//! [`super::claim`]); until then the last piece of it is kept back. That is one that is compressed, or one of more than
//! [`UNCOUNTED_BYTES`] with lists in it.

use super::{
    REQUEST_MAX_BYTES,
    claim::{Claim, Claimed},
    codec::REQUEST_MAX_MEMORY,
    request_log::Call,
};
use crate::{
    budget::{Bounds, Budget, Refusal, Share},
    caller::Caller,
    wire::{self, UNCOUNTED_BYTES},
};
use bytes::Bytes;
use futures::future::BoxFuture;
use http::Request;
use http_body::{Frame, SizeHint};
use std::{
    future::Future as _,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::time::{Instant, Sleep, sleep_until, timeout};
use tonic::{Status, body::Body};
use tower::{Layer, Service};

/// Bytes of unfinished messages that the server holds: twenty of the largest ones, and many more of those that clients send.
pub const UNFINISHED: Bounds =
    Bounds { what: "bytes of unfinished requests", total: 320 * 1024 * 1024, connection: 256 * 1024 * 1024 };
/// Memory for large requests that are being decoded or answered. Two of the worst ones fit, and many of usual ones.
pub const DECODED: Bounds =
    Bounds { what: "bytes of large requests", total: 192 * 1024 * 1024, connection: 128 * 1024 * 1024 };
/// How long a sender may be silent before its first message and in the middle of one.
pub const SILENCE_LIMIT: Duration = Duration::from_secs(60);
/// How long a large message may wait until it is decoded.
pub const DECODING_WAIT: Duration = Duration::from_secs(60);
/// Messages from this size on may take more than a millisecond or so to decode.
const LABORIOUS_BYTES: u64 = 128 * 1024;
/// Compressed ones from this size on.
const LABORIOUS_COMPRESSED_BYTES: u64 = 256;

/// What precedes each message: a flag and four bytes of length.
const PREFIX_BYTES: usize = 5;

/// Puts an [`Intake`] before a service.
#[derive(Debug, Clone)]
pub struct IntakeLayer {
    budgets: Budgets,
}

impl Default for IntakeLayer {
    fn default() -> Self {
        Self { budgets: Budgets { unfinished: Budget::new(UNFINISHED), decoded: Budget::new(DECODED) } }
    }
}

#[derive(Debug, Clone)]
struct Budgets {
    unfinished: Budget,
    decoded: Budget,
}

impl<S> Layer<S> for IntakeLayer {
    type Service = Intake<S>;

    fn layer(&self, inner: S) -> Intake<S> {
        Intake { inner, budgets: self.budgets.clone() }
    }
}

/// A service whose requests are watched while they come in.
#[derive(Debug, Clone)]
pub struct Intake<S> {
    inner: S,
    budgets: Budgets,
}

impl<S: Service<Request<Body>>> Service<Request<Body>> for Intake<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = Claimed<S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let caller = request.extensions().get::<Call>().map(Call::caller).unwrap_or_default();
        let has_lists = wire::request_has_lists(request.uri().path());
        let (budgets, claim) = (self.budgets.clone(), Arc::new(Claim::new(has_lists)));
        let of_body = claim.clone();
        let request = request.map(|body| Body::new(Watched::new(body, caller, budgets, of_body, has_lists)));
        Claimed::new(self.inner.call(request), claim)
    }
}

/// The body of a request.
struct Watched {
    body: Body,
    /// Whether anything has come.
    is_begun: bool,
    message: Unfinished,
    caller: Caller,
    budgets: Budgets,
    claim: Arc<Claim>,
    /// Whether its messages have lists in them.
    has_lists: bool,
    /// What is held of the unfinished message.
    held: Option<Share>,
    /// The end of a message that waits for its turn to be decoded.
    kept_back: Option<KeptBack>,
    last: Instant,
    /// Set when a message was waited for.
    silence: Option<Pin<Box<Sleep>>>,
}

/// See [`Watched::kept_back`].
struct KeptBack {
    frame: Frame<Bytes>,
    is_laborious: bool,
    /// `None` when it was over.
    turn: Option<BoxFuture<'static, Result<Share, Status>>>,
}

impl Watched {
    fn new(body: Body, caller: Caller, budgets: Budgets, claim: Arc<Claim>, has_lists: bool) -> Self {
        Self {
            body,
            is_begun: false,
            message: Unfinished::default(),
            caller,
            budgets,
            claim,
            has_lists,
            held: None,
            kept_back: None,
            last: Instant::now(),
            silence: None,
        }
    }

    /// Takes a frame in, and keeps it back if a message ends in it that has to wait.
    fn take(&mut self, frame: Frame<Bytes>) -> Result<Option<Frame<Bytes>>, Status> {
        let Some(data) = frame.data_ref() else { return Ok(Some(frame)) };
        let finished = self.message.take(data);
        if let Some(kept_back) = finished.and_then(|message| self.keep_back(&message)) {
            // What is held is let go of when the message is handed on.
            self.hold(self.message.bytes.max(self.held.as_ref().map_or(0, Share::amount)))?;
            self.kept_back = Some(KeptBack { frame, ..kept_back });
            return Ok(None);
        }
        self.hold(self.message.bytes)?;
        Ok(Some(frame))
    }

    /// Counts so many bytes as unfinished.
    fn hold(&mut self, bytes: u64) -> Result<(), Status> {
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

    fn keep_back(&self, message: &Finished) -> Option<KeptBack> {
        let is_large = self.has_lists && message.bytes > UNCOUNTED_BYTES as u64;
        if !is_large && !message.is_compressed {
            return None;
        }
        let (length, plain) = match message.is_compressed {
            true => (message.bytes, REQUEST_MAX_BYTES as u64),
            false => (message.bytes, 0),
        };
        let memory =
            if self.has_lists { wire::worst_case(length.max(plain), REQUEST_MAX_MEMORY) } else { plain };
        let claimed = length.min(REQUEST_MAX_BYTES as u64) + plain + memory;
        let (budget, caller) = (self.budgets.decoded.clone(), self.caller);
        let turn = Box::pin(async move {
            let share = timeout(DECODING_WAIT, budget.wait_for(caller, claimed)).await;
            share.map_err(|_| Status::resource_exhausted(BUSY))?.map_err(too_much)
        });
        let is_laborious =
            length >= if message.is_compressed { LABORIOUS_COMPRESSED_BYTES } else { LABORIOUS_BYTES };
        Some(KeptBack { frame: Frame::data(Bytes::new()), is_laborious, turn: Some(turn) })
    }

    /// Hands the end of a message on when its turn has come.
    fn poll_kept_back(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let Some(kept_back) = &mut self.kept_back else { return Poll::Ready(None) };
        if let Some(turn) = &mut kept_back.turn {
            let share = ready!(turn.as_mut().poll(context))?;
            let is_laborious = kept_back.is_laborious;
            kept_back.turn = None;
            self.claim.hold(share, is_laborious);
            if is_laborious {
                // What follows is for the next poll of the call, which knows that it takes long.
                context.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
        let unfinished = self.message.bytes;
        Poll::Ready(self.kept_back.take().map(|kept_back| self.hold(unfinished).map(|()| kept_back.frame)))
    }

    fn poll_silence(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let end = self.last + SILENCE_LIMIT;
        let silence = self.silence.get_or_insert_with(|| Box::pin(sleep_until(end)));
        loop {
            if silence.as_mut().poll(context).is_pending() {
                return Poll::Pending;
            }
            if Instant::now() >= end {
                return Poll::Ready(());
            }
            // Something came since it was set.
            silence.as_mut().reset(end);
        }
    }
}

const BUSY: &str = "the server is busy with other large requests; try again later, or send smaller ones";

fn too_much(refusal: Refusal) -> Status {
    crate::error::Error::from(refusal).into()
}

impl http_body::Body for Watched {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        loop {
            if self.kept_back.is_some() {
                return self.poll_kept_back(context);
            }
            return match Pin::new(&mut self.body).poll_frame(context) {
                Poll::Ready(Some(Ok(frame))) => {
                    self.last = Instant::now();
                    self.is_begun = true;
                    match self.take(frame) {
                        Ok(None) => continue,
                        Ok(Some(frame)) => Poll::Ready(Some(Ok(frame))),
                        Err(status) => Poll::Ready(Some(Err(status))),
                    }
                }
                Poll::Pending if self.message.is_begun() || !self.is_begun => self.poll_silence(context).map(|()| {
                    let problem = format!(
                        "the request broke off: it was silent for {SILENCE_LIMIT:?} before or inside of a message"
                    );
                    Some(Err(Status::deadline_exceeded(problem)))
                }),
                other => other,
            };
        }
    }

    fn is_end_stream(&self) -> bool {
        self.kept_back.is_none() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        if self.kept_back.is_some() { SizeHint::default() } else { self.body.size_hint() }
    }
}

/// A message that has come in completely.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Finished {
    bytes: u64,
    is_compressed: bool,
}

/// The message at the end of what has come in.
#[derive(Debug, Default)]
struct Unfinished {
    prefix: [u8; PREFIX_BYTES],
    /// How much of the prefix has come.
    seen: usize,
    /// What is missing of the message after its prefix.
    left: u64,
    /// What has come of it.
    bytes: u64,
}

impl Unfinished {
    fn is_begun(&self) -> bool {
        self.seen > 0
    }

    /// Takes the next bytes. Returns the largest message that ends in them, a compressed one before all others.
    fn take(&mut self, mut data: &[u8]) -> Option<Finished> {
        let mut largest: Option<Finished> = None;
        while let Some(&first) = data.first() {
            if let Some(place) = self.prefix.get_mut(self.seen) {
                *place = first;
                self.seen += 1;
                data = data.get(1..).unwrap_or_default();
                let [_, length @ ..] = self.prefix;
                self.left = u32::from_be_bytes(length).into();
            } else {
                let part = usize::try_from(self.left).unwrap_or(usize::MAX).min(data.len());
                data = data.get(part..).unwrap_or_default();
                self.left -= part as u64;
                self.bytes += part as u64;
            }
            if self.seen == PREFIX_BYTES && self.left == 0 {
                let [flag, ..] = self.prefix;
                let finished = Finished { bytes: self.bytes, is_compressed: flag != 0 };
                let weight = |message: &Finished| (message.is_compressed, message.bytes);
                largest = largest.into_iter().chain([finished]).max_by_key(weight);
                *self = Self::default();
            }
        }
        largest
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::{FutureExt as _, StreamExt as _, stream};
    use proptest::prelude::*;
    use std::future::poll_fn;

    fn message(length: usize) -> Vec<u8> {
        let prefix = [0].into_iter().chain((length as u32).to_be_bytes());
        prefix.chain(std::iter::repeat_n(7, length)).collect()
    }

    proptest! {
        #[test]
        fn what_is_held_is_the_unfinished_message_however_it_is_cut(
            lengths in proptest::collection::vec(0usize..50, 0..8), rest in 1usize..40, piece in 1usize..60,
        ) {
            let mut all: Vec<u8> = lengths.into_iter().flat_map(message).collect();
            all.extend(&message(rest)[..rest]);
            let mut unfinished = Unfinished::default();
            for piece in all.chunks(piece) {
                unfinished.take(piece);
            }
            prop_assert_eq!(unfinished.bytes, rest.saturating_sub(PREFIX_BYTES) as u64);
            prop_assert!(unfinished.is_begun());
            unfinished.take(&message(rest)[rest..]);
            prop_assert!(!unfinished.is_begun() && unfinished.bytes == 0);
        }
    }

    /// A body that sends this and then nothing, and is never over.
    fn stalled(bytes: Vec<u8>, budgets: &Budgets) -> Watched {
        watched(stream::iter([Ok::<_, Status>(Bytes::from(bytes))]).chain(stream::pending()), budgets)
    }

    fn watched(
        pieces: impl futures::Stream<Item = Result<Bytes, Status>> + Send + 'static,
        budgets: &Budgets,
    ) -> Watched {
        let body = Body::new(axum::body::Body::from_stream(pieces));
        Watched::new(body, Caller::default(), budgets.clone(), Arc::default(), true)
    }

    async fn next(body: &mut Watched) -> Result<Frame<Bytes>, Status> {
        use http_body::Body as _;
        poll_fn(|context| Pin::new(&mut *body).poll_frame(context)).await.unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_sender_that_stops_inside_of_a_message_is_not_waited_for() {
        let budgets = IntakeLayer::default().budgets;
        let mut body = stalled(message(100)[..50].to_vec(), &budgets);
        next(&mut body).await.unwrap();
        assert_eq!(budgets.unfinished.held(), 45);
        let begin = Instant::now();
        assert_eq!(next(&mut body).await.unwrap_err().code(), tonic::Code::DeadlineExceeded);
        assert_eq!(begin.elapsed().as_secs(), SILENCE_LIMIT.as_secs());
        drop(body);
        assert_eq!(budgets.unfinished.held(), 0);
        // One that opens a stream and sends nothing is not waited for either.
        let nothing = stream::pending::<Result<Bytes, Status>>();
        let mut body = watched(nothing, &budgets);
        assert_eq!(next(&mut body).await.unwrap_err().code(), tonic::Code::DeadlineExceeded);
        // Between two messages it may be silent: that is for the handler to judge.
        let mut body = stalled(message(100), &budgets);
        next(&mut body).await.unwrap();
        assert!(tokio::time::timeout(10 * SILENCE_LIMIT, next(&mut body)).await.is_err());
    }

    #[tokio::test]
    async fn what_all_hold_together_is_bounded() {
        let budgets = IntakeLayer::default().budgets;
        let others = budgets.unfinished.take(Caller::default(), UNFINISHED.connection - 10).unwrap();
        let mut body = stalled(message(100)[..50].to_vec(), &budgets);
        assert_eq!(next(&mut body).await.unwrap_err().code(), tonic::Code::ResourceExhausted);
        drop(body);
        assert!(next(&mut stalled(message(100), &budgets)).await.is_ok(), "what came completely is not held");
        assert_eq!(budgets.unfinished.held(), others.amount());
    }

    #[tokio::test]
    async fn a_large_message_is_handed_on_when_there_is_room_to_decode_it() {
        let budgets = IntakeLayer::default().budgets;
        let others = budgets.decoded.take(Caller::default(), DECODED.connection).unwrap();
        let mut body = stalled(message(UNCOUNTED_BYTES + 1), &budgets);
        assert!(next(&mut body).now_or_never().is_none(), "it waits");
        drop(others);
        assert_eq!(
            next(&mut body).await.unwrap().into_data().unwrap().len(),
            UNCOUNTED_BYTES + 1 + PREFIX_BYTES
        );
        assert!(budgets.decoded.held() > 0, "the call holds it");
        drop(body);
        assert_eq!(budgets.decoded.held(), 0);
        let mut small = stalled(message(UNCOUNTED_BYTES), &budgets);
        assert!(next(&mut small).now_or_never().unwrap().is_ok() && budgets.decoded.held() == 0);
    }
}
