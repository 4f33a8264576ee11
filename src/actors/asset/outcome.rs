//! The outcomes of a fetch: content, a failure of the origin, or a fault of this server (AST-05).

use gorego_reapi::{digest::Digest, error::Error};
use std::{error::Error as StdError, io, time::SystemTime};

/// The result of a flight, which all its callers get.
pub(crate) type FlightOutcome = Result<Fetched, Problem>;

/// Fetched content, which is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetched {
    /// The requested URI that it was fetched from.
    pub uri: String,
    /// The blob or the root Directory.
    pub digest: Digest,
    /// When it expires; `None` for never.
    pub expires_at: Option<SystemTime>,
}

/// A failure of the origin, which the answer reports. The RPC itself succeeds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OriginFailure {
    /// The kind of failure.
    pub kind: FailureKind,
    /// The URI that failed; empty if all did.
    pub uri: String,
    /// The message for the user.
    pub message: String,
}

/// Kinds of failures of an origin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureKind {
    /// The origin has no such content.
    NotFound,
    /// The origin refuses it, or this server may not ask (AST-10).
    Denied,
    /// The fetch took too long.
    TimedOut,
    /// The content is not what was asked for (wrong checksum, damaged or hostile archive), or the origin cannot be
    /// reached.
    Unusable,
    /// The content is larger than this server accepts, or the origin limits the request rate.
    TooMuch,
}

impl FailureKind {
    /// The code of the status in the answer, for logs.
    pub fn code_name(self) -> &'static str {
        match self {
            Self::NotFound => "NOT_FOUND",
            Self::Denied => "PERMISSION_DENIED",
            Self::TimedOut => "DEADLINE_EXCEEDED",
            Self::Unusable => "ABORTED",
            Self::TooMuch => "RESOURCE_EXHAUSTED",
        }
    }
}

/// Why a fetch returned no content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Problem {
    /// A failure of the origin, which is part of the answer.
    Origin(OriginFailure),
    /// Qualifiers that no download can honour and under which nothing was pushed. The RPC fails (AST-02).
    Unsupported(Vec<String>),
    /// A fault of this server or of the request. The RPC fails.
    Server(Error),
}

impl Problem {
    /// A failure of the origin. The caller fills in the URI.
    pub fn origin(kind: FailureKind, message: impl Into<String>) -> Self {
        Self::Origin(OriginFailure { kind, uri: String::new(), message: message.into() })
    }

    /// The problem behind an IO error that a decoder or an archive reader passed on. Without one, the archive counts as
    /// damaged.
    pub fn of_io(error: &io::Error) -> Self {
        let mut next: Option<&(dyn StdError + 'static)> = Some(error);
        while let Some(error) = next {
            if let Some(Carried(problem)) = error.downcast_ref() {
                return problem.clone();
            }
            next = match error.downcast_ref::<io::Error>() {
                Some(error) => error.get_ref().map(|inner| inner as &(dyn StdError + 'static)),
                None => error.source(),
            };
        }
        Self::origin(FailureKind::Unusable, format!("the archive is damaged: {error}"))
    }

    /// Wraps the problem in an IO error, to pass it through readers.
    pub fn into_io(self) -> io::Error {
        io::Error::other(Carried(self))
    }
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        Self::Server(error)
    }
}

#[derive(Debug)]
struct Carried(Problem);

impl std::fmt::Display for Carried {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.0 {
            Problem::Origin(failure) => f.write_str(&failure.message),
            Problem::Unsupported(names) => write!(f, "qualifiers {names:?} are not supported"),
            Problem::Server(error) => write!(f, "{error}"),
        }
    }
}

impl StdError for Carried {}
