//! [`SmallUpload`]: an upload of a small blob whose bytes arrived all at once.
//!
//! If it breaks off, nothing is left to resume, so it is not registered with the actor. Its bytes are hashed on the
//! thread of the request and written together with the bytes of other requests ([`joint_writes`]). Small batches are
//! stored in the same way.
//!
//! Bound: the bytes count against the budget of bytes that are not written yet, until they are written.

use crate::{
    actors::cas::{
        client::Cas,
        index::{EntryKind, FileId, Key},
        joint_writes::{JOINT_FILE_BYTES, SmallFile},
        uploads::sink::check_bytes,
    },
    budget::{Refusal, Share},
    instance::{Instance, InstanceId},
};
use bytes::Bytes;
use gorego_reapi::{digest::Digest, error::Result};

#[cfg(doc)]
use crate::actors::cas::joint_writes;

/// An upload of a small blob; see the module documentation.
#[derive(Debug)]
pub struct SmallUpload {
    cas: Cas,
    blob: Key,
    /// Memory for the bytes; `None` if the server itself stores them.
    memory: Option<Share>,
}

impl Cas {
    /// Begins an upload of a small blob whose bytes have all arrived. Returns `None` if [`Cas::begin_upload`] has to
    /// handle it: the blob is not small, it is stored already, or there is no memory for waiting bytes.
    ///
    /// # Errors
    /// `Unavailable` when the server is shutting down.
    pub fn begin_small_upload(&self, instance: &Instance, digest: Digest) -> Result<Option<SmallUpload>> {
        let size = digest.size();
        if !(1..=JOINT_FILE_BYTES.min(self.shared().settings.max_blob_bytes)).contains(&size)
            || self.look_up(|index| index.has_blob(instance.blobs(), digest))?
        {
            return Ok(None);
        }
        let Ok(memory) = self.charge_received(size) else { return Ok(None) };
        let blob = Key { digest, instance: instance.blobs(), kind: EntryKind::Blob };
        Ok(Some(SmallUpload { cas: self.clone(), blob, memory }))
    }

    /// Charges the client for bytes that are waiting to be written.
    pub(in crate::actors::cas) fn charge_received(
        &self,
        bytes: u64,
    ) -> std::result::Result<Option<Share>, Refusal> {
        self.client().map(|caller| self.shared().received.take(caller, bytes)).transpose()
    }

    /// Stores small blobs that were checked, together with files of other requests. Each has its own outcome. `memory`
    /// is kept until they are written.
    pub(in crate::actors::cas) async fn write_checked(
        &self,
        instance: InstanceId,
        blobs: Vec<(Digest, Bytes)>,
        memory: Option<Share>,
    ) -> Vec<Result<()>> {
        let file = |(digest, bytes): &(Digest, Bytes)| SmallFile {
            key: Key { digest: *digest, instance, kind: EntryKind::Blob },
            content: bytes.clone(),
            result: None,
        };
        let stored = self.write_jointly(blobs.iter().map(file).collect(), memory).await;
        let remember = |(stored, (digest, bytes)): (Result<FileId>, (Digest, Bytes))| {
            stored.map(|_| self.shared().remember(instance, digest, &[bytes]))
        };
        stored.into_iter().zip(blobs).map(remember).collect()
    }
}

impl SmallUpload {
    /// Checks and stores the blob.
    ///
    /// # Errors
    /// `Invalid` when the bytes do not match the digest (BS-22); the errors of [`Cas::write_jointly`].
    pub async fn store(self, bytes: Bytes) -> Result<()> {
        let Self { cas, blob, memory } = self;
        check_bytes(blob.digest, &bytes)?;
        let stored = cas.write_checked(blob.instance, vec![(blob.digest, bytes)], memory).await;
        stored.into_iter().collect()
    }
}
