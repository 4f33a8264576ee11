//! BS: resource names, Read, Write, compressed transfers, QueryWriteStatus; one file each.

pub(crate) mod compressed;
pub(crate) mod names;
pub(crate) mod query;
pub(crate) mod read;
pub(crate) mod write;

use super::Beyond;

/// Rules that cannot be checked over the wire.
pub(super) const BEYOND: &[Beyond] = &[
    ("BS-16", "needs a file that is damaged in the server's store"),
    ("BS-17", "needs a look at the memory of the server"),
];
