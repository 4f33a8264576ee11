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
    forms::zstd_form::check_form,
    guards::Lease,
    index::{Found, Kind, Stamp},
    requests::{Damaged, Verified},
    settings::{MAX_RESULT_FILE_BYTES, SMALL_BLOB_BYTES},
    volume::stamps::{COARSE_TICK, nobody_writes, stamp_of},
};
use crate::regular_file;
use bytes::Bytes;
use gorego_reapi::{
    digest::{Digest, Hasher},
    error::{Error, Result},
};
use std::{
    fs::File,
    io,
    os::{fd::AsRawFd as _, unix::fs::FileExt as _},
    sync::{Arc, Mutex, PoisonError},
    thread,
};

/// Pieces in which a large file is hashed or copied.
pub(super) const PIECE_BYTES: usize = 256 * 1024;
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
    stored: StoredFile,
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
    pub(super) fn of_file(cas: Cas, found: Found, stored: StoredFile, size: u64, lease: Arc<Lease>) -> Self {
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
        let is_cached = read_cached(open.stored.file(), &mut buffer, offset).is_ok_and(|read| read > 0);
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

/// Fills a buffer's capacity with what the page cache has at an offset.
fn read_cached(file: &File, buffer: &mut Vec<u8>, offset: u64) -> io::Result<usize> {
    let spare = buffer.spare_capacity_mut();
    let vector = libc::iovec { iov_base: spare.as_mut_ptr().cast(), iov_len: spare.len() };
    let offset = i64::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: the vector describes memory that the buffer owns and that nothing else uses during the call.
    let read = unsafe { libc::preadv2(file.as_raw_fd(), &raw const vector, 1, offset, libc::RWF_NOWAIT) };
    let read = usize::try_from(read).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: the kernel has written this many bytes, which it was told is at most the capacity.
    unsafe { buffer.set_len(read) };
    Ok(read)
}

/// A stored file that is open, and what it looked like when its content was last seen to be right.
#[derive(Debug)]
pub(super) struct StoredFile {
    file: File,
    stamp: Mutex<Stamp>,
}

impl StoredFile {
    /// A file whose content was right when it had this stamp.
    pub(super) fn new(file: File, stamp: Stamp) -> Self {
        Self { file, stamp: Mutex::new(stamp) }
    }

    /// For reading, which [`StoredFile::confirm`] has to follow.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Whether what was read so far is right for certain. One system call.
    fn is_unchanged(&self) -> bool {
        let stamp = *self.stamp.lock().unwrap_or_else(PoisonError::into_inner);
        self.file.metadata().is_ok_and(|metadata| stamp_of(&metadata) == stamp)
    }

    /// Makes sure that what was read so far is right: a file that has changed is checked again. Blocks.
    ///
    /// # Errors
    /// `NotFound` when it is not; that was reported.
    pub(super) fn confirm(&self, cas: &Cas, found: &Found) -> Result<()> {
        if self.is_unchanged() {
            return Ok(());
        }
        let stamp = match (known_stamp(cas, found, &self.file)?, found.file.key.kind) {
            (Some(known), _) => known,
            (None, Kind::Zstd) => check_form(cas, found, &self.file)?.1,
            (None, Kind::Blob | Kind::Result) => check_content(cas, found, &self.file)?,
        };
        *self.stamp.lock().unwrap_or_else(PoisonError::into_inner) = stamp;
        Ok(())
    }
}

/// Opens the file of a stored blob of any size and makes sure of its content. Blocks; for as long as hashing takes if it must be.
pub(super) fn open_checked(cas: &Cas, found: &Found) -> Result<StoredFile> {
    let file = open(cas, found)?;
    let metadata = file.metadata().map_err(|error| failed(cas, found, &error))?;
    let has_its_size = metadata.len() == found.file.key.digest.size();
    let known = if has_its_size { known_stamp(cas, found, &file)? } else { None };
    let stamp = match known {
        Some(stamp) => stamp,
        None => check_content(cas, found, &file)?,
    };
    Ok(StoredFile::new(file, stamp))
}

/// The stamp of a file as it is now, if its content is known to be right at that stamp. The server itself moves the change
/// time when it writes down a use, and the actor hears of that a moment later. So a file that differs from what is known is
/// looked at a few times before anybody hashes it. Blocks.
pub(super) fn known_stamp(cas: &Cas, found: &Found, file: &File) -> Result<Option<Stamp>> {
    for look in 0..STAMP_LOOKS {
        if look > 0 {
            thread::sleep(COARSE_TICK);
        }
        let metadata = file.metadata().map_err(|error| failed(cas, found, &error))?;
        let now = stamp_of(&metadata);
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
fn check_content(cas: &Cas, found: &Found, file: &File) -> Result<Stamp> {
    let digest = found.file.key.digest;
    let metadata = file.metadata().map_err(|error| failed(cas, found, &error))?;
    if metadata.len() != digest.size() {
        return Err(damaged(cas, found, format!("it has {} bytes", metadata.len())));
    }
    // Before hashing: a change in the same tick of the clock would not show.
    let trusted = cas.shared().files.stamp(&metadata);
    let actual = hash_file(file, digest.hasher()).map_err(|error| failed(cas, found, &error))?;
    if actual != digest {
        return Err(damaged(cas, found, format!("its content is that of {actual}")));
    }
    tell_verified(cas, found, file, trusted);
    Ok(stamp_of(&metadata))
}

/// Tells the actor that a file's content is right, if the file still has the stamp from before it was read.
pub(super) fn tell_verified(cas: &Cas, found: &Found, file: &File, stamp: Stamp) {
    let is_unchanged = file.metadata().is_ok_and(|metadata| stamp_of(&metadata) == stamp);
    if is_unchanged && nobody_writes(file) {
        cas.actor().do_send(Verified { at: found.at, stamp });
    }
}

/// Whether a stored blob's file is what it should be, as far as is known without reading it; if that is not known it is read.
/// What is bad is reported. Blocks.
///
/// # Errors
/// Those that say nothing of the blob, such as too many open files.
pub(super) fn is_sound(cas: &Cas, found: &Found) -> Result<bool> {
    let is_known = std::fs::symlink_metadata(cas.shared().files.path(&found.file)).is_ok_and(|metadata| {
        metadata.is_file()
            && metadata.len() == found.file.key.digest.size()
            && stamp_of(&metadata) == found.stamp
    });
    if is_known {
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
    let metadata = file.metadata().map_err(|error| failed(cas, found, &error))?;
    let size = digest.size();
    if metadata.len() != size {
        return Err(damaged(cas, found, format!("it has {} bytes", metadata.len())));
    }
    let before = cas.shared().files.stamp(&metadata);
    let mut bytes = vec![0; usize::try_from(size).map_err(Error::internal)?];
    file.read_exact_at(&mut bytes, 0).map_err(|error| failed(cas, found, &error))?;
    // Looked at after the bytes were read, so that a change before that is seen.
    let is_known = file.metadata().is_ok_and(|metadata| stamp_of(&metadata) == found.stamp);
    if size <= SMALL_BLOB_BYTES || !is_known {
        let actual = digest.function().digest(&bytes);
        if actual != digest {
            return Err(damaged(cas, found, format!("its content is that of {actual}")));
        }
        if !is_known {
            tell_verified(cas, found, &file, before);
        }
    }
    Ok(bytes.into())
}

/// Reads the file of an action result, which checks itself. Blocks.
pub(super) fn read_result_file(cas: &Cas, found: &Found) -> Result<Vec<u8>> {
    let file = open(cas, found)?;
    regular_file::read_open(&file, MAX_RESULT_FILE_BYTES).map_err(|error| failed(cas, found, &error))
}

/// The error of bytes that are not what they are said to be.
pub(super) fn hash_mismatch(digest: Digest, actual: Digest) -> Error {
    Error::Invalid(format!("the bytes sent for blob {digest} are those of {actual}; nothing was stored"))
}

/// The miss that readers get.
pub(super) fn not_found(digest: Digest) -> Error {
    Error::NotFound(format!("blob {digest} is not in the CAS"))
}

/// The digest of a file's content, read by position from the start.
pub(super) fn hash_file(file: &File, mut hasher: Hasher) -> io::Result<Digest> {
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        match file.read_at(&mut piece, hasher.size()) {
            Ok(0) => return Ok(hasher.finish()),
            Ok(read) => hasher.update(piece.get(..read).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Opens a stored file without looking at its content. Blocks.
pub(super) fn open(cas: &Cas, found: &Found) -> Result<File> {
    regular_file::open(&cas.shared().files.path(&found.file)).map_err(|error| failed(cas, found, &error))
}

/// What a failed read means: a file that is gone, is no file, is too large or cannot be read from its disk is a miss;
/// everything else, such as too many open files, says nothing about the blob.
fn failed(cas: &Cas, found: &Found, error: &io::Error) -> Error {
    let digest = found.file.key.digest;
    let is_bad = error.raw_os_error() == Some(libc::EIO) || regular_file::is_something_else(error);
    let is_gone = matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::UnexpectedEof | io::ErrorKind::FileTooLarge
    );
    if is_bad || is_gone {
        return damaged(cas, found, error.to_string());
    }
    Error::io(&format!("read blob {digest}"), error)
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
