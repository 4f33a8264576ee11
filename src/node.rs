//! [`NodeName`]: the name of a server among several that serve the same clients. Pure.
//!
//! The name of an operation carries the name of the server that owns it, so that every other server can tell where a
//! request about the operation has to go. A server that stands alone needs no name.

use gorego_reapi::{
    error::{Error, Result},
    escape::shown,
};
use std::{fmt, str::FromStr};

/// Longest name of a server, in bytes. It is a part of the name of each operation.
pub const MAX_NODE_NAME: usize = 16;

/// The name of a server: up to [`MAX_NODE_NAME`] lower-case letters, digits and inner `-`; empty for a server that
/// stands alone.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct NodeName {
    /// The name, padded with zeros. No name contains a zero.
    bytes: [u8; MAX_NODE_NAME],
}

impl NodeName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        let text = self.bytes.split(|byte| *byte == 0).next().unwrap_or_default();
        std::str::from_utf8(text).unwrap_or_default()
    }

    /// Whether the server stands alone.
    pub fn is_empty(&self) -> bool {
        self.as_str().is_empty()
    }
}

impl FromStr for NodeName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let is_plain = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || *byte == b'-';
        let mut bytes = [0; MAX_NODE_NAME];
        match bytes.get_mut(..text.len()) {
            Some(start) if text.as_bytes().iter().all(is_plain) && text.trim_matches('-') == text => {
                start.copy_from_slice(text.as_bytes());
                Ok(Self { bytes })
            }
            _ => Err(Error::Invalid(format!(
                "\"{}\" is not the name of a server: use up to {MAX_NODE_NAME} lower-case letters, digits and inner \"-\"",
                shown(text)
            ))),
        }
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_short_and_plain_and_reads_back_as_it_was_written() {
        for name in ["", "a", "7", "build-3", "abcdefghijklmnop"] {
            let parsed: NodeName = name.parse().unwrap();
            assert_eq!((parsed.as_str(), parsed.is_empty()), (name, name.is_empty()));
        }
        for name in ["A", "a.b", "a/b", "a b", "-a", "a-", "-", "ä", "a\0", "\0", "abcdefghijklmnopq"] {
            assert!(name.parse::<NodeName>().is_err(), "{name:?}");
        }
    }
}
