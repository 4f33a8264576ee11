//! One log line for each finished RPC, and its metrics. The [`Call`] of the RPC is made here, and handlers add what
//! they know to it. The client is authenticated here as well, before any of the body is read, so that refused calls
//! have a line, too. A call ends here at the time limit of its client, with DEADLINE_EXCEEDED.
//!
//! The line is written when the response has ended: after its trailers, or when the client leaves before them, which
//! counts as CANCELLED. `docs/logs.md` lists the fields; a field that does not apply is absent.

mod line;
mod time_limit;

use super::{
    answers::{self, CallPlace},
    convert, permissions,
};
use crate::{
    access::authenticator::Authentication,
    call::{Call, ConnectionInfo},
    connections::ahead::OpenBody,
    gate::{Gate, RevocationCheck},
    telemetry::Metrics,
    unfinished_requests::UnfinishedRequests,
};
use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt as _};
use gorego_reapi::error::Error;
use http::{Request, Response};
use http_body::{Body, Frame, SizeHint};
use line::RpcLine;
use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Instant,
};
use time_limit::time_limit;
use tokio::time::{Sleep, sleep};
use tonic::{Code, Status};
use tower::{BoxError, Service};

/// Target of the line.
pub(crate) const TARGET: &str = "gorego::rpc";
/// Event of the line.
pub(crate) const RPC_FINISHED: &str = "rpc_finished";
/// Streams that clients keep open. A shutdown does not wait for them.
const OPEN_ENDED: [&str; 2] = ["/grpc.health.v1.Health/Watch", "/grpc.reflection."];
/// Longest method name in a line, in bytes. Clients can name methods that do not exist.
const METHOD_MAX_BYTES: usize = 128;
/// Longest error message in a line, in bytes.
const ERROR_MAX_BYTES: usize = 512;

/// A service that writes a log line for each call of one connection.
#[derive(Debug, Clone)]
pub(crate) struct RequestLog<S> {
    /// The service that answers the calls.
    pub inner: S,
    /// Determines the principal of each call.
    pub gate: Gate,
    /// Counts the calls that a shutdown waits for.
    pub unfinished_requests: UnfinishedRequests,
    /// Counts finished calls, for the metrics.
    pub metrics: Arc<Metrics>,
    /// The connection that the calls arrive on.
    pub connection: ConnectionInfo,
}

impl<S, R, B> Service<Request<R>> for RequestLog<S>
where
    S: Service<Request<RequestBody<R>>, Response = Response<B>, Future: Send> + Clone + Send + 'static,
    R: Send + 'static,
    B: Default,
{
    type Response = Response<LoggedBody<B>>;
    type Error = S::Error;
    type Future = LoggedFuture<S::Future, S::Error, B>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<R>) -> Self::Future {
        let connection = self.connection.clone();
        let open = connection.state.begin_call();
        let body = OpenBody::new(connection.state.clone());
        let path = request.uri().path();
        let is_open_ended = OPEN_ENDED.iter().any(|prefix| path.starts_with(prefix));
        let unfinished = (!is_open_ended).then(|| self.unfinished_requests.begin());
        let client = convert::client_info(request.headers());
        let call = Call::begin(Some(connection), client, permissions::of(path), unfinished);
        let line = RpcLine {
            call: call.clone(),
            metrics: self.metrics.clone(),
            gate: self.gate.clone(),
            started: Instant::now(),
            uri: request.uri().clone(),
            code: None,
            error: String::new(),
            _open: Some(open),
        };
        request.extensions_mut().insert(call.clone());
        let request = request.map(|inner| RequestBody { inner, call, open: Some(body) });
        let revocation = Some(RevocationCheck::new(self.gate.clone(), line.call.clone()));
        let limit = time_limit(request.headers()).map(sleep);
        LoggedFuture { progress: self.begin(request), line: Some(line), revocation, limit }
    }
}

impl<S> RequestLog<S> {
    /// Authenticates the client of a call and, if that succeeds at once, passes the call to its handler.
    fn begin<R, B>(&mut self, request: Request<RequestBody<R>>) -> CallProgress<S::Future, S::Error, B>
    where
        S: Service<Request<RequestBody<R>>, Response = Response<B>, Future: Send> + Clone + Send + 'static,
        R: Send + 'static,
        B: Default,
    {
        let call = request.body().call.clone();
        match self.gate.identify(&call, request.headers()) {
            Authentication::Done(identified) => match self.gate.pass(&call, identified) {
                Ok(()) => CallProgress::Called { inner: self.inner.call(request) },
                Err(error) => CallProgress::Refused { error: Some(error) },
            },
            Authentication::Pending(pending) => {
                // A waiting call needs a place, too. The layers behind take another one, so this one is given up first.
                let place = match CallPlace::take(&call, &request) {
                    Ok(place) => place,
                    Err(refusal) => return CallProgress::Refused { error: Some(refusal.into()) },
                };
                let (gate, mut inner) = (self.gate.clone(), self.inner.clone());
                let answer = async move {
                    let identified = pending.await;
                    drop(place);
                    match gate.pass(&call, identified) {
                        Ok(()) => inner.call(request).await,
                        Err(error) => Ok(refusal(error)),
                    }
                };
                CallProgress::Waiting { answer: answer.boxed() }
            }
        }
    }
}

