//! One log line for each finished RPC, and the [`Call`] through which handlers add what they know to it.
//!
//! The line is written when the response is over: after its trailers, or when the client goes away before them, which counts as
//! CANCELLED. `docs/logs.md` lists the fields; a field that does not apply is absent.

mod line;

use super::{accept::ConnectionInfo, convert};
use crate::{
    actors::scheduler::operation::{ClientInfo, OperationId},
    budget::Share,
    caller::Caller,
    connections::{ahead::OpenBody, answers::FRAME_BYTES},
    instance::Instance,
    under_way::{UnderWay, Unfinished},
};
use bytes::Bytes;
use gorego_reapi::{digest::Digest, error::Error};
use http::{Request, Response};
use http_body::{Body, Frame, SizeHint};
use line::Line;
use std::{
    future::Future,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Instant,
};
use tonic::{Code, Status, body::Body as TonicBody};
use tower::{Layer, Service};

/// Target of the line.
pub const TARGET: &str = "gorego::rpc";
/// Event of the line.
pub const RPC_FINISHED: &str = "rpc_finished";
/// What clients keep open for as long as they like: a shutdown does not wait for it.
const OPEN_ENDED: [&str; 2] = ["/grpc.health.v1.Health/Watch", "/grpc.reflection."];
/// The largest answer that always waits for room.
pub const SMALL_ANSWER_BYTES: usize = 64 * 1024;
/// Longest method name in a line, in bytes; callers can name methods that do not exist.
const METHOD_MAX_BYTES: usize = 128;
/// Longest error message in a line, in bytes.
const ERROR_MAX_BYTES: usize = 512;

/// One RPC, as its log line sees it; cheap to clone. Handlers find it in their request.
#[derive(Debug, Clone, Default)]
pub struct Call(Arc<State>);

#[derive(Debug, Default)]
struct State {
    client: ClientInfo,
    connection: Option<ConnectionInfo>,
    notes: Mutex<Notes>,
    /// Room for what is to be answered.
    room: Mutex<Option<Share>>,
    bytes_in: AtomicU64,
    bytes_out: AtomicU64,
    /// Whether the client went away before the end of its request.
    is_broken_off: AtomicBool,
    /// What a shutdown waits for; `None` for what clients keep open. It ends with the line.
    unfinished: Option<Unfinished>,
}

/// What handlers find out.
#[derive(Debug, Default)]
struct Notes {
    instance: Option<Instance>,
    operation: Option<OperationId>,
    action: Option<Digest>,
    blob: Option<Digest>,
    cached: Option<bool>,
    /// The error inside a response whose gRPC code is OK.
    bad_news: Option<String>,
}

impl Call {
    /// The call that a request belongs to; one that goes nowhere when the layer is not there.
    pub fn of<T>(request: &tonic::Request<T>) -> Self {
        request.extensions().get::<Self>().cloned().unwrap_or_default()
    }

    /// A call over this connection.
    #[cfg(test)]
    pub(super) fn over(connection: ConnectionInfo) -> Self {
        Self(Arc::new(State { connection: Some(connection), ..State::default() }))
    }

    /// Who asks, from the request's headers.
    pub fn client(&self) -> &ClientInfo {
        &self.0.client
    }

    /// The network address of who asks.
    pub fn peer(&self) -> Option<SocketAddr> {
        self.0.connection.as_ref().map(ConnectionInfo::address)
    }

    /// To whom what the call takes is charged.
    pub fn caller(&self) -> Caller {
        self.0.connection.as_ref().map(ConnectionInfo::caller).unwrap_or_default()
    }

    /// The connection that it came over; `None` for a request that does not come from a socket.
    pub fn connection(&self) -> Option<&ConnectionInfo> {
        self.0.connection.as_ref()
    }

    /// Waits for room for this much of the answer, and keeps it for what is sent next.
    ///
    /// # Errors
    /// `Exhausted` when there is none for too long.
    pub async fn reserve(&self, bytes: usize) -> Result<(), Error> {
        if let Some(connection) = self.connection() {
            self.keep(connection.state.reserve(bytes as u64 + 2 * FRAME_BYTES).await?);
        }
        Ok(())
    }

    /// As [`Call::reserve`], but only answers up to [`SMALL_ANSWER_BYTES`] wait. For handlers that hold what they answer, or a
    /// large request, while they wait.
    ///
    /// # Errors
    /// `Exhausted` when there is no room for a larger answer at once, or none for a small one for too long.
    pub async fn reserve_soon(&self, bytes: usize) -> Result<(), Error> {
        if bytes <= SMALL_ANSWER_BYTES {
            return self.reserve(bytes).await;
        }
        if let Some(connection) = self.connection() {
            self.keep(connection.state.reserve_now(bytes as u64 + 2 * FRAME_BYTES)?);
        }
        Ok(())
    }

