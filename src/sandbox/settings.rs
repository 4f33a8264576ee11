//! [`Sandbox`]: what a server tells its runners about the sandbox, as a message to them.

use super::view::{Fresh, Wanted};
use prost::Message;
use std::{
    ffi::OsString,
    os::unix::ffi::{OsStrExt as _, OsStringExt as _},
    path::{Path, PathBuf},
};

/// Whether a protection that is missing keeps the server from starting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SandboxMode {
    /// What the kernel allows is on.
    Auto,
    /// The server starts only with all protections.
    Required,
    /// There is no sandbox.
    Off,
}

/// The checked `[execution.sandbox]` section.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxSettings {
    /// Whether there is a sandbox.
    pub mode: SandboxMode,
    /// Paths of the host that are visible in addition to the built-in ones.
    pub visible: Vec<PathBuf>,
    /// Paths of the host that are hidden; the server's own are among them.
    pub hidden: Vec<PathBuf>,
    /// Paths of the host that actions can change.
    pub writable: Vec<PathBuf>,
    /// Size of the private /tmp in bytes.
    pub tmp_bytes: u64,
    /// Most files in the private /tmp.
    pub tmp_files: u64,
    /// Size of the private /dev/shm in bytes.
    pub shm_bytes: u64,
    /// Most processes and threads of one action at a time.
    pub processes: u64,
    /// The first user of the slots of a root server.
    pub first_user: u32,
}

/// The sandbox of one runner.
#[derive(Clone, PartialEq, Message)]
pub struct Sandbox {
    /// What is on.
    #[prost(message, required, tag = "1")]
    pub protections: Protections,
    /// More of the host that is visible.
    #[prost(bytes = "vec", repeated, tag = "2")]
    pub visible: Vec<Vec<u8>>,
    /// What is hidden.
    #[prost(bytes = "vec", repeated, tag = "3")]
    pub hidden: Vec<Vec<u8>>,
    /// What can be changed.
    #[prost(bytes = "vec", repeated, tag = "4")]
    pub writable: Vec<Vec<u8>>,
    /// Size of /tmp.
    #[prost(uint64, tag = "5")]
    pub tmp_bytes: u64,
    /// Most files in /tmp.
    #[prost(uint64, tag = "6")]
    pub tmp_files: u64,
    /// Size of /dev/shm.
    #[prost(uint64, tag = "7")]
    pub shm_bytes: u64,
    /// Most processes and threads.
    #[prost(uint64, tag = "8")]
    pub processes: u64,
    /// The user and group of the host that actions are, where `protections.identity` is on.
    #[prost(uint32, tag = "9")]
    pub user: u32,
    /// Where exec directories are.
    #[prost(bytes = "vec", tag = "10")]
    pub build_root: Vec<u8>,
}

/// Which protections are on.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Protections {
    /// Own mounts, processes, IPC and names.
    #[prost(bool, tag = "1")]
    pub namespaces: bool,
    /// An own network. Needs `namespaces`.
    #[prost(bool, tag = "2")]
    pub network: bool,
    /// A user of the host for each slot. Needs `namespaces`, and a server that is root.
    #[prost(bool, tag = "3")]
    pub identity: bool,
    /// The filter of system calls.
    #[prost(bool, tag = "4")]
    pub filter: bool,
    /// Landlock.
    #[prost(bool, tag = "5")]
    pub landlock: bool,
}

impl Sandbox {
    /// The message for these settings; `user` is the user of the slot.
    pub(crate) fn new(
        settings: &SandboxSettings,
        protections: Protections,
        build_root: &Path,
        user: u32,
    ) -> Self {
        let bytes =
            |paths: &[PathBuf]| paths.iter().map(|path| path.as_os_str().as_bytes().to_vec()).collect();
        Self {
            protections,
            visible: bytes(&settings.visible),
            hidden: bytes(&settings.hidden),
            writable: bytes(&settings.writable),
            tmp_bytes: settings.tmp_bytes,
            tmp_files: settings.tmp_files,
            shm_bytes: settings.shm_bytes,
            processes: settings.processes,
            user,
            build_root: build_root.as_os_str().as_bytes().to_vec(),
        }
    }

    pub(crate) fn build_root(&self) -> PathBuf {
        OsString::from_vec(self.build_root.clone()).into()
    }

    pub(crate) fn wanted(&self) -> Wanted {
        let paths =
            |bytes: &[Vec<u8>]| bytes.iter().map(|path| OsString::from_vec(path.clone()).into()).collect();
        Wanted { visible: paths(&self.visible), hidden: paths(&self.hidden), writable: paths(&self.writable) }
    }

    pub(crate) fn fresh(&self) -> Fresh {
        Fresh { tmp_bytes: self.tmp_bytes, tmp_files: self.tmp_files, shm_bytes: self.shm_bytes }
    }
}

impl SandboxSettings {
    /// What of this would be visible.
    pub(crate) fn shows(&self, path: &Path) -> bool {
        let wanted = Wanted {
            visible: self.visible.clone(),
            hidden: self.hidden.clone(),
            writable: self.writable.clone(),
        };
        super::view::shows(&wanted, path)
    }
}
