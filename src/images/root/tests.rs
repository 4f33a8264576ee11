//! Tests with hostile layers, and of layers against a model.

use super::*;
use crate::images::{
    fixtures::{LayerArchive, gzip, zstd},
    layer,
};
use gorego_reapi::error::Error;
use proptest::prelude::*;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};
use tar::EntryType;

/// A root directory next to a directory that must not be changed.
struct Site {
    directory: tempfile::TempDir,
}

impl Site {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("root")).unwrap();
        fs::create_dir(directory.path().join("outside")).unwrap();
        fs::write(directory.path().join("outside/victim"), "untouched").unwrap();
        Self { directory }
    }

    fn root(&self) -> PathBuf {
        self.directory.path().join("root")
    }

    fn outside(&self) -> String {
        self.directory.path().join("outside").to_str().unwrap().to_owned()
    }

    /// Applies layers, and checks that nothing outside of the root has changed.
    fn apply(&self, layers: impl IntoIterator<Item = Vec<u8>>) -> Result<(), LayerProblem> {
        let top = File::open(self.root()).unwrap();
        let mut take = |_| Ok(());
        let mut tree = RootTree::new(&top, &mut take);
        let applied = layers.into_iter().try_for_each(|layer| layer::unpack(&*layer, &mut tree));
        assert_eq!(fs::read(self.directory.path().join("outside/victim")).unwrap(), b"untouched");
        assert_eq!(fs::read_dir(self.directory.path()).unwrap().count(), 2);
        assert_eq!(fs::read_dir(self.directory.path().join("outside")).unwrap().count(), 1);
        applied
    }

    fn apply_one(&self, layer: LayerArchive) -> Result<(), LayerProblem> {
        self.apply([layer.finish()])
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.root().join(path)).unwrap()
    }
}

fn refused(applied: Result<(), LayerProblem>) -> String {
    match applied {
        Err(LayerProblem::Refused(problem)) => problem,
        other => panic!("it was not refused: {other:?}"),
    }
}

fn layer() -> LayerArchive {
    LayerArchive::new()
}

#[test]
fn files_links_and_modes_are_what_the_layer_says_and_sets_no_user() {
    let site = Site::new();
    let archive = layer()
        .directory("./", 0o700)
        .directory("usr/", 0o755)
        .file("usr/bin/tool", b"#!", 0o4755)
        .file("/etc/secret", b"s", 0o000)
        .directory("locked", 0o000)
        .directory("tmp", 0o1777)
        .symlink("bin", "usr/bin")
        .file("bin/other", b"other", 0o644)
        .hard_link("usr/bin/same", "bin/tool")
        .hard_link("again", "./usr/bin/same")
        .entry(EntryType::Regular, b"old-directory/", 0o755, "", b"")
        .entry(EntryType::Char, b"dev/null", 0o666, "", b"")
        .entry(EntryType::Fifo, b"dev/pipe", 0o666, "", b"")
        .entry(EntryType::Regular, b"name-\xff", 0o644, "", b"");
    site.apply_one(archive).unwrap();
    let mode =
        |path: &str| fs::symlink_metadata(site.root().join(path)).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode("usr/bin/tool"), 0o755, "no set-user-id bit");
    assert_eq!((mode("etc/secret"), mode("locked"), mode("tmp"), mode("etc")), (0o400, 0o700, 0o1777, 0o755));
    assert_eq!(site.read("usr/bin/other"), "other", "a layer may go through links of the image");
    let meta = |path: &str| fs::metadata(site.root().join(path)).unwrap();
    assert_eq!(meta("again").ino(), meta("usr/bin/tool").ino());
    assert_eq!(meta("again").mtime(), 1_000_000_000);
    assert!(site.root().join("old-directory").is_dir());
    let own = rustix::process::geteuid().as_raw();
    assert_eq!(meta("again").uid(), own);
    assert!(!site.root().join("dev/null").exists() && !site.root().join("dev/pipe").exists());
    assert!(site.root().join(OsStr::from_bytes(b"name-\xff")).exists());
}

