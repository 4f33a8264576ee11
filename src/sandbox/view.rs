//! What an action sees of the file system, as a list of pieces in the order in which they are put together. Pure: the host
//! is asked through [`Host`].
//!
//! The list of what is visible names everything; what it does not name does not exist. Everything of the host is read-only,
//! except what the configuration makes writable.

use super::{EXEC_ROOT, identity, kind::CellKind};
use std::path::{Component, Path, PathBuf};

/// What every action may see of the host: programs, libraries, and what compilers, language runtimes and the C library read
/// below /etc. A `*` in the last component stands for any text. Nothing with keys, passwords or names of users.
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

/// The devices of the host.
const DEVICES: &[&str] = &["null", "zero", "full", "random", "urandom", "tty"];

/// Links below /dev.
const DEVICE_LINKS: &[(&str, &str)] = &[
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
    ("/dev/ptmx", "pts/ptmx"),
];

/// What of /proc is hidden: it says more about the kernel than an action needs. Most of it only root can read, but without a
/// user for each slot an action of a root server is root of the host, though without capabilities.
const HIDDEN_OF_PROC: &[&str] = &[
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

/// The settings of the kernel and of devices, which can only be read.
const FIXED_OF_PROC: &[&str] = &[
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

/// Paths that the sandbox makes itself; the configuration cannot put the host's there.
const OWN: &[&str] = &["/proc", "/dev", EXEC_ROOT, "/var/tmp"];
/// A path that the sandbox makes itself, in which the configuration can have directories of the host.
const TMP: &str = "/tmp";

/// Where programs look for the servers that know the names of hosts.
const RESOLVERS: &str = "/etc/resolv.conf";
/// What every root file system is given of the host's /sys.
const CPUS: &str = "/sys/devices/system/cpu";

/// A view: what it is made of, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ViewPlan {
    /// Directories, links and files of the sandbox itself. They lie over a root file system other than the host's, which is
    /// not changed.
    pub base: Vec<ViewPiece>,
    /// What is mounted, and links among that.
    pub rest: Vec<ViewPiece>,
}

/// One piece of a view. Later pieces lie on top of earlier ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ViewPiece {
    /// An empty directory, with the directories above it.
    Directory(PathBuf),
    /// A small file system of its own, which is read-only when the view is complete.
    Own(PathBuf),
    /// A symbolic link.
    Link {
        /// Where.
        at: PathBuf,
        /// What it says.
        target: PathBuf,
    },
    /// A small file that can only be read.
    File {
        /// Where.
        at: PathBuf,
        /// Its content.
        text: String,
    },
    /// A file or directory of the host, with everything mounted below it.
    Host {
        /// Where it is on the host.
        from: PathBuf,
        /// Where it is in the view.
        at: PathBuf,
        /// A directory, or else anything but that.
        is_directory: bool,
        /// What may be done with it.
        access: Access,
    },
    /// A copy of a file of the host at its own path, because a copy costs each action less than a mount. A large file is
    /// shown instead.
    Copy(PathBuf),
    /// An empty file or directory over what is there, if anything is.
    Hidden(PathBuf),
}

/// What may be done with a file of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// It can be read; programs can be run.
    Read,
    /// It can be changed as well.
    Write,
    /// It is a device: it can be read and written, but its owner, mode and times cannot be changed.
    Device,
}

/// What is mounted anew in each cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fresh {
    /// Size of /tmp in bytes.
    pub tmp_bytes: u64,
    /// Most files and directories in /tmp.
    pub tmp_files: u64,
    /// Size of /dev/shm in bytes.
    pub shm_bytes: u64,
}

/// What is at a path of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A directory.
    Directory,
    /// A symbolic link, and what it says.
    Link(PathBuf),
    /// Anything else.
    Other,
}

/// The host's file system.
pub(crate) trait Host {
    /// What is at a path itself; `None` for nothing.
    fn kind(&self, path: &Path) -> Option<Kind>;
    /// The names in a directory; none if it cannot be read.
    fn names(&self, path: &Path) -> Vec<String>;
    /// The same path without symbolic links; `None` for nothing.
    fn real(&self, path: &Path) -> Option<PathBuf>;
    /// The permission bits of a path; `None` for nothing.
    fn permissions(&self, path: &Path) -> Option<u32>;
}

/// What is configured.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// More of the host.
    pub visible: Vec<PathBuf>,
    /// Hidden although something above it is visible.
    pub hidden: Vec<PathBuf>,
    /// Visible, and can be changed.
    pub writable: Vec<PathBuf>,
}

impl Wanted {
    /// The configured directories that must be shown in the private /tmp of each action.
    pub(crate) fn below_tmp(&self) -> impl Iterator<Item = &Path> {
        let all = self.visible.iter().chain(&self.writable).map(PathBuf::as_path);
        all.filter(|path| path.starts_with(TMP))
    }
}

