//! Behaviour over the wire: the real binary and a real client. `docs/rules.md` lists the rule ids.

#![allow(clippy::unwrap_used)]

mod abandoned;
mod access;
mod admin;
mod assets;
mod at_rest;
mod cache_interplay;
mod chunks;
mod compression;
mod confined;
mod damage;
mod digest_functions;
mod disk;
mod eviction;
mod execution;
mod faults;
mod http_cache;
mod images;
mod inputs;
mod instances;
mod leases;
mod lifecycle;
mod live;
#[path = "../log_schema/mod.rs"]
mod log_schema;
mod logs;
mod metrics;
mod operations;
mod outputs;
mod pipes;
mod pools;
mod quotas;
mod reload;
mod signed_tokens;
mod supervised;
#[path = "../support/mod.rs"]
mod support;
mod tls;
