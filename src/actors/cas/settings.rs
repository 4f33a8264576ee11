//! [`StoreSettings`], and the fixed bounds of the store.

use super::{index::LeaseTimes, volume::SyncPolicy};
use crate::{action::TimeoutPolicy, budget::Bounds};
use gorego_reapi::tree::{MAX_DIRECTORY_BYTES, MAX_MESSAGE_MEMORY};
use std::{path::PathBuf, time::Duration};

/// The settings of the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreSettings {
    /// Directory that the store owns; made if it does not exist.
    pub root: PathBuf,
    /// Bound on its bytes on disk, including uploads in progress.
    pub max_bytes: u64,
    /// Largest blob that is accepted (CAP-15).
    pub max_blob_bytes: u64,
    /// How long a broken upload is kept so that its client can resume it (BS-20).
    pub partial_upload_retention: Duration,
    /// The zstd level for blobs that are read compressed; one of [`gorego_reapi::compression::LEVELS`].
    pub zstd_level: i32,
    /// How long entries that a build has touched are protected from eviction after its last request.
    pub leases: LeaseTimes,
    /// Memory for the links of results to the blobs that they need.
    pub result_links_bytes: u64,
    /// When the store waits for the disk.
    pub sync: SyncPolicy,
    /// Which blobs are kept compressed; `None` for none.
    pub packing: Option<PackingSettings>,
    /// The rate of the scrub; 0 for no scrub.
    pub scrub_bytes_per_second: u64,
    /// The timeouts that an Action may request.
    pub timeouts: TimeoutPolicy,
}

/// Selects the blobs that are kept compressed, and limits the cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackingSettings {
    /// Only blobs that were not used for this many seconds are compressed. Uses are recorded to the hour.
    pub after_secs: u32,
    /// Only blobs of at least this many bytes are compressed.
    pub min_bytes: u64,
    /// Only blobs that get smaller by at least this percentage stay compressed.
    pub min_saving_percent: u32,
    /// The bound on the CPU time, as a share of one core.
    pub cpu_percent: u32,
}

impl PackingSettings {
    /// The largest compressed size that is worth keeping for `plain` bytes.
    pub(super) fn most_bytes(&self, plain: u64) -> u64 {
        let kept = u128::from(100u32.saturating_sub(self.min_saving_percent));
        u64::try_from(u128::from(plain) * kept / 100).unwrap_or(u64::MAX)
    }

    /// The pause between two passes over the index: a hundredth of the age, so that blobs wait only a little longer.
    pub(super) fn between_passes(&self) -> Duration {
        (Duration::from_secs(self.after_secs.into()) / 100).clamp(MIN_PASS_PAUSE, MAX_PASS_PAUSE)
    }
}

impl StoreSettings {
    /// Bounds on the room of unfinished uploads: half of a store of `max_bytes` in total, and half of that for one
    /// connection. Both are raised if necessary so that the largest blob always fits, also for a single connection,
    /// which gets at most 64/81 of the total.
    pub(super) fn upload_bounds(&self, max_bytes: u64) -> Bounds {
        let largest = self.max_blob_bytes.min(max_bytes).saturating_add(2 * ROOM_STEP_BYTES);
        let total =
            (max_bytes / 2).max(largest.saturating_add(largest / 64 * 17).saturating_add(ROOM_STEP_BYTES));
        Bounds { what: "bytes of unfinished uploads", total, connection: (total / 2).max(largest) }
    }
}

/// Blobs up to this size are read in one piece and hashed at every read. At this size, hashing costs about as much as
/// the rest of the request (50 us).
pub(super) const SMALL_BLOB_BYTES: u64 = 64 * 1024;

/// Bound on the time to look an action up: one index look-up and two small blobs.
pub(super) const RESOLVE_TIMEOUT: Duration = Duration::from_secs(60);

/// The largest Action or Command message that is read. In real builds, they are smaller than 1 MiB.
pub(super) const MAX_ACTION_BYTES: u64 = 16 * 1024 * 1024;

/// Bound on the memory of a decoded Action or Command. A system takes at most a few hundred thousand arguments.
pub(super) const MAX_ACTION_MEMORY: u64 = 64 * 1024 * 1024;

