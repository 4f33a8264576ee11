//! Converts an [`Error`] to a gRPC status. No other code does this.
//!
//! One exhaustive match gives the code, and the variant alone determines the details. A status leaves the server in one
//! of two ways, each with its own size limit: in trailers, where many clients accept at most 8 KiB (GEN-19), or inside
//! a message, which can hold a long list of missing blobs. Codes that clients retry are used only for errors that a
//! retry can fix (GEN-20).

use crate::{
    any::pack,
    digest::Digest,
    error::Error,
    proto::rpc::{self, precondition_failure::Violation},
};
use bytes::Bytes;
use prost::Message as _;
use tonic::{Code, Status};

/// Largest header or trailer block that clients with default settings accept, including names and framing.
pub const TRAILERS_MAX_BYTES: usize = 8 * 1024;
/// Longest message in bytes. Percent-encoding in `grpc-message` may triple it.
pub const MESSAGE_MAX_BYTES: usize = 1024;
/// Longest serialized `google.rpc.Status` in trailers: what remains beside the longest message and 512 bytes of other
/// trailers, before base64 turns three bytes into four.
pub const DETAILS_MAX_BYTES: usize = (TRAILERS_MAX_BYTES - 3 * MESSAGE_MAX_BYTES - 512) / 4 * 3;
/// Most missing blobs that one message lists. A client uploads these and gets the rest when it retries. 30,000 take
/// about 3 MB of a 4 MiB message.
pub const INLINE_VIOLATIONS_MAX: usize = 30_000;

/// The violation type for a missing blob, exactly as clients expect it (EXE-22).
const MISSING: &str = "MISSING";

/// The gRPC code of an error.
pub fn code(error: &Error) -> Code {
    match error {
        Error::Invalid(_) => Code::InvalidArgument,
        Error::NotFound(_) => Code::NotFound,
        Error::MissingBlobs(_) | Error::Precondition(_) => Code::FailedPrecondition,
        Error::OutOfRange(_) => Code::OutOfRange,
        Error::Exhausted { .. } | Error::OverQuota { .. } | Error::DiskFull(_) => Code::ResourceExhausted,
        Error::Denied(_) => Code::PermissionDenied,
        Error::Unauthenticated(_) => Code::Unauthenticated,
        Error::Unimplemented(_) => Code::Unimplemented,
        Error::Unavailable(_) => Code::Unavailable,
        Error::Cancelled(_) => Code::Cancelled,
        Error::DeadlineExceeded(_) => Code::DeadlineExceeded,
        Error::DataLoss(_) => Code::DataLoss,
        Error::Internal(_) => Code::Internal,
    }
}

/// The status of an error inside a message: in `ExecuteResponse.status`, or for one blob of a batch.
pub fn inline(error: &Error) -> rpc::Status {
    render(error, INLINE_VIOLATIONS_MAX)
}

/// The status of a fetch with unsupported qualifiers: one violation for each, up to a limit (AST-02).
pub fn unsupported_qualifiers(names: &[String]) -> Status {
    /// Most listed qualifiers, and longest name. The total is far below [`DETAILS_MAX_BYTES`].
    const LISTED_MAX: usize = 16;
    const NAME_MAX_BYTES: usize = 64;
    let violation = |name: &String| rpc::bad_request::FieldViolation {
        field: "qualifiers.name".into(),
        description: format!("\"{}\" not supported", shorten(name.clone(), NAME_MAX_BYTES)),
        ..Default::default()
    };
    let field_violations: Vec<_> = names.iter().take(LISTED_MAX).map(violation).collect();
    let message = "the request has qualifiers that are not supported".to_owned();
    let bad_request = pack("google.rpc.BadRequest", &rpc::BadRequest { field_violations });
    let code = Code::InvalidArgument;
    let status = rpc::Status { code: code.into(), message: message.clone(), details: vec![bad_request] };
    Status::with_details(code, message, Bytes::from(status.encode_to_vec()))
}

