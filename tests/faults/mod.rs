//! Faults: a server that is right in everything but one thing.
//!
//! A [`Fault`] is a name, the rules that it breaks and a [`Behaviour`] for the [proxy](proxy) that stands in front of a real
//! server. Each file below has the faults of one part of the API; `change` has the words they are written in.

mod action_cache;
mod asset;
mod byte_stream;
mod capabilities;
mod cas;
pub mod change;
mod execution;
mod general;
pub mod lawful;
mod log_stream;
mod operations;
mod outputs;
pub mod proxy;

pub use execution::inline_as_status;
use proxy::{Behaviour, Proxy, Transport};

/// One way to be wrong.
pub struct Fault {
    /// What is wrong, in a few words.
    pub name: &'static str,
    /// The rules of which at least these must fail.
    pub breaks: &'static [&'static str],
    /// How calls are changed.
    pub behaviour: Behaviour,
    /// How the connection is changed.
    pub transport: Transport,
}

impl Fault {
    /// A proxy with this fault before the server at `endpoint`.
    pub async fn before(&self, endpoint: &str) -> Proxy {
        Proxy::start(endpoint, self.transport, self.behaviour.clone()).await
    }
}

/// A fault of calls.
pub fn fault(name: &'static str, breaks: &'static [&'static str], behaviour: Behaviour) -> Fault {
    Fault { name, breaks, behaviour, transport: Transport::default() }
}

/// Every fault.
pub fn all() -> Vec<Fault> {
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
