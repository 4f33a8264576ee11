//! goREgo: remote execution for Bazel and every other build tool that speaks the Remote Execution API, in one process.
//!
//! `ARCHITECTURE.md` is the map of this crate: who owns what, who sends what to whom, and one Execute from file to
//! file.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod access;
pub mod action;
pub mod actors;
mod address;
pub mod administration;
mod background;
mod budget;
mod call;
pub mod caller;
mod cgroups;
pub mod cli;
pub mod config;
mod connections;
mod directory_hint;
mod disk;
mod file_identity;
pub mod gate;
pub mod grpc;
pub mod host;
pub mod http;
mod http_error;
pub mod images;
pub mod instance;
pub mod limits;
pub mod log_streams;
pub mod logging;
mod memory;
pub mod node;
mod nondeterminism;
pub mod platform;
mod quick_ack;
pub mod quotas;
mod rate;
mod regular_file;
mod reload;
pub mod result;
mod sandbox;
mod server;
mod signals;
pub mod size;
mod slow_work;
mod state_file;
mod supervisor;
pub mod telemetry;
mod timer;
mod tls;
pub mod unfinished_requests;
