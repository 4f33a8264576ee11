//! [`Rejection`]: why a credential is refused. The text is for the client and for logs, and contains no secret. Pure.

use gorego_reapi::error::Error;
use std::{fmt, time::Duration};

/// The reason; see the top of this file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rejection {
    /// The request does not have exactly one well-formed credential.
    Malformed(String),
    /// There is no such credential, or it was revoked.
    Refused(String),
    /// The credential has expired or is not valid yet.
    Expired(String),
    /// The credential is genuine, but not for this server.
    Unaccepted(String),
    /// Too many credentials are being checked, or too many were wrong. The client may try again after this time.
    TooMany(String, Duration),
    /// The credential cannot be checked now, for example because the keys of its issuer cannot be fetched.
    Unavailable(String),
}

impl Rejection {
    /// A rejection of a wrong credential.
    pub fn refused(why: impl Into<String>) -> Self {
        Self::Refused(why.into())
    }
}

impl fmt::Display for Rejection {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Malformed(why)
        | Self::Refused(why)
        | Self::Expired(why)
        | Self::Unaccepted(why)
        | Self::TooMany(why, _)
        | Self::Unavailable(why)) = self;
        formatter.write_str(why)
    }
}

impl From<Rejection> for Error {
    fn from(rejection: Rejection) -> Self {
        match rejection {
            Rejection::Malformed(why)
            | Rejection::Refused(why)
            | Rejection::Expired(why)
            | Rejection::Unaccepted(why) => Self::Unauthenticated(why),
            Rejection::TooMany(message, retry_after) => Self::OverQuota { message, retry_after },
            Rejection::Unavailable(why) => Self::Unavailable(why),
        }
    }
}
