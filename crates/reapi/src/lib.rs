//! The vocabulary of the Remote Execution API: its messages, and checked types for what they contain. Pure.
//!
//! Data from the wire or the disk is parsed once, here. A value of type [`digest::Digest`], [`path::RootPath`] or
//! [`tree::Directory`] is always valid. Bytes and values go in, and bytes and values come out. There is no
//! server, client, runtime or clock.
//!
//! - [`proto`]: the generated messages. [`wire`]: the memory that a message will take, measured before it is decoded.
//! - [`digest`], [`instance_name`], [`resource_name`], [`path`]: names.
//! - [`find_missing`]: the messages of FindMissingBlobs, hand-written so that digests need no text.
//! - [`tree`], [`auxiliary`], [`any`], [`duration`]: the contents of messages.
//! - [`compression`], [`chunking`]: other forms of a blob.
//! - [`error`], [`escape`]: failures and their texts. `status`, with the feature `tonic`: their gRPC form.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod any;
pub mod auxiliary;
pub mod chunking;
pub mod compression;
pub mod digest;
pub mod duration;
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
