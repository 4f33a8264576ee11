//! The argument and answer types of the index.

use crate::instance::InstanceId;
use gorego_reapi::{digest::Digest, error::Error};

/// The kind of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum EntryKind {
    /// A blob, under its own digest.
    Blob,
    /// An action result, under the digest of its action.
    Result,
    /// The zstd form of a blob, under the digest of the blob. It only saves work, and nothing depends on it.
    Zstd,
}

impl EntryKind {
    pub const ALL: [Self; 3] = [Self::Blob, Self::Result, Self::Zstd];
}

/// The key of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    /// Digest of the blob, or of the action.
    pub digest: Digest,
    /// The namespace that it is stored in (GEN-15).
    pub instance: InstanceId,
    pub kind: EntryKind,
}

/// The identity of one stored file. A later upload of the same blob is another file of the same entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileId {
    pub key: Key,
    /// Number of the file, unique in the store and never used again; 0 for none.
    pub generation: u64,
}

impl FileId {
    /// The numbers of files that are not in segments.
    pub(crate) const SEQUENCES: std::ops::Range<u64> = 1..1 << 62;
    /// The bits of a generation that tell the kind of the file, and their value for a packed file.
    const KIND_BITS: u64 = 3 << 62;
    const PACKED: u64 = 1 << 62;

    /// The generation of the packed file with this number.
    pub(crate) fn packed_generation(sequence: u64) -> u64 {
        Self::PACKED | sequence
    }

    /// Whether the volume keeps it compressed.
    pub(crate) fn is_packed(&self) -> bool {
        Self::is_packed_generation(self.generation)
    }

    /// Whether a file with this generation is packed.
    pub(super) fn is_packed_generation(generation: u64) -> bool {
        generation & Self::KIND_BITS == Self::PACKED
    }

    /// Whether it is a file of its own that is not compressed.
    pub(super) fn is_plain(&self) -> bool {
        self.generation & Self::KIND_BITS == 0
    }

    /// The number of a file that is not in a segment.
    pub(crate) fn sequence(&self) -> u64 {
        self.generation & !Self::KIND_BITS
    }
}

/// A file that was evicted or replaced and is to be deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Victim {
    /// The file to delete.
    pub file: FileId,
    /// Bytes that it takes on disk.
    pub bytes: u64,
}

/// A file that was found at start.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Recovered {
    /// The identity of the file.
    pub file: FileId,
    /// Bytes that it takes on disk.
    pub bytes: u64,
    /// Seconds since 1970 of the last recorded use.
    pub touched: u32,
}

/// Refers to an entry without its key. It is stale once the entry's file is replaced or removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EntryRef {
    pub(super) slot: u32,
    pub(super) generation: u64,
}

impl EntryRef {
    /// The slot of the entry in the index.
    pub fn slot(self) -> u32 {
        self.slot
    }
}

/// Inode number and change time of a file. No user can restore either of them. The modification time is not needed,
/// because setting it moves the change time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    inode: u64,
    changed: i64,
}

impl Stamp {
    /// The content is not verified and is hashed before it is served.
    pub const UNTRUSTED: Self = Self { inode: 0, changed: i64::MIN };

    /// The stamp of every file that is checked whenever it is read. It was verified when it was written or first read.
    pub const CHECKED_WHEN_READ: Self = Self { inode: 0, changed: 0 };

    /// The stamp of a file with this inode number and this change time, in nanoseconds since 1970.
    pub fn new(inode: u64, changed: i64) -> Self {
        Self { inode, changed }
    }

    /// The change time, in nanoseconds since 1970.
    pub fn changed(self) -> i64 {
        self.changed
    }

    /// The stamp in the compact form that the index keeps.
    pub(super) fn seal(self) -> Seal {
        if self == Self::UNTRUSTED {
            return Seal::UNTRUSTED;
        }
        // The factor is odd, so that two stamps with the same inode or the same change time never have the same seal.
        let mixed = self.inode.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ self.changed as u64;
        Seal(mixed.max(1))
    }
}

/// The stamp of a file when its content was last verified, in half the memory. It can only be compared with another
/// stamp. Two stamps that differ both in the inode and in the change time have the same seal with a probability of
/// 2^-64.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seal(u64);

impl Seal {
    /// The seal of [`Stamp::UNTRUSTED`].
    pub const UNTRUSTED: Self = Self(0);
}

impl PartialEq<Stamp> for Seal {
    fn eq(&self, stamp: &Stamp) -> bool {
        *self == stamp.seal()
    }
}

impl PartialEq<Seal> for Stamp {
    fn eq(&self, seal: &Seal) -> bool {
        self.seal() == *seal
    }
}

