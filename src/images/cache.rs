//! [`ImageCache`]: the unpacked images on disk.
//!
//! ```text
//! <build_root>/images/sha256-<digits>/root/         the root file system of an image, which is never changed
//! <build_root>/images/sha256-<digits>/image.json    its environment and size, and when it was last used (mtime)
//! <build_root>/images/layer-<..>-sha256-<digits>    a compressed layer, kept for other images that have it
//! <build_root>/images/new-<number>                  an image that is being unpacked, or a layer that is downloaded
//! <build_root>/images/old-<number>                  one that is being removed
//! ```
//!
//! An image directory is renamed to its name when it is complete. Images stay after a restart of the server, but not
//! after a restart of the machine: nothing waits for the disk while they are written, and files that a power cut has
//! damaged could not be detected.
//!
//! Each image is a whole directory. Images with common layers do not share files, only downloads ([`layers`]). In
//! return, the file system need not support overlays, an action's root is one mount however many layers there are, and
//! whiteouts are processed once.

pub(super) mod layers;
mod unpacked;

pub(super) use self::unpacked::UnpackedImage;

use super::{
    LOG,
    digest::ImageDigest,
    index::{CopyId, ImageIndex, Spare},
};
use crate::{
    actors::worker::{build_root, dir},
    disk::BudgetUse,
    logging::Event,
    regular_file,
    sandbox::identity::InnerUser,
};
use gorego_reapi::error::{Error, Result};
use rustix::{
    fs::{self as rfs, AtFlags, Mode, RenameFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT},
    io::Errno,
};
use serde::{Deserialize, Serialize};
use std::{
    ffi::{OsStr, OsString},
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

const IMAGES_EVICTED: &str = "images_evicted";
const IMAGE_NOT_REMOVED: &str = "image_not_removed";

/// How many names are tried for a new directory. Only leftovers can have taken many names.
const NAME_ATTEMPTS: usize = 10_000;
/// Maximum size of the description of an unpacked image.
const MAX_DESCRIPTION_BYTES: u64 = 1024 * 1024;
/// The file with the description.
const DESCRIPTION: &str = "image.json";
/// Prefix of the names of layers.
const LAYER: &str = "layer-";
/// Prefix of the names of images that are being unpacked, and of layers that are being downloaded.
const NEW: &str = "new-";
/// Prefix of the names of entries that are being removed.
const OLD: &str = "old-";
/// The directory with the root file system.
const ROOT: &str = "root";
/// The file whose content changes at each start of the machine.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The unpacked images of one directory.
#[derive(Debug)]
pub(super) struct ImageCache {
    path: PathBuf,
    /// The directory at the path.
    directory: Mutex<Arc<File>>,
    boot: Option<String>,
    index: Mutex<ImageIndex<CacheKey, Arc<StoredImage>>>,
    next: AtomicU64,
}

/// The kinds of entries that share the budget.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum CacheKey {
    /// An image that is unpacked into a directory of its own.
    Image(ImageDigest),
    /// A layer as it was downloaded.
    Layer(ImageDigest),
}

impl Spare for CacheKey {
    fn is_spare(&self) -> bool {
        matches!(self, Self::Layer(_))
    }
}

/// An unpacked image, or a layer.
#[derive(Debug)]
struct StoredImage {
    name: OsString,
    /// The identity of the root directory, or of the file of a layer.
    id: dir::FileIdentity,
    settings: CommandSettings,
}

/// The settings of an image for commands, besides its files.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct CommandSettings {
    /// Environment variables for commands that do not set them.
    pub environment: Vec<(String, String)>,
    /// The user of the command; the default user if this is `None`.
    pub user: Option<InnerUser>,
}

/// A lease of an image, which keeps it from being removed.
#[derive(Debug)]
pub(super) struct ImageLease {
    cache: Arc<ImageCache>,
    key: CacheKey,
    copy: CopyId,
    image: Arc<StoredImage>,
}

/// The content of `image.json`.
#[derive(Debug, Serialize, Deserialize)]
struct Description {
    boot: String,
    bytes: u64,
    environment: Vec<(String, String)>,
    user: Option<(u32, u32)>,
}

