//! [`Files`]: keeps each stored file as a file of its own, below one directory.
//!
//! ```text
//! <root>/lock                                              held while a server runs on it
//! <root>/format                                            which layout this is
//! <root>/note                                              see `Volume::keep_note`
//! <root>/v1/blobs/<instance>/<function>/<ab>/<hash>-<size>-<generation>
//! <root>/v1/results/<instance>/<function>/<ab>/<hash>-<size>-<generation>
//! <root>/v1/results/<instance>+private/...                 the same for results that only their principals see
//! <root>/v1/packed/<instance>/<function>/<ab>/<hash>-<size>-<generation>   blobs that are kept compressed; see `packed`
//! <root>/v1/zstd/<instance>/<function>/<ab>/<hash>-<size>-<generation>
//! <root>/v1/tmp/<generation>                               uploads in progress; emptied at start
//! <root>/v1/trash/                                         what start threw away; emptied in the background
//! <root>/segments/                                         see `segments`
//! <root>/checksums/                                        see `checksum_table`
//! ```
//!
//! Invariants: a generation is used once, so deleting an old file can never hit a newer one of the same blob. A blob's file
//! with its full length under its final name was verified: it got the name after its hash was checked, or its bytes were
//! checked before they were written. The name of a result does not tell the length of its file, so the file has a checksum. The
//! name of a zstd form tells the size of its blob, so a form is decoded and hashed before it is first served, unless this
//! process made it. A verified file is recognised by its [`Stamp`]. Files whose readers do not check all of their content have
//! checksums of their blocks, which are checked at every read. Nothing is fsynced: the death of the process loses nothing.
//! A power cut may lose or damage what was written last, and the hash check at the first read turns that into misses.

