//! [`BlobWriter`]: an upload in progress.
//!
//! The caller hands chunks over and goes on; a job on a blocking thread hashes and writes them, one job at a time for each
//! upload, at most [`UPLOAD_BUFFER_BYTES`] behind. What is not written yet has its room in memory ([`Received`]); where there is
//! none, each piece is written before the next one is taken. An upload that fits one job costs exactly one: it is hashed in memory
//! and written under its final name. A longer one grows under a temporary name, and is renamed once its hash is right.
//!
//! A compressed upload is decoded by the same jobs. How far it is shows only then, so it may be refused one job late; and
//! since a decoder takes megabytes, it needs room ([`decoders`]) when the upload needs more than one job or yields more than
//! [`WHOLE_BYTES`]. So there are also only so many blocking threads that wait for room, and some are left to delete files.
//!
//! Room is reserved ahead of each write and no earlier; an upload for which there is none fails, and its client may go on later
//! from the bytes that were written.
//!
//! The attempt travels with the job, and what is left of it when the job or the writer ends is told to the actor by its
//! drop; so a client that vanishes at any moment leaves either a resumable upload or nothing.

use crate::actors::cas::{
    Shared,
    blob::hash_mismatch,
    new_files::{NewFiles, Visible},
    settings::UPLOAD_BUFFER_BYTES,
    uploads::Attempt,
    uploads::decoders,
    uploads::received::Received,
    uploads::sink::{Inflow, Sink, WHOLE_BYTES, failed},
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

/// A job is not worth its start for less, while more is to come.
const JOB_BYTES: usize = 256 * 1024;

/// An upload in progress. Dropped before [`BlobWriter::finish`], the bytes so far are kept for a while under the upload's
/// name, so that the client can go on (BS-20), and are reclaimed after that.
#[derive(Debug)]
pub struct BlobWriter {
    digest: Digest,
    /// Bytes that were sent; of a compressed upload, as they were sent.
    accepted: u64,
    encoding: Encoding,
    /// Whether there is a decoder with its room, which goes from job to job.
    has_decoder: bool,
    received: Received,
    work: Work,
    progress: Arc<crate::actors::cas::uploads::Progress>,
    shared: Arc<Shared>,
}

#[derive(Debug)]
enum Work {
    Idle(Box<Attempt>),
    Running(JoinHandle<Result<Box<Attempt>>>),
    /// Finished or failed.
    Over,
}

impl BlobWriter {
    /// A writer that goes on where the attempt stands.
    pub(crate) fn new(attempt: Box<Attempt>, received: Received, shared: Arc<Shared>) -> Self {
        Self {
            digest: attempt.blob.digest,
            encoding: Encoding::Identity,
            has_decoder: false,
            accepted: attempt.sink.as_ref().map_or(0, |sink| sink.hasher.size()),
            received,
            progress: attempt.progress.clone(),
            work: Work::Idle(attempt),
            shared,
        }
    }

    /// Takes what is written from here on as a zstd stream, which has to begin with a frame of its own (BS-27).
    pub fn decoding(mut self) -> Self {
        self.encoding = Encoding::Zstd;
        if let Work::Idle(attempt) = &mut self.work {
            attempt.inflow = Inflow::Zstd(None);
        }
        self
    }

    /// The same for an upload that nobody can go on with: nothing of it is kept when it breaks.
    pub(crate) fn unresumable(mut self) -> Self {
        if let Work::Idle(attempt) = &mut self.work {
            attempt.keep = false;
        }
        self
    }

    /// How many bytes of the blob have been accepted, those of resumed attempts included.
    pub fn committed(&self) -> u64 {
        self.progress.accepted.load(Ordering::Relaxed)
    }

    /// Takes the next bytes; hashing and writing happen on a blocking thread while the caller gets the next message, at
    /// most a few MiB behind.
    ///
    /// # Errors
    /// `Invalid` as soon as there are more bytes than the digest says (BS-22) or they are no zstd (BS-26), `Exhausted` when
    /// the disk is full or too many compressed uploads are going on.
    pub async fn write(&mut self, bytes: Bytes) -> Result<()> {
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
        self.work = Work::Running(self.shared.runtime.spawn_blocking(move || {
            append(&mut attempt, &pending.bytes, &shared)?;
            Ok(attempt)
        }));
        if !has_room {
            self.work = Work::Idle(self.idle().await?);
        }
        Ok(())
    }

    /// Whether what was received may wait in memory for more: there is too little for a job, or one is running, or all is there
    /// and left to `finish`.
    fn may_wait(&self) -> bool {
        let is_all = self.encoding == Encoding::Identity && self.accepted == self.digest.size();
        let is_busy = || matches!(self.work, Work::Running(_)) && self.received.has_plenty();
        let bytes = self.received.bytes();
        is_all || bytes < JOB_BYTES || (bytes < UPLOAD_BUFFER_BYTES / 2 && is_busy())
    }

    /// Whether the blob has meanwhile been stored by somebody else (BS-24).
    pub fn is_superseded(&self) -> bool {
        self.progress.is_superseded()
    }

    /// Waits until [`BlobWriter::is_superseded`], perhaps for ever.
    pub fn superseded(&self) -> impl Future<Output = ()> + Send + use<> {
        self.progress.superseded()
    }

    /// Checks length and hash and makes the blob visible.
    ///
    /// # Errors
    /// `Invalid` when the bytes are not the blob that was announced (BS-22); nothing is kept then.
    pub async fn finish(mut self) -> Result<Digest> {
        let digest = self.digest;
        if self.encoding == Encoding::Identity && self.accepted != digest.size() {
            self.discard();
            return Err(Error::Invalid(format!("blob {digest} was finished after {} bytes", self.accepted)));
        }
        // Once started this runs to its end, whether or not anybody still waits for it.
        let runtime = self.shared.runtime.clone();
        runtime.spawn(self.store()).await.map_err(Error::internal)?
    }

    /// [`BlobWriter::finish`], of a blob that has its length.
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
            .spawn_blocking(move || complete(*attempt, &pending.bytes, &shared))
            .await
            .map_err(Error::internal)??;
        if let Some(visible) = visible {
            visible.wait().await?;
        }
        Ok(digest)
    }

    /// Takes the attempt out once there is room for all bytes that were accepted. How many a compressed upload has shows only
    /// when they are decoded: a small blob gets its room at once, and the job of a larger one makes room by itself, for which
    /// it has the right to a decoder.
    async fn idle_with_room(&mut self) -> Result<Box<Attempt>> {
        // Back in its place: if this future is dropped, the attempt stays where `drop` finds it.
        self.work = Work::Idle(self.idle().await?);
        let bytes = match self.encoding {
            Encoding::Identity => self.accepted,
            Encoding::Zstd if self.digest.size() <= WHOLE_BYTES => self.digest.size(),
            Encoding::Zstd => 0,
        };
        if let Work::Idle(attempt) = &mut self.work {
            make_room(attempt, bytes, &*self.shared.volume).await?;
        }
        self.idle().await
    }

    /// Makes the decoder once there is room for it.
    async fn make_decoder(&mut self) -> Result<()> {
        let (caller, size) = (self.received.caller(), self.digest.size());
        let room = decoders::room(&self.shared.decoders, caller, self.received.head(), size).await?;
        self.work = Work::Idle(self.idle().await?);
        if let Work::Idle(attempt) = &mut self.work {
            let written = attempt.sink.as_ref().map_or(0, |sink| sink.hasher.size());
            attempt.inflow.begin(size.saturating_sub(written), room)?;
            self.has_decoder = true;
        }
        Ok(())
    }

    /// Waits for a running job and takes the attempt out.
    async fn idle(&mut self) -> Result<Box<Attempt>> {
        if let Work::Running(job) = &mut self.work {
            // Polled in place: if this future is dropped, the job stays where `drop` finds it.
            let outcome = job.await.unwrap_or_else(|error| Err(Error::internal(error)));
            self.work = Work::Over;
            return outcome;
        }
        match std::mem::replace(&mut self.work, Work::Over) {
            Work::Idle(attempt) => Ok(attempt),
            Work::Running(_) | Work::Over => {
                Err(Error::Invalid(format!("the upload of blob {} has failed before", self.digest)))
            }
        }
    }

    /// Ends the upload without keeping anything of it.
    fn discard(&mut self) {
        drop(self.received.take());
        match std::mem::replace(&mut self.work, Work::Over) {
            Work::Idle(attempt) => {
                self.shared.runtime.spawn_blocking(move || throw_away(attempt));
            }
            Work::Running(job) => {
                self.shared.runtime.spawn(async move {
                    if let Ok(Ok(attempt)) = job.await {
                        let _ = tokio::task::spawn_blocking(move || throw_away(attempt)).await;
                    }
                });
            }
            Work::Over => {}
        }
    }
}