/// The status of a blob without an error. The message is present although it is empty (CAS-19).
pub fn inline_ok() -> rpc::Status {
    rpc::Status::default()
}

/// The status of a whole RPC, small enough for trailers. Details are sent as a `google.rpc.Status` that repeats the
/// code and message (GEN-17), or not at all if there are none.
impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let bare = render(&error, 0);
        let status = render(&error, violations_that_fit(&error, DETAILS_MAX_BYTES - bare.encoded_len()));
        if status.details.is_empty() {
            return Self::new(code(&error), status.message);
        }
        let details = Bytes::from(status.encode_to_vec());
        Self::with_details(code(&error), status.message, details)
    }
}

fn render(error: &Error, violations: usize) -> rpc::Status {
    let detail = match error {
        // Such a status has no other detail, and this one has a single type (EXE-24).
        Error::MissingBlobs(missing) if violations > 0 && !missing.is_empty() => {
            let violations = missing.iter().take(violations).map(violation).collect();
            Some(pack("google.rpc.PreconditionFailure", &rpc::PreconditionFailure { violations }))
        }
        // Only temporary errors have a RetryInfo, because clients retry every error that has one (GEN-21).
        _ => error.retry_after().map(|delay| {
            let retry_delay = prost_types::Duration::try_from(delay).ok();
            pack("google.rpc.RetryInfo", &rpc::RetryInfo { retry_delay })
        }),
    };
    rpc::Status {
        code: code(error) as i32,
        message: shorten(error.to_string(), MESSAGE_MAX_BYTES),
        details: detail.into_iter().collect(),
    }
}

