//! The content-addressable store and the action cache: the actor, its index, and the modules of the store.
//!
//! [`CasActor`] owns the `index::Index` (which blobs are stored, their last use, their leases and reserved room) and
//! the table of `uploads`. Other threads may look up entries in the index (`view`), but only the actor changes it. The
//! actor never touches a file. Readers and writers work on the files that its answers name, on blocking threads, and
//! report back. All requests go through [`client::Cas`].
//!
//! Each message is declared beside the code that sends it. Requests are sent and answered. Reports ("Fact:" in their
//! text) are sent with `do_send`, which ignores the bound of the mailbox, and are handled in the order of sending. A
//! dropped answer gives its room back, because this room is a `guards::Reservation`.
//!
//! Invariants: a blob is in the index only while its whole file is on disk, and others see a blob only through the
//! index. The file of an evicted entry is deleted in the background, and its name is never used again. Leases and
//! reservations (`guards`) end when they are dropped. No handler waits: an answer that needs IO is a separate future.

mod batches;
pub(crate) mod blob;
mod capacity;
mod checked;
pub mod client;
mod compaction;
mod decoding;
mod deletions;
pub(crate) mod forms;
mod guards;
mod index;
mod joint_writes;
mod leasing;
mod linking;
mod lookup;
mod memo;
mod new_files;
mod numbers;
mod outputs;
mod progress;
mod recovery;
mod relief;
mod reply;
pub mod resolve;
pub mod results;
mod scrub;
mod settings;
mod store_disk;
#[cfg(test)]
mod tests;
pub(crate) mod trees;
mod turns;
mod upkeep;
mod uploading;
pub(crate) mod uploads;
mod view;
mod volume;

pub use index::{LeaseTimes, Tally, Totals};
pub use numbers::{InspectStore, ScrubTally, StoreInspection, StoreMeasurement};
pub use outputs::OutputBatch;
pub use settings::{PackingSettings, StoreSettings};
pub(crate) use store_disk::DiskSight;
pub use trees::ActionInputs;
pub use uploads::{
    begin::{Upload, UploadStatus},
    sink::Payload,
    small::SmallUpload,
    writer::BlobWriter,
};
pub use volume::SyncPolicy;

use crate::{
    actors::mail::{Mail, Receive, counted},
    budget::{Bounds, Budget},
    instance::{InstanceId, Instances},
    logging::Event,
    nondeterminism::NonDeterminismReports,
};
use actix::{Actor, ActorContext as _, AsyncContext as _, Context, Message, MessageResult};
use bytes::Bytes;
use checked::{Damaged, Verified};
use client::Cas;
use deletions::Deletions;
use forms::{
    chunks::ChunkWork,
    packing::Packer,
    zstd_form::{Encoders, History},
};
use gorego_reapi::{digest::Digest, error::Result, tree::Directory};
use index::{Index, Key, Victim};
use memo::Memo;
use new_files::Commit;
use reply::StoreReply;
use std::{
    sync::{Arc, LazyLock, OnceLock, atomic::AtomicBool},
    thread,
    time::{Instant, SystemTime, UNIX_EPOCH},
};
use store_disk::StoreDisk;
use tokio::{
    runtime::Handle,
    sync::{Semaphore, watch},
};
use trees::walk::Walks;
use uploads::{EndUpload, Uploads};
use view::View;
use volume::{Volume, WrittenFile, local::Local};

/// Target of this module's log lines.
const LOG: &str = "gorego::cas";

