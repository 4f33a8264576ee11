//! Container images as root file systems of actions. They are pulled, checked, unpacked without privileges, and kept
//! within a budget.
//!
//! ```text
//! reference, digest, manifest, index     names and documents of images, and the choice of what is evicted
//! layout, registry                       where images come from: a directory of this machine, the distribution API
//! layer, root, user                      the archive of a layer; the tree to which layers are applied; the users in it
//! pull, cache                            one pull; the unpacked images on disk and their leases
//! flights                                running pulls and lookups of tags, shared by all callers with the same need
//! ```
//!
//! The scheduler asks [`Images`] for an image before a task gets a slot, and the worker asks again when the task has
//! one. [`Images`] owns the running pulls. There is one pull for each image, which all callers that need the image wait
//! for. A pull continues after its callers have left. At most [`MAX_PULLS`] run at a time, each ends after
//! `execution.images.timeout`, and a failed pull leaves nothing behind. A failure is remembered for a short time, so
//! that a build of thousands of actions does not ask a registry thousands of times for a missing image. The same holds
//! for look-ups of tags.
//!
//! Only registries and directories in the configuration are contacted. Their content is checked by digest and treated
//! as hostile.

mod cache;
pub mod digest;
mod flights;
mod index;
mod layer;
mod layout;
pub mod manifest;
mod problem;
mod pull;
pub mod reference;
mod registry;
mod root;
mod source;
mod user;

use crate::{
    actors::{
        scheduler::inputs::ImageSupply,
        worker::image_store::{ImageStore, LeasedImage},
    },
    budget::{Bounds, Budget},
    caller::{Caller, Peer},
    disk::BudgetUse,
    host::ImageRegistry,
    logging::Event,
};
use arc_swap::ArcSwap;
use cache::{ImageCache, ImageLease};
use digest::ImageDigest;
use flights::ImageFlights;
use futures::future::{BoxFuture, ready};
use gorego_reapi::error::{Error, Result};
use layout::LayoutDirectory;
use problem::LayerProblem;
use pull::PullTime;
use reference::{ImageOrigin, ImageReference, ImageVersion};
use registry::{RegistryClients, Repository};
use root::RootTree;
use source::ImageSource;
use std::{
    collections::HashMap,
    fs::File,
    path::{Path, PathBuf},
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};
use tokio::{runtime::Handle, time::timeout};

/// Target of this module's log lines.
const LOG: &str = "gorego::images";
/// Maximum number of concurrent pulls. Each pull decompresses layers, so more pulls would only compete for the CPUs.
/// The clients of one address get four of them.
const MAX_PULLS: u64 = 6;
/// Maximum number of concurrent look-ups of tags. Each takes a thread, which mostly waits.
const MAX_LOOKUPS: u64 = 18;
/// Time limit for looking up a tag.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(60);
/// How often a worker that waits for an image checks whether it must stop waiting, because cancellation is a flag
/// without an event.
const WAIT_POLL: Duration = Duration::from_millis(50);

/// Maximum number of tags whose first digest is remembered.
const MAX_TAGS: usize = 10_000;

const IMAGE_PULLED: &str = "image_pulled";
const IMAGE_NOT_READY: &str = "image_not_ready";
const IMAGE_FAILED: &str = "image_failed";

/// The settings of images; `config::ImagesConfig` documents each.
#[derive(Debug, Clone)]
pub struct ImageSettings {
    /// Registries that may be contacted.
    pub registries: Vec<ImageRegistry>,
    /// How images that are named by a tag instead of a digest are treated.
    pub tags: TagPolicy,
    /// A Docker `config.json` with credentials for registries.
    pub credentials: Option<PathBuf>,
    /// Directories below which layout directories may lie.
    pub layouts: Vec<PathBuf>,
    /// Limit on all unpacked images together.
    pub max_bytes: u64,
    /// Time limit of one pull.
    pub timeout: Duration,
}