impl ImageCache {
    /// Opens the cache. Images of an earlier run stay, as far as there is room; the least recently used ones are
    /// removed. Leftovers are removed in the background.
    ///
    /// # Errors
    /// The errors of the file system.
    pub(super) fn open(path: &Path, max_bytes: u64) -> Result<Arc<Self>> {
        let doing =
            |error: io::Error| Error::io(&format!("open the directory of images {}", path.display()), &error);
        let boot = fs::read_to_string(BOOT_ID).ok().map(|id| id.trim().to_owned());
        let cache = Self {
            path: path.to_owned(),
            directory: Mutex::new(Arc::new(open_directory(path).map_err(doing)?)),
            boot,
            index: Mutex::new(ImageIndex::new(max_bytes)),
            next: AtomicU64::new(0),
        };
        let cache = Arc::new(cache);
        let unused = cache.restore().map_err(doing)?;
        if !unused.is_empty() {
            let cache = cache.clone();
            let remove = move || unused.iter().for_each(|name| cache.remove(&cache.directory(), name));
            // Without a thread, the next start removes them.
            let _ = thread::Builder::new().name("gorego-images".into()).spawn(remove);
        }
        Ok(cache)
    }

    /// Adds the images of earlier runs. Returns the entries that must be removed.
    fn restore(&self) -> io::Result<Vec<OsString>> {
        let directory = self.directory();
        let (mut images, mut unused) = (Vec::new(), Vec::new());
        for entry in dir::entries(&directory)? {
            let name = dir::entry_name(&entry?).to_owned();
            match digest_of(&name) {
                Some(digest) => match self.describe(&directory, &name) {
                    Some((image, bytes, used)) => images.push((used, CacheKey::Image(digest), image, bytes)),
                    None => unused.extend(self.set_aside(&directory, &name)),
                },
                None if has_prefix(&name, LAYER) => match self.restored_layer(&directory, &name) {
                    Some((key, image, bytes, used)) => images.push((used, key, image, bytes)),
                    None => unused.extend(self.set_aside(&directory, &name)),
                },
                None if is_numbered(&name, OLD) => unused.push(name),
                None if is_numbered(&name, NEW) => unused.extend(self.set_aside(&directory, &name)),
                None => {}
            }
        }
        images.sort_by_key(|(used, ..)| *used);
        let mut index = self.index();
        for (_, key, image, bytes) in images {
            let evicted = index.restore(key, Arc::new(image), bytes);
            unused.extend(evicted.iter().filter_map(|(_, image)| self.set_aside(&directory, &image.name)));
            index.left(&evicted);
        }
        Ok(unused)
    }

    /// Reads the description of an image; `None` if it cannot be trusted.
    fn describe(&self, directory: &File, name: &OsStr) -> Option<(StoredImage, u64, (i64, i64))> {
        let inside = dir::open_dir(directory, name).ok()?;
        let file = dir::open_file(&inside, OsStr::new(DESCRIPTION)).ok()?;
        let metadata = file.metadata().ok().filter(fs::Metadata::is_file)?;
        let bytes = regular_file::read_open(&file, MAX_DESCRIPTION_BYTES).ok()?;
        let Description { boot, bytes, environment, user } = serde_json::from_slice(&bytes).ok()?;
        let root = dir::stat_at(&inside, OsStr::new(ROOT)).ok()?;
        let is_whole = dir::file_type(&root) == rfs::FileType::Directory && Some(boot) == self.boot;
        let image = StoredImage {
            name: name.to_owned(),
            id: dir::file_id(&root),
            settings: CommandSettings {
                environment,
                user: user.map(|(user, group)| InnerUser { user, group }),
            },
        };
        is_whole.then_some((image, bytes, (metadata.mtime(), metadata.mtime_nsec())))
    }

    fn index(&self) -> MutexGuard<'_, ImageIndex<CacheKey, Arc<StoredImage>>> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The space that the images take.
    pub(super) fn usage(&self) -> BudgetUse {
        self.index().usage()
    }

    /// Leases an image, if it is in the cache. Accesses the disk.
    pub(super) fn lease(self: &Arc<Self>, digest: &ImageDigest) -> Option<ImageLease> {
        let lease = self.lease_unchecked(digest)?;
        // Another process may have removed it.
        let is_there = rfs::lstat(lease.root()).is_ok_and(|stat| dir::file_id(&stat) == lease.image.id);
        if !is_there {
            self.index().forget(&lease.key, lease.copy);
            return None;
        }
        self.touch(Path::new(&lease.image.name).join(DESCRIPTION));
        Some(lease)
    }

    /// Leases an image that was in the cache. Does not access the disk, from which another process may have removed it.
    pub(super) fn lease_unchecked(self: &Arc<Self>, digest: &ImageDigest) -> Option<ImageLease> {
        let key = CacheKey::Image(digest.clone());
        let (copy, image) = self.index().lease(&key)?;
        Some(ImageLease { cache: self.clone(), key, copy, image })
    }

    /// Records the time of the last use for the next start of the server.
    fn touch(&self, path: impl AsRef<Path>) {
        let omit = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
        let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
        let times = Timestamps { last_access: omit, last_modification: now };
        let _ = rfs::utimensat(self.directory(), path.as_ref(), &times, AtFlags::SYMLINK_NOFOLLOW);
    }