/// State shared by the actor and its handles: the view of the index, budgets, and caches of immutable values.
#[derive(Debug)]
pub(crate) struct StoreShared {
    settings: StoreSettings,
    /// The index of what is stored. Only the actor changes it.
    view: View,
    volume: Box<dyn Volume>,
    /// The file system of the volume.
    disk: StoreDisk,
    /// Files that are being deleted in the background.
    deletions: Deletions,
    /// Whether the last compaction for writers has reclaimed nothing, and none has reclaimed anything since.
    reclaims_nothing: AtomicBool,
    runtime: Handle,
    directories: Memo<Key, Arc<Directory>>,
    input_roots: trees::known_roots::KnownRoots,
    actions: Memo<(InstanceId, Digest), Arc<resolve::ParsedAction>>,
    results: Memo<(InstanceId, Digest), Arc<results::LoadedResult>>,
    /// Small blobs as they were written. An entry here does not mean that the blob is stored: only the index says that.
    recent: Memo<(InstanceId, Digest), Bytes>,
    /// Small blobs as zstd streams; `None` for blobs that do not get smaller.
    packed: Memo<(InstanceId, Digest), Option<Bytes>>,
    /// The history of larger blobs that were read compressed and have no form.
    zstd_history: Memo<(InstanceId, Digest), History>,
    encoders: Encoders,
    /// Limits the jobs that compress at the same time.
    encoding: Budget,
    /// Permit to make a zstd form. No request waits for it: a read that does not get it leaves the form to a later
    /// read.
    form_turn: Arc<Semaphore>,
    /// Limits the results whose blobs are checked at the same time.
    result_checks: Budget,
    /// Limits the large blobs that are hashed at the same time before they are read.
    cold_reads: Budget,
    /// Disk space held by clients' unfinished uploads.
    upload_budget: Budget,
    /// Memory for bytes that clients sent and that are not written yet.
    received: Budget,
    /// Memory for blobs that jobs read.
    reads: Budget,
    /// Memory for batches that jobs write.
    batches: Budget,
    joint_writes: joint_writes::JointWrites,
    /// Memory for stored messages that are being decoded.
    decoded: Budget,
    /// Memory for results that are not small, until their requests have room for the answer.
    large_results: Budget,
    /// Limits the large trees that are walked at the same time.
    large_trees: Budget,
    /// Limits the walks for clients (GetTree) that run at the same time.
    walks: Walks,
    /// Memory for the decoders of compressed uploads.
    decoders: Budget,
    /// State of splits and splices. It does not say what is stored.
    chunk_work: ChunkWork,
    /// Receives a report when a result replaces a different one.
    reports: OnceLock<NonDeterminismReports>,
    /// Held while the volume is compacted in the background.
    compaction_turn: Arc<Semaphore>,
    /// Held by a purge while it works on a page.
    purge_turn: tokio::sync::Mutex<()>,
    /// Held while the disk is relieved. One relief serves all callers.
    relief_turn: Arc<tokio::sync::Mutex<()>>,
    relieved_first: relief::RelievedFirst,
    scrubbed: scrub::ScrubCounts,
}

impl StoreShared {
    /// Caches a blob that was checked and written, if it is small.
    fn remember(&self, instance: InstanceId, digest: Digest, pieces: &[Bytes]) {
        if digest.size() <= settings::RECENT_BLOB_BYTES as u64 {
            // The bytes are copied, because a piece of a request keeps the whole request in memory.
            let bytes = Bytes::from(pieces.concat());
            let weight = bytes.len() + RECENT_OVERHEAD_BYTES;
            self.recent.insert((instance, digest), bytes, weight);
        }
    }
}

/// Memory of a cached blob beyond its bytes: its key, its handle and its slot in a map.
const RECENT_OVERHEAD_BYTES: usize = 160;

/// The owner of the store.
#[derive(Debug)]
pub struct CasActor {
    mail: Mail,
    uploads: Uploads,
    shared: Arc<StoreShared>,
    /// Entries that were evicted before the actor started.
    over_limit: Vec<Victim>,
    /// The latest [`Index::bytes_deleted`]. Callers that need room wait for it to grow.
    deleted: watch::Sender<u64>,
    /// Compresses cold blobs while this actor runs.
    packer: Option<Packer>,
    /// The scrub, which runs as long as the actor; `None` once the actor is closed.
    scrub: Option<scrub::Scrub>,
    /// The time of the last log line about results that are not served because leases fill the store.
    full_leases_logged: Option<Instant>,
}

impl CasActor {
    /// Opens a store directory and recovers its contents. Blocks for about a second for 500,000
    /// files of their own or for several million records in segments.
    ///
    /// File work runs on the blocking threads of `runtime`.
    ///
    /// # Errors
    /// `Precondition` when the directory cannot be used, naming it and the reason.
    pub fn open(settings: StoreSettings, instances: &Instances, runtime: Handle) -> Result<Self> {
        let volume = Local::open(&settings.root, instances, settings.max_bytes, settings.sync)?;
        Self::over(Box::new(volume), settings, runtime)
    }

