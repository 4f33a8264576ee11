//! [`ZstdReader`]: a stored blob as a zstd stream from any offset. Also compresses small blobs for batch reads.
//!
//! The stream consists of independent frames that begin at multiples of [`CHUNK_BYTES`], except for the first, which
//! begins at the offset. So the stream can be decoded without earlier bytes (BS-12). Frames come from the blob's zstd
//! form if there is one. Otherwise they are made by jobs on blocking threads, one job ahead of the caller. At most one
//! encoder per CPU works at a time, and waiting readers take turns. An idle reader holds the output of two jobs, about
//! half a MiB.

use crate::actors::cas::{
    blob::BlobReader,
    checked::{not_found, read_whole},
    client::{Cas, going_down},
    forms::zstd_form::{Form, History},
    guards::Hold,
    index::FoundEntry,
    lookup::Purpose,
    settings::SMALL_BLOB_BYTES,
};
use crate::{budget::Share, instance::Instance};
use bytes::{Bytes, BytesMut};
use gorego_reapi::{
    compression::{CHUNK_BYTES, saves, stored_frame},
    digest::Digest,
    error::{Error, Result},
};
use std::sync::Arc;
use tokio::task::JoinHandle;

/// A job ends when it has made about this many bytes of the stream.
const JOB_OUTPUT_BYTES: usize = 128 * 1024;
/// A job also ends when it has compressed this many bytes of the blob.
const JOB_INPUT_BYTES: u64 = 4 * 1024 * 1024;
/// In batches, blobs below this size are sent uncompressed: the frame overhead outweighs the savings.
const WORTHWHILE_BYTES: u64 = 128;

/// A blob as a zstd stream; see the module documentation.
#[derive(Debug)]
pub struct ZstdReader {
    /// Bytes that are made and not returned yet.
    ready: BytesMut,
    /// Frames that are made while reading. They precede the frames of the form.
    making: Option<Making>,
    /// The frames of the form, and the position in them.
    form: Option<(BlobReader, u64)>,
}

/// A job that makes some frames. It returns what remains to be compressed, and the frames.
type FrameJob = JoinHandle<Result<(Part, Vec<u8>)>>;

/// Frames that are made while the stream is read.
#[derive(Debug)]
struct Making {
    cas: Cas,
    part: Part,
    job: Option<FrameJob>,
}

/// A part of a blob that is still to be compressed.
#[derive(Debug, Clone)]
struct Part {
    blob: Arc<BlobReader>,
    next: u64,
    end: u64,
    /// The blob is known not to get smaller.
    stored: bool,
}

/// An item of a batch read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    /// The uncompressed content of the blob.
    Plain(Bytes),
    /// A zstd stream of the blob, which is smaller.
    Zstd(Bytes),
}

impl ZstdReader {
    /// The next `piece` bytes of the stream, fewer only at the end; `None` after that.
    ///
    /// # Errors
    /// `DataLoss` when the blob turns out to be shorter than it should be.
    pub async fn next(&mut self, piece: usize) -> Result<Option<Bytes>> {
        while self.ready.len() < piece {
            if let Some(making) = &mut self.making {
                match making.next().await? {
                    Some(frames) => self.ready.extend_from_slice(&frames),
                    None => self.making = None,
                }
            } else if let Some((frames, at)) = &mut self.form {
                let bytes = frames.read_at(*at, piece - self.ready.len()).await?;
                if bytes.is_empty() {
                    self.form = None;
                    continue;
                }
                *at += bytes.len() as u64;
                if bytes.len() == piece {
                    return Ok(Some(bytes));
                }
                self.ready.extend_from_slice(&bytes);
            } else {
                let rest = std::mem::take(&mut self.ready);
                return Ok((!rest.is_empty()).then(|| rest.freeze()));
            }
        }
        Ok(Some(self.ready.split_to(piece).freeze()))
    }

    fn whole(stream: &[u8]) -> Self {
        Self { ready: BytesMut::from(stream), making: None, form: None }
    }
}

