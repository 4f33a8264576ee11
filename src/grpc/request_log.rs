//! One log line for each finished RPC, and the [`Call`] through which handlers add what they know to it.
//!
//! The line is written when the response is over: after its trailers, or when the client goes away before them, which counts as
//! CANCELLED. `docs/logs.md` lists the fields; a field that does not apply is absent.

use super::{convert, status};
use crate::{
    actors::scheduler::operation::{ClientInfo, OperationId},
    digest::Digest,
    instance::Instance,
};
use bytes::Bytes;
use http::{HeaderMap, Request, Response, Uri};
use http_body::{Body, Frame, SizeHint};
use log::kv::{self, Key, Value, VisitSource};
use std::{
    future::Future,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Instant,
};
use tonic::{Code, Status, body::Body as TonicBody, transport::server::TcpConnectInfo};
use tower::{Layer, Service};

/// Target of the line.
pub const TARGET: &str = "gorego::rpc";
/// Event of the line.
pub const RPC_FINISHED: &str = "rpc_finished";
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
    notes: Mutex<Notes>,
    bytes_in: AtomicU64,
    bytes_out: AtomicU64,
}

/// What handlers find out.
#[derive(Debug, Default)]
struct Notes {
    instance: Option<Instance>,
    operation: Option<OperationId>,
    action: Option<Digest>,
    blob: Option<Digest>,
    cached: Option<bool>,
}

impl Call {
    /// The call that a request belongs to; one that goes nowhere when the layer is not there.
    pub fn of<T>(request: &tonic::Request<T>) -> Self {
        request.extensions().get::<Self>().cloned().unwrap_or_default()
    }

    /// Who asks, from the request's headers.
    pub fn client(&self) -> &ClientInfo {
        &self.0.client
    }

    /// Notes the namespace.
    pub fn instance(&self, instance: &Instance) {
        self.note(|notes| notes.instance = Some(instance.clone()));
    }

