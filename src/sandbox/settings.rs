//! [`Sandbox`]: the message in which a server tells a runner how to set up the sandbox.

use super::{
    kind::{CellKind, CellNetwork, RootFs},
    view::{ConfiguredPaths, PrivateMounts},
};
use prost::Message;
use std::{
    ffi::{OsStr, OsString},
    os::unix::ffi::{OsStrExt as _, OsStringExt as _},
    path::{Path, PathBuf},
};

/// What the server does if a protection does not work on this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SandboxMode {
    /// Missing protections are left out, and the other protections are on.
    Auto,
    /// The server starts only if all protections work.
    Required,
    /// There is no sandbox.
    Off,
}

/// The checked `[execution.sandbox]` section.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxSettings {
    /// What the server does if a protection is missing, or whether there is a sandbox at all.
    pub mode: SandboxMode,
    /// Paths of the host that are visible in addition to the built-in ones.
    pub visible: Vec<PathBuf>,
    /// Paths of the host that are hidden, including the server's own paths.
    pub hidden: Vec<PathBuf>,
    /// Paths of the host that actions can change.
    pub writable: Vec<PathBuf>,
    /// Size of the private /tmp in bytes.
    pub tmp_bytes: u64,
    /// Maximum number of files in the private /tmp.
    pub tmp_files: u64,
    /// Size of the private /dev/shm in bytes.
    pub shm_bytes: u64,
    /// Maximum number of processes and threads of one action at a time.
    pub processes: u64,
    /// The host user of the first slot of a root server.
    pub first_user: u32,
    /// Paths of the server itself, such as its store, which no action may see.
    pub own: Vec<PathBuf>,
    /// The root file system of actions; `None` for the host's files.
    pub root: Option<RootFs>,
    /// The network of an action that asks for one.
    pub network: CellNetwork,
}

/// The sandbox of one runner.
#[derive(Clone, PartialEq, Message)]
pub struct Sandbox {
    /// The protections that are on.
    #[prost(message, required, tag = "1")]
    pub protections: Protections,
    /// Paths of the host that are visible in addition to the built-in ones.
    #[prost(bytes = "vec", repeated, tag = "2")]
    pub visible: Vec<Vec<u8>>,
    /// Paths of the host that are hidden.
    #[prost(bytes = "vec", repeated, tag = "3")]
    pub hidden: Vec<Vec<u8>>,
    /// Paths of the host that actions can change.
    #[prost(bytes = "vec", repeated, tag = "4")]
    pub writable: Vec<Vec<u8>>,
    /// Size of /tmp in bytes.
    #[prost(uint64, tag = "5")]
    pub tmp_bytes: u64,
    /// Maximum number of files in /tmp.
    #[prost(uint64, tag = "6")]
    pub tmp_files: u64,
    /// Size of /dev/shm in bytes.
    #[prost(uint64, tag = "7")]
    pub shm_bytes: u64,
    /// Maximum number of processes and threads.
    #[prost(uint64, tag = "8")]
    pub processes: u64,
    /// The host user and group of the actions if `protections.identity` is on.
    #[prost(uint32, tag = "9")]
    pub user: u32,
    /// The directory that contains the exec directories.
    #[prost(bytes = "vec", tag = "10")]
    pub build_root: Vec<u8>,
    /// The kind of cell that is likely to be needed first.
    #[prost(message, optional, tag = "11")]
    pub first: Option<CellKind>,
    /// The program behind the networks of cells, if it works.
    #[prost(message, optional, tag = "12")]
    pub pasta: Option<Pasta>,
}

/// The program that gives a cell a network of its own: pasta.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Pasta {
    /// Path of the program.
    #[prost(bytes = "vec", tag = "1")]
    pub path: Vec<u8>,
}

/// The protections that are on.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Protections {
    /// Separate mount, pid, IPC and UTS namespaces.
    #[prost(bool, tag = "1")]
    pub namespaces: bool,
    /// A separate network namespace. Needs `namespaces`.
    #[prost(bool, tag = "2")]
    pub network: bool,
    /// A host user for each slot. Needs `namespaces` and a server that is root.
    #[prost(bool, tag = "3")]
    pub identity: bool,
    /// The filter of system calls.
    #[prost(bool, tag = "4")]
    pub filter: bool,
    /// Landlock rules, which protect files in addition to the mounts.
    #[prost(bool, tag = "5")]
    pub landlock: bool,
    /// Networks of their own for actions that may use one. Needs `network`.
    #[prost(bool, tag = "6")]
    pub gateway: bool,
}