#[test]
fn no_path_and_no_link_leads_out() {
    let site = Site::new();
    let outside = site.outside();
    for path in ["../outside/new", "a/../../outside/new", "..", "usr/.."] {
        let problem = refused(site.apply_one(layer().file(path, b"x", 0o644)));
        assert!(problem.contains(".."), "{problem}");
    }
    // Links stay within the image.
    let up = "../".repeat(30);
    site.apply_one(
        layer()
            .symlink("absolute", &outside)
            .symlink("relative", &up)
            .symlink("proc", "/proc/self/cwd")
            .file("relative/inside", b"inside", 0o644)
            .directory(&outside[1..], 0o755)
            .file("absolute/inside", b"inside", 0o644),
    )
    .unwrap();
    assert_eq!((site.read("inside"), site.read(&format!("{}/inside", &outside[1..]))).0, "inside");
    for (path, target) in [("proc/x", ""), ("dangling/x", "dangling")] {
        let archive = layer().symlink("dangling", "/nowhere/at/all").file(path, target.as_bytes(), 0o644);
        refused(site.apply_one(archive));
    }
    // A written entry replaces a link instead of following it.
    let victim = format!("{outside}/victim");
    for write in [
        layer().symlink("l", &victim).file("l", b"x", 0o644),
        layer().symlink("d", &outside).directory("d", 0o777).file("d/victim", b"x", 0o644),
        layer().symlink("s", &victim).symlink("s", "elsewhere"),
        layer().file("f", b"f", 0o644).symlink("h", &victim).hard_link("h", "f"),
        layer().symlink("w", &outside).file("w/.wh.victim", b"", 0o644),
        layer().symlink("o", &outside).file("o/.wh..wh..opq", b"", 0o644),
    ] {
        site.apply_one(write).unwrap();
    }
    for name in ["l", "d/victim", "h"] {
        let metadata = fs::symlink_metadata(site.root().join(name)).unwrap();
        assert!(metadata.is_file(), "{name} is a file of the image");
    }
    assert_eq!((site.read("l"), site.read("d/victim"), site.read("h")), ("x".into(), "x".into(), "f".into()));
    assert_eq!(fs::read_link(site.root().join("s")).unwrap(), Path::new("elsewhere"));
    for target in [&*victim, "../outside/victim", "absolute/victim", "usr", ""] {
        let problem = refused(site.apply_one(layer().directory("usr", 0o755).hard_link("stolen", target)));
        assert!(problem.contains("stolen"), "{problem}");
    }
}

#[test]
fn a_hard_link_to_itself_and_a_write_to_a_linked_file_are_harmless() {
    let site = Site::new();
    let lower = layer().file("a", b"lower", 0o644).hard_link("b", "a").finish();
    let upper = layer().hard_link("a", "a").file("b", b"upper", 0o644).finish();
    site.apply([lower, upper]).unwrap();
    assert_eq!((&*site.read("a"), &*site.read("b")), ("lower", "upper"));
}

#[test]
fn an_invalid_layer_is_refused_with_the_reason() {
    let whole = layer().file("file", &[b'x'; 10_000], 0o644).finish();
    let cut = &whole[..4_000];
    let kind = |kind: u8| layer().entry(EntryType::new(kind), b"x", 0o644, "", b"").finish();
    let cases: [(&str, Vec<u8>); 11] = [
        ("empty", Vec::new()),
        ("", b"no archive at all".repeat(100)),
        ("ends within", cut.to_vec()),
        ("", gzip(&whole)[..40].to_vec()),
        ("ends within", gzip(cut)),
        ("", zstd(&whole)[..20].to_vec()),
        ("sparse", kind(b'S')),
        ("unknown kind", kind(b'V')),
        ("hides nothing", layer().file("d/.wh...", b"", 0o644).finish()),
        ("hides nothing", layer().file(".wh.", b"", 0o644).finish()),
        ("below", layer().file("below", b"", 0o644).file("below/x", b"", 0o644).finish()),
    ];
    for (part, archive) in cases {
        let site = Site::new();
        let problem = refused(site.apply([archive]));
        assert!(problem.contains(part) && problem.len() < 500, "{part}: {problem}");
    }
    let long = "x".repeat(90);
    let deep = layer().directory(&format!("{long}/{}", &long[..9]), 0o755);
    Site::new().apply_one(deep).unwrap();
}

