//! [`Cas`]: the way to the store for RPC handlers and worker threads.

use super::blob::{BlobReader, BlobWriter};
use crate::{
    digest::Digest,
    error::Result,
    instance::Instance,
    proto::reapi,
    tree::{Directory, InputTree},
};
use bytes::Bytes;
use std::{fs::File, path::Path, sync::Arc};

/// The answer to [`Cas::begin_upload`].
#[derive(Debug)]
pub enum Upload {
    /// The blob is stored; nothing needs to be sent (BS-24).
    Present,
    /// Send from [`BlobWriter::committed`] on.
    Writer(Box<BlobWriter>),
}

/// How far an upload is (BS-31, BS-32).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UploadStatus {
    /// Bytes that need not be sent again.
    pub committed: u64,
    /// The blob is stored.
    pub complete: bool,
}

/// Who made a result; kept beside it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Provenance {
    /// The worker that ran the action; empty when a client uploaded the result.
    pub worker: String,
    /// The tool invocation that asked for it; empty when unknown.
    pub tool_invocation_id: String,
}

/// An input root whose every blob is leased: none of it can be evicted while this is held.
#[derive(Debug)]
pub struct StagedInputs {
    /// Its directories.
    pub tree: InputTree,
}

impl StagedInputs {
    /// Copies a file of the tree to a new file at `name` in the directory `parent`, with these permission bits; a clone where
    /// the file system can. Never a hard link: an action may write its inputs, nobody else sees it (EXE-43). Blocks.
    ///
    /// # Errors
    /// `MissingBlobs` when the stored file turns out to be damaged; `Exhausted` when the disk is full.
    pub fn materialise(&self, digest: &Digest, parent: &File, name: &str, mode: u32) -> Result<()> {
        let _ = (digest, parent, name, mode);
        todo!()
    }
}

/// A handle to the store; cheap to clone, usable from any thread. Methods that are not `async` block and are for worker
/// threads only.
#[derive(Debug, Clone)]
pub struct Cas {}

#[allow(clippy::unused_async, unused_variables)]
impl Cas {
    /// Those of the digests that are not stored, each once; the others are renewed (CAS-01..04).
    ///
    /// # Errors
    /// `Unavailable` when the server is going down.
    pub async fn find_missing(&self, instance: &Instance, digests: Vec<Digest>) -> Result<Vec<Digest>> {
        todo!()
    }

    /// Opens a blob.
    ///
    /// # Errors
    /// `NotFound` when it is not stored, also when its file is damaged (it is dropped then).
    pub async fn open(&self, instance: &Instance, digest: Digest) -> Result<BlobReader> {
        todo!()
    }

    /// Reads whole blobs, in the order asked for; duplicates are fine. For small blobs: the caller bounds the sum.
    ///
    /// # Errors
    /// Each blob's own; the call's when the server is going down.
    pub async fn read_many(&self, instance: &Instance, digests: Vec<Digest>) -> Result<Vec<Result<Bytes>>> {
        todo!()
    }

    /// Stores whole blobs, each checked against its digest (CAS-09..13); duplicates are fine.
    ///
    /// # Errors
    /// Each blob's own; the call's when the server is going down.
    pub async fn write_many(
        &self,
        instance: &Instance,
        blobs: Vec<(Digest, Bytes)>,
    ) -> Result<Vec<Result<()>>> {
        todo!()
    }

    /// Starts an upload, or goes on with one that broke: `name` is the whole resource name (BS-06), `offset` the first
    /// `write_offset`. Offset 0 discards what an earlier attempt left (BS-20).
    ///
    /// # Errors
    /// `Invalid` when the blob is too large or `offset` is not where that upload stands; `Exhausted` when there is no room.
    pub async fn begin_upload(
        &self,
        instance: &Instance,
        name: &str,
        digest: Digest,
        offset: u64,
    ) -> Result<Upload> {
        todo!()
    }

    /// How far an upload is; unknown ones are at 0 (BS-32).
    ///
    /// # Errors
    /// `Unavailable` when the server is going down.
    pub async fn query_upload(
        &self,
        instance: &Instance,
        name: &str,
        digest: Digest,
    ) -> Result<UploadStatus> {
        todo!()
    }

    /// A stored result whose every blob is present and was just renewed (AC-03, AC-04); a result that lacks one is dropped.
    ///
    /// # Errors
    /// `Unavailable` when the server is going down.
    pub async fn get_result(
        &self,
        instance: &Instance,
        action: Digest,
    ) -> Result<Option<Arc<reapi::ActionResult>>> {
        todo!()
    }

    /// Stores a result, replacing an earlier one atomically (AC-08). Inlined contents become blobs first (AC-05);
    /// execution metadata is always present afterwards (AC-09). Returns what was stored.
    ///
    /// # Errors
    /// `Invalid` for digests or output paths that are malformed, absolute, escaping or doubled (AC-10).
    pub async fn put_result(
        &self,
        instance: &Instance,
        action: Digest,
        result: reapi::ActionResult,
        provenance: Provenance,
    ) -> Result<Arc<reapi::ActionResult>> {
        todo!()
    }

    /// Directories by digest, in the order asked for; `None` for those that are not stored.
    ///
    /// # Errors
    /// `Invalid` when a blob is no Directory.
    pub async fn directories(
        &self,
        instance: &Instance,
        digests: &[Digest],
    ) -> Result<Vec<Option<Arc<Directory>>>> {
        todo!()
    }

    /// Reads an input root and leases every blob of it, from a worker thread.
    ///
    /// # Errors
    /// `MissingBlobs` with all that is missing (EXE-26); `Invalid` when a Directory is malformed.
    pub fn stage_inputs(&self, instance: &Instance, root: Digest) -> Result<StagedInputs> {
        todo!()
    }

    /// Stores a file that an action left behind, from a worker thread: takes the file itself over when nobody else can reach
    /// it (one link, ours, same file system), copies it otherwise. `file` is open for reading, `parent`/`name` is where it
    /// lies. Returns its digest.
    ///
    /// # Errors
    /// `Exhausted` when there is no room; `Invalid` when it is larger than the largest blob allowed.
    pub fn store_output(&self, instance: &Instance, parent: &File, name: &str, file: File) -> Result<Digest> {
        todo!()
    }

    /// Stores bytes at hand, from a worker thread.
    ///
    /// # Errors
    /// `Exhausted` when there is no room.
    pub fn store_bytes(&self, instance: &Instance, bytes: Vec<u8>) -> Result<Digest> {
        todo!()
    }

    /// [`Cas::put_result`] from a worker thread.
    ///
    /// # Errors
    /// As there.
    pub fn record_result(
        &self,
        instance: &Instance,
        action: Digest,
        result: reapi::ActionResult,
        provenance: Provenance,
    ) -> Result<()> {
        todo!()
    }
}

/// Where a store file lies; for tests and tools.
pub fn _unused(_: &Path) {}
