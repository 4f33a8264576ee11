//! [`UnpackedImage`]: an image that is being unpacked into the cache.
//!
//! It has a temporary name and reserved room. [`UnpackedImage::finish`] gives it its final name and leases it. If it is
//! dropped before, the directory is removed and the room is released.

use super::{
    CacheKey, CommandSettings, DESCRIPTION, Description, ImageCache, ImageLease, NEW, ROOT, StoredImage,
    name_of,
};
use crate::{
    actors::worker::dir,
    disk::Space,
    images::{digest::ImageDigest, index::Growth},
};
use gorego_reapi::error::{Error, Result};
use rustix::{
    fs::{self as rfs, Mode},
    io::Errno,
};
use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::{self, Write as _},
    sync::Arc,
};

impl ImageCache {
    /// Creates a directory for an image. `None` if the image is already unpacked, being unpacked or being removed.
    ///
    /// # Errors
    /// The errors of the file system.
    pub(in crate::images) fn begin(self: &Arc<Self>, digest: &ImageDigest) -> Result<Option<UnpackedImage>> {
        let key = CacheKey::Image(digest.clone());
        if !self.index().begin(&key) {
            return Ok(None);
        }
        let directory = self.recreated_directory();
        // If a step fails, dropping this releases the reserved room.
        let mut unpacked = UnpackedImage {
            cache: self.clone(),
            directory: directory.clone(),
            digest: digest.clone(),
            key,
            name: OsString::new(),
            root: None,
        };
        let mut make = || -> io::Result<File> {
            unpacked.name = self.numbered(NEW, |name| rfs::mkdirat(&directory, name, Mode::RWXU))?;
            let inside = dir::open_dir(&directory, &unpacked.name)?;
            rfs::mkdirat(&inside, ROOT, Mode::RWXU)?;
            let root = dir::open_dir(&inside, OsStr::new(ROOT))?;
            rfs::fchmod(&root, Mode::from_raw_mode(0o755))?;
            Ok(root)
        };
        let root = make().map_err(|error| Error::io("make the directory of an image", &error))?;
        unpacked.root = Some(root);
        Ok(Some(unpacked))
    }
}

/// An image that is being unpacked. It is removed on drop unless it is complete.
pub(in crate::images) struct UnpackedImage {
    cache: Arc<ImageCache>,
    directory: Arc<File>,
    digest: ImageDigest,
    key: CacheKey,
    name: OsString,
    root: Option<File>,
}

impl UnpackedImage {
    /// The directory that becomes its root.
    ///
    /// # Errors
    /// None in practice: it is open until the image is complete.
    pub(in crate::images) fn root(&self) -> Result<&File> {
        self.root.as_ref().ok_or_else(|| Error::internal("the directory of an image is not open"))
    }

    /// The cache that the image is a part of.
    pub(in crate::images) fn cache(&self) -> &Arc<ImageCache> {
        &self.cache
    }

    /// Reserves room before this many bytes are written. Other images may be removed for that.
    ///
    /// # Errors
    /// `Precondition` if the image is larger than the cache; `Unavailable` if images in use leave no room.
    pub(in crate::images) fn take(&self, bytes: u64) -> Result<()> {
        let growth = self.cache.index().grow(&self.key, bytes);
        match growth {
            Growth::Yes(evicted) => {
                if !evicted.is_empty() {
                    self.cache.evict(&evicted);
                }
                Ok(())
            }
            Growth::Never => Err(Error::Precondition(
                "it is larger than all unpacked images may be together (execution.images.max_size_gb of this server)"
                    .into(),
            )),
            Growth::NotNow => Err(Error::Unavailable(
                "images that are in use leave no room for it (execution.images.max_size_gb of this server)".into(),
            )),
        }
    }

    /// Checks the free space of the disk, which is also used by other programs. Removes unused images if it is low.
    ///
    /// # Errors
    /// `DiskFull` if it stays low. Running actions must not fail because of this image.
    pub(in crate::images) fn check_disk(&self) -> Result<()> {
        // If the free space cannot be read, the write itself fails when the disk is full.
        let low = || self.root.as_ref().and_then(|root| Space::of_file(root).ok()).filter(Space::is_low);
        if low().is_none() {
            return Ok(());
        }
        self.cache.remove_unused();
        low().map_or(Ok(()), |space| {
            Err(Error::DiskFull(format!(
                "the disk of this server has no room to unpack it (execution.build_root): {space}"
            )))
        })
    }

    /// Completes the image: renames it to its name and leases it.
    ///
    /// # Errors
    /// The errors of the file system.
    pub(in crate::images) fn finish(mut self, settings: CommandSettings) -> Result<ImageLease> {
        let cache = self.cache.clone();
        let bytes = cache.index().taken(&self.key);
        let keep = || -> io::Result<(OsString, dir::FileIdentity)> {
            let id = dir::file_id(&rfs::fstat(self.root.as_ref().ok_or(Errno::BADF)?)?);
            let description = Description {
                boot: cache.boot.clone().unwrap_or_default(),
                bytes,
                environment: settings.environment.clone(),
                user: settings.user.map(|user| (user.user, user.group)),
            };
            let text = serde_json::to_vec(&description).map_err(io::Error::other)?;
            let inside = dir::open_dir(&self.directory, &self.name)?;
            let flags = rfs::OFlags::WRONLY | rfs::OFlags::CREATE | rfs::OFlags::EXCL | rfs::OFlags::CLOEXEC;
            let file = rfs::openat(&inside, DESCRIPTION, flags, Mode::RUSR | Mode::WUSR)?;
            File::from(file).write_all(&text)?;
            let name = name_of(&self.digest);
            // A copy that was discarded because it was damaged may still be there.
            let _ =
                cache.set_aside(&self.directory, &name).map(|aside| cache.remove(&self.directory, &aside));
            rfs::renameat(&self.directory, &self.name, &self.directory, &name)?;
            Ok((name, id))
        };
        let (name, id) = keep().map_err(|error| Error::io("complete an image", &error))?;
        self.name.clone_from(&name);
        let image = Arc::new(StoredImage { name, id, settings });
        let copy = cache.index().finish(&self.key, image.clone());
        let copy = copy.ok_or_else(|| Error::internal("an image was completed twice"))?;
        // The directory was renamed, so dropping this must not remove it.
        self.name.clear();
        Ok(ImageLease { cache, key: self.key.clone(), copy, image })
    }
}

impl Drop for UnpackedImage {
    fn drop(&mut self) {
        if !self.name.is_empty() {
            self.root = None;
            self.cache.remove(&self.directory, &self.name);
        }
        // This has no effect if the image is complete.
        self.cache.index().abandon(&self.key);
    }
}