impl Making {
    async fn next(&mut self) -> Result<Option<Vec<u8>>> {
        let job = match self.job.take() {
            Some(job) => job,
            None if self.part.next < self.part.end => {
                let place = self.cas.shared().encoding.wait_for(self.cas.caller(), 1).await?;
                self.start(place)
            }
            None => return Ok(None),
        };
        let (part, frames) = job.await.map_err(|error| {
            if error.is_panic() { Error::internal("compression panicked") } else { going_down() }
        })??;
        self.part = part;
        if self.part.next < self.part.end
            && let Some(place) = self.cas.shared().encoding.take_unless_awaited(self.cas.caller(), 1)
        {
            self.job = Some(self.start(place));
        }
        Ok(Some(frames))
    }

    fn start(&self, place: Share) -> FrameJob {
        let (cas, mut part) = (self.cas.clone(), self.part.clone());
        self.cas.shared().runtime.spawn_blocking(move || {
            let _place = place;
            let frames = part.encode(&cas)?;
            Ok((part, frames))
        })
    }
}

impl Part {
    /// Makes the next frames. Blocks.
    fn encode(&mut self, cas: &Cas) -> Result<Vec<u8>> {
        let mut frames = Vec::new();
        let stop = self.next.saturating_add(JOB_INPUT_BYTES).min(self.end);
        while self.next < stop && frames.len() < JOB_OUTPUT_BYTES {
            let chunk = CHUNK_BYTES as u64;
            let chunk_end = (self.next / chunk + 1).saturating_mul(chunk).min(self.end);
            let plain = self.blob.read_exact(self.next, (chunk_end - self.next) as usize)?;
            if self.stored {
                stored_frame(&plain, &mut frames);
            } else {
                cas.shared().encoders.with(|encoder| encoder.frames(&plain, &mut frames))?;
            }
            self.next = chunk_end;
        }
        Ok(frames)
    }
}

impl Cas {
    /// Opens a blob as a zstd stream of its bytes from `offset` on (BS-12). At the end of the blob, the stream is one
    /// empty frame.
    ///
    /// # Errors
    /// `NotFound` when the blob is not stored. A damaged file counts as not stored, and its entry is dropped.
    pub async fn open_zstd(&self, instance: &Instance, digest: Digest, offset: u64) -> Result<ZstdReader> {
        if digest.size() <= SMALL_BLOB_BYTES {
            return self.open_small_zstd(instance, digest, offset).await;
        }
        let mut located = self.locate(instance, &[digest], Purpose::ReadZstd).await?;
        let (found, form) = (located.found.pop().flatten(), located.zstd.pop().flatten());
        let found = found.ok_or_else(|| not_found(digest))?;
        let hold = Arc::new(located.hold);
        let place = self.place_to_hash([&found].into_iter().chain(&form)).await?;
        let cas = self.clone();
        let open = move || {
            let _place = place;
            open_parts(&cas, found, form, hold, offset)
        };
        let opened = self.blocking(open).await??;
        let history = if opened.form.is_some() { None } else { self.note_zstd_read(instance, digest) };
        let making = opened.blob.map(|blob| {
            let stored = history == Some(History::Incompressible);
            let part = Part { blob: Arc::new(blob), next: offset, end: opened.form_from, stored };
            Making { cas: self.clone(), part, job: None }
        });
        let mut reader = ZstdReader { ready: BytesMut::new(), making, form: opened.form };
        if offset >= digest.size() {
            let mut empty = Vec::new();
            stored_frame(&[], &mut empty);
            reader = ZstdReader::whole(&empty);
        }
        Ok(reader)
    }

