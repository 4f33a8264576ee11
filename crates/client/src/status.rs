//! Converts a server's status to an [`Error`]: the reverse of `gorego_reapi::status`.

use crate::tls_error;
use gorego_reapi::{digest::Digest, duration, error::Error, proto::rpc, resource_name::ResourceName};
use prost::Message as _;
use std::{error::Error as _, time::Duration};
use tonic::{Code, Status};

/// The violation type for missing blobs (EXE-22).
const MISSING: &str = "MISSING";

/// The error of the call named `call`.
pub(crate) fn from_status(call: &str, status: &Status) -> Error {
    // With TLS 1.3, a server refuses the client's certificate only after the handshake.
    let tls = status.source().and_then(|source| tls_error::explain(source, "this name"));
    if let Some(why) = tls {
        return Error::Denied(format!("{call}: {why}"));
    }
    // A status with a cause was created locally because the connection failed. It is not an answer of the server about
    // permissions.
    if status.code() == Code::PermissionDenied && status.source().is_some() {
        return Error::Precondition(format!("{call}: {}", status.message()));
    }
    // Nor is it an answer about the request, so it may be tried again.
    if matches!(status.code(), Code::Internal | Code::Cancelled | Code::Unknown) && status.source().is_some()
    {
        return Error::Unavailable(format!("{call}: {}", status.message()));
    }
    // GEN-17: the details contain a whole google.rpc.Status.
    let details = rpc::Status::decode(status.details()).map(|status| status.details).unwrap_or_default();
    from_parts(call, status.code(), status.message(), &details)
}

/// The error in a status inside a message; `None` when it is OK or absent.
pub(crate) fn from_message(call: &str, status: Option<&rpc::Status>) -> Option<Error> {
    let status = status.filter(|status| status.code != 0)?;
    Some(from_parts(call, Code::from_i32(status.code), &status.message, &status.details))
}

fn from_parts(call: &str, code: Code, message: &str, details: &[prost_types::Any]) -> Error {
    let text = if message.is_empty() { format!("{call}: {code}") } else { format!("{call}: {message}") };
    match code {
        Code::FailedPrecondition => match missing_blobs(details) {
            missing if missing.is_empty() => Error::Precondition(text),
            missing => Error::MissingBlobs(missing),
        },
        Code::InvalidArgument => Error::Invalid(text),
        Code::NotFound => Error::NotFound(text),
        Code::OutOfRange => Error::OutOfRange(text),
        Code::ResourceExhausted => Error::Exhausted { message: text, retry_after: retry_after(details) },
        Code::PermissionDenied => Error::Denied(text),
        Code::Unauthenticated => Error::Unauthenticated(text),
        Code::Unimplemented => Error::Unimplemented(text),
        Code::Unavailable | Code::Aborted => Error::Unavailable(text),
        Code::Cancelled => Error::Cancelled(text),
        Code::DeadlineExceeded => Error::DeadlineExceeded(text),
        Code::DataLoss => Error::DataLoss(text),
        Code::Ok | Code::Unknown | Code::AlreadyExists | Code::Internal => Error::Internal(text),
    }
}

/// The details that have this type and decode.
fn unpack<'a, M: prost::Message + Default>(
    details: &'a [prost_types::Any],
    name: &'a str,
) -> impl Iterator<Item = M> + 'a {
    details
        .iter()
        .filter(move |any| any.type_url.rsplit('/').next() == Some(name))
        .filter_map(|any| M::decode(any.value.as_slice()).ok())
}

fn missing_blobs(details: &[prost_types::Any]) -> Vec<Digest> {
    unpack::<rpc::PreconditionFailure>(details, "google.rpc.PreconditionFailure")
        .flat_map(|failure| failure.violations)
        .filter(|violation| violation.r#type == MISSING)
        .filter_map(|violation| ResourceName::parse_read(&violation.subject).ok().map(|name| name.digest))
        .collect()
}

fn retry_after(details: &[prost_types::Any]) -> Option<Duration> {
    let delay = unpack::<rpc::RetryInfo>(details, "google.rpc.RetryInfo").next()?.retry_delay?;
    duration::from_wire(&delay)
}

#[cfg(test)]
mod tests {
    use super::*;
    use gorego_reapi::digest::DigestFunction;

    fn any(name: &str, message: &impl prost::Message) -> prost_types::Any {
        prost_types::Any { type_url: format!("type.googleapis.com/{name}"), value: message.encode_to_vec() }
    }

    /// EXE-22, EXE-23, EXE-25: the two places that report missing blobs, and similar statuses that do not.
    #[test]
    fn missing_blobs_are_understood_in_a_status_and_in_its_trailer() {
        let digest = DigestFunction::Sha256.digest(b"x");
        let violation = |kind: &str, subject: String| rpc::precondition_failure::Violation {
            r#type: kind.into(),
            subject,
            ..Default::default()
        };
        let status = |violations| rpc::Status {
            code: Code::FailedPrecondition as i32,
            message: "inputs".into(),
            details: vec![any("google.rpc.PreconditionFailure", &rpc::PreconditionFailure { violations })],
        };
        let inline = status(vec![violation("MISSING", digest.blob_name())]);
        assert_eq!(from_message("Execute", Some(&inline)), Some(Error::MissingBlobs(vec![digest])));
        let trailer = Status::with_details(Code::FailedPrecondition, "inputs", inline.encode_to_vec().into());
        assert_eq!(from_status("Execute", &trailer), Error::MissingBlobs(vec![digest]));
        for other in [violation("OTHER", digest.blob_name()), violation("MISSING", "blobs/zz/1".into())] {
            let error = from_message("Execute", Some(&status(vec![other])));
            assert_eq!(error, Some(Error::Precondition("Execute: inputs".into())));
        }
    }

    /// GEN-21.
    #[test]
    fn a_full_server_says_when_to_come_back() {
        let delay = prost_types::Duration { seconds: 2, nanos: 0 };
        let status = rpc::Status {
            code: Code::ResourceExhausted as i32,
            message: "queue".into(),
            details: vec![any("google.rpc.RetryInfo", &rpc::RetryInfo { retry_delay: Some(delay) })],
        };
        let error = from_message("Execute", Some(&status));
        let wanted =
            Error::Exhausted { message: "Execute: queue".into(), retry_after: Some(Duration::from_secs(2)) };
        assert_eq!(error, Some(wanted));
        assert_eq!(from_message("Execute", Some(&rpc::Status::default())), None);
    }
}
