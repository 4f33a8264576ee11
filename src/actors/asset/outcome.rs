//! How a fetch ends: with content, with bad news from the origin, or with a fault of this server (AST-05).

use gorego_reapi::{digest::Digest, error::Error};
use std::{error::Error as StdError, io, time::SystemTime};

/// Content that is in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetched {
    /// Which of the requested URIs it is of.
    pub uri: String,
    /// The blob or the root Directory.
    pub digest: Digest,
    /// When it will not be served any more; `None` for never.
    pub expires_at: Option<SystemTime>,
}

/// Why the origin side gave nothing. The RPC itself is fine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What kind of bad news.
    pub kind: FailureKind,
    /// The URI that it is about; empty for all of them.
    pub uri: String,
    /// For the person who asked.
    pub message: String,
}

/// What kind of bad news an origin has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureKind {
    /// There is no such content.
    NotFound,
    /// The origin refuses it, or this server may not ask (AST-10).
    Denied,
    /// It took too long.
    TimedOut,
    /// It is not what was asked for: wrong checksum, damaged or hostile archive; or the origin cannot be reached.
    Unusable,
    /// It is larger than this server takes, or the origin has had enough of us.
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

/// A fetch without content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Problem {
    /// Bad news, to be told within the answer.
    Origin(Failure),
    /// Qualifiers that no download can honour, and that nothing was pushed under; the RPC fails (AST-02).
    Unsupported(Vec<String>),
    /// A fault of this server, or of the request; the RPC fails.
    Server(Error),
}

impl Problem {
    /// Bad news of this kind; its URI is filled in by whoever knows it.
    pub fn origin(kind: FailureKind, message: impl Into<String>) -> Self {
        Self::Origin(Failure { kind, uri: String::new(), message: message.into() })
    }

    /// The problem behind an IO error that a decoder or an archive reader passed on; where nobody said more, the bytes that
    /// it read are at fault.
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

    /// An IO error that carries this, for readers in between.
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
