//! [`BlobWriter`]: an upload in progress.
//!
//! The caller hands over chunks and continues. A job on a blocking thread hashes and writes them: one job at a time per
//! upload, at most [`UPLOAD_BUFFER_BYTES`] behind. Bytes that are not written yet are charged to a memory budget
//! ([`UnwrittenPieces`]). When the budget is spent, each piece is written before the next one is accepted. An upload
//! that fits into one job costs exactly one job: it is hashed in memory and written under its final name. A longer one
//! is written under a temporary name and renamed once its hash is verified.
//!
//! A compressed upload is decoded by the same jobs. Its size is known only then, so it may be refused one job late. A
//! decoder takes megabytes, so its memory is reserved ([`decoders`]) if the upload needs more than one job or yields
//! more than [`WHOLE_BYTES`]. This also bounds the blocking threads that wait for disk space, so that some are left to
//! delete files.
//!
//! Disk space is reserved right before each write. An upload fails if there is none, and its client may resume it later
//! after the bytes that were written.
//!
//! The [`Attempt`] moves into the job and back. When it is dropped, in the job or in the writer, its remaining bytes
//! are reported to the actor. So a client that vanishes at any moment leaves either a resumable upload or nothing.

use crate::actors::cas::{
    StoreShared,
    client::Cas,
    index::Key,
    new_files::{NewFiles, Visible},
    progress::Progress,
    settings::UPLOAD_BUFFER_BYTES,
    uploads::{
        Attempt, decoders,
        sink::{Inflow, Sink, WHOLE_BYTES, failed, hash_mismatch},
        unwritten::UnwrittenPieces,
    },
    volume::Volume,
};
use bytes::Bytes;
use gorego_reapi::{
    digest::Digest,
    error::{Error, Result},
    resource_name::Encoding,
};
use std::sync::{Arc, atomic::Ordering};
use tokio::task::JoinHandle;

/// Starting a job is not worthwhile for fewer bytes while more are to come.
const JOB_BYTES: usize = 256 * 1024;

/// An upload in progress. If it is dropped before [`BlobWriter::finish`], the bytes so far are kept for a while under
/// the upload's name, so that the client can resume (BS-20).
#[derive(Debug)]
pub struct BlobWriter {
    digest: Digest,
    /// Bytes that the client sent; for a compressed upload, compressed bytes.
    accepted: u64,
    encoding: Encoding,
    /// Whether there is a decoder with reserved memory. It moves from job to job.
    has_decoder: bool,
    received: UnwrittenPieces,
    work: UploadWork,
    progress: Arc<Progress>,
    blob: Key,
    /// Another upload has stored the blob, so the bytes of this one are no longer needed.
    is_redundant: bool,
    cas: Cas,
    shared: Arc<StoreShared>,
}

#[derive(Debug)]
enum UploadWork {
    Idle(Box<Attempt>),
    Running(JoinHandle<Result<Box<Attempt>>>),
    /// The upload has finished or failed.
    Over,
}

impl BlobWriter {
    /// A writer that continues at the position of the attempt.
    pub(crate) fn new(attempt: Box<Attempt>, received: UnwrittenPieces, cas: Cas) -> Self {
        Self {
            blob: attempt.blob,
            is_redundant: false,
            shared: cas.shared().clone(),
            cas,
            digest: attempt.blob.digest,
            encoding: Encoding::Identity,
            has_decoder: false,
            accepted: attempt.sink.as_ref().map_or(0, |sink| sink.hasher.size()),
            received,
            progress: attempt.progress.clone(),
            work: UploadWork::Idle(attempt),
        }
    }

    /// Treats all further bytes as a zstd stream, which has to begin with a frame of its own (BS-27).
    pub fn decoding(mut self) -> Self {
        self.encoding = Encoding::Zstd;
        if let UploadWork::Idle(attempt) = &mut self.work {
            attempt.inflow = Inflow::Zstd(None);
        }
        self
    }

    /// Makes the upload unresumable: nothing is kept when it breaks.
    pub(crate) fn unresumable(mut self) -> Self {
        if let UploadWork::Idle(attempt) = &mut self.work {
            attempt.keep = false;
        }
        self
    }

    /// The bytes of the blob that have been accepted, including those of resumed attempts.
    pub fn committed(&self) -> u64 {
        self.progress.accepted.load(Ordering::Relaxed)
    }

