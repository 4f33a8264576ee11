//! The vocabulary of the Remote Execution API: its messages, and what they speak of, checked.
//!
//! What came from the wire or the disk is parsed once, here; a [`digest::Digest`], [`path::RootPath`] or [`tree::Directory`] in
//! hand is valid. Everything is pure: bytes and values in, bytes and values out. There is no server here, no client, no
//! runtime and no clock.
//!
//! - [`proto`]: the generated messages. [`wire`]: what a message will take in memory, before it is decoded.
//! - [`digest`], [`instance_name`], [`resource_name`], [`path`]: names.
//! - [`find_missing`]: two messages that are not the generated ones.
//! - [`tree`], [`auxiliary`], [`any`]: what messages hold.
//! - [`compression`], [`chunking`]: other forms of a blob.
//! - [`error`], [`escape`]: what is said when something is wrong. `status`, with the feature `tonic`: the same for gRPC.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod any;
pub mod auxiliary;
pub mod chunking;
pub mod compression;
pub mod digest;
pub mod error;
pub mod escape;
pub mod find_missing;
pub mod instance_name;
pub mod path;
pub mod proto;
pub mod resource_name;
#[cfg(feature = "tonic")]
pub mod status;
pub mod tree;
pub mod wire;
