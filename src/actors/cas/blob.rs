//! Handles that carry bytes past the mailbox: [`BlobReader`] reads a stored blob, [`BlobWriter`] writes a new one.
//!
//! This file has the reading side: how a stored file is opened, checked and read. A blob of up to `SMALL_BLOB_BYTES` is hashed at
//! every read, unless the volume has checked its checksums and it was hashed before. Every read of a larger blob checks the
//! checksums of its blocks, so that its first byte is served at once, also after a restart. It is first hashed from end to end if
//! it has no checksums, or if its [`Stamp`] differs from the one that this process knows. The stamp is checked again after each
//! read, before the bytes are handed out. A blob that does not match is reported to the actor, which drops it. From then on it is
//! a miss.
//!
//! The checksums of an input file are not checked when the kernel copies or clones it for an action. Such a blob is hashed once
//! in the life of the process, and again when its stamp changes ([`open_checked`]). The scrub finds later errors of the disk in
//! it.

pub(crate) use super::uploads::writer::BlobWriter;
use super::{
    client::Cas,
    guards::Hold,
    index::{FileId, FoundEntry, Seal, Stamp},
    requests::{Damaged, Verified},
    settings::SMALL_BLOB_BYTES,
    volume::{self, COARSE_TICK, PIECE_BYTES, Stored, checksums::ChecksumBuilder},
};
use bytes::Bytes;
use gorego_reapi::{
    compression::SeekTable,
    digest::Digest,
    error::{Error, Result},
};
use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
    thread,
};

/// Number of bytes that one job reads in [`Cas::read_through`]. When the caller leaves, the thread is busy for no longer than
/// this takes.
const READ_THROUGH_BYTES: u64 = 8 * 1024 * 1024;
/// Number of times that a file whose stamp differs from the verified one is checked again, [`COARSE_TICK`] apart, before it is
/// hashed.
const STAMP_LOOKS: usize = 3;

/// A stored blob, open for reading. It was checked against its digest when it was opened, and stays readable while this is
/// held, even if it is evicted.
#[derive(Debug)]
pub struct BlobReader {
    size: u64,
    content: BlobContent,
}

#[derive(Debug)]
enum BlobContent {
    Whole(Bytes),
    File(Arc<OpenFile>),
}

#[derive(Debug)]
struct OpenFile {
    stored: CheckedFile,
    /// Whether the zstd frames of the file are read instead of its content.
    as_frames: bool,
    found: FoundEntry,
    cas: Cas,
    /// Keeps the entry in the index, so that its bytes are counted while the open file keeps them on disk.
    _hold: Arc<Hold>,
}

impl BlobReader {
    /// A reader of bytes in memory.
    pub(super) fn whole(bytes: Bytes) -> Self {
        Self { size: bytes.len() as u64, content: BlobContent::Whole(bytes) }
    }

    /// Opens a located blob. Blocks.
    pub(super) fn open(cas: Cas, found: FoundEntry, hold: Arc<Hold>) -> Result<Self> {
        let size = found.file.key.digest.size();
        if size <= SMALL_BLOB_BYTES {
            return read_whole(&cas, &found).map(Self::whole);
        }
        let stored = open_to_read(&cas, &found)?;
        Ok(Self::of_file(cas, found, stored, size, hold))
    }

    /// A reader of the first `size` bytes of a checked file.
    pub(super) fn of_file(
        cas: Cas,
        found: FoundEntry,
        stored: CheckedFile,
        size: u64,
        hold: Arc<Hold>,
    ) -> Self {
        let open = OpenFile { stored, as_frames: false, found, cas, _hold: hold };
        Self { size, content: BlobContent::File(Arc::new(open)) }
    }

    /// A reader of the zstd frames of a checked file, with their table. `None` if the file is not kept compressed.
    pub(super) fn of_frames(
        cas: Cas,
        found: FoundEntry,
        stored: CheckedFile,
        hold: Arc<Hold>,
    ) -> Option<(Self, SeekTable)> {
        let table = stored.file().frames()?.table().clone();
        let open = OpenFile { stored, as_frames: true, found, cas, _hold: hold };
        Some((Self { size: table.sizes().1, content: BlobContent::File(Arc::new(open)) }, table))
    }