    /// Accepts the next bytes. They are hashed and written on a blocking thread while the caller receives the next
    /// message, at most a few MiB behind. An upload for which there is no room accepts and ignores them while another
    /// one has stored the blob.
    ///
    /// # Errors
    /// `Invalid` as soon as there are more bytes than the digest says (BS-22) or they are not valid zstd (BS-26);
    /// `Exhausted` when the disk is full or too many compressed uploads are running.
    pub async fn write(&mut self, bytes: Bytes) -> Result<()> {
        if self.is_redundant {
            return Ok(());
        }
        match self.accept(bytes).await {
            Err(error) if is_shortage(&error) && is_stored(&self.cas, &self.blob) => {
                self.is_redundant = true;
                self.discard();
                Ok(())
            }
            accepted => accepted,
        }
    }

    async fn accept(&mut self, bytes: Bytes) -> Result<()> {
        let size = self.digest.size();
        let accepted = self.accepted.saturating_add(bytes.len() as u64);
        let plain = self.encoding == Encoding::Identity;
        if plain && accepted > size {
            self.discard();
            return Err(Error::Invalid(format!(
                "more than the {size} bytes of blob {} were sent",
                self.digest
            )));
        }
        if bytes.is_empty() {
            return Ok(());
        }
        self.accepted = accepted;
        if plain {
            self.progress.accepted.store(accepted, Ordering::Relaxed);
        }
        let has_room = self.received.push(bytes).is_ok();
        if has_room && self.may_wait() {
            return Ok(());
        }
        if !plain && !self.has_decoder {
            self.make_decoder().await?;
        }
        let mut attempt = self.idle_with_room().await?;
        let (pending, shared) = (self.received.take(), self.shared.clone());
        self.work = UploadWork::Running(self.shared.runtime.spawn_blocking(move || {
            append(&mut attempt, pending.bytes(), &shared)?;
            Ok(attempt)
        }));
        if !has_room {
            self.work = UploadWork::Idle(self.idle().await?);
        }
        Ok(())
    }

    /// Whether the received bytes may stay in memory: there are too few for a job, a job is running, or the upload is
    /// complete and `finish` will write them.
    fn may_wait(&self) -> bool {
        let is_all = self.encoding == Encoding::Identity && self.accepted == self.digest.size();
        let is_busy = || matches!(self.work, UploadWork::Running(_)) && self.received.has_plenty();
        let bytes = self.received.bytes();
        is_all || bytes < JOB_BYTES || (bytes < UPLOAD_BUFFER_BYTES / 2 && is_busy())
    }

    /// Waits until another upload has stored the blob (BS-24). The wait does not end if the blob was evicted before
    /// this was polled.
    pub fn superseded(&self) -> impl Future<Output = ()> + Send + use<> {
        let (superseded, cas, blob) = (self.progress.superseded(), self.cas.clone(), self.blob);
        async move {
            superseded.await;
            if !is_stored(&cas, &blob) {
                std::future::pending().await
            }
        }
    }

    /// Checks length and hash and makes the blob visible.
    ///
    /// # Errors
    /// `Invalid` when the bytes do not match the digest (BS-22). Nothing is kept then.
    pub async fn finish(mut self) -> Result<Digest> {
        let (digest, cas, blob) = (self.digest, self.cas.clone(), self.blob);
        if self.is_redundant {
            let evicted = || {
                Error::Unavailable(format!(
                    "blob {digest} was stored by another upload and evicted again before this one ended; try again"
                ))
            };
            return if is_stored(&cas, &blob) { Ok(digest) } else { Err(evicted()) };
        }
        if self.encoding == Encoding::Identity && self.accepted != digest.size() {
            self.discard();
            return Err(Error::Invalid(format!("blob {digest} was finished after {} bytes", self.accepted)));
        }
        // The task runs to its end, even if the caller does not wait for it.
        let runtime = self.shared.runtime.clone();
        match runtime.spawn(self.store()).await.map_err(Error::internal)? {
            Err(error) if is_shortage(&error) && is_stored(&cas, &blob) => Ok(digest),
            stored => stored,
        }
    }

    /// Stores the blob; the length of a plain upload is already checked.
    async fn store(mut self) -> Result<Digest> {
        let digest = self.digest;
        if self.encoding == Encoding::Zstd && digest.size() > WHOLE_BYTES && !self.has_decoder {
            self.make_decoder().await?;
        }
        let attempt = self.idle_with_room().await?;
        let (pending, shared) = (self.received.take(), self.shared.clone());
        let visible = self
            .shared
            .runtime
            .spawn_blocking(move || complete(*attempt, pending.bytes(), &shared))
            .await
            .map_err(Error::internal)??;
        if let Some(visible) = visible {
            visible.wait().await?;
        }
        Ok(digest)
    }

