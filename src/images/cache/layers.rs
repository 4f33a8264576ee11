//! Compressed layers that are kept beside the images, so that images that share layers download each of them once.
//!
//! ```text
//! <build_root>/images/layer-<start of the machine>-sha256-<digits>
//! ```
//!
//! Layers only use free room of the budget, and are removed before any image. A layer takes room when it is complete,
//! so it never competes with the image that it is downloaded for. Its digest is checked again at each use. If a layer
//! cannot be kept, the pull that downloads it continues anyway.

use super::{CacheKey, CommandSettings, ImageCache, ImageLease, LAYER, NEW, StoredImage, digest_of, name_of};
use crate::{
    actors::worker::dir,
    disk::Space,
    images::{digest::ImageDigest, index::Growth, root::ENTRY_BYTES},
};
use rustix::{
    fs::{self as rfs, AtFlags, FileType, Mode, OFlags},
    io::Errno,
};
use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::Write as _,
    sync::Arc,
};

/// Number of pieces of a layer after which the budget and the free space of the disk are checked. A piece is at most
/// 128 KiB.
const CHECK_SPACE_EVERY: u32 = 8;

/// The state of a layer, from the point of view of a pull.
#[derive(Debug)]
pub(in crate::images) enum LayerState {
    /// The layer is kept. The file may be damaged.
    Kept(ImageLease, File),
    /// Another pull is downloading it and has received this many bytes, or it is being removed.
    Coming(u64),
    /// This pull has to download it.
    Absent(NewLayer),
}

/// A layer that is being downloaded. It is removed on drop unless it is finished.
#[derive(Debug)]
pub(in crate::images) struct NewLayer {
    cache: Arc<ImageCache>,
    key: CacheKey,
    /// The file; `None` if the layer is not kept.
    file: Option<(OsString, File)>,
    /// Whether no other pull downloads the layer.
    is_ours: bool,
    bytes: u64,
    pieces: u32,
}

impl ImageCache {
    /// Looks up a layer. After [`LayerState::Absent`], no other pull downloads the layer until the returned value is
    /// dropped.
    pub(in crate::images) fn layer(self: &Arc<Self>, digest: &ImageDigest) -> LayerState {
        let key = CacheKey::Layer(digest.clone());
        let leased = self.index().lease(&key);
        if let Some((copy, image)) = leased {
            let lease = ImageLease { cache: self.clone(), key: key.clone(), copy, image };
            let file = dir::open_file(&self.directory(), &lease.image.name).ok();
            let is_same =
                |file: &File| rfs::fstat(file).is_ok_and(|stat| dir::file_id(&stat) == lease.image.id);
            if let Some(file) = file.filter(is_same) {
                self.touch(&lease.image.name);
                return LayerState::Kept(lease, file);
            }
            self.index().forget(&key, copy);
        }
        if !self.index().begin(&key) {
            return LayerState::Coming(self.index().received(&key));
        }
        let directory = self.recreated_directory();
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut made = None;
        let name = self.numbered(NEW, |name| {
            made = Some(File::from(rfs::openat(&directory, name, flags, Mode::RUSR | Mode::WUSR)?));
            Ok(())
        });
        let file = name.ok().zip(made);
        let layer = NewLayer { cache: self.clone(), key, file, is_ours: true, bytes: ENTRY_BYTES, pieces: 0 };
        LayerState::Absent(layer)
    }

    /// Removes a kept layer that is damaged, unless another pull has already replaced it.
    pub(in crate::images) fn drop_layer(&self, lease: ImageLease) {
        let discarded = self.index().discard(&lease.key, lease.copy);
        if discarded.is_empty() {
            return;
        }
        let directory = self.directory();
        let aside = self.set_aside(&directory, &lease.image.name);
        self.index().left(&discarded);
        if let Some(name) = aside {
            self.remove(&directory, &name);
        }
    }

    /// Prefix of the names of layers that were written since the machine was started.
    fn layer_prefix(&self) -> Option<String> {
        Some(format!("{LAYER}{}-", self.boot.as_ref()?))
    }

    /// The kept layer in a file; `None` if the file cannot be trusted.
    pub(super) fn restored_layer(
        &self,
        directory: &File,
        name: &OsStr,
    ) -> Option<(CacheKey, StoredImage, u64, (i64, i64))> {
        let digest = name.to_str()?.strip_prefix(&self.layer_prefix()?)?;
        let key = CacheKey::Layer(digest_of(OsStr::new(digest))?);
        let stat = dir::stat_at(directory, name)
            .ok()
            .filter(|stat| dir::file_type(stat) == FileType::RegularFile)?;
        let image = StoredImage {
            name: name.to_owned(),
            id: dir::file_id(&stat),
            settings: CommandSettings::default(),
        };
        let bytes = u64::try_from(stat.st_size).ok()?.saturating_add(ENTRY_BYTES);
        #[allow(clippy::unnecessary_cast)]
        Some((key, image, bytes, (stat.st_mtime as i64, stat.st_mtime_nsec as i64)))
    }
}