impl Protections {
    /// Whether the kernel limits the number of processes of an action by its user. It has no limit for root.
    pub(crate) fn limit_processes(&self) -> bool {
        self.namespaces && (self.identity || !rustix::process::geteuid().is_root())
    }
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
            first: Some(settings.kind()),
            pasta: None,
        }
    }

    pub(crate) fn build_root(&self) -> PathBuf {
        OsString::from_vec(self.build_root.clone()).into()
    }

    pub(crate) fn configured_paths(&self) -> ConfiguredPaths {
        let paths =
            |bytes: &[Vec<u8>]| bytes.iter().map(|path| OsString::from_vec(path.clone()).into()).collect();
        ConfiguredPaths {
            visible: paths(&self.visible),
            hidden: paths(&self.hidden),
            writable: paths(&self.writable),
        }
    }

    pub(crate) fn private_mounts(&self) -> PrivateMounts {
        PrivateMounts { tmp_bytes: self.tmp_bytes, tmp_files: self.tmp_files, shm_bytes: self.shm_bytes }
    }
}

impl SandboxSettings {
    /// The kind of cell for actions without special requirements.
    pub(crate) fn kind(&self) -> CellKind {
        CellKind { root: self.root.clone(), ..CellKind::default() }
    }

    /// Whether a path of the host would be visible to actions.
    pub(crate) fn shows(&self, path: &Path) -> bool {
        let wanted = ConfiguredPaths {
            visible: self.visible.clone(),
            hidden: self.hidden.clone(),
            writable: self.writable.clone(),
        };
        super::view::shows(&wanted, path)
    }

    /// Whether these settings differ from `other` only in the paths of the server itself.
    pub(crate) fn is_same_for_actions(&self, other: &Self) -> bool {
        let without_own = |settings: &Self| {
            let is_own = |path: &PathBuf| settings.own.contains(path);
            let hidden = settings.hidden.iter().filter(|path| !is_own(path)).cloned().collect();
            Self { own: Vec::new(), hidden, ..settings.clone() }
        };
        without_own(self) == without_own(other)
    }

    /// Whether actions with these settings could see a file that becomes the server's own, itself or through links.
    /// This resolves paths in the file system.
    pub(crate) fn exposes(&self, path: &Path) -> bool {
        let mut alone = Self { own: vec![path.to_owned()], ..self.clone() };
        !self.own.iter().any(|own| own == path) && (self.shows(path) || !alone.hide_linked().is_empty())
    }

    /// Also hides the server's own files at other paths that lead to them through symbolic links. Returns the
    /// additional hidden paths. This resolves paths in the file system, so the server's files must exist already.
    pub(crate) fn hide_linked(&mut self) -> Vec<PathBuf> {
        let mut added = Vec::new();
        for own in self.own.iter().filter_map(|own| own.canonicalize().ok()) {
            let shown = self.visible.iter().chain(&self.writable);
            let seen_as = shown.filter_map(|shown| {
                let below = own.strip_prefix(shown.canonicalize().ok()?).ok()?;
                Some(shown.join(below))
            });
            let seen: Vec<_> = seen_as.chain([own.clone()]).filter(|path| self.shows(path)).collect();
            for path in seen {
                if !self.hidden.contains(&path) {
                    self.hidden.push(path.clone());
                    added.push(path);
                }
            }
        }
        added
    }

    /// Returns a path of the server itself that lies in this root file system, if there is one.
    pub(crate) fn own_below(&self, root: &RootFs) -> Option<&Path> {
        let RootFs::Directory(root) = root else { return None };
        let root = Path::new(OsStr::from_bytes(root)).canonicalize().ok()?;
        let is_below = |own: &&PathBuf| own.canonicalize().is_ok_and(|own| own.starts_with(&root));
        self.own.iter().find(is_below).map(PathBuf::as_path)
    }

    /// These settings without configured paths and with the host's root file system.
    pub(crate) fn without_paths(&self) -> Self {
        Self { visible: Vec::new(), hidden: Vec::new(), writable: Vec::new(), root: None, ..self.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::symlink};

    #[test]
    fn a_store_that_links_lead_to_is_hidden() {
        let directory = tempfile::tempdir().unwrap();
        let host = directory.path().canonicalize().unwrap();
        fs::create_dir_all(host.join("real/store")).unwrap();
        symlink("real", host.join("link")).unwrap();
        let hidden = |visible: &str, own: &str| {
            let mut settings = SandboxSettings {
                mode: SandboxMode::Auto,
                visible: vec![host.join(visible)],
                hidden: Vec::new(),
                writable: Vec::new(),
                tmp_bytes: 0,
                tmp_files: 0,
                shm_bytes: 0,
                processes: 1,
                first_user: 1,
                own: vec![host.join(own)],
                root: None,
                network: CellNetwork::Off,
            };
            let added = settings.hide_linked();
            assert_eq!(settings.hidden, added);
            added
        };
        assert_eq!(hidden("real", "link/store"), [host.join("real/store")]);
        assert_eq!(hidden("link", "real/store"), [host.join("link/store")]);
        assert_eq!(hidden("link/..", "real/store").len(), 1);
        assert!(hidden("real/other", "link/store").is_empty());
    }
}
