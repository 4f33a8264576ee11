//! [`ImageStore`]: the part of container images that a worker needs, as a trait. As a rule the image that an action names is there
//! when the action gets its slot, because the scheduler has asked for it before.

use super::{WorkerSettings, checkpoint::Checkpoint};
use crate::{
    action::{Action, Command},
    caller::Peer,
    platform,
    sandbox::kind::{CellKind, InnerUser, RootFs},
};
use gorego_reapi::error::{Error, Result};
use std::{any::Any, fmt, path::PathBuf};

/// Where the root file systems of images come from. Every method blocks.
pub trait ImageStore: Send + Sync + fmt::Debug {
    /// The root file system of an image for an action of this peer, after it was pulled if it is not there yet. `check` is called
    /// between short waits; its error ends the call, but not a pull that others may wait for.
    ///
    /// # Errors
    /// `Invalid` for a name that is none; `Precondition` for an image that cannot be had or used; `Unavailable` for what may pass;
    /// those of `check`.
    fn lease(&self, name: &str, peer: Peer, check: &dyn Fn() -> Result<()>) -> Result<LeasedImage>;

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

/// The image that an action asks for, if it does. Its files then replace the host's. Pulling it counts as fetching inputs.
///
/// # Errors
/// Those of [`ImageStore::lease`]; when the action asks for what cannot be together, or the pool cannot have images.
pub(super) fn lease_for(
    settings: &WorkerSettings,
    action: &Action,
    peer: Peer,
    kind: &mut CellKind,
    fetching: &Checkpoint,
) -> Result<Option<LeasedImage>> {
    let Some(images) = &settings.images else { return Ok(None) };
    let Some(name) = platform::wanted_image(&action.platform).map_err(Error::Invalid)? else {
        return Ok(None);
    };
    if platform::wants_input_root_as_root(&action.platform) {
        return Err(Error::invalid(
            "the action asks for an image and for its input root as its root file system",
        ));
    }
    if !settings.sandbox.as_ref().is_some_and(|sandbox| sandbox.protections.namespaces) {
        return Err(Error::Precondition(
            "the action asks for an image, which takes the namespaces of the sandbox; they are off in this pool".into(),
        ));
    }
    let image = images.lease(name, peer, &|| fetching.check())?;
    kind.root = Some(RootFs::directory(&image.root));
    kind.user = kind.user.or(image.user);
    Ok(Some(image))
}