    /// Notes the operation.
    pub fn operation(&self, id: OperationId) {
        self.note(|notes| notes.operation = Some(id));
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

    fn note(&self, write: impl FnOnce(&mut Notes)) {
        write(&mut self.0.notes.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// Puts a [`RequestLog`] round a service.
#[derive(Debug, Clone, Copy)]
pub struct RequestLogLayer;

impl<S> Layer<S> for RequestLogLayer {
    type Service = RequestLog<S>;

    fn layer(&self, inner: S) -> RequestLog<S> {
        RequestLog { inner }
    }
}

/// A service whose every call ends in a log line.
#[derive(Debug, Clone)]
pub struct RequestLog<S> {
    inner: S,
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
        let call =
            Call(Arc::new(State { client: convert::client_info(request.headers()), ..State::default() }));
        let peer = request.extensions().get::<TcpConnectInfo>().and_then(TcpConnectInfo::remote_addr);
        let line = Line {
            call: call.clone(),
            started: Instant::now(),
            uri: request.uri().clone(),
            peer,
            code: None,
            error: String::new(),
        };
        request.extensions_mut().insert(call.clone());
        let request = request.map(|inner| TonicBody::new(CountedBody { inner, call }));
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
        let frame = ready!(this.inner.poll_frame(context));
        if let Some(line) = this.line.as_mut() {
            match &frame {
                Some(Ok(frame)) => {
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
    }
}

impl Body for CountedBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.project();
        let frame = ready!(this.inner.poll_frame(context));
        if let Some(Ok(frame)) = &frame
            && let Some(data) = frame.data_ref()
        {
            this.call.0.bytes_in.fetch_add(data.len() as u64, Ordering::Relaxed);
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

/// The line of a call that is not over yet; written when this is dropped.
#[derive(Debug)]
struct Line {
    call: Call,
    started: Instant,
    uri: Uri,
    peer: Option<SocketAddr>,
    /// `None` as long as the call has not ended by itself.
    code: Option<Code>,
    /// The message of a status that is not OK.
    error: String,
}

impl Line {
    /// Takes code and message from headers or trailers that have them.
    fn read_status(&mut self, headers: &HeaderMap) {
        if let Some(code) = headers.get("grpc-status") {
            self.code = Some(Code::from_bytes(code.as_bytes()));
            let message = headers.get("grpc-message").map(|message| percent_decode(message.as_bytes()));
            self.error = status::shorten(message.unwrap_or_default(), ERROR_MAX_BYTES);
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let level = log::Level::Info;
        if !log::log_enabled!(target: TARGET, level) {
            return;
        }
        let fields = Fields {
            method: short_method(self.uri.path()),
            code: code_name(self.code.unwrap_or(Code::Cancelled)),
            duration_us: u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX),
            peer: self.peer.map(|peer| peer.to_string()),
            error: &self.error,
            client: &self.call.0.client,
            bytes_in: self.call.0.bytes_in.load(Ordering::Relaxed),
            bytes_out: self.call.0.bytes_out.load(Ordering::Relaxed),
            noted: Noted::of(&self.call.0.notes.lock().unwrap_or_else(PoisonError::into_inner)),
        };
        log::logger().log(
            &log::Record::builder()
                .target(TARGET)
                .level(level)
                .key_values(&fields)
                .args(format_args!("{} {}", fields.method, fields.code))
                .build(),
        );
    }
}

/// The key-values of the line.
struct Fields<'a> {
    method: &'a str,
    code: &'static str,
    duration_us: u64,
    peer: Option<String>,
    error: &'a str,
    client: &'a ClientInfo,
    bytes_in: u64,
    bytes_out: u64,
    noted: Noted,
}

/// [`Notes`] as text.
#[derive(Default)]
struct Noted {
    instance: Option<String>,
    operation: Option<String>,
    action_digest: Option<String>,
    digest: Option<String>,
    cached: Option<bool>,
}

impl Noted {
    fn of(notes: &Notes) -> Self {
        Self {
            instance: notes.instance.as_ref().map(|instance| instance.name().to_owned()),
            operation: notes.operation.map(|id| id.to_string()),
            action_digest: notes.action.map(|digest| digest.to_string()),
            digest: notes.blob.map(|digest| digest.to_string()),
            cached: notes.cached,
        }
    }
}

impl kv::Source for Fields<'_> {
    fn visit<'kvs>(&'kvs self, visitor: &mut dyn VisitSource<'kvs>) -> Result<(), kv::Error> {
        let mut pair = |key: &'static str, value: Value<'kvs>| visitor.visit_pair(Key::from_str(key), value);
        pair("event", Value::from(RPC_FINISHED))?;
        pair("method", Value::from(self.method))?;
        pair("grpc_code", Value::from(self.code))?;
        pair("duration_us", Value::from(self.duration_us))?;
        pair("bytes_in", Value::from(self.bytes_in))?;
        pair("bytes_out", Value::from(self.bytes_out))?;
        if let Some(cached) = self.noted.cached {
            pair("cached", Value::from(cached))?;
        }
        let texts = [
            ("peer", self.peer.as_deref()),
            ("instance", self.noted.instance.as_deref()),
            ("operation", self.noted.operation.as_deref()),
            ("action_digest", self.noted.action_digest.as_deref()),
            ("digest", self.noted.digest.as_deref()),
            ("invocation_id", said(&self.client.tool_invocation_id)),
            ("target_id", said(&self.client.target_id)),
            ("mnemonic", said(&self.client.action_mnemonic)),
            ("error", said(self.error)),
        ];
        for (key, text) in texts {
            if let Some(text) = text {
                pair(key, Value::from(text))?;
            }
        }
        Ok(())
    }
}

fn said(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}

/// `Service/Method` without the package.
fn short_method(path: &str) -> &str {
    let path = path.strip_prefix('/').unwrap_or(path);
    let service = path.split('/').next().unwrap_or_default();
    let package = service.rfind('.').map_or(0, |dot| dot + 1);
    let method = path.get(package..).unwrap_or(path);
    // Paths are ASCII, so any cut is a character boundary.
    method.get(..METHOD_MAX_BYTES).unwrap_or(method)
}

/// The name of a code as the gRPC documentation writes it.
fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

/// Undoes the encoding of `grpc-message`; what is no valid escape stays as it is.
fn percent_decode(text: &[u8]) -> String {
    let mut decoded = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, after)) = rest.split_first() {
        let escape = (byte == b'%').then(|| after.get(..2)).flatten().and_then(|hex| {
            let hex = std::str::from_utf8(hex).ok()?;
            u8::from_str_radix(hex, 16).ok()
        });
        match escape {
            Some(escaped) => {
                decoded.push(escaped);
                rest = &after[2..];
            }
            None => {
                decoded.push(byte);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&decoded).into_owned()
}
