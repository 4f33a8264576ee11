//! Why a request cannot be answered.
//!
//! One enum for servers and clients; each variant is one code of gRPC, which is known by name only: `status` turns it into a
//! status in one exhaustive match. A command that ran and failed is not an error
//! but an exit code.

use crate::digest::Digest;
use std::time::Duration;

/// `Result` with this crate's [`Error`] unless another is named.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure, worded for the person who reads it at the other end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The request is malformed and will never succeed as it is.
    #[error("{0}")]
    Invalid(String),
    /// The thing that the request names is not here.
    #[error("{0}")]
    NotFound(String),
    /// These blobs must be uploaded first; never empty.
    #[error("{}", missing_message(.0))]
    MissingBlobs(Vec<Digest>),
    /// The request is well formed but cannot be met, now or by trying again.
    #[error("{0}")]
    Precondition(String),
    /// An offset lies outside the resource.
    #[error("{0}")]
    OutOfRange(String),
    /// A bound of this server is reached; worth another try after the given time.
    #[error("{message}")]
    Exhausted {
        /// Which bound, and what to do about it.
        message: String,
        /// When to try again; `None` when waiting does not help.
        retry_after: Option<Duration>,
    },
    /// The disk of this server is full; worth another try after [`DISK_FULL_RETRY`].
    #[error("{0}")]
    DiskFull(String),
    /// The caller may not do this.
    #[error("{0}")]
    Denied(String),
    /// This server does not offer that.
    #[error("{0}")]
    Unimplemented(String),
    /// The server, or the part of it that was asked, is going away; another try may succeed.
    #[error("{0}")]
    Unavailable(String),
    /// Somebody asked for the work to stop.
    #[error("{0}")]
    Cancelled(String),
    /// A time limit passed.
    #[error("{0}")]
    DeadlineExceeded(String),
    /// Stored bytes are not what they were.
    #[error("{0}")]
    DataLoss(String),
    /// A fault of this server.
    #[error("{0}")]
    Internal(String),
}

impl Error {
    /// The name of its code, as the gRPC documentation writes it; for logs.
    pub fn code_name(&self) -> &'static str {
        match self {
            Self::Invalid(_) => "INVALID_ARGUMENT",
            Self::NotFound(_) => "NOT_FOUND",
            Self::MissingBlobs(_) | Self::Precondition(_) => "FAILED_PRECONDITION",
            Self::OutOfRange(_) => "OUT_OF_RANGE",
            Self::Exhausted { .. } | Self::DiskFull(_) => "RESOURCE_EXHAUSTED",
            Self::Denied(_) => "PERMISSION_DENIED",
            Self::Unimplemented(_) => "UNIMPLEMENTED",
            Self::Unavailable(_) => "UNAVAILABLE",
            Self::Cancelled(_) => "CANCELLED",
            Self::DeadlineExceeded(_) => "DEADLINE_EXCEEDED",
            Self::DataLoss(_) => "DATA_LOSS",
            Self::Internal(_) => "INTERNAL",
        }
    }

    /// When to try again; `None` when waiting does not help, or the error's code says enough.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Exhausted { retry_after, .. } => *retry_after,
            Self::DiskFull(_) => Some(DISK_FULL_RETRY),
            _ => None,
        }
    }

    /// Bytes of memory that it holds on to.
    pub fn memory(&self) -> usize {
        match self {
            Self::MissingBlobs(missing) => size_of_val(missing.as_slice()),
            Self::Exhausted { message, .. }
            | Self::Invalid(message)
            | Self::NotFound(message)
            | Self::Precondition(message)
            | Self::OutOfRange(message)
            | Self::DiskFull(message)
            | Self::Denied(message)
            | Self::Unimplemented(message)
            | Self::Unavailable(message)
            | Self::Cancelled(message)
            | Self::DeadlineExceeded(message)
            | Self::DataLoss(message)
            | Self::Internal(message) => message.len(),
        }
    }

    /// [`Error::Invalid`] from anything that can be shown.
    pub fn invalid(message: impl ToString) -> Self {
        Self::Invalid(message.to_string())
    }

    /// [`Error::Internal`] from anything that can be shown.
    pub fn internal(message: impl ToString) -> Self {
        Self::Internal(message.to_string())
    }

    /// [`Error::NotFound`] for chunks that a blob was to be made of (CAS-36).
    pub fn missing_chunks(missing: &[Digest]) -> Self {
        Self::NotFound(format!("{}; upload these chunks and splice again", missing_message(missing)))
    }

    /// The error of a failed file operation: a full disk is the operator's to mend and worth a retry, everything else is a
    /// fault of this server. `doing` completes "could not ...".
    pub fn io(doing: &str, error: &std::io::Error) -> Self {
        use std::io::ErrorKind::{QuotaExceeded, StorageFull};
        match error.kind() {
            StorageFull | QuotaExceeded => {
                Self::DiskFull(format!("could not {doing}: the disk of this server is full"))
            }
            _ => Self::Internal(format!("could not {doing}: {error}")),
        }
    }
}

/// How long a client should wait before it tries a full disk again.
pub const DISK_FULL_RETRY: Duration = Duration::from_secs(5);

/// How many digests an error message spells out; the rest is counted.
const SHOWN_DIGESTS: usize = 3;

fn missing_message(missing: &[Digest]) -> String {
    let shown: Vec<String> = missing.iter().take(SHOWN_DIGESTS).map(Digest::to_string).collect();
    let rest = missing.len().saturating_sub(SHOWN_DIGESTS);
    let more = if rest > 0 { format!(" and {rest} more") } else { String::new() };
    format!("{} blob(s) are not in the CAS: {}{more}", missing.len(), shown.join(", "))
}
