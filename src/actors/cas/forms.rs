//! Other forms of blobs: zstd streams of them, and the chunks that they are made of.

pub mod chunks;
pub mod splice;
pub(crate) mod zstd_form;
pub mod zstd_reader;
