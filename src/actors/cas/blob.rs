//! Handles through which bytes go round the mailbox: one to read a stored blob, one to write a new one.
//!
//! This file has the reading: how a stored file is opened, checked and read. A blob up to `SMALL_BLOB_BYTES` is read and
//! hashed every time. A larger one is trusted while its length and its [`Stamp`] are those that were recorded when this process
//! last knew its content; otherwise, as after a restart, it is hashed from end to end before its first byte is served. The
//! stamp is looked at again after each read and before the bytes are handed out. What does not hash to its digest is reported
//! to the actor, which drops it, and is a miss for the reader. Changes that move no change time, such as those of a failing
//! disk, are not noticed in larger blobs.

pub use super::uploads::writer::BlobWriter;
use super::{
    client::Cas,
    guards::Lease,
    index::{Found, Stamp},
    requests::{Damaged, Verified},
    settings::SMALL_BLOB_BYTES,
    volume::{self, COARSE_TICK, Stored},
};
use bytes::Bytes;
use gorego_reapi::{
    digest::Digest,
    error::{Error, Result},
};
use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
    thread,
};

/// How often a file whose stamp differs from the known one is looked at, [`COARSE_TICK`] apart, before it is hashed.
const STAMP_LOOKS: usize = 3;

/// A stored blob, open for reading; checked against its digest before it was handed out. It stays readable while this is
/// held, whatever the index decides.
#[derive(Debug)]
pub struct BlobReader {
    size: u64,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Whole(Bytes),
    File(Arc<OpenFile>),
}

#[derive(Debug)]
struct OpenFile {
    stored: CheckedFile,
    found: Found,
    cas: Cas,
    /// So that the bytes on disk stay counted while they cannot be freed.
    _lease: Arc<Lease>,
}

impl BlobReader {
    /// A reader of bytes at hand.
    pub(super) fn whole(bytes: Bytes) -> Self {
        Self { size: bytes.len() as u64, content: Content::Whole(bytes) }
    }

    /// Opens what was located. Blocks.
    pub(super) fn open(cas: Cas, found: Found, lease: Arc<Lease>) -> Result<Self> {
        let size = found.file.key.digest.size();
        if size <= SMALL_BLOB_BYTES {
            return read_whole(&cas, &found).map(Self::whole);
        }
        let stored = open_checked(&cas, &found)?;
        Ok(Self::of_file(cas, found, stored, size, lease))
    }

    /// A reader of the first `size` bytes of a stored file that was checked.
    pub(super) fn of_file(cas: Cas, found: Found, stored: CheckedFile, size: u64, lease: Arc<Lease>) -> Self {
        Self { size, content: Content::File(Arc::new(OpenFile { stored, found, cas, _lease: lease })) }
    }

    /// Size of the blob in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether an open file is behind it, which keeps its bytes on disk, and not bytes at hand.
    pub fn is_file(&self) -> bool {
        matches!(self.content, Content::File(_))
    }

    /// Up to `max` bytes from `offset`; empty only at the end of the blob. Does not block the caller's thread: bytes in the
    /// page cache are taken at once, others on a blocking thread.
    ///
    /// # Errors
    /// `DataLoss` when the file turns out to be shorter than the blob.
    pub async fn read_at(&self, offset: u64, max: usize) -> Result<Bytes> {
        let left = self.size.saturating_sub(offset);
        let wanted = usize::try_from(left).unwrap_or(usize::MAX).min(max);
        if wanted == 0 {
            return Ok(Bytes::new());
        }
        let open = match &self.content {
            Content::Whole(bytes) => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
                return Ok(bytes.slice(start..(start + wanted).min(bytes.len())));
            }
            Content::File(open) => open,
        };
        let mut buffer = Vec::with_capacity(wanted);
        // A short read is fine: the caller asks again from where it ended.
        let is_cached = open.stored.file().read_cached(&mut buffer, offset).is_ok_and(|read| read > 0);
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