use super::{
    Draft, Look, Moved, NewFile, Repairs, Stored, Take, Volume, WrittenFile,
    checksum_table::ChecksumTable,
    checksums::{BLOCK_BYTES, Checksums},
    draft::TemporaryFile,
    names::{FileClass, encode},
    outside::LeftFile,
    packed::{FrameDecoders, PackedFile},
    scan,
    stamps::{COARSE_TICK, Writers, has_fine_change_times, lease, settled, stamp_of},
    stored::{StoredFile, look_of},
};
use crate::{
    actors::cas::index::{EntryKind, FileId, Key, Stamp, Victim},
    disk::Space,
    instance::{InstanceId, Instances},
    regular_file,
    spread::spread_subdirectories,
};
use gorego_reapi::{
    digest::DigestFunction,
    error::{Error, Result},
};
use rustix::fs::{
    CWD, FlockOperation, Mode, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, fchmod, flock, futimens, renameat,
};
use std::{
    fs::{self, File, Metadata, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::SystemTime,
};
use uuid::Uuid;

/// The content of `<root>/format`.
const FORMAT: &str = "gorego store 3\n";
/// Earlier formats: without segments, and without checksums of large files and packed files. Such a store is used as it is; what it
/// lacks is added while it is used.
const OLD_FORMATS: [&str; 2] = ["gorego store 1\n", "gorego store 2\n"];
/// A bound on the size of that file, and of the note.
const MAX_FORMAT_BYTES: u64 = 4_096;
/// Permission bits of stored files, which are never written again.
const STORED_MODE: u32 = 0o444;
/// The unit of `st_blocks`.
pub(super) const BLOCK_UNIT_BYTES: u64 = 512;
/// Files on which a lease is held at the same time while their use is recorded.
const TOUCH_LEASES: usize = 64;

/// The files of one store, with the lock on its directory.
#[derive(Debug)]
pub(crate) struct Files {
    pub(super) paths: Arc<StorePaths>,
    pub(super) table: Arc<ChecksumTable>,
    _lock: File,
}

/// The paths of the files of a store.
#[derive(Debug)]
pub(super) struct StorePaths {
    base: PathBuf,
    /// Directory names by [`InstanceId`].
    instances: Vec<String>,
    /// See [`has_fine_change_times`].
    has_fine_times: bool,
    /// Bytes of a block of the file system.
    block: u64,
    /// The next number of a file. Segments number their records from it too.
    sequence: Arc<AtomicU64>,
    /// For reads of packed files.
    decoders: Arc<FrameDecoders>,
    /// Bytes that the trash takes, as far as they were found.
    pub(super) in_trash: AtomicU64,
}

impl Files {
    /// Opens and locks a store directory, creating it if necessary, and moves leftovers out of the way.
    ///
    /// # Errors
    /// `Precondition` when the directory cannot be used: not writable, held by another server, or of an unknown format.
    pub(crate) fn open(root: &Path, instances: &Instances) -> Result<Self> {
        let refuse = |what: &str, error: &dyn std::fmt::Display| unusable(root, what, error);
        fs::create_dir_all(root).map_err(|error| refuse("the directory cannot be made", &error))?;
        let lock = take_lock(root)?;
        check_format(root)?;
        let base = root.join("v1");
        let all = instances.all();
        // The encoding of a name has no "+".
        let private = all.iter().filter(|instance| instance.private_results().is_some());
        let private = private.map(|instance| encode(instance.name()) + "+private");
        let names: Vec<String> = all.iter().map(|instance| encode(instance.name())).chain(private).collect();
        prepare(&base, &names).map_err(|error| refuse("its directories cannot be made", &error))?;
        let block =
            rustix::fs::statvfs(&base).map_err(|error| refuse("it cannot be examined", &error))?.f_frsize;
        let has_fine_times = has_fine_change_times(&base.join("tmp"))
            .map_err(|error| refuse("a file in it cannot be written", &error))?;
        let table =
            ChecksumTable::open(root).map_err(|error| refuse("its checksums cannot be opened", &error))?;
        let sequence = Arc::new(AtomicU64::new(table.last_generation().saturating_add(1)));
        let (block, decoders, in_trash) = (block.max(512), Arc::default(), AtomicU64::new(0));
        let instances = names;
        let paths = StorePaths { base, instances, has_fine_times, block, sequence, decoders, in_trash };
        let paths = Arc::new(paths);
        Ok(Self { paths, table: Arc::new(table), _lock: lock })
    }

    /// The path of a stored file.
    #[cfg(test)]
    pub(crate) fn path(&self, file: &FileId) -> PathBuf {
        self.paths.path(file)
    }

    /// Records that a file of this generation exists.
    pub(super) fn saw_generation(&self, generation: u64) {
        self.paths.sequence.fetch_max(generation.saturating_add(1), Ordering::Relaxed);
    }

    /// The next number of a file.
    pub(super) fn sequence(&self) -> Arc<AtomicU64> {
        self.paths.sequence.clone()
    }

    /// The directory names of the instances, by [`InstanceId`].
    pub(super) fn names(&self) -> Vec<String> {
        self.paths.instances.clone()
    }

    /// The instances that have directories.
    pub(super) fn instances(&self) -> impl Iterator<Item = InstanceId> + use<> {
        (0..self.paths.instances.len() as u16).map(InstanceId)
    }

    /// The stamp of a verified file with these metadata.
    fn stamp(&self, metadata: &Metadata) -> Stamp {
        self.paths.settled(stamp_of(metadata))
    }

    /// Opens the file at a path, without its checksums.
    pub(super) fn open_path(&self, path: &Path) -> io::Result<StoredFile> {
        Ok(StoredFile::new(regular_file::open(path)?, self.paths.has_fine_times, None))
    }

    fn write_one(&self, file: &NewFile<'_>) -> io::Result<WrittenFile> {
        let id = FileId { key: file.key, generation: self.next_generation() };
        let path = self.paths.path(&id);
        let mut new = create(&path)?;
        let written = file.pieces.iter().try_for_each(|bytes| new.write_all(bytes));
        let metadata = written.and_then(|()| new.metadata());
        if metadata.is_err() {
            let _ = fs::remove_file(&path);
        } else if needs_checksums(&file.key, file.size()) {
            // A file without checksums is hashed before it is served, and gets them then.
            let _ = self.table.add(&id, &Checksums::of(file.pieces));
        }
        let metadata = metadata?;
        Ok(WrittenFile { file: id, bytes: self.paths.taken(&metadata), stamp: self.stamp(&metadata) })
    }

    /// Deletes a stored file. Anything that was put in its place is removed too.
    fn delete_one(&self, file: &FileId) -> io::Result<()> {
        let path = self.paths.path(file);
        self.table.remove(file.generation);
        match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::IsADirectory => self.paths.throw_away(&path),
            outcome => outcome,
        }
    }

    /// Sets the access time of a stored file to now. If nobody can have written the file meanwhile, returns the stamps before
    /// and after, and the file, which holds a lease. The caller has to know whether the content was verified before.
    fn touch_one(&self, at: usize, file: &FileId) -> Option<(Moved, File)> {
        let time = |tv_nsec| Timespec { tv_sec: 0, tv_nsec };
        let times = Timestamps { last_access: time(UTIME_NOW), last_modification: time(UTIME_OMIT) };
        // The file may be gone by now. A lost use only affects the order of eviction.
        let file = regular_file::open(&self.paths.path(file)).ok()?;
        let writers = lease(&file);
        let before = stamp_of(&file.metadata().ok()?);
        futimens(&file, &times).ok()?;
        let after = stamp_of(&file.metadata().ok()?);
        (writers == Writers::ShutOut).then_some((Moved { at, before, after }, file))
    }
}

