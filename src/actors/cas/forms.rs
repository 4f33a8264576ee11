//! Other forms of blobs: zstd streams, compression at rest, and chunks.

pub(crate) mod chunks;
pub(crate) mod packing;
pub(crate) mod splice;
pub(crate) mod zstd_form;
pub(crate) mod zstd_reader;
