//! Compaction: the live records of a segment that is mostly dead are copied to the open segment, and its files are
//! removed.
//!
//! The index decides which records are copied: all that it has, except records that are being read. The journal is not
//! asked. Its notes may be lost, and dead records would then be copied again and again and never be reclaimed. The
//! index also decides whether a copy takes the place of a record: it refuses if the record was deleted meanwhile or is
//! being read. A segment is removed only when all of its records are dead. A record that was written but is not in the
//! index yet counts as live.
//!
//! A record and its copy are twins until the segment of the record is gone. If one of them is deleted, the other one is
//! also noted as dead before the deletion is reported. So neither comes back with the next start.

use super::{
    Segments,
    journal::{self, JournalNotes},
    record::{Location, damaged, record_bytes},
    recovery,
    segment::{Addition, Segment, content_of},
    sizes::Verdict,
    table::Row,
};
use crate::actors::cas::{
    index::{FileId, Key},
    volume::{Compacted, Moves, SyncPolicy, durable::sync_directory, is_lost},
};
use bytes::Bytes;
use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io,
    sync::{Arc, PoisonError},
};

/// Bytes of records that are copied before the index is told.
const COPY_BYTES: u64 = 1 << 20;
/// A segment is not worth copying if less than this part of it is dead.
const MIN_DEAD_PART: u64 = 16;

/// The state of the running compaction; empty if none runs.
#[derive(Debug, Default)]
pub(super) struct CompactionState {
    /// The segment that is compacted.
    source: Option<u64>,
    /// The records of the segment and their copies, in both directions.
    twins: HashMap<Location, Location>,
    /// Records that were deleted since the index was asked which ones to copy.
    deleted: HashSet<u32>,
}

impl CompactionState {
    /// The twins of records that are being deleted.
    pub(super) fn twins_of(&mut self, segment: u64, slots: &[u32]) -> Vec<Location> {
        if self.source == Some(segment) {
            self.deleted.extend(slots);
        }
        let twin = |slot: &u32| self.twins.get(&Location { segment, slot: *slot }).copied();
        slots.iter().filter_map(twin).collect()
    }
}

/// The records of a segment whose copies took their place.
#[derive(Debug, Default)]
struct CopiedRecords {
    /// Their slots and keys.
    records: Vec<(u32, Key)>,
    bytes: u64,
    /// The segments with the copies.
    segments: HashSet<u64>,
}

/// A record to be copied.
struct Original {
    at: Location,
    key: Key,
    touched: u32,
    sequence: u64,
    content: [Bytes; 1],
}

impl Segments {
    /// Whether compaction is due, and whether writers should wait for it.
    pub(in crate::actors::cas::volume) fn verdict(&self) -> Verdict {
        let takes = self.takes_now();
        self.sizes.verdict(takes.disk, takes.dead)
    }

    /// Compacts the segment with the largest dead part. `may_move` asks the index which files are stored and may be
    /// moved. `relocate` tells it of copies, and returns for each whether it took the place of its record.
    ///
    /// # Errors
    /// The errors of the file system. Nothing is lost then.
    pub(in crate::actors::cas::volume) fn compact(
        &self,
        may_move: &dyn Fn(&[FileId]) -> Vec<bool>,
        relocate: &mut dyn FnMut(Moves) -> Vec<bool>,
    ) -> io::Result<Compacted> {
        let mut stuck = self.compacting.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(source) = self.worst(&stuck) else {
            stuck.clear();
            return Ok(Compacted::NothingToGain);
        };
        *self.copying() = CompactionState { source: Some(source.number), ..CompactionState::default() };
        let mut moved = Vec::new();
        let outcome = self.move_records(&source, may_move, relocate, &mut moved);
        let (mut compacted, mut buried) = (Compacted::Reclaimed, Ok(()));
        if self.find(source.number).is_some() {
            compacted = Compacted::Kept;
            stuck.insert(source.number);
            // A record is left because it is being read. The others must not come back with the segment.
            if !moved.is_empty() {
                buried = self.bury_twins(&source, &moved);
            }
        }
        *self.copying() = CompactionState::default();
        outcome.and(buried).map(|()| compacted)
    }

