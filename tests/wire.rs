//! The protocol over the wire: a real server in this process over a store in a temporary directory, a scheduler that does what
//! the test says, and a plain client at default settings. Tests cite the rules they hold.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "wire/byte_stream.rs"]
mod byte_stream;
#[path = "wire/cas.rs"]
mod cas;
#[path = "wire/execution.rs"]
mod execution;
#[path = "wire/harness.rs"]
mod harness;
#[path = "wire/service.rs"]
mod service;
