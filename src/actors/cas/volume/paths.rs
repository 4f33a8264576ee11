//! [`StorePaths`]: where the files of a store lie, and what they take there.

use super::{
    durable::SyncPolicy, names::FileClass, packed::FrameDecoders, stamps::settled, stored::StoredFile,
};
use crate::{
    actors::cas::index::{FileId, Key, Stamp},
    directory_hint::spread_subdirectories,
    instance::InstanceId,
    regular_file,
};
use gorego_reapi::digest::DigestFunction;
use std::{
    fs::{self, File, Metadata, OpenOptions},
    io,
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};
use uuid::Uuid;

/// Permission bits of stored files, which are never written again.
pub(super) const STORED_MODE: u32 = 0o444;
/// The unit of `st_blocks`.
pub(super) const BLOCK_UNIT_BYTES: u64 = 512;

/// The paths of the files of a store.
#[derive(Debug)]
pub(super) struct StorePaths {
    pub(super) base: PathBuf,
    /// Directory names by [`InstanceId`].
    pub(super) instances: Vec<String>,
    pub(super) policy: SyncPolicy,
    /// The result of [`has_fine_change_times`](super::stamps::has_fine_change_times) for the file system of the store.
    pub(super) has_fine_times: bool,
    /// Bytes of a block of the file system.
    pub(super) block: u64,
    /// The next number of a file. Segments take the numbers of their records from it as well.
    pub(super) sequence: Arc<AtomicU64>,
    /// Decoders for reads of packed files.
    pub(super) decoders: Arc<FrameDecoders>,
    /// Bytes of the trash that were found so far.
    pub(super) in_trash: AtomicU64,
}

impl StorePaths {
    /// Records that a file of this generation exists.
    pub(super) fn saw_generation(&self, generation: u64) {
        self.sequence.fetch_max(generation.saturating_add(1), Ordering::Relaxed);
    }

    /// The instances that have directories.
    pub(super) fn instances(&self) -> impl Iterator<Item = InstanceId> + use<> {
        (0..self.instances.len() as u16).map(InstanceId)
    }

    /// Opens the file at a path, without its checksums.
    pub(super) fn open(&self, path: &Path) -> io::Result<StoredFile> {
        Ok(StoredFile::new(regular_file::open_own(path)?, self.has_fine_times, None))
    }

    /// A number that no file of the store has had.
    pub(super) fn next_generation(&self) -> u64 {
        self.sequence.fetch_add(1, Ordering::Relaxed)
    }

    /// Bytes that a file of this size takes.
    pub(super) fn charge(&self, size: u64) -> u64 {
        size.max(1).checked_next_multiple_of(self.block).unwrap_or(u64::MAX)
    }

    /// Bytes that a file takes: the blocks that the file system reports, and never less than [`StorePaths::charge`],
    /// because some file systems allocate later.
    pub(super) fn taken(&self, metadata: &Metadata) -> u64 {
        self.charge(metadata.len()).max(metadata.blocks().saturating_mul(BLOCK_UNIT_BYTES))
    }

    /// The path of a stored file.
    pub(super) fn path(&self, file: &FileId) -> PathBuf {
        let Key { digest, instance, kind } = &file.key;
        let class = FileClass { kind: *kind, is_packed: file.is_packed() };
        let mut path = self.shard(class, *instance, digest.function(), digest.hash()[0]);
        path.push(format!("{}-{}-{:x}", digest.hash_hex(), digest.size(), file.sequence()));
        path
    }

    /// The directory of all files whose hash starts with `first`.
    pub(super) fn shard(
        &self,
        class: FileClass,
        instance: InstanceId,
        function: DigestFunction,
        first: u8,
    ) -> PathBuf {
        let name = self.instances.get(usize::from(instance.0)).map_or("", String::as_str);
        self.base.join(format!("{}/{name}/{}/{first:02x}", class.directory(), function.name()))
    }

    /// The path of an upload in progress.
    pub(super) fn temporary_path(&self, generation: u64) -> PathBuf {
        self.base.join(format!("tmp/{generation:x}"))
    }

    /// The name of a directory of files, as it is below the directory of the store.
    pub(super) fn name_of(&self, path: &Path) -> String {
        path.strip_prefix(&self.base).unwrap_or(path).display().to_string()
    }

    pub(super) fn note(&self) -> PathBuf {
        self.base.with_file_name("note")
    }

    /// The directory for files that are thrown away.
    pub(super) fn trash(&self) -> PathBuf {
        self.base.join("trash")
    }

    /// Moves something that does not belong to the store into the trash, which the next start empties.
    pub(super) fn throw_away(&self, path: &Path) -> io::Result<()> {
        let target = self.trash().join(Uuid::new_v4().to_string());
        again_with_directory(&target, || fs::rename(path, &target))
    }

    /// The stamp of a verified file, or [`Stamp::UNTRUSTED`] while another change could leave the stamp as it is.
    pub(super) fn settled(&self, stamp: Stamp) -> Stamp {
        settled(stamp, self.has_fine_times, SystemTime::now())
    }
}

/// Creates a new file, which is written once.
pub(super) fn create(path: &Path) -> io::Result<File> {
    in_shard(path, || OpenOptions::new().write(true).create_new(true).mode(STORED_MODE).open(path))
}

/// Runs `put`. If the directory of `path` is missing, creates it and runs `put` again. Directories are created when
/// they are first needed, so an empty store starts at once.
pub(super) fn in_shard<T>(path: &Path, mut put: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    match put() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if let Some(shards) = path.parent().and_then(Path::parent) {
                fs::create_dir_all(shards)?;
                spread_subdirectories(File::open(shards)?);
            }
            again_with_directory(path, put)
        }
        outcome => outcome,
    }
}

/// Runs `put`. If the directory of `path` was removed, makes it again and retries.
pub(super) fn again_with_directory<T>(path: &Path, mut put: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    match (put(), path.parent()) {
        (Err(error), Some(directory)) if error.kind() == io::ErrorKind::NotFound => {
            fs::create_dir_all(directory)?;
            put()
        }
        (outcome, _) => outcome,
    }
}
