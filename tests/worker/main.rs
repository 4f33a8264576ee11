//! What a worker promises about an action, with real processes and a store in memory.

#![allow(clippy::unwrap_used, missing_docs, deprecated)]

mod commands;
mod exec_directories;
mod inputs;
mod logs;
mod outputs;
#[path = "../support/mod.rs"]
mod support;
