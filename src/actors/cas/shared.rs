//! [`StoreShared`]: the state that the actor of the store and its handles share.
//!
//! Everything in it can be used from any thread. Only the actor changes the index behind `view`. Caches have values that never
//! change, and do not say what is stored.

use super::{
    deletions::Deletions,
    forms::{
        chunks::ChunkWork,
        zstd_form::{Encoders, History},
    },
    index::Index,
    joint_writes::JointWrites,
    memo::Memo,
    relief::RelievedFirst,
    resolve::ParsedAction,
    results::{LARGE_RESULTS, LARGEST_RESULT, LoadedResult},
    scrub::ScrubCounts,
    settings::{self, StoreSettings},
    store_disk::StoreDisk,
    trees::{known_roots::KnownRoots, walk::Walks},
    uploads::{decoders::DECODERS, unwritten::RECEIVED},
    view::View,
    volume::Volume,
};
use crate::{
    budget::{Bounds, Budget},
    instance::InstanceId,
    nondeterminism::NonDeterminismReports,
};
use bytes::Bytes;
use gorego_reapi::{digest::Digest, tree::Directory};
use std::{
    sync::{Arc, OnceLock},
    thread,
};
use tokio::{
    runtime::Handle,
    sync::{Mutex, Semaphore},
};

/// Memory of a cached blob beyond its bytes: its key, its handle and its slot in a map.
const RECENT_OVERHEAD_BYTES: usize = 160;

/// The view of the index, budgets, and caches of immutable values.
#[derive(Debug)]
pub(crate) struct StoreShared {
    pub(super) settings: StoreSettings,
    /// The index of what is stored. Only the actor changes it.
    pub(super) view: View,
    pub(super) volume: Box<dyn Volume>,
    /// The file system of the volume.
    pub(super) disk: StoreDisk,
    /// Files that are being deleted in the background.
    pub(super) deletions: Deletions,
    pub(super) runtime: Handle,
    pub(super) directories: Memo<Digest, Arc<Directory>>,
    pub(super) input_roots: KnownRoots,
    pub(super) actions: Memo<(InstanceId, Digest), Arc<ParsedAction>>,
    pub(super) results: Memo<(InstanceId, Digest), Arc<LoadedResult>>,
    /// Small blobs as they were written. An entry here does not mean that the blob is stored: only the index says that.
    pub(super) recent: Memo<(InstanceId, Digest), Bytes>,
    /// Small blobs as zstd streams; `None` for blobs that do not get smaller.
    pub(super) packed: Memo<(InstanceId, Digest), Option<Bytes>>,
    /// The history of larger blobs that were read compressed and have no form.
    pub(super) zstd_history: Memo<(InstanceId, Digest), History>,
    pub(super) encoders: Encoders,
    /// Limits the jobs that compress at the same time.
    pub(super) encoding: Budget,
    /// Permit to make a zstd form. Nobody waits for it: a read that does not get it leaves the form to a later read.
    pub(super) form_turn: Arc<Semaphore>,
    /// Limits the results whose blobs are checked at the same time.
    pub(super) result_checks: Budget,
    /// Limits the large blobs that are hashed at the same time before they are read.
    pub(super) cold_reads: Budget,
    /// Disk space held by clients' unfinished uploads.
    pub(super) upload_budget: Budget,
    /// Memory for bytes that clients sent and that are not written yet.
    pub(super) received: Budget,
    pub(super) joint_writes: JointWrites,
    /// Memory for stored messages that are being decoded.
    pub(super) decoded: Budget,
    /// Memory for results that are not small, until their requests have room for the answer.
    pub(super) large_results: Budget,
    /// Limits the large trees that are walked at the same time.
    pub(super) large_trees: Budget,
    /// Limits the walks for clients (GetTree) that run at the same time.
    pub(super) walks: Walks,
    /// Memory for the decoders of compressed uploads.
    pub(super) decoders: Budget,
    /// State of splits and splices. It does not say what is stored.
    pub(super) chunk_work: ChunkWork,
    /// Receives a report when a result replaces a different one.
    pub(super) reports: OnceLock<NonDeterminismReports>,
    /// Held while the volume is compacted in the background.
    pub(super) compaction_turn: Arc<Semaphore>,
    /// Held by a purge while it works on a page.
    pub(super) purge_turn: Mutex<()>,
    /// Held while the disk is relieved. One relief serves all callers.
    pub(super) relief_turn: Mutex<()>,
    pub(super) relieved_first: RelievedFirst,
    pub(super) scrubbed: ScrubCounts,
}
impl StoreShared {
    /// The state of a store with this volume and index. The caches are empty, and nothing is running.
    pub(super) fn new(
        volume: Box<dyn Volume>,
        index: Index,
        settings: StoreSettings,
        runtime: Handle,
    ) -> Self {
        Self {
            view: View::new(index),
            volume,
            disk: StoreDisk::new(settings.root.display().to_string(), settings.max_bytes),
            deletions: Deletions::default(),
            runtime,
            directories: Memo::new(settings::DIRECTORY_MEMO_BYTES),
            input_roots: KnownRoots::new(),
            actions: Memo::new(settings::ACTION_MEMO_BYTES),
            results: Memo::new(settings::RESULT_MEMO_BYTES),
            recent: Memo::new(settings::RECENT_MEMO_BYTES),
            packed: Memo::new(settings::PACKED_MEMO_BYTES),
            zstd_history: Memo::new(settings::ZSTD_HISTORY_BYTES),
            encoders: Encoders::new(settings.zstd_level),
            encoding: Budget::in_turns(Bounds::shared("jobs that compress", encoders())),
            form_turn: Arc::new(Semaphore::new(1)),
            result_checks: Budget::new(Bounds::shared(
                "results that are being checked",
                settings::RESULT_CHECKS_MAX,
            )),
            cold_reads: Budget::new(Bounds::shared("blobs that are being hashed", settings::COLD_READS_MAX)),
            upload_budget: Budget::new(settings.upload_bounds()),
            received: Budget::new(RECEIVED),
            joint_writes: JointWrites::default(),
            decoded: Budget::keeping_free(settings::DECODED, settings::LARGEST_DECODED),
            large_results: Budget::keeping_free(LARGE_RESULTS, LARGEST_RESULT),
            large_trees: Budget::new(Bounds::shared("large trees", settings::LARGE_TREES_MAX)),
            walks: Walks::default(),
            decoders: Budget::new(DECODERS),
            chunk_work: ChunkWork::default(),
            reports: OnceLock::new(),
            compaction_turn: Arc::new(Semaphore::new(1)),
            purge_turn: Mutex::default(),
            relief_turn: Mutex::default(),
            relieved_first: RelievedFirst::default(),
            scrubbed: ScrubCounts::default(),
            settings,
        }
    }

    /// Caches a blob that was checked and written, if it is small.
    pub(super) fn remember(&self, instance: InstanceId, digest: Digest, pieces: &[Bytes]) {
        if digest.size() <= settings::RECENT_BLOB_BYTES as u64 {
            // The bytes are copied, because a piece of a request keeps the whole request in memory.
            let bytes = Bytes::from(pieces.concat());
            let weight = bytes.len() + RECENT_OVERHEAD_BYTES;
            self.recent.insert((instance, digest), bytes, weight);
        }
    }
}

/// The number of compression jobs that run at the same time: one per CPU. A job takes a fraction of a second, so
/// connections take turns.
fn encoders() -> u64 {
    thread::available_parallelism().map_or(1, |cpus| cpus.get() as u64)
}