    async fn open_small_zstd(&self, instance: &Instance, digest: Digest, offset: u64) -> Result<ZstdReader> {
        let bytes = if offset == 0 {
            let item = self.read_many_zstd(instance, vec![digest]).await?.pop();
            item.ok_or_else(|| not_found(digest))??
        } else {
            let item = self.read_many(instance, vec![digest]).await?.pop();
            let bytes = item.ok_or_else(|| not_found(digest))??;
            Item::Plain(bytes.slice(usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len())..))
        };
        Ok(match bytes {
            Item::Zstd(stream) => ZstdReader::whole(&stream),
            Item::Plain(bytes) => {
                // The frames are uncompressed: either the blob does not get smaller, or this is a read from an offset
                // in a small blob, which is rare.
                let mut stream = Vec::new();
                stored_frame(&bytes, &mut stream);
                ZstdReader::whole(&stream)
            }
        })
    }

    /// Reads whole blobs as [`Cas::read_many`] does, and compresses them where that saves bytes (CAS-20). Compressed
    /// small blobs are cached in memory. Larger ones come from their zstd form if they have one.
    ///
    /// # Errors
    /// Each blob has its own result. The call fails when the server is shutting down.
    pub async fn read_many_zstd(
        &self,
        instance: &Instance,
        digests: Vec<Digest>,
    ) -> Result<Vec<Result<Item>>> {
        let located = self.locate(instance, &digests, Purpose::ReadZstd).await?;
        let kept: Vec<Option<Option<Bytes>>> =
            digests.iter().map(|digest| self.shared().packed.get(&(instance.blobs(), *digest))).collect();
        let place = self.shared().encoding.wait_for(self.caller(), 1).await?;
        let (cas, instance) = (self.clone(), instance.clone());
        self.blocking(move || {
            let _place = place;
            let hold = Arc::new(located.hold);
            let places = digests.into_iter().zip(kept).zip(located.found).zip(located.zstd);
            places
                .map(|(((digest, kept), found), form)| match (kept, found) {
                    _ if digest.is_empty() => Ok(Item::Plain(Bytes::new())),
                    (_, None) => Err(not_found(digest)),
                    (Some(Some(stream)), Some(_)) => Ok(Item::Zstd(stream)),
                    (Some(None), Some(found)) => cas.read_found(&instance, &found).map(Item::Plain),
                    (None, Some(found)) => cas.pack_item(&instance, found, form, &hold),
                })
                .collect()
        })
        .await
    }

    fn read_found(&self, instance: &Instance, found: &FoundEntry) -> Result<Bytes> {
        let recent = self.shared().recent.get(&(instance.blobs(), found.file.key.digest));
        recent.map_or_else(|| read_whole(self, found), Ok)
    }

    /// Makes one item of a batch that is not cached. Blocks.
    fn pack_item(
        &self,
        instance: &Instance,
        found: FoundEntry,
        form: Option<FoundEntry>,
        hold: &Arc<Hold>,
    ) -> Result<Item> {
        let digest = found.file.key.digest;
        let is_small = digest.size() <= SMALL_BLOB_BYTES;
        if !is_small {
            let packed = Form::of_packed(self, found, hold)?;
            if let Some(Form { frames, .. }) = packed.or_else(|| Form::open(self, form?, hold)) {
                let length = usize::try_from(frames.size()).map_err(Error::internal)?;
                return frames.read_exact(0, length).map(Item::Zstd);
            }
            if self.note_zstd_read(instance, digest) == Some(History::Incompressible) {
                return self.read_found(instance, &found).map(Item::Plain);
            }
        }
        let plain = self.read_found(instance, &found)?;
        let mut stream = Vec::new();
        if digest.size() >= WORTHWHILE_BYTES {
            self.shared().encoders.with(|encoder| encoder.frames(&plain, &mut stream))?;
        }
        let stream =
            (!stream.is_empty() && saves(digest.size(), stream.len() as u64)).then(|| Bytes::from(stream));
        if is_small {
            let weight = stream.as_ref().map_or(0, Bytes::len) + crate::actors::cas::RECENT_OVERHEAD_BYTES;
            self.shared().packed.insert((instance.blobs(), digest), stream.clone(), weight);
        }
        Ok(stream.map_or(Item::Plain(plain), Item::Zstd))
    }
}

/// The sources of a stream of a larger blob.
struct StreamSources {
    /// The offset from which the form is used; the blob's size without a form.
    form_from: u64,
    form: Option<(BlobReader, u64)>,
    /// The blob, if bytes before `form_from` are needed.
    blob: Option<BlobReader>,
}

/// Opens the sources of a read from `offset`. Blocks.
fn open_parts(
    cas: &Cas,
    found: FoundEntry,
    form: Option<FoundEntry>,
    hold: Arc<Hold>,
    offset: u64,
) -> Result<StreamSources> {
    let size = found.file.key.digest.size();
    let packed = Form::of_packed(cas, found, &hold)?;
    let form = packed.or_else(|| Form::open(cas, form?, &hold));
    let (form_from, packed_from) = form.as_ref().map_or((size, 0), |form| form.table.frame_from(offset));
    let blob = (offset < form_from).then(|| BlobReader::open(cas.clone(), found, hold)).transpose()?;
    Ok(StreamSources { form_from, form: form.map(|form| (form.frames, packed_from)), blob })
}
