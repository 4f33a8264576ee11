//! [`Sink`], the file of an upload, and [`Inflow`], the decoding of its stream.
//!
//! A sink hashes exactly what it writes, so its hash always matches its file, and a broken upload can be resumed from
//! there. An inflow converts what the client sends to bytes of the blob. It belongs to one stream; a sink may outlive
//! it. Everything here blocks.

use crate::actors::cas::{
    uploads::decoders::DecoderRoom,
    volume::{Draft, Volume},
};
use bytes::Bytes;
use gorego_reapi::{
    compression::{Decoder, decode_all},
    digest::{Digest, Hasher},
    error::{Error, Result},
};
use std::io;

/// Blobs up to this size are decoded in memory, because hashing and writing them in one go is cheaper.
pub(crate) const WHOLE_BYTES: u64 = 1024 * 1024;

/// Bytes that are written and hashed together; they fit into the cache of a core.
const RUN_BYTES: usize = 256 * 1024;
/// Pieces that are written together; the kernel takes 1,024.
const RUN_PIECES: usize = 512;

/// The bytes of a blob as a client sends them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Payload {
    /// The content as it is, not compressed.
    Plain(Bytes),
    /// As a zstd stream.
    Zstd(Bytes),
}

impl From<Bytes> for Payload {
    fn from(bytes: Bytes) -> Self {
        Self::Plain(bytes)
    }
}

/// Converts the bytes of a stream to bytes of its blob.
#[derive(Debug)]
pub enum Inflow {
    /// The stream is the blob itself.
    Plain,
    /// A zstd stream. The decoder is made by [`Inflow::begin`], or with the first bytes if it needs no reserved memory.
    Zstd(Option<Box<Decoder>>),
}

impl Inflow {
    /// Makes the decoder of a compressed stream within reserved memory. `left` bytes of the blob are missing.
    ///
    /// # Errors
    /// `Internal` when there is no memory for it.
    pub fn begin(&mut self, left: u64, room: DecoderRoom) -> Result<()> {
        if let Self::Zstd(decoder) = self {
            *decoder = Some(Box::new(Decoder::new(left)?.within(room)));
        }
        Ok(())
    }

    /// Decodes the next bytes of the stream and passes the bytes of the blob to `put`. `left` bytes of the blob are
    /// missing.
    ///
    /// # Errors
    /// `Invalid` when they are not zstd, or yield more than `left` bytes (BS-26); the errors of `put`.
    pub fn take(&mut self, wire: &[u8], left: u64, mut put: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let decoder = match self {
            Self::Plain => return put(wire),
            Self::Zstd(Some(decoder)) => decoder,
            Self::Zstd(none) => none.insert(Box::new(Decoder::new(left)?)),
        };
        decoder.decode(wire, put)
    }

    /// Checks that the stream may end here.
    ///
    /// # Errors
    /// `Invalid` in the middle of a frame (BS-26).
    pub fn finish(&self) -> Result<()> {
        match self {
            Self::Zstd(Some(decoder)) => decoder.finish(),
            Self::Plain | Self::Zstd(None) => Ok(()),
        }
    }

    /// Decodes a small blob from its whole stream.
    ///
    /// # Errors
    /// The errors of [`Inflow::take`] and [`Inflow::finish`].
    pub fn whole(&mut self, wire: &[Bytes], size: u64) -> Result<Vec<Bytes>> {
        if matches!(self, Self::Plain) {
            return Ok(wire.to_vec());
        }
        let mut bytes = Vec::with_capacity(usize::try_from(size.min(WHOLE_BYTES)).unwrap_or_default());
        for wire in wire {
            self.take(wire, size, |piece| {
                bytes.extend_from_slice(piece);
                Ok(())
            })?;
        }
        self.finish()?;
        Ok(vec![bytes.into()])
    }
}

/// The file of an upload, and the hash of what is in it.
#[derive(Debug)]
pub struct Sink {
    pub(crate) file: Box<dyn Draft>,
    /// The hash of exactly the bytes in the file.
    pub hasher: Hasher,
}

impl Sink {
    /// An empty sink for a blob.
    ///
    /// # Errors
    /// The errors of the volume.
    pub(crate) fn create(volume: &dyn Volume, blob: Digest) -> io::Result<Self> {
        Ok(Self { file: volume.draft()?, hasher: blob.hasher() })
    }

