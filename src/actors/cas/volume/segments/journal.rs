//! The journal of a segment: it notes which records are dead, and when the others were last used.
//!
//! It is a file of its own beside the segment, because records are never changed. Each note has 16 bytes, which include
//! a checksum, so a note that a crash has left half-written is ignored. A journal with many more notes than its segment
//! has records is rewritten. It is deleted with its segment.

use super::record::u32_at;
use crate::{
    actors::cas::volume::{durable, paths::again_with_directory},
    regular_file,
};
use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::Path,
};

/// Bytes of a note: slot, last use, checksum, zeros.
const NOTE_BYTES: usize = 16;
/// The last use of a record that is dead. No record was used in 1970.
const DEAD: u32 = 0;
/// A journal is rewritten when it has this many notes, and twice as many as the segment has records.
const MANY_NOTES: u64 = 4_096;
/// Longer journals are not read. A segment has about 90,000 records at most, and its journal a few notes for each.
pub(super) const MAX_BYTES: u64 = 16 << 20;

/// The content of a journal.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct JournalNotes(HashMap<u32, u32>);

impl JournalNotes {
    pub(super) fn is_dead(&self, slot: u32) -> bool {
        self.0.get(&slot) == Some(&DEAD)
    }

    /// The last recorded use of a record that was written at `touched`.
    pub(super) fn touched(&self, slot: u32, touched: u32) -> u32 {
        self.0.get(&slot).copied().unwrap_or_default().max(touched)
    }

    fn add(&mut self, slot: u32, touched: u32) {
        let known = self.0.entry(slot).or_insert(touched);
        // A dead record stays dead.
        *known = if touched == DEAD || *known == DEAD { DEAD } else { touched.max(*known) };
    }

    fn encode(&self, nonce: u64) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.0.len() * NOTE_BYTES);
        self.0.iter().for_each(|(slot, touched)| encode(nonce, *slot, *touched, &mut bytes));
        bytes
    }
}

/// Reads a journal. A missing journal is empty. Damaged notes and notes of another segment are ignored.
///
/// # Errors
/// The errors of [`regular_file::read_own`] for a journal that exists. It may have notes.
pub(super) fn read(path: &Path, nonce: u64) -> io::Result<JournalNotes> {
    let bytes = match regular_file::read_own(path, MAX_BYTES) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        read => read?,
    };
    let mut notes = JournalNotes::default();
    for note in bytes.chunks_exact(NOTE_BYTES) {
        if let (Some(slot), Some(touched), Some(sum)) = (u32_at(note, 0), u32_at(note, 4), u32_at(note, 8))
            && sum == checksum(nonce, slot, touched)
        {
            notes.add(slot, touched);
        }
    }
    Ok(notes)
}

/// Notes that these records are dead. Returns the length of the journal.
pub(super) fn bury(path: &Path, nonce: u64, slots: &[u32]) -> io::Result<u64> {
    append(path, nonce, slots, DEAD)
}

/// Notes that these records were used. Returns the length of the journal, which is rewritten if it is long for a
/// segment with this many records.
pub(super) fn touch(path: &Path, nonce: u64, slots: &[u32], now: u32, records: u64) -> io::Result<u64> {
    let bytes = append(path, nonce, slots, now.max(1))?;
    if is_long(bytes, records) { rewrite(path, nonce) } else { Ok(bytes) }
}

/// Rewrites a journal that is long for a segment with this many records.
///
/// # Errors
/// The errors of the file system. The journal is as before then.
pub(super) fn shorten(path: &Path, nonce: u64, records: u64) -> io::Result<()> {
    let bytes = fs::symlink_metadata(path)?.len();
    if is_long(bytes, records) { rewrite(path, nonce).map(drop) } else { Ok(()) }
}

fn is_long(bytes: u64, records: u64) -> bool {
    let notes = bytes / NOTE_BYTES as u64;
    notes >= MANY_NOTES && notes / 2 >= records
}

fn append(path: &Path, nonce: u64, slots: &[u32], touched: u32) -> io::Result<u64> {
    let mut bytes = Vec::with_capacity(slots.len() * NOTE_BYTES);
    slots.iter().for_each(|slot| encode(nonce, *slot, touched, &mut bytes));
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let open = || OpenOptions::new().write(true).create(true).truncate(false).custom_flags(flags).open(path);
    let file = match again_with_directory(path, open) {
        Err(_) if regular_file::restore_permissions(path, 0o600) => open()?,
        opened => opened?,
    };
    write_at_end(&file, &bytes)
}