    /// Reserves room for the next piece of a stream, and says how many bytes it may have, `max` at most.
    ///
    /// # Errors
    /// As [`Call::reserve`].
    pub async fn reserve_piece(&self, max: usize) -> Result<usize, Error> {
        let Some(connection) = self.connection() else { return Ok(max) };
        if self.has_room() {
            // Small messages are collected to a frame while more are at hand. They go out first, so that no more is held than
            // one piece.
            tokio::task::yield_now().await;
        }
        let (piece, room) = connection.state.reserve_piece(max).await?;
        self.keep(room);
        Ok(piece)
    }

    fn has_room(&self) -> bool {
        self.0.room.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    fn keep(&self, room: Share) {
        let mut kept = self.0.room.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *kept {
            Some(kept) => kept.merge(room),
            None => *kept = Some(room),
        }
    }

    /// As much of the room that was reserved as this, if there is so much. What would be left for the framing goes with it.
    pub(super) fn take_room(&self, bytes: u64) -> Option<Share> {
        let mut kept = self.0.room.lock().unwrap_or_else(PoisonError::into_inner);
        let all = kept.as_mut().filter(|kept| kept.amount() >= bytes)?;
        let rest = all.amount() - bytes;
        let part = all.split(if rest <= 2 * FRAME_BYTES { all.amount() } else { bytes });
        if all.amount() == 0 {
            *kept = None;
        }
        Some(part)
    }

    /// Gives back what was reserved and is not needed.
    pub(super) fn give_room_back(&self) {
        drop(self.0.room.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    /// Notes the namespace.
    pub fn instance(&self, instance: &Instance) {
        self.note(|notes| notes.instance = Some(instance.clone()));
    }

    /// Notes the operation, and the namespace that is a part of its name.
    pub fn operation(&self, instance: &Instance, id: OperationId) {
        self.note(|notes| {
            notes.instance = Some(instance.clone());
            notes.operation = Some(id);
        });
    }

    /// Notes the action.
    pub fn action(&self, action: Digest) {
        self.note(|notes| notes.action = Some(action));
    }

    /// Notes the blob of a call that is about one.
    pub fn blob(&self, blob: Digest) {
        self.note(|notes| notes.blob = Some(blob));
    }

    /// Notes whether the action cache had an answer.
    pub fn cached(&self, cached: bool) {
        self.note(|notes| notes.cached = Some(cached));
    }

    /// Notes what an answer with code OK says about its failure.
    pub fn bad_news(&self, news: &str) {
        self.note(|notes| notes.bad_news = Some(news.to_owned()));
    }

    /// Tells a shutdown whose turn it is.
    fn turn(&self, tell: impl FnOnce(&Unfinished)) {
        self.0.unfinished.as_ref().map(tell);
    }

    fn note(&self, write: impl FnOnce(&mut Notes)) {
        write(&mut self.0.notes.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// Puts a [`RequestLog`] round a service.
#[derive(Debug, Clone)]
pub struct RequestLogLayer {
    /// Counts calls up to their lines.
    pub under_way: UnderWay,
}

impl<S> Layer<S> for RequestLogLayer {
    type Service = RequestLog<S>;

    fn layer(&self, inner: S) -> RequestLog<S> {
        RequestLog { inner, under_way: self.under_way.clone() }
    }
}

/// A service whose every call ends in a log line.
#[derive(Debug, Clone)]
pub struct RequestLog<S> {
    inner: S,
    under_way: UnderWay,
}

impl<S, B> Service<Request<TonicBody>> for RequestLog<S>
where
    S: Service<Request<TonicBody>, Response = Response<B>>,
{
    type Response = Response<LoggedBody<B>>;
    type Error = S::Error;
    type Future = LoggedFuture<S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<TonicBody>) -> Self::Future {
        let connection = request.extensions().get::<ConnectionInfo>().cloned();
        let client = convert::client_info(request.headers());
        let open = connection.as_ref().map(|connection| connection.state.begin_call());
        let is_open_ended = OPEN_ENDED.iter().any(|prefix| request.uri().path().starts_with(prefix));
        let unfinished = (!is_open_ended).then(|| self.under_way.begin());
        let body = connection.as_ref().map(|connection| OpenBody::new(connection.state.clone()));
        let call = Call(Arc::new(State { client, connection, unfinished, ..State::default() }));
        let line = Line {
            call: call.clone(),
            started: Instant::now(),
            uri: request.uri().clone(),
            code: None,
            error: String::new(),
            _open: open,
        };
        request.extensions_mut().insert(call.clone());
        let request = request.map(|inner| TonicBody::new(CountedBody { inner, call, open: body }));
        LoggedFuture { inner: self.inner.call(request), line: Some(line) }
    }
}

pin_project_lite::pin_project! {
    /// The future of a [`RequestLog`] call.
    #[derive(Debug)]
    pub struct LoggedFuture<F> {
        #[pin]
        inner: F,
        line: Option<Line>,
    }
}

impl<F, B, E> Future for LoggedFuture<F>
where
    F: Future<Output = Result<Response<B>, E>>,
{
    type Output = Result<Response<LoggedBody<B>>, E>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let response = ready!(this.inner.poll(context));
        let mut line = this.line.take();
        Poll::Ready(match response {
            Ok(response) => {
                if let Some(line) = &mut line {
                    // An error without any message comes as headers alone.
                    line.read_status(response.headers());
                }
                Ok(response.map(|inner| LoggedBody { inner, line }))
            }
            Err(error) => {
                if let Some(line) = &mut line {
                    line.code = Some(Code::Internal);
                }
                Err(error)
            }
        })
    }
}

pin_project_lite::pin_project! {
    /// A response body that writes the line when it is over.
    #[derive(Debug)]
    pub struct LoggedBody<B> {
        #[pin]
        inner: B,
        line: Option<Line>,
    }
}

impl<B: Body<Data = Bytes>> Body for LoggedBody<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let this = self.project();
        // The transport asks for more when it has passed on what there was. It may hold one frame that the client has not taken.
        if let Some(line) = this.line.as_ref() {
            line.call.turn(Unfinished::client_moved);
        }
        let frame = ready!(this.inner.poll_frame(context));
        if let Some(line) = this.line.as_mut() {
            match &frame {
                Some(Ok(frame)) => {
                    line.call.turn(Unfinished::wait_for_client);
                    if let Some(data) = frame.data_ref() {
                        line.call.0.bytes_out.fetch_add(data.len() as u64, Ordering::Relaxed);
                    } else if let Some(trailers) = frame.trailers_ref() {
                        line.read_status(trailers);
                        *this.line = None;
                    }
                }
                Some(Err(_)) => {
                    line.code = Some(Code::Internal);
                    *this.line = None;
                }
                None => {
                    line.code.get_or_insert(Code::Unknown);
                    *this.line = None;
                }
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

pin_project_lite::pin_project! {
    /// A request body that counts its bytes.
    struct CountedBody {
        #[pin]
        inner: TonicBody,
        call: Call,
        // Until the end of the request; `None` for a request that does not come from a socket.
        open: Option<Arc<OpenBody>>,
    }

    impl PinnedDrop for CountedBody {
        fn drop(this: Pin<&mut Self>) {
            // The library throws away what has come and nobody has read. The connection forgets it with the stream: counted here
            // too, it would hide what other streams are ahead.
            if let Some(open) = this.project().open {
                open.close();
            }
        }
    }
}

impl CountedBody {
    /// Polls the body, and tells the connection what was taken.
    fn poll_inner(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.project();
        let Some(open) = this.open else { return this.inner.poll_frame(context) };
        let polled = open.poll(context, |context| this.inner.poll_frame(context));
        match &polled {
            Poll::Ready(Some(Ok(frame))) => open.taken(frame.data_ref().map_or(0, |data| data.len() as u64)),
            Poll::Ready(_) => {
                open.close();
                *this.open = None;
            }
            Poll::Pending => {}
        }
        polled
    }
}

impl Body for CountedBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let polled = self.as_mut().poll_inner(context);
        let this = self.project();
        let Poll::Ready(frame) = polled else {
            this.call.turn(Unfinished::wait_for_client);
            return Poll::Pending;
        };
        this.call.turn(Unfinished::client_moved);
        match &frame {
            Some(Ok(frame)) => {
                let bytes = frame.data_ref().map_or(0, Bytes::len);
                this.call.0.bytes_in.fetch_add(bytes as u64, Ordering::Relaxed);
            }
            Some(Err(_)) => this.call.0.is_broken_off.store(true, Ordering::Relaxed),
            None => {}
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connections::{Connections, ahead::cost};
    use std::{pin::pin, task::Waker};

    /// Else a client could hide what one stream is ahead behind others that it cancels.
    #[test]
    fn what_was_sent_ahead_of_a_stream_that_is_cancelled_is_forgotten_once() {
        const EACH: usize = 1024 * 1024;
        let connections = Connections::default();
        let admitted = connections.admit(([127, 0, 0, 1], 1).into()).unwrap();
        let state = admitted.state();
        let body = || CountedBody {
            inner: TonicBody::new("x".repeat(EACH)),
            call: Call::default(),
            open: Some(OpenBody::new(state.clone())),
        };
        let (other, cancelled) = (body(), body());
        state.ahead.received(2 * cost(EACH as u64));
        // The connection sees the end of the stream before its handler does.
        state.ahead.at_most(cost(EACH as u64));
        drop(cancelled);
        assert_eq!(state.ahead.bytes(), cost(EACH as u64));
        assert!(pin!(other).poll_frame(&mut Context::from_waker(Waker::noop())).is_ready());
        assert_eq!(state.ahead.bytes(), 0);
    }
}
