//! goREgo: remote execution for Bazel and every other build tool that speaks the Remote Execution API, in one process.
//!
//! `ARCHITECTURE.md` is the map of this crate: who owns what, who sends what to whom, and one Execute from file to
//! file.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod access;
mod acknowledge;
pub mod action;
pub mod actors;
mod address;
pub mod administration;
mod alarm;
mod background;
mod budget;
mod call;
pub mod caller;
mod causes;
mod cgroups;
pub mod cli;
pub mod config;
mod connections;
mod disk;
mod file_identity;
pub mod gate;
pub mod grpc;
pub mod host;
pub mod http;
pub mod images;
pub mod instance;
pub mod limits;
pub mod log_streams;
pub mod logging;
mod memory;
pub mod node;
mod nondeterminism;
pub mod platform;
pub mod quotas;
mod rate;
mod regular_file;
mod reload;
pub mod result;
mod sandbox;
mod server;
mod signals;
pub mod size;
mod spread;
mod state_file;
mod supervisor;
pub mod telemetry;
mod tls;
pub mod under_way;
mod unhindered;
