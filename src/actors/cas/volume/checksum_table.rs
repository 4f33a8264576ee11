//! [`ChecksumTable`]: the block checksums of the files that lie on their own.
//!
//! ```text
//! <root>/checksums/<number>.sums    records, one after the other; a new file is begun at about 8 MiB
//!
//! head    "gorego sums 1", zeros 3, nonce 8, zeros 8
//! record  nonce 8, CRC-32C of the rest of the record 4, CRC-32C of the rest of this header 4, generation 8, bytes of the file 8,
//!         start of the hash 16, CRC-32C of each block of the file 4, zeros up to a multiple of 8
//! ```
//!
//! The checksums lie beside the files and not in them, because staging clones and copies whole files and an adopted output is
//! renamed into the store. A record costs one append, while a file of checksums for each stored file would cost another inode and
//! block.
//!
//! Invariants: a record is never changed. It belongs to the file with its generation, and to no other, because it names the hash and
//! the size too. A record that is damaged, lost or of another file means that the file has no checksums: it is hashed from end to
//! end before it is served, and gets new ones. So nothing here has to be synced, and no deletion is noted on disk: at start, records
//! without a file are dead. A table file in which most is dead is copied and removed.
//!
//! Memory: about 30 bytes for each file. The lock is not held during IO, but while a table file is created.

use super::{
    checksums::Checksums,
    is_lost,
    segments::{again_with_directory, u32_at, u64_at},
};
use crate::{actors::cas::index::FileId, regular_file};
use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use uuid::Uuid;

const MAGIC: &[u8; 16] = b"gorego sums 1\0\0\0";
const HEAD_BYTES: usize = 32;
/// Bytes of a record before its checksums.
const RECORD_HEAD_BYTES: usize = 48;
/// Records start at multiples of this.
const UNIT_BYTES: u64 = 8;
/// The part of a record's header that its checksum covers starts here.
const CHECKED_FROM: usize = 16;
/// A new table file is begun when the last one has this many bytes: a few megabytes are quickly copied when most of them are dead.
const MAX_FILE_BYTES: u64 = 8 << 20;
/// Larger files are not read. The record of the largest blob has a few MB.
const MAX_READ_BYTES: u64 = 1 << 30;

/// Where a record lies: the number of the table file, and the offset in units.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    number: u32,
    unit: u32,
}

/// One table file.
#[derive(Debug)]
struct TableFile {
    nonce: u64,
    /// Where the next record goes.
    end: u64,
    /// Bytes of records that are not dead.
    live: u64,
    /// Open while records are appended.
    file: Option<Arc<File>>,
    /// Writers that have reserved a place and are not done.
    writers: u32,
}

#[derive(Debug, Default)]
struct TableState {
    places: HashMap<u64, Place>,
    /// Records of earlier runs whose files were not found yet.
    unclaimed: HashMap<u64, (Place, u64)>,
    files: BTreeMap<u32, TableFile>,
    /// The greatest number of a table file so far.
    last: u32,
}

/// The checksums of a store.
#[derive(Debug)]
pub(super) struct ChecksumTable {
    directory: PathBuf,
    state: Mutex<TableState>,
    last_generation: u64,
}

/// A record, without its checksums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct RecordHead {
    generation: u64,
    size: u64,
    hash: [u8; 16],
    body_checksum: u32,
}

impl ChecksumTable {
    /// Opens the table and finds its records. Each has to be claimed by its file before [`ChecksumTable::end_recovery`].
    ///
    /// # Errors
    /// The errors of the file system.
    pub(super) fn open(root: &Path) -> io::Result<Self> {
        let directory = root.join("checksums");
        fs::create_dir_all(&directory)?;
        let mut table = Self { directory, state: Mutex::default(), last_generation: 0 };
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

    /// A file of this generation was found at start.
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
                // Compaction may have moved it meanwhile.
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

    /// Bytes on disk.
    pub(super) fn disk_bytes(&self) -> u64 {
        self.state().files.values().map(|file| file.end).sum()
    }

    fn state(&self) -> MutexGuard<'_, TableState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, number: u32) -> PathBuf {
        self.directory.join(format!("{number:08x}.sums"))
    }

    fn place_of(&self, generation: u64) -> Option<(Place, u64)> {
        let state = self.state();
        let place = *state.places.get(&generation)?;
        Some((place, state.files.get(&place.number)?.nonce))
    }