impl Volume for Files {
    fn next_generation(&self) -> u64 {
        self.paths.next_generation()
    }

    fn charge(&self, size: u64) -> u64 {
        self.paths.charge(size)
    }

    fn overhead(&self) -> u64 {
        self.paths.in_trash.load(Ordering::Relaxed) + self.table.disk_bytes()
    }

    fn space(&self) -> io::Result<Space> {
        Space::of(&self.paths.base)
    }

    fn open(&self, file: &FileId) -> io::Result<Box<dyn Stored>> {
        if file.is_packed() {
            let stored = self.open_path(&self.paths.path(file))?;
            return Ok(Box::new(PackedFile::open(stored, file.key.digest, self.paths.decoders.clone())?));
        }
        let open = regular_file::open(&self.paths.path(file))?;
        let sums = self.table.get(file)?;
        Ok(Box::new(StoredFile::new(open, self.paths.has_fine_times, sums)))
    }

    fn look(&self, file: &FileId) -> io::Result<Look> {
        let metadata = fs::symlink_metadata(self.paths.path(file))?;
        // The same error as when such a file is opened.
        if !metadata.is_file() {
            return Err(io::Error::from_raw_os_error(libc::ENXIO));
        }
        let look = look_of(&metadata, self.paths.has_fine_times);
        let size = if file.is_packed() { file.key.digest.size() } else { look.size };
        Ok(Look { size, ..look })
    }

