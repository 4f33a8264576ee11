//! [`TokenRefusal`]: why a token is not accepted, for the log and for the client. Pure.

use std::fmt;

/// Maximum number of characters of a token's value that a reason quotes.
const QUOTED: usize = 96;

/// Why a token is not accepted. It never contains the token itself or its signature.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenRefusal {
    /// The kind of problem, without details.
    pub kind: RefusalKind,
    /// The details, for this server's log.
    pub reason: String,
}

/// What is wrong with a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RefusalKind {
    /// It is not a token of the right form.
    Malformed,
    /// It comes from an issuer that is not configured.
    Issuer,
    /// It was issued for another audience.
    Audience,
    /// Its algorithm is not accepted.
    Algorithm,
    /// Its key is not among the keys of the issuer.
    Key,
    /// The signature is wrong.
    Signature,
    /// The token has expired.
    Expired,
    /// Its time `nbf` has not come.
    NotYetValid,
    /// Its claims do not meet a condition.
    Claims,
    /// The keys of the issuer are not known at present.
    KeysUnavailable,
}

impl TokenRefusal {
    pub(super) fn new(kind: RefusalKind, reason: impl Into<String>) -> Self {
        Self { kind, reason: reason.into() }
    }

    /// The message for the client. The client has the token, so it may learn the reason, but not how this server tried
    /// to fetch keys.
    pub fn message(&self) -> String {
        match self.kind {
            RefusalKind::KeysUnavailable => {
                "this server has no keys to check tokens of this issuer at present; try again later".into()
            }
            RefusalKind::Expired => format!("the token is not accepted: {}; get a new one", self.reason),
            RefusalKind::NotYetValid => {
                format!("the token is not accepted: {}; compare the clocks of client and server", self.reason)
            }
            _ => format!("the token is not accepted: {}", self.reason),
        }
    }
}

impl fmt::Display for TokenRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

/// The quoted form of a token's value: on one line, and not too long.
pub(super) fn shown(value: &str) -> String {
    let mut shown: String = value.chars().take(QUOTED).flat_map(char::escape_debug).collect();
    if value.chars().nth(QUOTED).is_some() {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quoted_value_is_short_and_stays_on_its_line() {
        assert_eq!(shown("a\n\"b\""), "a\\n\\\"b\\\"");
        assert_eq!(shown(&"x".repeat(QUOTED)), "x".repeat(QUOTED));
        assert_eq!(shown(&"é".repeat(10_000)).chars().count(), QUOTED + 1);
    }
}