impl Drop for BlobWriter {
    fn drop(&mut self) {
        let work = std::mem::replace(&mut self.work, Work::Over);
        if matches!(work, Work::Over) {
            return;
        }
        let (pending, shared) = (self.received.take(), self.shared.clone());
        let (is_plain, accepted, has_decoder) =
            (self.encoding == Encoding::Identity, self.accepted, self.has_decoder);
        // What was accepted of a plain upload has been reported as committed (BS-31), so it is written before the attempt is put
        // away; but for what there is no room for. What is compressed is reported once it is decoded.
        self.shared.runtime.spawn(async move {
            let mut attempt = match work {
                Work::Idle(attempt) => attempt,
                Work::Running(job) => match job.await {
                    Ok(Ok(attempt)) => attempt,
                    Ok(Err(_)) | Err(_) => return,
                },
                Work::Over => return,
            };
            let may_go_on = if is_plain {
                make_room(&mut attempt, accepted, &*shared.volume).await.is_ok()
            } else {
                has_decoder
            };
            let flush = move || {
                if may_go_on {
                    let _ = append(&mut attempt, &pending.bytes, &shared);
                }
            };
            let _ = tokio::task::spawn_blocking(flush).await;
        });
    }
}

/// Has room for so many bytes of the blob. If there is none, the bytes that were written are kept.
async fn make_room(attempt: &mut Attempt, bytes: u64, volume: &dyn Volume) -> Result<()> {
    let most = volume.charge(attempt.blob.digest.size());
    let Some(room) = &mut attempt.room else { return Err(lost_room()) };
    room.grow(volume.charge(bytes), most).await
}

