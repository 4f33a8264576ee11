//! [`SmallUpload`]: an upload of a small blob whose bytes arrived all at once.
//!
//! If it breaks off, nothing is left to resume, so it is not registered with the actor. Its bytes are hashed on the thread of the
//! request and written together with those of others ([`joint_writes`]).
//!
//! Bound: the bytes count against the budget of bytes that are not written yet.

use crate::{
    actors::cas::{
        blob::hash_mismatch,
        client::Cas,
        index::{EntryKind, Key},
        joint_writes::JOINT_FILE_BYTES,
    },
    budget::Share,
    instance::Instance,
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
    _room: Option<Share>,
}

impl Cas {
    /// Begins an upload of a small blob, all of whose bytes are there. Returns `None` if [`Cas::begin_upload`] has to handle it:
    /// the blob is not small, it is stored already, or there is no memory for bytes that wait.
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
        let room = self.client().map(|caller| self.shared().received.take(caller, size)).transpose();
        let Ok(room) = room else { return Ok(None) };
        let blob = Key { digest, instance: instance.blobs(), kind: EntryKind::Blob };
        Ok(Some(SmallUpload { cas: self.clone(), blob, _room: room }))
    }
}

impl SmallUpload {
    /// Checks and stores the blob.
    ///
    /// # Errors
    /// `Invalid` when the bytes do not match the digest (BS-22); the errors of [`Cas::write_jointly`].
    pub async fn store(self, bytes: Bytes) -> Result<()> {
        let Self { cas, blob, _room } = self;
        let (expected, actual) = (blob.digest, blob.digest.function().digest(&bytes));
        if actual != expected {
            return Err(hash_mismatch(expected, actual));
        }
        cas.write_jointly(blob, bytes.clone()).await?;
        cas.shared().remember(blob.instance, expected, &[bytes]);
        Ok(())
    }
}
