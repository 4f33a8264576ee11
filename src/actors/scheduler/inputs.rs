//! What tasks need before they get a slot: [`InputCheck`] is the part of the store that the scheduler needs, and [`ImageSupply`]
//! that of container images. They are traits, so that tests need neither.

use crate::{
    actors::cas::client::Cas,
    caller::{Caller, Owner},
    instance::Instance,
};
use futures::future::{BoxFuture, FutureExt as _};
use gorego_reapi::{digest::Digest, error::Result};

/// Checks whether the inputs of a task are stored.
pub trait InputCheck: 'static {
    /// See [`Cas::check_inputs`]. The work is done on other threads; polling the future costs the actors' thread next to nothing.
    fn check(&self, instance: Instance, root: Digest, build: Owner) -> BoxFuture<'static, Result<()>>;
}

/// Brings container images.
pub trait ImageSupply: Send + Sync {
    /// Pulls the image of this name if it is not there. The work is done on other threads. A dropped future waits no more; the
    /// pull goes on, since others may want it.
    fn bring(&self, name: &str, caller: Caller) -> BoxFuture<'static, Result<()>>;
}

impl InputCheck for Cas {
    fn check(&self, instance: Instance, root: Digest, build: Owner) -> BoxFuture<'static, Result<()>> {
        let cas = self.working_for(Caller::without_connection(build.peer)).for_build(build);
        cas.check_inputs_apart(instance, root).boxed()
    }
}
