//! What is to be uploaded, and how far a transfer is.

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

/// Where the bytes of a blob come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Memory.
    Bytes(Bytes),
    /// A local file, read when it is sent.
    File(PathBuf),
}

/// Blobs by digest; the same content is held once.
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

    /// The source of a blob.
    pub fn get(&self, digest: &Digest) -> Option<&Source> {
        self.0.get(digest)
    }

    /// Every digest.
    pub fn digests(&self) -> impl Iterator<Item = Digest> + '_ {
        self.0.keys().copied()
    }

    /// How many blobs there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// How far a transfer is, for whoever shows it; only counts, so that reading it never holds up the transfer.
#[derive(Debug, Default)]
pub struct Progress {
    done: AtomicU64,
    total: AtomicU64,
}

impl Progress {
    /// This many more bytes will be moved.
    pub fn expect(&self, bytes: u64) {
        self.total.fetch_add(bytes, Ordering::Relaxed);
    }

    /// This many more bytes have been moved.
    pub fn advance(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// One more blob: as far as it is, it counts in this. A transfer that starts again counts once what it moves twice.
    pub fn of_blob(self: &Arc<Self>) -> BlobProgress {
        BlobProgress { all: self.clone(), reached: AtomicU64::new(0) }
    }

    /// Bytes moved, and bytes to move in all as far as is known.
    pub fn bytes(&self) -> (u64, u64) {
        (self.done.load(Ordering::Relaxed), self.total.load(Ordering::Relaxed))
    }
}

/// How far the transfer of one blob is.
#[derive(Debug)]
pub struct BlobProgress {
    all: Arc<Progress>,
    reached: AtomicU64,
}

impl BlobProgress {
    /// The transfer has come to this byte of the blob.
    pub fn reach(&self, byte: u64) {
        let before = self.reached.fetch_max(byte, Ordering::Relaxed);
        self.all.advance(byte.saturating_sub(before));
    }
}
