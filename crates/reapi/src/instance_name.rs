//! Instance names: the first part of every resource name. The server determines whether an instance exists.

use crate::{
    error::{Error, Result},
    escape::shown,
};

/// Longest instance name, in bytes.
pub const MAX_INSTANCE_NAME_BYTES: usize = 4 * 1024;

/// Segments that would make resource names ambiguous (GEN-13). The last one is reserved only in names of log streams.
pub const RESERVED_SEGMENTS: &[&str] = &[
    "blobs",
    "uploads",
    "actions",
    "actionResults",
    "operations",
    "capabilities",
    "compressed-blobs",
    "logstreams",
];

/// Checks the form of an instance name. The empty name is valid.
///
/// # Errors
/// [`Error::Invalid`] for reserved words, empty segments and control characters (GEN-13), and for a name longer than
/// [`MAX_INSTANCE_NAME_BYTES`].
pub fn check_instance_name(name: &str) -> Result<()> {
    if name.is_empty() {
        return Ok(());
    }
    if name.len() > MAX_INSTANCE_NAME_BYTES {
        return Err(Error::Invalid(format!(
            "instance name \"{}\" has {} bytes; at most {MAX_INSTANCE_NAME_BYTES} are possible",
            shown(name),
            name.len()
        )));
    }
    for segment in name.split('/') {
        if segment.is_empty() || segment.chars().any(char::is_control) || RESERVED_SEGMENTS.contains(&segment)
        {
            return Err(Error::Invalid(format!(
                "instance name \"{}\" is malformed: segment \"{}\" is not allowed",
                shown(name),
                shown(segment)
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// GEN-13.
    #[test]
    fn a_malformed_name_of_any_length_has_a_short_error() {
        assert_eq!(check_instance_name(&"x".repeat(MAX_INSTANCE_NAME_BYTES)), Ok(()));
        let message = 16 * 1024 * 1024;
        for length in [MAX_INSTANCE_NAME_BYTES, MAX_INSTANCE_NAME_BYTES + 1, message] {
            let error = check_instance_name(&"\u{7f}".repeat(length)).unwrap_err().to_string();
            assert!(error.len() < 8 * 1024, "{}", error.len());
            let says_why = error.contains(&format!("has {length} bytes; at most 4096 are possible"));
            assert_eq!(says_why, length > MAX_INSTANCE_NAME_BYTES, "{error}");
        }
    }
}