    /// Exactly `length` bytes from `offset`, all of them within the blob. Blocks.
    ///
    /// # Errors
    /// `DataLoss` when the file turns out to be shorter than the blob.
    pub(super) fn read_exact(&self, offset: u64, length: usize) -> Result<Bytes> {
        let open = match &self.content {
            Content::Whole(bytes) => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
                return Ok(bytes.slice(start..start.saturating_add(length).min(bytes.len())));
            }
            Content::File(open) => open,
        };
        let mut buffer = vec![0; length];
        let mut filled = 0;
        while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            filled += open.read_at(rest, offset + filled as u64)?;
        }
        Ok(buffer.into())
    }

    /// Reads from `offset` on, as far as there is blob and buffer; at least one byte where both are left. Blocks.
    ///
    /// # Errors
    /// As [`BlobReader::read_at`].
    pub(super) fn read_into(&self, buffer: &mut [u8], offset: u64) -> Result<usize> {
        let left = usize::try_from(self.size.saturating_sub(offset)).unwrap_or(usize::MAX);
        let wanted = left.min(buffer.len());
        let buffer = buffer.get_mut(..wanted).unwrap_or_default();
        match &self.content {
            _ if wanted == 0 => Ok(0),
            Content::Whole(bytes) => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
                buffer.copy_from_slice(&bytes[start..start + wanted]);
                Ok(wanted)
            }
            Content::File(open) => open.read_at(buffer, offset),
        }
    }
}

