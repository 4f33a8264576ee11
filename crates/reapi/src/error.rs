//! The reasons why a request fails.
//!
//! Servers and clients share this enum. Each variant corresponds to one gRPC code, but gRPC types appear only in
//! `status`, which converts errors in one exhaustive match. A command that ran and failed is not an error; it is an
//! exit code.

use crate::digest::Digest;
use std::time::Duration;

/// `Result` with this crate's [`Error`] unless another is named.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure, with a message for the user of the client.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The request is malformed. Retrying it unchanged cannot succeed.
    #[error("{0}")]
    Invalid(String),
    /// The request names something that does not exist here.
    #[error("{0}")]
    NotFound(String),
    /// These blobs must be uploaded first. The list is never empty.
    #[error("{}", missing_message(.0))]
    MissingBlobs(Vec<Digest>),
    /// The request is well formed but cannot be satisfied, now or by a retry.
    #[error("{0}")]
    Precondition(String),
    /// An offset lies outside the resource.
    #[error("{0}")]
    OutOfRange(String),
    /// A limit of this server is reached. The request may succeed after the given time.
    #[error("{message}")]
    Exhausted {
        /// The limit that was reached, and what to do about it.
        message: String,
        /// When to retry; `None` if waiting does not help.
        retry_after: Option<Duration>,
    },
    /// The caller uses more than its quota. The request may succeed after the given time.
    #[error("{message}")]
    OverQuota {
        /// The quantity that is over its bound.
        message: String,
        /// The time after which a retry may succeed.
        retry_after: Duration,
    },
    /// The disk of this server is full. The request may succeed after [`DISK_FULL_RETRY`].
    #[error("{0}")]
    DiskFull(String),
    /// The caller lacks the permission.
    #[error("{0}")]
    Denied(String),
    /// The request has no valid credential, and needs one.
    #[error("{0}")]
    Unauthenticated(String),
    /// This server does not support the operation.
    #[error("{0}")]
    Unimplemented(String),
    /// The server, or a part of it, is shutting down. A retry may succeed.
    #[error("{0}")]
    Unavailable(String),
    /// A client cancelled the work.
    #[error("{0}")]
    Cancelled(String),
    /// A time limit passed.
    #[error("{0}")]
    DeadlineExceeded(String),
    /// Stored bytes are damaged.
    #[error("{0}")]
    DataLoss(String),
    /// A fault of this server.
    #[error("{0}")]
    Internal(String),
}

impl Error {
    /// The name of the gRPC code as in the gRPC documentation, for logs.
    pub fn code_name(&self) -> &'static str {
        match self {
            Self::Invalid(_) => "INVALID_ARGUMENT",
            Self::NotFound(_) => "NOT_FOUND",
            Self::MissingBlobs(_) | Self::Precondition(_) => "FAILED_PRECONDITION",
            Self::OutOfRange(_) => "OUT_OF_RANGE",
            Self::Exhausted { .. } | Self::OverQuota { .. } | Self::DiskFull(_) => "RESOURCE_EXHAUSTED",
            Self::Denied(_) => "PERMISSION_DENIED",
            Self::Unauthenticated(_) => "UNAUTHENTICATED",
            Self::Unimplemented(_) => "UNIMPLEMENTED",
            Self::Unavailable(_) => "UNAVAILABLE",
            Self::Cancelled(_) => "CANCELLED",
            Self::DeadlineExceeded(_) => "DEADLINE_EXCEEDED",
            Self::DataLoss(_) => "DATA_LOSS",
            Self::Internal(_) => "INTERNAL",
        }
    }

    /// When to retry; `None` if waiting does not help or the code is sufficient.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Exhausted { retry_after, .. } => *retry_after,
            Self::OverQuota { retry_after, .. } => Some(*retry_after),
            Self::DiskFull(_) => Some(DISK_FULL_RETRY),
            _ => None,
        }
    }

    /// The memory that the error holds, in bytes.
    pub fn memory(&self) -> usize {
        match self {
            Self::MissingBlobs(missing) => size_of_val(missing.as_slice()),
            Self::Exhausted { message, .. }
            | Self::OverQuota { message, .. }
            | Self::Invalid(message)
            | Self::NotFound(message)
            | Self::Precondition(message)
            | Self::OutOfRange(message)
            | Self::DiskFull(message)
            | Self::Denied(message)
            | Self::Unauthenticated(message)
            | Self::Unimplemented(message)
            | Self::Unavailable(message)
            | Self::Cancelled(message)
            | Self::DeadlineExceeded(message)
            | Self::DataLoss(message)
            | Self::Internal(message) => message.len(),
        }
    }

    /// Creates an [`Error::Invalid`] from any displayable value.
    pub fn invalid(message: impl ToString) -> Self {
        Self::Invalid(message.to_string())
    }

    /// Creates an [`Error::Internal`] from any displayable value.
    pub fn internal(message: impl ToString) -> Self {
        Self::Internal(message.to_string())
    }

    /// [`Error::NotFound`] for the missing chunks of a blob to be spliced (CAS-36).
    pub fn missing_chunks(missing: &[Digest]) -> Self {
        Self::NotFound(format!("{}; upload these chunks and splice again", missing_message(missing)))
    }

    /// The error of a failed file operation. A full disk is for the operator to fix and can be retried; anything else
    /// is a fault of this server. `doing` completes "could not ...".
    pub fn io(doing: &str, error: &std::io::Error) -> Self {
        use std::io::ErrorKind::{QuotaExceeded, StorageFull};
        match error.kind() {
            StorageFull | QuotaExceeded => {
                Self::DiskFull(format!("could not {doing}: the disk of this server is full"))
            }
            _ if is_of_the_machine(error) => Self::Unavailable(format!("could not {doing}: {error}")),
            _ => Self::Internal(format!("could not {doing}: {error}")),
        }
    }
}

/// Whether an error of a system call comes from the state of the machine, such as too few descriptors or a read-only
/// file system, and not from the request.
fn is_of_the_machine(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{
        OutOfMemory, PermissionDenied, ReadOnlyFilesystem, StaleNetworkFileHandle, TimedOut, WouldBlock,
    };
    /// EMFILE, ENFILE and EIO, for which there are no kinds.
    const NUMBERS: [i32; 3] = [24, 23, 5];
    matches!(
        error.kind(),
        OutOfMemory | PermissionDenied | ReadOnlyFilesystem | StaleNetworkFileHandle | TimedOut | WouldBlock
    ) || error.raw_os_error().is_some_and(|number| NUMBERS.contains(&number))
}

/// How long a client should wait before it tries a full disk again.
pub const DISK_FULL_RETRY: Duration = Duration::from_secs(5);

/// Number of digests that an error message lists; the others are counted.
const SHOWN_DIGESTS: usize = 3;

fn missing_message(missing: &[Digest]) -> String {
    let shown: Vec<String> = missing.iter().take(SHOWN_DIGESTS).map(Digest::to_string).collect();
    let rest = missing.len().saturating_sub(SHOWN_DIGESTS);
    let more = if rest > 0 { format!(" and {rest} more") } else { String::new() };
    format!("{} blob(s) are not in the CAS: {}{more}", missing.len(), shown.join(", "))
}
