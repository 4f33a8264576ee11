//! Packed files: blobs that are kept compressed.
//!
//! ```text
//! frames      zstd frames, each with CHUNK_BYTES of the blob; the last one may have less
//! checksums   a skippable frame: magic 4, bytes of the rest 4, "gorego packed 1 FUNCTION\n", hash of the blob,
//!             CRC-32C of each frame 4, CRC-32C of all that, the magic included, and of the table 4
//! table       a skippable frame: the `SeekTable` of zstd's seekable format
//! ```
//!
//! Any tool for zstd can read a packed file. Every read checks the CRC-32C of the frames that it needs, so damaged
//! bytes are an error of the kind `InvalidData` and never content. The hash identifies the blob of the file, so that
//! swapped files are noticed as well.
//!
//! A read at an offset decodes only the frames that it needs. An open file keeps at most one frame in memory, and only
//! if a read has used a part of it. All open files together keep at most [`KEPT_BYTES_MAX`].

use super::{
    Draft, Frames, Look, Stored, WrittenFile, read_exact,
    stored::{StoredFile, copy_in_pieces},
};
use crate::actors::cas::index::Key;
use gorego_reapi::{
    compression::{CHUNK_BYTES, FrameDecoder, SeekTable},
    digest::Digest,
};
use std::{
    fs::File,
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

/// The magic number of the frame of the checksums. Decoders skip such a frame.
const CHECKSUMS_MAGIC: u32 = 0x184D_2A5D;
/// Bytes of a skippable frame before its content.
const SKIPPABLE_HEAD_BYTES: usize = 8;
const CHECKSUM_BYTES: usize = 4;
/// The largest frame. A frame of incompressible bytes is slightly larger than its content.
const MAX_FRAME_BYTES: u64 = CHUNK_BYTES as u64 + 1_024;

/// A packed file that is being written.
#[derive(Debug)]
pub(crate) struct Packing {
    draft: Box<dyn Draft>,
    key: Key,
    table: SeekTable,
    checksums: Vec<u32>,
}

impl Packing {
    /// Begins the packed file of a blob. The draft comes from [`super::Volume::packed_draft`].
    pub(crate) fn new(draft: Box<dyn Draft>, key: Key) -> Self {
        Self { draft, key, table: SeekTable::default(), checksums: Vec::new() }
    }

    /// Appends the frame of the next `plain` bytes of the blob.
    pub(crate) fn push(&mut self, plain: usize, frame: &[u8]) -> io::Result<()> {
        self.draft.write(frame)?;
        self.table.push(plain as u64, frame.len() as u64).map_err(io::Error::other)?;
        self.checksums.push(crc32c::crc32c(frame));
        Ok(())
    }

    /// The length of the file with another frame of `more` bytes.
    pub(crate) fn length_with(&self, more: usize) -> u64 {
        let end = end_bytes(self.key.digest, self.table.count() + 1);
        self.table.sizes().1 + more as u64 + end as u64
    }

    /// Completes the file. The caller has verified that its frames make the blob.
    pub(crate) fn finish(self) -> io::Result<WrittenFile> {
        let Self { mut draft, key, table, checksums } = self;
        draft.write(&encode_end(key.digest, &table, &checksums))?;
        draft.keep(key)
    }
}

/// The start of the content of the frame with the checksums.
fn head_of(digest: Digest) -> Vec<u8> {
    let mut head = format!("gorego packed 1 {}\n", digest.function().name()).into_bytes();
    head.extend_from_slice(digest.hash());
    head
}

/// The length of the frame with the checksums.
fn checksums_bytes(digest: Digest, frames: usize) -> usize {
    SKIPPABLE_HEAD_BYTES + head_of(digest).len() + (frames + 1) * CHECKSUM_BYTES
}

/// The length of everything after the frames of the blob.
fn end_bytes(digest: Digest, frames: usize) -> usize {
    checksums_bytes(digest, frames) + SeekTable::length_for(frames)
}

fn encode_end(digest: Digest, table: &SeekTable, checksums: &[u32]) -> Vec<u8> {
    let length = checksums_bytes(digest, checksums.len());
    let mut end = Vec::with_capacity(end_bytes(digest, checksums.len()));
    end.extend_from_slice(&CHECKSUMS_MAGIC.to_le_bytes());
    end.extend_from_slice(&((length - SKIPPABLE_HEAD_BYTES) as u32).to_le_bytes());
    end.extend_from_slice(&head_of(digest));
    checksums.iter().for_each(|checksum| end.extend_from_slice(&checksum.to_le_bytes()));
    let table = table.encode();
    let checksum = crc32c::crc32c_append(crc32c::crc32c(&end), &table);
    end.extend_from_slice(&checksum.to_le_bytes());
    end.extend_from_slice(&table);
    end
}

/// Decodes the table and the checksums at the end of the packed file of a blob; `None` if `end` is not the end of such
/// a file.
fn decode_end(digest: Digest, frames: usize, end: &[u8]) -> Option<(SeekTable, Vec<u32>)> {
    let (checksums, table) = end.split_at_checked(checksums_bytes(digest, frames))?;
    let (checked, checksum) = checksums.split_last_chunk::<CHECKSUM_BYTES>()?;
    if crc32c::crc32c_append(crc32c::crc32c(checked), table) != u32::from_le_bytes(*checksum) {
        return None;
    }
    let listed = checked.get(SKIPPABLE_HEAD_BYTES..)?.strip_prefix(&*head_of(digest))?;
    let checksums = listed
        .chunks_exact(CHECKSUM_BYTES)
        .filter_map(|bytes| Some(u32::from_le_bytes(*bytes.first_chunk()?)));
    let (table, checksums) = (SeekTable::decode(table)?, checksums.collect::<Vec<_>>());
    let chunk = CHUNK_BYTES as u64;
    let fits = |(number, (plain, packed)): (usize, (u64, u64))| {
        plain == chunk.min(digest.size() - number as u64 * chunk) && packed <= MAX_FRAME_BYTES
    };
    let is_whole =
        table.count() == frames && checksums.len() == frames && table.frames().enumerate().all(fits);
    is_whole.then_some((table, checksums))
}

/// Maximum number of bytes of frames that all open files keep for their next reads. Beyond it, a frame of which a read
/// uses only a part is read and decoded again for the next one.
const KEPT_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Decoders of frames that are kept for later reads. There are at most as many as have worked at the same time.
#[derive(Debug, Default)]
pub(super) struct FrameDecoders {
    idle: Mutex<Vec<FrameDecoder>>,
    /// Bytes of frames that open files keep.
    kept_bytes: AtomicUsize,
}

impl FrameDecoders {
    fn decode(&self, frame: &[u8], plain: usize) -> io::Result<Vec<u8>> {
        let idle = || self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = idle().pop();
        let mut decoder = kept.map_or_else(FrameDecoder::new, Ok).map_err(io::Error::other)?;
        let decoded = decoder.decode(frame, plain);
        idle().push(decoder);
        decoded.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))
    }

    /// Keeps a part of a file for the next read, unless the parts of all files would exceed [`KEPT_BYTES_MAX`].
    fn keep(self: &Arc<Self>, part: FramePart, bytes: Vec<u8>) -> Option<KeptPart> {
        let grown =
            |kept: usize| Some(kept.saturating_add(bytes.len())).filter(|kept| *kept <= KEPT_BYTES_MAX);
        self.kept_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, grown).ok()?;
        Some(KeptPart { part, bytes, counted_by: self.clone() })
    }
}

