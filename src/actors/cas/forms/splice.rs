//! Splices a blob from stored chunks (CAS-35 to CAS-38).
//!
//! The chunks are held, and written by the writer of uploads. It hashes them, and the blob becomes visible only if all
//! bytes together match its digest. The bytes are also cut by a chunking function. If the client has cut the same
//! chunks, the recipe is cached and a later split costs nothing.
//!
//! Bounds: [`SPLICE_MAX_CHUNKS`] per blob, one splice per blob at a time. Splits and splices share one bound on their
//! total. At most [`READ_BYTES`] are read ahead of the writer.

use crate::actors::cas::{
    blob::BlobReader,
    client::Cas,
    forms::chunks::{Chunks, Right},
    guards::Hold,
    index::FoundEntry,
    lookup::Purpose,
    uploads::{begin::Upload, writer::BlobWriter},
    volume::PIECE_BYTES,
};
use crate::instance::Instance;
use bytes::Bytes;
use gorego_reapi::{
    chunking::{Chunking, Splitter},
    digest::Digest,
    error::{Error, Result},
};
use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

/// Maximum number of chunks of one blob. At the average chunk size that this server advertises, this is a blob of 50
/// GB. A request has room for more only if its digests are short.
pub(crate) const SPLICE_MAX_CHUNKS: usize = 100_000;
/// Bytes that one job reads and cuts, while the writer is busy with the previous bytes.
const READ_BYTES: usize = 2 * 1024 * 1024;

impl Cas {
    /// Makes a blob of chunks, in this order. A chunk may occur more than once. If the blob is already stored, it and
    /// the chunks are renewed (CAS-38). `chunking` is the function whose cuts are compared with the chunks.
    ///
    /// # Errors
    /// `Invalid` when the chunks do not make the blob (CAS-35); `NotFound` when some are not stored (CAS-36);
    /// `Exhausted` when there is no room.
    pub async fn splice(
        &self,
        instance: &Instance,
        blob: Digest,
        chunks: Vec<Digest>,
        chunking: Chunking,
    ) -> Result<()> {
        self.check_blob_size(blob.size(), blob)?;
        check_list(blob, &chunks)?;
        let work = &self.shared().chunk_work;
        let mut right = work.begin_or_wait(instance, blob, self.caller()).await?;
        let right = loop {
            if self.are_sound(instance, vec![blob]).await? {
                return self.find_missing(instance, &chunks).await.map(drop);
            }
            match right {
                Some(right) => break Arc::new(right),
                None => right = Some(work.begin(instance, blob, self.caller()).await?),
            }
        };
        let (found, _holds) = self.hold_chunks(instance, &chunks).await?;
        let name = format!("splice/{blob}");
        let mut writer = match self.begin_upload(instance, &name, blob, 0).await? {
            Upload::Present => return Ok(()),
            Upload::Writer(writer) => writer.unresumable(),
        };
        let chunks: Chunks = chunks.into();
        let source = Concatenation {
            cas: self.clone(),
            found,
            cuts: Cuts::expected(chunking, &chunks),
            chunks: chunks.clone(),
            next: 0,
            open: None,
        };
        let cuts = self.write_chunks(source, &mut writer, &right).await?;
        writer.finish().await?;
        if cuts.is_some_and(Cuts::hold) {
            work.remember(instance, blob, chunking, chunks);
        }
        Ok(())
    }

    /// Writes all chunks. The next chunks are read while earlier ones are written.
    async fn write_chunks(
        &self,
        mut source: Concatenation,
        writer: &mut BlobWriter,
        right: &Arc<Right>,
    ) -> Result<Option<Cuts>> {
        let mut pieces = Vec::new();
        loop {
            let read = self.blocking_with(right.clone(), move || source.read());
            let write = async {
                for piece in pieces {
                    writer.write(piece).await?;
                }
                Ok::<(), Error>(())
            };
            let (read, written) = tokio::join!(read, write);
            written?;
            (source, pieces) = read?.0?;
            if pieces.is_empty() {
                return Ok(source.cuts);
            }
        }
    }

    /// Locates the chunks and holds all of them.
    async fn hold_chunks(
        &self,
        instance: &Instance,
        chunks: &[Digest],
    ) -> Result<(HashMap<Digest, FoundEntry>, Hold)> {
        let distinct: HashSet<Digest> = chunks.iter().filter(|chunk| !chunk.is_empty()).copied().collect();
        let distinct: Vec<Digest> = distinct.into_iter().collect();
        let mut found = HashMap::with_capacity(distinct.len());
        let mut missing = Vec::new();
        let located = self.locate(instance, &distinct, Purpose::Read).await?;
        for (digest, place) in distinct.iter().zip(located.found) {
            match place {
                Some(place) => drop(found.insert(*digest, place)),
                None => missing.push(*digest),
            }
        }
        if missing.is_empty() { Ok((found, located.hold)) } else { Err(Error::missing_chunks(&missing)) }
    }
}