    /// The size of the blob in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether the bytes are read from an open file, which keeps them on disk, and not from memory.
    pub fn is_file(&self) -> bool {
        matches!(self.content, BlobContent::File(_))
    }

    /// Reads up to `max` bytes from `offset`; the result is empty only at the end of the blob. Does not block the caller's
    /// thread: bytes in the page cache are read at once, others on a blocking thread.
    ///
    /// # Errors
    /// `Unavailable` when the file turns out to be damaged. The blob is dropped, so a retry gets `NotFound`.
    pub async fn read_at(&self, offset: u64, max: usize) -> Result<Bytes> {
        let left = self.size.saturating_sub(offset);
        let wanted = usize::try_from(left).unwrap_or(usize::MAX).min(max);
        if wanted == 0 {
            return Ok(Bytes::new());
        }
        let open = match &self.content {
            BlobContent::Whole(bytes) => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
                return Ok(bytes.slice(start..(start + wanted).min(bytes.len())));
            }
            BlobContent::File(open) => open,
        };
        let mut buffer = Vec::with_capacity(wanted);
        // A short read is fine: the caller reads on from its end.
        let is_cached =
            !open.as_frames && open.stored.file().read_cached(&mut buffer, offset).is_ok_and(|read| read > 0);
        if is_cached && open.stored.is_unchanged() {
            return Ok(buffer.into());
        }
        let open = open.clone();
        let runtime = open.cas.shared().runtime.clone();
        let read = runtime.spawn_blocking(move || {
            buffer.resize(wanted, 0);
            let read = open.read_at(&mut buffer, offset)?;
            buffer.truncate(read);
            Ok(buffer.into())
        });
        read.await.map_err(Error::internal)?
    }

    /// Reads exactly `length` bytes from `offset`, all of them within the blob. Blocks.
    ///
    /// # Errors
    /// `Unavailable` when the file turns out to be damaged. The blob is dropped, so a retry gets `NotFound`.
    pub(super) fn read_exact(&self, offset: u64, length: usize) -> Result<Bytes> {
        let open = match &self.content {
            BlobContent::Whole(bytes) => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
                return Ok(bytes.slice(start..start.saturating_add(length).min(bytes.len())));
            }
            BlobContent::File(open) => open,
        };
        let mut buffer = vec![0; length];
        let mut filled = 0;
        while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            filled += open.read_at(rest, offset + filled as u64)?;
        }
        Ok(buffer.into())
    }

    /// Reads from `offset` up to the end of the blob or of the buffer. Reads at least one byte, unless either is at its end.
    /// Blocks.
    ///
    /// # Errors
    /// The errors of [`BlobReader::read_at`].
    pub(super) fn read_into(&self, buffer: &mut [u8], offset: u64) -> Result<usize> {
        let left = usize::try_from(self.size.saturating_sub(offset)).unwrap_or(usize::MAX);
        let wanted = left.min(buffer.len());
        let buffer = buffer.get_mut(..wanted).unwrap_or_default();
        match &self.content {
            _ if wanted == 0 => Ok(0),
            BlobContent::Whole(bytes) => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
                buffer.copy_from_slice(&bytes[start..start + wanted]);
                Ok(wanted)
            }
            BlobContent::File(open) => open.read_at(buffer, offset),
        }
    }
}

impl Cas {
    /// Passes all bytes of a blob to `see`, in pieces, on a blocking thread. Waits for a place among the blobs that are being
    /// hashed.
    ///
    /// # Errors
    /// The errors of [`BlobReader::read_at`].
    pub async fn read_through<T: Send + 'static>(
        &self,
        blob: BlobReader,
        mut state: T,
        see: fn(&mut T, &[u8]),
    ) -> Result<T> {
        let _place = self.shared().cold_reads.wait_for(self.caller(), 1).await?;
        let (blob, mut at) = (Arc::new(blob), 0);
        while at < blob.size() {
            let (blob, end) = (blob.clone(), at.saturating_add(READ_THROUGH_BYTES).min(blob.size()));
            let read = self.blocking(move || {
                let mut piece = vec![0; PIECE_BYTES];
                while at < end {
                    let read = blob.read_into(&mut piece, at)?;
                    see(&mut state, piece.get(..read).unwrap_or_default());
                    at += read as u64;
                }
                Ok::<_, Error>((state, at))
            });
            (state, at) = read.await??;
        }
        Ok(state)
    }
}