    /// Takes the attempt out once there is room for all accepted bytes. The size of a compressed upload is known only
    /// once it is decoded: a small blob gets its full room here, and the job of a larger one reserves room as it
    /// decodes.
    async fn idle_with_room(&mut self) -> Result<Box<Attempt>> {
        // The attempt is put back first, so that `drop` finds it if this future is dropped.
        self.work = UploadWork::Idle(self.idle().await?);
        let bytes = match self.encoding {
            Encoding::Identity => self.accepted,
            Encoding::Zstd if self.digest.size() <= WHOLE_BYTES => self.digest.size(),
            Encoding::Zstd => 0,
        };
        if let UploadWork::Idle(attempt) = &mut self.work {
            make_room(attempt, bytes, &*self.shared.volume).await?;
        }
        self.idle().await
    }

    /// Makes the decoder once there is memory for it.
    async fn make_decoder(&mut self) -> Result<()> {
        let (caller, size) = (self.received.caller(), self.digest.size());
        let room = decoders::room(&self.shared.decoders, caller, self.received.head(), size).await?;
        self.work = UploadWork::Idle(self.idle().await?);
        if let UploadWork::Idle(attempt) = &mut self.work {
            let written = attempt.sink.as_ref().map_or(0, |sink| sink.hasher.size());
            attempt.inflow.begin(size.saturating_sub(written), room)?;
            self.has_decoder = true;
        }
        Ok(())
    }

    /// Waits for a running job and takes the attempt out.
    async fn idle(&mut self) -> Result<Box<Attempt>> {
        if let UploadWork::Running(job) = &mut self.work {
            // The job is polled in place, so that `drop` finds it if this future is dropped.
            let outcome = job.await.unwrap_or_else(|error| Err(Error::internal(error)));
            self.work = UploadWork::Over;
            return outcome;
        }
        match std::mem::replace(&mut self.work, UploadWork::Over) {
            UploadWork::Idle(attempt) => Ok(attempt),
            UploadWork::Running(_) | UploadWork::Over => {
                Err(Error::Invalid(format!("the upload of blob {} has failed before", self.digest)))
            }
        }
    }

    /// Ends the upload and keeps nothing of it.
    fn discard(&mut self) {
        drop(self.received.take());
        match std::mem::replace(&mut self.work, UploadWork::Over) {
            UploadWork::Idle(attempt) => {
                self.shared.runtime.spawn_blocking(move || throw_away(attempt));
            }
            UploadWork::Running(job) => {
                self.shared.runtime.spawn(async move {
                    if let Ok(Ok(attempt)) = job.await {
                        let _ = tokio::task::spawn_blocking(move || throw_away(attempt)).await;
                    }
                });
            }
            UploadWork::Over => {}
        }
    }
}

impl Drop for BlobWriter {
    fn drop(&mut self) {
        let work = std::mem::replace(&mut self.work, UploadWork::Over);
        if matches!(work, UploadWork::Over) {
            return;
        }
        let (pending, shared) = (self.received.take(), self.shared.clone());
        let (is_plain, accepted, has_decoder) =
            (self.encoding == Encoding::Identity, self.accepted, self.has_decoder);
        // The accepted bytes of a plain upload were reported as committed (BS-31), so they are written, if there is
        // room, before the attempt ends. A compressed upload reports bytes only once they are decoded.
        self.shared.runtime.spawn(async move {
            let mut attempt = match work {
                UploadWork::Idle(attempt) => attempt,
                UploadWork::Running(job) => match job.await {
                    Ok(Ok(attempt)) => attempt,
                    Ok(Err(_)) | Err(_) => return,
                },
                UploadWork::Over => return,
            };
            let may_go_on = if is_plain {
                make_room(&mut attempt, accepted, &*shared.volume).await.is_ok()
            } else {
                has_decoder
            };
            let flush = move || {
                if may_go_on {
                    let _ = append(&mut attempt, pending.bytes(), &shared);
                }
            };
            let _ = tokio::task::spawn_blocking(flush).await;
        });
    }
}

