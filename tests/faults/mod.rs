//! Faulty servers: each is correct except for one fault.
//!
//! A [`Fault`] has a name, the rules that it breaks, and a [`Behaviour`] for the [proxy](proxy) in front of a real
//! server. Each file below has the faults of one part of the API; `change` has the combinators with which they are
//! written.

mod action_cache;
mod asset;
mod byte_stream;
mod capabilities;
mod cas;
pub(crate) mod change;
mod execution;
mod general;
pub(crate) mod lawful;
mod log_stream;
mod operations;
mod outputs;
pub(crate) mod proxy;

pub(crate) use execution::inline_as_status;
use proxy::{Behaviour, Proxy, Transport};

/// One fault.
pub(crate) struct Fault {
    /// A short description of the fault.
    pub(crate) name: &'static str,
    /// At least these rules must fail.
    pub(crate) breaks: &'static [&'static str],
    /// The change to calls.
    pub(crate) behaviour: Behaviour,
    /// The change to the connection.
    pub(crate) transport: Transport,
}

impl Fault {
    /// Starts a proxy with this fault in front of the server at `endpoint`.
    pub(crate) async fn before(&self, endpoint: &str) -> Proxy {
        Proxy::start(endpoint, self.transport, self.behaviour.clone()).await
    }
}

/// Creates a fault of calls.
pub(crate) fn fault(name: &'static str, breaks: &'static [&'static str], behaviour: Behaviour) -> Fault {
    Fault { name, breaks, behaviour, transport: Transport::default() }
}

/// All faults.
pub(crate) fn all() -> Vec<Fault> {
    [
        general::faults(),
        capabilities::faults(),
        cas::faults(),
        byte_stream::faults(),
        action_cache::faults(),
        execution::faults(),
        outputs::faults(),
        operations::faults(),
        asset::faults(),
        log_stream::faults(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
