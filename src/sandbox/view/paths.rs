//! The paths that actions see: the built-in ones and the configured ones. Pure.

use super::{super::EXEC_ROOT, Host};
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
pub(super) const DEVICES: &[&str] = &["null", "zero", "full", "random", "urandom", "tty"];

/// Symbolic links below /dev.
pub(super) const DEVICE_LINKS: &[(&str, &str)] = &[
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
    ("/dev/ptmx", "pts/ptmx"),
];

/// Paths with files of the sandbox itself. The configuration cannot place files of the host there.
const OWN: &[&str] = &["/proc", "/dev", EXEC_ROOT, "/var/tmp"];
/// A path with files of the sandbox itself, below which the configuration can place directories of the host.
const TMP: &str = "/tmp";

/// The file that names the DNS servers.
pub(crate) const RESOLVERS: &str = "/etc/resolv.conf";
/// The part of the host's /sys that every root file system gets.
pub(super) const CPUS: &str = "/sys/devices/system/cpu";

/// The paths that the configuration adds and hides.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ConfiguredPaths {
    /// Paths that are visible in addition to [`HOST`].
    pub visible: Vec<PathBuf>,
    /// Paths that are hidden although a directory above them is visible.
    pub hidden: Vec<PathBuf>,
    /// Paths that are visible and can be changed.
    pub writable: Vec<PathBuf>,
}

impl ConfiguredPaths {
    /// The configured directories that must be shown in the private /tmp of each action.
    pub(crate) fn below_tmp(&self) -> impl Iterator<Item = &Path> {
        let all = self.visible.iter().chain(&self.writable).map(PathBuf::as_path);
        all.filter(|path| path.starts_with(TMP))
    }
}

/// Whether a path is visible to actions, by itself or as part of a visible directory.
pub(crate) fn shows(wanted: &ConfiguredPaths, path: &Path) -> bool {
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
        return Some("lies where the sandbox has its own files (/proc, /dev, /tmp itself, /var/tmp, /build)");
    }
    None
}

/// The paths of the host that match a pattern.
pub(super) fn matching(pattern: &str, host: &dyn Host) -> Vec<PathBuf> {
    let Some((start, end)) = pattern.split_once('*') else { return vec![pattern.into()] };
    let (parent, prefix) = start.rsplit_once('/').unwrap_or(("", start));
    let parent = Path::new("/").join(parent.trim_start_matches('/'));
    let mut names = host.names(&parent);
    names.retain(|name| {
        name.len() >= prefix.len() + end.len() && name.starts_with(prefix) && name.ends_with(end)
    });
    names.into_iter().map(|name| parent.join(name)).collect()
}