fn throw_away(mut attempt: Box<Attempt>) {
    attempt.keep = false;
}

/// Writes and hashes the next bytes of a long upload, as far as there is room. After an error nothing of the attempt is kept.
fn append(attempt: &mut Attempt, pending: &[Bytes], shared: &Shared) -> Result<()> {
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
        // A plain upload has its room; how much a compressed one needs shows only here.
        let mut make_room =
            |bytes| room.grow_here(&shared.runtime, volume.charge(bytes), volume.charge(blob.size()));
        pending.iter().try_for_each(|bytes| sink.take(bytes, &mut attempt.inflow, blob, &mut make_room))?;
        // A plain upload was ahead of this.
        attempt.progress.accepted.fetch_max(sink.hasher.size(), Ordering::Relaxed);
        Ok(())
    })();
    attempt.keep &= outcome.is_ok();
    outcome
}

/// Takes the last bytes, checks the whole, gives it its final name and hands it to the actor.
fn complete(mut attempt: Attempt, pending: &[Bytes], shared: &Arc<Shared>) -> Result<Option<Visible>> {
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
        files.keep(key, draft, digest.size()).map_err(|error| failed(digest, &error))?;
        files
    };
    Ok(files.commit_upload(attempt))
}

/// The room of an attempt, for the file that it is to become.
fn new_files(attempt: &mut Attempt, shared: &Arc<Shared>) -> Result<NewFiles> {
    let room = attempt.room.take().ok_or_else(lost_room)?;
    Ok(NewFiles::new(attempt.store(), shared, room.into_reservation()))
}

fn lost_room() -> Error {
    Error::internal("an upload lost its room")
}