impl OpenFile {
    /// Reads at least one byte and verifies that the file is still right. Blocks.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<usize> {
        let lost = |reason: String| {
            let digest = self.found.file.key.digest;
            Error::Unavailable(format!(
                "blob {digest} turned out to be damaged and was dropped ({reason}); it has to be uploaded again"
            ))
        };
        let reason = loop {
            let file = self.stored.file();
            let frames = if self.as_frames { file.frames() } else { None };
            let read = match frames {
                Some(frames) => frames.read_at(buffer, offset),
                None => file.read_at(buffer, offset),
            };
            match read {
                Ok(0) => break "it is too short".to_owned(),
                Ok(read) => {
                    return match self.stored.confirm(&self.cas, &self.found) {
                        Ok(()) => Ok(read),
                        Err(Error::NotFound(_)) => Err(lost("its file has changed".into())),
                        Err(error) => Err(error),
                    };
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => break error.to_string(),
            }
        };
        report(&self.cas, &self.found, reason.clone());
        Err(lost(reason))
    }
}

/// Verifies the content of a stored file from end to end. Returns the stamp at which it was verified. Blocks.
///
/// # Errors
/// `NotFound` when the content is wrong. This is reported to the actor.
pub(super) type Check = fn(&Cas, &FoundEntry, &dyn Stored) -> Result<Stamp>;

/// An open stored file, with its stamp when its content was last verified.
#[derive(Debug)]
pub(super) struct CheckedFile {
    file: Box<dyn Stored>,
    stamp: Mutex<Stamp>,
    check: Check,
}

impl CheckedFile {
    /// A file whose content was verified at this stamp; `check` verifies it again.
    pub(super) fn new(file: Box<dyn Stored>, stamp: Stamp, check: Check) -> Self {
        Self { file, stamp: Mutex::new(stamp), check }
    }

    /// The file. [`CheckedFile::confirm`] has to follow each read.
    pub(super) fn file(&self) -> &dyn Stored {
        &*self.file
    }

    /// Whether the file still has the verified stamp. One system call.
    fn is_unchanged(&self) -> bool {
        let stamp = *self.stamp.lock().unwrap_or_else(PoisonError::into_inner);
        self.file.look().is_ok_and(|now| now.stamp == stamp)
    }

    /// Ensures that the bytes read so far are right: a changed file is verified again. Blocks.
    ///
    /// # Errors
    /// `NotFound` when the content is wrong. This is reported to the actor.
    pub(super) fn confirm(&self, cas: &Cas, found: &FoundEntry) -> Result<()> {
        if self.is_unchanged() {
            return Ok(());
        }
        let stamp = match known_stamp(cas, found, self.file())? {
            Some(known) => known,
            None => (self.check)(cas, found, self.file())?,
        };
        *self.stamp.lock().unwrap_or_else(PoisonError::into_inner) = stamp;
        Ok(())
    }
}

/// Opens the file of a larger blob. Its blocks are checked when they are read. If it has no checksums or has changed, it is
/// hashed now. Blocks for as long as that takes.
pub(super) fn open_to_read(cas: &Cas, found: &FoundEntry) -> Result<CheckedFile> {
    let file = open(cas, found)?;
    let look = file.look().map_err(|error| failed(cas, found, &error))?;
    if !file.is_checked_when_read() || look.size != found.file.key.digest.size() {
        let stamp = check_content(cas, found, &*file)?;
        // Hashing has added checksums, so the file is opened again with them.
        return Ok(CheckedFile::new(open(cas, found)?, stamp, check_content));
    }
    let is_new = found.stamp == Seal::UNTRUSTED;
    let stamp = match if is_new { Some(look.stamp) } else { known_stamp(cas, found, &*file)? } {
        Some(stamp) => stamp,
        None => check_content(cas, found, &*file)?,
    };
    if is_new {
        // Damage at the start of the blob is a miss, not an answer that breaks off.
        let mut start = [0];
        file.read_at(&mut start, 0).map_err(|error| failed(cas, found, &error))?;
    }
    Ok(CheckedFile::new(file, stamp, check_content))
}

