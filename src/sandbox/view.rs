//! The file system that an action sees, as a list of pieces in the order in which they are mounted. Pure: the host is
//! queried through [`Host`].
//!
//! The list of visible paths is an allow list: paths that it does not name do not exist for an action. Everything of
//! the host is read-only, except for the paths that the configuration makes writable.

use super::{
    EXEC_ROOT, identity,
    kind::{CellKind, CellNetwork},
};
use std::path::{Component, Path, PathBuf};

/// Paths of the host that every action may see: programs, libraries, and the files below /etc that compilers, language
/// runtimes and the C library read. A `*` in the last component matches any text. Files with keys, passwords or names
/// of users must not be added.
pub(crate) const HOST: &[&str] = &[
    "/usr",
    "/bin",
    "/sbin",
    "/lib*",
    "/opt",
    "/sys/devices/system/cpu",
    "/etc/alternatives",
    "/etc/ca-certificates",
    "/etc/ca-certificates.conf",
    "/etc/crypto-policies",
    "/etc/debian_version",
    "/etc/fonts",
    "/etc/gcrypt",
    "/etc/groff",
    "/etc/inputrc",
    "/etc/java*",
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d",
    "/etc/locale.alias",
    "/etc/locale.conf",
    "/etc/localtime",
    "/etc/lsb-release",
    "/etc/magic*",
    "/etc/mime.types",
    "/etc/os-release",
    "/etc/perl",
    "/etc/pki/ca-trust",
    "/etc/pki/java",
    "/etc/pki/tls/certs",
    "/etc/protocols",
    "/etc/python*",
    "/etc/redhat-release",
    "/etc/services",
    "/etc/sgml",
    "/etc/ssl/certs",
    "/etc/ssl/openssl.cnf",
    "/etc/terminfo",
    "/etc/timezone",
    "/etc/xml",
];

/// Devices of the host that are visible below /dev.
const DEVICES: &[&str] = &["null", "zero", "full", "random", "urandom", "tty"];

/// Symbolic links below /dev.
const DEVICE_LINKS: &[(&str, &str)] = &[
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
    ("/dev/ptmx", "pts/ptmx"),
];

/// Files of /proc that are hidden because they reveal more about the kernel than an action needs. Only root can read
/// most of them, but without a separate user for each slot an action of a root server is root of the host, though
/// without capabilities.
const HIDDEN_PROC_FILES: &[&str] = &[
    "/proc/kcore",
    "/proc/keys",
    "/proc/key-users",
    "/proc/kallsyms",
    "/proc/timer_list",
    "/proc/sysrq-trigger",
    "/proc/sched_debug",
    "/proc/latency_stats",
    "/proc/kmsg",
    "/proc/kpagecgroup",
    "/proc/kpagecount",
    "/proc/kpageflags",
    "/proc/mtrr",
    "/proc/pagetypeinfo",
    "/proc/slabinfo",
    "/proc/vmallocinfo",
    "/proc/vmcore",
];

/// Settings of the kernel and of devices, which are made read-only.
const READ_ONLY_PROC_FILES: &[&str] = &[
    "/proc/sys",
    "/proc/irq",
    "/proc/bus",
    "/proc/fs",
    "/proc/acpi",
    "/proc/asound",
    "/proc/driver",
    "/proc/dynamic_debug",
    "/proc/scsi",
];

/// Paths with files of the sandbox itself. The configuration cannot place files of the host there.
const OWN: &[&str] = &["/proc", "/dev", EXEC_ROOT, "/var/tmp"];
/// A path with files of the sandbox itself, below which the configuration can place directories of the host.
const TMP: &str = "/tmp";

/// The file that names the DNS servers.
pub(crate) const RESOLVERS: &str = "/etc/resolv.conf";
/// The part of the host's /sys that every root file system gets.
const CPUS: &str = "/sys/devices/system/cpu";

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
    /// A symbolic link.
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
        /// Its content.
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
pub(crate) struct Fresh {
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
    /// A directory.
    Directory,
    /// A symbolic link with this target.
    Link(PathBuf),
    /// Anything else.
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

/// The configured paths.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// Paths that are visible in addition to [`HOST`].
    pub visible: Vec<PathBuf>,
    /// Paths that are hidden although a directory above them is visible.
    pub hidden: Vec<PathBuf>,
    /// Paths that are visible and can be changed.
    pub writable: Vec<PathBuf>,
}

