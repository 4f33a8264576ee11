//! One log line for each request, written when its response has ended or its client is gone.
//!
//! Requests that cost their client nothing (refused before a handler, or abandoned before the response) are rate-limited
//! per peer and then only counted ([`Connections::takes_line`]).

use super::LOG;
use crate::{
    budget::Share,
    caller::Caller,
    connections::{ConnectionState, Connections, End, OpenCall},
    instance::Instance,
    logging::{Event, Field},
    under_way::Unfinished,
};
use axum::{
    body::{Body, Bytes, HttpBody},
    http::{Method, StatusCode, Uri},
    response::Response,
};
use gorego_reapi::{digest::Digest, error::Error};
use http_body::{Frame, SizeHint};
use log::Level;
use std::{
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Instant,
};

/// Longest path in a line, in bytes.
const PATH_MAX_BYTES: usize = 256;
/// Longest method in a line, in bytes. Clients can send any method.
const METHOD_MAX_BYTES: usize = 16;
/// Longest error in a line, in bytes.
const ERROR_MAX_BYTES: usize = 512;

/// The log line of an open request. It is written when it is dropped.
#[derive(Debug)]
pub(super) struct RequestLog {
    method: String,
    path: String,
    connections: Connections,
    connection: Arc<ConnectionState>,
    _open: OpenCall,
    started: Instant,
    status: Option<StatusCode>,
    instance: Option<Instance>,
    digest: Option<Digest>,
    error: String,
    bytes_in: u64,
    bytes_out: u64,
    place: Option<Share>,
    unfinished: Unfinished,
}

impl RequestLog {
    /// Creates the line of a request that has just begun.
    pub(super) fn new(
        connections: &Connections,
        connection: &Arc<ConnectionState>,
        method: &Method,
        uri: &Uri,
        unfinished: Unfinished,
    ) -> Self {
        Self {
            method: shorten(method.as_str().to_owned(), METHOD_MAX_BYTES),
            path: shorten(uri.path().to_owned(), PATH_MAX_BYTES),
            connections: connections.clone(),
            connection: connection.clone(),
            _open: connection.begin_call(),
            started: Instant::now(),
            status: None,
            instance: None,
            digest: None,
            error: String::new(),
            bytes_in: 0,
            bytes_out: 0,
            place: None,
            unfinished,
        }
    }

    /// The address of the client.
    pub(super) fn peer(&self) -> SocketAddr {
        self.connection.address
    }

    /// The caller for budgets.
    pub(super) fn caller(&self) -> Caller {
        self.connection.caller
    }

    /// The connection of the request.
    pub(super) fn connection(&self) -> &Arc<ConnectionState> {
        &self.connection
    }

    /// Records the instance of the request.
    pub(super) fn instance(&mut self, instance: &Instance) {
        self.instance = Some(instance.clone());
    }

    /// Records the blob that the request names.
    pub(super) fn blob(&mut self, digest: Digest) {
        self.digest = Some(digest);
    }

    /// The entry by which a shutdown tracks the request.
    pub(super) fn unfinished(&self) -> &Unfinished {
        &self.unfinished
    }

    /// Records received bytes of an upload.
    pub(super) fn received(&mut self, bytes: usize) {
        self.bytes_in = self.bytes_in.saturating_add(bytes as u64);
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
        const WITHOUT_A_HANDLER: [StatusCode; 2] =
            [StatusCode::METHOD_NOT_ALLOWED, StatusCode::SERVICE_UNAVAILABLE];
        let is_cheap = self.status.is_none_or(|status| {
            WITHOUT_A_HANDLER.contains(&status) || self.instance.is_none() && !status.is_success()
        });
        let end = End::Http(self.status.map(|status| status.as_u16()));
        !is_cheap || self.connections.takes_line(self.connection.caller.peer, end)
    }

    /// Attaches the line to a response until the response has ended.
    pub(super) fn follow(mut self, response: Response) -> Response {
        self.status = Some(response.status());
        response.map(|inner| Body::new(CountedBody { inner, line: self }))
    }
}

impl Drop for RequestLog {
    fn drop(&mut self) {
        if !log::log_enabled!(target: LOG, Level::Info) || !self.is_listed() {
            return;
        }
        let told = self.status.map_or("gone", |status| status.canonical_reason().unwrap_or_default());
        Event::info(LOG, "http_finished")
            .with("method", &self.method)
            .with("path", &self.path)
            .with("duration_us", u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX))
            .with("bytes_in", self.bytes_in)
            .with("bytes_out", self.bytes_out)
            .with_shown("peer", &self.connection.address)
            // Without a status, the client left before the response.
            .with_some("http_status", self.status.map(|status| status.as_u16()))
            .with_some("instance", self.instance.as_ref().map(Instance::name))
            .with_some("digest", self.digest.as_ref().map(|digest| Field::Shown(digest)))
            .with_said("error", &self.error)
            .log(format_args!("{} {}: {told}", self.method, self.path));
    }
}

/// Truncates a text that the client has chosen.
fn shorten(mut text: String, max_bytes: usize) -> String {
    let mut end = max_bytes.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text
}

pin_project_lite::pin_project! {
    /// A response body that counts its bytes.
    struct CountedBody {
        #[pin]
        inner: Body,
        line: RequestLog,
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
        this.line.unfinished.client_moved();
        let frame = ready!(this.inner.poll_frame(context));
        this.line.unfinished.wait_for_client();
        match &frame {
            Some(Ok(frame)) => {
                let bytes = frame.data_ref().map_or(0, |data| data.len() as u64);
                this.line.bytes_out = this.line.bytes_out.saturating_add(bytes);
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