/// The memory that the largest stored message takes while it is read and decoded.
pub(super) const LARGEST_DECODED: u64 = MAX_DIRECTORY_BYTES + MAX_MESSAGE_MEMORY;

/// Memory for stored messages that are being read and decoded: enough for the largest one twice, so that one peer
/// leaves room for the others.
pub(super) const DECODED: Bounds = Bounds {
    what: "bytes of stored messages that are being decoded",
    total: 2 * LARGEST_DECODED,
    connection: LARGEST_DECODED,
};

/// Memory for blobs that jobs read at the same time, until the request that asked for them takes the bytes over. A job
/// that reads more takes all of it.
pub(super) const READS: Bounds = Bounds::shared("bytes of blobs that are being read", 128 * 1024 * 1024);

/// Memory for batches of blobs, and for results that are not small, that jobs write. A batch that is larger than the
/// bound of a connection takes as much as this.
pub(super) const BATCHES: Bounds = Bounds {
    what: "bytes of batches that are being written",
    total: 128 * 1024 * 1024,
    connection: 96 * 1024 * 1024,
};

/// Bound on the memory of directories that are read in one job.
pub(super) const DIRECTORIES_AT_ONCE: u64 = 64 * 1024 * 1024;

/// A tree counts as large if its decoded directories take more memory than this, which is enough for about 100,000
/// files.
pub(super) const SMALL_TREE_BYTES: usize = 24 * 1024 * 1024;

/// Large trees that are walked at the same time; others wait. One peer gets one of the two.
pub(super) const LARGE_TREES_MAX: u64 = 2;

/// A result that refers to more blobs is not linked to them: linking it would block the index for too long.
pub(super) const MAX_LINKS: usize = 16 * 1_024;

/// Trees up to this size together are read when a client stores a result that names them, so that the result is linked
/// to its blobs at once: some 10,000 files. Reading them takes about as long as the write of the result.
pub(super) const LINKED_TREE_BYTES: u64 = 1024 * 1024;

/// Maximum number of blobs that one result may refer to.
pub(super) const MAX_REFERENCES: usize = 2_000_000;

/// The largest Tree message that is read to check a result: about 500,000 files. A result with a larger one is a miss.
pub(super) const MAX_TREE_BYTES: u64 = 64 * 1024 * 1024;

/// Results whose blobs are hashed at the same time because they were not read since the start; other look-ups of such
/// results wait. Each check reads from the disk as fast as it can. A peer gets four of them, and one of its connections
/// three.
pub(super) const RESULT_CHECKS_MAX: u64 = 5;

/// Large blobs that are hashed at the same time: before their first byte is served, because they were not read since
/// the start, or to compare a pushed asset with its checksum. Others wait. Each keeps a thread busy for as long as the
/// disk needs. A peer gets 16 of them, and one of its connections 14.
pub(super) const COLD_READS_MAX: u64 = 18;

/// How often an upload of a blob that is already stored re-checks the stored file. Each check that finds a damaged file
/// drops it.
pub(super) const SOUND_TRIES: usize = 4;

/// Results of up to this size are checked and encoded on the thread of the request. Larger ones, whose contents may
/// have to be hashed, go to the blocking pool.
pub(super) const CHECKED_AT_ONCE_BYTES: usize = 64 * 1024;

/// How often a look-up of a result starts again because the result was replaced before its file could be read. Even two
/// retries take two updates within microseconds. After this many the answer is a miss, so that every look-up ends.
pub(super) const RESULT_READ_TRIES: usize = 16;

/// Memory for decoded directories, so that the actions of a build do not each decode their input roots.
pub(super) const DIRECTORY_MEMO_BYTES: usize = 64 * 1024 * 1024;

/// Memory for the input roots that were used last. A root above 32 MiB, about 150,000 files, is not cached, and is
/// built again from its decoded directories unless a staged tree has it.
pub(super) const INPUT_ROOT_MEMO_BYTES: usize = 128 * 1024 * 1024;

/// Memory for parsed actions. An action is looked up once or twice within a short time.
pub(super) const ACTION_MEMO_BYTES: usize = 16 * 1024 * 1024;

