//! The log line of an RPC: its fields and their format. Its metrics are counted at the same time.

use super::{ERROR_MAX_BYTES, METHOD_MAX_BYTES, RPC_FINISHED, TARGET};
use crate::{
    access::audit::Denial,
    call::{Call, Notes},
    connections::{End, OpenCall},
    gate::Gate,
    instance::Instance,
    logging::{Event, Field},
    telemetry::{EndedRequest, Metrics},
};
use gorego_reapi::status;
use http::{HeaderMap, Uri};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tonic::Code;

/// The error of a call whose client left before the end of its request.
const BROKEN_OFF: &str = "the client left before the end of its request";

/// The line of an open call. It is written when this value is dropped.
#[derive(Debug)]
pub(super) struct RpcLine {
    pub call: Call,
    pub gate: Gate,
    pub metrics: Arc<Metrics>,
    pub started: Instant,
    pub uri: Uri,
    /// `None` until the call has ended by itself.
    pub code: Option<Code>,
    /// The message of a status that is not OK.
    pub error: String,
    /// Keeps the connection from counting as idle.
    pub _open: Option<OpenCall>,
}

impl RpcLine {
    /// Reads the code and the message from headers or trailers. If the client left before the end of its request, the
    /// library reports INTERNAL "Missing request message."; such a call counts as cancelled.
    pub(super) fn read_status(&mut self, headers: &HeaderMap) {
        if let Some(code) = headers.get("grpc-status") {
            let code = Code::from_bytes(code.as_bytes());
            if self.call.is_broken_off() && matches!(code, Code::Internal | Code::Unknown) {
                self.code = Some(Code::Cancelled);
                self.error = BROKEN_OFF.into();
                return;
            }
            self.code = Some(code);
            let message = headers.get("grpc-message").map(|message| percent_decode(message.as_bytes()));
            self.error = status::shorten(message.unwrap_or_default(), ERROR_MAX_BYTES);
        }
    }
}

impl RpcLine {
    /// Whether the call gets its own log line. Calls that cost the client nothing (cancelled, refused, nothing sent)
    /// are rate-limited by peer and counted beyond that.
    fn is_listed(&self) -> bool {
        let code = self.code.unwrap_or(Code::Cancelled);
        let sent_nothing = self.call.bytes_in() == 0;
        let is_cheap = self.code.is_none() || code == Code::ResourceExhausted || sent_nothing;
        let connection = self.call.connection().filter(|_| is_cheap);
        connection
            .is_none_or(|info| info.connections.takes_line(info.caller().peer, End::Rpc(code_name(code))))
    }
}

impl Drop for RpcLine {
    fn drop(&mut self) {
        self.call.end();
        if let (Some(Code::PermissionDenied | Code::Unauthenticated), Some(peer)) =
            (self.code, self.call.peer())
        {
            self.gate.record(&Denial {
                kind: self.call.denial(),
                method: short_method(self.uri.path()),
                peer,
                principal: self.call.principal(),
                instance: self.call.instance().map(Instance::name),
                error: &self.error,
            });
        }
        let (took, notes) = (self.started.elapsed(), self.call.take_notes());
        self.count(took, &notes);
        if log::log_enabled!(target: TARGET, log::Level::Info) && self.is_listed() {
            self.log(took, notes);
        }
    }
}

impl RpcLine {
    fn count(&self, took: Duration, notes: &Notes) {
        let request = EndedRequest { took, bytes_in: self.call.bytes_in(), bytes_out: self.call.bytes_out() };
        let code = self.code.unwrap_or(Code::Cancelled);
        self.metrics.rpcs.ended(self.uri.path(), code as usize, request);
        if let (Some(is_hit), Some(instance)) = (notes.cached, self.call.instance()) {
            let instance = (usize::from(instance.id().0), instance.name());
            self.metrics.lookups.count(instance, &self.call.client().action_mnemonic, is_hit);
        }
    }

    fn log(&self, took: Duration, notes: Notes) {
        let (client, instance) = (self.call.client(), self.call.instance());
        let (method, code) = (short_method(self.uri.path()), code_name(self.code.unwrap_or(Code::Cancelled)));
        let operation = instance.zip(notes.operation).map(|(instance, id)| id.name(instance));
        let inner = notes.inner_error.map(|text| status::shorten(text, ERROR_MAX_BYTES)).unwrap_or_default();
        let peer = self.call.peer();
        Event::info(TARGET, RPC_FINISHED)
            .with("method", method)
            .with("grpc_code", code)
            .with("duration_us", u64::try_from(took.as_micros()).unwrap_or(u64::MAX))
            .with("bytes_in", self.call.bytes_in())
            .with("bytes_out", self.call.bytes_out())
            .with_some("cached", notes.cached)
            .with_some("peer", peer.as_ref().map(|peer| Field::Shown(peer)))
            .with_some("principal", self.call.known_principal())
            .with_some("instance", instance.map(Instance::name))
            .with_some("operation", operation.as_ref())
            .with_some("action_digest", notes.action.as_ref().map(|digest| Field::Shown(digest)))
            .with_some("digest", notes.blob.as_ref().map(|digest| Field::Shown(digest)))
            .with_said("invocation_id", &client.tool_invocation_id)
            .with_said("target_id", &client.target_id)
            .with_said("mnemonic", &client.action_mnemonic)
            .with_said("error", if self.error.is_empty() { &inner } else { &self.error })
            .log(format_args!("{method} {code}"));
    }
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

/// Decodes `grpc-message`. Invalid escapes are kept.
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

#[cfg(test)]
mod tests {
    use super::*;
    use gorego_reapi::error::Error;
    use tonic::Status;

    #[test]
    fn an_error_has_one_code_in_the_lines_of_rpcs_and_of_operations() {
        let text = String::new;
        for error in [
            Error::Invalid(text()),
            Error::NotFound(text()),
            Error::MissingBlobs(Vec::new()),
            Error::Precondition(text()),
            Error::OutOfRange(text()),
            Error::Exhausted { message: text(), retry_after: None },
            Error::DiskFull(text()),
            Error::Denied(text()),
            Error::Unauthenticated(text()),
            Error::Unimplemented(text()),
            Error::Unavailable(text()),
            Error::Cancelled(text()),
            Error::DeadlineExceeded(text()),
            Error::DataLoss(text()),
            Error::Internal(text()),
        ] {
            assert_eq!(error.code_name(), code_name(status::code(&error)), "{error:?}");
        }
    }

    #[test]
    fn methods_lose_their_package_and_never_grow_long() {
        let path = "/build.bazel.remote.execution.v2.ContentAddressableStorage/FindMissingBlobs";
        assert_eq!(short_method(path), "ContentAddressableStorage/FindMissingBlobs");
        assert_eq!(short_method("/Service/Method.v2"), "Service/Method.v2");
        for odd in ["", "/", "//", "/a.", "/a./", "*"] {
            short_method(odd);
        }
        assert_eq!(short_method(&"x".repeat(10_000)).len(), METHOD_MAX_BYTES);
    }

    #[test]
    fn messages_are_read_back_as_they_were_written() {
        for text in ["there is no \"blob\"", "50 % of it", "\u{e9}\n", ""] {
            let response = Status::internal(text).into_http::<()>();
            let header = response.headers().get("grpc-message");
            let decoded = header.map(|text| percent_decode(text.as_bytes())).unwrap_or_default();
            assert_eq!(decoded, text);
        }
        for odd in ["%", "%4", "%zz", "%%41"] {
            assert!(!percent_decode(odd.as_bytes()).is_empty(), "{odd}");
        }
    }
}
