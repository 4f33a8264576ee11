//! Handles through which bytes go round the mailbox: one to read a stored blob, one to write a new one.
//!
//! This file has the reading: how a stored file is opened, checked and read. A blob up to `SMALL_BLOB_BYTES` is read and
//! hashed every time. A larger one is trusted while its length and modification time are those that were recorded when this
//! process last knew its content; otherwise, as after a restart, it is hashed from end to end before its first byte is
//! served. What does not hash to its digest is reported to the actor, which drops it, and is a miss for the reader. Changes
//! behind the server's back that keep length and modification time are not noticed in larger blobs.

pub use super::writer::BlobWriter;
use super::{
    client::Cas,
    guards::Lease,
    index::{Found, Stamp},
    requests::{Damaged, Verified},
    settings::SMALL_BLOB_BYTES,
};
use crate::{
    digest::{Digest, Hasher},
    error::{Error, Result},
};
use bytes::Bytes;
use std::{
    fs::File,
    io::{self, Read as _},
    os::{
        fd::AsRawFd as _,
        unix::fs::{FileExt as _, MetadataExt as _},
    },
    sync::Arc,
};

/// Pieces in which a large file is hashed or copied.
pub(super) const PIECE_BYTES: usize = 256 * 1024;

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
    file: File,
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
        let file = open_checked(&cas, &found)?;
        Ok(Self::of_file(cas, found, file, size, lease))
    }

    /// A reader of the first `size` bytes of a stored file that was checked.
    pub(super) fn of_file(cas: Cas, found: Found, file: File, size: u64, lease: Arc<Lease>) -> Self {
        Self { size, content: Content::File(Arc::new(OpenFile { file, found, cas, _lease: lease })) }
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
        if read_cached(&open.file, &mut buffer, offset).is_ok_and(|read| read > 0) {
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
    /// At least one byte. Blocks.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<usize> {
        let reason = loop {
            match self.file.read_at(buffer, offset) {
                Ok(0) => break "it is too short".to_owned(),
                Ok(read) => return Ok(read),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => break error.to_string(),
            }
        };
        let digest = self.found.file.key.digest;
        report(&self.cas, &self.found, reason.clone());
        Err(Error::DataLoss(format!("blob {digest} cannot be read any further: {reason}")))
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

/// The modification time of a file, as the index records it.
pub(super) fn stamp_of(metadata: &std::fs::Metadata) -> Stamp {
    Stamp::new(metadata.mtime().saturating_mul(1_000_000_000).saturating_add(metadata.mtime_nsec()))
}

/// Opens a stored file of any size and makes sure of its content. Blocks; for as long as hashing takes if it must be.
pub(super) fn open_checked(cas: &Cas, found: &Found) -> Result<File> {
    let digest = found.file.key.digest;
    let file = open(cas, found)?;
    let metadata = file.metadata().map_err(|error| failed(cas, found, &error))?;
    if metadata.len() != digest.size() {
        return Err(damaged(cas, found, format!("it has {} bytes", metadata.len())));
    }
    let stamp = stamp_of(&metadata);
    if found.stamp != stamp {
        let actual = hash_file(&file, digest.hasher()).map_err(|error| failed(cas, found, &error))?;
        if actual != digest {
            return Err(damaged(cas, found, format!("its content is that of {actual}")));
        }
        cas.actor().do_send(Verified { at: found.at, stamp });
    }
    Ok(file)
}

/// Reads a stored blob into memory and makes sure of its content. Blocks.
pub(super) fn read_whole(cas: &Cas, found: &Found) -> Result<Bytes> {
    let digest = found.file.key.digest;
    let file = open(cas, found)?;
    let metadata = file.metadata().map_err(|error| failed(cas, found, &error))?;
    let (stamp, size) = (stamp_of(&metadata), digest.size());
    if metadata.len() != size {
        return Err(damaged(cas, found, format!("it has {} bytes", metadata.len())));
    }
    let mut bytes = vec![0; usize::try_from(size).map_err(Error::internal)?];
    file.read_exact_at(&mut bytes, 0).map_err(|error| failed(cas, found, &error))?;
    let trusted = found.stamp == stamp;
    if size <= SMALL_BLOB_BYTES || !trusted {
        let actual = digest.function().digest(&bytes);
        if actual != digest {
            return Err(damaged(cas, found, format!("its content is that of {actual}")));
        }
        if !trusted {
            cas.actor().do_send(Verified { at: found.at, stamp });
        }
    }
    Ok(bytes.into())
}

/// Reads the file of an action result, which checks itself. Blocks.
pub(super) fn read_result_file(cas: &Cas, found: &Found) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(cas, found)?.read_to_end(&mut bytes).map_err(|error| failed(cas, found, &error))?;
    Ok(bytes)
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

pub(super) fn open(cas: &Cas, found: &Found) -> Result<File> {
    File::open(cas.shared().files.path(&found.file)).map_err(|error| failed(cas, found, &error))
}

/// What a failed read means: a file that is gone or cannot be read from its disk is a miss; everything else, such as too
/// many open files, says nothing about the blob.
fn failed(cas: &Cas, found: &Found, error: &io::Error) -> Error {
    let digest = found.file.key.digest;
    let medium = error.raw_os_error() == Some(libc::EIO);
    if medium || matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::UnexpectedEof) {
        return damaged(cas, found, error.to_string());
    }
    Error::io(&format!("read blob {digest}"), error)
}

fn damaged(cas: &Cas, found: &Found, reason: String) -> Error {
    report(cas, found, reason);
    not_found(found.file.key.digest)
}

/// Tells the actor, which knows whether the file was merely evicted meanwhile.
pub(super) fn report(cas: &Cas, found: &Found, reason: String) {
    cas.actor().do_send(Damaged { at: found.at, reason });
}
