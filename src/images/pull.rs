//! One pull: from a source to an unpacked image, step by step. Blocks.

use super::{
    cache::{CommandSettings, ImageCache, ImageLease, UnpackedImage, layers::LayerState},
    digest::ImageDigest,
    layer,
    manifest::{BlobName, Document, ImageConfig, Manifest, Platform},
    root::RootTree,
    source::{BlobFault, CheckedBlob, ImageSource, read_bounded, read_document},
    user,
};
use gorego_reapi::error::{Error, Result};
use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

/// Maximum number of nested indexes. Registries use at most one.
const MAX_INDEXES: usize = 2;

/// Number of unpacking steps after which the free space of the disk is checked. A step is an entry or 128 KiB of a
/// file, so at most 4 MiB are written in between. A disk counts as low when 64 reserves are left.
const CHECK_SPACE_EVERY: u64 = 32;

/// How often a pull checks for a layer that another pull is downloading. Layers take seconds, and the check also
/// notices the end of the pull's time.
const LAYER_POLL: Duration = Duration::from_millis(20);

/// How long a pull waits for the next [`LAYER_PROGRESS`] bytes of a layer that another pull is downloading. After that,
/// it downloads the layer without keeping it, so that a slow registry does not hold up images from other registries.
const LAYER_WAIT: Duration = Duration::from_secs(10);
/// See [`LAYER_WAIT`].
const LAYER_PROGRESS: u64 = 8 << 20;

/// The time limit of a pull.
#[derive(Debug, Clone, Copy)]
pub(super) struct PullTime {
    limit: Duration,
    end: Instant,
}

impl PullTime {
    /// A time limit that starts now.
    pub(super) fn starting(limit: Duration) -> Self {
        let now = Instant::now();
        // A limit beyond the range of the clock is replaced by a year.
        Self { limit, end: now.checked_add(limit).unwrap_or(now + Duration::from_secs(365 * 24 * 3600)) }
    }

    /// The remaining time.
    ///
    /// # Errors
    /// `Unavailable` if it has passed.
    pub(super) fn left(&self) -> Result<Duration> {
        let left = self.end.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(self.time_limit_passed()) } else { Ok(left) }
    }

    /// The error of a pull whose time limit has passed.
    pub(super) fn time_limit_passed(&self) -> Error {
        Error::Unavailable(format!(
            "pulling it took longer than {:?} (execution.images.timeout of this server)",
            self.limit
        ))
    }
}

/// Unpacks the image with this digest. If the digest names an index, chooses the image for this machine.
///
/// # Errors
/// `Precondition` for images that are missing, damaged, hostile, too large or not for this machine; `Unavailable` for
/// temporary problems; the errors of the file system.
pub(super) fn pull(
    source: &dyn ImageSource,
    digest: &ImageDigest,
    unpacked: UnpackedImage,
    time: PullTime,
) -> Result<ImageLease> {
    let machine = this_machine();
    let manifest = manifest(source, digest, &machine)?;
    let mut config = CheckedBlob::open(source, &manifest.config)?;
    let bytes = read_bounded(&mut config)?;
    config.check(Ok(()))?;
    let config = ImageConfig::decode(&bytes, &machine).map_err(|problem| {
        Error::Precondition(format!("its configuration {}: {problem}", manifest.config.digest))
    })?;
    let mut steps = 0_u64;
    let mut take = |bytes| {
        time.left()?;
        if steps.is_multiple_of(CHECK_SPACE_EVERY) {
            unpacked.check_disk()?;
        }
        steps += 1;
        unpacked.take(bytes)
    };
    let mut tree = RootTree::new(unpacked.root()?, &mut take);
    for name in &manifest.layers {
        apply(source, name, &mut tree, unpacked.cache(), time, LayerPatience::starting(LAYER_WAIT))?;
    }
    drop(tree);
    let user = user::find(&config.user, unpacked.root()?).map_err(Error::Precondition)?;
    unpacked.finish(CommandSettings { environment: config.environment, user })
}

/// Decides how long a pull waits for a layer that another pull is downloading. Pure.
#[derive(Debug)]
struct LayerPatience {
    wait: Duration,
    /// The bytes that the other pull had received at that time.
    progress: (u64, Instant),
}

impl LayerPatience {
    fn starting(wait: Duration) -> Self {
        Self { wait, progress: (0, Instant::now()) }
    }

    /// Whether the other pull, which has received so many bytes, makes too little progress.
    fn is_over(&mut self, received: u64, now: Instant) -> bool {
        let (earlier, at) = self.progress;
        // Another download may have replaced the one that was seen before.
        if received < earlier || received - earlier >= LAYER_PROGRESS {
            self.progress = (received, now);
            return false;
        }
        now.saturating_duration_since(at) >= self.wait
    }
}

