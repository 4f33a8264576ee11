//! [`CellKind`]: what a command asks of its cell that has to be settled before the cell starts.

use super::identity;
use prost::Message;
use std::{
    ffi::OsStr,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

/// What kind of cell a command needs. The default is one with the files of the host and without a network.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct CellKind {
    /// The files of the root directory; those of the host if there is none.
    #[prost(oneof = "RootFs", tags = "1, 2")]
    pub root: Option<RootFs>,
    /// Who the command is, as it sees itself; [`identity::INNER`] if this is missing. Outside this changes nothing.
    #[prost(message, optional, tag = "3")]
    pub user: Option<InnerUser>,
    /// The command shares the whole network of the host.
    #[prost(bool, tag = "4")]
    pub shares_network: bool,
}

/// The files that a command finds instead of the host's. The sandbox adds /dev, /proc, /tmp and, but to an input root, the input
/// root at /build and the names of users and hosts.
#[derive(Clone, PartialEq, Eq, prost::Oneof)]
pub enum RootFs {
    /// Those below an absolute path. They can only be read. Nothing may change there while a command runs: a new version needs
    /// another directory, which may have the same path.
    #[prost(bytes, tag = "1")]
    Directory(Vec<u8>),
    /// Those of the input root, which is mounted at / instead of /build.
    #[prost(message, tag = "2")]
    InputRoot(InputsAsRoot),
}

/// The one input root that an action has.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct InputsAsRoot {}

/// Numbers of a user and a group inside of a cell.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct InnerUser {
    /// The user.
    #[prost(uint32, tag = "1")]
    pub user: u32,
    /// The group.
    #[prost(uint32, tag = "2")]
    pub group: u32,
}

impl CellKind {
    /// Who the command is.
    pub fn user(&self) -> InnerUser {
        self.user.unwrap_or(InnerUser { user: identity::INNER, group: identity::INNER })
    }

    /// Whether the input root is the root directory.
    pub fn has_input_root_as_root(&self) -> bool {
        matches!(self.root, Some(RootFs::InputRoot(_)))
    }

    /// The directory whose files replace the host's.
    pub(crate) fn root_directory(&self) -> Option<PathBuf> {
        match &self.root {
            Some(RootFs::Directory(path)) => Some(OsStr::from_bytes(path).into()),
            Some(RootFs::InputRoot(_)) | None => None,
        }
    }
}

impl RootFs {
    /// The files below an absolute path.
    pub fn directory(path: &Path) -> Self {
        Self::Directory(path.as_os_str().as_bytes().to_vec())
    }

    /// The same without symbolic links in its path.
    pub(crate) fn resolved(&self) -> Self {
        match self {
            Self::Directory(path) => {
                let path = Path::new(OsStr::from_bytes(path));
                Self::directory(&path.canonicalize().unwrap_or_else(|_| path.into()))
            }
            Self::InputRoot(_) => self.clone(),
        }
    }
}