    /// Opens the store over any volume and recovers its contents.
    ///
    /// # Errors
    /// `Exhausted` when the contents cannot be brought within the limit.
    fn over(volume: Box<dyn Volume>, settings: StoreSettings, runtime: Handle) -> Result<Self> {
        let mut index =
            recovery::recover(&*volume, settings.max_bytes, settings.leases, settings.result_links_bytes);
        let disk = StoreDisk::new(settings.root.display().to_string(), settings.max_bytes);
        if let Ok(space) = volume.space() {
            disk.measure_capacity(space, &index.totals());
        }
        let limit = disk.limit();
        index.set_limit(limit);
        // If the limit was lowered since the last run, the store is brought within it before the first look-up.
        let over_limit = index.reserve(0)?.victims;
        let found = index.totals();
        let scrub = scrub::Scrub::open(&*volume, found.blobs + found.results == 0);
        let shared = StoreShared {
            view: View::new(index),
            volume,
            disk,
            deletions: Deletions::default(),
            reclaims_nothing: AtomicBool::new(false),
            runtime,
            directories: Memo::new(settings::DIRECTORY_MEMO_BYTES),
            input_roots: trees::known_roots::KnownRoots::new(),
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
            upload_budget: Budget::new(settings.upload_bounds(limit.most)),
            received: Budget::new(uploads::unwritten::RECEIVED),
            reads: Budget::in_turns(settings::READS),
            batches: Budget::new(settings::BATCHES),
            joint_writes: joint_writes::JointWrites::default(),
            decoded: Budget::keeping_free(settings::DECODED, settings::LARGEST_DECODED),
            large_results: Budget::keeping_free(results::LARGE_RESULTS, results::LARGEST_RESULT),
            large_trees: Budget::new(Bounds::shared("large trees", settings::LARGE_TREES_MAX)),
            walks: Walks::default(),
            decoders: Budget::new(uploads::decoders::DECODERS),
            chunk_work: ChunkWork::default(),
            reports: OnceLock::new(),
            compaction_turn: Arc::new(Semaphore::new(1)),
            purge_turn: tokio::sync::Mutex::default(),
            relief_turn: Arc::default(),
            relieved_first: relief::RelievedFirst::default(),
            scrubbed: scrub::ScrubCounts::default(),
            settings,
        };
        Ok(Self {
            mail: Mail::default(),
            uploads: Uploads::default(),
            shared: Arc::new(shared),
            over_limit,
            deleted: watch::Sender::new(0),
            packer: None,
            scrub: Some(scrub),
            full_leases_logged: None,
        })
    }

    /// Starts the actor on the current arbiter or local task set.
    pub fn launch(self) -> Cas {
        let shared = self.shared.clone();
        Cas::new(self.start(), shared)
    }

    /// The counter of the messages that the actor handles.
    pub fn mail(&self) -> Mail {
        self.mail.clone()
    }

    /// Changes the index, or reads its totals.
    fn change<T>(&self, change: impl FnOnce(&mut Index) -> T) -> T {
        self.shared.view.change(change)
    }

    fn client(&self, ctx: &Context<Self>) -> Cas {
        Cas::new(ctx.address(), self.shared.clone())
    }
}

/// The number of compression jobs that run at the same time: one per CPU. A job takes a fraction of a second, so
/// connections take turns.
fn encoders() -> u64 {
    thread::available_parallelism().map_or(1, |cpus| cpus.get() as u64)
}

fn unix_seconds() -> u32 {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let now = u32::try_from(elapsed.as_secs()).unwrap_or(u32::MAX);
    #[cfg(test)]
    let now = tests::clock::system_time(now);
    now
}

/// Seconds since the first call, by a clock that changes of the system time do not affect. Leases are measured by this
/// clock, because they end with the process.
fn uptime_seconds() -> u32 {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    let now = u32::try_from(START.elapsed().as_secs()).unwrap_or(u32::MAX);
    #[cfg(test)]
    let now = tests::clock::uptime(now);
    now
}

/// Stops the store after all earlier messages. The answer comes when the last uses are written to disk. Later calls get
/// `Unavailable`. The directory can be opened again when the last handle is dropped.
#[derive(Debug, Clone, Copy, Message)]
#[rtype(result = "()")]
pub struct CloseStore;