/// How the tag of an image in a registry is resolved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TagPolicy {
    /// It is not resolved: such an image is refused.
    Refuse,
    /// The digest that the registry has for it when an action is about to run.
    EachAction,
    /// The digest that the registry had for it when this server first used it.
    Once,
}

/// The images of a server. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Images(Arc<ImagesState>);

#[derive(Debug)]
struct ImagesState {
    settings: ArcSwap<ImageSettings>,
    cache: Arc<ImageCache>,
    registries: RegistryClients,
    runtime: Handle,
    /// The digests of tags when they were first used.
    tags: Mutex<HashMap<ImageReference, ImageDigest>>,
    lookups: ImageFlights<ImageReference, ImageDigest>,
    /// The pulls, by origin and digest. An image that one origin does not have may be available from another.
    pulls: ImageFlights<(ImageOrigin, ImageDigest), Arc<ImageLease>>,
}

impl Images {
    /// Opens the images in a directory of the build root, which this process must have locked. Requests to registries
    /// run on `runtime`.
    ///
    /// # Errors
    /// The errors of the file system.
    pub fn open(settings: ImageSettings, build_root: &Path, runtime: Handle) -> Result<Self> {
        let registries = RegistryClients::new(runtime.clone(), settings.credentials.clone());
        let cache = ImageCache::open(&build_root.join("images"), settings.max_bytes)?;
        let places = |what, most| Budget::new(Bounds::shared(what, most));
        Ok(Self(Arc::new(ImagesState {
            settings: ArcSwap::from_pointee(settings),
            cache,
            registries,
            runtime,
            tags: Mutex::default(),
            lookups: ImageFlights::new("gorego-tag", places("lookups of image tags", MAX_LOOKUPS)),
            pulls: ImageFlights::new("gorego-pull", places("pulls of images", MAX_PULLS)),
        })))
    }

    /// Pulls images in the background before actions ask for them, one after the other. Failures are logged, and the
    /// pull is tried again when an action asks for the image.
    pub fn prefetch(&self, names: Vec<String>) {
        let images = self.clone();
        let fetch = move || {
            for name in &names {
                let fetched = images.lease(name, Peer::default(), &|| Ok(()));
                if let Err(error @ (Error::Invalid(_) | Error::Precondition(_))) = fetched {
                    Event::warn(LOG, IMAGE_NOT_READY)
                        .with("image", &**name)
                        .with_shown("error", &error)
                        .log(format_args!("an image that a pool names cannot be used: {error}"));
                }
            }
        };
        // Without a thread, the first action of each image waits for its pull.
        let _ = thread::Builder::new().name("gorego-prefetch".into()).spawn(fetch);
    }

    /// The space that the unpacked images take.
    pub(crate) fn usage(&self) -> BudgetUse {
        self.0.cache.usage()
    }

    fn tags(&self) -> MutexGuard<'_, HashMap<ImageReference, ImageDigest>> {
        self.0.tags.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes which images actions may name. Running pulls and unpacked images are not affected.
    pub(crate) fn allow(&self, registries: Vec<ImageRegistry>, layouts: Vec<PathBuf>, tags: TagPolicy) {
        let settings = ImageSettings { registries, layouts, tags, ..(*self.settings()).clone() };
        self.0.settings.store(Arc::new(settings));
    }

    fn settings(&self) -> Arc<ImageSettings> {
        self.0.settings.load_full()
    }

