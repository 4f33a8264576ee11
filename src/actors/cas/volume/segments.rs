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
//!   removed.
//! - Of two records of one key, the one with the greater sequence is newer. A copy keeps the sequence of its original.
//! - Bytes on disk that no stored file is charged for ([`Segments::overhead`]) are bounded by compaction
//!   ([`compaction`]).
//! - The death of the process loses nothing that was written, and the checksums detect damage by a power cut. With
//!   [`SyncPolicy::BeforeAnswer`], a segment is synced before its records are acknowledged, before it gets its table,
//!   and before the originals of its copies are removed.
//!
//! Locks are taken in this order: `copying`, `head`, `all`, and the lock of a segment. None of them is held during IO,
//! except `head` while a new segment is created.

mod append;
mod compaction;
mod content;
mod journal;
mod open_files;
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
    durable::{SyncPolicy, sync_directory, sync_file},
};
use crate::{
    actors::cas::index::{EntryKind, FileId, Victim},
    disk::is_full,
    instance::InstanceId,
    regular_file,
};
use append::Appended;
use compaction::CompactionState;
use open_files::OpenFiles;
use rustix::fs::{FallocateFlags, fallocate};
use segment::{Addition, Segment, Takes};
use std::{
    collections::{BTreeMap, HashSet},
    fs::{self, File, OpenOptions},
    io,
    ops::Range,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

/// Holes in segments have a multiple of this size, which is that of a block of most file systems.
const HOLE_BYTES: u64 = 4_096;

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
    /// Slots of deleted records whose deletion could not be noted, by the number of the segment. They would come back
    /// with the next start.
    unnoted: Mutex<BTreeMap<u64, Vec<u32>>>,
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
        let beside = disk.saturating_sub(live).saturating_sub(dead) + self.left_out.load(Relaxed);
        beside + dead.max(self.sizes.waste_allowed(disk))
    }

    /// Appends files and returns their generations. All of them are written at once, so all of them fail or none.
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
        match self.append(&additions, |_| Ok(())) {
            Ok(locations) => (files.iter().zip(locations))
                .map(|(file, location)| {
                    let id = FileId { key: file.key, generation: location.generation() };
                    Ok(WrittenFile { file: id, bytes: Self::charge(file.size()), stamp: content::STAMP })
                })
                .collect(),
            Err(error) => files.iter().map(|_| Err(same_error(&error))).collect(),
        }
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

    /// Deletes stored files. Returns the files whose deletion could not be noted. They come back with the next start.
    pub(super) fn delete(&self, victims: &[(Location, Victim)]) -> Vec<(FileId, io::Error)> {
        let mut by_segment: BTreeMap<u64, Vec<(u32, FileId)>> = BTreeMap::new();
        for (at, victim) in victims {
            by_segment.entry(at.segment).or_default().push((at.slot, victim.file));
        }
        let mut failures = Vec::new();
        for (number, records) in by_segment {
            if let Err(error) = self.delete_in(number, &records, victims) {
                failures.extend(records.iter().map(|(_, file)| (*file, same_error(&error))));
            }
        }
        failures
    }

    fn delete_in(
        &self,
        number: u64,
        records: &[(u32, FileId)],
        victims: &[(Location, Victim)],
    ) -> io::Result<()> {
        let Some(segment) = self.find(number) else { return Ok(()) };
        let bytes =
            victims.iter().filter(|(at, _)| at.segment == number).map(|(_, victim)| victim.bytes).sum();
        let slots: Vec<u32> = records.iter().map(|(slot, _)| *slot).collect();
        // Otherwise a copy that compaction has made, or its original, would come back.
        for twin in self.copying().twins_of(number, &slots) {
            if let Some(segment) = self.find(twin.segment) {
                self.bury(&segment, &[twin.slot])?;
                self.sync_journal(&segment, records)?;
            }
        }
        if !self.forget(&segment, slots.len() as u64, bytes) {
            let buried = self.bury(&segment, &slots).or_else(|error| {
                if !is_full(&error) {
                    return Err(error);
                }
                let dead = victims.iter().filter(|(at, _)| at.segment == number);
                let dead = dead.map(|(at, victim)| at.offset()..at.offset() + victim.bytes);
                punch(&self.segment_path(number), dead.collect())?;
                self.bury(&segment, &slots)
            });
            if buried.is_err() {
                self.unnoted().entry(number).or_default().extend(slots);
            }
            buried?;
            self.sync_journal(&segment, records)?;
        }
        Ok(())
    }

    /// Notes the deletions that could not be noted before, as far as that works now.
    pub(super) fn note_again(&self) {
        let unnoted = std::mem::take(&mut *self.unnoted());
        for (number, slots) in unnoted {
            let Some(segment) = self.find(number) else { continue };
            let noted = self.bury(&segment, &slots).and_then(|()| match self.policy {
                SyncPolicy::Never => Ok(()),
                SyncPolicy::BeforeAnswer => sync_file(&regular_file::open(&self.journal_path(number))?),
            });
            if noted.is_err() {
                self.unnoted().entry(number).or_default().extend(slots);
            }
        }
    }

    fn unnoted(&self) -> MutexGuard<'_, BTreeMap<u64, Vec<u32>>> {
        self.unnoted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of live records.
    pub(super) fn records(&self) -> u64 {
        let all = self.all.read().unwrap_or_else(PoisonError::into_inner);
        all.values().map(|segment| segment.records()).sum()
    }

    /// Makes the deletion of results durable, because purged results must not come back. Blobs may.
    fn sync_journal(&self, segment: &Segment, deleted: &[(u32, FileId)]) -> io::Result<()> {
        let is_result = |(_, file): &(u32, FileId)| file.key.kind == EntryKind::Result;
        if self.policy == SyncPolicy::Never || !deleted.iter().any(is_result) {
            return Ok(());
        }
        match regular_file::open(&self.journal_path(segment.number)) {
            Ok(journal) => {
                sync_file(&journal)?;
                sync_directory(&self.directory)
            }
            // The segment is gone.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
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
            let path = self.journal_path(segment.number);
            // A lost use only affects the order of eviction.
            if let Ok(bytes) = journal::touch(&path, segment.nonce, &slots, now, segment.records()) {
                self.count(segment.journal_grew(bytes));
            }
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

    /// Subtracts records from the count. Returns whether the segment is gone now.
    fn forget(&self, segment: &Segment, records: u64, bytes: u64) -> bool {
        let (is_gone, before, after) = segment.forget(records, bytes);
        self.count((before, after));
        if is_gone {
            self.remove(segment.number);
        }
        is_gone
    }

    /// Notes in the journal that records are dead.
    fn bury(&self, segment: &Segment, slots: &[u32]) -> io::Result<()> {
        let bytes = journal::bury(&self.journal_path(segment.number), segment.nonce, slots)?;
        self.count(segment.journal_grew(bytes));
        if segment.is_gone() {
            // Its last record was deleted meanwhile.
            let _ = fs::remove_file(self.journal_path(segment.number));
        }
        Ok(())
    }

    /// Removes the files of a segment that is gone. Readers that have it open can read on.
    fn remove(&self, number: u64) {
        self.all.write().unwrap_or_else(PoisonError::into_inner).remove(&number);
        self.open.remove(number);
        // If this fails, the next start removes the file, because it finds no live record in it.
        let _ = fs::remove_file(self.segment_path(number));
        let _ = fs::remove_file(self.journal_path(number));
        if self.policy == SyncPolicy::BeforeAnswer {
            // The segment must not come back without its journal, because a result in it may have been purged.
            let _ = sync_directory(&self.directory);
        }
    }

    fn find(&self, number: u64) -> Option<Arc<Segment>> {
        self.all.read().unwrap_or_else(PoisonError::into_inner).get(&number).cloned()
    }

    /// The file of a segment, open for reading.
    fn file_of(&self, number: u64) -> io::Result<Arc<File>> {
        self.open.get(number, || regular_file::open_own(&self.segment_path(number)))
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

/// Gives the blocks of these ranges of a file back to the file system. Nobody reads the ranges any more. A full disk
/// may have no other space for the note that their records are dead.
fn punch(path: &Path, mut ranges: Vec<Range<u64>>) -> io::Result<()> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = OpenOptions::new().write(true).custom_flags(flags).open(path)?;
    ranges.sort_unstable_by_key(|range| range.start);
    for adjacent in ranges.chunk_by(|one, next| one.end == next.start) {
        let (Some(first), Some(last)) = (adjacent.first(), adjacent.last()) else { continue };
        let (start, end) = (first.start.next_multiple_of(HOLE_BYTES), last.end / HOLE_BYTES * HOLE_BYTES);
        if start < end {
            fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, start, end - start)?;
        }
    }
    Ok(())
}

/// Copies the error of several files that failed together.
fn same_error(error: &io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(number) => io::Error::from_raw_os_error(number),
        None => io::Error::new(error.kind(), error.to_string()),
    }
}