impl Wanted {
    /// The configured directories that must be shown in the private /tmp of each action.
    pub(crate) fn below_tmp(&self) -> impl Iterator<Item = &Path> {
        let all = self.visible.iter().chain(&self.writable).map(PathBuf::as_path);
        all.filter(|path| path.starts_with(TMP))
    }
}

/// Plans the view of actions that need this kind of cell. `existing` reads files of a root file system other than the
/// host's. `resolvers` is the content of resolv.conf in a network of the cell's own.
pub(crate) fn view(
    kind: &CellKind,
    wanted: &Wanted,
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
fn host_pieces(wanted: &Wanted, host: &dyn Host) -> Vec<ViewPiece> {
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

/// Changes to a freshly mounted /proc.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ProcPlan {
    /// Paths to hide.
    pub hidden: Vec<&'static str>,
    /// Paths to make read-only.
    pub fixed: Vec<&'static str>,
}

/// Plans the changes to a fresh /proc. `is_root` means that actions are root of the host. All files there belong to
/// root, so those that only root may read need not be hidden from another user.
pub(crate) fn proc_plan(host: &dyn Host, is_root: bool) -> ProcPlan {
    const GROUP_AND_OTHERS: u32 = 0o077;
    let is_reachable = |path: &&&str| {
        host.permissions(Path::new(path))
            .is_some_and(|permissions| is_root || permissions & GROUP_AND_OTHERS != 0)
    };
    let exists = |path: &&&str| host.permissions(Path::new(path)).is_some();
    ProcPlan {
        hidden: HIDDEN_PROC_FILES.iter().filter(is_reachable).copied().collect(),
        fixed: READ_ONLY_PROC_FILES.iter().filter(exists).copied().collect(),
    }
}

/// Whether a path is visible to actions, by itself or as part of a visible directory.
pub(crate) fn shows(wanted: &Wanted, path: &Path) -> bool {
    let hides = |hidden: &PathBuf| path.starts_with(hidden);
    let matches = |pattern: &&str| match pattern.split_once('*') {
        // Of the patterns, only `/lib*` can match a path of the server. It has one component, so comparing the prefix
        // is enough.
        Some((start, _)) => path.to_string_lossy().starts_with(start),
        None => path.starts_with(pattern),
    };
    let is_shown = HOST.iter().any(matches)
        || wanted.visible.iter().chain(&wanted.writable).any(|shown| path.starts_with(shown));
    is_shown && !wanted.hidden.iter().any(hides)
}

/// Why this path cannot be configured as visible, hidden or writable; `None` if it can.
pub(crate) fn problem(path: &Path) -> Option<&'static str> {
    let is_plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if !path.is_absolute() || !is_plain {
        return Some("is not an absolute path without \"..\"");
    }
    if path == Path::new("/") {
        return Some("is the whole machine; name the directories that actions need");
    }
    if OWN.iter().any(|own| path.starts_with(own)) || path == Path::new(TMP) {
        return Some(
            "lies where the sandbox has files of its own (/proc, /dev, /tmp itself, /var/tmp, /build)",
        );
    }
    None
}

fn link(at: &str, target: &str) -> ViewPiece {
    ViewPiece::Link { at: at.into(), target: target.into() }
}

/// The paths of the host that match a pattern.
fn matching(pattern: &str, host: &dyn Host) -> Vec<PathBuf> {
    let Some((start, end)) = pattern.split_once('*') else { return vec![pattern.into()] };
    let (parent, prefix) = start.rsplit_once('/').unwrap_or(("", start));
    let parent = Path::new("/").join(parent.trim_start_matches('/'));
    let mut names = host.names(&parent);
    names.retain(|name| {
        name.len() >= prefix.len() + end.len() && name.starts_with(prefix) && name.ends_with(end)
    });
    names.into_iter().map(|name| parent.join(name)).collect()
}

