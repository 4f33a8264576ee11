//! [`BlobWriter`]: an upload in progress.
//!
//! The caller hands chunks over and goes on; a job on a blocking thread hashes and writes them, one job at a time for each
//! upload, at most [`UPLOAD_BUFFER_BYTES`] behind. An upload that fits one job costs exactly one: it is hashed in memory
//! and written under its final name. A longer one grows under a temporary name, and is renamed once its hash is right.
//!
//! The attempt travels with the job, and what is left of it when the job or the writer ends is told to the actor by its
//! drop; so a client that vanishes at any moment leaves either a resumable upload or nothing.

use super::{
    Shared,
    blob::stamp_of,
    files::{Files, TemporaryFile, create},
    index::FileId,
    requests::{Commit, WrittenFile},
    settings::UPLOAD_BUFFER_BYTES,
    uploads::{Attempt, Sink},
};
use crate::{
    digest::Digest,
    error::{Error, Result},
};
use bytes::Bytes;
use std::{
    fs,
    io::{self, Write as _},
    path::Path,
    sync::{Arc, atomic::Ordering},
};
use tokio::{sync::oneshot, task::JoinHandle};

/// A job is not worth its start for less, while more is to come.
const JOB_BYTES: usize = 256 * 1024;

/// An upload in progress. Dropped before [`BlobWriter::finish`], the bytes so far are kept for a while under the upload's
/// name, so that the client can go on (BS-20), and are reclaimed after that.
#[derive(Debug)]
pub struct BlobWriter {
    digest: Digest,
    accepted: u64,
    pending: Vec<Bytes>,
    pending_bytes: usize,
    work: Work,
    progress: Arc<super::uploads::Progress>,
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
    pub(super) fn new(attempt: Box<Attempt>, shared: Arc<Shared>) -> Self {
        Self {
            digest: attempt.blob.digest,
            accepted: attempt.sink.as_ref().map_or(0, |sink| sink.hasher.size()),
            pending: Vec::new(),
            pending_bytes: 0,
            progress: attempt.progress.clone(),
            work: Work::Idle(attempt),
            shared,
        }
    }

    /// How many bytes have been accepted, those of resumed attempts included.
    pub fn committed(&self) -> u64 {
        self.accepted
    }

