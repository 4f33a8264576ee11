//! Finds the records of segments at start.
//!
//! A complete segment has a table, and only its table and its journal are read. A segment without a valid table is
//! scanned from its head on. Parts that a crash has left unwritten or half-written are skipped, because records that
//! follow them may have been acknowledged. Then the segment gets its table. Nothing is read beyond the offsets that
//! locations can have ([`Location::END`]), whatever the length of the file. Several threads read segments and pass on
//! the records.

use super::{
    Segments,
    journal::{self, JournalNotes},
    record::{Header, Location, SLOT_BYTES},
    segment::{MAX_RECORD_BYTES, Segment, read_up_to, slot_at},
    table::{Head, MAX_HEAD_BYTES, Row, TRAILER_BYTES, Trailer, are_rows, rows},
};
use crate::{
    actors::cas::{
        index::EntryKind,
        volume::{Recovered, Repairs, Take, paths::BLOCK_UNIT_BYTES},
    },
    instance::InstanceId,
    logging::Event,
    regular_file,
};
use bytes::Bytes;
use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt as _, MetadataExt as _},
    panic::resume_unwind,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread,
};

const LOG: &str = "gorego::cas";
/// Threads that read segments. Some of them wait for the disk while others decode.
const THREADS: usize = 4;
/// Number of bytes of a damaged part that are searched for the next record at a time.
const SEARCH_BYTES: u64 = 64 << 10;

/// The records of a segment end here at the latest: the last one may start right before [`Location::END`].
const LAST_END: u64 = Location::END + MAX_RECORD_BYTES;

/// The outcome of reading a file with the name of a segment.
enum SegmentRead {
    /// The records were passed on.
    Taken,
    /// The file has nothing that can be used.
    Useless,
    Unreadable,
}

/// A segment whose records are not counted yet.
struct Opened {
    head: Head,
    /// The offset of the end of its records.
    end: u64,
    last_sequence: u64,
    /// The rows of its records, encoded.
    rows: Bytes,
}

impl Segments {
    /// Passes on every record that is not dead, and removes the segments that have none.
    pub(in crate::actors::cas::volume) fn recover(&self, take: Take<'_>) -> Repairs {
        let mut repairs = Repairs::default();
        let mut numbers = self.list(&mut repairs);
        self.next_number.fetch_max(numbers.last().map_or(1, |last| last + 1), Relaxed);
        // After a kill, the last segment has to be scanned. This takes longest, so it comes first.
        let is_any = usize::from(!numbers.is_empty());
        numbers.rotate_right(is_any);
        let next = AtomicUsize::new(0);
        thread::scope(|scope| {
            let read = || {
                let mut repairs = Repairs::default();
                while let Some(&number) = numbers.get(next.fetch_add(1, Relaxed)) {
                    repairs += self.read_one(number, take);
                }
                repairs
            };
            let readers: Vec<_> = (0..THREADS.min(numbers.len())).map(|_| scope.spawn(read)).collect();
            for reader in readers {
                repairs += reader.join().unwrap_or_else(|panic| resume_unwind(panic));
            }
        });
        repairs
    }

    fn read_one(&self, number: u64, take: Take<'_>) -> Repairs {
        let (removed, unreadable) = match self.read_segment(number, take) {
            SegmentRead::Taken => (0, 0),
            SegmentRead::Unreadable => {
                let paths = [self.segment_path(number), self.journal_path(number)];
                self.left_out.fetch_add(paths.iter().map(|path| disk_bytes(path)).sum(), Relaxed);
                (0, 1)
            }
            SegmentRead::Useless => {
                self.remove(number);
                (1, 0)
            }
        };
        Repairs { removed, unreadable, ..Repairs::default() }
    }

