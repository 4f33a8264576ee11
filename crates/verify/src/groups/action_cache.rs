//! AC: GetActionResult and UpdateActionResult. Most of it needs a caller who may write results.
//!
//! Nothing can be deleted over the wire, so the checks of completeness store results that name blobs which never were there.

pub mod completeness;
pub mod inlining;
pub mod updates;

use super::Beyond;

/// What cannot be checked over the wire.
pub const BEYOND: &[Beyond] =
    &[("AC-04", "needs a store that is about to evict, which is not for a server in use")];