/// Writes after the last complete note. A partial note of a failed write is overwritten.
fn write_at_end(file: &File, bytes: &[u8]) -> io::Result<u64> {
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::from_raw_os_error(libc::ENXIO));
    }
    let end = metadata.len() - metadata.len() % NOTE_BYTES as u64;
    file.write_all_at(bytes, end)?;
    Ok(end + bytes.len() as u64)
}

/// Replaces a journal that cannot be read. The new one only notes that these records are dead. It is on disk when this
/// returns, so the notes of the old one do not come back.
///
/// # Errors
/// The errors of the file system. The old journal is unchanged then.
pub(super) fn replace(path: &Path, nonce: u64, dead: impl Iterator<Item = u32>) -> io::Result<JournalNotes> {
    let notes = JournalNotes(dead.map(|slot| (slot, DEAD)).collect());
    // A directory in its place can only be replaced if it is empty.
    let _ = fs::remove_dir(path);
    durable::replace(path, &notes.encode(nonce))?;
    Ok(notes)
}

fn rewrite(path: &Path, nonce: u64) -> io::Result<u64> {
    let bytes = read(path, nonce)?.encode(nonce);
    durable::replace(path, &bytes)?;
    Ok(bytes.len() as u64)
}

fn encode(nonce: u64, slot: u32, touched: u32, to: &mut Vec<u8>) {
    to.extend_from_slice(&slot.to_le_bytes());
    to.extend_from_slice(&touched.to_le_bytes());
    to.extend_from_slice(&checksum(nonce, slot, touched).to_le_bytes());
    to.extend_from_slice(&[0; 4]);
}

fn checksum(nonce: u64, slot: u32, touched: u32) -> u32 {
    let sum = crc32c::crc32c(&nonce.to_le_bytes());
    crc32c::crc32c_append(crc32c::crc32c_append(sum, &slot.to_le_bytes()), &touched.to_le_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_are_read_back_and_half_or_foreign_notes_are_ignored() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal");
        assert_eq!(read(&path, 1).unwrap(), JournalNotes::default());
        touch(&path, 1, &[5, 6, 7], 100, 10).unwrap();
        bury(&path, 1, &[6]).unwrap();
        touch(&path, 1, &[6, 7], 200, 10).unwrap();
        touch(&path, 1, &[5], 50, 10).unwrap();
        let check = |notes: &JournalNotes| {
            assert_eq!([5, 6, 7].map(|slot| notes.is_dead(slot)), [false, true, false]);
            assert_eq!((notes.touched(5, 0), notes.touched(7, 0), notes.touched(7, 300)), (100, 200, 300));
            assert_eq!(notes.touched(8, 40), 40);
        };
        check(&read(&path, 1).unwrap());
        assert_eq!(read(&path, 2).unwrap(), JournalNotes::default(), "it is the journal of another segment");
        // The next write overwrites the partial note of a failed write.
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(b"half", file.metadata().unwrap().len()).unwrap();
        check(&read(&path, 1).unwrap());
        bury(&path, 1, &[9]).unwrap();
        assert!(read(&path, 1).unwrap().is_dead(9));
        check(&read(&path, 1).unwrap());
    }

    /// A journal that cannot be read is not rewritten, because its notes about deleted records would be lost.
    #[test]
    fn a_journal_that_cannot_be_read_keeps_its_notes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal");
        bury(&path, 1, &[3]).unwrap();
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(MAX_BYTES).unwrap();
        assert!(touch(&path, 1, &[4], 100, 1).is_err());
        file.set_len(NOTE_BYTES as u64).unwrap();
        assert!(read(&path, 1).unwrap().is_dead(3));
    }

    #[test]
    fn a_journal_that_is_long_for_its_segment_is_shortened() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal");
        bury(&path, 1, &[3]).unwrap();
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(MAX_BYTES).unwrap();
        shorten(&path, 1, MAX_BYTES).unwrap();
        assert_eq!(path.metadata().unwrap().len(), MAX_BYTES, "it is not long for that many records");
        shorten(&path, 1, 1_000).unwrap();
        assert_eq!(path.metadata().unwrap().len(), NOTE_BYTES as u64);
        assert!(read(&path, 1).unwrap().is_dead(3));
    }

    #[test]
    fn a_journal_stays_short_however_often_records_are_used() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal");
        bury(&path, 1, &[3]).unwrap();
        let slots: Vec<u32> = (10..20).collect();
        for now in 1..2_000 {
            let bytes = touch(&path, 1, &slots, now, 11).unwrap();
            assert_eq!(bytes, path.metadata().unwrap().len());
            assert!(bytes <= (MANY_NOTES + 10) * NOTE_BYTES as u64);
        }
        let notes = read(&path, 1).unwrap();
        assert!(notes.is_dead(3) && notes.touched(10, 0) == 1_999);
    }
}