/// Whether a blob is stored now, by any upload. This counts as a use.
fn is_stored(cas: &Cas, blob: &Key) -> bool {
    cas.look_up(|index| index.renew(blob)).is_ok_and(|found| found.is_some())
}

/// Whether an upload failed for lack of a resource, and not because of its bytes.
fn is_shortage(error: &Error) -> bool {
    matches!(error, Error::Exhausted { .. } | Error::DiskFull(_) | Error::Unavailable(_))
}

/// Reserves room for `bytes` of the blob. If there is none, the bytes that were written are kept.
async fn make_room(attempt: &mut Attempt, bytes: u64, volume: &dyn Volume) -> Result<()> {
    let most = volume.charge(attempt.blob.digest.size());
    let Some(room) = &mut attempt.room else { return Err(lost_room()) };
    room.grow(volume.charge(bytes), most).await
}

fn throw_away(mut attempt: Box<Attempt>) {
    attempt.keep = false;
}

/// Writes and hashes the next bytes of a long upload. After an error nothing of the attempt is kept.
fn append(attempt: &mut Attempt, pending: &[Bytes], shared: &StoreShared) -> Result<()> {
    if pending.is_empty() {
        return Ok(());
    }
    let outcome = (|| {
        let (blob, volume) = (attempt.blob.digest, &*shared.volume);
        let Some(room) = &mut attempt.room else { return Err(lost_room()) };
        let sink = match &mut attempt.sink {
            Some(sink) => sink,
            none => none.insert(Sink::create(volume, blob).map_err(|error| failed(blob, &error))?),
        };
        let mut make_room =
            |bytes| room.grow_here(&shared.runtime, volume.charge(bytes), volume.charge(blob.size()));
        if matches!(attempt.inflow, Inflow::Plain) {
            // The attempt already has its room, unless more bytes were accepted since.
            let new = pending.iter().map(|bytes| bytes.len() as u64).sum();
            make_room(sink.hasher.size().saturating_add(new))?;
            sink.append(pending, blob)?;
        } else {
            pending
                .iter()
                .try_for_each(|bytes| sink.take(bytes, &mut attempt.inflow, blob, &mut make_room))?;
        }
        // A plain upload may already have counted more bytes.
        attempt.progress.accepted.fetch_max(sink.hasher.size(), Ordering::Relaxed);
        Ok(())
    })();
    attempt.keep &= outcome.is_ok();
    shared.disk.note(outcome)
}

/// Writes the last bytes, verifies the blob, gives it its final name and hands it to the actor.
fn complete(mut attempt: Attempt, pending: &[Bytes], shared: &Arc<StoreShared>) -> Result<Option<Visible>> {
    attempt.keep = false;
    let (key, digest) = (attempt.blob, attempt.blob.digest);
    let is_plain = matches!(attempt.inflow, Inflow::Plain);
    let files = if attempt.sink.is_none() && (is_plain || digest.size() <= WHOLE_BYTES) {
        let pieces = attempt.inflow.whole(pending, digest.size())?;
        let mut hasher = digest.hasher();
        pieces.iter().for_each(|bytes| hasher.update(bytes));
        let actual = hasher.finish();
        if actual != digest {
            return Err(hash_mismatch(digest, actual));
        }
        let charge = shared.volume.charge(digest.size());
        attempt.room.as_mut().ok_or_else(lost_room)?.grow_here(&shared.runtime, charge, charge)?;
        let mut files = new_files(&mut attempt, shared)?;
        files.write(key, &pieces).map_err(|error| failed(digest, &error))?;
        shared.remember(key.instance, digest, &pieces);
        files
    } else {
        append(&mut attempt, pending, shared)?;
        attempt.inflow.finish()?;
        let Some(sink) = attempt.sink.take() else {
            return Err(Error::Invalid(format!("nothing was sent for blob {digest}")));
        };
        let draft = sink.checked(digest)?;
        let mut files = new_files(&mut attempt, shared)?;
        files.keep(key, draft).map_err(|error| failed(digest, &error))?;
        files
    };
    Ok(files.commit_upload(attempt.into_ended()))
}

/// A [`NewFiles`] with the room of an attempt.
fn new_files(attempt: &mut Attempt, shared: &Arc<StoreShared>) -> Result<NewFiles> {
    let room = attempt.room.take().ok_or_else(lost_room)?;
    Ok(NewFiles::new(attempt.store(), shared, room.into_reservation()).leased_to(attempt.lessee))
}

fn lost_room() -> Error {
    Error::internal("an upload lost its room")
}
