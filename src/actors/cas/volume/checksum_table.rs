//! [`ChecksumTable`]: the block checksums of files that are not in segments.
//!
//! ```text
//! <root>/checksums/<number>.sums    records, one after the other; see `record`. A new file is begun at about 8 MiB
//! ```
//!
//! The checksums are beside the files and not in them, because staging clones and copies whole files, and an adopted
//! output is renamed into the store. A record costs one append, while a checksum file for each stored file would cost
//! another inode and block.
//!
//! Invariants: a record is never changed. It belongs only to the file with its generation, because it also names the
//! hash and the size. If the record of a file is damaged, lost or names another file, the file has no checksums: it is
//! hashed from end to end before it is served, and gets new ones. So nothing here has to be synced, and deletions are
//! not noted on disk: at start, records without a file are dead. A table file with mostly dead records is copied and
//! removed.
//!
//! Memory: about 30 bytes for each file. The lock is not held during IO, except while a table file is created.

mod record;
#[cfg(test)]
mod tests;

use self::record::{
    HEAD_BYTES, RECORD_HEAD_BYTES, RecordHead, Records, UNIT_BYTES, body_at, body_of, head_of, nonce_of,
};
use super::{
    checksums::{BLOCK_BYTES, Checksums},
    is_lost,
    paths::again_with_directory,
};
use crate::{
    actors::cas::index::{EntryKind, FileId, Key},
    regular_file,
};
use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};
use uuid::Uuid;

/// A new table file is begun when the last one has this many bytes. A few megabytes are copied quickly when most of
/// them are dead.
const MAX_FILE_BYTES: u64 = 8 << 20;
/// Larger files are not read. The record of the largest blob has a few MB.
const MAX_READ_BYTES: u64 = 1 << 30;

/// Whether a file of its own gets checksums of its blocks. A small blob is hashed whenever it is read, and a result has
/// a checksum of its own.
pub(super) fn needs_checksums(key: &Key, size: u64) -> bool {
    match key.kind {
        EntryKind::Blob => size > BLOCK_BYTES as u64,
        EntryKind::Result => false,
        EntryKind::Zstd => true,
    }
}

/// The position of a record: the number of its table file, and the offset in units.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct RecordPlace {
    number: u32,
    unit: u32,
}

impl RecordPlace {
    fn offset(self) -> u64 {
        u64::from(self.unit) * UNIT_BYTES
    }
}

/// The state of one file of the table.
#[derive(Debug)]
struct TableFile {
    nonce: u64,
    /// The offset of the next record.
    end: u64,
    /// Bytes of records that are not dead.
    live: u64,
    /// The open file, while records are appended to it.
    file: Option<Arc<File>>,
    /// Number of writers that have reserved a place and have not finished.
    writers: u32,
}

impl TableFile {
    /// Reserves bytes for a record and its writer. Returns the offset.
    fn take(&mut self, length: u64) -> u64 {
        let at = self.end;
        self.end += length;
        self.live += length;
        self.writers += 1;
        at
    }
}

#[derive(Debug, Default)]
struct TableState {
    places: HashMap<u64, RecordPlace>,
    /// Records of earlier runs, with their lengths, whose files were not found yet.
    unclaimed: HashMap<u64, (RecordPlace, u64)>,
    files: BTreeMap<u32, TableFile>,
    /// The greatest number of a table file.
    last: u32,
}

impl TableState {
    /// Counts a record as dead.
    fn bury(&mut self, place: RecordPlace, length: u64) {
        if let Some(file) = self.files.get_mut(&place.number) {
            file.live = file.live.saturating_sub(length);
        }
    }
}

/// The checksums of a store.
#[derive(Debug)]
pub(super) struct ChecksumTable {
    directory: PathBuf,
    state: Mutex<TableState>,
    /// Bytes of all table files. It is read often, and not under the lock, which is held while a file is created.
    taken: AtomicU64,
    last_generation: u64,
}