    /// The registry of an image, if it has one. Origins that are not configured are refused.
    fn check_origin<'a>(
        settings: &'a ImageSettings,
        origin: &ImageOrigin,
    ) -> Result<Option<&'a ImageRegistry>> {
        match origin {
            ImageOrigin::Layout(path) => layout::check_path(path, &settings.layouts).map(|_| None),
            ImageOrigin::Registry { registry: host, .. } => {
                let registry = settings.registries.iter().find(|registry| registry.host == *host);
                registry.map(Some).ok_or_else(|| {
                    Error::Precondition(format!(
                        "the registry {host} is not among execution.images.registries of this server"
                    ))
                })
            }
        }
    }

    /// The source of an image, if it is allowed.
    fn source<'a>(
        &'a self,
        settings: &'a ImageSettings,
        reference: &'a ImageReference,
        time: PullTime,
    ) -> Result<Box<dyn ImageSource + 'a>> {
        let registry = Self::check_origin(settings, &reference.origin)?;
        match (&reference.origin, registry) {
            (ImageOrigin::Registry { repository, .. }, Some(registry)) => {
                Ok(Box::new(Repository::new(&self.0.registries, registry, repository, time)?))
            }
            (ImageOrigin::Layout(path), _) => Ok(Box::new(LayoutDirectory::open(path, &settings.layouts)?)),
            (ImageOrigin::Registry { .. }, None) => Err(Error::internal("a registry was not checked")),
        }
    }

    /// The unpacked image with this name. `lease` looks for it in the cache before it is pulled.
    async fn obtain(
        &self,
        reference: &ImageReference,
        caller: Caller,
        lease: fn(&Arc<ImageCache>, &ImageDigest) -> Option<ImageLease>,
    ) -> Result<Arc<ImageLease>> {
        let digest = self.resolve(reference, caller).await.map_err(|error| about(reference, error))?;
        let known = || lease(&self.0.cache, &digest).map(Arc::new);
        let (images, own, wanted) = (self.clone(), reference.clone(), digest.clone());
        let pull = move || images.pull(&own, &wanted).map(Arc::new);
        self.0.pulls.join(&(reference.origin.clone(), digest.clone()), caller, known, pull).await
    }

    /// The digest of an image whose origin is allowed.
    async fn resolve(&self, reference: &ImageReference, caller: Caller) -> Result<ImageDigest> {
        let settings = self.settings();
        Self::check_origin(&settings, &reference.origin)?;
        if let ImageVersion::Digest(digest) = &reference.version {
            return Ok(digest.clone());
        }
        let is_layout = matches!(reference.origin, ImageOrigin::Layout(_));
        let policy = if is_layout { TagPolicy::EachAction } else { settings.tags };
        if policy == TagPolicy::Refuse {
            return Err(Error::Precondition(
                "it is named by a tag, which may name another image later; name it by its digest, or see \
                 execution.images.tags of this server"
                    .into(),
            ));
        }
        let once = policy == TagPolicy::Once;
        let known = || once.then(|| self.tags().get(reference).cloned()).flatten();
        let (images, own) = (self.clone(), reference.clone());
        let look_up = move || {
            let digest = images.look_up(&own)?;
            if once {
                images.remember(own, &digest);
            }
            Ok(digest)
        };
        self.0.lookups.join(reference, caller, known, look_up).await
    }

    /// The current digest of a tag. Blocks.
    fn look_up(&self, reference: &ImageReference) -> Result<ImageDigest> {
        let settings = self.settings();
        let time = PullTime::starting(settings.timeout.min(LOOKUP_TIMEOUT));
        self.source(&settings, reference, time)?.resolve(&reference.version)
    }

    fn remember(&self, reference: ImageReference, digest: &ImageDigest) {
        let mut tags = self.tags();
        if tags.len() >= MAX_TAGS {
            tags.clear();
        }
        tags.entry(reference).or_insert_with(|| digest.clone());
    }

    /// Pulls an image that is not unpacked yet. Blocks.
    fn pull(&self, reference: &ImageReference, digest: &ImageDigest) -> Result<ImageLease> {
        let begun = Instant::now();
        let settings = self.settings();
        let time = PullTime::starting(settings.timeout);
        let cache = &self.0.cache;
        let pull = || {
            let source = self.source(&settings, reference, time)?;
            let unpacked = loop {
                if let Some(there) = cache.lease(digest) {
                    return Ok(there);
                }
                if let Some(unpacked) = cache.begin(digest)? {
                    break unpacked;
                }
                // Another pull fetches the same image from another origin, or the image is being removed.
                time.left()?;
                thread::sleep(WAIT_POLL);
            };
            pull::pull(&*source, digest, unpacked, time)
        };
        let outcome = pull().map_err(|error| about(reference, error));
        let elapsed = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        match &outcome {
            Ok(_) => Event::info(LOG, IMAGE_PULLED)
                .with_shown("image", reference)
                .with_shown("digest", digest)
                .with("elapsed_ms", elapsed)
                .log(format_args!("an image was pulled and unpacked")),
            Err(error) => Event::warn(LOG, IMAGE_FAILED)
                .with_shown("image", reference)
                .with_shown("digest", digest)
                .with("grpc_code", error.code_name())
                .with_shown("error", error)
                .with("elapsed_ms", elapsed)
                .log(format_args!("an image could not be pulled")),
        }
        outcome
    }
}

