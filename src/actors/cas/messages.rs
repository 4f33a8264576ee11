//! What other actors ask of the CAS.
//!
//! Everybody else (RPC handlers, worker threads) goes through [`super::client::Cas`], which turns each call into one or two
//! of the actor's private messages and does the file work outside the actor.

use crate::{action::Action, caller::Caller, instance::Instance};
use gorego_reapi::{digest::Digest, error::Result, proto::reapi};
use std::sync::Arc;

/// Looks an Execute request up: is there a complete result, or what is to be run?
///
/// # Errors
/// `MissingBlobs` when the Action or its Command is not stored, `Invalid` when one of them is malformed.
#[derive(Debug, Clone, actix::Message)]
#[rtype(result = "Result<Resolution>")]
pub struct ResolveAction {
    /// The namespace.
    pub instance: Instance,
    /// Digest of the Action.
    pub action: Digest,
    /// Do not look into the action cache (EXE-17).
    pub skip_cache_lookup: bool,
    /// Who asks.
    pub caller: Caller,
}

/// The answer to [`ResolveAction`].
#[derive(Debug, Clone)]
pub enum Resolution {
    /// A stored result; everything it references is present and was just renewed (AC-03, AC-04).
    Cached(Arc<reapi::ActionResult>),
    /// No usable result; this is what has to run.
    Run(Arc<Action>),
}

/// Checks that the whole input root is stored, and renews it.
///
/// # Errors
/// `MissingBlobs` with everything that is missing (EXE-26), `Invalid` when a Directory is malformed.
#[derive(Debug, Clone, actix::Message)]
#[rtype(result = "Result<()>")]
pub struct CheckInputs {
    /// The namespace.
    pub instance: Instance,
    /// Digest of the root Directory.
    pub root: Digest,
    /// For whom.
    pub caller: Caller,
}
