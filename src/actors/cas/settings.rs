//! [`StoreSettings`]: what the store is told from outside, and the bounds that are its own.

use crate::{action::TimeoutPolicy, budget::Bounds};
use gorego_reapi::tree::{MAX_DIRECTORY_BYTES, MAX_MESSAGE_MEMORY};
use std::{path::PathBuf, time::Duration};

/// What the store is told at start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreSettings {
    /// Directory that the store owns; made if it does not exist.
    pub root: PathBuf,
    /// Bound on its bytes on disk, uploads in progress included.
    pub max_bytes: u64,
    /// Largest blob that is accepted (CAP-15).
    pub max_blob_bytes: u64,
    /// How long the bytes of a broken upload are kept for its client to go on (BS-20).
    pub partial_upload_retention: Duration,
    /// How hard blobs are compressed for those who read them compressed; one of [`gorego_reapi::compression::LEVELS`].
    pub zstd_level: i32,
    /// Which timeouts an Action may ask for.
    pub timeouts: TimeoutPolicy,
}

impl StoreSettings {
    /// How much of the store unfinished uploads may hold: half of it together, and one connection half of that; but the largest
    /// blob always fits, even if nobody but its client holds anything (a connection alone may have 64/81 of all).
    pub(super) fn upload_bounds(&self) -> Bounds {
        let largest = self.max_blob_bytes.min(self.max_bytes).saturating_add(2 * ROOM_STEP_BYTES);
        let total = (self.max_bytes / 2)
            .max(largest.saturating_add(largest / 64 * 17).saturating_add(ROOM_STEP_BYTES));
        Bounds { what: "bytes of unfinished uploads", total, connection: (total / 2).max(largest) }
    }
}

/// Blobs up to this size are read in one piece and hashed at every read: at this size hashing costs about as much as the
/// rest of the request (50 us).
pub const SMALL_BLOB_BYTES: u64 = 64 * 1024;

/// How long it may take to look an action up: one index look-up and two small blobs.
pub const RESOLVE_TIMEOUT: Duration = Duration::from_secs(60);

/// Largest Action or Command message that is read. Those of real builds are below 1 MiB.
pub const MAX_ACTION_BYTES: u64 = 16 * 1024 * 1024;

/// Most memory that an Action or a Command may take once it is decoded. A system takes a few hundred thousand arguments at most.
pub const MAX_ACTION_MEMORY: u64 = 64 * 1024 * 1024;

/// What the largest stored message takes while it is read and decoded.
pub const LARGEST_DECODED: u64 = MAX_DIRECTORY_BYTES + MAX_MESSAGE_MEMORY;

/// Memory for stored messages that are being read and decoded: the largest one for one peer, and as much for the others.
pub const DECODED: Bounds = Bounds {
    what: "bytes of stored messages that are being decoded",
    total: 2 * LARGEST_DECODED,
    connection: LARGEST_DECODED,
};

/// Memory for which directories are read in one go.
pub const DIRECTORIES_AT_ONCE: u64 = 64 * 1024 * 1024;

/// Decoded directories of one tree that are held without a large place: those of some 100,000 files.
pub const SMALL_TREE_BYTES: usize = 24 * 1024 * 1024;

/// Larger trees that are walked at the same time; others wait. One peer gets one of the two.
pub const LARGE_TREES_MAX: u64 = 2;

/// Most blobs that one result may refer to.
pub const MAX_REFERENCES: usize = 2_000_000;

/// Largest Tree message that is read to check a result. About 500,000 files; a result with a larger one is a miss.
pub const MAX_TREE_BYTES: u64 = 64 * 1024 * 1024;

/// Results whose blobs are hashed at the same time, because nobody has read them since the start; other lookups of such results
/// wait. Each reads from the disk as fast as it can. A peer gets four of them, and one of its connections three.
pub const RESULT_CHECKS_MAX: u64 = 5;

/// Large blobs that are hashed at the same time before their first byte is served, because nobody has read them since the start;
/// other readers of such blobs wait. Each keeps a thread busy for as long as its disk needs. A peer gets 16 of them, and one of
/// its connections 14.
pub const COLD_READS_MAX: u64 = 18;

/// How often an upload that is told "stored already" looks whether that is so. Each look that finds a bad file drops it.
pub const SOUND_TRIES: usize = 4;

/// How often a lookup starts again because the result was replaced before its file could be read. Twice in a row takes two
/// updates within microseconds; after so many the answer is a miss, so that every lookup ends.
pub const RESULT_READ_TRIES: usize = 16;

/// Memory for decoded directories, so that the input roots of a build are not decoded for each of its actions.
pub const DIRECTORY_MEMO_BYTES: usize = 64 * 1024 * 1024;

/// Memory for input roots that were walked and wait for their worker. One of more than 4 MiB, some 20,000 files, is not kept and
/// is put together again from its decoded directories.
pub const INPUT_ROOT_MEMO_BYTES: usize = 128 * 1024 * 1024;