/// Opens the file of a stored blob of any size and verifies its content. Blocks for as long as hashing takes.
pub(super) fn open_checked(cas: &Cas, found: &FoundEntry) -> Result<CheckedFile> {
    let file = open(cas, found)?;
    let look = file.look().map_err(|error| failed(cas, found, &error))?;
    let has_its_size = look.size == found.file.key.digest.size();
    let known = if has_its_size { known_stamp(cas, found, &*file)? } else { None };
    let stamp = match known {
        Some(stamp) => stamp,
        None => check_content(cas, found, &*file)?,
    };
    Ok(CheckedFile::new(file, stamp, check_content))
}

/// The current stamp of a file, if its content was verified at that stamp. The server itself changes the change time when it
/// records a use, and the actor learns of this a moment later. So a file with a different stamp is checked a few times before it
/// is hashed. Blocks.
pub(super) fn known_stamp(cas: &Cas, found: &FoundEntry, file: &dyn Stored) -> Result<Option<Stamp>> {
    for look in 0..STAMP_LOOKS {
        if look > 0 {
            thread::sleep(COARSE_TICK);
        }
        let now = file.look().map_err(|error| failed(cas, found, &error))?.stamp;
        if now == found.stamp {
            return Ok(Some(now));
        }
        match cas.known_stamp(found.at)? {
            Some(known) if known == now => return Ok(Some(now)),
            // Only a verified stamp can be out of date.
            None | Some(Seal::UNTRUSTED) => return Ok(None),
            Some(_) => {}
        }
    }
    Ok(None)
}

/// Hashes a stored blob. Returns the stamp at which it was verified and reports it to the actor. Blocks.
fn check_content(cas: &Cas, found: &FoundEntry, file: &dyn Stored) -> Result<Stamp> {
    check_content_slowly(cas, found, file, &mut |_| Ok(()))
}

/// Like [`check_content`], but calls `pause` after each piece with the number of its bytes. An error of `pause` ends the check.
pub(super) fn check_content_slowly(
    cas: &Cas,
    found: &FoundEntry,
    file: &dyn Stored,
    pause: &mut dyn FnMut(usize) -> io::Result<()>,
) -> Result<Stamp> {
    let digest = found.file.key.digest;
    // The stamp is taken before hashing, because a later change in the same clock tick would not show.
    let before = file.look().map_err(|error| failed(cas, found, &error))?;
    if before.size != digest.size() {
        return Err(damaged(cas, found, format!("it has {} bytes", before.size)));
    }
    let mut sums = ChecksumBuilder::default();
    let read = |piece: &mut [u8], at| {
        let read = file.read_at(piece, at)?;
        sums.update(piece.get(..read).unwrap_or_default());
        pause(read)?;
        Ok(read)
    };
    let actual = volume::hash(digest.hasher(), read).map_err(|error| failed(cas, found, &error))?;
    if actual != digest {
        return Err(damaged(cas, found, format!("its content has the digest {actual}")));
    }
    if !file.is_checked_when_read() {
        // Without checksums, the file is only hashed again.
        let _ = cas.shared().volume.add_checksums(&found.file, &sums.finish());
    }
    tell_verified(cas, found, file, before.lasting);
    Ok(before.stamp)
}

/// Reports to the actor that a file was verified, if the file still has the stamp from before it was read.
pub(super) fn tell_verified(cas: &Cas, found: &FoundEntry, file: &dyn Stored, stamp: Stamp) {
    let is_unchanged = file.look().is_ok_and(|now| now.stamp == stamp);
    if is_unchanged && file.nobody_writes() {
        cas.actor().do_send(Verified { at: found.at, stamp });
    }
}