    /// Takes the next bytes; hashing and writing happen on a blocking thread while the caller gets the next message, at
    /// most a few MiB behind.
    ///
    /// # Errors
    /// `Invalid` as soon as there are more bytes than the digest says (BS-22), `Exhausted` when the disk is full.
    pub async fn write(&mut self, bytes: Bytes) -> Result<()> {
        let size = self.digest.size();
        let accepted = self.accepted.saturating_add(bytes.len() as u64);
        if accepted > size {
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
        self.progress.accepted.store(accepted, Ordering::Relaxed);
        self.pending_bytes += bytes.len();
        self.pending.push(bytes);
        // The last piece is left to `finish`.
        if accepted == size || self.pending_bytes < JOB_BYTES {
            return Ok(());
        }
        if matches!(self.work, Work::Running(_)) && self.pending_bytes < UPLOAD_BUFFER_BYTES / 2 {
            return Ok(());
        }
        let mut attempt = self.idle().await?;
        let (pending, shared) = (self.take_pending(), self.shared.clone());
        self.work = Work::Running(self.shared.runtime.spawn_blocking(move || {
            append(&mut attempt, &pending, &shared.files)?;
            Ok(attempt)
        }));
        Ok(())
    }

    /// Whether the blob has meanwhile been stored by somebody else (BS-24).
    pub fn is_superseded(&self) -> bool {
        self.progress.superseded.load(Ordering::Relaxed)
    }

    /// Checks length and hash and makes the blob visible.
    ///
    /// # Errors
    /// `Invalid` when the bytes are not the blob that was announced (BS-22); nothing is kept then.
    pub async fn finish(mut self) -> Result<Digest> {
        let digest = self.digest;
        if self.accepted != digest.size() {
            self.discard();
            return Err(Error::Invalid(format!("blob {digest} was finished after {} bytes", self.accepted)));
        }
        let attempt = self.idle().await?;
        let (pending, shared) = (self.take_pending(), self.shared.clone());
        // Once started this runs to its end, whether or not anybody still waits for it.
        let visible = self
            .shared
            .runtime
            .spawn_blocking(move || complete(*attempt, &pending, &shared))
            .await
            .map_err(Error::internal)??;
        visible.await.map_err(|_| super::client::going_down())?;
        Ok(digest)
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

    fn take_pending(&mut self) -> Vec<Bytes> {
        self.pending_bytes = 0;
        std::mem::take(&mut self.pending)
    }

    /// Ends the upload without keeping anything of it.
    fn discard(&mut self) {
        self.pending.clear();
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
        let (pending, shared) = (self.take_pending(), self.shared.clone());
        // What was accepted has been reported as committed (BS-31), so it is written before the attempt is put away.
        let flush = move |mut attempt: Box<Attempt>| {
            let _ = append(&mut attempt, &pending, &shared.files);
        };
        match std::mem::replace(&mut self.work, Work::Over) {
            Work::Idle(attempt) => {
                self.shared.runtime.spawn_blocking(move || flush(attempt));
            }
            Work::Running(job) => {
                self.shared.runtime.spawn(async move {
                    if let Ok(Ok(attempt)) = job.await {
                        let _ = tokio::task::spawn_blocking(move || flush(attempt)).await;
                    }
                });
            }
            Work::Over => {}
        }
    }
}

fn throw_away(mut attempt: Box<Attempt>) {
    attempt.keep = false;
}

/// Writes and hashes the next bytes of a long upload. After an error nothing of the attempt is kept.
fn append(attempt: &mut Attempt, pending: &[Bytes], files: &Files) -> Result<()> {
    let outcome = (|| -> io::Result<()> {
        if pending.is_empty() {
            return Ok(());
        }
        let sink = match &mut attempt.sink {
            Some(sink) => sink,
            none => none.insert(Sink {
                file: TemporaryFile::create(files.temporary_path(files.next_generation()))?,
                hasher: attempt.blob.digest.hasher(),
            }),
        };
        for bytes in pending {
            sink.file.file.write_all(bytes)?;
            sink.hasher.update(bytes);
        }
        Ok(())
    })();
    outcome.map_err(|error| {
        attempt.keep = false;
        Error::io(&format!("store blob {}", attempt.blob.digest), &error)
    })
}

/// Takes the last bytes, checks the whole, gives it its final name and hands it to the actor.
fn complete(mut attempt: Attempt, pending: &[Bytes], shared: &Shared) -> Result<oneshot::Receiver<()>> {
    attempt.keep = false;
    let files = &shared.files;
    let digest = attempt.blob.digest;
    let file = FileId { key: attempt.blob, generation: files.next_generation() };
    let path = files.path(&file);
    let mismatch = |actual: Digest| {
        Error::Invalid(format!("the bytes sent for blob {digest} are those of {actual}; nothing was stored"))
    };
    let failed = |error: io::Error| Error::io(&format!("store blob {digest}"), &error);
    let metadata = if attempt.sink.is_none() {
        let mut hasher = digest.hasher();
        pending.iter().for_each(|bytes| hasher.update(bytes));
        let actual = hasher.finish();
        if actual != digest {
            return Err(mismatch(actual));
        }
        let metadata = write_new(&path, pending).map_err(failed)?;
        shared.remember(attempt.blob.instance, digest, pending);
        metadata
    } else {
        append(&mut attempt, pending, files)?;
        let Some(sink) = attempt.sink.take() else { return Err(Error::internal("an upload lost its file")) };
        let actual = sink.hasher.finish();
        if actual != digest {
            return Err(mismatch(actual));
        }
        let metadata = sink.file.file.metadata().map_err(failed)?;
        sink.file.keep_as(&path).map_err(failed)?;
        metadata
    };
    let Some(room) = attempt.room.take() else { return Err(Error::internal("an upload lost its room")) };
    let (reply, visible) = oneshot::channel();
    let written = WrittenFile { file, bytes: files.charge(digest.size()), stamp: stamp_of(&metadata) };
    attempt.store().do_send(Commit { files: vec![written], room, reply });
    Ok(visible)
}

/// Writes bytes that were checked before to a new file; leaves none behind if that fails.
pub(super) fn write_new(path: &Path, pieces: &[Bytes]) -> io::Result<fs::Metadata> {
    let mut file = create(path)?;
    let outcome = pieces.iter().try_for_each(|bytes| file.write_all(bytes)).and_then(|()| file.metadata());
    if outcome.is_err() {
        let _ = fs::remove_file(path);
    }
    outcome
}