impl OpenFile {
    /// At least one byte, all of them right. Blocks.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<usize> {
        let lost = |reason: String| {
            let digest = self.found.file.key.digest;
            Error::DataLoss(format!("blob {digest} cannot be read any further: {reason}"))
        };
        let reason = loop {
            match self.stored.file().read_at(buffer, offset) {
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

/// Checks the content of a stored file from end to end. Returns the stamp at which it was right. Blocks.
///
/// # Errors
/// `NotFound` when it is not right; that was reported.
pub(super) type Check = fn(&Cas, &Found, &dyn Stored) -> Result<Stamp>;

/// A stored file that is open, and what it looked like when its content was last seen to be right.
#[derive(Debug)]
pub(super) struct CheckedFile {
    file: Box<dyn Stored>,
    stamp: Mutex<Stamp>,
    check: Check,
}

impl CheckedFile {
    /// A file whose content was right when it had this stamp, and how to find out once more.
    pub(super) fn new(file: Box<dyn Stored>, stamp: Stamp, check: Check) -> Self {
        Self { file, stamp: Mutex::new(stamp), check }
    }

    /// For reading, which [`CheckedFile::confirm`] has to follow.
    pub(super) fn file(&self) -> &dyn Stored {
        &*self.file
    }

    /// Whether what was read so far is right for certain. One system call.
    fn is_unchanged(&self) -> bool {
        let stamp = *self.stamp.lock().unwrap_or_else(PoisonError::into_inner);
        self.file.look().is_ok_and(|now| now.stamp == stamp)
    }

    /// Makes sure that what was read so far is right: a file that has changed is checked again. Blocks.
    ///
    /// # Errors
    /// `NotFound` when it is not; that was reported.
    pub(super) fn confirm(&self, cas: &Cas, found: &Found) -> Result<()> {
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

/// Opens the file of a stored blob of any size and makes sure of its content. Blocks; for as long as hashing takes if it must be.
pub(super) fn open_checked(cas: &Cas, found: &Found) -> Result<CheckedFile> {
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

/// The stamp of a file as it is now, if its content is known to be right at that stamp. The server itself moves the change
/// time when it writes down a use, and the actor hears of that a moment later. So a file that differs from what is known is
/// looked at a few times before anybody hashes it. Blocks.
pub(super) fn known_stamp(cas: &Cas, found: &Found, file: &dyn Stored) -> Result<Option<Stamp>> {
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
            // Only a stamp that is known can be out of date.
            None | Some(Stamp::UNTRUSTED) => return Ok(None),
            Some(_) => {}
        }
    }
    Ok(None)
}

/// Hashes a stored blob. Returns the stamp at which it was right, and tells the actor of it. Blocks.
fn check_content(cas: &Cas, found: &Found, file: &dyn Stored) -> Result<Stamp> {
    let digest = found.file.key.digest;
    // Before hashing: a change in the same tick of the clock would not show.
    let before = file.look().map_err(|error| failed(cas, found, &error))?;
    if before.size != digest.size() {
        return Err(damaged(cas, found, format!("it has {} bytes", before.size)));
    }
    let actual = volume::hash(digest.hasher(), |piece, at| file.read_at(piece, at))
        .map_err(|error| failed(cas, found, &error))?;
    if actual != digest {
        return Err(damaged(cas, found, format!("its content is that of {actual}")));
    }
    tell_verified(cas, found, file, before.lasting);
    Ok(before.stamp)
}

/// Tells the actor that a file's content is right, if the file still has the stamp from before it was read.
pub(super) fn tell_verified(cas: &Cas, found: &Found, file: &dyn Stored, stamp: Stamp) {
    let is_unchanged = file.look().is_ok_and(|now| now.stamp == stamp);
    if is_unchanged && file.nobody_writes() {
        cas.actor().do_send(Verified { at: found.at, stamp });
    }
}

/// Whether a stored blob's file is what it should be, as far as is known without reading it; if that is not known it is read.
/// What is bad is reported. Blocks.
///
/// # Errors
/// Those that say nothing of the blob, such as too many open files.
pub(super) fn is_sound(cas: &Cas, found: &Found) -> Result<bool> {
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

/// Reads a stored blob into memory and makes sure of its content. Blocks.
pub(super) fn read_whole(cas: &Cas, found: &Found) -> Result<Bytes> {
    let digest = found.file.key.digest;
    let file = open(cas, found)?;
    let before = file.look().map_err(|error| failed(cas, found, &error))?;
    let size = digest.size();
    if before.size != size {
        return Err(damaged(cas, found, format!("it has {} bytes", before.size)));
    }
    let mut bytes = vec![0; usize::try_from(size).map_err(Error::internal)?];
    volume::read_exact(&*file, &mut bytes, 0).map_err(|error| failed(cas, found, &error))?;
    // Looked at after the bytes were read, so that a change before that is seen.
    let is_known = file.look().is_ok_and(|now| now.stamp == found.stamp);
    if size <= SMALL_BLOB_BYTES || !is_known {
        let actual = digest.function().digest(&bytes);
        if actual != digest {
            return Err(damaged(cas, found, format!("its content is that of {actual}")));
        }
        if !is_known {
            tell_verified(cas, found, &*file, before.lasting);
        }
    }
    Ok(bytes.into())
}

/// Reads all of a stored file of at most `max` bytes, whose content the caller checks. Blocks.
pub(super) fn read_unchecked(cas: &Cas, found: &Found, max: u64) -> Result<Vec<u8>> {
    let file = open(cas, found)?;
    volume::read_all(&*file, max).map_err(|error| failed(cas, found, &error))
}

/// The error of bytes that are not what they are said to be.
pub(super) fn hash_mismatch(digest: Digest, actual: Digest) -> Error {
    Error::Invalid(format!("the bytes sent for blob {digest} are those of {actual}; nothing was stored"))
}

/// The miss that readers get.
pub(super) fn not_found(digest: Digest) -> Error {
    Error::NotFound(format!("blob {digest} is not in the CAS"))
}

/// Opens a stored file without looking at its content. Blocks.
pub(super) fn open(cas: &Cas, found: &Found) -> Result<Box<dyn Stored>> {
    cas.shared().volume.open(&found.file).map_err(|error| failed(cas, found, &error))
}

/// What a failed read means: a file that is gone, is no file, is too large or cannot be read from its disk is a miss;
/// everything else, such as too many open files, says nothing about the blob.
fn failed(cas: &Cas, found: &Found, error: &io::Error) -> Error {
    if volume::is_lost(error) {
        return damaged(cas, found, error.to_string());
    }
    Error::io(&format!("read blob {}", found.file.key.digest), error)
}

pub(super) fn damaged(cas: &Cas, found: &Found, reason: String) -> Error {
    report(cas, found, reason);
    not_found(found.file.key.digest)
}

/// Hides the entry at once and tells the actor, which knows whether the file was merely evicted meanwhile.
pub(super) fn report(cas: &Cas, found: &Found, reason: String) {
    cas.shared().view.condemn(found.at);
    cas.actor().do_send(Damaged { at: found.at, reason });
}