/// The result of a successful look-up.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FoundEntry {
    pub at: EntryRef,
    /// The file of the entry.
    pub file: FileId,
    /// The stamp of its file when its content was last verified.
    pub stamp: Seal,
    /// The use recorded on disk is out of date. Set at most once an hour for an entry.
    pub touch_due: bool,
    /// Its place in the order of use is out of date; [`super::Index::settle`] should be called.
    pub settle_due: bool,
}

/// A use of an entry by a look-up that only asks whether the entry exists.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NotedUse {
    pub at: EntryRef,
    /// The use recorded on disk is out of date. Set at most once an hour for an entry.
    pub touch_due: bool,
    /// Its place in the order of use is out of date; [`super::Index::settle`] should be called.
    pub settle_due: bool,
}

/// A result that was found by walking the index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FoundResult {
    pub at: EntryRef,
    /// The file of the entry.
    pub file: FileId,
}

/// Room that was reserved for a write.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Grant {
    /// Files that were evicted for it.
    pub victims: Vec<Victim>,
    /// The room is free once [`super::Index::bytes_deleted`] has reached this.
    pub after_deletions: u64,
}

/// The limit of the store on its file system, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StoreLimit {
    /// The most that the store may take now.
    pub bytes: u64,
    /// The most that it could take if no other programs took space on the file system.
    pub most: u64,
}

/// There is not enough room, even if everything evictable is evicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shortage {
    pub wanted: u64,
    /// Bytes held by running actions and open readers.
    pub held: u64,
    /// Bytes leased by builds. Some of them may be held too.
    pub leased: u64,
    /// Bytes reserved for uploads in progress.
    pub reserved: u64,
    /// Bytes that the volume takes in addition to those of the entries. They include deleted blobs that are not
    /// reclaimed yet.
    pub overhead: u64,
    /// The size limit of the store now, in bytes.
    pub limit: u64,
    /// The size limit if no other programs took space on the file system of the store.
    pub most: u64,
}

/// Counts and bytes of an index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Totals {
    /// Number of blobs, including those that are kept compressed.
    pub blobs: u64,
    /// Number of action results.
    pub results: u64,
    /// Number of zstd forms.
    pub zstd_forms: u64,
    /// Number of blobs that are kept compressed.
    pub packed_blobs: u64,
    /// Bytes of these blobs before compression.
    pub packed_content: u64,
    /// The part of `used` that these blobs take.
    pub packed_used: u64,
    /// Bytes on disk of all entries.
    pub used: u64,
    /// The part of `used` that running actions and open readers hold.
    pub held: u64,
    /// The part of `used` that is leased to builds.
    pub leased: u64,
    /// The part of `used` that is held or leased, or both.
    pub pinned: u64,
    /// Bytes reserved for uploads in progress.
    pub reserved: u64,
    /// Bytes of files that are being deleted.
    pub deleting: u64,
    /// Bytes on disk that belong to no entry, such as the bytes of deleted blobs that are not reclaimed yet.
    pub overhead: u64,
    /// The bound on `used`, `reserved` and `overhead` together, in bytes.
    pub limit: u64,
}

/// Counts of the events in an index since the start of the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tally {
    /// Entries that were evicted.
    pub evicted: u64,
    /// The bytes that they took on disk.
    pub evicted_bytes: u64,
    /// Results that were dropped because one of their blobs was evicted or dropped.
    pub followed: u64,
    /// Entries that were dropped because their files were damaged or gone.
    pub damaged: u64,
    /// Entries that were lost while they were leased to a build.
    pub broken_promises: u64,
    /// Results that were not served, because leases left no room for their blobs.
    pub refused_results: u64,
    /// Rows of leases that were taken from builds with more than their share.
    pub withdrawn_leases: u64,
}

impl From<Shortage> for Error {
    fn from(shortage: Shortage) -> Self {
        let Shortage { wanted, held, leased, reserved, overhead, limit, most } = shortage;
        let message = format!(
            "no room for {wanted} bytes: of the store's {limit} bytes, {held} are in use by running actions and open \
             readers, {leased} are leased to builds (cache.build_lease), {reserved} are promised to other uploads, and \
             {overhead} are taken by deleted blobs that are not reclaimed yet and by files beside the blobs (max_size_gb \
             raises the limit, as far as other programs leave space on the disk)"
        );
        // A blob that does not fit into an empty store will not fit later either.
        Self::Exhausted {
            message,
            retry_after: (wanted <= most).then_some(gorego_reapi::error::DISK_FULL_RETRY),
        }
    }
}
