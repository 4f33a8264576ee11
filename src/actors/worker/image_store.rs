//! [`ImageStore`]: the part of container images that a worker needs, as a trait.

use crate::{action::Command, sandbox::kind::InnerUser};
use gorego_reapi::error::Result;
use std::{any::Any, fmt, path::PathBuf};

/// Where the root file systems of images come from. Every method blocks.
pub trait ImageStore: Send + Sync + fmt::Debug {
    /// The root file system of an image, after it was pulled if it is not there yet. `check` is called between short waits; its
    /// error ends the call, but not a pull that others may wait for.
    ///
    /// # Errors
    /// `Invalid` for a name that is none; `Precondition` for an image that cannot be had or used; `Unavailable` for what may pass;
    /// those of `check`.
    fn lease(&self, name: &str, check: &dyn Fn() -> Result<()>) -> Result<LeasedImage>;

    /// Removes the images that nobody uses, for a disk that is full.
    fn relieve_disk(&self);
}

/// An unpacked image, which stays for as long as this is held.
#[derive(Debug)]
pub struct LeasedImage {
    /// Absolute path of its root file system, which must not be changed.
    pub root: PathBuf,
    /// Variables, where a command does not set them itself.
    pub environment: Vec<(String, String)>,
    /// Who a command is, as it sees itself; nobody special if this is missing.
    pub user: Option<InnerUser>,
    /// What keeps it.
    pub lease: Box<dyn Any + Send + Sync>,
}

impl LeasedImage {
    /// The command as it runs in this image: with the variables that it does not set itself.
    pub(super) fn complete(&self, command: &Command) -> Command {
        let is_set = |name: &String| command.environment.iter().any(|(own, _)| own == name);
        let more = self.environment.iter().filter(|(name, _)| !is_set(name));
        let environment = command.environment.iter().chain(more).cloned().collect();
        Command { environment, ..command.clone() }
    }
}