    /// The complete segment with the largest dead part, if it is worth the copies. Segments in which a record has to
    /// stay are left for later.
    fn worst(&self, stuck: &HashSet<u64>) -> Option<Arc<Segment>> {
        self.close_head_if(|dead| dead > self.sizes.segment / 2);
        let worst = self.worst_with(stuck, MIN_DEAD_PART);
        if worst.is_some() || self.verdict() != Verdict::Urgent {
            return worst;
        }
        // Many segments that are a little dead may together exceed what may be dead.
        self.close_head_if(|dead| dead > 0);
        self.worst_with(stuck, u64::MAX)
    }

    /// The complete segment with the largest dead part, if it has at least this part.
    fn worst_with(&self, stuck: &HashSet<u64>, min_dead_part: u64) -> Option<Arc<Segment>> {
        let all = self.all.read().unwrap_or_else(PoisonError::into_inner);
        let candidate = |segment: &Arc<Segment>| {
            let takes = segment.is_complete()?;
            let records = takes.live.saturating_add(takes.dead).max(1);
            let is_worth = takes.dead >= records / min_dead_part && takes.dead > 0;
            let is_worth = is_worth && !stuck.contains(&segment.number);
            is_worth.then(|| (takes.dead.saturating_mul(1_000) / records, segment.clone()))
        };
        all.values().filter_map(candidate).max_by_key(|(part, _)| *part).map(|(_, segment)| segment)
    }

    /// Closes the open segment if it has so many dead bytes.
    fn close_head_if(&self, is_enough: impl Fn(u64) -> bool) {
        let closed = {
            let mut head = self.head.lock().unwrap_or_else(PoisonError::into_inner);
            let is_dead = |open: &Arc<super::Appended>| is_enough(open.segment.growth().takes().dead);
            head.take_if(|open| is_dead(open)).filter(|open| open.segment.close())
        };
        if let Some(closed) = closed {
            self.finish(&closed);
        }
    }

    /// Moves the live records of a segment to another one. `moved` receives their slots and keys.
    fn move_records(
        &self,
        source: &Segment,
        may_move: &dyn Fn(&[FileId]) -> Vec<bool>,
        relocate: &mut dyn FnMut(Moves) -> Vec<bool>,
        moved: &mut Vec<(u32, Key)>,
    ) -> io::Result<()> {
        let file = self.file_of(source.number)?;
        // Without the journal, only the last uses are lost.
        let notes = journal::read(&self.journal_path(source.number), source.nonce).unwrap_or_default();
        let rows = recovery::rows_of(&file, source)?;
        let all: Vec<(Row, FileId)> =
            rows.into_iter().filter_map(|row| Some((row, source.file_of(&row)?))).collect();
        let files: Vec<FileId> = all.iter().map(|(_, file)| *file).collect();
        let movable = all.into_iter().zip(may_move(&files)).filter(|(_, may_move)| *may_move);
        let live: Vec<(Row, FileId)> = movable.map(|(record, _)| record).collect();
        let mut copied = CopiedRecords::default();
        let outcome = self.copy_all(source, &file, &notes, &live, relocate, &mut copied);
        // Until now the originals count as live, so that the segment is not removed before its copies are on disk. If
        // they cannot be synced, a power cut may lose them, like records that have just been written.
        let synced = match self.policy {
            SyncPolicy::Never if !copied.segments.is_empty() => {
                let synced = copied.segments.iter().try_for_each(|number| self.sync(*number));
                synced.and_then(|()| sync_directory(&self.directory))
            }
            SyncPolicy::Never | SyncPolicy::BeforeAnswer => Ok(()),
        };
        self.forget(source, copied.records.len() as u64, copied.bytes);
        *moved = copied.records;
        outcome.and(synced)
    }