/// Blobs up to this size are cached when they are written: Actions, Commands and Directories are read right after their
/// upload, and almost all of them are smaller.
pub(super) const RECENT_BLOB_BYTES: usize = 4 * 1024;

/// Memory for these small blobs: enough for the actions of a few thousand queued operations.
pub(super) const RECENT_MEMO_BYTES: usize = 16 * 1024 * 1024;

/// Memory for decoded results with their reference lists.
pub(super) const RESULT_MEMO_BYTES: usize = 32 * 1024 * 1024;

/// Entries that are looked up before a call yields its thread (about 0.1 ms).
pub(super) const LOOKUPS_PER_TURN: usize = 1_024;

/// Entries that are looked up under one hold of the index's lock, during which the actor cannot change it.
pub(super) const LOOKUPS_PER_HOLD: usize = 256;

/// Entries that the actor changes under one hold of the index's lock, during which no look-up can run.
pub(super) const CHANGES_PER_HOLD: usize = 256;

/// Notes of look-ups, of either kind, after which the actor is woken.
pub(super) const NOTES_BATCH: usize = 1_024;

/// Maximum number of notes of look-ups, of either kind, that are kept for the actor.
pub(super) const NOTES_MAX: usize = 64 * 1_024;

/// Entries that are evicted ahead of need in one step. The next step follows when their files are deleted.
pub(super) const TRIM_BATCH: usize = 1_024;

/// A write that has reserved more waits for deletions while others still find room; see
/// [`super::index::Index::reserve_beside`].
pub(super) const SMALL_WRITE_BYTES: u64 = 8 * 1024 * 1024;

/// Jobs that delete files at the same time.
pub(super) const DELETERS: usize = 4;

/// Number of waiting files that one of these jobs deletes at a time.
pub(super) const DELETIONS_AT_ONCE: usize = 1_024;

/// Entries that are evicted in one step to relieve a full disk.
pub(super) const RELIEF_BATCH: usize = 16_384;

/// How long an action that failed for lack of disk space waits until the files of evicted entries are deleted.
pub(super) const RELIEF_WAIT: Duration = Duration::from_secs(5);

/// How often such an action checks whether it was cancelled. Cancellation is a flag without an event.
pub(super) const RELIEF_POLL: Duration = Duration::from_millis(20);

/// Interval between checks of the store's file system. A check takes a few microseconds.
pub(super) const LOOK_PACE: Duration = Duration::from_secs(1);

/// Interval between these checks while little of the file system is free.
pub(super) const LOOK_PACE_LOW: Duration = Duration::from_millis(100);

/// How long the store is read-only after a write has failed for lack of space, even if the file system seems to have
/// room: with a quota, only the next write shows whether there is room.
pub(super) const WRITES_AFTER: Duration = Duration::from_secs(5);

/// Data that the server keeps beside the store takes at most `1 / BESIDE_PART` of the store's limit. Otherwise one
/// action that writes much would empty the cache.
pub(super) const BESIDE_PART: u64 = 2;

/// Shortest time between two measurements of the data beside the store.
pub(super) const MEASURE_PACE: Duration = Duration::from_secs(1);

/// The pause after a measurement is this many times as long as the measurement took.
pub(super) const PAUSE_PER_MEASUREMENT: u32 = 19;

/// Minimum interval between log lines about results that are not served because leases fill the store.
pub(super) const FULL_LEASES_LOG_INTERVAL: Duration = Duration::from_secs(60);

/// Room for an upload is reserved at most this many bytes ahead.
pub(super) const ROOM_STEP_BYTES: u64 = 1024 * 1024;

/// Largest room that one message reserves. Between several such messages, other messages are handled. Evicting 8,192
/// entries of 4 KiB for it takes a few milliseconds.
pub(super) const RESERVE_STEP_BYTES: u64 = 32 * 1024 * 1024;

/// Room for the outputs of an action is reserved at most this many bytes ahead of storing them. The outputs are already
/// on disk.
pub(super) const ROOM_AHEAD_BYTES: u64 = 64 * 1024 * 1024;

