//! What [`super::client::Assets`] asks of the actor, and what flights tell it.

use super::{
    bindings::{Binding, Known},
    flight::Outcome,
    flights::FlightId,
    request::{AssetKey, AssetRequest},
};
use crate::caller::Caller;
use actix::Message;
use gorego_reapi::error::Result;
use std::{sync::Arc, time::SystemTime};
use tokio::{sync::watch, time::Instant};

/// What do these stand for? The answer is in the order asked.
#[derive(Debug, Message)]
#[rtype(result = "Vec<Known>")]
pub struct LookUpAsset {
    /// The assets.
    pub keys: Vec<AssetKey>,
    /// Older content does not count (AST-08).
    pub oldest: Option<SystemTime>,
}

/// Lets assets stand for this content.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct BindAsset {
    /// The assets.
    pub keys: Vec<AssetKey>,
    /// The content.
    pub binding: Binding,
}

/// Starts a download, or joins the one that is under way if its content will be new enough. If one has landed since the caller
/// looked, its content is the answer.
///
/// # Errors
/// `Exhausted` when too many are, or too many of this caller.
#[derive(Debug, Message)]
#[rtype(result = "Result<Joined>")]
pub struct JoinFlight {
    /// What is wanted.
    pub request: Arc<AssetRequest>,
    /// What [`LookUpAsset`] said of its URIs, none of which would do.
    pub known: Vec<Known>,
    /// Older content does not count (AST-08).
    pub oldest: Option<SystemTime>,
    /// The flight goes on until then if it has to, but not beyond the longest time of a fetch.
    pub deadline: Instant,
    /// Who wants it.
    pub caller: Caller,
}

/// A place in a flight: holds its outcome once it has landed.
#[derive(Debug)]
pub struct Joined(pub watch::Receiver<Option<Outcome>>);

/// Fact: a flight has ended.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Landed {
    /// Which one.
    pub flight: FlightId,
    /// The asset that it brought content for.
    pub bind: Option<(AssetKey, Binding)>,
    /// What those who wait are told.
    pub outcome: Outcome,
}

/// Writes bindings down and stops. Blocks the actor's thread for a moment, at the end of the process.
#[derive(Debug, Clone, Copy, Message)]
#[rtype(result = "()")]
pub struct CloseAssets;
