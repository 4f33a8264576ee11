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
//! Invariants: a generation is used once, so deleting an old file can never hit a newer one of the same blob. A blob's
//! file with its full length under its final name was verified: it got the name after its hash was checked, or its
//! bytes were checked before they were written. The name of a result does not tell the length of its file, so the file
//! has a checksum. The name of a zstd form tells the size of its blob, so a form is decoded and hashed before it is
//! first served, unless this process made it. A verified file is recognised by its [`Stamp`]. Files whose readers do
//! not check all of their content have checksums of their blocks, which are checked at every read. The death of the
//! process loses nothing. With [`SyncPolicy::Never`], a power cut may lose or damage the last writes, and the checks
//! turn these files into misses. With [`SyncPolicy::BeforeAnswer`], the content of a file is synced before it gets its
//! name, and the name before it is acknowledged.

use super::{
    Draft, Look, Moved, NewFile, Repairs, Stored, Take, Volume, WrittenFile,
    checksum_table::{ChecksumTable, needs_checksums},
    checksums::Checksums,
    draft::TemporaryFile,
    durable::{self, SyncPolicy, sync_directory, sync_file},
    names::{FileClass, encode},
    outside::LeftFile,
    packed::PackedFile,
    paths::{STORED_MODE, StorePaths, create, in_shard},
    root::{MAX_FORMAT_BYTES, StoreLock, check_format, check_kinds, failed, prepare, take_lock},
    scan,
    stamps::{COARSE_TICK, Writers, has_fine_change_times, lease, stamp_of},
    stored::{StoredFile, look_of},
};
use crate::{
    actors::cas::index::{EntryKind, FileId, Key, Stamp, Victim},
    disk::Space,
    instance::Instances,
    regular_file,
};
use gorego_reapi::error::Result;
use rustix::fs::{CWD, Mode, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, fchmod, futimens, renameat};
use std::{
    collections::HashSet,
    fs::{self, File, Metadata},
    io::{self, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

/// Files on which a lease is held at the same time while their use is recorded.
const TOUCH_LEASES: usize = 64;

/// The files of one store, with the lock on its directory.
#[derive(Debug)]
pub(crate) struct Files {
    pub(super) paths: Arc<StorePaths>,
    pub(super) table: Arc<ChecksumTable>,
    /// Directories whose own names were synced.
    synced: Mutex<HashSet<PathBuf>>,
    /// Deleted files that could not be removed. They still take room, and come back with the next start.
    left: Mutex<Vec<Victim>>,
    /// The bytes of these.
    left_bytes: AtomicU64,
    _lock: StoreLock,
}

impl Files {
    /// Opens and locks a store directory, creating it if necessary, and moves leftovers out of the way.
    ///
    /// # Errors
    /// `Precondition` when the directory cannot be used: not writable, held by another server, or of an unknown format.
    pub(crate) fn open(root: &Path, instances: &Instances, policy: SyncPolicy) -> Result<Self> {
        let refuse = |what: &str, error: &io::Error| failed(root, what, error);
        check_kinds(root)?;
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
        let block = rustix::fs::statvfs(&base)
            .map_err(|error| refuse("it cannot be examined", &error.into()))?
            .f_frsize;
        let has_fine_times = has_fine_change_times(&base.join("tmp"))
            .map_err(|error| refuse("a file in it cannot be written", &error))?;
        let table =
            ChecksumTable::open(root).map_err(|error| refuse("its checksums cannot be opened", &error))?;
        let sequence = Arc::new(AtomicU64::new(table.last_generation().saturating_add(1)));
        let (block, decoders, in_trash) = (block.max(512), Arc::default(), AtomicU64::new(0));
        let instances = names;
        let paths =
            StorePaths { base, instances, policy, has_fine_times, block, sequence, decoders, in_trash };
        Ok(Self {
            paths: Arc::new(paths),
            table: Arc::new(table),
            synced: Mutex::default(),
            left: Mutex::default(),
            left_bytes: AtomicU64::new(0),
            _lock: lock,
        })
    }

    /// The path of a stored file.
    #[cfg(test)]
    pub(crate) fn path(&self, file: &FileId) -> PathBuf {
        self.paths.path(file)
    }

    /// The next number of a file.
    pub(super) fn sequence(&self) -> Arc<AtomicU64> {
        self.paths.sequence.clone()
    }

    /// The directory names of the instances, by [`InstanceId`](crate::instance::InstanceId).
    pub(super) fn names(&self) -> Vec<String> {
        self.paths.instances.clone()
    }

    /// The stamp of a verified file with this metadata.
    fn stamp(&self, metadata: &Metadata) -> Stamp {
        self.paths.settled(stamp_of(metadata))
    }

    /// The directory of a stored file.
    pub(super) fn directory_of(&self, file: &FileId) -> PathBuf {
        let Key { digest, instance, kind } = &file.key;
        let class = FileClass { kind: *kind, is_packed: file.is_packed() };
        self.paths.shard(class, *instance, digest.function(), digest.hash()[0])
    }

    /// Waits until the names in a directory of stored files are on disk, and the name of the directory too.
    ///
    /// # Errors
    /// The errors of the disk.
    pub(super) fn sync_directory(&self, directory: &Path) -> io::Result<()> {
        sync_directory(directory)?;
        let synced = || self.synced.lock().unwrap_or_else(PoisonError::into_inner);
        if !synced().contains(directory) {
            let above = directory.ancestors().skip(1);
            let mut above = above.take_while(|above| above.starts_with(&self.paths.base));
            above.try_for_each(sync_directory)?;
            synced().insert(directory.to_owned());
        }
        Ok(())
    }

    fn write_one(&self, file: &NewFile<'_>) -> io::Result<WrittenFile> {
        if self.paths.policy == SyncPolicy::BeforeAnswer {
            // A power cut must not leave a part of a file under its final name, because it would be the newest file of
            // its blob.
            let generation = self.next_generation();
            let mut draft = TemporaryFile::create(self.paths.clone(), self.table.clone(), generation)?;
            file.pieces.iter().try_for_each(|bytes| draft.write(bytes))?;
            return Box::new(draft).keep(file.key);
        }
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

    fn left(&self) -> MutexGuard<'_, Vec<Victim>> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Deletes a stored file. Anything that was put in its place is removed as well.
    fn delete_one(&self, file: &FileId) -> io::Result<()> {
        let path = self.paths.path(file);
        self.table.remove(file.generation);
        match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::IsADirectory => self.paths.throw_away(&path),
            outcome => outcome,
        }
    }

    /// Sets the access time of a stored file to now. If no process can have written the file meanwhile, returns the
    /// stamps before and after, and the file, which holds a lease. The caller has to know whether the content was
    /// verified before.
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
        let left = self.left_bytes.load(Ordering::Relaxed);
        self.paths.in_trash.load(Ordering::Relaxed) + self.table.disk_bytes() + left
    }

    fn space(&self) -> io::Result<Space> {
        Space::of(&self.paths.base)
    }

    fn open(&self, file: &FileId) -> io::Result<Box<dyn Stored>> {
        if file.is_packed() {
            let stored = self.paths.open(&self.paths.path(file))?;
            return Ok(Box::new(PackedFile::open(stored, file.key.digest, self.paths.decoders.clone())?));
        }
        let open = regular_file::open_own(&self.paths.path(file))?;
        let sums = self.table.get(file)?;
        Ok(Box::new(StoredFile::new(open, self.paths.has_fine_times, sums)))
    }

    fn look(&self, file: &FileId) -> io::Result<Look> {
        let metadata = fs::symlink_metadata(self.paths.path(file))?;
        // Opening such a file returns the same error.
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
        if self.paths.policy == SyncPolicy::BeforeAnswer {
            sync_file(&left.file)?;
        }
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
        let delete = |victim: &Victim| {
            let error = self.delete_one(&victim.file).err()?;
            self.left().push(*victim);
            self.left_bytes.fetch_add(victim.bytes, Ordering::Relaxed);
            Some((victim.file, error))
        };
        let mut failures: Vec<_> = victims.iter().filter_map(delete).collect();
        if self.paths.policy == SyncPolicy::BeforeAnswer {
            // Purged results must not come back. Blobs may.
            let results = victims.iter().filter(|victim| victim.file.key.kind == EntryKind::Result);
            let unsynced = |victim: &Victim| {
                let synced = sync_directory(&self.directory_of(&victim.file));
                // A directory that was never created contains nothing that could come back.
                let error = synced.err().filter(|error| error.kind() != io::ErrorKind::NotFound)?;
                Some((victim.file, error))
            };
            failures.extend(results.filter_map(unsynced));
        }
        failures
    }

    fn delete_again(&self) {
        let all = self.left().clone();
        let gone: HashSet<FileId> =
            (all.iter().map(|victim| victim.file)).filter(|file| self.delete_one(file).is_ok()).collect();
        // Another call may work on the same files, and each of them counts only once.
        let mut left = self.left();
        let removed = left.extract_if(.., |victim| gone.contains(&victim.file));
        let bytes = removed.map(|victim| victim.bytes).sum();
        self.left_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Uses are recorded as access times.
    fn touch(&self, files: &[FileId], moved: &mut dyn FnMut(Vec<Moved>)) {
        let has_fine_times = self.paths.has_fine_times;
        // With coarse times, each part sleeps for a tick, so it should be large. With fine times `moved` is called at
        // once, because readers hash a file whose new change time is not reported yet.
        let at_once = if has_fine_times { 1 } else { TOUCH_LEASES };
        for (part, files) in files.chunks(at_once).enumerate() {
            let touch = |(at, file)| self.touch_one(part * at_once + at, file);
            let touched: Vec<_> = files.iter().enumerate().filter_map(touch).collect();
            if !touched.is_empty() && !has_fine_times {
                // The leases keep others from writing these files until the clock has ticked, because only then a
                // change would show. There is no event to wait for.
                thread::sleep(COARSE_TICK);
            }
            moved(touched.into_iter().map(|(moved, _leased)| moved).collect());
        }
    }

    fn recover(&self, is_whole: &(dyn Fn(&dyn Stored) -> bool + Sync), take: Take<'_>) -> Repairs {
        scan::recover(&self.paths, &self.table, is_whole, take)
    }

    fn parts(&self) -> Vec<String> {
        scan::all_shards(&self.paths).iter().map(|shard| shard.name(&self.paths)).collect()
    }

    fn files_in(&self, part: &str) -> io::Result<Vec<FileId>> {
        scan::files_in(&self.paths, part)
    }

    fn note(&self) -> Option<String> {
        let bytes = regular_file::read_own(&self.paths.note(), MAX_FORMAT_BYTES).ok()?;
        String::from_utf8(bytes).ok()
    }

    fn keep_note(&self, note: &str) -> io::Result<()> {
        durable::replace(&self.paths.note(), note.as_bytes())
    }

    #[cfg(test)]
    fn place(&self, file: &FileId) -> Option<(PathBuf, u64)> {
        Some((self.paths.path(file), 0))
    }
}