    fn write(&self, files: &[NewFile<'_>]) -> Vec<io::Result<WrittenFile>> {
        files.iter().map(|file| self.write_one(file)).collect()
    }

    fn draft(&self) -> io::Result<Box<dyn Draft>> {
        Ok(Box::new(TemporaryFile::create(self.paths.clone(), self.table.clone(), self.next_generation())?))
    }

    fn packed_draft(&self, used: u32) -> io::Result<Box<dyn Draft>> {
        let (paths, table) = (self.paths.clone(), self.table.clone());
        Ok(Box::new(TemporaryFile::create(paths, table, self.next_generation())?.packed(used)))
    }

    fn adopt(&self, key: Key, left: &LeftFile<'_>) -> io::Result<Option<WrittenFile>> {
        if !left.is_ours_alone() {
            return Ok(None);
        }
        let file = FileId { key, generation: self.next_generation() };
        let (path, before) = (self.paths.path(&file), &left.before);
        fchmod(&left.file, Mode::from_raw_mode(STORED_MODE))?;
        if in_shard(&path, || Ok(renameat(left.parent, left.name, CWD, &path)?)).is_err() {
            // It is on another file system.
            return Ok(None);
        }
        let (after, moved) = (left.file.metadata()?, fs::symlink_metadata(&path)?);
        let same = (after.dev(), after.ino()) == (moved.dev(), moved.ino());
        let times = |metadata: &Metadata| (metadata.mtime(), metadata.mtime_nsec());
        let unchanged = after.len() == key.digest.size() && times(&after) == times(before);
        if same && unchanged && after.nlink() == 1 {
            if let Some(sums) = left.checksums().filter(|sums| needs_checksums(&key, sums.size())) {
                // As in `write_one`.
                let _ = self.table.add(&file, sums);
            }
            let bytes = self.paths.taken(&after);
            return Ok(Some(WrittenFile { file, bytes, stamp: self.stamp(&after) }));
        }
        self.delete_one(&file)?;
        Ok(None)
    }

    fn add_checksums(&self, file: &FileId, sums: &Checksums) -> io::Result<()> {
        if needs_checksums(&file.key, sums.size()) { self.table.add(file, sums) } else { Ok(()) }
    }

    fn delete(&self, victims: &[Victim]) -> Vec<(FileId, io::Error)> {
        let delete = |victim: &Victim| Some((victim.file, self.delete_one(&victim.file).err()?));
        victims.iter().filter_map(delete).collect()
    }

    /// Uses are recorded as access times.
    fn touch(&self, files: &[FileId], moved: &mut dyn FnMut(Vec<Moved>)) {
        let has_fine_times = self.paths.has_fine_times;
        // With coarse times each part sleeps a tick, so it should be large. With fine times `moved` is called at once, because
        // readers hash a file whose new change time is not reported yet.
        let at_once = if has_fine_times { 1 } else { TOUCH_LEASES };
        for (part, files) in files.chunks(at_once).enumerate() {
            let touch = |(at, file)| self.touch_one(part * at_once + at, file);
            let touched: Vec<_> = files.iter().enumerate().filter_map(touch).collect();
            if !touched.is_empty() && !has_fine_times {
                // The leases keep others from writing these files until a change would show.
                thread::sleep(COARSE_TICK);
            }
            moved(touched.into_iter().map(|(moved, _leased)| moved).collect());
        }
    }

    fn recover(&self, is_whole: &(dyn Fn(&dyn Stored) -> bool + Sync), take: Take<'_>) -> Repairs {
        scan::recover(self, is_whole, take)
    }

    fn parts(&self) -> Vec<String> {
        scan::all_shards(self).iter().map(|shard| shard.name(&self.paths)).collect()
    }

    fn files_in(&self, part: &str) -> io::Result<Vec<FileId>> {
        scan::files_in(self, part)
    }

    fn note(&self) -> Option<String> {
        let bytes = regular_file::read(&self.paths.note(), MAX_FORMAT_BYTES).ok()?;
        String::from_utf8(bytes).ok()
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "after a power cut, a clean stop must not be noted that did not happen"
    )]
    fn keep_note(&self, note: &str) -> io::Result<()> {
        let (path, new) = (self.paths.note(), self.paths.note().with_extension("new"));
        regular_file::write(&new, note.as_bytes())?;
        File::open(&new)?.sync_data()?;
        fs::rename(&new, &path)?;
        path.parent().map_or(Ok(()), |root| File::open(root)?.sync_all())
    }

    #[cfg(test)]
    fn place(&self, file: &FileId) -> Option<(PathBuf, u64)> {
        Some((self.paths.path(file), 0))
    }
}

impl StorePaths {
    /// A number that no file of the store has had.
    pub(super) fn next_generation(&self) -> u64 {
        self.sequence.fetch_add(1, Ordering::Relaxed)
    }

    /// Bytes that a file of this size takes.
    pub(super) fn charge(&self, size: u64) -> u64 {
        size.max(1).checked_next_multiple_of(self.block).unwrap_or(u64::MAX)
    }

    /// Bytes that a file takes: the blocks that the file system says, and never less than [`StorePaths::charge`], because some
    /// file systems allocate later.
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

    /// The path of the note.
    fn note(&self) -> PathBuf {
        self.base.with_file_name("note")
    }

    /// The directory for files that are thrown away.
    pub(super) fn trash(&self) -> PathBuf {
        self.base.join("trash")
    }

    /// Moves something that does not belong to the store out of the way; the next start deletes it.
    pub(super) fn throw_away(&self, path: &Path) -> io::Result<()> {
        fs::rename(path, self.trash().join(Uuid::new_v4().to_string()))
    }

    /// The stamp of a verified file, or [`Stamp::UNTRUSTED`] while another change could leave the stamp as it is.
    pub(super) fn settled(&self, stamp: Stamp) -> Stamp {
        settled(stamp, self.has_fine_times, SystemTime::now())
    }
}

/// Whether a file of its own gets checksums of its blocks. A small blob is hashed whenever it is read, and a result has a checksum
/// of its own.
pub(super) fn needs_checksums(key: &Key, size: u64) -> bool {
    match key.kind {
        EntryKind::Blob => size > BLOCK_BYTES as u64,
        EntryKind::Result => false,
        EntryKind::Zstd => true,
    }
}

/// The error for a directory that cannot be used as a store.
pub(super) fn unusable(root: &Path, what: &str, error: &dyn std::fmt::Display) -> Error {
    Error::Precondition(format!(
        "cannot use {} as the store: {what}: {error} (local_cache_dir chooses another directory)",
        root.display()
    ))
}

