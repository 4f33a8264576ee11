//! BS: resource names, Read, Write, compressed traffic, QueryWriteStatus; one file each.

pub mod compressed;
pub mod names;
pub mod query;
pub mod read;
pub mod write;

use super::Beyond;

/// What cannot be checked over the wire.
pub const BEYOND: &[Beyond] = &[
    ("BS-16", "needs a file that is damaged in the server's store"),
    ("BS-17", "needs a look at the memory of the server"),
];