/// Small outputs of an action are written together once they take this many bytes.
pub(super) const WRITTEN_TOGETHER_BYTES: u64 = 256 * 1024;

/// The smallest room that a worker reserves at a time. It is enough for the logs, outputs and result of a small action,
/// so that they cost one message. Unused room is given back when the action ends.
pub(super) const RUN_ROOM_BYTES: u64 = 256 * 1024;

/// In a small store, a worker reserves at most `1 / RUN_ROOM_PART` of it at a time instead.
pub(super) const RUN_ROOM_PART: u64 = 10_000;

/// Maximum number of files that become visible together, in about a millisecond. A larger batch becomes visible in
/// parts.
pub(super) const FILES_PER_COMMIT: usize = 4_096;

/// Broken uploads that are kept. Above this, the oldest one of the peer with the most is discarded. Each holds a file
/// open, and a process may open 1,024 by default.
pub(super) const MAX_PARTIAL_UPLOADS: usize = 256;

/// The bytes of an upload that may have arrived and are not yet hashed and written. Half of them are being written, and
/// half are waiting.
pub(super) const UPLOAD_BUFFER_BYTES: usize = 4 * 1024 * 1024;

/// Memory for compressed small blobs: enough for a few thousand batch reads.
pub(super) const PACKED_MEMO_BYTES: usize = 32 * 1024 * 1024;

/// Memory for the histories of larger blobs that were read compressed, at [`ZSTD_HISTORY_WEIGHT`] each.
pub(super) const ZSTD_HISTORY_BYTES: usize = 8 * 1024 * 1024;

/// Memory for the history of one blob.
pub(super) const ZSTD_HISTORY_WEIGHT: usize = 128;

/// A blob larger than `1 / ZSTD_FORM_PART` of the store gets no zstd form: the form would displace too many entries.
pub(super) const ZSTD_FORM_PART: u64 = 16;

/// Making a form is abandoned after this many bytes of the blob if nothing was saved by then.
pub(super) const ZSTD_PROBE_BYTES: u64 = 8 * 1024 * 1024;

/// The zstd level of blobs that are kept compressed. Higher levels take longer and save little: see
/// docs/performance.md.
pub(super) const PACK_LEVEL: i32 = 3;

/// Bounds on the pause between two searches for blobs to compress. A search examines every entry, which takes less than
/// a second for ten million of them.
const MIN_PASS_PAUSE: Duration = Duration::from_secs(1);
const MAX_PASS_PAUSE: Duration = Duration::from_secs(600);

/// How long compression at rest pauses while requests wait to compress or to hash, before it checks again.
pub(super) const LOAD_PAUSE: Duration = Duration::from_millis(100);

/// Pause after each MiB that is copied to reclaim the space of deleted blobs in the background, which bounds the rate
/// to about 50 MiB/s.
pub(super) const COMPACTION_PAUSE: Duration = Duration::from_millis(20);

/// Parts of the volume that one job compacts. A segment is at most 1/256 of a store, so the job can compact a small
/// store as a whole; in a large one, it reclaims more than the deletions that wait for it.
pub(super) const COMPACTIONS_AT_ONCE: usize = 256;

/// A job ends after this many parts that could not be compacted.
pub(super) const COMPACTION_FAILURES: usize = 4;

/// Parts of the volume that are compacted to relieve a full disk before entries are evicted.
pub(super) const COMPACTIONS_PER_RELIEF: usize = 16;

/// How often uses are written to disk and broken uploads are checked.
pub(super) const HOUSEKEEPING_INTERVAL: Duration = Duration::from_secs(10);

/// Messages that may wait for the actor before senders have to wait.
pub(super) const MAILBOX_CAPACITY: usize = 1_024;

/// How long an upload for which there is no room waits for another client's upload of the same blob.
pub(super) const TWIN_WAIT: Duration = Duration::from_secs(300);

/// How long such an upload waits for the next byte of the other upload. After either time, it starts and uses the
/// available space.
pub(super) const TWIN_STALL: Duration = Duration::from_secs(10);

/// How long a client that resumes an upload waits until its own earlier stream has ended.
pub(super) const PARK_WAIT: Duration = Duration::from_secs(2);