impl ChecksumTable {
    /// Opens the table and finds its records. [`ChecksumTable::claim`] has to be called for each file before
    /// [`ChecksumTable::end_recovery`].
    ///
    /// # Errors
    /// The errors of the file system.
    pub(super) fn open(root: &Path) -> io::Result<Self> {
        let directory = root.join("checksums");
        fs::create_dir_all(&directory)?;
        let mut table =
            Self { directory, state: Mutex::default(), taken: AtomicU64::new(0), last_generation: 0 };
        let mut numbers: Vec<u32> =
            fs::read_dir(&table.directory)?.flatten().filter_map(|entry| number_of(&entry.path())).collect();
        numbers.sort_unstable();
        for number in numbers {
            table.load(number);
            table.close_all_but_last();
        }
        Ok(table)
    }

    /// The greatest generation of a record.
    pub(super) fn last_generation(&self) -> u64 {
        self.last_generation
    }

    /// Keeps the record of a file with this generation, which was found at start.
    pub(super) fn claim(&self, generation: u64) {
        let mut state = self.state();
        if let Some((place, _)) = state.unclaimed.remove(&generation) {
            state.places.insert(generation, place);
        }
    }

    /// Forgets the records that no file has claimed.
    pub(super) fn end_recovery(&self) {
        let unclaimed = std::mem::take(&mut self.state().unclaimed);
        let empty: Vec<u32> = {
            let mut state = self.state();
            for (place, length) in unclaimed.into_values() {
                state.bury(place, length);
            }
            state.files.iter().filter(|(_, file)| file.live == 0).map(|(number, _)| *number).collect()
        };
        empty.into_iter().for_each(|number| self.tidy(number));
    }

    /// Records the checksums of a file.
    ///
    /// # Errors
    /// The errors of the file system. The file has no checksums then.
    pub(super) fn add(&self, file: &FileId, sums: &Checksums) -> io::Result<()> {
        let head = RecordHead::of(file, sums.size());
        self.append(head, &body_of(sums), None)
    }

    /// The checksums of a file; `None` if there are none for it.
    ///
    /// # Errors
    /// Errors that say nothing about the record, such as too many open files.
    pub(super) fn get(&self, file: &FileId) -> io::Result<Option<Checksums>> {
        let Some((place, nonce)) = self.place_of(file.generation) else { return Ok(None) };
        let read = self.file_of(place.number).and_then(|table| read_record(&table, nonce, place));
        match read {
            Ok(Some((head, sums)))
                if head
                    == RecordHead {
                        body_checksum: head.body_checksum,
                        ..RecordHead::of(file, head.size)
                    } =>
            {
                Ok(Some(sums))
            }
            Err(error) if !is_lost(&error) => Err(error),
            Ok(_) | Err(_) => {
                // The record may have been moved meanwhile, because its table file was copied.
                if self.place_of(file.generation).is_some_and(|(now, _)| now != place) {
                    return self.get(file);
                }
                self.remove(file.generation);
                Ok(None)
            }
        }
    }

    /// Forgets the checksums of a file that is deleted.
    pub(super) fn remove(&self, generation: u64) {
        let place = self.state().places.remove(&generation);
        if let Some(place) = place {
            self.bury(place);
            self.tidy(place.number);
        }
    }

    /// Bytes that the table takes on disk.
    pub(super) fn disk_bytes(&self) -> u64 {
        self.taken.load(Relaxed)
    }