    /// Writes the next bytes of a stream. `make_room` is called with the total size before each write.
    ///
    /// # Errors
    /// The errors of [`Inflow::take`] and `make_room`; `DiskFull` or `Internal` when they cannot be written.
    pub fn take(
        &mut self,
        wire: &[u8],
        inflow: &mut Inflow,
        blob: Digest,
        mut make_room: impl FnMut(u64) -> Result<()>,
    ) -> Result<()> {
        let Self { file, hasher } = self;
        let left = blob.size().saturating_sub(hasher.size());
        inflow.take(wire, left, |piece| {
            make_room(hasher.size().saturating_add(piece.len() as u64))?;
            file.write(piece).map_err(|error| failed(blob, &error))?;
            hasher.update(piece);
            Ok(())
        })
    }

    /// Writes the next bytes of an uncompressed stream, for which there is room. Pieces are written together and then
    /// hashed, in runs that stay in the processor's cache between the two.
    ///
    /// # Errors
    /// `DiskFull` or `Internal` when they cannot be written.
    pub fn append(&mut self, pieces: &[Bytes], blob: Digest) -> Result<()> {
        let mut rest = pieces;
        while !rest.is_empty() {
            let (run, after) = rest.split_at(run_length(rest));
            self.file.write_pieces(run).map_err(|error| failed(blob, &error))?;
            run.iter().for_each(|piece| self.hasher.update(piece));
            rest = after;
        }
        Ok(())
    }

    /// Returns the file if it holds the blob; otherwise the file is deleted.
    ///
    /// # Errors
    /// `Invalid` when it holds something else (BS-22).
    pub(crate) fn checked(self, blob: Digest) -> Result<Box<dyn Draft>> {
        let actual = self.hasher.finish();
        if actual != blob {
            return Err(hash_mismatch(blob, actual));
        }
        Ok(self.file)
    }
}

/// How many of these pieces are written at once: at least one, and no more than [`RUN_BYTES`] and [`RUN_PIECES`].
fn run_length(pieces: &[Bytes]) -> usize {
    let mut bytes = 0usize;
    let fits = |piece: &&Bytes| {
        bytes = bytes.saturating_add(piece.len());
        bytes <= RUN_BYTES
    };
    pieces.iter().take(RUN_PIECES).take_while(fits).count().max(1)
}

/// Checks that these bytes are this blob.
///
/// # Errors
/// `Invalid` if they are not (CAS-11, BS-22).
pub(crate) fn check_bytes(blob: Digest, bytes: &[u8]) -> Result<()> {
    let actual = blob.function().digest(bytes);
    if actual == blob { Ok(()) } else { Err(hash_mismatch(blob, actual)) }
}

/// Decodes a small item of a batch and checks its hash.
///
/// # Errors
/// `Invalid` when the bytes are not the blob (CAS-11, CAS-14).
pub(crate) fn check_item(blob: Digest, payload: &Payload) -> Result<Bytes> {
    let bytes = match payload {
        Payload::Plain(bytes) => bytes.clone(),
        Payload::Zstd(stream) => decode_all(stream, blob.size())?.into(),
    };
    check_bytes(blob, &bytes)?;
    Ok(bytes)
}

/// Decodes and hashes a compressed item that is already stored, without keeping its bytes.
///
/// # Errors
/// The errors of [`check_item`].
pub(crate) fn check_stream(blob: Digest, stream: &[u8]) -> Result<()> {
    let (mut inflow, mut hasher) = (Inflow::Zstd(None), blob.hasher());
    inflow.take(stream, blob.size(), |piece| {
        hasher.update(piece);
        Ok(())
    })?;
    inflow.finish()?;
    let actual = hasher.finish();
    if actual == blob { Ok(()) } else { Err(hash_mismatch(blob, actual)) }
}

/// The error for a write to the store that failed.
pub(crate) fn failed(blob: Digest, error: &io::Error) -> Error {
    Error::io(&format!("store blob {blob}"), error)
}

/// The error for uploaded bytes that do not match their digest.
pub(in crate::actors::cas) fn hash_mismatch(digest: Digest, actual: Digest) -> Error {
    Error::Invalid(format!("the bytes sent for blob {digest} have the digest {actual}; nothing was stored"))
}