/// Applies a layer. It is downloaded unless it was kept, or another pull downloads it fast enough.
fn apply(
    source: &dyn ImageSource,
    name: &BlobName,
    tree: &mut RootTree<'_>,
    cache: &Arc<ImageCache>,
    time: PullTime,
    mut patience: LayerPatience,
) -> Result<()> {
    let mut unpack = |mut blob: CheckedBlob<'_>| {
        let applied = layer::unpack(&mut blob, tree);
        blob.judge(applied)
    };
    if !source.is_remote() {
        return unpack(CheckedBlob::open(source, name)?).map_err(BlobFault::into_error);
    }
    loop {
        match cache.layer(&name.digest) {
            LayerState::Kept(lease, file) => {
                return unpack(CheckedBlob::reading(Box::new(file), name)).map_err(|fault| match fault {
                    BlobFault::Wrong(error) | BlobFault::Unread(error) => {
                        cache.drop_layer(lease);
                        Error::Unavailable(format!(
                            "a layer that was kept is damaged, and is fetched again: {error}"
                        ))
                    }
                    fault => fault.into_error(),
                });
            }
            LayerState::Absent(new) => {
                let blob = CheckedBlob::open(source, name)?.copied_to(new);
                return unpack(blob).map_err(BlobFault::into_error);
            }
            LayerState::Coming(received) if patience.is_over(received, Instant::now()) => {
                return unpack(CheckedBlob::open(source, name)?).map_err(BlobFault::into_error);
            }
            LayerState::Coming(_) => {
                time.left()?;
                thread::sleep(LAYER_POLL);
            }
        }
    }
}

/// The platform that images must support.
pub(super) fn this_machine() -> Platform {
    Platform::linux(std::env::consts::ARCH)
}

fn manifest(source: &dyn ImageSource, digest: &ImageDigest, machine: &Platform) -> Result<Manifest> {
    let mut digest = digest.clone();
    for _ in 0..=MAX_INDEXES {
        let refuse = |problem: String| Error::Precondition(format!("its document {digest}: {problem}"));
        let bytes = read_document(&mut *source.document(&digest)?, &digest)?;
        match Document::decode(&bytes).map_err(refuse)? {
            Document::Manifest(manifest) => return Ok(manifest),
            Document::Index(index) => digest = index.choose(machine).map_err(refuse)?.digest.clone(),
        }
    }
    Err(Error::Precondition(format!("it lies behind more than {MAX_INDEXES} indexes")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::images::{fixtures::LayerArchive, reference::ImageVersion};
    use std::{
        fs::{self, File},
        io::Read,
    };

    /// A registry with one blob.
    struct OneBlob(Vec<u8>);

    impl ImageSource for OneBlob {
        fn resolve(&self, _: &ImageVersion) -> Result<ImageDigest> {
            Err(Error::internal("it is not asked"))
        }

        fn document<'a>(&'a self, _: &ImageDigest) -> Result<Box<dyn Read + 'a>> {
            Err(Error::internal("it is not asked"))
        }

        fn blob<'a>(&'a self, _: &ImageDigest) -> Result<Box<dyn Read + 'a>> {
            Ok(Box::new(&*self.0))
        }

        fn is_remote(&self) -> bool {
            true
        }
    }

    #[test]
    fn a_pull_waits_for_a_layer_of_any_size_as_long_as_another_pull_makes_progress() {
        let mut patience = LayerPatience::starting(LAYER_WAIT);
        let (_, start) = patience.progress;
        let after = |seconds: u64| start + Duration::from_secs(seconds);
        for step in 1..100 {
            assert!(!patience.is_over(step * LAYER_PROGRESS, after(step * 9)));
        }
        let last = after(99 * 9);
        assert!(!patience.is_over(100 * LAYER_PROGRESS - 1, last + Duration::from_secs(9)));
        assert!(patience.is_over(100 * LAYER_PROGRESS - 1, last + LAYER_WAIT), "it has become slow");
        assert!(!patience.is_over(0, last + LAYER_WAIT), "it began anew");
    }

    #[test]
    fn a_layer_that_another_pull_downloads_slowly_is_downloaded_without_it() {
        let directory = tempfile::tempdir().unwrap();
        let cache = ImageCache::open(&directory.path().join("images"), 1 << 20).unwrap();
        let source = OneBlob(LayerArchive::new().file("f", b"x", 0o644).finish());
        let name = BlobName { digest: ImageDigest::of(&source.0), size: source.0.len() as u64 };
        let LayerState::Absent(slow) = cache.layer(&name.digest) else { panic!("it is not there yet") };
        let root = directory.path().join("root");
        fs::create_dir(&root).unwrap();
        let top = File::open(&root).unwrap();
        let mut take = |_| Ok(());
        let mut tree = RootTree::new(&top, &mut take);
        let time = PullTime::starting(Duration::from_secs(1));
        apply(&source, &name, &mut tree, &cache, time, LayerPatience::starting(Duration::ZERO)).unwrap();
        assert_eq!(fs::read(root.join("f")).unwrap(), b"x");
        assert!(matches!(cache.layer(&name.digest), LayerState::Coming(_)), "the slow pull still has it");
        drop(slow);
    }
}
