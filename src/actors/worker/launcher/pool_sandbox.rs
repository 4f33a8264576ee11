//! [`PoolSandbox`]: the sandbox that the slots of a pool use.

use crate::{
    platform,
    sandbox::{
        identity::{InnerUser, Users},
        kind::{CellKind, CellNetwork, InputsAsRoot, RootFs},
        settings::{Pasta, Protections, SandboxSettings},
    },
};
use gorego_reapi::error::{Error, Result};
use std::path::PathBuf;

/// The sandbox of a pool: its settings, and which parts work on this machine. Cheap to clone.
#[derive(Debug, Clone)]
pub struct PoolSandbox {
    pub(crate) settings: SandboxSettings,
    pub(crate) protections: Protections,
    /// The directory that contains the exec directories.
    pub(crate) build_root: PathBuf,
    /// The users from which each slot takes its own.
    pub(crate) users: Users,
    /// Whether input roots can be overlays.
    pub(crate) has_layers: bool,
    /// The program behind the networks of cells, if it works.
    pub(crate) pasta: Option<Pasta>,
}

impl PoolSandbox {
    /// The kind of cell for an action that asks for nothing special.
    pub(in crate::actors::worker) fn usual_kind(&self) -> CellKind {
        self.settings.kind()
    }

    /// Whether input roots can be overlays.
    pub fn has_layers(&self) -> bool {
        self.has_layers
    }

    /// The kind of cell for an action with these platform properties.
    ///
    /// # Errors
    /// `Precondition` if this sandbox lacks a requested feature; `Invalid` if the user is not valid.
    pub(crate) fn kind(&self, asked: &[(String, String)]) -> Result<CellKind> {
        let mut kind = self.settings.kind();
        if platform::wants_input_root_as_root(asked) {
            if !self.protections.namespaces {
                return Err(Error::Precondition(
                    "the action asks for its input root as its root file system (rootfs), which requires the namespaces of the \
                     sandbox; they are off on this server"
                        .into(),
                ));
            }
            kind.root = Some(RootFs::InputRoot(InputsAsRoot {}));
        }
        let (user, group) = platform::wanted_user(asked).map_err(Error::Invalid)?;
        if self.protections.namespaces && (user.is_some() || group.is_some()) {
            let usual = kind.user();
            let (user, group) = (user.unwrap_or(usual.user), group.unwrap_or(usual.group));
            kind.user = Some(InnerUser { user, group });
        }
        // Without network namespaces, every action has the network of the host.
        if self.protections.network && platform::wants_network(asked) {
            if self.settings.network == CellNetwork::On && self.pasta.is_none() {
                return Err(Error::Precondition(
                    "the action asks for a network (network=on), and this machine cannot give it one; the server logged the \
                     reason when it started"
                        .into(),
                ));
            }
            kind.network = self.settings.network.into();
        }
        Ok(kind)
    }
}
