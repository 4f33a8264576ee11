//! The blobs to upload, and the progress of a transfer.

use bytes::Bytes;
use gorego_reapi::digest::{Digest, DigestFunction};
use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

/// The source of a blob's bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Bytes that are already in memory.
    Bytes(Bytes),
    /// A local file. It is read when it is sent.
    File(PathBuf),
}

/// Blobs by digest. Equal content is stored once.
#[derive(Debug, Clone, Default)]
pub struct BlobSet(HashMap<Digest, Source>);

impl BlobSet {
    /// Adds bytes and returns their digest.
    pub fn add_bytes(&mut self, bytes: impl Into<Bytes>) -> Digest {
        let bytes = bytes.into();
        let digest = DigestFunction::Sha256.digest(&bytes);
        self.0.entry(digest).or_insert(Source::Bytes(bytes));
        digest
    }

    /// Adds an encoded message and returns its digest.
    pub fn add_message(&mut self, message: &impl prost::Message) -> Digest {
        self.add_bytes(message.encode_to_vec())
    }

    /// Adds a file whose digest is known.
    pub fn add_file(&mut self, digest: Digest, path: PathBuf) {
        self.0.entry(digest).or_insert(Source::File(path));
    }

    /// The source of the blob with this digest, if it was added.
    pub fn get(&self, digest: &Digest) -> Option<&Source> {
        self.0.get(digest)
    }

    /// The digests of all blobs, in no particular order.
    pub fn digests(&self) -> impl Iterator<Item = Digest> + '_ {
        self.0.keys().copied()
    }

    /// The number of distinct blobs.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether the set contains no blobs.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// The progress of a transfer. It consists only of counters, so reading it never delays the transfer.
#[derive(Debug, Default)]
pub struct Progress {
    done: AtomicU64,
    total: AtomicU64,
}

impl Progress {
    /// Adds bytes to the expected total.
    pub fn expect(&self, bytes: u64) {
        self.total.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Adds bytes to the number transferred.
    pub fn advance(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Progress of one more blob that counts towards this total. If the blob's transfer restarts, repeated bytes count
    /// once.
    pub fn of_blob(self: &Arc<Self>) -> BlobProgress {
        BlobProgress { all: self.clone(), reached: AtomicU64::new(0) }
    }

    /// Number of bytes transferred, and the total that is expected so far.
    pub fn bytes(&self) -> (u64, u64) {
        (self.done.load(Ordering::Relaxed), self.total.load(Ordering::Relaxed))
    }
}

/// The progress of one blob.
#[derive(Debug)]
pub struct BlobProgress {
    all: Arc<Progress>,
    reached: AtomicU64,
}

impl BlobProgress {
    /// Records that the transfer has reached this offset of the blob.
    pub fn reach(&self, byte: u64) {
        let before = self.reached.fetch_max(byte, Ordering::Relaxed);
        self.all.advance(byte.saturating_sub(before));
    }
}