/// The answer to a call that is refused before its handler.
fn refusal<B: Default>(error: Error) -> Response<B> {
    Status::from(error).into_http()
}

pin_project_lite::pin_project! {
    /// A call on its way to its handler.
    #[project = CallProgressProjected]
    enum CallProgress<F, E, B> {
        /// The handler has the call.
        Called {
            #[pin]
            inner: F,
        },
        /// The client is being authenticated. Then the handler gets the call.
        Waiting { answer: BoxFuture<'static, Result<Response<B>, E>> },
        /// The call is refused.
        Refused { error: Option<Error> },
    }
}

impl<F, E, B> Future for CallProgress<F, E, B>
where
    F: Future<Output = Result<Response<B>, E>>,
    B: Default,
{
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        match self.project() {
            CallProgressProjected::Called { inner } => inner.poll(context),
            CallProgressProjected::Waiting { answer } => answer.poll_unpin(context),
            CallProgressProjected::Refused { error } => {
                Poll::Ready(Ok(error.take().map(refusal).unwrap_or_default()))
            }
        }
    }
}

pin_project_lite::pin_project! {
    /// The future of a [`RequestLog`] call.
    pub(crate) struct LoggedFuture<F, E, B> {
        #[pin]
        progress: CallProgress<F, E, B>,
        line: Option<RpcLine>,
        revocation: Option<RevocationCheck>,
        // The time limit of the client.
        #[pin]
        limit: Option<Sleep>,
    }
}