impl NewLayer {
    /// Stores a piece of the layer, unless the budget or the disk has no room for it. The bytes are charged only when
    /// the layer is complete, because the images that are unpacked meanwhile have precedence.
    pub(in crate::images) fn write(&mut self, piece: &[u8]) {
        let Some((_, file)) = &mut self.file else { return };
        self.bytes = self.bytes.saturating_add(piece.len() as u64);
        let is_due = self.pieces.is_multiple_of(CHECK_SPACE_EVERY);
        let exceeds_budget = is_due && {
            let mut index = self.cache.index();
            index.note_received(&self.key, self.bytes);
            !index.has_room(self.bytes)
        };
        let is_full = exceeds_budget || is_due && Space::of_file(file).is_ok_and(|space| space.is_low());
        self.pieces = self.pieces.wrapping_add(1);
        if is_full || file.write_all(piece).is_err() {
            self.give_up();
        }
    }

    /// Completes a layer with the right digest. It is kept if there is room.
    pub(in crate::images) fn finish(mut self) {
        let (CacheKey::Layer(digest), Some(prefix)) = (&self.key, self.cache.layer_prefix()) else { return };
        // A spare entry displaces no other entry.
        if self.file.is_none() || !matches!(self.cache.index().grow(&self.key, self.bytes), Growth::Yes(_)) {
            return;
        }
        let Some((unnamed, file)) = self.file.take() else { return };
        let directory = self.cache.directory();
        let mut name = OsString::from(prefix);
        name.push(name_of(digest));
        let id = rfs::fstat(&file).map(|stat| dir::file_id(&stat));
        let named = id.and_then(|id| rfs::renameat(&directory, &unnamed, &directory, &name).map(|()| id));
        match named {
            Ok(id) => {
                let image = Arc::new(StoredImage { name, id, settings: CommandSettings::default() });
                let mut index = self.cache.index();
                if let Some(copy) = index.finish(&self.key, image) {
                    index.release(&self.key, copy);
                }
                self.is_ours = false;
            }
            Err(_) => self.file = Some((unnamed, file)),
        }
    }

    fn give_up(&mut self) {
        if let Some((name, _)) = self.file.take() {
            let _: Result<(), Errno> = rfs::unlinkat(self.cache.directory(), &name, AtFlags::empty());
        }
        if std::mem::take(&mut self.is_ours) {
            self.cache.index().abandon(&self.key);
        }
    }
}

impl Drop for NewLayer {
    fn drop(&mut self) {
        self.give_up();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// Two pulls may have leased the same damaged copy.
    #[test]
    fn a_layer_that_was_replaced_is_not_removed_for_the_damage_of_the_earlier_copy() {
        let directory = tempfile::tempdir().unwrap();
        let cache = ImageCache::open(&directory.path().join("images"), 4 << 20).unwrap();
        let digest = ImageDigest::of(b"layer");
        let keep = || {
            let LayerState::Absent(mut layer) = cache.layer(&digest) else { panic!("it is not there yet") };
            layer.write(b"layer");
            layer.finish();
        };
        let lease = || match cache.layer(&digest) {
            LayerState::Kept(lease, _) => lease,
            other => panic!("it is not kept: {other:?}"),
        };
        keep();
        let [first, second] = [lease(), lease()];
        cache.drop_layer(first);
        keep();
        cache.drop_layer(second);
        lease();
    }

    /// A registry may send any number of bytes.
    #[test]
    fn a_layer_that_exceeds_the_budget_is_removed_while_it_is_downloaded() {
        let directory = tempfile::tempdir().unwrap();
        let cache = ImageCache::open(&directory.path().join("images"), 4 << 20).unwrap();
        let files = || fs::read_dir(directory.path().join("images")).unwrap().count();
        let before = files();
        let digest: ImageDigest = format!("sha256:{}", "a".repeat(64)).parse().unwrap();
        let LayerState::Absent(mut layer) = cache.layer(&digest) else { panic!("it is not there yet") };
        let piece = [0; 128 << 10];
        (0..24).for_each(|_| layer.write(&piece));
        assert_eq!(files(), before + 1, "it fits so far");
        (0..24).for_each(|_| layer.write(&piece));
        assert_eq!(files(), before);
        layer.finish();
        assert!(matches!(cache.layer(&digest), LayerState::Absent(_)));
    }
}