fn violation(digest: &Digest) -> Violation {
    Violation { r#type: MISSING.into(), subject: digest.blob_name(), description: String::new() }
}

/// Number of violations that fit into `bytes`, including the surrounding `Any`.
fn violations_that_fit(error: &Error, bytes: usize) -> usize {
    /// Tags and lengths of the `Any`, its type URL and the field that contains it, rounded up.
    const ENVELOPE_BYTES: usize = 96;
    /// Tag and length of one violation in the list.
    const ENTRY_BYTES: usize = 4;
    let Error::MissingBlobs(missing) = error else { return 0 };
    let mut left = bytes.saturating_sub(ENVELOPE_BYTES);
    let mut count = 0;
    for digest in missing {
        let size = violation(digest).encoded_len() + ENTRY_BYTES;
        let Some(rest) = left.checked_sub(size) else { break };
        left = rest;
        count += 1;
    }
    count
}

/// Cuts a text at a character boundary and appends an ellipsis.
pub fn shorten(mut text: String, max_bytes: usize) -> String {
    const CUT: &str = "...";
    if text.len() > max_bytes {
        let mut end = max_bytes.saturating_sub(CUT.len());
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        text.push_str(CUT);
        text.shrink_to_fit();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::DigestFunction;
    use proptest::prelude::*;
    use std::time::Duration;

    fn digests(count: u64) -> Vec<Digest> {
        (0..count).map(|n| DigestFunction::Sha256.digest(&n.to_le_bytes())).collect()
    }

    fn trailer_bytes(status: &Status) -> usize {
        let response = status.clone().into_http::<()>();
        response.headers().iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum()
    }

    fn details(status: &Status) -> rpc::Status {
        rpc::Status::decode(status.details()).unwrap()
    }

    fn violations(status: &rpc::Status) -> Vec<Violation> {
        assert_eq!(status.details.len(), 1, "EXE-24: one detail");
        assert_eq!(status.details[0].type_url, "type.googleapis.com/google.rpc.PreconditionFailure");
        rpc::PreconditionFailure::decode(status.details[0].value.as_slice()).unwrap().violations
    }

    /// EXE-22, EXE-23, EXE-24, EXE-26, GEN-18.
    #[test]
    fn missing_blobs_are_listed_one_by_one_in_a_single_detail() {
        let missing = digests(500);
        let status = inline(&Error::MissingBlobs(missing.clone()));
        assert_eq!(status.code, Code::FailedPrecondition as i32);
        let violations = violations(&status);
        assert_eq!(violations.len(), 500);
        for (violation, digest) in violations.iter().zip(&missing) {
            assert_eq!(violation.r#type, "MISSING");
            assert_eq!(violation.subject, format!("blobs/{}/{}", digest.hash_hex(), digest.size()));
        }
    }

    /// GEN-17, GEN-19: at least some violations and as many as fit; the trailer repeats the code and message.
    #[test]
    fn a_status_with_five_hundred_missing_blobs_fits_into_trailers() {
        let status = Status::from(Error::MissingBlobs(digests(500)));
        assert!(trailer_bytes(&status) <= TRAILERS_MAX_BYTES, "{}", trailer_bytes(&status));
        let details = details(&status);
        assert_eq!((details.code, details.message.as_str()), (status.code() as i32, status.message()));
        assert!(violations(&details).len() >= 20);
        let header = status.clone().into_http::<()>();
        assert!(header.headers().contains_key("grpc-status-details-bin"));
    }

    /// GEN-21.
    #[test]
    fn retry_info_comes_with_exhaustion_that_passes_and_with_nothing_else() {
        let after = Some(Duration::from_millis(1500));
        let full = Status::from(Error::Exhausted { message: "queue".into(), retry_after: after });
        assert_eq!(full.code(), Code::ResourceExhausted);
        let details = details(&full);
        assert_eq!(details.details[0].type_url, "type.googleapis.com/google.rpc.RetryInfo");
        let info = rpc::RetryInfo::decode(details.details[0].value.as_slice()).unwrap();
        assert_eq!(info.retry_delay.map(Duration::try_from), after.map(Ok));
        for error in [
            Error::Exhausted { message: "forever".into(), retry_after: None },
            Error::Invalid("x".into()),
            Error::Precondition("x".into()),
            Error::Unavailable("x".into()),
            Error::Cancelled("x".into()),
        ] {
            assert!(inline(&error).details.is_empty(), "{error:?}");
            assert!(Status::from(error).details().is_empty());
        }
    }

    /// GEN-20: errors that a retry cannot fix never have a code that clients retry.
    #[test]
    fn permanent_errors_have_permanent_codes() {
        for error in [
            Error::Invalid("x".into()),
            Error::NotFound("x".into()),
            Error::MissingBlobs(digests(1)),
            Error::Precondition("x".into()),
            Error::OutOfRange("x".into()),
            Error::Denied("x".into()),
            Error::Unauthenticated("x".into()),
            Error::Unimplemented("x".into()),
        ] {
            use Code::{
                Aborted, Cancelled, DeadlineExceeded, Internal, ResourceExhausted, Unavailable, Unknown,
            };
            let retried =
                [Cancelled, Unknown, DeadlineExceeded, Aborted, Internal, Unavailable, ResourceExhausted];
            assert!(!retried.contains(&code(&error)), "{error:?}");
        }
    }

    proptest! {
        /// GEN-19, GEN-22, for messages of any length and alphabet and lists of any length.
        #[test]
        fn no_status_outgrows_trailers_or_a_message(text in "\\PC{0,3000}", count in 0u64..200) {
            let errors = [
                Error::Internal(text.clone()),
                Error::Exhausted { message: text, retry_after: Some(Duration::MAX) },
                Error::MissingBlobs(digests(count)),
            ];
            for error in errors {
                let inline = inline(&error);
                prop_assert!((0..=16).contains(&inline.code));
                prop_assert!(inline.message.len() <= MESSAGE_MAX_BYTES);
                prop_assert!(trailer_bytes(&Status::from(error)) <= TRAILERS_MAX_BYTES);
            }
        }
    }
}
