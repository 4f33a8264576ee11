//! [`Segments`]: small files, many to a file of the file system.
//!
//! ```text
//! <root>/segments/<number>.segment    records, one after the other; see `record` and `table`
//! <root>/segments/<number>.journal    which of them are dead, and when others were last used; see `journal`
//! ```
//!
//! A batch of small files is appended with one system call, so a small file costs only its checksum and a copy. A
//! record is never changed. Its location is the generation of the stored file, so no table of locations is kept in
//! memory.
//!
//! Invariants:
//! - Every read of a record checks its checksums, and that it is the record of this file. A bad record is an error, and
//!   its file counts as lost.
//! - The deletion of a record is noted in the journal before it is reported, so the record does not come back. If the
//!   disk has no space for the note, the blocks of the record are given back first. A segment without live records is
//!   removed. If that fails, the deletion is noted instead.
//! - Of two records of one key, the one with the greater sequence is newer. A copy keeps the sequence of its original.
//! - Bytes on disk that no stored file is charged for ([`Segments::overhead`]) are bounded by compaction
//!   ([`compaction`]).
//! - The death of the process loses nothing that was written, and the checksums detect damage by a power cut. With
//!   [`SyncPolicy::BeforeAnswer`], a segment is synced before its records are acknowledged, and before it gets its
//!   table. With either policy, it is synced before the originals of its copies are removed, because they may be old.
//!
//! Locks are taken in this order: `unnoted`, the journal of a segment, `copying`, `head`, `all`, and the counts of a
//! segment. None of them is held during IO, except the first two while deletions are noted, and `head` while a new
//! segment is created.

mod append;
mod compaction;
mod content;
mod deletion;
mod journal;
mod open_files;
mod punch;
mod record;
mod recovery;
mod segment;
mod sizes;
mod table;
#[cfg(test)]
mod tests;

use record::damaged;
pub(super) use record::{Location, u32_at, u64_at};
pub(crate) use sizes::{Sizes, Verdict};