#[test]
fn an_extension_header_has_a_limit_and_gives_long_names() {
    let site = Site::new();
    let long = format!("{}/file", "d".repeat(150));
    let named = layer()
        .entry(EntryType::GNULongName, b"././@LongLink", 0o644, "", format!("{long}\0").as_bytes())
        .file("short", b"content", 0o644);
    site.apply_one(named).unwrap();
    assert_eq!(site.read(&long), "content");
    let huge = layer().entry(EntryType::XHeader, b"pax", 0o644, "", &vec![b' '; 2 << 20]);
    assert!(refused(site.apply_one(huge)).contains("extension header"));
    let name = layer()
        .entry(EntryType::GNULongName, b"././@LongLink", 0o644, "", &[b'n'; 300])
        .file("short", b"", 0o644);
    refused(site.apply_one(name));
}

#[test]
fn room_is_taken_for_each_entry_before_it_is_written() {
    let site = Site::new();
    let top = File::open(site.root()).unwrap();
    let mut taken = 0;
    let mut take = |bytes| {
        taken += bytes;
        if taken > 5 * ENTRY_BYTES { Err(Error::Precondition("no room".into())) } else { Ok(()) }
    };
    let mut tree = RootTree::new(&top, &mut take);
    let archive = layer().file("a/b", b"x", 0o644).file("large", &[0; 20_000], 0o644).finish();
    let applied = layer::unpack(&*archive, &mut tree);
    assert!(matches!(applied, Err(LayerProblem::Failed(Error::Precondition(_)))), "{applied:?}");
    assert!(site.root().join("a/b").exists() && !site.root().join("large").exists());
}