#[cfg(test)]
mod tests {
    use super::{super::kind::RootFs, *};
    use std::collections::BTreeMap;

    struct Fake(BTreeMap<PathBuf, Kind>);

    impl Host for Fake {
        fn kind(&self, path: &Path) -> Option<Kind> {
            self.0.get(path).cloned()
        }

        fn names(&self, path: &Path) -> Vec<String> {
            let inside = self.0.keys().filter(|entry| entry.parent() == Some(path));
            inside.filter_map(|entry| Some(entry.file_name()?.to_str()?.to_owned())).collect()
        }

        fn real(&self, path: &Path) -> Option<PathBuf> {
            match self.0.get(path)? {
                Kind::Link(target) => Some(target.clone()),
                _ => Some(path.into()),
            }
        }

        fn permissions(&self, path: &Path) -> Option<u32> {
            match path.to_str()? {
                "/proc/keys" | "/proc/sys" => Some(0o444),
                "/proc/kmsg" | "/proc/irq" => Some(0o400),
                _ => None,
            }
        }
    }

    fn pieces(kind: &CellKind, wanted: &Wanted) -> Vec<ViewPiece> {
        let ViewPlan { mut base, rest } =
            view(kind, wanted, &host(), |_| None, Some("nameserver 203.0.113.53\n".into()));
        base.extend(rest);
        base
    }

    fn host() -> Fake {
        let directories = [
            "/sys/devices/system/cpu",
            "/usr",
            "/opt",
            "/opt/tool",
            "/etc",
            "/etc/java-17-openjdk",
            "/etc/ssl",
            "/etc/ssl/certs",
        ];
        let files = ["/etc/shadow", "/etc/passwd", "/etc/ld.so.cache", "/opt/secret", "/etc/ssl/private"];
        let links = [
            ("/bin", "usr/bin"),
            ("/lib64", "usr/lib64"),
            ("/etc/localtime", "/usr/share/zoneinfo/UTC"),
            ("/etc/resolv.conf", "/run/resolv.conf"),
        ];
        let mut all = BTreeMap::new();
        all.extend(directories.map(|path| (path.into(), Kind::Directory)));
        all.extend(files.map(|path| (path.into(), Kind::Other)));
        all.extend(links.map(|(path, target)| (path.into(), Kind::Link(target.into()))));
        Fake(all)
    }

    fn from_host(pieces: &[ViewPiece]) -> Vec<(&str, Access)> {
        let host = |piece: &ViewPiece| match piece {
            ViewPiece::Host { at, access, .. } => Some((at.to_str()?.to_owned(), *access)),
            _ => None,
        };
        let all: Vec<_> =
            pieces.iter().filter_map(host).filter(|(_, access)| *access != Access::Device).collect();
        all.into_iter().map(|(at, access)| (&*at.leak(), access)).collect()
    }

    #[test]
    fn only_listed_paths_are_visible_and_they_are_read_only() {
        let pieces = pieces(&CellKind::default(), &Wanted::default());
        let read = ["/etc/java-17-openjdk", "/etc/ssl/certs", "/opt", CPUS, "/usr"];
        assert_eq!(from_host(&pieces), read.map(|path| (path, Access::Read)));
        let copies = pieces.iter().filter(|piece| matches!(piece, ViewPiece::Copy(_)));
        assert_eq!(copies.collect::<Vec<_>>(), [&ViewPiece::Copy("/etc/ld.so.cache".into())]);
        assert!(pieces.contains(&link("/bin", "usr/bin")) && pieces.contains(&link("/lib64", "usr/lib64")));
        assert!(
            pieces
                .iter()
                .any(|piece| matches!(piece, ViewPiece::File { at, .. } if at == Path::new("/etc/passwd")))
        );
    }

