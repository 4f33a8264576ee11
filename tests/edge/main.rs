//! The protocol edge over the wire: a real gRPC server in this process over a store in a temporary directory, a scheduler
//! that does what the test says, and a plain client at default settings. Rule ids are those of `docs/rules.md`.
#![allow(clippy::unwrap_used, missing_docs)]

mod byte_stream;
mod cas;
mod compressed;
mod execution;
mod harness;
mod log_stream;
mod messages;
mod service;