/// Locks a store directory, until the returned file is closed.
fn take_lock(root: &Path) -> Result<File> {
    let lock = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        // A pipe or link in its place must not hold up the start.
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(root.join("lock"))
        .map_err(|error| unusable(root, "it is not writable", &error))?;
    flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|error| match error {
        rustix::io::Errno::WOULDBLOCK => unusable(root, "it is in use", &"another gorego server runs on it"),
        error => unusable(root, "it cannot be locked", &error),
    })?;
    Ok(lock)
}

/// Checks the format of a store directory. A new directory gets the current one, and so does an older store before the first
/// segment or packed file is made, so that no older version opens it and misses what is in those.
fn check_format(root: &Path) -> Result<()> {
    let format = root.join("format");
    match regular_file::read(&format, MAX_FORMAT_BYTES) {
        Ok(text) if text == FORMAT.as_bytes() => Ok(()),
        Ok(text) if OLD_FORMATS.iter().any(|old| text == old.as_bytes()) => {
            let new = root.join("format.new");
            regular_file::write(&new, FORMAT.as_bytes())
                .and_then(|()| fs::rename(&new, &format))
                .map_err(|error| unusable(root, "it cannot be upgraded", &error))
        }
        Ok(text) => {
            let text = String::from_utf8_lossy(&text).chars().take(40).collect::<String>();
            Err(unusable(root, "it is of a format that this version does not know", &text.escape_debug()))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            regular_file::write(&format, FORMAT.as_bytes())
                .map_err(|error| unusable(root, "it is not writable", &error))
        }
        Err(error) => Err(unusable(root, "its format cannot be read", &error)),
    }
}

/// Creates a new file, which is written once.
pub(super) fn create(path: &Path) -> io::Result<File> {
    in_shard(path, || OpenOptions::new().write(true).create_new(true).mode(STORED_MODE).open(path))
}

/// Runs `put`, and again after creating the directory of `path` if that was missing. Directories are created when they are
/// first needed, so an empty store starts at once.
pub(super) fn in_shard<T>(path: &Path, mut put: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    match (put(), path.parent()) {
        (Err(error), Some(parent)) if error.kind() == io::ErrorKind::NotFound => {
            if let Some(shards) = parent.parent() {
                fs::create_dir_all(shards)?;
                spread_subdirectories(File::open(shards)?);
            }
            fs::create_dir_all(parent)?;
            put()
        }
        (outcome, _) => outcome,
    }
}

/// Creates the directories that always exist. Moves temporary files, and instances that are no longer served, to the trash,
/// because nobody would count their bytes.
fn prepare(base: &Path, instances: &[String]) -> io::Result<()> {
    let trash = base.join("trash");
    fs::create_dir_all(&trash)?;
    let mut thrown = 0u64;
    let mut throw = |path: &Path| -> io::Result<()> {
        loop {
            thrown += 1;
            let target = trash.join(thrown.to_string());
            if !target.try_exists()? {
                return fs::rename(path, target);
            }
        }
    };
    let tmp = base.join("tmp");
    if tmp.try_exists()? {
        throw(&tmp)?;
    }
    fs::create_dir(&tmp)?;
    for class in FileClass::ALL {
        let parent = base.join(class.directory());
        fs::create_dir_all(&parent)?;
        for entry in fs::read_dir(&parent)? {
            let entry = entry?;
            if !instances.iter().any(|name| entry.file_name() == **name) {
                throw(&entry.path())?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_in_use_or_of_another_format_is_refused_with_the_reason() {
        let root = tempfile::tempdir().unwrap();
        let instances = Instances::new([""]).unwrap();
        let first = Files::open(root.path(), &instances).unwrap();
        let error = Files::open(root.path(), &instances).unwrap_err();
        assert!(error.to_string().contains("another gorego server runs on it"), "{error}");
        drop(first);
        Files::open(root.path(), &instances).unwrap();
        fs::write(root.path().join("format"), "gorego store 4\n").unwrap();
        let error = Files::open(root.path(), &instances).unwrap_err();
        assert!(error.to_string().contains("gorego store 4"), "{error}");
        fs::write(root.path().join("plain"), "").unwrap();
        let error = Files::open(&root.path().join("plain"), &instances).unwrap_err();
        assert!(matches!(error, Error::Precondition(_)), "{error}");
    }
}