    #[test]
    fn files_of_proc_that_only_root_may_read_are_hidden_from_root() {
        let plan = |hidden: &[&'static str]| ProcPlan {
            hidden: hidden.to_vec(),
            fixed: vec!["/proc/sys", "/proc/irq"],
        };
        assert_eq!(proc_plan(&host(), true), plan(&["/proc/keys", "/proc/kmsg"]));
        assert_eq!(proc_plan(&host(), false), plan(&["/proc/keys"]));
    }

    #[test]
    fn configured_paths_are_mounted_in_the_order_visible_writable_hidden() {
        let wanted = Wanted {
            visible: vec!["/opt/tool".into(), "/etc/ssl".into(), "/gone".into()],
            hidden: vec!["/opt/secret".into()],
            writable: vec!["/opt/tool".into()],
        };
        let pieces = pieces(&CellKind::default(), &wanted);
        let of_host = from_host(&pieces);
        // Both lie in directories that are visible anyway.
        assert!(
            !of_host.contains(&("/opt/tool", Access::Read))
                && !of_host.contains(&("/etc/ssl/certs", Access::Read))
        );
        assert!(of_host.contains(&("/etc/ssl", Access::Read)));
        let hidden = pieces.iter().position(|piece| *piece == ViewPiece::Hidden("/opt/secret".into()));
        let writable =
            pieces.iter().position(|piece| matches!(piece, ViewPiece::Host { access: Access::Write, .. }));
        assert!(writable < hidden && hidden == Some(pieces.len() - 1));
    }

    #[test]
    fn another_root_file_system_replaces_all_files_of_the_host_but_devices_and_cpus() {
        let root = Some(RootFs::directory(Path::new("/srv/image")));
        let wanted = Wanted {
            visible: vec!["/opt/tool".into()],
            hidden: vec!["/opt/secret".into()],
            ..Wanted::default()
        };
        let pieces = pieces(&CellKind { root, ..CellKind::default() }, &wanted);
        assert_eq!(from_host(&pieces), [(CPUS, Access::Read)]);
        assert!(pieces.contains(&ViewPiece::Directory(CPUS.into())), "its mount point");
        assert!(pieces.contains(&ViewPiece::Directory("/build".into())));
    }

    #[test]
    fn the_dns_configuration_is_mounted_from_where_its_link_leads_if_the_network_is_shared() {
        let with = |network: CellNetwork| {
            pieces(&CellKind { network: network.into(), ..CellKind::default() }, &Wanted::default())
        };
        let resolvers = |piece: &ViewPiece| {
            matches!(piece, ViewPiece::Host { from, at, .. }
            if from == Path::new("/run/resolv.conf") && at == Path::new(RESOLVERS))
        };
        assert!(
            with(CellNetwork::Host).iter().any(resolvers) && !with(CellNetwork::On).iter().any(resolvers)
        );
        let own = |piece: &ViewPiece| matches!(piece, ViewPiece::File { at, text } if at == Path::new(RESOLVERS) && text.starts_with("nameserver"));
        assert!(with(CellNetwork::On).iter().any(own) && !with(CellNetwork::Off).iter().any(own));
    }

    #[test]
    fn a_store_below_a_visible_directory_is_noticed() {
        let wanted =
            Wanted { visible: vec!["/srv".into()], hidden: vec!["/srv/cache".into()], ..Wanted::default() };
        assert!(shows(&wanted, Path::new("/opt/gorego")) && shows(&wanted, Path::new("/srv/other")));
        assert!(
            !shows(&wanted, Path::new("/srv/cache/v1")) && !shows(&wanted, Path::new("/var/cache/gorego"))
        );
        assert!(
            shows(&wanted, Path::new("/lib32/x")) && !shows(&wanted, Path::new("/etc/gorego/gorego.toml"))
        );
    }

    #[test]
    fn paths_that_cannot_be_shown_are_refused() {
        for path in ["/", "usr", "/usr/../etc", "/proc/1", "/dev", "/tmp", "/build"] {
            assert!(problem(Path::new(path)).is_some(), "{path}");
        }
        for path in ["/nix/store", "/tmp/shared"] {
            assert_eq!(problem(Path::new(path)), None);
        }
    }
}
