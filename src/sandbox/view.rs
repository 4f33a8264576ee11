//! The file system that an action sees, as a list of pieces in the order in which they are mounted. Pure. The host is
//! queried through [`Host`].
//!
//! The list of visible paths is an allow list: paths that it does not name do not exist for an action. Everything of
//! the host is read-only, except for the paths that the configuration makes writable.

mod paths;
mod proc;
#[cfg(test)]
mod tests;

use super::{
    EXEC_ROOT, identity,
    kind::{CellKind, CellNetwork},
};
use paths::{CPUS, DEVICE_LINKS, DEVICES, matching};
pub(crate) use paths::{ConfiguredPaths, HOST, RESOLVERS, problem, shows};
pub(crate) use proc::{ProcPlan, proc_plan};
use std::path::{Path, PathBuf};

/// A view as an ordered list of pieces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ViewPlan {
    /// Directories, links and files of the sandbox itself. They lie over a root file system other than the host's,
    /// which is not changed.
    pub base: Vec<ViewPiece>,
    /// Mounts, and symbolic links inside of them.
    pub rest: Vec<ViewPiece>,
}

/// One piece of a view. Later pieces lie on top of earlier ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ViewPiece {
    /// An empty directory. Missing parent directories are created.
    Directory(PathBuf),
    /// A small file system of the sandbox, which becomes read-only when the view is complete.
    Own(PathBuf),
    /// A symbolic link that the sandbox makes.
    Link {
        /// Path of the link.
        at: PathBuf,
        /// Target of the link.
        target: PathBuf,
    },
    /// A small read-only file.
    File {
        /// Path of the file.
        at: PathBuf,
        /// The content of the file.
        text: String,
    },
    /// A file or directory of the host, with everything mounted below it.
    Host {
        /// Path on the host.
        from: PathBuf,
        /// Path in the view.
        at: PathBuf,
        /// Whether it is a directory.
        is_directory: bool,
        /// How an action may use it.
        access: Access,
    },
    /// A copy of a file of the host at its own path. A copy costs each action less than a mount does. A large file is
    /// mounted instead.
    Copy(PathBuf),
    /// An empty file or directory that covers whatever is at this path.
    Hidden(PathBuf),
}

/// How an action may use a file or directory of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// It can be read; programs can be run.
    Read,
    /// It can also be changed.
    Write,
    /// It is a device: it can be read and written, but its owner, mode and times cannot be changed.
    Device,
}

/// File systems that are mounted anew in each cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PrivateMounts {
    /// Size of /tmp in bytes.
    pub tmp_bytes: u64,
    /// Maximum number of files and directories in /tmp.
    pub tmp_files: u64,
    /// Size of /dev/shm in bytes.
    pub shm_bytes: u64,
}

/// The kind of file at a path of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    Directory,
    /// A symbolic link with this target.
    Link(PathBuf),
    /// Any other kind of file.
    Other,
}

/// The host's file system.
pub(crate) trait Host {
    /// The kind of file at a path, without following a symbolic link; `None` if there is none.
    fn kind(&self, path: &Path) -> Option<Kind>;
    /// The names in a directory; empty if it cannot be read.
    fn names(&self, path: &Path) -> Vec<String>;
    /// The path with all symbolic links resolved; `None` if it does not exist.
    fn real(&self, path: &Path) -> Option<PathBuf>;
    /// The permission bits of a path; `None` if it does not exist.
    fn permissions(&self, path: &Path) -> Option<u32>;
}

