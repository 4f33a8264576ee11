//! `gorego store`: shows the numbers of a server's store, and removes action results that cannot be trusted. Client of
//! the Admin service.

mod nondeterminism;
mod purge;
mod stats;

use super::{EXIT_FAILURE, ServerArgs, complain, ops::connect};
use clap::{ArgGroup, Args, Subcommand};
use gorego_reapi::{digest::DigestFunction, proto::reapi};
use std::time::SystemTime;

/// The subcommands of `gorego store`.
#[derive(Debug, Clone, Subcommand)]
pub enum StoreCommand {
    /// Show what the store, the staged input trees and the images take
    Stats(StatsArgs),
    /// Remove results from the action cache by their origin; without --yes, only show which ones
    Purge(PurgeArgs),
    /// List the actions that were seen with different outputs, the latest first
    Nondeterminism(NonDeterminismArgs),
}

/// The flags of `gorego store stats`.
#[derive(Debug, Clone, Args)]
pub struct StatsArgs {
    /// The server that answers the command, and the connection to it.
    #[command(flatten)]
    pub server: ServerArgs,
    /// Print JSON (docs/administration.md)
    #[arg(long)]
    pub json: bool,
}

/// The flags of `gorego store purge`.
#[derive(Debug, Clone, Args)]
#[command(group(ArgGroup::new("which").required(true).multiple(true).args(["action", "invocation", "principal", "worker", "since"])))]
pub struct PurgeArgs {
    /// The result of this action
    #[arg(long, value_name = "HASH/SIZE", value_parser = purge::parse_action)]
    pub action: Option<reapi::Digest>,
    /// Digest function of --action, such as blake3 [default: the one that the length of the hash suggests]
    #[arg(long, value_name = "NAME", value_parser = super::args::parse_digest_function)]
    pub digest_function: Option<DigestFunction>,
    /// Results that this run of a build tool caused (Bazel's invocation id)
    #[arg(long, value_name = "ID")]
    pub invocation: Option<String>,
    /// Results that this principal uploaded or asked a worker for, such as token:6b3386d1a52f4c0e
    #[arg(long, value_name = "NAME")]
    pub principal: Option<String>,
    /// Results of this worker, or of all workers whose names begin with it and a slash
    #[arg(long, value_name = "NAME")]
    pub worker: Option<String>,
    /// Results that were written since then: how long ago, as in 2h, or a time, as in 2026-01-31T12:00:00Z
    #[arg(long, value_name = "WHEN", value_parser = |text: &str| purge::parse_since(text, SystemTime::now()))]
    pub since: Option<SystemTime>,
    /// Remove them; without it, only show which ones
    #[arg(long)]
    pub yes: bool,
    /// The server that answers the command, and the connection to it.
    #[command(flatten)]
    pub server: ServerArgs,
    /// Print one JSON object for each result, and one for the sum (docs/administration.md)
    #[arg(long)]
    pub json: bool,
}

/// The flags of `gorego store nondeterminism`.
#[derive(Debug, Clone, Args)]
pub struct NonDeterminismArgs {
    /// List at most this many
    #[arg(long, default_value_t = 20, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000))]
    pub limit: u32,
    /// The server that answers the command, and the connection to it.
    #[command(flatten)]
    pub server: ServerArgs,
    /// Print JSON (docs/administration.md)
    #[arg(long)]
    pub json: bool,
}

/// Runs `gorego store ...` and returns its exit code.
pub(super) fn run(command: &StoreCommand) -> u8 {
    let outcome = super::block_on(async {
        match command {
            StoreCommand::Stats(args) => stats::stats(args).await,
            StoreCommand::Purge(args) => purge::purge(args).await,
            StoreCommand::Nondeterminism(args) => nondeterminism::list(args).await,
        }
    });
    outcome.unwrap_or_else(|error| {
        complain(&error);
        EXIT_FAILURE
    })
}
