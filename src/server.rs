//! Stand-in for the server, which is wired in another room: only the door that the command line knocks at.

use crate::{
    config::Settings,
    error::{Error, Result},
};
use std::net::SocketAddr;

/// Runs a server until it is told to stop. `ready` is called once, with the address that is really listened on, when the
/// first request would be answered.
///
/// # Errors
/// What keeps it from starting, or the death of an owner actor.
pub fn run(settings: Settings, ready: impl FnOnce(SocketAddr) + Send + 'static) -> Result<()> {
    let _ = (settings, ready);
    Err(Error::Unimplemented("this build has no server".into()))
}
