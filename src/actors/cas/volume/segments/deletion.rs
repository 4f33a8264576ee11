//! Deletes records: notes in the journal that they are dead, and removes segments without live records.
//!
//! An older result of an action must not come back after a newer one was purged. So while the deletion of a result
//! cannot be noted, later deletions of the same key wait for it in [`UnnotedDeletions`].

use super::{Segments, journal, punch::punch, record::Location, same_error, segment::Segment};
use crate::{
    actors::cas::{
        index::{EntryKind, FileId, Key, Victim},
        volume::durable::{SyncPolicy, sync_directory, sync_file},
    },
    disk::is_full,
    logging::Event,
    regular_file,
};
use std::{
    collections::{BTreeMap, HashSet},
    fs, io,
    path::Path,
    sync::{MutexGuard, PoisonError, atomic::Ordering::Relaxed},
};

const LOG: &str = "gorego::cas";

/// Deletions that could not be noted. Their records would come back with the next start.
#[derive(Debug, Default)]
pub(super) struct UnnotedDeletions {
    /// The deletions, the oldest first.
    queue: Vec<Deletion>,
    /// The results among the records.
    results: HashSet<Key>,
}

/// The deletion of records of one segment.
#[derive(Debug)]
struct Deletion {
    segment: u64,
    slots: Vec<u32>,
    /// Bytes of the records, if they still count as live.
    uncounted: Option<u64>,
    /// The results among the records.
    results: Vec<Key>,
}

impl UnnotedDeletions {
    /// Whether a deletion has to wait for an older one.
    fn precede(&self, deletion: &Deletion) -> bool {
        deletion.results.iter().any(|result| self.results.contains(result))
    }

    fn add(&mut self, deletion: Deletion) {
        self.results.extend(&deletion.results);
        self.queue.push(deletion);
    }
}

impl Segments {
    /// Deletes stored files. Returns the files whose deletion could not be noted. They come back with the next start,
    /// unless [`Segments::note_again`] succeeds before that.
    pub(in crate::actors::cas::volume) fn delete(
        &self,
        victims: &[(Location, Victim)],
    ) -> Vec<(FileId, io::Error)> {
        let mut by_segment: BTreeMap<u64, Vec<(Location, Victim)>> = BTreeMap::new();
        for (at, victim) in victims {
            by_segment.entry(at.segment).or_default().push((*at, *victim));
        }
        let mut failures = Vec::new();
        for (number, records) in by_segment {
            if let Err(error) = self.delete_in(number, &records) {
                failures.extend(records.iter().map(|(_, victim)| (victim.file, same_error(&error))));
            }
        }
        failures
    }

    fn delete_in(&self, number: u64, records: &[(Location, Victim)]) -> io::Result<()> {
        let Some(segment) = self.find(number) else { return Ok(()) };
        let keys = records.iter().map(|(_, victim)| victim.file.key);
        let mut deletion = Deletion {
            segment: number,
            slots: records.iter().map(|(at, _)| at.slot).collect(),
            uncounted: Some(records.iter().map(|(_, victim)| victim.bytes).sum()),
            results: keys.filter(|key| key.kind == EntryKind::Result).collect(),
        };
        // Otherwise a copy that compaction has made, or its original, would come back.
        let twins = self.copying().twins_of(number, &deletion.slots);
        for twin in twins {
            let Some(segment) = self.find(twin.segment) else { continue };
            let noted = self.bury(&segment, &[twin.slot]);
            if let Err(error) = noted.and_then(|()| self.sync_journal(&segment, &deletion.results)) {
                let (slots, results) = (vec![twin.slot], deletion.results.clone());
                let of_twin = Deletion { segment: twin.segment, slots, uncounted: None, results };
                let mut unnoted = self.unnoted();
                self.put_off(&mut unnoted, of_twin);
                self.put_off(&mut unnoted, deletion);
                return Err(error);
            }
        }
        if self.unnoted().precede(&deletion) {
            self.note_again();
            let mut unnoted = self.unnoted();
            if unnoted.precede(&deletion) {
                self.put_off(&mut unnoted, deletion);
                return Err(io::Error::other("the deletion of an older result could not be noted"));
            }
        }
        let noted = match self.note(&segment, &mut deletion) {
            Err(error) if is_full(&error) => {
                let dead = records.iter().map(|(at, victim)| at.offset()..at.offset() + victim.bytes);
                let path = self.segment_path(number);
                punch(&path, dead.collect()).and_then(|()| self.note(&segment, &mut deletion))
            }
            noted => noted,
        };
        if noted.is_err() {
            self.put_off(&mut self.unnoted(), deletion);
        }
        noted
    }

    /// Carries out a deletion: removes the segment if no live record is left, or else notes it in the journal.
    fn note(&self, segment: &Segment, deletion: &mut Deletion) -> io::Result<()> {
        let records = deletion.slots.len() as u64;
        if let Some(bytes) = deletion.uncounted.take()
            && self.forget(segment, records, bytes)
        {
            return Ok(());
        }
        self.bury(segment, &deletion.slots)?;
        self.sync_journal(segment, &deletion.results)
    }

