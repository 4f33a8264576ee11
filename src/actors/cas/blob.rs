//! Handles through which bytes go round the mailbox: one to read a stored blob, one to write a new one.

use crate::{digest::Digest, error::Result};
use bytes::Bytes;

/// A stored blob, open for reading; checked against its digest before it was handed out. It stays readable while this is
/// held, whatever the index decides.
#[derive(Debug)]
pub struct BlobReader {}

impl BlobReader {
    /// Size of the blob in bytes.
    pub fn size(&self) -> u64 {
        todo!()
    }

    /// Up to `max` bytes from `offset`; empty only at the end of the blob. Does not block the caller's thread: bytes in the
    /// page cache are taken at once, others on a blocking thread.
    ///
    /// # Errors
    /// `DataLoss` when the file turns out to be shorter than the blob.
    pub async fn read_at(&self, offset: u64, max: usize) -> Result<Bytes> {
        let _ = (offset, max);
        todo!()
    }
}

/// An upload in progress. Dropped before [`BlobWriter::finish`], the bytes so far are kept for a while under the upload's
/// name, so that the client can go on (BS-20), and are reclaimed after that.
#[derive(Debug)]
pub struct BlobWriter {}

impl BlobWriter {
    /// How many bytes have been accepted, those of resumed attempts included.
    pub fn committed(&self) -> u64 {
        todo!()
    }

    /// Takes the next bytes; hashing and writing happen on a blocking thread while the caller gets the next message, at
    /// most a few MiB behind.
    ///
    /// # Errors
    /// `Invalid` as soon as there are more bytes than the digest says (BS-22), `Exhausted` when the disk is full.
    pub async fn write(&mut self, bytes: Bytes) -> Result<()> {
        let _ = bytes;
        todo!()
    }

    /// Whether the blob has meanwhile been stored by somebody else (BS-24).
    pub fn is_superseded(&self) -> bool {
        todo!()
    }

    /// Checks length and hash and makes the blob visible.
    ///
    /// # Errors
    /// `Invalid` when the bytes are not the blob that was announced (BS-22); nothing is kept then.
    pub async fn finish(self) -> Result<Digest> {
        todo!()
    }
}
