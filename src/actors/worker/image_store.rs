//! [`ImageStore`]: a trait with the operations on container images that a worker needs. The scheduler asks for the
//! image of an action in advance, so the image has usually been pulled when the action gets its slot.

use super::{WorkerSettings, checkpoint::Checkpoint};
use crate::{
    action::{Action, Command},
    caller::Peer,
    platform,
    sandbox::{
        identity::InnerUser,
        kind::{CellKind, RootFs},
    },
};
use gorego_reapi::error::{Error, Result};
use std::{any::Any, fmt, path::PathBuf};

/// Provides the root file systems of images. Every method blocks.
pub trait ImageStore: Send + Sync + fmt::Debug {
    /// Leases the root file system of an image for an action of this peer, and pulls the image first if necessary.
    /// `check` is called between short waits. Its error ends the call, but not the pull, because other actions may wait
    /// for it.
    ///
    /// # Errors
    /// `Invalid` for an invalid name; `Precondition` for an image that cannot be pulled or used; `Unavailable` for
    /// temporary problems; the errors of `check`.
    fn lease(&self, name: &str, peer: Peer, check: &dyn Fn() -> Result<()>) -> Result<LeasedImage>;

    /// Removes images that are not in use, to free space on a full disk.
    fn relieve_disk(&self);
}

/// An unpacked image. It is not removed while this is held.
#[derive(Debug)]
pub struct LeasedImage {
    /// Absolute path of its root file system, which must not be changed.
    pub root: PathBuf,
    /// Environment variables for commands that do not set them.
    pub environment: Vec<(String, String)>,
    /// User and group of the command as it sees itself; `None` for the default.
    pub user: Option<InnerUser>,
    /// Keeps the image from being removed.
    pub lease: Box<dyn Any + Send + Sync>,
}

impl LeasedImage {
    /// The command with those variables of the image that it does not set itself.
    pub(super) fn complete(&self, command: &Command) -> Command {
        let is_set = |name: &String| command.environment.iter().any(|(own, _)| own == name);
        let more = self.environment.iter().filter(|(name, _)| !is_set(name));
        let environment = command.environment.iter().chain(more).cloned().collect();
        Command { environment, ..command.clone() }
    }
}

/// Leases the image that an action asks for, if any, and makes it the root file system in `kind`. Pulling it counts as
/// fetching inputs.
///
/// # Errors
/// The errors of [`ImageStore::lease`]; an error if the action asks for a combination that is not possible, or if the
/// pool cannot use images.
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
            "the action asks for an image, which requires the namespaces of the sandbox; they are off in this pool".into(),
        ));
    }
    let image = images.lease(name, peer, &|| fetching.check())?;
    kind.root = Some(RootFs::directory(&image.root));
    kind.user = kind.user.or(image.user);
    Ok(Some(image))
}
