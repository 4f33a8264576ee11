//! [`PreparedResult`]: a result on its way into the store.

use crate::{
    actors::cas::{
        client::{Cas, Provenance},
        index::{EntryKind, Key},
        linking::NewLinks,
        new_files::NewFiles,
        results::{self, DirectReferences, LoadedResult, Uploader},
    },
    instance::Instance,
    result::SharedResult,
};
use bytes::Bytes;
use gorego_reapi::{
    digest::Digest,
    error::{Error, Result},
    proto::{gorego::StoredOrigin, reapi},
};
use std::{sync::Arc, time::SystemTime};

/// A result that is checked and encoded for its file.
pub(crate) struct PreparedResult {
    pub(super) action: Digest,
    pub(in crate::actors::cas) result: SharedResult,
    /// Where it comes from.
    pub(super) origin: StoredOrigin,
    file: Bytes,
    /// Contents that were inlined; these blobs have to be stored first.
    pub(crate) contents: Vec<(Digest, Bytes)>,
    /// Every blob that it needs, if that is known although it names Trees or Directories.
    pub(in crate::actors::cas) references: Option<Vec<Digest>>,
}

impl PreparedResult {
    /// Checks and encodes a result.
    ///
    /// # Errors
    /// The errors of [`results::normalise`].
    pub(crate) fn new(
        instance: &Instance,
        action: Digest,
        result: reapi::ActionResult,
        provenance: Provenance,
        uploader: Uploader,
    ) -> Result<Self> {
        Ok(Self::check(instance, action, result, provenance, uploader)?.encode())
    }

    /// Checks a result. It is encoded with [`PreparedResult::encode`].
    pub(super) fn check(
        instance: &Instance,
        action: Digest,
        mut result: reapi::ActionResult,
        provenance: Provenance,
        uploader: Uploader,
    ) -> Result<Self> {
        let contents = results::normalise(&mut result, action.function(), uploader)?;
        let origin = results::origin(instance.name(), action, provenance, SystemTime::now());
        Ok(Self { action, result: result.into(), origin, file: Bytes::new(), contents, references: None })
    }

    /// Encodes it for its file.
    pub(super) fn encode(self) -> Self {
        let file = results::encode(&self.origin, &self.result);
        Self { file, ..self }
    }

    /// Bytes that the file takes on disk.
    pub(crate) fn charge(&self, cas: &Cas) -> u64 {
        cas.shared().volume.charge(self.file.len() as u64)
    }

    /// Writes the file, which is not visible yet. Blocks.
    pub(in crate::actors::cas) fn write(
        self,
        cas: &Cas,
        files: &mut NewFiles,
        space: &Instance,
    ) -> Result<()> {
        let references = self.all_references();
        let Self { action, result, file: bytes, .. } = self;
        let key = Key { digest: action, instance: space.id(), kind: EntryKind::Result };
        let file = files
            .write(key, &[bytes])
            .map_err(|error| Error::io(&format!("store the result of action {action}"), &error))?;
        // If all references are known, the first hit reads no file, and the result is linked to its blobs now.
        if let Some(references) = references {
            let loaded = Arc::new(LoadedResult::new(file.generation, result, references));
            cas.shared().results.insert((space.id(), action), loaded.clone(), loaded.memory());
            files.link(NewLinks { result: file, blobs_in: space.blobs(), of: loaded });
        }
        Ok(())
    }

    /// Every blob that it needs, if that is known without reading Trees and Directories.
    fn all_references(&self) -> Option<Vec<Digest>> {
        let direct = DirectReferences::of(&self.result, self.action.function()).ok()?;
        if direct.trees.is_empty() && direct.roots.is_empty() {
            return Some(direct.blobs);
        }
        self.references.clone()
    }
}