    /// The directory at the path.
    fn directory(&self) -> Arc<File> {
        self.directory.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The directory at the path. It is created again if it was removed.
    fn recreated_directory(&self) -> Arc<File> {
        let mut directory = self.directory.lock().unwrap_or_else(PoisonError::into_inner);
        let id = |stat: rfs::Stat| dir::file_id(&stat);
        let is_there = rfs::lstat(&self.path).ok().map(id) == rfs::fstat(&**directory).ok().map(id);
        if !is_there && let Ok(made) = open_directory(&self.path) {
            *directory = Arc::new(made);
        }
        directory.clone()
    }

    /// Removes all images that no action uses, to free space on a full disk.
    pub(super) fn remove_unused(&self) {
        let unused = self.index().take_unused();
        self.evict(&unused);
    }

    /// Removes entries that were taken out of the index. The index is not locked while the disk is accessed, because
    /// the threads of the runtime use it.
    fn evict(&self, evicted: &[(CacheKey, Arc<StoredImage>)]) {
        let directory = self.directory();
        // Rename them first, so that their names are free for later images.
        let aside = |(key, image): &(CacheKey, Arc<StoredImage>)| {
            Some((matches!(key, CacheKey::Layer(_)), self.set_aside(&directory, &image.name)?))
        };
        let names: Vec<_> = evicted.iter().filter_map(aside).collect();
        self.index().left(evicted);
        if names.is_empty() {
            return;
        }
        names.iter().for_each(|(_, name)| self.remove(&directory, name));
        let layers = names.iter().filter(|(is_layer, _)| *is_layer).count();
        let images = names.len() - layers;
        Event::info(LOG, IMAGES_EVICTED).with("images", images).with("layers", layers).log(format_args!(
            "{images} unpacked images and {layers} kept layers were removed because room was needed"
        ));
    }

    /// Renames an unused image to the name of an entry that is being removed. `None` if the image is gone.
    fn set_aside(&self, directory: &File, name: &OsStr) -> Option<OsString> {
        let aside =
            |aside: &OsStr| rfs::renameat_with(directory, name, directory, aside, RenameFlags::NOREPLACE);
        self.numbered(OLD, aside).ok()
    }

    fn remove(&self, directory: &File, name: &OsStr) {
        // Layers are files, so try that first.
        let removed = match rfs::unlinkat(directory, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(_) => build_root::remove(directory, name),
        };
        if let Err(error) = removed {
            Event::warn(LOG, IMAGE_NOT_REMOVED)
                .with_shown("name", &name.display())
                .with_shown("error", &error)
                .log(format_args!("an unpacked image could not be removed; the next start tries again"));
        }
    }

    /// Tries numbered names with this prefix until one is free.
    fn numbered(
        &self,
        prefix: &str,
        mut take: impl FnMut(&OsStr) -> Result<(), Errno>,
    ) -> io::Result<OsString> {
        for _ in 0..NAME_ATTEMPTS {
            let name = OsString::from(format!("{prefix}{}", self.next.fetch_add(1, Ordering::Relaxed)));
            match take(&name) {
                Ok(()) => return Ok(name),
                Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(Errno::EXIST.into())
    }
}

impl ImageLease {
    /// Absolute path of the root file system.
    pub(super) fn root(&self) -> PathBuf {
        self.cache.path.join(&self.image.name).join(ROOT)
    }

    pub(super) fn settings(&self) -> &CommandSettings {
        &self.image.settings
    }
}

impl Drop for ImageLease {
    fn drop(&mut self) {
        self.cache.index().release(&self.key, self.copy);
    }
}

fn open_directory(path: &Path) -> io::Result<File> {
    fs::create_dir_all(path)?;
    let directory = File::open(path)?;
    // Other users of this machine must not access the programs of an image.
    rfs::fchmod(&directory, Mode::RWXU)?;
    Ok(directory)
}

/// The name of an image's directory.
fn name_of(digest: &ImageDigest) -> OsString {
    format!("{}-{}", digest.algorithm(), digest.hex()).into()
}

/// The image whose directory has this name.
fn digest_of(name: &OsStr) -> Option<ImageDigest> {
    name.to_str()?.replacen('-', ":", 1).parse().ok()
}

fn has_prefix(name: &OsStr, prefix: &str) -> bool {
    name.to_str().is_some_and(|name| name.starts_with(prefix))
}

fn is_numbered(name: &OsStr, prefix: &str) -> bool {
    let number = name.to_str().and_then(|name| name.strip_prefix(prefix));
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}
