//! Container images as root file systems of actions: pulled, checked, unpacked without privileges, and kept within a budget.
//!
//! ```text
//! reference, digest, manifest, index     names, documents and the choice of what goes (pure)
//! layout, registry                       where images come from: a directory of this machine, the distribution API
//! layer, root, user                      the archive of a layer; the tree to which layers are applied; the names of users in it
//! pull, cache                            one pull; the unpacked images on disk and their leases
//! ```
//!
//! [`Images`] is what workers ask. It owns the pulls that are under way: there is one for each image, which all who want the
//! image wait for, on a thread of its own. A pull goes on when those who asked for it have left; there are at most
//! [`MAX_PULLS`], each ends after `execution.images.timeout`, and nothing of a failed one stays. A failure is remembered for
//! a moment, so that a build of thousands of actions does not ask a registry thousands of times for an image that it has not.
//!
//! Only registries and directories that the configuration lists are contacted. What comes from them is checked by digest and
//! treated as hostile.

mod cache;
pub mod digest;
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
    actors::worker::image_store::{ImageStore, LeasedImage},
    disk::BudgetUse,
    host::ImageRegistry,
    logging::Event,
};
use arc_swap::ArcSwap;
use cache::{ImageCache, ImageLease};
use digest::ImageDigest;
use gorego_reapi::error::{Error, Result};
use layout::LayoutDirectory;
use problem::LayerProblem;
use pull::PullTime;
use reference::{ImageOrigin, ImageReference, ImageVersion};
use registry::{RegistryClient, Repository};
use root::RootTree;
use source::ImageSource;
use std::{
    collections::HashMap,
    fs::File,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError},
    thread,
    time::{Duration, Instant},
};
use tokio::runtime::Handle;

/// Target of this room's log lines.
const LOG: &str = "gorego::images";
/// How many images are pulled at the same time. Each pull decompresses, so more would only compete for the CPUs.
const MAX_PULLS: usize = 4;
/// How long the failure of a pull is the answer to everybody who asks for the image.
const FAILURE_KEPT: Duration = Duration::from_secs(5);
/// Time limit of finding out what a tag means.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(60);
/// How often somebody who waits for a pull looks whether to go on waiting.
const WAIT_POLL: Duration = Duration::from_millis(50);

/// How many tags are remembered with what they meant when they were first used.
const MAX_TAGS: usize = 10_000;

const IMAGE_PULLED: &str = "image_pulled";
const IMAGE_NOT_READY: &str = "image_not_ready";
const IMAGE_FAILED: &str = "image_failed";

/// The settings of images; `config::ImagesConfig` documents each.
#[derive(Debug, Clone)]
pub struct ImageSettings {
    /// Registries that may be contacted.
    pub registries: Vec<ImageRegistry>,
    /// What becomes of images of registries that have a tag and no digest.
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

/// What the tag of an image in a registry means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TagPolicy {
    /// Nothing: such an image is refused.
    Refuse,
    /// What the registry has under it when an action is about to run.
    EachAction,
    /// What the registry had under it when this server used it first.
    Once,
}

/// The images of a server. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Images(Arc<ImagesState>);

#[derive(Debug)]
struct ImagesState {
    settings: ArcSwap<ImageSettings>,
    cache: Arc<ImageCache>,
    registries: RegistryClient,
    /// What tags meant when they were first used.
    tags: Mutex<HashMap<ImageReference, ImageDigest>>,
    pulls: Mutex<Pulls>,
    /// A pull has ended.
    ended: Condvar,
}

/// Pulls by what they read. What one origin does not have, another may have.
type Pulls = HashMap<(ImageOrigin, ImageDigest), Arc<ImagePull>>;

/// A pull that is under way, or has failed a moment ago.
#[derive(Debug, Default)]
struct ImagePull {
    /// How it ended, and when. An image is leased until all who wait for it have seen this.
    outcome: OnceLock<(Instant, Result<ImageLease>)>,
}