/// The entries of layers in the model.
#[derive(Debug, Clone)]
enum LayerItem {
    File(Vec<&'static str>, u8),
    Directory(Vec<&'static str>),
    Hide(Vec<&'static str>),
    Opaque(Vec<&'static str>),
}

fn path() -> impl Strategy<Value = Vec<&'static str>> {
    prop::collection::vec(prop::sample::select(vec!["a", "b", "c"]), 1..4)
}

fn item() -> impl Strategy<Value = LayerItem> {
    prop_oneof![
        3 => (path(), any::<u8>()).prop_map(|(path, content)| LayerItem::File(path, content)),
        2 => path().prop_map(LayerItem::Directory),
        2 => path().prop_map(LayerItem::Hide),
        1 => prop::collection::vec(prop::sample::select(vec!["a", "b"]), 0..3).prop_map(LayerItem::Opaque),
    ]
}

/// An image as a map. `None` is a directory. The flag says whether the current layer has the entry.
#[derive(Debug, Default)]
struct Model(BTreeMap<Vec<&'static str>, (Option<u8>, bool)>);

impl Model {
    fn begin_layer(&mut self) {
        self.0.values_mut().for_each(|(_, own)| *own = false);
    }

    /// Creates a directory and its parents. `None` if a file is in the way.
    fn make(&mut self, path: &[&'static str]) -> Option<()> {
        (1..=path.len()).try_for_each(|length| {
            let node = self.0.entry(path[..length].to_vec()).or_insert((None, true));
            node.0.is_none().then_some(())
        })
    }

    fn remove(&mut self, path: &[&'static str]) {
        self.0.retain(|other, _| !other.starts_with(path));
    }

    fn hide(&mut self, path: &[&'static str]) {
        let own: BTreeSet<_> =
            self.0.iter().filter(|(_, node)| node.1).map(|(path, _)| path.clone()).collect();
        self.0.retain(|other, _| !other.starts_with(path) || own.iter().any(|own| own.starts_with(other)));
    }

    fn apply(&mut self, item: &LayerItem) -> Option<()> {
        match item {
            LayerItem::File(path, content) => {
                self.make(&path[..path.len() - 1])?;
                self.remove(path);
                self.0.insert(path.clone(), (Some(*content), true));
            }
            LayerItem::Directory(path) => {
                self.make(&path[..path.len() - 1])?;
                if self.0.get(path).is_some_and(|node| node.0.is_some()) {
                    self.remove(path);
                }
                self.0.insert(path.clone(), (None, true));
            }
            LayerItem::Hide(path) => {
                let above = &path[..path.len() - 1];
                let is_below_a_file = (1..=above.len())
                    .any(|length| self.0.get(&above[..length]).is_some_and(|node| node.0.is_some()));
                if is_below_a_file {
                    return None;
                }
                self.hide(path);
            }
            LayerItem::Opaque(path) => {
                self.make(path)?;
                let inside: Vec<_> = self
                    .0
                    .keys()
                    .filter(|other| other.len() > path.len() && other.starts_with(path))
                    .cloned()
                    .collect();
                inside.iter().for_each(|inside| self.hide(inside));
            }
        }
        Some(())
    }
}

fn archive_of(layer_says: &[LayerItem]) -> Vec<u8> {
    let add = |archive: LayerArchive, item: &LayerItem| match item {
        LayerItem::File(path, content) => archive.file(&path.join("/"), &[*content], 0o644),
        LayerItem::Directory(path) => archive.directory(&path.join("/"), 0o755),
        LayerItem::Hide(path) => {
            let (name, above) = path.split_last().unwrap();
            archive.file(&format!("{}/.wh.{name}", above.join("/")), b"", 0o644)
        }
        LayerItem::Opaque(path) => archive.file(&format!("{}/.wh..wh..opq", path.join("/")), b"", 0o644),
    };
    layer_says.iter().fold(layer(), add).finish()
}

fn on_disk(directory: &Path, path: &[&'static str], found: &mut BTreeMap<Vec<&'static str>, Option<u8>>) {
    for entry in fs::read_dir(directory).unwrap().flatten() {
        let name = ["a", "b", "c"].into_iter().find(|name| entry.file_name() == *name).unwrap();
        let path: Vec<_> = path.iter().copied().chain([name]).collect();
        let kind = entry.file_type().unwrap();
        assert!(!kind.is_char_device());
        if kind.is_dir() {
            found.insert(path.clone(), None);
            on_disk(&entry.path(), &path, found);
        } else {
            found.insert(path, Some(fs::read(entry.path()).unwrap()[0]));
        }
    }
}

proptest! {
    #[test]
    fn layers_with_whiteouts_look_like_the_model(
        layers in prop::collection::vec(prop::collection::vec(item(), 0..8), 1..4)
    ) {
        let mut model = Model::default();
        let is_possible = layers.iter().try_for_each(|layer| {
            model.begin_layer();
            layer.iter().try_for_each(|item| model.apply(item))
        });
        let site = Site::new();
        let applied = site.apply(layers.iter().map(|layer| archive_of(layer)));
        prop_assert_eq!(applied.is_ok(), is_possible.is_some(), "{:?}", applied);
        if is_possible.is_some() {
            let mut found = BTreeMap::new();
            on_disk(&site.root(), &[], &mut found);
            let expected: BTreeMap<_, _> = model.0.into_iter().map(|(path, node)| (path, node.0)).collect();
            prop_assert_eq!(found, expected);
        }
    }
}

#[test]
fn decoded_bytes_take_room_even_outside_of_file_content() {
    let site = Site::new();
    let top = File::open(site.root()).unwrap();
    let mut left: u64 = 64 << 20;
    let mut take = |bytes: u64| {
        left = left.checked_sub(bytes).ok_or_else(|| Error::Precondition("too large".into()))?;
        Ok(())
    };
    let mut tree = RootTree::new(&top, &mut take);
    // A link whose header announces a terabyte of content.
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(EntryType::Symlink);
    header.set_path("link").unwrap();
    header.set_link_name("target").unwrap();
    header.set_size(1 << 40);
    header.set_cksum();
    let archive = header.as_bytes().chain(io::repeat(0).take(1 << 40));
    let applied = layer::unpack(archive, &mut tree);
    assert!(
        matches!(&applied, Err(LayerProblem::Failed(Error::Precondition(problem))) if problem == "too large"),
        "{applied:?}"
    );
}
