//! GEN: rules that hold for every call. One file each for credentials, digests, instances, errors and transport.

pub(crate) mod credentials;
pub(crate) mod digests;
pub(crate) mod errors;
pub(crate) mod instances;
pub(crate) mod transport;