    fn file_of(&self, number: u32) -> io::Result<Arc<File>> {
        let open = self.state().files.get(&number).and_then(|file| file.file.clone());
        match open {
            Some(file) => Ok(file),
            None => regular_file::open(&self.path(number)).map(Arc::new),
        }
    }

    /// Counts a record as dead. Its length is read, and guessed if that fails: the count only decides when a file is copied.
    fn bury(&self, place: Place) {
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
    fn append(&self, head: RecordHead, body: &[u8], original: Option<Place>) -> io::Result<()> {
        let length = head.record_bytes();
        let (number, nonce, at, file) = self.reserve(length)?;
        let bytes = head.encode(nonce, body);
        let written = file.write_all_at(&bytes, at);
        let place = Place { number, unit: (at / UNIT_BYTES) as u32 };
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
            return Ok((last, table.nonce, table.take(length), file));
        }
        // Creating a file is short, and nobody else should create a second one meanwhile.
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
        state.files.insert(number, table);
        state.last = number;
        Ok((number, nonce, at, file))
    }

    /// Removes a table file in which nothing lives, and copies one in which little does.
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
            state.files.remove(&number);
            drop(state);
            let _ = fs::remove_file(self.path(number));
        }
    }

    fn copy_live(&self, number: u32, nonce: u64) -> io::Result<()> {
        let bytes = regular_file::read(&self.path(number), MAX_READ_BYTES)?;
        for (at, head) in Records::new(nonce, &bytes) {
            let place = Place { number, unit: (at / UNIT_BYTES) as u32 };
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
        // What is left in the map could not be read.
        self.state().places.retain(|_, place| place.number != number);
        Ok(())
    }

    /// Reads the heads of the records of one table file.
    fn load(&mut self, number: u32) {
        let path = self.path(number);
        self.state().last = number;
        let bytes = match regular_file::read(&path, MAX_READ_BYTES) {
            Ok(bytes) => bytes,
            Err(error) if is_lost(&error) => Vec::new(),
            // It is left alone. Its files are hashed again.
            Err(_) => return,
        };
        let nonce = bytes.starts_with(MAGIC).then(|| u64_at(&bytes, MAGIC.len())).flatten();
        let Some(nonce) = nonce else {
            // Without its nonce nothing in it can be found. Its files are hashed again.
            let _ = fs::remove_file(path);
            return;
        };
        let (mut live, mut end) = (0, bytes.len().max(HEAD_BYTES) as u64);
        let mut state = self.state();
        let mut last_generation = 0;
        for (at, head) in Records::new(nonce, &bytes) {
            let (place, length) = (Place { number, unit: (at / UNIT_BYTES) as u32 }, head.record_bytes());
            live += length;
            // The last record may be cut off. What is appended must not lie within it.
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
        drop(state);
        self.last_generation = self.last_generation.max(last_generation);
    }

    /// Closes the table files of earlier runs but the last, to which records are appended.
    fn close_all_but_last(&self) {
        let mut state = self.state();
        let mut files: Vec<_> = state.files.values_mut().collect();
        files.pop();
        files.into_iter().for_each(|table| table.file = None);
    }
}

/// Opens a table file, which may have been replaced by something else, for reading and writing.
fn open_to_append(path: &Path) -> io::Result<File> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::from_raw_os_error(libc::ENXIO)) }
}

impl TableState {
    fn bury(&mut self, place: Place, length: u64) {
        if let Some(file) = self.files.get_mut(&place.number) {
            file.live = file.live.saturating_sub(length);
        }
    }
}

impl TableFile {
    fn take(&mut self, length: u64) -> u64 {
        let at = self.end;
        self.end += length;
        self.live += length;
        self.writers += 1;
        at
    }
}

impl Place {
    fn offset(self) -> u64 {
        u64::from(self.unit) * UNIT_BYTES
    }
}

impl RecordHead {
    fn of(file: &FileId, size: u64) -> Self {
        let mut hash = [0; 16];
        let of_file = file.key.digest.hash();
        hash.iter_mut().zip(of_file).for_each(|(to, from)| *to = *from);
        Self { generation: file.generation, size, hash, body_checksum: 0 }
    }

    fn body_bytes(&self) -> u64 {
        self.size.div_ceil(super::checksums::BLOCK_BYTES as u64).saturating_mul(4)
    }

    fn record_bytes(&self) -> u64 {
        (RECORD_HEAD_BYTES as u64).saturating_add(self.body_bytes().next_multiple_of(UNIT_BYTES))
    }

