//! [`PreparedResult`]: a result on its way into the store.

use crate::{
    actors::cas::{
        StoreShared,
        client::{Cas, Provenance},
        index::{EntryKind, FileId, Key},
        joint_writes::{JOINT_FILE_BYTES, JOINT_LINKS, SmallFile},
        linking::{NewLinks, NewResult},
        new_files::NewFiles,
        results::{self, DirectReferences, LoadedResult, Uploader},
    },
    instance::{Instance, InstanceId},
    result::SharedResult,
};
use bytes::Bytes;
use gorego_reapi::{
    digest::Digest,
    error::{Error, Result},
    proto::{gorego::StoredOrigin, reapi},
};
use std::{sync::Arc, time::SystemTime};

/// The most memory of a result that is written jointly. A decoded result can take many times the bytes of its file.
const JOINT_RESULT_MEMORY: u64 = 4 * JOINT_FILE_BYTES;

/// A result that was checked and encoded for its file.
pub(crate) struct PreparedResult {
    pub(super) action: Digest,
    pub(in crate::actors::cas) result: SharedResult,
    pub(super) origin: StoredOrigin,
    file: Bytes,
    /// Contents that were inlined; these blobs have to be stored first.
    pub(crate) contents: Vec<(Digest, Bytes)>,
    /// The digests that the result names directly.
    pub(in crate::actors::cas) direct: DirectReferences,
    /// Every blob that the result needs, if they are known although it names Trees or Directories.
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
        let (contents, direct) = results::normalise(&mut result, action.function(), uploader)?;
        let origin = results::origin(instance.name(), action, provenance, SystemTime::now());
        let (result, file) = (result.into(), Bytes::new());
        Ok(Self { action, result, origin, file, contents, direct, references: None })
    }

    /// Encodes the result for its file.
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
        let action = self.action;
        let SmallFile { key, content, result } = self.into_file(space);
        let file = files
            .write(key, &[content])
            .map_err(|error| Error::io(&format!("store the result of action {action}"), &error))?;
        if let Some(result) = result {
            files.link(result.written(file, cas.shared()));
        }
        Ok(())
    }

    /// Memory that it takes until it is written.
    pub(super) fn memory(&self) -> u64 {
        (self.file.len() + self.result.memory() + self.links() * size_of::<Digest>()) as u64
    }

    /// Whether the file may be written together with other files.
    pub(super) fn is_small(&self) -> bool {
        self.memory() <= JOINT_RESULT_MEMORY
            && self.file.len() as u64 <= JOINT_FILE_BYTES
            && self.links() <= JOINT_LINKS
    }

    /// The number of blobs that it will be linked to.
    fn links(&self) -> usize {
        self.references.as_ref().map_or(self.direct.blobs.len(), Vec::len)
    }

    /// The file of the result in this namespace.
    pub(super) fn into_file(self, space: &Instance) -> SmallFile {
        let Self { action, result, file, direct, references, .. } = self;
        let references = if direct.is_complete() { Some(direct.blobs) } else { references };
        let known = references.map(|references| KnownResult { blobs_in: space.blobs(), result, references });
        SmallFile {
            key: Key { digest: action, instance: space.id(), kind: EntryKind::Result },
            content: file,
            result: known.map(|known| Box::new(known) as Box<dyn NewResult>),
        }
    }
}

/// A result every blob of which is known. It is linked to them when it becomes visible, and its first hit reads no
/// file.
#[derive(Debug)]
struct KnownResult {
    blobs_in: InstanceId,
    result: SharedResult,
    references: Vec<Digest>,
}

impl NewResult for KnownResult {
    fn written(self: Box<Self>, file: FileId, store: &StoreShared) -> NewLinks {
        let Self { blobs_in, result, references } = *self;
        let loaded = Arc::new(LoadedResult::new(file.generation, result, references));
        store.results.insert((file.key.instance, file.key.digest), loaded.clone(), loaded.memory());
        NewLinks { result: file, blobs_in, of: loaded }
    }
}