impl ImagePull {
    /// Why it has failed, if it has.
    fn failure(&self) -> Option<&Error> {
        self.outcome.get()?.1.as_ref().err()
    }
}

impl Images {
    /// Opens the images in a directory of the build root, which this process must have locked. Requests to registries run on
    /// `runtime`.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn open(settings: ImageSettings, build_root: &Path, runtime: Handle) -> Result<Self> {
        let registries = RegistryClient::new(runtime, settings.credentials.clone());
        let cache = ImageCache::open(&build_root.join("images"), settings.max_bytes)?;
        Ok(Self(Arc::new(ImagesState {
            settings: ArcSwap::from_pointee(settings),
            cache,
            registries,
            tags: Mutex::default(),
            pulls: Mutex::default(),
            ended: Condvar::new(),
        })))
    }

    /// Pulls images ahead of the actions that ask for them, one after the other, in the background. Failures are logged, and
    /// tried again when an action asks.
    pub fn prefetch(&self, names: Vec<String>) {
        let images = self.clone();
        let fetch = move || {
            for name in &names {
                let fetched = images.lease(name, &|| Ok(()));
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

    /// What the unpacked images take.
    pub(crate) fn usage(&self) -> BudgetUse {
        self.0.cache.usage()
    }

    fn pulls(&self) -> MutexGuard<'_, Pulls> {
        self.0.pulls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces which images actions may name. Pulls that are under way and images that are unpacked are not affected.
    pub(crate) fn allow(&self, registries: Vec<ImageRegistry>, layouts: Vec<PathBuf>, tags: TagPolicy) {
        let settings = ImageSettings { registries, layouts, tags, ..(*self.settings()).clone() };
        self.0.settings.store(Arc::new(settings));
    }

    fn settings(&self) -> Arc<ImageSettings> {
        self.0.settings.load_full()
    }

    /// The registry of an image, if it has one. An origin that is not listed is refused.
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

    /// Where the image of this name comes from, if that is allowed.
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

    /// The digest of an image whose origin is allowed.
    fn resolve(&self, reference: &ImageReference) -> Result<ImageDigest> {
        let settings = self.settings();
        Self::check_origin(&settings, &reference.origin)?;
        let is_layout = matches!(reference.origin, ImageOrigin::Layout(_));
        let policy = if is_layout { TagPolicy::EachAction } else { settings.tags };
        match (&reference.version, policy) {
            (ImageVersion::Digest(digest), _) => Ok(digest.clone()),
            (_, TagPolicy::EachAction) => self.resolve_now(reference),
            (_, TagPolicy::Once) => self.resolve_once(reference),
            (_, TagPolicy::Refuse) => Err(Error::Precondition(
                "it is named by a tag, which may mean another image tomorrow; name it by its digest, or see \
                 execution.images.tags of this server"
                    .into(),
            )),
        }
    }

    fn resolve_now(&self, reference: &ImageReference) -> Result<ImageDigest> {
        let settings = self.settings();
        let time = PullTime::starting(settings.timeout.min(RESOLVE_TIMEOUT));
        self.source(&settings, reference, time)?.resolve(&reference.version)
    }

    fn resolve_once(&self, reference: &ImageReference) -> Result<ImageDigest> {
        let tags = || self.0.tags.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(digest) = tags().get(reference) {
            return Ok(digest.clone());
        }
        let digest = self.resolve_now(reference)?;
        let mut tags = tags();
        if tags.len() >= MAX_TAGS {
            tags.clear();
        }
        Ok(tags.entry(reference.clone()).or_insert(digest).clone())
    }

    fn obtain(&self, reference: &ImageReference, check: &dyn Fn() -> Result<()>) -> Result<ImageLease> {
        let digest = self.resolve(reference).map_err(|error| about(reference, error))?;
        let mut joined: Option<Arc<ImagePull>> = None;
        loop {
            let mut pulls = self.pulls();
            // An image that was pulled meanwhile is leased by its pull, for as long as `joined` holds that.
            if let Some(lease) = self.0.cache.lease(&digest) {
                return Ok(lease);
            }
            joined = self.join(reference, &digest, &mut pulls)?.or(joined);
            if let Some(error) = joined.as_ref().and_then(|pull| pull.failure()) {
                return Err(error.clone());
            }
            drop(self.0.ended.wait_timeout(pulls, WAIT_POLL).unwrap_or_else(PoisonError::into_inner));
            check()?;
        }
    }

    /// The pull of this image from this origin, which may have failed a moment ago. It is started if that is possible now: not
    /// beside too many others, and not beside one that brings the same image from elsewhere.
    fn join(
        &self,
        reference: &ImageReference,
        digest: &ImageDigest,
        pulls: &mut Pulls,
    ) -> Result<Option<Arc<ImagePull>>> {
        pulls.retain(|_, pull| pull.outcome.get().is_none_or(|(at, _)| at.elapsed() < FAILURE_KEPT));
        if let Some(pull) = pulls.get(&(reference.origin.clone(), digest.clone())) {
            return Ok(Some(pull.clone()));
        }
        let running = || pulls.iter().filter(|(_, pull)| pull.outcome.get().is_none()).map(|(key, _)| key);
        let may_start = running().count() < MAX_PULLS && running().all(|(_, other)| other != digest);
        may_start.then(|| self.start(reference, digest, pulls)).transpose()
    }

    /// Starts a pull on a thread of its own.
    fn start(
        &self,
        reference: &ImageReference,
        digest: &ImageDigest,
        pulls: &mut Pulls,
    ) -> Result<Arc<ImagePull>> {
        let pull = Arc::new(ImagePull::default());
        let key = (reference.origin.clone(), digest.clone());
        let (images, reference, wanted, own) =
            (self.clone(), reference.clone(), digest.clone(), pull.clone());
        let run = move || {
            let pulled = AssertUnwindSafe(|| images.pull(&reference, &wanted));
            let outcome = catch_unwind(pulled)
                .unwrap_or_else(|_| Err(Error::internal("the thread that pulled an image panicked")));
            let mut pulls = images.pulls();
            if outcome.is_ok() {
                pulls.remove(&(reference.origin, wanted));
            }
            let _ = own.outcome.set((Instant::now(), outcome));
            // From here on the image is leased by those who wait for it, if there are any.
            drop(own);
            images.0.ended.notify_all();
        };
        let thread = thread::Builder::new().name("gorego-pull".into());
        thread.spawn(run).map_err(|error| Error::io("start a thread that pulls an image", &error))?;
        pulls.insert(key, pull.clone());
        Ok(pull)
    }

    fn pull(&self, reference: &ImageReference, digest: &ImageDigest) -> Result<ImageLease> {
        let begun = Instant::now();
        let settings = self.settings();
        let time = PullTime::starting(settings.timeout);
        let pull = || {
            let source = self.source(&settings, reference, time)?;
            match self.0.cache.begin(digest)? {
                Some(unpacked) => pull::pull(&*source, digest, unpacked, time),
                None => {
                    let there = self.0.cache.lease(digest);
                    there.ok_or_else(|| Error::Unavailable("it was removed again meanwhile".into()))
                }
            }
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
    fn lease(&self, name: &str, check: &dyn Fn() -> Result<()>) -> Result<LeasedImage> {
        let reference = ImageReference::parse(name).map_err(Error::Invalid)?;
        let lease = self.obtain(&reference, check)?;
        Ok(LeasedImage {
            root: lease.root(),
            environment: lease.terms().environment.clone(),
            user: lease.terms().user,
            lease: Box::new(lease),
        })
    }

    fn relieve_disk(&self) {
        self.0.cache.remove_unused();
    }
}

/// Applies layers to an empty directory, the lowest first. `max_bytes` bounds what they may take on disk, with 4 KiB for each
/// entry. For tests of hostile layers.
///
/// # Errors
/// `Precondition` for layers that are damaged, hostile or too large; those of the file system.
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

/// Says of which image an error speaks.
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
