//! Request messages on their way in: how much of unfinished ones is held, and for how long.
//!
//! A message is collected completely before its handler sees it, and HTTP/2 hands the sender new room for what is collected. So
//! one connection could leave as much unfinished as streams times the largest message. Here the bytes of unfinished messages
//! are counted for the whole server, and a sender that stops in the middle of one is not waited for without end.

use bytes::Bytes;
use http::Request;
use http_body::{Frame, SizeHint};
use std::{
    future::Future as _,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};
use tokio::time::{Instant, Sleep, sleep_until};
use tonic::{Status, body::Body};
use tower::{Layer, Service};

/// Bytes of unfinished messages that the server holds. Sixty-four of the largest ones, and many more of those that clients
/// send.
pub const UNFINISHED_MAX_BYTES: u64 = 1024 * 1024 * 1024;
/// How long a sender may be silent before its first message and in the middle of one.
pub const SILENCE_LIMIT: Duration = Duration::from_secs(60);

/// What precedes each message: a flag and four bytes of length.
const PREFIX_BYTES: usize = 5;

/// Puts an [`Intake`] before a service.
#[derive(Debug, Clone, Default)]
pub struct IntakeLayer {
    held: Arc<AtomicU64>,
}

impl<S> Layer<S> for IntakeLayer {
    type Service = Intake<S>;

    fn layer(&self, inner: S) -> Intake<S> {
        Intake { inner, held: self.held.clone() }
    }
}

/// A service whose requests are watched while they come in.
#[derive(Debug, Clone)]
pub struct Intake<S> {
    inner: S,
    held: Arc<AtomicU64>,
}

impl<S: Service<Request<Body>>> Service<Request<Body>> for Intake<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> S::Future {
        let held = self.held.clone();
        self.inner.call(request.map(|body| Body::new(Watched::new(body, held))))
    }
}

/// The body of a request.
struct Watched {
    body: Body,
    /// Whether anything has come.
    is_begun: bool,
    message: Unfinished,
    /// What all requests hold together.
    held: Arc<AtomicU64>,
    last: Instant,
    /// Set when a message was waited for.
    silence: Option<Pin<Box<Sleep>>>,
}

impl Watched {
    fn new(body: Body, held: Arc<AtomicU64>) -> Self {
        let message = Unfinished::default();
        Self { body, is_begun: false, message, held, last: Instant::now(), silence: None }
    }

    fn take(&mut self, data: &[u8]) -> Result<(), Status> {
        let before = self.message.bytes;
        self.message.take(data);
        let now = self.message.bytes;
        if now <= before {
            self.held.fetch_sub(before - now, Ordering::Relaxed);
            return Ok(());
        }
        let others = self.held.fetch_add(now - before, Ordering::Relaxed);
        if others.saturating_add(now - before) <= UNFINISHED_MAX_BYTES {
            return Ok(());
        }
        Err(Status::resource_exhausted("too many requests are under way that have not come in completely"))
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

impl Drop for Watched {
    fn drop(&mut self) {
        self.held.fetch_sub(self.message.bytes, Ordering::Relaxed);
    }
}

impl http_body::Body for Watched {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        match Pin::new(&mut self.body).poll_frame(context) {
            Poll::Ready(Some(Ok(frame))) => {
                self.last = Instant::now();
                self.is_begun = true;
                let taken = frame.data_ref().map_or(Ok(()), |data| self.take(data));
                Poll::Ready(Some(taken.map(|()| frame)))
            }
            Poll::Pending if self.message.is_begun() || !self.is_begun => self.poll_silence(context).map(|()| {
                let problem = format!(
                    "the request broke off: it was silent for {SILENCE_LIMIT:?} before or inside of a message"
                );
                Some(Err(Status::deadline_exceeded(problem)))
            }),
            other => other,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
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

    fn take(&mut self, mut data: &[u8]) {
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
                *self = Self::default();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::{StreamExt as _, stream};
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
    fn stalled(bytes: Vec<u8>, held: &Arc<AtomicU64>) -> Watched {
        let pieces = stream::iter([Ok::<_, Status>(Bytes::from(bytes))]).chain(stream::pending());
        Watched::new(Body::new(axum::body::Body::from_stream(pieces)), held.clone())
    }

    async fn next(body: &mut Watched) -> Result<Frame<Bytes>, Status> {
        use http_body::Body as _;
        poll_fn(|context| Pin::new(&mut *body).poll_frame(context)).await.unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_sender_that_stops_inside_of_a_message_is_not_waited_for() {
        let held = Arc::default();
        let mut body = stalled(message(100)[..50].to_vec(), &held);
        next(&mut body).await.unwrap();
        assert_eq!(held.load(Ordering::Relaxed), 45);
        let begin = Instant::now();
        assert_eq!(next(&mut body).await.unwrap_err().code(), tonic::Code::DeadlineExceeded);
        assert_eq!(begin.elapsed().as_secs(), SILENCE_LIMIT.as_secs());
        drop(body);
        assert_eq!(held.load(Ordering::Relaxed), 0);
        // One that opens a stream and sends nothing is not waited for either.
        let nothing = stream::pending::<Result<Bytes, Status>>();
        let mut body = Watched::new(Body::new(axum::body::Body::from_stream(nothing)), held.clone());
        assert_eq!(next(&mut body).await.unwrap_err().code(), tonic::Code::DeadlineExceeded);
        // Between two messages it may be silent: that is for the handler to judge.
        let mut body = stalled(message(100), &held);
        next(&mut body).await.unwrap();
        assert!(tokio::time::timeout(10 * SILENCE_LIMIT, next(&mut body)).await.is_err());
    }

    #[tokio::test]
    async fn what_all_hold_together_is_bounded() {
        let held = Arc::new(AtomicU64::new(UNFINISHED_MAX_BYTES - 10));
        let mut body = stalled(message(100)[..50].to_vec(), &held);
        assert_eq!(next(&mut body).await.unwrap_err().code(), tonic::Code::ResourceExhausted);
        drop(body);
        assert!(next(&mut stalled(message(100), &held)).await.is_ok(), "what came completely is not held");
        assert_eq!(held.load(Ordering::Relaxed), UNFINISHED_MAX_BYTES - 10);
    }
}
