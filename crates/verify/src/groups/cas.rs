//! CAS: FindMissingBlobs, the batch calls, GetTree, SplitBlob and SpliceBlob; one file each.

pub mod batch_read;
pub mod batch_update;
pub mod chunks;
pub mod find_missing;
pub mod tree;

use super::Beyond;

/// What cannot be checked over the wire.
pub const BEYOND: &[Beyond] = &[
    ("CAS-04", "needs a store that is about to evict, which is not for a server in use"),
    ("CAS-08", "needs a fault in the server's index"),
];
