//! Tests of images from layout directories, from the name to the directory that an action sees.

use super::{
    fixtures::{Blobs, LayerArchive, architecture, digest, gzip, tagged, zstd},
    *,
};
use serde_json::{Value, json};
use std::{
    fs,
    os::unix::fs::symlink,
    sync::atomic::{AtomicUsize, Ordering},
};
use tokio::runtime::Runtime;

const LARGE: u64 = 1 << 30;

/// A build root, and a directory that may contain layouts.
struct Site {
    directory: tempfile::TempDir,
    runtime: Runtime,
}

impl Site {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        for name in ["build", "layouts", "elsewhere"] {
            fs::create_dir(directory.path().join(name)).unwrap();
        }
        Self { directory, runtime: Runtime::new().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn open(&self, max_bytes: u64) -> Images {
        let settings = ImageSettings {
            registries: Vec::new(),
            tags: TagPolicy::Refuse,
            credentials: None,
            layouts: vec![self.path("layouts")],
            max_bytes,
            timeout: Duration::from_secs(60),
        };
        let runtime = self.runtime.handle().clone();
        Images::open(settings, &self.path("build"), runtime).unwrap()
    }

    fn name(&self, layout: &str) -> String {
        format!("oci:{}", self.path(layout).display())
    }

    /// The names in the directory of images.
    fn unpacked(&self) -> Vec<String> {
        let entries = fs::read_dir(self.path("build/images")).unwrap().flatten();
        let mut names: Vec<_> = entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

fn never() -> Result<()> {
    Ok(())
}

fn layer_of(path: &str, content: &str) -> LayerArchive {
    LayerArchive::new().file(path, content.as_bytes(), 0o755)
}

/// An image with one file that has this content.
fn write_simple(site: &Site, layout: &str, content: &str) -> String {
    let mut blobs = Blobs::default();
    let image = blobs.image(vec![layer_of("f", content).finish()], Value::Null);
    blobs.write_layout(&site.path(layout), &[blobs.entry(&image, json!({}))]);
    image
}

fn names_left(name: &str) -> String {
    format!("sha256-{}", name.strip_prefix("sha256:").unwrap())
}

#[test]
fn an_image_of_several_layers_is_unpacked_once_and_says_its_environment() {
    let site = Site::new();
    let mut blobs = Blobs::default();
    let layers = vec![
        gzip(&layer_of("usr/bin/tool", "old").file("usr/gone", b"x", 0o644).finish()),
        zstd(&layer_of("usr/bin/tool", "new").finish()),
        layer_of("usr/.wh.gone", "").finish(),
    ];
    let image = blobs.image(
        layers,
        json!({ "Env": ["PATH=/usr/bin", "LANG=C"], "User": "7:8", "Entrypoint": ["/never"] }),
    );
    blobs.write_layout(&site.path("layouts/tools"), &[blobs.entry(&image, tagged("v1"))]);
    let images = site.open(LARGE);
    let by_tag =
        images.lease(&format!("{}:v1", site.name("layouts/tools")), Peer::default(), &never).unwrap();
    assert_eq!(fs::read(by_tag.root.join("usr/bin/tool")).unwrap(), b"new");
    assert!(!by_tag.root.join("usr/gone").exists());
    let environment = [("PATH", "/usr/bin"), ("LANG", "C")].map(|(name, value)| (name.into(), value.into()));
    assert_eq!(by_tag.environment, environment);
    assert_eq!(by_tag.user.map(|user| (user.user, user.group)), Some((7, 8)));
    // From here on, only the index of the layout is needed.
    fs::remove_dir_all(site.path("layouts/tools/blobs")).unwrap();
    for name in [site.name("layouts/tools"), format!("{}@{image}", site.name("layouts/tools"))] {
        assert_eq!(images.lease(&name, Peer::default(), &never).unwrap().root, by_tag.root, "{name}");
    }
    assert_eq!(site.unpacked(), [names_left(&image)]);
}

#[test]
fn an_index_leads_to_the_image_for_this_machine() {
    let site = Site::new();
    let mut blobs = Blobs::default();
    let platform =
        |architecture: &str| json!({ "platform": { "os": "linux", "architecture": architecture } });
    let other = blobs.image(vec![layer_of("f", "other").finish()], Value::Null);
    let own = blobs.image(vec![layer_of("f", "own").finish()], Value::Null);
    let entries = [blobs.entry(&other, platform("s390x")), blobs.entry(&own, platform(architecture()))];
    let index = blobs.put(blobs.index(&entries).into_bytes());
    blobs.write_layout(&site.path("layouts/multi"), &[blobs.entry(&index, json!({}))]);
    blobs.write_layout(&site.path("layouts/flat"), &entries);
    let images = site.open(LARGE);
    for name in ["layouts/multi", "layouts/flat"] {
        let leased = images.lease(&site.name(name), Peer::default(), &never).unwrap();
        assert_eq!(fs::read(leased.root.join("f")).unwrap(), b"own");
    }
}

#[test]
fn only_directories_that_are_listed_are_read_and_no_link_leads_out_of_them() {
    let site = Site::new();
    write_simple(&site, "elsewhere/image", "x");
    let inside = write_simple(&site, "layouts/image", "inside");
    symlink(site.path("elsewhere/image"), site.path("layouts/link")).unwrap();
    symlink("image", site.path("layouts/fine")).unwrap();
    let images = site.open(LARGE);
    for (name, part) in [
        (site.name("elsewhere/image"), "execution.images.layouts"),
        (site.name("layouts-not"), "execution.images.layouts"),
        (site.name("layouts/link"), "cannot be opened"),
        (site.name("layouts/none"), "cannot be opened"),
        ("docker://registry.example.com/a:b".into(), "execution.images.registries"),
        (format!("{}:v9", site.name("layouts/image")), "no image \"v9\""),
    ] {
        let error = images.lease(&name, Peer::default(), &never).unwrap_err();
        assert!(
            matches!(error, Error::Precondition(_)) && error.to_string().contains(part),
            "{name}: {error}"
        );
    }
    assert!(matches!(images.lease("ubuntu", Peer::default(), &never), Err(Error::Invalid(_))));
    assert!(images.lease(&site.name("layouts/fine"), Peer::default(), &never).is_ok());
    // A blob that is a link out of the directory, or that would block.
    let blob = site.path("layouts/image/blobs/sha256").join(inside.strip_prefix("sha256:").unwrap());
    let fresh = site.open_fresh();
    fs::rename(&blob, site.path("elsewhere/manifest")).unwrap();
    symlink(site.path("elsewhere/manifest"), &blob).unwrap();
    assert!(matches!(
        fresh.lease(&site.name("layouts/image"), Peer::default(), &never),
        Err(Error::Precondition(_))
    ));
}

impl Site {
    /// The same store without the unpacked images.
    fn open_fresh(&self) -> Images {
        fs::remove_dir_all(self.path("build/images")).unwrap();
        self.open(LARGE)
    }
}

#[test]
fn content_that_is_not_what_its_digest_says_is_refused_and_leaves_nothing() {
    let site = Site::new();
    let mut blobs = Blobs::default();
    let layer = gzip(&layer_of("f", "content").finish());
    let image = blobs.image(vec![layer.clone()], Value::Null);
    let name = site.name("layouts/image");
    type Change = fn(&mut Vec<u8>);
    let changes: [(&str, Change); 4] = [
        ("another digest", |bytes| *bytes.last_mut().unwrap() ^= 1),
        ("another digest", |bytes| bytes.push(0)),
        ("another digest", |bytes| bytes.truncate(bytes.len() / 2)),
        ("no usable file", |bytes| bytes.clear()),
    ];
    let of_config =
        blobs.0.keys().find(|digest| **digest != image && **digest != self::digest(&layer)).unwrap().clone();
    for changed in [&image, &of_config, &self::digest(&layer)] {
        for (part, change) in changes {
            let mut damaged = blobs.clone();
            change(damaged.0.get_mut(changed).unwrap());
            if damaged.0[changed].is_empty() {
                damaged.0.remove(changed);
            }
            let _ = fs::remove_dir_all(site.path("layouts/image"));
            damaged.write_layout(&site.path("layouts/image"), &[blobs.entry(&image, json!({}))]);
            let error = site.open(LARGE).lease(&name, Peer::default(), &never).unwrap_err();
            let text = error.to_string();
            assert!(matches!(error, Error::Precondition(_)) && text.contains(part), "{changed}: {text}");
            assert!(text.contains(&name), "{text}");
            assert!(site.unpacked().is_empty());
        }
    }
}

#[test]
fn an_image_for_another_machine_or_with_a_hostile_layer_is_refused() {
    let site = Site::new();
    let mut blobs = Blobs::default();
    let bad = blobs.image(vec![layer_of("../../f", "x").finish()], Value::Null);
    let config = blobs.put(json!({ "architecture": "s390x", "os": "linux" }).to_string().into_bytes());
    let foreign = json!({ "config": blobs.descriptor(&config, ""), "layers": [] });
    let foreign = blobs.put(foreign.to_string().into_bytes());
    blobs.write_layout(&site.path("layouts/i"), &[]);
    let images = site.open(LARGE);
    for (digest, part) in [(bad, "contains \"..\""), (foreign, "it is for linux/s390x")] {
        let error = images
            .lease(&format!("{}@{digest}", site.name("layouts/i")), Peer::default(), &never)
            .unwrap_err();
        assert!(matches!(error, Error::Precondition(_)) && error.to_string().contains(part), "{error}");
    }
    assert!(site.unpacked().is_empty() && !site.path("f").exists());
}

#[test]
fn images_stay_within_their_budget_and_those_in_use_stay() {
    let site = Site::new();
    let content = "x".repeat(100_000);
    let all: Vec<_> = (0..4)
        .map(|number| {
            (
                site.name(&format!("layouts/{number}")),
                write_simple(&site, &format!("layouts/{number}"), &format!("{content}{number}")),
            )
        })
        .collect();
    // There is room for two.
    let images = site.open(220_000);
    let held = images.lease(&all[0].0, Peer::default(), &never).unwrap();
    drop(images.lease(&all[1].0, Peer::default(), &never).unwrap());
    let other = images.lease(&all[2].0, Peer::default(), &never).unwrap();
    assert!(held.root.join("f").exists());
    let mut left = [names_left(&all[0].1), names_left(&all[2].1)];
    left.sort();
    assert_eq!(site.unpacked(), left, "the one that nobody used had to go");
    let error = images.lease(&all[3].0, Peer::default(), &never).unwrap_err();
    assert!(matches!(error, Error::Unavailable(_)) && error.to_string().contains("in use"), "{error}");
    drop((held, other));
    images.relieve_disk();
    assert!(site.unpacked().is_empty());
    let error = site.open(50_000).lease(&all[0].0, Peer::default(), &never).unwrap_err();
    assert!(matches!(error, Error::Precondition(_)) && error.to_string().contains("max_size_gb"), "{error}");
}

#[test]
fn images_survive_the_server_and_leftovers_do_not() {
    let site = Site::new();
    let image = write_simple(&site, "layouts/image", "x");
    let name = site.name("layouts/image");
    drop(site.open(LARGE).lease(&name, Peer::default(), &never).unwrap());
    let place = site.path("build/images");
    for leftover in
        ["new-0/root", "old-3/root/deep", &format!("sha256-{}/root", "0".repeat(64)), "kept-by-somebody"]
    {
        fs::create_dir_all(place.join(leftover)).unwrap();
    }
    fs::remove_dir_all(site.path("layouts/image/blobs")).unwrap();
    let images = site.open(LARGE);
    let leased = images.lease(&name, Peer::default(), &never).unwrap();
    assert_eq!(fs::read(leased.root.join("f")).unwrap(), b"x");
    let end = Instant::now() + Duration::from_secs(30);
    while site.unpacked() != ["kept-by-somebody", &*names_left(&image)] {
        assert!(Instant::now() < end, "{:?}", site.unpacked());
        thread::yield_now();
    }
    drop((leased, images));
    // After a restart of the machine, files that were not written completely could not be detected.
    let description = place.join(names_left(&image)).join("image.json");
    let other = fs::read_to_string(&description).unwrap().replacen("\"boot\":\"", "\"boot\":\"another", 1);
    fs::write(&description, other).unwrap();
    assert!(site.open(LARGE).lease(&name, Peer::default(), &never).is_err(), "the layout is gone");
}

#[test]
fn an_image_removed_from_disk_is_unpacked_again() {
    let site = Site::new();
    let image = write_simple(&site, "layouts/image", "x");
    let images = site.open(LARGE);
    let name = site.name("layouts/image");
    let held = images.lease(&name, Peer::default(), &never).unwrap();
    fs::remove_dir_all(site.path("build/images")).unwrap();
    let again = images.lease(&name, Peer::default(), &never).unwrap();
    drop(held);
    assert_eq!(fs::read(again.root.join("f")).unwrap(), b"x");
    images.relieve_disk();
    assert_eq!(site.unpacked(), [names_left(&image)], "the old lease was of another copy");
}

#[test]
fn concurrent_requests_for_an_image_get_the_same_one() {
    let site = Site::new();
    let mut blobs = Blobs::default();
    let files = (0..2_000).fold(LayerArchive::new(), |layer, n| layer.file(&format!("f{n}"), b"x", 0o644));
    let image = blobs.image(vec![files.finish()], Value::Null);
    blobs.write_layout(&site.path("layouts/i"), &[blobs.entry(&image, json!({}))]);
    let images = site.open(LARGE);
    let name = site.name("layouts/i");
    let served = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let leased = images.lease(&name, Peer::default(), &never).unwrap();
                assert_eq!(fs::read_dir(&leased.root).unwrap().count(), 2_000);
                served.fetch_add(1, Ordering::SeqCst);
            });
        }
    });
    assert_eq!(served.into_inner(), 8);
    assert_eq!(site.unpacked(), [names_left(&image)]);
}

#[test]
fn an_action_is_queued_without_a_look_at_the_disk_and_the_worker_pulls_a_removed_image_again() {
    let site = Site::new();
    write_simple(&site, "layouts/image", "x");
    let images = site.open(LARGE);
    let name = site.name("layouts/image");
    let caller = Caller::without_connection(Peer::default());
    let bring = || site.runtime.block_on(images.bring(&name, caller));
    bring().unwrap();
    fs::remove_dir_all(site.path("build/images")).unwrap();
    bring().unwrap();
    assert!(!site.path("build/images").exists(), "nothing was pulled");
    let leased = images.lease(&name, Peer::default(), &never).unwrap();
    assert_eq!(fs::read(leased.root.join("f")).unwrap(), b"x");
}