/// Whether a stored blob's file is intact. The file is hashed only if its stamp does not show this. A damaged file is reported.
/// Blocks.
///
/// # Errors
/// Errors that say nothing about the blob, such as too many open files.
pub(super) fn is_sound(cas: &Cas, found: &FoundEntry) -> Result<bool> {
    let look = cas.shared().volume.look(&found.file);
    if look.is_ok_and(|now| now.size == found.file.key.digest.size() && now.stamp == found.stamp) {
        return Ok(true);
    }
    match open_checked(cas, found) {
        Ok(_) => Ok(true),
        Err(Error::NotFound(_)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Reads a stored blob into memory and verifies its content. Blocks.
pub(super) fn read_whole(cas: &Cas, found: &FoundEntry) -> Result<Bytes> {
    let digest = found.file.key.digest;
    let file = open(cas, found)?;
    let before = file.look().map_err(|error| failed(cas, found, &error))?;
    let size = digest.size();
    if before.size != size {
        return Err(damaged(cas, found, format!("it has {} bytes", before.size)));
    }
    let checked = file.whole();
    let is_checked = checked.is_some();
    let bytes = match checked {
        Some(bytes) => bytes,
        None => {
            let mut bytes = vec![0; usize::try_from(size).map_err(Error::internal)?];
            volume::read_exact(&*file, &mut bytes, 0).map_err(|error| failed(cas, found, &error))?;
            bytes.into()
        }
    };
    // The stamp is checked after the bytes were read, so that any earlier change shows.
    let is_known = file.look().is_ok_and(|now| now.stamp == found.stamp);
    if !is_known || (size <= SMALL_BLOB_BYTES && !is_checked) {
        let actual = digest.function().digest(&bytes);
        if actual != digest {
            return Err(damaged(cas, found, format!("its content has the digest {actual}")));
        }
        if !is_known {
            tell_verified(cas, found, &*file, before.lasting);
        }
    }
    Ok(bytes)
}

/// Reads all of a stored file of at most `max` bytes, whose content the caller checks. Blocks.
pub(super) fn read_unchecked(cas: &Cas, found: &FoundEntry, max: u64) -> Result<Vec<u8>> {
    let file = open(cas, found)?;
    volume::read_all(&*file, max).map_err(|error| failed(cas, found, &error))
}

/// Reads all of a stored file of at most `max` bytes, whose content the caller checks. For a longer file, the inner error is its
/// size. Blocks.
pub(super) fn read_unless_large(
    cas: &Cas,
    found: &FoundEntry,
    max: u64,
) -> Result<std::result::Result<Vec<u8>, u64>> {
    let file = open(cas, found)?;
    let failed = |error: io::Error| failed(cas, found, &error);
    let size = file.look().map_err(failed)?.size;
    if size > max {
        return Ok(Err(size));
    }
    volume::read_all(&*file, max).map(Ok).map_err(failed)
}

/// The error for uploaded bytes that do not match their digest.
pub(super) fn hash_mismatch(digest: Digest, actual: Digest) -> Error {
    Error::Invalid(format!("the bytes sent for blob {digest} have the digest {actual}; nothing was stored"))
}

/// The error for a blob that is not stored.
pub(super) fn not_found(digest: Digest) -> Error {
    Error::NotFound(format!("blob {digest} is not in the CAS"))
}

/// Opens a stored file without checking its content. Blocks.
pub(super) fn open(cas: &Cas, found: &FoundEntry) -> Result<Box<dyn Stored>> {
    open_file(cas, &found.file).map_err(|error| failed(cas, found, &error))
}

/// Opens a stored file that was looked up. If compaction has moved it since, it is looked up again. Blocks.
pub(super) fn open_file(cas: &Cas, file: &FileId) -> io::Result<Box<dyn Stored>> {
    let mut file = *file;
    loop {
        let error = match cas.shared().volume.open(&file) {
            Err(error) if volume::is_lost(&error) => error,
            opened => return opened,
        };
        match cas.look_up(|index| index.renew(&file.key)) {
            // The loop ends, because each turn needs another compaction.
            Ok(Some(found)) if found.file != file => file = found.file,
            _ => return Err(error),
        }
    }
}

/// Classifies a failed read. A lost file ([`volume::is_lost`]) is reported as damaged and is a miss. Other failures, such as
/// too many open files, say nothing about the blob.
pub(super) fn failed(cas: &Cas, found: &FoundEntry, error: &io::Error) -> Error {
    if volume::is_lost(error) {
        return damaged(cas, found, error.to_string());
    }
    Error::io(&format!("read blob {}", found.file.key.digest), error)
}

pub(super) fn damaged(cas: &Cas, found: &FoundEntry, reason: String) -> Error {
    report(cas, found, reason);
    not_found(found.file.key.digest)
}

/// Hides the entry at once and reports it to the actor, which knows whether the file was merely evicted meanwhile.
pub(super) fn report(cas: &Cas, found: &FoundEntry, reason: String) {
    cas.shared().view.condemn(found.at);
    cas.actor().do_send(Damaged { at: found.at, reason });
}
