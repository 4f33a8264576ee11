//! GEN: rules that hold for every call. One file each for digests, instances, errors and transport.

pub(crate) mod digests;
pub(crate) mod errors;
pub(crate) mod instances;
pub(crate) mod transport;

use super::Beyond;

/// Rules that cannot be checked over the wire.
pub const BEYOND: &[Beyond] =
    &[("GEN-23", "needs a server that asks for credentials, and callers with and without them")];
