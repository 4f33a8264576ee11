//! CAS: FindMissingBlobs, the batch calls, GetTree, SplitBlob and SpliceBlob; one file each.

pub(crate) mod batch_read;
pub(crate) mod batch_update;
pub(crate) mod chunks;
pub(crate) mod find_missing;
pub(crate) mod tree;

use super::Beyond;

/// Rules that cannot be checked over the wire.
pub(super) const BEYOND: &[Beyond] = &[
    ("CAS-04", "needs a store that is about to evict, which is not for a server in use"),
    ("CAS-08", "needs a fault in the server's index"),
];