    /// Notes the deletions that could not be noted before, as far as that works now.
    pub(in crate::actors::cas::volume) fn note_again(&self) {
        let mut unnoted = self.unnoted();
        let UnnotedDeletions { queue, .. } = std::mem::take(&mut *unnoted);
        for mut deletion in queue {
            self.put_off_bytes.fetch_sub(deletion.uncounted.unwrap_or(0), Relaxed);
            let is_noted = !unnoted.precede(&deletion)
                && self
                    .find(deletion.segment)
                    .is_none_or(|segment| self.note(&segment, &mut deletion).is_ok());
            if !is_noted {
                self.put_off(&mut unnoted, deletion);
            }
        }
    }

    /// Notes that records are dead whose write has failed. Some of them may be complete on disk.
    pub(super) fn bury_failed(&self, segment: &Segment, slots: Vec<u32>) {
        if self.bury(segment, &slots).is_err() {
            let results = Vec::new();
            let deletion = Deletion { segment: segment.number, slots, uncounted: None, results };
            self.put_off(&mut self.unnoted(), deletion);
        }
    }

    /// Notes that records are dead because a twin of each is used: originals whose copies took their place, or copies
    /// that did not. A deletion that cannot be noted now is tried again, and the twin cannot be deleted before.
    pub(super) fn bury_twins(&self, segment: &Segment, records: &[(u32, Key)]) -> io::Result<()> {
        let keys = records.iter().map(|(_, key)| *key);
        let mut deletion = Deletion {
            segment: segment.number,
            slots: records.iter().map(|(slot, _)| *slot).collect(),
            uncounted: None,
            results: keys.filter(|key| key.kind == EntryKind::Result).collect(),
        };
        let noted = self.note(segment, &mut deletion);
        if noted.is_err() {
            self.put_off(&mut self.unnoted(), deletion);
        }
        noted
    }

    fn put_off(&self, unnoted: &mut UnnotedDeletions, deletion: Deletion) {
        self.put_off_bytes.fetch_add(deletion.uncounted.unwrap_or(0), Relaxed);
        unnoted.add(deletion);
    }

    fn unnoted(&self) -> MutexGuard<'_, UnnotedDeletions> {
        self.unnoted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the deletion of results durable, because purged results must not come back. Blobs may.
    fn sync_journal(&self, segment: &Segment, results: &[Key]) -> io::Result<()> {
        if self.policy == SyncPolicy::Never || results.is_empty() {
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

    /// Subtracts records from the count. If no live record is left, the segment is removed. Returns whether that
    /// happened.
    pub(super) fn forget(&self, segment: &Segment, records: u64, bytes: u64) -> bool {
        let (is_gone, before, after) = segment.forget(records, bytes);
        self.count((before, after));
        is_gone && self.remove(segment.number)
    }

    /// Notes in the journal that records are dead.
    pub(super) fn bury(&self, segment: &Segment, slots: &[u32]) -> io::Result<()> {
        self.write_journal(segment, |path| journal::bury(path, segment.nonce, slots))
    }

    /// Writes the journal of a segment. `write` returns its new length.
    pub(super) fn write_journal(
        &self,
        segment: &Segment,
        write: impl FnOnce(&Path) -> io::Result<u64>,
    ) -> io::Result<()> {
        let _writing = segment.lock_journal();
        let path = self.journal_path(segment.number);
        let bytes = write(&path)?;
        self.count(segment.journal_grew(bytes));
        if segment.is_gone() && !self.segment_path(segment.number).exists() {
            // Its last record was deleted meanwhile.
            let _ = fs::remove_file(path);
        }
        Ok(())
    }

    /// Removes the files of a segment that is gone. Readers that have it open can read on. Returns whether this worked.
    /// If not, its journal stays, and so does the segment, so that deletions can be noted. The next start tries again,
    /// because it finds no live record in it.
    pub(super) fn remove(&self, number: u64) -> bool {
        let path = self.segment_path(number);
        let bytes = fs::symlink_metadata(&path).map_or(0, |metadata| metadata.len());
        let removed = fs::remove_file(&path);
        if let Err(error) = removed
            && error.kind() != io::ErrorKind::NotFound
        {
            self.left_out.fetch_add(bytes, Relaxed);
            Event::warn(LOG, "segment_not_removed")
                .with_shown("path", &path.display())
                .with_shown("error", &error)
                .log(format_args!(
                    "could not remove a segment without live records; the next start tries again"
                ));
            return false;
        }
        self.all.write().unwrap_or_else(PoisonError::into_inner).remove(&number);
        self.open.remove(number);
        let _ = fs::remove_file(self.journal_path(number));
        if self.policy == SyncPolicy::BeforeAnswer {
            // The segment must not come back without its journal, because a result in it may have been purged.
            let _ = sync_directory(&self.directory);
        }
        true
    }
}