    fn state(&self) -> MutexGuard<'_, TableState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, number: u32) -> PathBuf {
        self.directory.join(format!("{number:08x}.sums"))
    }

    fn place_of(&self, generation: u64) -> Option<(RecordPlace, u64)> {
        let state = self.state();
        let place = *state.places.get(&generation)?;
        Some((place, state.files.get(&place.number)?.nonce))
    }

    fn file_of(&self, number: u32) -> io::Result<Arc<File>> {
        let open = self.state().files.get(&number).and_then(|file| file.file.clone());
        match open {
            Some(file) => Ok(file),
            None => regular_file::open_own(&self.path(number)).map(Arc::new),
        }
    }

    /// Counts a record as dead. If its length cannot be read, the smallest length is counted, because the count only
    /// decides when a file is copied.
    fn bury(&self, place: RecordPlace) {
        let nonce = self.state().files.get(&place.number).map(|file| file.nonce);
        let length = nonce.and_then(|nonce| {
            let table = self.file_of(place.number).ok()?;
            let mut head = [0; RECORD_HEAD_BYTES];
            table.read_exact_at(&mut head, place.offset()).ok()?;
            RecordHead::decode(nonce, &head).map(|head| head.record_bytes())
        });
        self.state().bury(place, length.unwrap_or(RECORD_HEAD_BYTES as u64));
    }

    /// Appends a record. If it is a copy, it takes effect only if the original is still in its place.
    fn append(&self, head: RecordHead, body: &[u8], original: Option<RecordPlace>) -> io::Result<()> {
        let length = head.record_bytes();
        let (number, nonce, at, file) = self.reserve(length)?;
        let bytes = head.encode(nonce, body);
        let written = file.write_all_at(&bytes, at);
        let place = RecordPlace { number, unit: (at / UNIT_BYTES) as u32 };
        let mut state = self.state();
        let is_due = written.is_ok()
            && original.is_none_or(|original| state.places.get(&head.generation) == Some(&original));
        let replaced = if is_due { state.places.insert(head.generation, place) } else { None };
        if let Some(table) = state.files.get_mut(&number) {
            table.writers -= 1;
            if !is_due {
                table.live = table.live.saturating_sub(length);
            }
            if table.end >= MAX_FILE_BYTES && table.writers == 0 {
                table.file = None;
            }
        }
        drop(state);
        if let Some(replaced) = replaced.filter(|_| original.is_none()) {
            self.bury(replaced);
        }
        written
    }

    /// Reserves a place in the last table file, or in a new one.
    fn reserve(&self, length: u64) -> io::Result<(u32, u64, u64, Arc<File>)> {
        let mut state = self.state();
        let last = state.last;
        if let Some(table) = state.files.get_mut(&last)
            && table.end < MAX_FILE_BYTES
            && let Some(file) = table.file.clone()
        {
            self.taken.fetch_add(length, Relaxed);
            return Ok((last, table.nonce, table.take(length), file));
        }
        // The lock is held while the file is created, which is short, so that no other writer creates a second one.
        let number = last + 1;
        let (nonce, _) = Uuid::new_v4().as_u64_pair();
        let path = self.path(number);
        let file = again_with_directory(&path, || {
            OpenOptions::new().read(true).write(true).create_new(true).mode(0o644).open(&path)
        })?;
        if let Err(error) = file.write_all_at(&head_of(nonce), 0) {
            let _ = fs::remove_file(&path);
            return Err(error);
        }
        let file = Arc::new(file);
        let mut table =
            TableFile { nonce, end: HEAD_BYTES as u64, live: 0, file: Some(file.clone()), writers: 0 };
        let at = table.take(length);
        self.taken.fetch_add(table.end, Relaxed);
        state.files.insert(number, table);
        state.last = number;
        Ok((number, nonce, at, file))
    }

    /// Removes a table file without live records. A file with few of them is copied first.
    fn tidy(&self, number: u32) {
        let (nonce, is_empty) = {
            let state = self.state();
            let Some(table) = state.files.get(&number) else { return };
            if table.writers > 0
                || (state.last == number && table.file.is_some())
                || table.live > table.end / 4
            {
                return;
            }
            (table.nonce, !state.places.values().any(|place| place.number == number))
        };
        if !is_empty && self.copy_live(number, nonce).is_err() {
            return;
        }
        let mut state = self.state();
        if !state.places.values().any(|place| place.number == number) {
            let removed = state.files.remove(&number).map_or(0, |table| table.end);
            drop(state);
            self.taken.fetch_sub(removed, Relaxed);
            let _ = fs::remove_file(self.path(number));
        }
    }

    fn copy_live(&self, number: u32, nonce: u64) -> io::Result<()> {
        let bytes = regular_file::read_own(&self.path(number), MAX_READ_BYTES)?;
        for (at, head) in Records::new(nonce, &bytes) {
            let place = RecordPlace { number, unit: (at / UNIT_BYTES) as u32 };
            if self.state().places.get(&head.generation) != Some(&place) {
                continue;
            }
            match body_at(&bytes, at, &head) {
                Some(body) => self.append(head, body, Some(place))?,
                None => {
                    self.state().places.remove(&head.generation);
                }
            }
        }
        // The remaining records of this file could not be read.
        self.state().places.retain(|_, place| place.number != number);
        Ok(())
    }

    /// Reads the headers of the records of one table file.
    fn load(&mut self, number: u32) {
        let path = self.path(number);
        self.state().last = number;
        let bytes = match regular_file::read_own(&path, MAX_READ_BYTES) {
            Ok(bytes) => bytes,
            Err(error) if is_lost(&error) => Vec::new(),
            // The table file is ignored, and the files of its records are hashed again.
            Err(_) => return,
        };
        let Some(nonce) = nonce_of(&bytes) else {
            // Without the nonce, no record can be found. The files of these records are hashed again.
            let _ = fs::remove_file(path);
            return;
        };
        let (mut live, mut end) = (0, bytes.len().max(HEAD_BYTES) as u64);
        let mut state = self.state();
        let mut last_generation = 0;
        for (at, head) in Records::new(nonce, &bytes) {
            let (place, length) =
                (RecordPlace { number, unit: (at / UNIT_BYTES) as u32 }, head.record_bytes());
            live += length;
            // The last record may be cut off. New records must not overlap it.
            end = end.max(at + length);
            last_generation = last_generation.max(head.generation);
            match state.unclaimed.insert(head.generation, (place, length)) {
                Some((earlier, length)) if earlier.number == number => live -= length,
                Some((earlier, length)) => state.bury(earlier, length),
                None => {}
            }
        }
        let end = end.next_multiple_of(UNIT_BYTES);
        let file = if end < MAX_FILE_BYTES { open_to_append(&path).ok().map(Arc::new) } else { None };
        state.files.insert(number, TableFile { nonce, end, live, file, writers: 0 });
        self.taken.fetch_add(end, Relaxed);
        drop(state);
        self.last_generation = self.last_generation.max(last_generation);
    }

    /// Closes all table files except the last one, to which records are appended.
    fn close_all_but_last(&self) {
        let mut state = self.state();
        let mut files: Vec<_> = state.files.values_mut().collect();
        files.pop();
        files.into_iter().for_each(|table| table.file = None);
    }
}

/// Opens a table file for reading and writing. Fails if something else is in its place.
fn open_to_append(path: &Path) -> io::Result<File> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::from_raw_os_error(libc::ENXIO)) }
}

/// Reads the record at a place; `None` if it is damaged.
fn read_record(table: &File, nonce: u64, place: RecordPlace) -> io::Result<Option<(RecordHead, Checksums)>> {
    let mut head = [0; RECORD_HEAD_BYTES];
    table.read_exact_at(&mut head, place.offset())?;
    let Some(head) = RecordHead::decode(nonce, &head) else { return Ok(None) };
    let mut body = vec![0; usize::try_from(head.body_bytes()).map_err(io::Error::other)?];
    table.read_exact_at(&mut body, place.offset() + RECORD_HEAD_BYTES as u64)?;
    Ok(head.checksums(&body).map(|sums| (head, sums)))
}

/// The number of a table file with this path.
fn number_of(path: &Path) -> Option<u32> {
    let name = path.file_name()?.to_str()?.strip_suffix(".sums")?;
    u32::from_str_radix(name, 16).ok().filter(|number| format!("{number:08x}") == name)
}