/// Checks a list of chunks without looking them up.
fn check_list(blob: Digest, chunks: &[Digest]) -> Result<()> {
    if chunks.len() > SPLICE_MAX_CHUNKS {
        let count = chunks.len();
        return Err(Error::Invalid(format!(
            "chunk_digests has {count} entries; a blob is made of at most {SPLICE_MAX_CHUNKS}"
        )));
    }
    if let Some(other) = chunks.iter().find(|chunk| chunk.function() != blob.function()) {
        return Err(Error::Invalid(format!(
            "chunk {other} is of digest function {}, blob {blob} of {}",
            other.function().name(),
            blob.function().name()
        )));
    }
    let sum = chunks.iter().try_fold(0u64, |sum, chunk| sum.checked_add(chunk.size()));
    if sum != Some(blob.size()) {
        let sum = sum.map_or("more than 2^64".to_owned(), |sum| sum.to_string());
        return Err(Error::Invalid(format!(
            "the chunks have {sum} bytes in total and cannot make blob {blob}; nothing was stored"
        )));
    }
    Ok(())
}

/// Chunks that are read in order to make one blob. Its methods block.
struct Concatenation {
    cas: Cas,
    found: HashMap<Digest, FoundEntry>,
    cuts: Option<Cuts>,
    chunks: Chunks,
    next: usize,
    /// The chunk that is being read, and the position in it.
    open: Option<(BlobReader, u64)>,
}

impl Concatenation {
    /// Reads the next bytes, or none at the end. Returns `self` for the next call.
    fn read(mut self) -> Result<(Self, Vec<Bytes>)> {
        let (mut pieces, mut bytes) = (Vec::new(), 0);
        while bytes < READ_BYTES {
            let Some((reader, at)) = &mut self.open else {
                let Some(&chunk) = self.chunks.get(self.next) else { break };
                self.next += 1;
                // Only the empty chunk has no entry.
                if let Some(&found) = self.found.get(&chunk) {
                    // The caller holds the chunk.
                    let hold = Hold::none(self.cas.clone());
                    self.open = Some((BlobReader::open(self.cas.clone(), found, Arc::new(hold))?, 0));
                }
                continue;
            };
            let left = usize::try_from(reader.size() - *at).unwrap_or(usize::MAX);
            let mut piece = vec![0; left.min(PIECE_BYTES)];
            let read = reader.read_into(&mut piece, *at)?;
            piece.truncate(read);
            *at += read as u64;
            if *at == reader.size() {
                self.open = None;
            }
            bytes += read;
            self.cuts = self.cuts.take().and_then(|cuts| cuts.pass(&piece));
            pieces.push(piece.into());
        }
        Ok((self, pieces))
    }
}

/// Compares a client's chunks with those of a chunking function. It is dropped at the first difference.
struct Cuts {
    splitter: Splitter,
    chunks: Chunks,
    next: usize,
}

impl Cuts {
    /// `None` when the sizes alone show a difference.
    fn expected(chunking: Chunking, chunks: &Chunks) -> Option<Self> {
        let sizes = chunking.chunk_sizes();
        let (last, others) = chunks.split_last()?;
        let fit = others.iter().all(|chunk| sizes.contains(&chunk.size()))
            && (1..=*sizes.end()).contains(&last.size());
        fit.then(|| Self { splitter: Splitter::new(chunking), chunks: chunks.clone(), next: 0 })
    }

    /// Cuts the next bytes of the blob. Returns `None` at a difference.
    fn pass(mut self, bytes: &[u8]) -> Option<Self> {
        self.splitter.push(bytes);
        self.compare().then_some(self)
    }

    fn compare(&mut self) -> bool {
        while let Some(chunk) = self.splitter.next_chunk() {
            if self.chunks.get(self.next).is_none_or(|expected| expected.size() != chunk.len() as u64) {
                return false;
            }
            self.next += 1;
        }
        true
    }

    /// Whether all cuts are equal; called after the last bytes.
    fn hold(mut self) -> bool {
        self.splitter.end();
        self.compare() && self.next == self.chunks.len()
    }
}
