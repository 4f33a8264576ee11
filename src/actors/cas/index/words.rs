//! The words in which the index is asked and answers.

use crate::instance::InstanceId;
use gorego_reapi::{digest::Digest, error::Error};

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// A blob, under its own digest.
    Blob,
    /// An action result, under the digest of its action.
    Result,
    /// The zstd form of a blob, under the digest of the blob. Nobody asks whether it is stored: it saves work, no more.
    Zstd,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 3] = [Self::Blob, Self::Result, Self::Zstd];
}

/// The name of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    /// Digest of the blob, or of the action.
    pub digest: Digest,
    /// The namespace (GEN-15).
    pub instance: InstanceId,
    /// What it is.
    pub kind: Kind,
}

/// One stored file: an incarnation of an entry. A later upload of the same blob is another file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileId {
    /// The entry.
    pub key: Key,
    /// Number of the file, unique in the store and never used again; 0 for none.
    pub generation: u64,
}

/// A file that the index has let go and that is to be deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Victim {
    /// The file.
    pub file: FileId,
    /// Bytes that it takes on disk.
    pub bytes: u64,
}

/// Names an entry without its key; stale once the entry's file is replaced or gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EntryRef {
    pub(super) slot: u32,
    pub(super) generation: u64,
}

/// Inode number and change time of a file, recorded when its content was last known to be right. No user can restore either;
/// the modification time is left out because to set it moves the change time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    inode: u64,
    changed: i64,
}

impl Stamp {
    /// The content is not known to be right: it is hashed before it is served.
    pub const UNTRUSTED: Self = Self { inode: 0, changed: i64::MIN };

    /// The stamp of a file with this inode number and this change time, in nanoseconds since 1970.
    pub fn new(inode: u64, changed: i64) -> Self {
        Self { inode, changed }
    }

    /// The change time.
    pub fn changed(self) -> i64 {
        self.changed
    }
}

/// What the index says of an entry that it has.
#[derive(Debug, Clone, Copy)]
pub struct Found {
    /// The entry.
    pub at: EntryRef,
    /// Its file.
    pub file: FileId,
    /// What its file looked like when its content was last known to be right.
    pub stamp: Stamp,
    /// Its recency on disk is out of date; set at most once an hour for an entry.
    pub touch_due: bool,
    /// Its place in the order of use is out of date: [`super::Index::settle`] should be told.
    pub settle_due: bool,
}

/// Room for a write.
#[derive(Debug, PartialEq, Eq)]
pub struct Grant {
    /// What had to go for it.
    pub victims: Vec<Victim>,
    /// The room is free once [`super::Index::bytes_deleted`] has reached this.
    pub after_deletions: u64,
}

/// There is no room, whatever is evicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shortage {
    /// Bytes asked for.
    pub wanted: u64,
    /// Bytes that running actions and open readers hold.
    pub leased: u64,
    /// Bytes promised to uploads in progress.
    pub reserved: u64,
    /// Bytes that the store may take.
    pub limit: u64,
}

/// The sums of an index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Totals {
    /// Blobs.
    pub blobs: u64,
    /// Action results.
    pub results: u64,
    /// zstd forms of blobs.
    pub zstd_forms: u64,
    /// Bytes on disk of all of them.
    pub used: u64,
    /// The part of `used` that is leased.
    pub leased: u64,
    /// Bytes promised to uploads in progress.
    pub reserved: u64,
    /// Bytes of files that are being deleted.
    pub deleting: u64,
    /// Bytes that `used` and `reserved` together may reach.
    pub limit: u64,
}

impl From<Shortage> for Error {
    fn from(shortage: Shortage) -> Self {
        let Shortage { wanted, leased, reserved, limit } = shortage;
        let message = format!(
            "no room for {wanted} bytes: of the store's {limit} bytes, {leased} are in use by running actions and open \
             readers and {reserved} are promised to other uploads (max_size_gb raises the limit)"
        );
        // What does not fit an empty store will not fit later.
        Self::Exhausted {
            message,
            retry_after: (wanted <= limit).then_some(gorego_reapi::error::DISK_FULL_RETRY),
        }
    }
}