impl<F, B, E> Future for LoggedFuture<F, E, B>
where
    F: Future<Output = Result<Response<B>, E>>,
    B: Default,
{
    type Output = Result<Response<LoggedBody<B>>, E>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let response = match this.progress.poll(context) {
            Poll::Ready(response) => response,
            Poll::Pending => {
                let error = match this.revocation.as_mut().map(|revocation| revocation.poll(context, true)) {
                    Some(Poll::Ready(error)) => error,
                    _ => {
                        let Some(limit) = this.limit.as_pin_mut() else { return Poll::Pending };
                        ready!(limit.poll(context));
                        Error::DeadlineExceeded("the deadline of the client has passed".into())
                    }
                };
                Ok(refusal(error))
            }
        };
        let revocation = this.revocation.take();
        let mut line = this.line.take();
        Poll::Ready(match response {
            Ok(response) => {
                if let Some(line) = &mut line {
                    // An error without messages has only headers.
                    line.read_status(response.headers());
                }
                Ok(response.map(|inner| LoggedBody { inner, line, revocation }))
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
    /// A response body that writes the line at its end.
    #[derive(Debug, Default)]
    pub struct LoggedBody<B> {
        #[pin]
        inner: B,
        // `None` after the end.
        line: Option<RpcLine>,
        revocation: Option<RevocationCheck>,
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
        // The transport polls again when it has passed on the previous frame. It may hold one frame that the client has
        // not taken.
        if let Some(line) = this.line.as_ref() {
            line.call.client_moved();
        }
        let polled = this.inner.poll_frame(context);
        let goes_on = matches!(&polled, Poll::Pending)
            || matches!(&polled, Poll::Ready(Some(Ok(frame))) if frame.is_data());
        if let (true, Some(revocation), Some(line)) = (goes_on, this.revocation.as_mut(), this.line.as_mut())
            && let Poll::Ready(error) = revocation.poll(context, polled.is_pending())
        {
            let trailers = answers::trailers(&error.into());
            line.read_status(&trailers);
            *this.line = None;
            return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
        }
        let frame = ready!(polled);
        if let Some(line) = this.line.as_mut() {
            match &frame {
                Some(Ok(frame)) => {
                    line.call.wait_for_client();
                    if let Some(data) = frame.data_ref() {
                        line.call.sent(data.len());
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
    pub(crate) struct RequestBody<R> {
        #[pin]
        inner: R,
        call: Call,
        // `None` after the end of the request.
        open: Option<Arc<OpenBody>>,
    }

    impl<R> PinnedDrop for RequestBody<R> {
        fn drop(this: Pin<&mut Self>) {
            // The library discards received bytes that no handler has read, and the connection stops counting them when
            // the stream closes. Subtracting them here too would hide bytes of other streams.
            if let Some(open) = this.project().open {
                open.close();
            }
        }
    }
}

impl<R: Body<Data = Bytes, Error: Into<BoxError>>> RequestBody<R> {
    /// Polls the body, and tells the connection how many bytes were taken.
    fn poll_inner(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.project();
        let poll = |context: &mut Context<'_>| {
            let polled = this.inner.poll_frame(context);
            polled.map(|frame| Some(frame?.map_err(|error| Status::from_error(error.into()))))
        };
        let Some(open) = this.open else { return poll(context) };
        let polled = open.poll(context, poll);
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

impl<R: Body<Data = Bytes, Error: Into<BoxError>>> Body for RequestBody<R> {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let polled = self.as_mut().poll_inner(context);
        let this = self.project();
        let Poll::Ready(frame) = polled else {
            this.call.wait_for_client();
            return Poll::Pending;
        };
        this.call.client_moved();
        match &frame {
            Some(Ok(frame)) => this.call.received(frame.data_ref().map_or(0, Bytes::len)),
            Some(Err(_)) => this.call.break_off(),
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
    use crate::{
        access::{
            authenticator::{AccessRules, Authenticator, CredentialSources, SignedTokens, VerifiedToken},
            policy::Policy,
            rejection::Rejection,
        },
        connections::{Connections, ahead::cost},
        instance::Instances,
    };
    use std::{pin::pin, task::Waker, time::SystemTime};
    use tonic::body::Body as TonicBody;

    /// Otherwise a client could hide the bytes of one stream by cancelling others.
    #[test]
    fn what_was_sent_ahead_of_a_stream_that_is_cancelled_is_forgotten_once() {
        const EACH: usize = 1024 * 1024;
        let connections = Connections::default();
        let admitted = connections.admit(([127, 0, 0, 1], 1).into()).unwrap();
        let state = admitted.state();
        let body = || RequestBody {
            inner: tonic::body::Body::new("x".repeat(EACH)),
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

    #[tokio::test(start_paused = true)]
    async fn a_call_that_ends_at_the_time_limit_of_its_client_has_that_code_in_its_line() {
        let connections = Connections::default();
        let admitted = connections.admit(([127, 0, 0, 1], 1).into()).unwrap();
        let answer = |_| std::future::pending::<Result<Response<TonicBody>, std::convert::Infallible>>();
        let mut service = RequestLog {
            inner: tower::service_fn(answer),
            gate: Gate::new(Instances::new([""]).unwrap(), Authenticator::open()),
            unfinished_requests: UnfinishedRequests::default(),
            metrics: Arc::default(),
            connection: ConnectionInfo::of(&admitted),
        };
        let request = Request::post("/build.bazel.remote.execution.v2.Capabilities/GetCapabilities");
        let request = request.header("grpc-timeout", "100m").body(TonicBody::empty()).unwrap();
        let answer = service.call(request).await.unwrap();
        assert_eq!(answer.headers()["grpc-status"], "4");
        assert_eq!(answer.into_body().line.unwrap().code, Some(Code::DeadlineExceeded));
    }

    /// An issuer that does not answer.
    #[derive(Debug)]
    struct Silent;

    impl SignedTokens for Silent {
        fn verify<'a>(
            &'a self,
            _: &'a str,
            _: SystemTime,
        ) -> BoxFuture<'a, Result<VerifiedToken, Rejection>> {
            std::future::pending().boxed()
        }

        fn trusts(&self, _: u64) -> bool {
            true
        }
    }

    /// Otherwise an unauthenticated client could open any number of calls, each with its head in memory.
    #[tokio::test]
    async fn calls_whose_client_is_not_known_yet_are_bounded_like_all_others() {
        const DESCRIPTORS: u64 = 32;
        let sources = CredentialSources { signed: Some(Arc::new(Silent)), ..Default::default() };
        let rules = AccessRules::new(Policy::with_roles([], &[]), sources);
        let connections = Connections::new(DESCRIPTORS);
        let admitted = connections.admit(([127, 0, 0, 1], 1).into()).unwrap();
        let answer =
            |_| std::future::ready(Ok::<_, std::convert::Infallible>(Response::new(TonicBody::empty())));
        let mut service = RequestLog {
            inner: tower::service_fn(answer),
            gate: Gate::new(Instances::new([""]).unwrap(), Authenticator::new(rules)),
            unfinished_requests: UnfinishedRequests::default(),
            metrics: Arc::default(),
            connection: ConnectionInfo::of(&admitted),
        };
        let mut calls: Vec<_> = (0..2 * DESCRIPTORS)
            .map(|_| {
                let request = Request::post("/build.bazel.remote.execution.v2.Capabilities/GetCapabilities");
                let request = request.header("authorization", "Bearer a.b.c").body(TonicBody::empty());
                Box::pin(service.call(request.unwrap()))
            })
            .collect();
        let answers = calls.iter_mut().filter_map(|call| call.now_or_never());
        let refused =
            answers.flatten().filter(|answer| answer.headers()["grpc-status"] == "8").count() as u64;
        assert!(refused >= DESCRIPTORS, "{refused} are refused, the others wait");
        drop(calls);
        assert_eq!(connections.calls().held(), 0, "a call that is over holds nothing");
    }
}
