//! The guarantees of a worker for an action, tested with real processes and an in-memory store.

#![allow(clippy::unwrap_used, missing_docs, deprecated)]

mod commands;
mod exec_directories;
mod inputs;
mod logs;
mod outputs;
#[path = "../support/mod.rs"]
mod shared;
mod staging;
mod tools;

use shared::worker as support;
