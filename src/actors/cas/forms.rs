//! Other forms of blobs: zstd streams and chunks.

pub mod chunks;
pub mod splice;
pub(crate) mod zstd_form;
pub mod zstd_reader;
