//! Answers on their way out. Each frame of a response holds its room until it is written to the socket.
//!
//! Handlers reserve room before they make a large answer ([`Call::reserve`]). Here the room is transferred to the
//! frame. A frame without reserved room waits for room, or is refused if it is too large to be kept in memory
//! meanwhile. The number of calls and the memory for their heads are bounded here too, because each call costs memory
//! before it is answered.

use crate::{
    budget::{Refusal, Share},
    call::Call,
    connections::answers::FRAME_BYTES,
    memory,
};
use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt as _};
use gorego_reapi::error::Result;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use http_body::{Body, Frame, SizeHint};
use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};
use tonic::Status;
use tower::{Layer, Service};

/// Largest frame that waits for room after it was made. Only pieces of log streams are that large, and the number of
/// concurrent reads of log streams is limited.
const UNRESERVED_MAX_BYTES: usize = 256 * 1024;
/// Memory of a header field in addition to its name and value.
const FIELD_BYTES: u64 = 110;
/// Heads up to this size are not counted, so that calls of build clients are cheap: they have about 1.5 KB, or 3 KB
/// with a signed token. All of them together take at most this much for each call that may be open.
const UNCOUNTED_HEAD_BYTES: u64 = 4 * 1024;

/// Puts an [`AnswerService`] before a service.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct AnswersLayer;

impl<S> Layer<S> for AnswersLayer {
    type Service = AnswerService<S>;

    fn layer(&self, inner: S) -> AnswerService<S> {
        AnswerService { inner }
    }
}

/// A service whose calls and answers are bounded.
#[derive(Debug, Clone)]
pub(crate) struct AnswerService<S> {
    inner: S,
}

impl<S, R, B> Service<Request<R>> for AnswerService<S>
where
    S: Service<Request<R>, Response = Response<B>>,
{
    type Response = Response<AnswerBody<B>>;
    type Error = S::Error;
    type Future = AnswerFuture<S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<R>) -> Self::Future {
        let call = Call::of(request.extensions());
        match CallPlace::take(&call, &request) {
            Ok(place) => AnswerFuture {
                inner: Some(self.inner.call(request)),
                call,
                place: Some(place),
                refused: None,
            },
            Err(refusal) => {
                let status = gorego_reapi::error::Error::from(refusal).into();
                AnswerFuture { inner: None, call, place: None, refused: Some(status) }
            }
        }
    }
}

/// The shares that a call holds from its first byte to the last byte of its answer.
#[derive(Debug)]
pub(super) struct CallPlace {
    /// `None` for a call that does not come from a socket.
    _call: Option<Share>,
    /// `None` for a head of the usual size.
    head: Option<Share>,
}

impl CallPlace {
    pub(super) fn take<R>(call: &Call, request: &Request<R>) -> Result<Self, Refusal> {
        let Some(info) = call.connection() else { return Ok(Self { _call: None, head: None }) };
        let (caller, bytes) = (info.caller(), head_bytes(request));
        let place = info.connections.calls().take(caller, 1)?;
        if bytes <= UNCOUNTED_HEAD_BYTES {
            return Ok(Self { _call: Some(place), head: None });
        }
        let head = info.connections.heads().take(caller, bytes).inspect_err(|_| memory::freed(bytes))?;
        Ok(Self { _call: Some(place), head: Some(head) })
    }
}

impl Drop for CallPlace {
    fn drop(&mut self) {
        memory::freed(self.head.as_ref().map_or(0, Share::amount));
    }
}

/// Memory that the head of a request takes.
fn head_bytes<B>(request: &Request<B>) -> u64 {
    let field = |(name, value): (&HeaderName, &HeaderValue)| {
        FIELD_BYTES + name.as_str().len() as u64 + value.len() as u64
    };
    let path = request.uri().path_and_query().map_or(0, |path| path.as_str().len() as u64);
    path + request.headers().iter().map(field).sum::<u64>()
}

pin_project_lite::pin_project! {
    /// The future of an [`AnswerService`] call.
    pub struct AnswerFuture<F> {
        #[pin]
        inner: Option<F>,
        call: Call,
        place: Option<CallPlace>,
        refused: Option<Status>,
    }
}