    /// The numbers of the segments on disk, in order. Journals without a segment are removed.
    fn list(&self, repairs: &mut Repairs) -> Vec<u64> {
        let (mut numbers, mut beside) = (Vec::new(), Vec::new());
        let Ok(entries) = fs::read_dir(&self.directory) else {
            repairs.unreadable += 1;
            return numbers;
        };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let parts = name.to_str().and_then(|name| name.split_once('.'));
            let number = parts.and_then(|(number, kind)| Some((u64::from_str_radix(number, 16).ok()?, kind)));
            match number {
                Some((number, "segment"))
                    if number <= Location::MAX_FOUND && self.segment_path(number) == entry.path() =>
                {
                    numbers.push(number)
                }
                Some((number, "journal" | "new")) => beside.push((number, entry.path())),
                _ => repairs.foreign += 1,
            }
        }
        numbers.sort_unstable();
        for (number, path) in beside {
            if numbers.binary_search(&number).is_err() || path.extension().is_some_and(|kind| kind == "new") {
                let _ = fs::remove_file(path);
            }
        }
        numbers
    }

    fn read_segment(&self, number: u64, take: Take<'_>) -> SegmentRead {
        let path = self.segment_path(number);
        let Ok(file) = regular_file::open_own(&path) else { return SegmentRead::Unreadable };
        let Ok(opened) = open(&file) else { return SegmentRead::Unreadable };
        let Some(opened) = opened.filter(|opened| opened.head.number == number) else {
            return SegmentRead::Useless;
        };
        let opened = match opened {
            opened if opened.end > 0 => opened,
            opened => match scan_and_tell(&path, &file, opened.head) {
                Ok(scanned) => {
                    let _ = complete(&path, &scanned);
                    scanned
                }
                Err(_) => return SegmentRead::Unreadable,
            },
        };
        let Ok(metadata) = file.metadata() else { return SegmentRead::Unreadable };
        // Also if the segment is left out: records of this run are newer than its records, which may return later.
        self.sequence.fetch_max(opened.last_sequence.saturating_add(1), Relaxed);
        match self.notes_of(&opened) {
            Ok(notes) => {
                self.take_in(opened, &notes, metadata.len(), take);
                SegmentRead::Taken
            }
            Err(error) => {
                Event::warn(LOG, "segment_left_out")
                    .with_shown("path", &path.display())
                    .with_shown("error", &error)
                    .log(format_args!(
                        "the journal of this segment can neither be read nor replaced; the next start tries again; if it fails \
                         again, remove the segment and its journal"
                    ));
                SegmentRead::Unreadable
            }
        }
    }

    /// The notes about the records of a segment. A journal that cannot be read may note that a result was purged. It is
    /// replaced by one that notes all results as dead. A blob that was deleted may come back.
    ///
    /// # Errors
    /// The errors of the file system for a journal that can neither be read nor replaced.
    fn notes_of(&self, segment: &Opened) -> io::Result<JournalNotes> {
        let Opened { head, rows: table, .. } = segment;
        let journal = self.journal_path(head.number);
        // Otherwise the store would lose room for nothing.
        let _ = journal::shorten(&journal, head.nonce, rows(table).count() as u64);
        journal::read(&journal, head.nonce).or_else(|error| {
            let results = rows(table).filter(|row| row.kind == EntryKind::Result);
            let notes = journal::replace(&journal, head.nonce, results.map(|row| row.slot))?;
            Event::warn(LOG, "journal_replaced")
                .with_shown("path", &journal.display())
                .with_shown("error", &error)
                .log(format_args!(
                    "a journal could not be read and was replaced; the action results of its segment are dropped, and \
                     blobs that were deleted may be back"
                ));
            Ok(notes)
        })
    }

    /// Counts a segment of this size, and passes on its records that are not dead. A segment without such records is
    /// removed.
    fn take_in(&self, opened: Opened, notes: &JournalNotes, bytes: u64, take: Take<'_>) {
        let Opened { head, end, rows: table, .. } = opened;
        let position = |name: &String| self.names.iter().position(|own| own == name);
        let id = |name: &String| position(name).map(|at| InstanceId(at as u16));
        let instances: Arc<[Option<InstanceId>]> = head.names.iter().map(id).collect();
        let journal = self.journal_path(head.number);
        let journal_bytes = fs::symlink_metadata(&journal).map_or(0, |metadata| metadata.len());
        let segment = Arc::new(Segment::complete(
            &head,
            (rows(&table).count() as u64, end),
            (bytes, journal_bytes),
            instances,
        ));
        let recovered = |row: Row| {
            Some(Recovered {
                file: segment.file_of(&row).filter(|_| !notes.is_dead(row.slot))?,
                bytes: Self::charge(u64::from(row.length)),
                touched: notes.touched(row.slot, row.touched),
            })
        };
        self.add(segment.clone());
        let (mut records, mut live) = (0, 0);
        let found = rows(&table).filter_map(recovered);
        take(&mut found.inspect(|found| (records, live) = (records + 1, live + found.bytes)));
        self.count(segment.found(records, live));
        self.forget(&segment, 0, 0);
    }
}

/// Bytes that a file takes on disk.
fn disk_bytes(path: &Path) -> u64 {
    fs::symlink_metadata(path).map_or(0, |metadata| metadata.blocks().saturating_mul(BLOCK_UNIT_BYTES))
}

/// The rows of a complete segment, in the order of the records.
pub(super) fn rows_of(file: &File, segment: &Segment) -> io::Result<Vec<Row>> {
    match open(file)?.filter(|opened| opened.head.nonce == segment.nonce) {
        Some(opened) if opened.end > 0 => Ok(rows(&opened.rows).collect()),
        Some(opened) => Ok(rows(&scan(file, opened.head)?.rows).collect()),
        None => Err(super::damaged("a segment has lost both of its ends")),
    }
}