    /// Copies records, and has the index replace them by their copies.
    fn copy_all(
        &self,
        source: &Segment,
        file: &File,
        notes: &JournalNotes,
        live: &[(Row, FileId)],
        relocate: &mut dyn FnMut(Moves) -> Vec<bool>,
        copied: &mut CopiedRecords,
    ) -> io::Result<()> {
        let mut rest = live;
        while !rest.is_empty() {
            let mut bytes = 0;
            let fits = |(row, _): &&(Row, FileId)| {
                bytes += record_bytes(u64::from(row.length));
                bytes <= COPY_BYTES.min(self.sizes.segment)
            };
            let (part, after) = rest.split_at(rest.iter().take_while(fits).count().max(1));
            rest = after;
            let mut moves = Moves::default();
            let mut originals = Vec::with_capacity(part.len());
            for (row, id) in part {
                let touched = notes.touched(row.slot, row.touched);
                match read(source, file, row, touched, id.key) {
                    Ok(original) => originals.push(original),
                    Err(error) if is_lost(&error) => moves.lost.push(*id),
                    Err(error) => return Err(error),
                }
            }
            let copies = self.copy(&originals)?;
            let pairs = originals.iter().zip(&copies);
            moves.moved = pairs.map(|(original, copy)| (original.file(), copy.generation())).collect();
            // Copies that may not be on disk take no record's place.
            let (synced, accepted) = match self.sync_copies(&copies) {
                Ok(()) => (Ok(()), relocate(moves)),
                Err(error) => (Err(error), Vec::new()),
            };
            self.settle(&originals, &copies, &accepted, copied)?;
            synced?;
        }
        Ok(())
    }

    /// Writes copies of these records. They are registered as twins before they are written.
    fn copy(&self, originals: &[Original]) -> io::Result<Vec<Location>> {
        if originals.is_empty() {
            return Ok(Vec::new());
        }
        let additions: Vec<Addition<'_>> = originals.iter().map(Original::addition).collect();
        self.append(&additions, |copies| {
            let mut deleted = Vec::new();
            let mut copying = self.copying();
            for (original, copy) in originals.iter().zip(copies) {
                copying.twins.insert(original.at, *copy);
                copying.twins.insert(*copy, original.at);
                if copying.deleted.contains(&original.at.slot) {
                    deleted.push(*copy);
                }
            }
            drop(copying);
            for copy in deleted {
                if let Some(segment) = self.find(copy.segment) {
                    self.bury(&segment, &[copy.slot])?;
                }
            }
            Ok(())
        })
    }

    /// Waits for the disk if acknowledged records have to survive a power cut: the originals are removed soon.
    fn sync_copies(&self, copies: &[Location]) -> io::Result<()> {
        if self.policy == SyncPolicy::Never {
            return Ok(());
        }
        let segments: HashSet<u64> = copies.iter().map(|copy| copy.segment).collect();
        segments.into_iter().try_for_each(|number| self.sync(number))
    }

    /// Counts the records whose copies took their place, and forgets the copies that did not.
    fn settle(
        &self,
        originals: &[Original],
        copies: &[Location],
        accepted: &[bool],
        copied: &mut CopiedRecords,
    ) -> io::Result<()> {
        let mut outcome = Ok(());
        for (at, (original, copy)) in originals.iter().zip(copies).enumerate() {
            let size = original.addition().bytes();
            if accepted.get(at) == Some(&true) {
                copied.bytes += size;
                copied.records.push((original.at.slot, original.key));
                copied.segments.insert(copy.segment);
            } else if let Some(segment) = self.find(copy.segment) {
                let mut copying = self.copying();
                copying.twins.remove(&original.at);
                copying.twins.remove(copy);
                drop(copying);
                if !self.forget(&segment, 1, size) {
                    outcome = outcome.and(self.bury_twins(&segment, &[(copy.slot, original.key)]));
                }
            }
        }
        outcome
    }
}

impl Original {
    fn file(&self) -> FileId {
        FileId { key: self.key, generation: self.at.generation() }
    }

    fn addition(&self) -> Addition<'_> {
        let [content] = &self.content;
        Addition {
            kind: self.key.kind,
            digest: self.key.digest,
            instance: self.key.instance.0,
            pieces: &self.content,
            length: content.len() as u32,
            touched: self.touched,
            sequence: self.sequence,
        }
    }
}

/// Reads a record to copy it.
fn read(source: &Segment, file: &File, row: &Row, touched: u32, key: Key) -> io::Result<Original> {
    let at = Location { segment: source.number, slot: row.slot };
    let (header, record) = source.read_record(file, row.slot, None)?;
    if (header.kind, header.digest) != (row.kind, row.digest) {
        return Err(damaged("another record is in its place"));
    }
    let sequence = header.sequence;
    Ok(Original { at, key, touched, sequence, content: [content_of(&header, record)] })
}
