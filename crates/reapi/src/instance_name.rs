//! Instance names: the first part of every resource name. The server determines whether an instance exists.

use crate::error::{Error, Result};

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
/// [`Error::Invalid`] for reserved words, empty segments and control characters (GEN-13).
pub fn check_instance_name(name: &str) -> Result<()> {
    if name.is_empty() {
        return Ok(());
    }
    for segment in name.split('/') {
        if segment.is_empty() || segment.chars().any(char::is_control) || RESERVED_SEGMENTS.contains(&segment)
        {
            return Err(Error::Invalid(format!(
                "instance name \"{}\" is malformed: segment \"{}\" is not allowed",
                name.escape_debug(),
                segment.escape_debug()
            )));
        }
    }
    Ok(())
}