/// Opens a segment by its table. Without a table, the end is 0. `None` if neither the head nor the table is valid.
fn open(file: &File) -> io::Result<Option<Opened>> {
    let size = file.metadata()?.len();
    if let Some(opened) = open_by_table(file, size)? {
        return Ok(Some(opened));
    }
    let mut start = Vec::new();
    read_up_to(file, 0, 4_096, &mut start)?;
    let Some(length) = Head::length(&start) else { return Ok(None) };
    read_up_to(file, 0, length.min(MAX_HEAD_BYTES) as u64, &mut start)?;
    Ok(Head::decode(&start).map(|head| Opened { head, end: 0, last_sequence: 0, rows: Bytes::new() }))
}

fn open_by_table(file: &File, size: u64) -> io::Result<Option<Opened>> {
    let mut trailer = Vec::new();
    let Some(at) = size.checked_sub(TRAILER_BYTES as u64) else { return Ok(None) };
    read_up_to(file, at, TRAILER_BYTES as u64, &mut trailer)?;
    let trailer = Trailer::decode(&trailer, size).filter(|trailer| trailer.table_at <= LAST_END);
    let Some(trailer) = trailer else { return Ok(None) };
    let mut end = Vec::new();
    read_up_to(file, trailer.table_at, size - trailer.table_at, &mut end)?;
    let end = Bytes::from(end);
    let Some((head, table)) = trailer.open(&end) else { return Ok(None) };
    let Trailer { table_at, last_sequence, .. } = trailer;
    let opened = || Opened { head, end: table_at, last_sequence, rows: end.slice_ref(table) };
    Ok(are_rows(table).then(opened))
}

/// Like [`scan`]. Logs if the file is longer than any segment, because it was changed by another program then.
fn scan_and_tell(path: &Path, file: &File, head: Head) -> io::Result<Opened> {
    let bytes = file.metadata()?.len();
    if bytes > Location::END {
        Event::warn(LOG, "segment_too_long")
            .with_shown("path", &path.display())
            .with("bytes", bytes)
            .with("read_bytes", Location::END)
            .log(format_args!(
                "this file is longer than any segment; only its first {} bytes are read, and the rest is cut off",
                Location::END
            ));
    }
    scan(file, head)
}

/// Finds the valid records of a segment without a table.
fn scan(file: &File, head: Head) -> io::Result<Opened> {
    let start = head.encode().len() as u64;
    let size = file.metadata()?.len().min(Location::END);
    let segment = Segment::open(&head, start, Arc::default());
    let mut opened = Opened { head, end: start, last_sequence: 0, rows: Bytes::new() };
    let mut table = Vec::new();
    let mut at = start;
    while at < size {
        let slot = slot_at(at);
        match segment.read_record(file, slot, None) {
            Ok((header, _)) => {
                let Header { kind, instance, digest, touched, length, sequence } = header;
                Row { slot, kind, instance, touched, length, digest }.encode(&mut table);
                opened.last_sequence = opened.last_sequence.max(sequence);
                at += header.record_bytes();
                opened.end = at;
            }
            Err(error) if super::super::is_lost(&error) => {
                at = next_candidate(file, segment.nonce, at + SLOT_BYTES, size)?;
            }
            Err(error) => return Err(error),
        }
    }
    opened.rows = table.into();
    Ok(opened)
}

/// The next place where a record may start.
fn next_candidate(file: &File, nonce: u64, mut at: u64, size: u64) -> io::Result<u64> {
    while at < size {
        let mut part = Vec::new();
        read_up_to(file, at, SEARCH_BYTES, &mut part)?;
        let starts = |slot: &[u8]| slot.starts_with(&nonce.to_le_bytes());
        if let Some(found) = part.chunks_exact(SLOT_BYTES as usize).position(starts) {
            return Ok(at + found as u64 * SLOT_BYTES);
        }
        at += SEARCH_BYTES;
    }
    Ok(size)
}

/// Cuts off everything after the last record and appends the table.
fn complete(path: &Path, opened: &Opened) -> io::Result<()> {
    let Opened { head, end, last_sequence, rows } = opened;
    // The file was opened for reading only and without following links. This opens the same file.
    regular_file::restore_permissions(path, 0o600);
    let file = OpenOptions::new().write(true).open(path)?;
    let mut table = head.encode();
    table.extend_from_slice(rows);
    Trailer::append_to(&mut table, head.nonce, *end, *last_sequence);
    file.set_len(*end)?;
    file.write_all_at(&table, *end)
}
