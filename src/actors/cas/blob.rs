//! [`BlobReader`]: reads a stored blob past the mailbox. [`super::checked`] opens and verifies its file.

use super::{
    checked::{CheckedFile, not_found, open_to_read, read_whole, report},
    client::Cas,
    guards::Hold,
    index::FoundEntry,
    lookup::Purpose,
    settings::SMALL_BLOB_BYTES,
    volume::PIECE_BYTES,
};
use crate::instance::Instance;
use bytes::Bytes;
use gorego_reapi::{
    compression::SeekTable,
    digest::Digest,
    error::{Error, Result},
};
use std::{io, sync::Arc};

/// Number of bytes that one job reads in [`Cas::read_through`]. When the caller leaves, the thread is busy for no
/// longer than this takes.
const READ_THROUGH_BYTES: u64 = 8 * 1024 * 1024;

/// A stored blob, open for reading. It was checked against its digest when it was opened, and stays readable while this
/// is held, even if it is evicted.
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

    /// Reads up to `max` bytes from `offset`; the result is empty only at the end of the blob. Does not block the
    /// caller's thread: bytes in the page cache are read at once, others on a blocking thread.
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
        let memory = open.cas.memory_to_read(wanted as u64).await?;
        let runtime = open.cas.shared().runtime.clone();
        let read = runtime.spawn_blocking(move || {
            let _memory = memory;
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

    /// Reads from `offset` up to the end of the blob or of the buffer. Reads at least one byte, unless either is at its
    /// end. Blocks.
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
    /// Opens a blob.
    ///
    /// # Errors
    /// `NotFound` when it is not stored. A damaged file counts as not stored, and its entry is dropped.
    pub async fn open(&self, instance: &Instance, digest: Digest) -> Result<BlobReader> {
        let mut located = self.locate(instance, &[digest], Purpose::Read).await?;
        let Some(found) = located.found.pop().flatten() else {
            return if digest.is_empty() {
                Ok(BlobReader::whole(Bytes::new()))
            } else {
                Err(not_found(digest))
            };
        };
        if let Some(bytes) = self.shared().recent.get(&(instance.blobs(), digest)) {
            return Ok(BlobReader::whole(bytes));
        }
        let place = self.place_to_hash([&found]).await?;
        let cas = self.clone();
        self.blocking(move || {
            let _place = place;
            BlobReader::open(cas, found, Arc::new(located.hold))
        })
        .await?
    }

    /// Passes all bytes of a blob to `see`, in pieces, on a blocking thread. Waits for a place among the blobs that are
    /// being hashed.
    ///
    /// # Errors
    /// The errors of [`BlobReader::read_at`].
    pub async fn read_through<T: Send + 'static>(
        &self,
        blob: BlobReader,
        mut state: T,
        see: fn(&mut T, &[u8]),
    ) -> Result<T> {
        let mut place = self.shared().cold_reads.wait_for(self.caller(), 1).await?;
        let (blob, mut at) = (Arc::new(blob), 0);
        while at < blob.size() {
            let (blob, end) = (blob.clone(), at.saturating_add(READ_THROUGH_BYTES).min(blob.size()));
            let reading = self.blocking_with(place, move || {
                let mut piece = vec![0; PIECE_BYTES];
                while at < end {
                    let read = blob.read_into(&mut piece, at)?;
                    see(&mut state, piece.get(..read).unwrap_or_default());
                    at += read as u64;
                }
                Ok::<_, Error>((state, at))
            });
            let read;
            (read, place) = reading.await?;
            (state, at) = read?;
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