counted!(CasActor);

impl Actor for CasActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(settings::MAILBOX_CAPACITY);
        ctx.run_interval(settings::HOUSEKEEPING_INTERVAL, Self::housekeeping);
        let over_limit = std::mem::take(&mut self.over_limit);
        self.evict(over_limit, ctx);
        self.trim(ctx);
        self.packer = Packer::start(&ctx.address(), &self.shared);
        if let Some(scrub) = &mut self.scrub {
            scrub.start(ctx.address().downgrade(), &self.shared);
        }
        let watch = store_disk::watch(Arc::downgrade(&self.shared), ctx.address().downgrade());
        self.shared.runtime.spawn(watch);
    }
}

impl Receive<Commit> for CasActor {
    type Answer = ();

    fn receive(&mut self, message: Commit, ctx: &mut Self::Context) {
        let now = unix_seconds();
        let written = message.files.iter().map(|written| written.bytes).sum::<u64>();
        let room = message.room.disarm();
        self.change(|index| {
            index.unreserve(room.saturating_sub(written));
            index.overdraw(written.saturating_sub(room));
        });
        let (mut superfluous, mut stored) = (Vec::new(), Vec::with_capacity(message.files.len()));
        for part in message.files.chunks(settings::CHANGES_PER_HOLD) {
            self.change(|index| {
                let lessee = message.lessee.and_then(|build| index.enter(build, uptime_seconds()));
                for &WrittenFile { file, bytes, stamp } in part {
                    superfluous.extend(index.commit(file, bytes, stamp, now));
                    if let Some(lessee) = lessee {
                        index.lease_key(&file.key, lessee);
                    }
                    stored.push(file.key);
                }
            });
        }
        message.links.into_iter().for_each(|links| self.link_new(links));
        if let Some(attempt) = message.upload {
            self.end_upload(EndUpload { attempt, partial: None }, ctx);
        }
        stored.iter().for_each(|blob| self.uploads.supersede(blob));
        self.delete(superfluous, ctx);
        self.trim(ctx);
        let _ = message.reply.send(());
    }
}

impl Receive<Verified> for CasActor {
    type Answer = ();

    fn receive(&mut self, Verified { at, stamp }: Verified, _: &mut Self::Context) {
        self.change(|index| index.trust(at, stamp));
    }
}

impl Receive<Damaged> for CasActor {
    type Answer = ();

    fn receive(&mut self, Damaged { at, reason }: Damaged, ctx: &mut Self::Context) {
        // A file that was evicted while it was being read is not damaged. Its entry is stale, and nothing happens.
        let removed = self.change(|index| index.remove_damaged(at));
        if let Some(victim) = removed {
            Event::warn(LOG, "blob_damaged")
                .with_shown("digest", &victim.file.key.digest)
                .log(format_args!("dropped a stored {:?}: {reason}", victim.file.key.kind));
            self.delete(vec![victim], ctx);
        }
    }
}

impl Receive<InspectStore> for CasActor {
    type Answer = MessageResult<InspectStore>;

    fn receive(&mut self, _: InspectStore, _: &mut Self::Context) -> Self::Answer {
        let (running_uploads, partial_uploads) = self.uploads.counts();
        let (totals, tally, oldest_use) =
            self.change(|index| (index.totals(), index.tally(), index.oldest_use()));
        MessageResult(StoreInspection { totals, running_uploads, partial_uploads, tally, oldest_use })
    }
}

impl Receive<CloseStore> for CasActor {
    type Answer = StoreReply<()>;

    fn receive(&mut self, _: CloseStore, ctx: &mut Self::Context) -> Self::Answer {
        let written = self.write_touches(ctx.address());
        let (scrub, shared) = (self.scrub.take(), self.shared.clone());
        let closed = self.shared.runtime.spawn_blocking(move || {
            if let Some(scrub) = scrub {
                scrub.close(&*shared.volume);
            }
        });
        ctx.stop();
        let all_written = async {
            // A job that panicked counts as done.
            if let Some(written) = written {
                let _ = written.await;
            }
            let _ = closed.await;
        };
        StoreReply::when(Some(all_written), ())
    }
}
