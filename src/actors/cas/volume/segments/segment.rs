//! [`Segment`]: one segment file, and the count of its live records.
//!
//! A segment is *open* while records are appended to it, *closed* when it is full and the last writers are finishing,
//! and *complete* when nothing is appended any more. A complete segment normally has a table. A complete segment
//! without a live record is *gone*.
//!
//! Writers reserve a range under the lock and write without it. So a crash may leave an unwritten range before complete
//! records.

use super::{
    content,
    record::{FIXED_BYTES, Header, Location, SLOT_BYTES, damaged, header_bytes, record_bytes},
    table::{Head, Row, Trailer, rows},
};
use crate::{
    actors::cas::index::{EntryKind, FileId, Key},
    instance::InstanceId,
};
use bytes::Bytes;
use gorego_reapi::digest::Digest;
use rustix::{
    buffer::spare_capacity,
    io::{pread, pwritev},
};
use std::{
    fs::File,
    io::{self, IoSlice},
    os::unix::fs::FileExt as _,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// A segment is full when its table has this many bytes, about 87,000 records.
const MAX_TABLE_BYTES: usize = 4 << 20;
/// The disk space of a segment beyond its bytes: the unused ends of the last blocks of its file and its journal.
const SLACK_BYTES: u64 = 2 * 4_096;
/// Number of pieces that one system call writes.
const PIECES_AT_ONCE: usize = 1_024;
/// Number of bytes of a record of unknown length that are read at first.
const FIRST_READ_BYTES: u64 = 4_096;
/// Longer records are not read. Only small files are kept in segments.
pub(super) const MAX_RECORD_BYTES: u64 = 1 << 30;
/// More than the padding of any record.
const ZEROS: [u8; 80] = [0; 80];

/// A record to be appended.
#[derive(Debug, Clone)]
pub(super) struct Addition<'a> {
    pub kind: EntryKind,
    pub digest: Digest,
    /// The instance, by its number in this run.
    pub instance: u16,
    pub pieces: &'a [Bytes],
    pub length: u32,
    pub touched: u32,
    pub sequence: u64,
}

impl Addition<'_> {
    pub(super) fn bytes(&self) -> u64 {
        record_bytes(u64::from(self.length))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SegmentStage {
    Open,
    Closed,
    Complete,
    Gone,
}

/// The state of a segment that changes.
#[derive(Debug)]
pub(super) struct SegmentGrowth {
    stage: SegmentStage,
    /// The offset of the first record.
    start: u64,
    /// The offset of the next record.
    end: u64,
    /// Bytes of the file after the records.
    tail: u64,
    /// The rows of the records, until the segment is complete.
    rows: Vec<u8>,
    /// Slots of records whose write failed.
    failed: Vec<u32>,
    last_sequence: u64,
    writers: u32,
    /// All records, dead ones included.
    records: u64,
    live_records: u64,
    live_bytes: u64,
    journal_bytes: u64,
}

impl SegmentGrowth {
    /// The disk space of the segment, and its live part.
    pub(super) fn takes(&self) -> Takes {
        if self.stage == SegmentStage::Gone {
            return Takes::default();
        }
        let disk = self.end + self.tail + self.journal_bytes + SLACK_BYTES;
        Takes { disk, live: self.live_bytes, dead: (self.end - self.start).saturating_sub(self.live_bytes) }
    }
}

/// The bytes that a segment takes on disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Takes {
    /// All bytes of the segment.
    pub disk: u64,
    /// Bytes of live records.
    pub live: u64,
    /// Bytes of dead records, which compaction reclaims.
    pub dead: u64,
}

/// A segment, and what is known about its records.
#[derive(Debug)]
pub(super) struct Segment {
    pub number: u64,
    pub nonce: u64,
    /// The instances of this run, by their position in the list of the segment. `None` for an instance that is not
    /// served any more.
    pub instances: Arc<[Option<InstanceId>]>,
    growth: Mutex<SegmentGrowth>,
    /// Held while the journal is written. A write goes to the end of the file, so two at a time would overwrite each
    /// other.
    journal: Mutex<()>,
}