/// Memory for parsed actions. An action is looked up once or twice in its life, soon after one another.
pub const ACTION_MEMO_BYTES: usize = 16 * 1024 * 1024;

/// Blobs up to this size are kept in memory for a while after they were written: Actions, Commands and Directories are read
/// right after their upload, and almost all of them are smaller.
pub const RECENT_BLOB_BYTES: usize = 4 * 1024;

/// Memory for such blobs: enough for the actions of some thousand queued operations.
pub const RECENT_MEMO_BYTES: usize = 16 * 1024 * 1024;

/// Memory for decoded results with their reference lists.
pub const RESULT_MEMO_BYTES: usize = 32 * 1024 * 1024;

/// Entries that are looked up before a call lets others run on its thread (about 0.1 ms).
pub const LOOKUPS_PER_TURN: usize = 1_024;

/// Entries that are looked up while the actor cannot change the index.
pub const LOOKUPS_PER_HOLD: usize = 256;

/// Notes of look-ups, of either kind, after which the actor is told that there is work.
pub const NOTES_BATCH: usize = 1_024;

/// Notes of look-ups, of either kind, that are kept for the actor.
pub const NOTES_MAX: usize = 64 * 1_024;

/// Entries evicted ahead of need in one go.
pub const TRIM_BATCH: usize = 1_024;

/// Entries evicted in one go to relieve a full disk.
pub const RELIEF_BATCH: usize = 16_384;

/// How long an action that failed for lack of room waits for the files of evicted entries to be deleted.
pub const RELIEF_WAIT: Duration = Duration::from_secs(5);

/// How often that action looks whether it was cancelled.
pub const RELIEF_POLL: Duration = Duration::from_millis(20);

/// How often at most the log says that others fill the disk.
pub const FULL_DISK_LOG_INTERVAL: Duration = Duration::from_secs(60);

/// Room for bytes that arrive is reserved at most this much ahead of them.
pub const ROOM_STEP_BYTES: u64 = 1024 * 1024;

/// Room that is found in one go: for more, other messages are handled in between. As many entries of 4 KiB, 8,192, are evicted
/// in some milliseconds.
pub const RESERVE_STEP_BYTES: u64 = 32 * 1024 * 1024;

/// Room for the outputs of an action is reserved at most this much ahead of writing them. They are on disk already.
pub const ROOM_AHEAD_BYTES: u64 = 64 * 1024 * 1024;

/// What a worker takes at least when it takes room: enough for the logs, outputs and result of a small action, so that they cost
/// one message. What it does not need, it gives back when the action ends ...
pub const RUN_ROOM_BYTES: u64 = 256 * 1024;

/// ... and in a small store no more than this part of all.
pub const RUN_ROOM_PART: u64 = 10_000;

/// Files that become visible together at most, in about a millisecond; those of a larger batch do so in parts.
pub const FILES_PER_COMMIT: usize = 4_096;

/// Broken uploads that are kept; above it the oldest goes of the peer that has most. Each holds a file open, and a process has
/// 1,024 by default.
pub const MAX_PARTIAL_UPLOADS: usize = 256;

/// How far hashing and writing may be behind the network, for each upload: half of it being written, half waiting.
pub const UPLOAD_BUFFER_BYTES: usize = 4 * 1024 * 1024;

/// Small blobs compressed, kept in memory: those of a few thousand batch reads.
pub const PACKED_MEMO_BYTES: usize = 32 * 1024 * 1024;

/// Memory for which larger blobs were read compressed, at [`ZSTD_HISTORY_WEIGHT`] each.
pub const ZSTD_HISTORY_BYTES: usize = 8 * 1024 * 1024;

/// What remembering one blob takes.
pub const ZSTD_HISTORY_WEIGHT: usize = 128;

/// A blob larger than this part of the store gets no zstd form: it would push out too much.
pub const ZSTD_FORM_PART: u64 = 16;

/// Bytes of a blob after which it is given up to make a form of it, if nothing was saved by then.
pub const ZSTD_PROBE_BYTES: u64 = 8 * 1024 * 1024;

/// How often waiting uses are written down and broken uploads are looked through.
pub const HOUSEKEEPING_INTERVAL: Duration = Duration::from_secs(10);

/// Messages that may wait for the actor before senders have to wait too.
pub const MAILBOX_CAPACITY: usize = 1_024;

/// How long a client for whose upload there is no room waits for another client's upload of the same blob ...
pub const TWIN_WAIT: Duration = Duration::from_secs(300);

/// ... and how long it waits for the next byte of that one. After either it goes ahead, as far as there is room.
pub const TWIN_STALL: Duration = Duration::from_secs(10);

/// How long a client that goes on with an upload waits for its own earlier stream to let go of it.
pub const PARK_WAIT: Duration = Duration::from_secs(2);
