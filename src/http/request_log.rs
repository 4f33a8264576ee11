//! One log line for each request, and its metrics, when its response has ended or its client is gone.
//!
//! The lines of requests that cost their client nothing are rate-limited per peer (`Connections::takes_line`). These
//! are requests that are refused or that the client abandons before the response, and requests that need no permission,
//! such as health probes.

use super::{LOG, Port};
use crate::{
    access::audit::Denial,
    budget::Share,
    call::{Call, ConnectionInfo, Notes},
    connections::{End, OpenCall},
    gate::{Gate, RevocationCheck},
    instance::Instance,
    logging::{Event, Field},
    telemetry::{EndedRequest, Metrics},
};
use axum::{
    body::{Body, Bytes, HttpBody},
    http::{Method, StatusCode, Uri},
    response::Response,
};
use gorego_reapi::{error::Error, status::shorten};
use http_body::{Frame, SizeHint};
use log::Level;
use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

/// Longest path in a line, in bytes.
const PATH_MAX_BYTES: usize = 256;
/// Longest method in a line, in bytes. Clients can send any method.
const METHOD_MAX_BYTES: usize = 16;
/// Longest error in a line, in bytes.
const ERROR_MAX_BYTES: usize = 512;

/// The log line of an open request. It is written when it is dropped.
#[derive(Debug)]
pub(super) struct RequestLine {
    call: Call,
    gate: Gate,
    method: String,
    path: String,
    connection: ConnectionInfo,
    metrics: Arc<Metrics>,
    _open: OpenCall,
    started: Instant,
    status: Option<StatusCode>,
    error: String,
    place: Option<Share>,
}

impl RequestLine {
    /// Creates the line of a request that has just begun.
    pub(super) fn new(
        call: &Call,
        port: &Port,
        connection: &ConnectionInfo,
        (method, uri): (&Method, &Uri),
    ) -> Self {
        Self {
            call: call.clone(),
            gate: port.gate.clone(),
            method: shorten(method.as_str().to_owned(), METHOD_MAX_BYTES),
            path: shorten(uri.path().to_owned(), PATH_MAX_BYTES),
            connection: connection.clone(),
            metrics: port.metrics.clone(),
            _open: connection.state.begin_call(),
            started: Instant::now(),
            status: None,
            error: String::new(),
            place: None,
        }
    }

    /// Records an error. A cache miss is not an error.
    pub(super) fn failed(&mut self, error: &Error) {
        if !matches!(error, Error::NotFound(_)) {
            self.error = shorten(error.to_string(), ERROR_MAX_BYTES);
        }
    }

    /// Records why a request was refused before a handler.
    pub(super) fn refused(&mut self, why: String) {
        self.error = shorten(why, ERROR_MAX_BYTES);
    }

    /// Holds a share until the response has ended.
    pub(super) fn hold(&mut self, place: Share) {
        self.place = Some(place);
    }

    /// Whether the request gets its own log line.
    fn is_listed(&self) -> bool {
        const REFUSED: [StatusCode; 4] = [
            StatusCode::UNAUTHORIZED,
            StatusCode::FORBIDDEN,
            StatusCode::METHOD_NOT_ALLOWED,
            StatusCode::TOO_MANY_REQUESTS,
        ];
        // An upload that fails for lack of room has cost its client the bytes.
        let is_turned_away =
            self.status == Some(StatusCode::SERVICE_UNAVAILABLE) && self.call.bytes_in() == 0;
        let needs_nothing = self.call.permissions().is_some_and(<[_]>::is_empty);
        let is_cheap = self.status.is_none_or(|status| {
            let is_outside = self.call.instance().is_none() && !status.is_success();
            needs_nothing || is_outside || is_turned_away || REFUSED.contains(&status)
        });
        let end = End::Http(self.status.map(|status| status.as_u16()));
        !is_cheap || self.connection.connections.takes_line(self.connection.caller().peer, end)
    }

    fn count(&self, took: Duration, notes: &Notes) {
        let request = EndedRequest { took, bytes_in: self.call.bytes_in(), bytes_out: self.call.bytes_out() };
        self.metrics.http.ended(&self.method, self.status.map(|status| status.as_u16()), request);
        if let (Some(is_hit), Some(instance)) = (notes.cached, self.call.instance()) {
            let instance = (usize::from(instance.id().0), instance.name());
            self.metrics.lookups.count(instance, &self.call.client().action_mnemonic, is_hit);
        }
    }

    /// Attaches the line to a response until the response has ended.
    pub(super) fn follow(mut self, response: Response) -> Response {
        self.status = Some(response.status());
        let revocation = RevocationCheck::new(self.gate.clone(), self.call.clone());
        response.map(|inner| Body::new(CountedBody { inner, line: self, revocation }))
    }
}

impl Drop for RequestLine {
    fn drop(&mut self) {
        self.call.end();
        if matches!(self.status, Some(StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN))
            && !self.error.is_empty()
        {
            self.gate.record(&Denial {
                kind: self.call.denial(),
                method: &self.method,
                peer: self.connection.address(),
                principal: self.call.principal(),
                instance: self.call.instance().map(Instance::name),
                error: &self.error,
            });
        }
        let (took, notes) = (self.started.elapsed(), self.call.take_notes());
        self.count(took, &notes);
        if !log::log_enabled!(target: LOG, Level::Info) || !self.is_listed() {
            return;
        }
        let (instance, blob) = (self.call.instance(), notes.blob);
        let told = self.status.map_or("gone", |status| status.canonical_reason().unwrap_or_default());
        Event::info(LOG, "http_finished")
            .with("method", &self.method)
            .with("path", &self.path)
            .with("duration_us", u64::try_from(took.as_micros()).unwrap_or(u64::MAX))
            .with("bytes_in", self.call.bytes_in())
            .with("bytes_out", self.call.bytes_out())
            .with_shown("peer", &self.connection.address())
            // Without a status, the client left before the response.
            .with_some("http_status", self.status.map(|status| status.as_u16()))
            .with_some("principal", self.call.known_principal())
            .with_some("instance", instance.map(Instance::name))
            .with_some("digest", blob.as_ref().map(|blob| Field::Shown(blob)))
            .with_said("error", &self.error)
            .log(format_args!("{} {}: {told}", self.method, self.path));
    }
}

pin_project_lite::pin_project! {
    /// A response body that counts its bytes.
    struct CountedBody {
        #[pin]
        inner: Body,
        line: RequestLine,
        revocation: RevocationCheck,
    }
}

impl HttpBody for CountedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = self.project();
        // The transport polls again when the client has taken the previous piece.
        this.line.call.client_moved();
        let polled = this.inner.poll_frame(context);
        let frame = match this.revocation.poll(context, polled.is_pending()) {
            // The reader of the response finds it incomplete.
            Poll::Ready(error) => Some(Err(axum::Error::new(error))),
            Poll::Pending => ready!(polled),
        };
        this.line.call.wait_for_client();
        match &frame {
            Some(Ok(frame)) => {
                this.line.call.sent(frame.data_ref().map_or(0, Bytes::len));
            }
            Some(Err(error)) => this.line.error = shorten(error.to_string(), ERROR_MAX_BYTES),
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
