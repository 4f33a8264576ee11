//! The protocol edge over the wire: a gRPC server in this process with a store in a temporary directory, a scripted
//! scheduler, and a client with default settings. `docs/rules.md` lists the rule ids.
#![allow(clippy::unwrap_used, missing_docs)]

mod byte_stream;
mod cas;
mod compressed;
mod execution;
mod harness;
mod log_stream;
mod messages;
mod service;
#[path = "../support/mod.rs"]
mod support;
