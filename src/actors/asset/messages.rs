//! The messages of [`super::client::Assets`] and of flights to the actor.

use super::{
    bindings::{Binding, KnownAsset},
    flights::FlightId,
    outcome::FlightOutcome,
    request::{AssetKey, AssetRequest},
};
use crate::caller::Caller;
use actix::Message;
use gorego_reapi::error::Result;
use std::{sync::Arc, time::SystemTime};
use tokio::{sync::watch, time::Instant};

/// Looks up what assets stand for. The answer is in the order of the keys.
#[derive(Debug, Message)]
#[rtype(result = "Vec<KnownAsset>")]
pub struct LookUpAsset {
    /// The assets to look up.
    pub keys: Vec<AssetKey>,
    /// Content older than this is not accepted (AST-08).
    pub oldest: Option<SystemTime>,
}

/// Binds content to assets.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct BindAsset {
    /// The assets that the content is bound to.
    pub keys: Vec<AssetKey>,
    /// The content that is bound.
    pub binding: Binding,
}

/// Starts a flight, or joins a running one if its content will be new enough. If a flight has ended since the caller's
/// look-up, its content is the answer.
///
/// # Errors
/// `Exhausted` when there are too many flights, or too many of this caller.
#[derive(Debug, Message)]
#[rtype(result = "Result<Joined>")]
pub struct JoinFlight {
    /// The request of the caller.
    pub request: Arc<AssetRequest>,
    /// The answers of [`LookUpAsset`] for its URIs, none of which was usable.
    pub known: Vec<KnownAsset>,
    /// Content older than this is not accepted (AST-08).
    pub oldest: Option<SystemTime>,
    /// The flight may run until then, but not beyond the longest duration of a fetch.
    pub deadline: Instant,
    /// The caller that wants the asset.
    pub caller: Caller,
}

/// A joined flight. Holds the outcome once the flight has ended.
#[derive(Debug)]
pub struct Joined(pub watch::Receiver<Option<FlightOutcome>>);

/// Fact: a flight has ended.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Landed {
    /// The flight that has ended.
    pub flight: FlightId,
    /// The asset and the content to bind to it.
    pub bind: Option<(AssetKey, Binding)>,
    /// The result for its callers.
    pub outcome: FlightOutcome,
}

/// Saves the bindings and stops the actor. Blocks the actor's thread for a moment, at the end of the process.
#[derive(Debug, Clone, Copy, Message)]
#[rtype(result = "()")]
pub struct CloseAssets;