    fn encode(&self, nonce: u64, body: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.record_bytes() as usize);
        bytes.extend_from_slice(&nonce.to_le_bytes());
        bytes.extend_from_slice(&crc32c::crc32c(body).to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&self.generation.to_le_bytes());
        bytes.extend_from_slice(&self.size.to_le_bytes());
        bytes.extend_from_slice(&self.hash);
        let checksum = head_checksum(&bytes);
        if let Some(place) = bytes.get_mut(12..CHECKED_FROM) {
            place.copy_from_slice(&checksum.to_le_bytes());
        }
        bytes.extend_from_slice(body);
        bytes.resize(bytes.len().next_multiple_of(UNIT_BYTES as usize), 0);
        bytes
    }

    /// Reads the head of a record; `None` if none is there.
    fn decode(nonce: u64, bytes: &[u8]) -> Option<Self> {
        let bytes = bytes.get(..RECORD_HEAD_BYTES)?;
        if u64_at(bytes, 0)? != nonce || u32_at(bytes, 12)? != head_checksum(bytes) {
            return None;
        }
        Some(Self {
            generation: u64_at(bytes, 16)?,
            size: u64_at(bytes, 24)?,
            hash: bytes.get(32..48)?.try_into().ok()?,
            body_checksum: u32_at(bytes, 8)?,
        })
    }
}

/// The records in the bytes of a table file, each with its offset. Damaged ones are skipped.
struct Records<'a> {
    nonce: u64,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Records<'a> {
    fn new(nonce: u64, bytes: &'a [u8]) -> Self {
        Self { nonce, bytes, at: HEAD_BYTES }
    }
}

impl Iterator for Records<'_> {
    type Item = (u64, RecordHead);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let rest = self.bytes.get(self.at..).filter(|rest| rest.len() >= RECORD_HEAD_BYTES)?;
            let at = self.at as u64;
            match RecordHead::decode(self.nonce, rest) {
                Some(head) => {
                    self.at = self.at.saturating_add(usize::try_from(head.record_bytes()).ok()?);
                    return Some((at, head));
                }
                None => self.at += UNIT_BYTES as usize,
            }
        }
    }
}

fn head_of(nonce: u64) -> [u8; HEAD_BYTES] {
    let mut head = [0; HEAD_BYTES];
    let fields = MAGIC.iter().copied().chain(nonce.to_le_bytes());
    head.iter_mut().zip(fields).for_each(|(to, from)| *to = from);
    head
}

/// The checksum of a record's header, which also covers that of its body.
fn head_checksum(head: &[u8]) -> u32 {
    let of_body = crc32c::crc32c(head.get(8..12).unwrap_or_default());
    crc32c::crc32c_append(of_body, head.get(CHECKED_FROM..RECORD_HEAD_BYTES).unwrap_or_default())
}

fn body_of(sums: &Checksums) -> Vec<u8> {
    sums.blocks().iter().flat_map(|sum| sum.to_le_bytes()).collect()
}

/// The body of the record at an offset, if it is as it was written.
fn body_at<'a>(bytes: &'a [u8], at: u64, head: &RecordHead) -> Option<&'a [u8]> {
    let start = usize::try_from(at).ok()?.checked_add(RECORD_HEAD_BYTES)?;
    let body = bytes.get(start..)?.get(..usize::try_from(head.body_bytes()).ok()?)?;
    (crc32c::crc32c(body) == head.body_checksum).then_some(body)
}

/// Reads the record at a place; `None` if it is damaged.
fn read_record(table: &File, nonce: u64, place: Place) -> io::Result<Option<(RecordHead, Checksums)>> {
    let mut head = [0; RECORD_HEAD_BYTES];
    table.read_exact_at(&mut head, place.offset())?;
    let Some(head) = RecordHead::decode(nonce, &head) else { return Ok(None) };
    let mut body = vec![0; usize::try_from(head.body_bytes()).map_err(io::Error::other)?];
    table.read_exact_at(&mut body, place.offset() + RECORD_HEAD_BYTES as u64)?;
    if crc32c::crc32c(&body) != head.body_checksum {
        return Ok(None);
    }
    let sums = body.chunks_exact(4).filter_map(|sum| u32_at(sum, 0)).collect();
    Ok(Checksums::new(head.size, sums).map(|sums| (head, sums)))
}

/// The number of a table file with this path.
fn number_of(path: &Path) -> Option<u32> {
    let name = path.file_name()?.to_str()?.strip_suffix(".sums")?;
    u32::from_str_radix(name, 16).ok().filter(|number| format!("{number:08x}") == name)
}

#[cfg(test)]
mod tests;
