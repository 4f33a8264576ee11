//! Other forms of blobs: zstd streams and chunks.

pub(crate) mod chunks;
pub(crate) mod splice;
pub(crate) mod zstd_form;
pub(crate) mod zstd_reader;