/// Plans the view of actions that need this kind of cell. `existing` reads files of a root file system other than the
/// host's. `resolvers` is the content of resolv.conf in a network of the cell's own.
pub(crate) fn view(
    kind: &CellKind,
    wanted: &ConfiguredPaths,
    host: &dyn Host,
    existing: impl Fn(&str) -> Option<String>,
    resolvers: Option<String>,
) -> ViewPlan {
    let mut base: Vec<_> = ["/proc", "/tmp", "/var", "/run", "/etc", "/dev", EXEC_ROOT]
        .map(|path| ViewPiece::Directory(path.into()))
        .into();
    let names = identity::files(kind.user(), existing);
    base.extend(names.into_iter().map(|(at, text)| ViewPiece::File { at: at.into(), text }));
    base.push(link("/var/tmp", "../tmp"));
    base.push(link("/etc/mtab", "../proc/self/mounts"));
    let mut rest = devices();
    if kind.root.is_none() {
        rest.extend(host_pieces(wanted, host));
    } else if kind.root_directory().is_some() && host.kind(Path::new(CPUS)).is_some() {
        base.push(ViewPiece::Directory(CPUS.into()));
        rest.push(ViewPiece::shown(Path::new(CPUS), true, Access::Read));
    }
    match kind.network() {
        CellNetwork::Off => {}
        CellNetwork::On => {
            base.extend(resolvers.map(|text| ViewPiece::File { at: RESOLVERS.into(), text }));
        }
        CellNetwork::Host => {
            if let Some(from) = host.real(Path::new(RESOLVERS)) {
                base.push(ViewPiece::File { at: RESOLVERS.into(), text: String::new() });
                let (at, access) = (RESOLVERS.into(), Access::Read);
                rest.push(ViewPiece::Host { from, at, is_directory: false, access });
            }
        }
    }
    ViewPlan { base, rest }
}

/// The pieces below /dev.
fn devices() -> Vec<ViewPiece> {
    let mut pieces = vec![ViewPiece::Own("/dev".into())];
    pieces.extend(["/dev/shm", "/dev/pts"].map(|path| ViewPiece::Directory(path.into())));
    pieces.extend(DEVICE_LINKS.iter().map(|(at, target)| link(at, target)));
    pieces.extend(
        DEVICES.iter().map(|device| ViewPiece::shown(&Path::new("/dev").join(device), false, Access::Device)),
    );
    pieces
}

/// The pieces that come from the host when actions use the host's root file system.
fn host_pieces(wanted: &ConfiguredPaths, host: &dyn Host) -> Vec<ViewPiece> {
    let mut pieces = Vec::new();
    let built_in = HOST.iter().flat_map(|pattern| matching(pattern, host));
    let mut paths: Vec<_> = built_in.chain(wanted.visible.iter().cloned()).collect();
    // Parents come first, so that paths in a visible directory are not mounted again.
    paths.sort();
    paths.dedup();
    let mut directories: Vec<PathBuf> = Vec::new();
    for at in paths {
        if directories.iter().any(|above| at.starts_with(above)) {
            continue;
        }
        match host.kind(&at) {
            Some(Kind::Link(target)) => pieces.push(ViewPiece::Link { at, target }),
            Some(Kind::Directory) => {
                pieces.push(ViewPiece::shown(&at, true, Access::Read));
                directories.push(at);
            }
            // A configured path may be anything, such as a socket.
            Some(Kind::Other) if wanted.visible.contains(&at) => {
                pieces.push(ViewPiece::shown(&at, false, Access::Read));
            }
            Some(Kind::Other) => pieces.push(ViewPiece::Copy(at)),
            None => {}
        }
    }
    for at in &wanted.writable {
        let is_directory = host.kind(at) == Some(Kind::Directory);
        pieces.push(ViewPiece::shown(at, is_directory, Access::Write));
    }
    // Hidden paths come last, so that they are hidden in writable directories too.
    pieces.extend(wanted.hidden.iter().cloned().map(ViewPiece::Hidden));
    pieces
}

impl ViewPiece {
    /// A path of the host at the same path in the view.
    fn shown(at: &Path, is_directory: bool, access: Access) -> Self {
        Self::Host { from: at.into(), at: at.into(), is_directory, access }
    }
}

fn link(at: &str, target: &str) -> ViewPiece {
    ViewPiece::Link { at: at.into(), target: target.into() }
}