impl ImageStore for Images {
    fn lease(&self, name: &str, peer: Peer, check: &dyn Fn() -> Result<()>) -> Result<LeasedImage> {
        let reference = ImageReference::parse(name).map_err(Error::Invalid)?;
        let lease = self.0.runtime.block_on(async {
            let caller = Caller::without_connection(peer);
            let mut obtained = pin!(self.obtain(&reference, caller, ImageCache::lease));
            loop {
                match timeout(WAIT_POLL, obtained.as_mut()).await {
                    Ok(obtained) => return obtained,
                    Err(_) => check()?,
                }
            }
        })?;
        Ok(LeasedImage {
            root: lease.root(),
            environment: lease.settings().environment.clone(),
            user: lease.settings().user,
            lease: Box::new(lease),
        })
    }

    fn relieve_disk(&self) {
        self.0.cache.remove_unused();
    }
}

impl ImageSupply for Images {
    fn bring(&self, name: &str, caller: Caller) -> BoxFuture<'static, Result<()>> {
        let reference = match ImageReference::parse(name) {
            Ok(reference) => reference,
            Err(problem) => return Box::pin(ready(Err(Error::Invalid(problem)))),
        };
        let images = self.clone();
        // This runs on a thread of the runtime, so it does not access the disk. The worker checks the image.
        Box::pin(
            async move { images.obtain(&reference, caller, ImageCache::lease_unchecked).await.map(drop) },
        )
    }
}

/// Applies layers to an empty directory, the lowest first. `max_bytes` bounds the space that they may take on disk,
/// with 4 KiB for each entry. For tests of hostile layers.
///
/// # Errors
/// `Precondition` for layers that are damaged, hostile or too large; the errors of the file system.
pub fn apply_layers(directory: &File, layers: &[&[u8]], max_bytes: u64) -> Result<()> {
    let mut left = max_bytes;
    let mut take = |bytes: u64| {
        let enough = left.checked_sub(bytes);
        left = enough.ok_or_else(|| Error::Precondition("the layers are too large".into()))?;
        Ok(())
    };
    let mut tree = RootTree::new(directory, &mut take);
    layers.iter().try_for_each(|layer| match layer::unpack(*layer, &mut tree) {
        Ok(()) => Ok(()),
        Err(LayerProblem::Refused(problem)) => Err(Error::Precondition(problem)),
        Err(LayerProblem::Failed(error)) => Err(error),
    })
}

/// Puts the name of the image in front of the message of an error.
fn about(reference: &ImageReference, error: Error) -> Error {
    let of_image = |message: String| format!("image {reference}: {message}");
    match error {
        Error::Precondition(message) => Error::Precondition(of_image(message)),
        Error::Unavailable(message) => Error::Unavailable(of_image(message)),
        Error::Internal(message) => Error::Internal(of_image(message)),
        Error::DiskFull(message) => Error::DiskFull(of_image(message)),
        other => other,
    }
}

#[cfg(test)]
#[path = "../tests/support/images.rs"]
mod fixtures;
#[cfg(test)]
mod tests;