impl Segment {
    /// An open, empty segment with a head of this many bytes.
    pub(super) fn open(head: &Head, head_bytes: u64, instances: Arc<[Option<InstanceId>]>) -> Self {
        let growth = SegmentGrowth {
            stage: SegmentStage::Open,
            start: head_bytes,
            end: head_bytes,
            tail: 0,
            rows: Vec::new(),
            failed: Vec::new(),
            last_sequence: 0,
            writers: 0,
            records: 0,
            live_records: 0,
            live_bytes: 0,
            journal_bytes: 0,
        };
        let (growth, journal) = (Mutex::new(growth), Mutex::new(()));
        Self { number: head.number, nonce: head.nonce, instances, growth, journal }
    }

    /// A segment of an earlier run, which is complete. It has this many records, which end at `end`. The file and its
    /// journal have these sizes.
    pub(super) fn complete(
        head: &Head,
        (records, end): (u64, u64),
        (bytes, journal_bytes): (u64, u64),
        instances: Arc<[Option<InstanceId>]>,
    ) -> Self {
        let start = head.encode().len() as u64;
        let segment = Self::open(head, start, instances);
        let mut growth = segment.growth();
        (growth.records, growth.end) = (records, end.max(start));
        growth.tail = bytes.saturating_sub(growth.end);
        (growth.stage, growth.journal_bytes) = (SegmentStage::Complete, journal_bytes);
        drop(growth);
        segment
    }

    pub(super) fn growth(&self) -> MutexGuard<'_, SegmentGrowth> {
        self.growth.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the counts. Returns the disk space of the segment before and after the change.
    fn change<T>(&self, change: impl FnOnce(&mut SegmentGrowth) -> T) -> (T, Takes, Takes) {
        let mut growth = self.growth();
        let before = growth.takes();
        let answer = change(&mut growth);
        (answer, before, growth.takes())
    }

