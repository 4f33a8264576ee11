//! [`CellKind`]: the requirements of a command that must be known before its cell starts.

use super::identity::{self, InnerUser};
use prost::Message;
use std::{
    ffi::OsStr,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

/// The kind of cell that a command needs. The default has the files of the host and no network.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct CellKind {
    /// The root file system; `None` for the files of the host.
    #[prost(oneof = "RootFs", tags = "1, 2")]
    pub root: Option<RootFs>,
    /// User and group of the command as it sees itself; [`identity::INNER`] if this is missing. It has no effect
    /// outside of the cell.
    #[prost(message, optional, tag = "3")]
    pub user: Option<InnerUser>,
    /// The network of the command.
    #[prost(enumeration = "CellNetwork", tag = "4")]
    pub network: i32,
}

/// The network of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, prost::Enumeration)]
pub enum CellNetwork {
    /// A loopback interface of its own, and nothing else.
    Off = 0,
    /// A separate network that reaches other machines but not the host ([`super::network`]).
    On = 1,
    /// The whole network of the host.
    Host = 2,
}

/// The root file system that a command finds instead of the host's. The sandbox adds /dev, /proc and /tmp. Unless the
/// root file system is the input root, it also adds the input root at /build and the files with names of users and
/// hosts.
#[derive(Clone, PartialEq, Eq, prost::Oneof)]
pub enum RootFs {
    /// The files below this absolute path, read-only. They must not change while a command runs: a new version must be
    /// a new directory, which may have the same path.
    #[prost(bytes, tag = "1")]
    Directory(Vec<u8>),
    /// The files of the input root, which is mounted at / instead of /build.
    #[prost(message, tag = "2")]
    InputRoot(InputsAsRoot),
}

/// Marks the input root of the action, of which there is exactly one.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct InputsAsRoot {}

impl CellKind {
    /// User and group of the command inside of the cell.
    pub fn user(&self) -> InnerUser {
        self.user.unwrap_or(InnerUser { user: identity::INNER, group: identity::INNER })
    }

    /// Whether the input root is the root directory.
    pub fn has_input_root_as_root(&self) -> bool {
        matches!(self.root, Some(RootFs::InputRoot(_)))
    }

    /// The directory whose files replace the host's, if any.
    pub(crate) fn root_directory(&self) -> Option<PathBuf> {
        match &self.root {
            Some(RootFs::Directory(path)) => Some(OsStr::from_bytes(path).into()),
            Some(RootFs::InputRoot(_)) | None => None,
        }
    }
}

impl RootFs {
    /// The root file system with the files below an absolute path.
    pub fn directory(path: &Path) -> Self {
        Self::Directory(path.as_os_str().as_bytes().to_vec())
    }

    /// The same root file system with symbolic links in its path resolved.
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