/// The view of all actions that need this kind of cell. `existing` reads files of a root file system other than the host's.
pub(crate) fn view(
    kind: &CellKind,
    wanted: &Wanted,
    host: &dyn Host,
    existing: impl Fn(&str) -> Option<String>,
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
        rest.extend(of_host(wanted, host));
    } else if kind.root_directory().is_some() && host.kind(Path::new(CPUS)).is_some() {
        base.push(ViewPiece::Directory(CPUS.into()));
        rest.push(ViewPiece::shown(Path::new(CPUS), true, Access::Read));
    }
    if kind.shares_network
        && let Some(from) = host.real(Path::new(RESOLVERS))
    {
        base.push(ViewPiece::File { at: RESOLVERS.into(), text: String::new() });
        rest.push(ViewPiece::Host { from, at: RESOLVERS.into(), is_directory: false, access: Access::Read });
    }
    ViewPlan { base, rest }
}

/// What is below /dev.
fn devices() -> Vec<ViewPiece> {
    let mut pieces = vec![ViewPiece::Own("/dev".into())];
    pieces.extend(["/dev/shm", "/dev/pts"].map(|path| ViewPiece::Directory(path.into())));
    pieces.extend(DEVICE_LINKS.iter().map(|(at, target)| link(at, target)));
    pieces.extend(
        DEVICES.iter().map(|device| ViewPiece::shown(&Path::new("/dev").join(device), false, Access::Device)),
    );
    pieces
}

/// What is shown of the host where it is not replaced.
fn of_host(wanted: &Wanted, host: &dyn Host) -> Vec<ViewPiece> {
    let mut pieces = Vec::new();
    let built_in = HOST.iter().flat_map(|pattern| matching(pattern, host));
    let mut paths: Vec<_> = built_in.chain(wanted.visible.iter().cloned()).collect();
    // Parents first, so that what lies in a visible directory is not mounted again.
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
            // What is configured may be anything, such as a socket.
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
    // Last, so that it is hidden from what can be written too.
    pieces.extend(wanted.hidden.iter().cloned().map(ViewPiece::Hidden));
    pieces
}

impl ViewPiece {
    /// Something of the host at its own path.
    fn shown(at: &Path, is_directory: bool, access: Access) -> Self {
        Self::Host { from: at.into(), at: at.into(), is_directory, access }
    }
}

/// What is changed in a fresh /proc.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ProcPlan {
    /// What is hidden.
    pub hidden: Vec<&'static str>,
    /// What can only be read.
    pub fixed: Vec<&'static str>,
}

/// What is changed in a fresh /proc for actions that are root of the host, or some other user. All of it belongs to root, so
/// what only root may read is not hidden from another user.
pub(crate) fn of_proc(host: &dyn Host, is_root: bool) -> ProcPlan {
    /// All permissions of group and others.
    const OF_OTHERS: u32 = 0o077;
    let is_reachable = |path: &&&str| {
        host.permissions(Path::new(path)).is_some_and(|permissions| is_root || permissions & OF_OTHERS != 0)
    };
    let exists = |path: &&&str| host.permissions(Path::new(path)).is_some();
    ProcPlan {
        hidden: HIDDEN_OF_PROC.iter().filter(is_reachable).copied().collect(),
        fixed: FIXED_OF_PROC.iter().filter(exists).copied().collect(),
    }
}

/// Whether a path is visible to actions, as part of one of these.
pub(crate) fn shows(wanted: &Wanted, path: &Path) -> bool {
    let hides = |hidden: &PathBuf| path.starts_with(hidden);
    let matches = |pattern: &&str| match pattern.split_once('*') {
        // The one pattern that could match a path of ours is not longer than its first component.
        Some((start, _)) => path.to_string_lossy().starts_with(start),
        None => path.starts_with(pattern),
    };
    let is_shown = HOST.iter().any(matches)
        || wanted.visible.iter().chain(&wanted.writable).any(|shown| path.starts_with(shown));
    is_shown && !wanted.hidden.iter().any(hides)
}

/// Why this path cannot be configured as visible, hidden or writable.
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
        let ViewPlan { mut base, rest } = view(kind, wanted, &host(), |_| None);
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
    fn only_what_is_listed_is_visible_and_it_is_read_only() {
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
    fn what_only_root_may_read_is_hidden_from_root() {
        let plan = |hidden: &[&'static str]| ProcPlan {
            hidden: hidden.to_vec(),
            fixed: vec!["/proc/sys", "/proc/irq"],
        };
        assert_eq!(of_proc(&host(), true), plan(&["/proc/keys", "/proc/kmsg"]));
        assert_eq!(of_proc(&host(), false), plan(&["/proc/keys"]));
    }

    #[test]
    fn what_is_configured_comes_in_the_order_visible_writable_hidden() {
        let wanted = Wanted {
            visible: vec!["/opt/tool".into(), "/etc/ssl".into(), "/gone".into()],
            hidden: vec!["/opt/secret".into()],
            writable: vec!["/opt/tool".into()],
        };
        let pieces = pieces(&CellKind::default(), &wanted);
        let of_host = from_host(&pieces);
        // Inside of what is visible anyway.
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
    fn who_shares_the_network_finds_the_servers_of_names_behind_their_link() {
        let pieces = pieces(&CellKind { shares_network: true, ..CellKind::default() }, &Wanted::default());
        let resolvers = |piece: &ViewPiece| {
            matches!(piece, ViewPiece::Host { from, at, .. }
            if from == Path::new("/run/resolv.conf") && at == Path::new(RESOLVERS))
        };
        assert!(pieces.iter().any(resolvers));
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
