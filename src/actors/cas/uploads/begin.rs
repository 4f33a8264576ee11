//! Starting and resuming uploads, and asking for their progress: [`Cas::begin_upload`] and [`Cas::query_upload`].

use crate::actors::cas::{
    client::{Cas, spoilt},
    index::{EntryKind, Key},
    progress::Progress,
    settings::{PARK_WAIT, SOUND_TRIES, TWIN_WAIT},
    uploads::{Attempt, writer::BlobWriter},
};
use crate::instance::Instance;
use actix::Message;
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    error::{Error, Result},
};
use std::sync::Arc;
use tokio::time::Instant;

/// Starts or resumes an upload.
#[derive(Message)]
#[rtype(result = "Result<Began>")]
pub struct BeginUpload {
    /// Digest of the resource name within its instance.
    pub name: Digest,
    pub blob: Key,
    pub offset: u64,
    /// Whether to start even if another upload of the same blob is running and there is no room for both.
    pub beside: bool,
}

/// The answer to [`BeginUpload`].
pub enum Began {
    /// The blob is already stored.
    Present,
    /// An earlier stream of this upload has not ended.
    Busy(Arc<Progress>),
    /// Another stream uploads this blob, and there is no room for both.
    NoRoomBeside(Arc<Progress>),
    /// The upload may start.
    Start(Box<Attempt>),
}

/// Asks for the progress of an upload, and whether its blob is stored.
#[derive(Message)]
#[rtype(result = "UploadStatus")]
pub struct QueryUpload {
    pub name: Digest,
    pub blob: Key,
}

/// The answer to [`Cas::begin_upload`].
#[derive(Debug)]
pub enum Upload {
    /// The blob is already stored, so nothing needs to be sent (BS-24).
    Present,
    /// The client sends the bytes from [`BlobWriter::committed`] on.
    Writer(Box<BlobWriter>),
}

/// The progress of an upload (BS-31, BS-32).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UploadStatus {
    /// Bytes that need not be sent again.
    pub committed: u64,
    /// Whether the blob is stored.
    pub complete: bool,
}

impl Cas {
    /// Starts an upload, or resumes one that broke: `name` is the whole resource name (BS-06), `offset` the first
    /// `write_offset`. Offset 0 discards the bytes of an earlier attempt (BS-20).
    ///
    /// # Errors
    /// `Invalid` when the blob is too large or `offset` is not the position of that upload; `Exhausted` when there is
    /// no room; `Unavailable` when an earlier stream of this upload does not end.
    pub async fn begin_upload(
        &self,
        instance: &Instance,
        name: &str,
        digest: Digest,
        offset: u64,
    ) -> Result<Upload> {
        self.check_blob_size(digest.size(), digest)?;
        if digest.is_empty() {
            return Ok(Upload::Present);
        }
        let blob = Key { digest, instance: instance.blobs(), kind: EntryKind::Blob };
        let name = upload_name(instance, name);
        self.look_at_full_disk().await?;
        let patience = Instant::now() + TWIN_WAIT;
        let (mut was_busy, mut looks, mut beside) = (false, 0, false);
        loop {
            match self.ask(BeginUpload { name, blob, offset, beside }).await?? {
                // A stored blob that turns out to be damaged is dropped, and this upload replaces it.
                Began::Present if self.are_sound(instance, vec![digest]).await? => {
                    return Ok(Upload::Present);
                }
                Began::Present if looks < SOUND_TRIES => looks += 1,
                Began::Present => return Err(spoilt()),
                Began::Start(attempt) => return self.write_to(attempt).await,
                // A client that resumes at once may find its own broken stream still being saved.
                Began::Busy(progress) if !was_busy => {
                    was_busy = true;
                    let _ = tokio::time::timeout(PARK_WAIT, progress.ended()).await;
                }
                Began::Busy(_) => {
                    let problem = format!("another stream still uploads blob {digest} under this name");
                    return Err(Error::Unavailable(problem));
                }
                // BS-28: if the other stream stores the blob, this one is done too.
                Began::NoRoomBeside(twin) => beside = !twin.ends_before(patience).await,
            }
        }
    }

    /// Makes the writer of an attempt. Its room is charged to the client.
    async fn write_to(&self, mut attempt: Box<Attempt>) -> Result<Upload> {
        attempt.lessee = self.lessee();
        if let Some(room) = &mut attempt.room
            && let Err(error) = self.pay_for(room)
        {
            // A partial upload without a share could not be charged to a client, so it is not kept. Removing its file
            // may block.
            attempt.keep = false;
            let _ = self.shared().runtime.spawn_blocking(move || drop(attempt)).await;
            return Err(error);
        }
        Ok(Upload::Writer(Box::new(BlobWriter::new(attempt, self.received(), self.clone()))))
    }

    /// The progress of an upload; an unknown upload is at 0 (BS-32).
    ///
    /// # Errors
    /// `Unavailable` when the server is shutting down.
    pub async fn query_upload(
        &self,
        instance: &Instance,
        name: &str,
        digest: Digest,
    ) -> Result<UploadStatus> {
        if digest.is_empty() {
            return Ok(UploadStatus { committed: 0, complete: true });
        }
        let blob = Key { digest, instance: instance.blobs(), kind: EntryKind::Blob };
        let name = upload_name(instance, name);
        let status = self.ask(QueryUpload { name, blob }).await?;
        if !status.complete || self.are_sound(instance, vec![digest]).await? {
            return Ok(status);
        }
        self.ask(QueryUpload { name, blob }).await
    }
}

/// A key of constant length for an upload name of any length.
fn upload_name(instance: &Instance, name: &str) -> Digest {
    DigestFunction::Sha256.digest(format!("{}\0{name}", instance.id().0).as_bytes())
}