/// A part of a file that is kept for the next read.
#[derive(Debug)]
struct KeptPart {
    part: FramePart,
    bytes: Vec<u8>,
    counted_by: Arc<FrameDecoders>,
}

impl Drop for KeptPart {
    fn drop(&mut self) {
        self.counted_by.kept_bytes.fetch_sub(self.bytes.len(), Ordering::Relaxed);
    }
}

/// A packed file, open for reading as the content of its blob or as frames.
#[derive(Debug)]
pub(super) struct PackedFile {
    file: StoredFile,
    table: SeekTable,
    /// The CRC-32C of each frame.
    checksums: Vec<u32>,
    decoders: Arc<FrameDecoders>,
    /// The rest of the last frame of which a read has used a part.
    rest: Mutex<Option<KeptPart>>,
}

/// A frame, by its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FramePart {
    /// The decoded content of the frame.
    Plain(usize),
    /// The frame as it is in the file.
    Frame(usize),
}

impl PackedFile {
    /// Reads the end of a packed file.
    ///
    /// # Errors
    /// `InvalidData` when it is not the packed file of this blob.
    pub(super) fn open(file: StoredFile, digest: Digest, decoders: Arc<FrameDecoders>) -> io::Result<Self> {
        let frames = digest.size().div_ceil(CHUNK_BYTES as u64);
        let frames = usize::try_from(frames).map_err(io::Error::other)?;
        let length = end_bytes(digest, frames);
        let begin = file.look()?.size.checked_sub(length as u64).ok_or_else(damaged)?;
        let mut end = vec![0; length];
        read_exact(&file, &mut end, begin)?;
        let (table, checksums) = decode_end(digest, frames, &end).ok_or_else(damaged)?;
        if table.sizes() != (digest.size(), begin) {
            return Err(damaged());
        }
        Ok(Self { file, table, checksums, decoders, rest: Mutex::default() })
    }