use super::{
    Look, NewFile, Stored, WrittenFile,
    durable::{SyncPolicy, sync_file},
};
use crate::{actors::cas::index::FileId, instance::InstanceId, regular_file};
use append::Appended;
use compaction::CompactionState;
use deletion::UnnotedDeletions;
use open_files::OpenFiles;
use segment::{Addition, Segment, Takes};
use std::{
    collections::{BTreeMap, HashSet},
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

/// All segments of a store.
#[derive(Debug)]
pub(crate) struct Segments {
    directory: PathBuf,
    /// Directory names by [`InstanceId`], as in the head of every segment of this run.
    names: Vec<String>,
    /// The instances of these names, in the same order.
    instances: Arc<[Option<InstanceId>]>,
    sizes: Sizes,
    policy: SyncPolicy,
    /// Numbers the files of the store in the order in which they were written.
    sequence: Arc<AtomicU64>,
    next_number: AtomicU64,
    /// The segment that records are appended to.
    head: Mutex<Option<Arc<Appended>>>,
    all: RwLock<BTreeMap<u64, Arc<Segment>>>,
    open: OpenFiles,
    copying: Mutex<CompactionState>,
    /// Held while a segment is compacted. Contains the segments in which a record had to stay, until all others were
    /// tried.
    compacting: Mutex<HashSet<u64>>,
    disk: AtomicU64,
    live: AtomicU64,
    dead: AtomicU64,
    /// Bytes on disk of the segments that the start could not read.
    left_out: AtomicU64,
    unnoted: Mutex<UnnotedDeletions>,
    /// Bytes of these that still count as live.
    put_off_bytes: AtomicU64,
}

impl Segments {
    /// Opens the directory of the segments. [`Segments::recover`] finds those that exist.
    ///
    /// # Errors
    /// The errors of the file system.
    pub(super) fn open(
        root: &Path,
        names: Vec<String>,
        sizes: Sizes,
        sequence: Arc<AtomicU64>,
        policy: SyncPolicy,
    ) -> io::Result<Self> {
        let directory = root.join("segments");
        fs::create_dir_all(&directory)?;
        let instances = (0..names.len() as u16).map(|id| Some(InstanceId(id))).collect();
        Ok(Self {
            directory,
            names,
            instances,
            sizes,
            policy,
            sequence,
            next_number: AtomicU64::new(1),
            head: Mutex::default(),
            all: RwLock::default(),
            open: OpenFiles::new(),
            copying: Mutex::default(),
            compacting: Mutex::default(),
            disk: AtomicU64::new(0),
            live: AtomicU64::new(0),
            dead: AtomicU64::new(0),
            left_out: AtomicU64::new(0),
            unnoted: Mutex::default(),
            put_off_bytes: AtomicU64::new(0),
        })
    }

    /// Whether files of this size are kept here.
    pub(super) fn takes(&self, size: u64) -> bool {
        self.sizes.fits(size)
    }

    /// Bytes that a file of this size is charged for: those of its record.
    pub(super) fn charge(size: u64) -> u64 {
        record::record_bytes(size)
    }

    /// Bytes on disk that no stored file is charged for, including the dead bytes that compaction may leave.
    pub(super) fn overhead(&self) -> u64 {
        let Takes { disk, live, dead } = self.takes_now();
        let beside = disk.saturating_sub(live).saturating_sub(dead)
            + self.left_out.load(Relaxed)
            + self.put_off_bytes.load(Relaxed);
        beside + dead.max(self.sizes.waste_allowed(disk))
    }

    /// Appends files and returns their generations. Consecutive files are written together, up to the size of a
    /// segment. The files of such a part all fail, or none does.
    pub(super) fn write(&self, files: &[NewFile<'_>], touched: u32) -> Vec<io::Result<WrittenFile>> {
        let first = self.sequence.fetch_add(files.len() as u64, Relaxed);
        let additions: Vec<Addition<'_>> = (first..)
            .zip(files)
            .map(|(sequence, file)| Addition {
                kind: file.key.kind,
                digest: file.key.digest,
                instance: file.key.instance.0,
                pieces: file.pieces,
                length: u32::try_from(file.size()).unwrap_or(u32::MAX),
                touched,
                sequence,
            })
            .collect();
        let mut written = Vec::with_capacity(files.len());
        let (mut rest, mut rest_of_files) = (additions.as_slice(), files);
        while !rest.is_empty() {
            let mut bytes = 0;
            let fits = |addition: &&Addition<'_>| {
                bytes += addition.bytes();
                bytes <= self.sizes.segment
            };
            let count = rest.iter().take_while(fits).count().max(1);
            let (part, after) = rest.split_at(count);
            let (of_part, after_of_files) = rest_of_files.split_at(count);
            (rest, rest_of_files) = (after, after_of_files);
            match self.append(part, |_| Ok(())) {
                Ok(locations) => written.extend(of_part.iter().zip(locations).map(|(file, location)| {
                    let id = FileId { key: file.key, generation: location.generation() };
                    Ok(WrittenFile { file: id, bytes: Self::charge(file.size()), stamp: content::STAMP })
                })),
                Err(error) => written.extend(of_part.iter().map(|_| Err(same_error(&error)))),
            }
        }
        written
    }

    /// Opens a stored file, and reads and checks its content.
    ///
    /// # Errors
    /// `NotFound`, `UnexpectedEof` or `InvalidData` for a record that is lost.
    pub(super) fn read(&self, at: Location, file: &FileId) -> io::Result<Box<dyn Stored>> {
        let segment = self.find(at.segment).ok_or(io::ErrorKind::NotFound)?;
        let content = segment.read(&*self.file_of(at.segment)?, at.slot, &file.key)?;
        Ok(Box::new(content))
    }

    /// The size of a stored file whose record is valid.
    ///
    /// # Errors
    /// The errors of [`Segments::read`].
    pub(super) fn look(&self, at: Location, file: &FileId) -> io::Result<Look> {
        self.read(at, file)?.look()
    }

    /// The number of live records.
    pub(super) fn records(&self) -> u64 {
        let all = self.all.read().unwrap_or_else(PoisonError::into_inner);
        all.values().map(|segment| segment.live_records()).sum()
    }

    /// Waits until a segment is on disk.
    ///
    /// # Errors
    /// The errors of the disk.
    pub(super) fn sync(&self, number: u64) -> io::Result<()> {
        match self.file_of(number).and_then(|file| sync_file(&file)) {
            // Its records were deleted meanwhile.
            Err(_) if self.find(number).is_none() => Ok(()),
            outcome => outcome,
        }
    }

    /// Records that these files are used now.
    pub(super) fn touch(&self, mut places: Vec<Location>, now: u32) {
        places.sort_unstable();
        for places in places.chunk_by(|one, other| one.segment == other.segment) {
            let Some(segment) = places.first().and_then(|at| self.find(at.segment)) else { continue };
            let slots: Vec<u32> = places.iter().map(|at| at.slot).collect();
            // A lost use only affects the order of eviction.
            let _ = self.write_journal(&segment, |path| {
                journal::touch(path, segment.nonce, &slots, now, segment.records())
            });
        }
    }

    /// The sequence of a stored file; 0 if its record is damaged.
    pub(super) fn sequence(&self, at: Location) -> u64 {
        let header = self.find(at.segment).zip(self.file_of(at.segment).ok());
        header
            .and_then(|(segment, file)| segment.read_header(&file, at.slot))
            .map_or(0, |header| header.sequence)
    }

    /// The numbers of the segments to which nothing is appended any more.
    pub(super) fn numbers(&self) -> Vec<u64> {
        let all = self.all.read().unwrap_or_else(PoisonError::into_inner);
        all.values().filter(|segment| segment.is_complete().is_some()).map(|segment| segment.number).collect()
    }

    /// The files whose records are in a segment, deleted ones included.
    ///
    /// # Errors
    /// The errors of the file system; `NotFound` for a segment that is gone.
    pub(super) fn files_in(&self, number: u64) -> io::Result<Vec<FileId>> {
        let segment = self.find(number).ok_or(io::ErrorKind::NotFound)?;
        let rows = recovery::rows_of(&*self.file_of(number)?, &segment)?;
        Ok(rows.iter().filter_map(|row| segment.file_of(row)).collect())
    }

    /// The file and the offset of the content of a record.
    #[cfg(test)]
    pub(crate) fn place(&self, file: &FileId) -> Option<(PathBuf, u64)> {
        let at = Location::of(file)?;
        let header = self.find(at.segment)?.read_header(&*self.file_of(at.segment).ok()?, at.slot)?;
        Some((self.segment_path(at.segment), at.offset() + header.bytes() as u64))
    }

    /// Adds a segment and counts its bytes.
    fn add(&self, segment: Arc<Segment>) {
        self.count((Takes::default(), segment.growth().takes()));
        self.all.write().unwrap_or_else(PoisonError::into_inner).insert(segment.number, segment);
    }

    fn find(&self, number: u64) -> Option<Arc<Segment>> {
        self.all.read().unwrap_or_else(PoisonError::into_inner).get(&number).cloned()
    }

    /// The file of a segment, open for reading.
    fn file_of(&self, number: u64) -> io::Result<Arc<File>> {
        let open = || regular_file::open_own(&self.segment_path(number));
        self.open.get(number, open, || self.find(number).is_some())
    }

    fn copying(&self) -> MutexGuard<'_, CompactionState> {
        self.copying.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn segment_path(&self, number: u64) -> PathBuf {
        self.directory.join(format!("{number:012x}.segment"))
    }

    fn journal_path(&self, number: u64) -> PathBuf {
        self.directory.join(format!("{number:012x}.journal"))
    }

    fn takes_now(&self) -> Takes {
        let [disk, live, dead] = [&self.disk, &self.live, &self.dead].map(|total| total.load(Relaxed));
        Takes { disk, live, dead }
    }

    /// Updates the totals after a change in a segment.
    fn count(&self, (before, after): (Takes, Takes)) {
        let add = |total: &AtomicU64, before: u64, after: u64| {
            // The sum may wrap around and back, because the order of two changes is not known here.
            total.fetch_add(after.wrapping_sub(before), Relaxed);
        };
        add(&self.disk, before.disk, after.disk);
        add(&self.live, before.live, after.live);
        add(&self.dead, before.dead, after.dead);
    }
}

/// Copies the error of several files that failed together.
fn same_error(error: &io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(number) => io::Error::from_raw_os_error(number),
        None => io::Error::new(error.kind(), error.to_string()),
    }
}