impl<F, B, E> Future for AnswerFuture<F>
where
    F: Future<Output = Result<Response<B>, E>>,
{
    type Output = Result<Response<AnswerBody<B>>, E>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let Some(inner) = this.inner.as_pin_mut() else {
            let status = this.refused.take().unwrap_or_else(|| Status::internal("polled after its end"));
            return Poll::Ready(Ok(status.into_http()));
        };
        let response = ready!(inner.poll(context))?;
        let (call, place) = (this.call.clone(), this.place.take());
        Poll::Ready(Ok(response.map(|inner| AnswerBody {
            inner: Some(inner),
            call,
            _place: place,
            waiting: None,
        })))
    }
}

pin_project_lite::pin_project! {
    /// A response body whose frames hold their room.
    pub struct AnswerBody<B> {
        // `None` at the end.
        #[pin]
        inner: Option<B>,
        call: Call,
        _place: Option<CallPlace>,
        waiting: Option<WaitingFrame>,
    }
}

/// A frame that waits for its room.
struct WaitingFrame {
    data: Bytes,
    room: BoxFuture<'static, Result<Share>>,
}

impl<B> Default for AnswerBody<B> {
    fn default() -> Self {
        Self { inner: None, call: Call::default(), _place: None, waiting: None }
    }
}

impl<B: Body<Data = Bytes>> Body for AnswerBody<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let mut this = self.project();
        if this.waiting.is_none() {
            let Some(inner) = this.inner.as_mut().as_pin_mut() else { return Poll::Ready(None) };
            let frame = match ready!(inner.poll_frame(context)) {
                Some(Ok(frame)) => frame,
                over => {
                    this.call.give_room_back();
                    return Poll::Ready(over);
                }
            };
            let data = match frame.into_data() {
                Ok(data) => data,
                Err(trailers) => {
                    this.call.give_room_back();
                    return Poll::Ready(Some(Ok(trailers)));
                }
            };
            match room_for(this.call, data) {
                FrameRoom::Taken(data) => return Poll::Ready(Some(Ok(Frame::data(data)))),
                FrameRoom::Waits(waiting) => *this.waiting = Some(waiting),
                FrameRoom::Refused(status) => {
                    this.inner.set(None);
                    return Poll::Ready(Some(Ok(Frame::trailers(trailers(&status)))));
                }
            }
        }
        let Some(waiting) = this.waiting.as_mut() else { return Poll::Pending };
        let room = ready!(waiting.room.as_mut().poll(context));
        let data = std::mem::take(&mut waiting.data);
        *this.waiting = None;
        Poll::Ready(Some(Ok(match room {
            Ok(room) => Frame::data(charge(this.call, data, room)),
            Err(error) => {
                this.inner.set(None);
                Frame::trailers(trailers(&error.into()))
            }
        })))
    }

    fn is_end_stream(&self) -> bool {
        self.waiting.is_none() && self.inner.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        if self.waiting.is_some() {
            return SizeHint::default();
        }
        self.inner.as_ref().map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }
}

enum FrameRoom {
    Taken(Bytes),
    Waits(WaitingFrame),
    Refused(Status),
}

/// Transfers the reserved room to the frame. If the reserved room is too small, it is given back first, so that the
/// call holds nothing while it waits for more.
fn room_for(call: &Call, data: Bytes) -> FrameRoom {
    let Some(info) = call.connection() else { return FrameRoom::Taken(data) };
    let bytes = data.len() as u64 + FRAME_BYTES;
    if let Some(room) = call.take_room(bytes) {
        return FrameRoom::Taken(charge(call, data, room));
    }
    call.give_room_back();
    match info.state.reserve_now(bytes) {
        Ok(room) => FrameRoom::Taken(charge(call, data, room)),
        Err(_) if data.len() <= UNRESERVED_MAX_BYTES => {
            let (call, connection) = (call.clone(), info.state.clone());
            let room = async move { call.wait_for_room(connection.reserve(bytes)).await };
            FrameRoom::Waits(WaitingFrame { data, room: room.boxed() })
        }
        Err(refusal) => FrameRoom::Refused(gorego_reapi::error::Error::from(refusal).into()),
    }
}

fn charge(call: &Call, data: Bytes, room: Share) -> Bytes {
    match call.connection() {
        Some(info) => info.state.charge(data, room),
        None => data,
    }
}

/// The trailers of a response that ends with this status.
pub(super) fn trailers(status: &Status) -> HeaderMap {
    let mut trailers = HeaderMap::new();
    // This fails only if the text of the status does not fit into a header. The code is set in any case.
    let _ = status.add_header(&mut trailers);
    trailers
}
