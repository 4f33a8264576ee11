//! Splicing: a blob made of stored chunks (CAS-35 to CAS-38).
//!
//! The chunks are leased, and go through the same writer as an upload: hashed while they are written, visible only when the
//! whole is the blob that was announced. As the bytes pass, they are also cut by a chunking function; where its chunks
//! are those of the client, the recipe is remembered and a later split costs nothing.
//!
//! Bounds: [`SPLICE_MAX_CHUNKS`] a blob, one splice of a blob at a time, as many of all blobs as of splits; what is read
//! ahead of the writer is [`READ_BYTES`].

use crate::actors::cas::{
    blob::BlobReader,
    client::{Cas, Upload},
    forms::chunks::Chunks,
    guards::Lease,
    index::Found,
    lookup::Purpose,
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

/// Chunks that one blob may be made of. At the average that this server advertises that is a blob of 50 GB; a request has
/// room for more only where digests are short.
pub const SPLICE_MAX_CHUNKS: usize = 100_000;
/// What is read, and looked at for cuts, in one job, while the writer is busy with what was read before.
const READ_BYTES: usize = 2 * 1024 * 1024;

impl Cas {
    /// Makes a blob of chunks, in this order, each as often as it is named. A blob that is stored already stays as it is, and
    /// it and the chunks are renewed (CAS-38). `chunking` is the function to try the cuts against.
    ///
    /// # Errors
    /// `Invalid` when the chunks are not the blob (CAS-35); `NotFound` when some are not stored (CAS-36); `Exhausted` when
    /// there is no room.
    pub async fn splice(
        &self,
        instance: &Instance,
        blob: Digest,
        chunks: Vec<Digest>,
        chunking: Chunking,
    ) -> Result<()> {
        self.check_blob_size(blob.size(), &blob.to_string())?;
        check_list(blob, &chunks)?;
        let work = &self.shared().chunk_work;
        let mut right = work.begin_or_wait(instance, blob, self.caller()).await?;
        let _right = loop {
            if self.are_sound(instance, vec![blob]).await? {
                return self.find_missing(instance, &chunks).await.map(drop);
            }
            match right {
                Some(right) => break right,
                None => right = Some(work.begin(instance, blob, self.caller()).await?),
            }
        };
        let (found, _leases) = self.lease_chunks(instance, &chunks).await?;
        let name = format!("splice/{blob}");
        let mut writer = match self.begin_upload(instance, &name, blob, 0).await? {
            Upload::Present => return Ok(()),
            Upload::Writer(writer) => writer.unresumable(),
        };
        let chunks: Chunks = chunks.into();
        let mut source = Concatenation {
            cas: self.clone(),
            found,
            cuts: Cuts::expected(chunking, &chunks),
            chunks: chunks.clone(),
            next: 0,
            open: None,
        };
        let mut pieces = Vec::new();
        loop {
            let read = self.blocking(move || source.read());
            let write = async {
                for piece in pieces {
                    writer.write(piece).await?;
                }
                Ok::<(), Error>(())
            };
            let (read, written) = tokio::join!(read, write);
            written?;
            (source, pieces) = read??;
            if pieces.is_empty() {
                break;
            }
        }
        writer.finish().await?;
        if source.cuts.is_some_and(Cuts::hold) {
            work.remember(instance, blob, chunking, chunks);
        }
        Ok(())
    }

    /// Where the chunks are, with leases on all of them.
    async fn lease_chunks(
        &self,
        instance: &Instance,
        chunks: &[Digest],
    ) -> Result<(HashMap<Digest, Found>, Lease)> {
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
        if missing.is_empty() { Ok((found, located.lease)) } else { Err(Error::missing_chunks(&missing)) }
    }
}

/// What can be known of a list of chunks without looking for them.
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
            "the chunks come to {sum} bytes, which cannot be blob {blob}; nothing was stored"
        )));
    }
    Ok(())
}

/// Chunks on their way into one blob; everything here blocks.
struct Concatenation {
    cas: Cas,
    found: HashMap<Digest, Found>,
    cuts: Option<Cuts>,
    chunks: Chunks,
    next: usize,
    /// The chunk that is being read, and how far.
    open: Option<(BlobReader, u64)>,
}

impl Concatenation {
    /// The next bytes, none at the end, and this again.
    fn read(mut self) -> Result<(Self, Vec<Bytes>)> {
        let (mut pieces, mut bytes) = (Vec::new(), 0);
        while bytes < READ_BYTES {
            let Some((reader, at)) = &mut self.open else {
                let Some(&chunk) = self.chunks.get(self.next) else { break };
                self.next += 1;
                // The empty chunk has no file; all others were found.
                if let Some(&found) = self.found.get(&chunk) {
                    // The caller holds the lease.
                    let lease = Lease::none(self.cas.clone());
                    self.open = Some((BlobReader::open(self.cas.clone(), found, Arc::new(lease))?, 0));
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

/// Whether a client's chunks are those that a chunking function makes; gone as soon as they are not.
struct Cuts {
    splitter: Splitter,
    chunks: Chunks,
    next: usize,
}

impl Cuts {
    /// `None` when the sizes alone say no.
    fn expected(chunking: Chunking, chunks: &Chunks) -> Option<Self> {
        let sizes = chunking.chunk_sizes();
        let (last, others) = chunks.split_last()?;
        let fit = others.iter().all(|chunk| sizes.contains(&chunk.size()))
            && (1..=*sizes.end()).contains(&last.size());
        fit.then(|| Self { splitter: Splitter::new(chunking), chunks: chunks.clone(), next: 0 })
    }

    /// Takes the next bytes of the blob.
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

    /// After the last bytes: whether all cuts are the same.
    fn hold(mut self) -> bool {
        self.splitter.end();
        self.compare() && self.next == self.chunks.len()
    }
}
