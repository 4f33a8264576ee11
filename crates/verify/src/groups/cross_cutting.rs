//! GEN: what holds for every call. One file each for digests, instances, errors and transport.

pub mod digests;
pub mod errors;
pub mod instances;
pub mod transport;

use super::Beyond;

/// What cannot be checked over the wire.
pub const BEYOND: &[Beyond] =
    &[("GEN-23", "needs a server that asks for credentials, and callers with and without them")];