    /// Reserves a range for these records; `None` if all records would take more than `max_bytes`, or if the
    /// table is full. An empty segment takes any records. [`Segment::written`] has to follow. Also returns the disk
    /// space before and after.
    pub(super) fn reserve(&self, additions: &[Addition<'_>], max_bytes: u64) -> Option<(u64, Takes, Takes)> {
        let bytes: u64 = additions.iter().map(Addition::bytes).sum();
        let (at, before, after) = self.change(|growth| {
            let exceeds = growth.records > 0 && growth.end - growth.start + bytes > max_bytes;
            if exceeds || growth.rows.len() >= MAX_TABLE_BYTES || growth.stage != SegmentStage::Open {
                return None;
            }
            let at = growth.end;
            for addition in additions {
                let Addition { kind, digest, instance, length, touched, sequence, .. } = *addition;
                let slot = slot_at(growth.end);
                Row { slot, kind, instance, touched, length, digest }.encode(&mut growth.rows);
                growth.end += addition.bytes();
                growth.records += 1;
                growth.live_records += 1;
                growth.live_bytes += addition.bytes();
                growth.last_sequence = growth.last_sequence.max(sequence);
            }
            growth.writers += 1;
            Some(at)
        });
        at.map(|at| (at, before, after))
    }

    /// Writes records into their reserved range.
    pub(super) fn write(&self, file: &File, at: u64, additions: &[Addition<'_>]) -> io::Result<()> {
        let mut heads = Vec::with_capacity(additions.len() * 2 * FIXED_BYTES);
        let mut ends = Vec::with_capacity(additions.len());
        let mut offset = at;
        for addition in additions {
            let Addition { kind, digest, instance, pieces, length, touched, sequence, .. } = *addition;
            let header = Header { kind, instance, digest, touched, length, sequence };
            header.encode(self.nonce, slot_at(offset), pieces, &mut heads);
            ends.push(heads.len());
            offset += addition.bytes();
        }
        let (mut slices, mut start) = (Vec::with_capacity(3 * additions.len()), 0);
        for (addition, end) in additions.iter().zip(ends) {
            let header = heads.get(start..end).unwrap_or_default();
            slices.push(IoSlice::new(header));
            slices.extend(addition.pieces.iter().map(|piece| IoSlice::new(piece)));
            let padding = addition.bytes() - (header.len() as u64 + u64::from(addition.length));
            slices.push(IoSlice::new(ZEROS.get(..padding as usize).unwrap_or_default()));
            start = end;
        }
        write_all(file, &mut slices, at)
    }

    /// Ends a write. The records of a failed write are dead. Returns whether the caller has to finish the segment.
    pub(super) fn written(&self, at: u64, failed: &[Addition<'_>]) -> (bool, Takes, Takes) {
        self.change(|growth| {
            growth.writers -= 1;
            let mut offset = at;
            for addition in failed {
                growth.failed.push(slot_at(offset));
                growth.live_records -= 1;
                growth.live_bytes -= addition.bytes();
                offset += addition.bytes();
            }
            growth.stage == SegmentStage::Closed && growth.writers == 0
        })
    }

    /// Closes the segment, so that nothing more is appended. Returns whether the caller has to finish the segment.
    pub(super) fn close(&self) -> bool {
        let mut growth = self.growth();
        let was_open = growth.stage == SegmentStage::Open;
        if was_open {
            growth.stage = SegmentStage::Closed;
        }
        was_open && growth.writers == 0
    }

    /// Completes a closed segment without writers by appending its table. If this fails, the next start scans the
    /// segment. Returns whether the segment is gone.
    pub(super) fn finish(&self, file: &File, head: &Head, may_have_table: bool) -> (bool, Takes, Takes) {
        let (table_rows, failed, end, last, is_live) = {
            let mut growth = self.growth();
            let (rows, failed) = (std::mem::take(&mut growth.rows), std::mem::take(&mut growth.failed));
            (rows, failed, growth.end, growth.last_sequence, growth.live_records > 0)
        };
        let mut table = head.encode();
        rows(&table_rows).filter(|row| !failed.contains(&row.slot)).for_each(|row| row.encode(&mut table));
        Trailer::append_to(&mut table, self.nonce, end, last);
        let written = may_have_table && is_live && file.write_all_at(&table, end).is_ok();
        self.change(|growth| {
            growth.tail = if written { table.len() as u64 } else { 0 };
            growth.stage = SegmentStage::Complete;
            growth.end_if_dead()
        })
    }

    /// The disk space of the segment, if it is complete and may be compacted.
    pub(super) fn is_complete(&self) -> Option<Takes> {
        let growth = self.growth();
        (growth.stage == SegmentStage::Complete).then(|| growth.takes())
    }

    /// The file whose record has this row; `None` if its instance is not served any more.
    pub(super) fn file_of(&self, row: &Row) -> Option<FileId> {
        let instance = self.instances.get(usize::from(row.instance)).copied().flatten()?;
        let generation = Location { segment: self.number, slot: row.slot }.generation();
        Some(FileId { key: Key { digest: row.digest, instance, kind: row.kind }, generation })
    }

    /// Whether all records are dead and nothing is appended any more.
    pub(super) fn is_gone(&self) -> bool {
        self.growth().stage == SegmentStage::Gone
    }

    /// Counts records that were found at start.
    pub(super) fn found(&self, records: u64, bytes: u64) -> (Takes, Takes) {
        let ((), before, after) = self.change(|growth| {
            growth.live_records += records;
            growth.live_bytes += bytes;
        });
        (before, after)
    }

    /// Subtracts records from the count. Returns whether the segment is gone.
    pub(super) fn forget(&self, records: u64, bytes: u64) -> (bool, Takes, Takes) {
        self.change(|growth| {
            growth.live_records = growth.live_records.saturating_sub(records);
            growth.live_bytes = growth.live_bytes.saturating_sub(bytes);
            growth.end_if_dead()
        })
    }

    /// Records the current length of the journal.
    pub(super) fn journal_grew(&self, bytes: u64) -> (Takes, Takes) {
        let ((), before, after) = self.change(|growth| growth.journal_bytes = bytes);
        (before, after)
    }

    /// The number of live records.
    pub(super) fn live_records(&self) -> u64 {
        self.growth().live_records
    }

    /// The number of all records, dead ones included.
    pub(super) fn records(&self) -> u64 {
        self.growth().records
    }

    /// Allows its holder to write the journal.
    pub(super) fn lock_journal(&self) -> MutexGuard<'_, ()> {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads and checks the record of a stored file.
    ///
    /// # Errors
    /// `InvalidData` for a record that has changed since it was written, `UnexpectedEof` for one that is cut off.
    pub(super) fn read(&self, file: &File, slot: u32, key: &Key) -> io::Result<content::RecordContent> {
        let length = (key.kind == EntryKind::Blob).then(|| key.digest.size());
        let expected = length.map(|length| header_bytes(key.digest.function(), length) as u64 + length);
        let (header, record) = self.read_record(file, slot, expected)?;
        let instance = self.instances.get(usize::from(header.instance)).copied().flatten();
        if (header.kind, header.digest, instance) != (key.kind, key.digest, Some(key.instance)) {
            return Err(damaged("another record is in its place"));
        }
        Ok(content::RecordContent(content_of(&header, record)))
    }

    /// Reads and checks a record. If the lengths of its header and content are known, one system call is saved.
    ///
    /// # Errors
    /// The errors of [`Segment::read`].
    pub(super) fn read_record(
        &self,
        file: &File,
        slot: u32,
        expected: Option<u64>,
    ) -> io::Result<(Header, Vec<u8>)> {
        let offset = Location { segment: self.number, slot }.offset();
        let mut record = Vec::new();
        read_up_to(file, offset, expected.unwrap_or(FIRST_READ_BYTES).min(MAX_RECORD_BYTES), &mut record)?;
        let header =
            Header::decode(self.nonce, slot, &record).ok_or_else(|| damaged("its header is damaged"))?;
        let all = header.bytes() + header.length as usize;
        read_up_to(file, offset, all as u64, &mut record)?;
        if record.len() < all {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        record.truncate(all);
        if header.is_whole(&record) { Ok((header, record)) } else { Err(damaged("its checksum is wrong")) }
    }

    /// Reads only the header of a record.
    pub(super) fn read_header(&self, file: &File, slot: u32) -> Option<Header> {
        let mut bytes = Vec::new();
        let offset = Location { segment: self.number, slot }.offset();
        read_up_to(file, offset, FIRST_READ_BYTES, &mut bytes).ok()?;
        Header::decode(self.nonce, slot, &bytes)
    }
}

impl SegmentGrowth {
    fn end_if_dead(&mut self) -> bool {
        let is_dead = self.stage == SegmentStage::Complete && self.live_records == 0;
        if is_dead {
            self.stage = SegmentStage::Gone;
        }
        is_dead
    }
}

pub(super) fn content_of(header: &Header, record: Vec<u8>) -> Bytes {
    let start = header.bytes();
    Bytes::from(record).slice(start..start + header.length as usize)
}

/// The slot at an offset that is a multiple of [`SLOT_BYTES`].
pub(super) fn slot_at(offset: u64) -> u32 {
    u32::try_from(offset / SLOT_BYTES).unwrap_or(u32::MAX)
}

/// Appends bytes of the file from `offset + to.len()` on, until there are `wanted` or the file ends.
pub(super) fn read_up_to(file: &File, offset: u64, wanted: u64, to: &mut Vec<u8>) -> io::Result<()> {
    let wanted = usize::try_from(wanted).map_err(io::Error::other)?;
    to.reserve_exact(wanted.saturating_sub(to.len()));
    while to.len() < wanted {
        let at = offset + to.len() as u64;
        match pread(file, spare_capacity(to), at) {
            Ok(0) => break,
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn write_all(file: &File, mut slices: &mut [IoSlice<'_>], mut at: u64) -> io::Result<()> {
    IoSlice::advance_slices(&mut slices, 0);
    while !slices.is_empty() {
        let part = slices.get(..slices.len().min(PIECES_AT_ONCE)).unwrap_or_default();
        match pwritev(file, part, at) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                IoSlice::advance_slices(&mut slices, written);
                at += written as u64;
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
