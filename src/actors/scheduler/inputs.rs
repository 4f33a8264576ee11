//! What the scheduler needs from other modules before a task gets a slot: [`InputCheck`] for the store and
//! [`ImageSupply`] for container images. They are traits, so that tests need neither.

use crate::{
    actors::cas::client::Cas,
    caller::{Caller, Owner},
    instance::Instance,
};
use futures::future::{BoxFuture, FutureExt as _};
use gorego_reapi::{digest::Digest, error::Result};
use std::collections::HashSet;

/// Checks whether the inputs of a task are stored, and keeps what is promised to builds.
pub trait InputCheck: 'static {
    /// See [`Cas::check_inputs`]. The work is done on other threads; polling the future is cheap for the actors'
    /// thread.
    fn check(&self, instance: Instance, root: Digest, build: Owner) -> BoxFuture<'static, Result<()>>;

    /// See [`Cas::keep_active`]. Does not block.
    fn keep_active(&self, builds: HashSet<Owner>);
}

/// Brings the container images of queued tasks onto this machine.
pub trait ImageSupply: Send + Sync {
    /// Pulls the image of this name if it is not unpacked yet. The work is done on other threads. If the future is
    /// dropped, the pull continues, because other callers may need the image.
    fn bring(&self, name: &str, caller: Caller) -> BoxFuture<'static, Result<()>>;
}

impl InputCheck for Cas {
    fn check(&self, instance: Instance, root: Digest, build: Owner) -> BoxFuture<'static, Result<()>> {
        let cas = self.working_for(Caller::without_connection(build.peer)).for_build(build);
        cas.check_inputs_apart(instance, root).boxed()
    }

    fn keep_active(&self, builds: HashSet<Owner>) {
        Self::keep_active(self, builds);
    }
}
