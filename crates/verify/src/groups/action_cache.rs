//! AC: GetActionResult and UpdateActionResult. Most checks need permission to write results.
//!
//! Nothing can be deleted over the wire, so the completeness checks store results that name blobs that never existed.

pub(crate) mod completeness;
pub(crate) mod inlining;
pub(crate) mod updates;

use super::Beyond;

/// Rules that cannot be checked over the wire.
pub(super) const BEYOND: &[Beyond] =
    &[("AC-04", "needs a store that is about to evict, which is not for a server in use")];