    fn rest(&self) -> MutexGuard<'_, Option<KeptPart>> {
        self.rest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Copies the bytes of a part from `start` on. If some are left, the part is kept for the next read.
    fn copy(&self, part: FramePart, start: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let start = usize::try_from(start).map_err(io::Error::other)?;
        let copy = |bytes: &[u8], buffer: &mut [u8]| {
            let wanted = bytes.get(start..).unwrap_or_default();
            let length = wanted.len().min(buffer.len());
            buffer[..length].copy_from_slice(&wanted[..length]);
            (length, length < wanted.len())
        };
        // The lock is not held while a part is read.
        let kept = self.rest().take();
        let (length, rest) = match kept.filter(|kept| kept.part == part) {
            Some(kept) => {
                let (length, has_more) = copy(&kept.bytes, buffer);
                (length, has_more.then_some(kept))
            }
            None => {
                let bytes = self.read(part)?;
                let (length, has_more) = copy(&bytes, buffer);
                (length, if has_more { self.decoders.keep(part, bytes) } else { None })
            }
        };
        if rest.is_some() {
            *self.rest() = rest;
        }
        Ok(length)
    }

    fn read(&self, part: FramePart) -> io::Result<Vec<u8>> {
        let (FramePart::Plain(number) | FramePart::Frame(number)) = part;
        let (plain, packed) = self.table.frame(number).ok_or_else(damaged)?;
        let mut frame = vec![0; usize::try_from(packed.end - packed.start).map_err(io::Error::other)?];
        read_exact(&self.file, &mut frame, packed.start)?;
        if self.checksums.get(number) != Some(&crc32c::crc32c(&frame)) {
            return Err(damaged());
        }
        match part {
            FramePart::Frame(_) => Ok(frame),
            FramePart::Plain(_) => {
                let plain = usize::try_from(plain.end - plain.start).map_err(io::Error::other)?;
                self.decoders.decode(&frame, plain)
            }
        }
    }

    /// The part that contains the byte at `offset` of the blob, and the position of this byte in the part.
    fn plain_part(&self, offset: u64) -> Option<(FramePart, u64)> {
        let number = self.table.holding(offset)?;
        Some((FramePart::Plain(number), offset - self.table.frame(number)?.0.start))
    }

    /// Like [`Self::plain_part`], for an offset in the frames.
    fn frame_part(&self, offset: u64) -> Option<(FramePart, u64)> {
        let number = self.table.covering(offset)?;
        Some((FramePart::Frame(number), offset - self.table.frame(number)?.1.start))
    }
}

impl Stored for PackedFile {
    /// The size is the size of the content.
    fn look(&self) -> io::Result<Look> {
        Ok(Look { size: self.table.sizes().0, ..self.file.look()? })
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.plain_part(offset).map_or(Ok(0), |(part, start)| self.copy(part, start, buffer))
    }

    /// Only bytes that an earlier read has decoded are available.
    fn read_cached(&self, buffer: &mut Vec<u8>, offset: u64) -> io::Result<usize> {
        let (part, start) = self.plain_part(offset).ok_or(io::ErrorKind::UnexpectedEof)?;
        let mut rest = self.rest.try_lock().map_err(|_| io::ErrorKind::WouldBlock)?;
        let Some(kept) = rest.as_ref().filter(|kept| kept.part == part) else {
            return Err(io::ErrorKind::WouldBlock.into());
        };
        let wanted = kept.bytes.get(usize::try_from(start).map_err(io::Error::other)?..).unwrap_or_default();
        let length = wanted.len().min(buffer.capacity() - buffer.len());
        buffer.extend_from_slice(&wanted[..length]);
        if length == wanted.len() {
            *rest = None;
        }
        Ok(length)
    }

    fn nobody_writes(&self) -> bool {
        self.file.nobody_writes()
    }

    fn copy_to(&self, to: &File, size: u64) -> io::Result<()> {
        copy_in_pieces(self, to, size)
    }

    fn frames(&self) -> Option<&dyn Frames> {
        Some(self)
    }
}

impl Frames for PackedFile {
    fn table(&self) -> &SeekTable {
        &self.table
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.frame_part(offset).map_or(Ok(0), |(part, start)| self.copy(part, start, buffer))
    }
}

/// The error for a packed file that has changed since it was written.
fn damaged() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the compressed file of the blob is damaged")
}

#[cfg(test)]
mod tests;
