//! Tests of views.

use super::{
    super::kind::RootFs,
    paths::{CPUS, RESOLVERS},
    *,
};
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

fn pieces(kind: &CellKind, wanted: &ConfiguredPaths) -> Vec<ViewPiece> {
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
    let pieces = pieces(&CellKind::default(), &ConfiguredPaths::default());
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
    let plan =
        |hidden: &[&'static str]| ProcPlan { hidden: hidden.to_vec(), fixed: vec!["/proc/sys", "/proc/irq"] };
    assert_eq!(proc_plan(&host(), true), plan(&["/proc/keys", "/proc/kmsg"]));
    assert_eq!(proc_plan(&host(), false), plan(&["/proc/keys"]));
}

#[test]
fn configured_paths_are_mounted_in_the_order_visible_writable_hidden() {
    let wanted = ConfiguredPaths {
        visible: vec!["/opt/tool".into(), "/etc/ssl".into(), "/gone".into()],
        hidden: vec!["/opt/secret".into()],
        writable: vec!["/opt/tool".into()],
    };
    let pieces = pieces(&CellKind::default(), &wanted);
    let of_host = from_host(&pieces);
    // Both are in directories that are already visible.
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
    let wanted = ConfiguredPaths {
        visible: vec!["/opt/tool".into()],
        hidden: vec!["/opt/secret".into()],
        ..ConfiguredPaths::default()
    };
    let pieces = pieces(&CellKind { root, ..CellKind::default() }, &wanted);
    assert_eq!(from_host(&pieces), [(CPUS, Access::Read)]);
    assert!(pieces.contains(&ViewPiece::Directory(CPUS.into())), "its mount point");
    assert!(pieces.contains(&ViewPiece::Directory("/build".into())));
}

#[test]
fn the_dns_configuration_is_mounted_from_where_its_link_leads_if_the_network_is_shared() {
    let with = |network: CellNetwork| {
        pieces(&CellKind { network: network.into(), ..CellKind::default() }, &ConfiguredPaths::default())
    };
    let resolvers = |piece: &ViewPiece| {
        matches!(piece, ViewPiece::Host { from, at, .. }
        if from == Path::new("/run/resolv.conf") && at == Path::new(RESOLVERS))
    };
    assert!(with(CellNetwork::Host).iter().any(resolvers) && !with(CellNetwork::On).iter().any(resolvers));
    let own = |piece: &ViewPiece| matches!(piece, ViewPiece::File { at, text } if at == Path::new(RESOLVERS) && text.starts_with("nameserver"));
    assert!(with(CellNetwork::On).iter().any(own) && !with(CellNetwork::Off).iter().any(own));
}

#[test]
fn a_store_below_a_visible_directory_is_noticed() {
    let wanted = ConfiguredPaths {
        visible: vec!["/srv".into()],
        hidden: vec!["/srv/cache".into()],
        ..ConfiguredPaths::default()
    };
    assert!(shows(&wanted, Path::new("/opt/gorego")) && shows(&wanted, Path::new("/srv/other")));
    assert!(!shows(&wanted, Path::new("/srv/cache/v1")) && !shows(&wanted, Path::new("/var/cache/gorego")));
    assert!(shows(&wanted, Path::new("/lib32/x")) && !shows(&wanted, Path::new("/etc/gorego/gorego.toml")));
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
