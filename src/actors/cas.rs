//! The content-addressable store and the action cache: the actor, its index, and the rooms of the store.
//!
//! [`CasActor`] owns the `index::Index` (what is stored, how recently used, leased or promised) and the table of
//! `uploads`. Others may look things up in the index (`view`), and only the actor changes it. It decides and never touches a file: readers and writers work on files that its answers name, on blocking
//! threads, and report back. Everybody asks it through [`client::Cas`].
//!
//! Invariants: a blob is in the index only while a whole file of it is on disk, and is visible to others only through the
//! index. What the index lets go is deleted in the background under a name that is never used again. Promises
//! (`guards`) end by themselves. No handler waits for anything: an answer that needs IO is a future of its own.

pub mod blob;
pub mod client;
mod decoding;
pub mod forms;
mod guards;
mod index;
mod lookup;
mod memo;
mod new_files;
mod outputs;
mod recovery;
mod relief;
mod reply;
mod requests;
pub mod resolve;
pub mod results;
mod settings;
#[cfg(test)]
mod tests;
pub mod trees;
mod turns;
mod upkeep;
pub mod uploads;
mod view;
mod volume;

pub use index::Totals;
pub use outputs::OutputBatch;
pub use requests::{CloseStore, InspectStore, StoreInspection};
pub use settings::StoreSettings;
pub use trees::StagedInputs;

use crate::{
    actors::mail::{Mail, Receive, counted},
    budget::{Bounds, Budget},
    instance::{InstanceId, Instances},
    logging::Event,
};
use actix::{Actor, ActorContext as _, AsyncContext as _, Context, MessageResult};
use bytes::Bytes;
use client::Cas;
use forms::{
    chunks::ChunkWork,
    zstd_form::{Encoders, History},
};
use futures::FutureExt as _;
use gorego_reapi::{
    digest::Digest,
    error::{Error, Result},
    tree::Directory,
};
use guards::{Reservation, Room};
use index::{Index, Victim};
use memo::Memo;
use reply::Reply;
use requests::*;
use std::{
    sync::{Arc, atomic::Ordering},
    thread,
    time::{Instant, SystemTime, UNIX_EPOCH},
};
use tokio::{
    runtime::Handle,
    sync::{Semaphore, watch},
};
use trees::walk::Walks;
use uploads::{Attempt, Begin, Partial, Uploads};
use view::View;
use volume::{Volume, files::Files};

/// Target of this room's log lines.
const LOG: &str = "gorego::cas";

/// What the actor and the handles to it have in common: the view of the index, budgets, and caches of immutable things.
#[derive(Debug)]
pub(crate) struct Shared {
    settings: StoreSettings,
    /// What is stored. Only the actor changes it.
    view: View,
    /// Where the stored files are.
    volume: Box<dyn Volume>,
    runtime: Handle,
    directories: Memo<Digest, Arc<Directory>>,
    input_roots: Memo<(InstanceId, Digest), Arc<trees::inputs::InputRoot>>,
    actions: Memo<(InstanceId, Digest), Arc<resolve::ParsedAction>>,
    results: Memo<(InstanceId, Digest), Arc<results::LoadedResult>>,
    /// Small blobs as they were written. Whether one is stored is the index's to say; this only saves reading it.
    recent: Memo<(InstanceId, Digest), Bytes>,
    /// Small blobs as zstd streams; `None` for those that do not get smaller.
    packed: Memo<(InstanceId, Digest), Option<Bytes>>,
    /// Larger blobs that were read compressed and have no form.
    zstd_history: Memo<(InstanceId, Digest), History>,
    encoders: Encoders,
    /// Jobs that may compress at the same time.
    encoding: Budget,
    /// The right to make a form. Nobody waits for it: who does not get it leaves the form to a later read.
    form_turn: Arc<Semaphore>,
    /// Results whose blobs may be checked at the same time.
    result_checks: Budget,
    /// Large blobs that may be hashed at the same time before they are read.
    cold_reads: Budget,
    /// What clients' unfinished uploads hold of the store.
    upload_budget: Budget,
    /// What clients sent and is not written yet.
    received: Budget,
    /// Memory for stored messages that are being decoded.
    decoded: Budget,
    /// Large trees that may be walked at the same time.
    large_trees: Budget,
    /// Walks for clients that may go on at the same time.
    walks: Walks,
    /// Memory for the decoders of compressed uploads.
    decoders: Budget,
    /// Splits and splices; nothing in it says what is stored.
    chunk_work: ChunkWork,
    /// The right to relieve the disk, which is done for everybody at once.
    relief_turn: tokio::sync::Mutex<()>,
}

impl Shared {
    /// Keeps a blob that was checked and written at hand, if it is a small one.
    fn remember(&self, instance: InstanceId, digest: Digest, pieces: &[Bytes]) {
        if digest.size() <= settings::RECENT_BLOB_BYTES as u64 {
            // Copied: a piece of a request keeps the whole request in memory.
            let bytes = Bytes::from(pieces.concat());
            let weight = bytes.len() + RECENT_OVERHEAD_BYTES;
            self.recent.insert((instance, digest), bytes, weight);
        }
    }
}

/// What a blob in memory takes beside its bytes: its key, its handle, its place in a map.
const RECENT_OVERHEAD_BYTES: usize = 160;

/// The owner of the store.
#[derive(Debug)]
pub struct CasActor {
    mail: Mail,
    uploads: Uploads,
    shared: Arc<Shared>,
    /// What was evicted before the actor started.
    over_limit: Vec<Victim>,
    /// [`Index::bytes_deleted`], for those who wait for room.
    deleted: watch::Sender<u64>,
    /// When the log last said that others fill the disk.
    full_disk_logged: Option<Instant>,
}

impl CasActor {
    /// Takes possession of a store directory and finds out what it holds. Blocks; a second or so for each 500,000 files.
    ///
    /// `runtime` is where file work is done, on its blocking threads.
    ///
    /// # Errors
    /// `Precondition` when the directory cannot be used, naming it and the reason.
    pub fn open(settings: StoreSettings, instances: &Instances, runtime: Handle) -> Result<Self> {
        let volume = Files::open(&settings.root, instances)?;
        Self::over(Box::new(volume), settings, runtime)
    }

    /// The same over any volume, with what it holds.
    ///
    /// # Errors
    /// When what it holds cannot be brought within the limit.
    fn over(volume: Box<dyn Volume>, settings: StoreSettings, runtime: Handle) -> Result<Self> {
        let mut index = recovery::recover(&*volume, settings.max_bytes);
        // A limit that was lowered since the last run is met before the first look-up.
        let over_limit = index.reserve(0)?.victims;
        let shared = Shared {
            view: View::new(index),
            volume,
            runtime,
            directories: Memo::new(settings::DIRECTORY_MEMO_BYTES),
            input_roots: Memo::new(settings::INPUT_ROOT_MEMO_BYTES),
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
            received: Budget::new(uploads::received::RECEIVED),
            decoded: Budget::keeping_free(settings::DECODED, settings::LARGEST_DECODED),
            large_trees: Budget::new(Bounds::shared("large trees", settings::LARGE_TREES_MAX)),
            walks: Walks::default(),
            decoders: Budget::new(uploads::decoders::DECODERS),
            chunk_work: ChunkWork::default(),
            relief_turn: tokio::sync::Mutex::default(),
            settings,
        };
        Ok(Self {
            mail: Mail::default(),
            uploads: Uploads::default(),
            shared: Arc::new(shared),
            over_limit,
            deleted: watch::Sender::new(0),
            full_disk_logged: None,
        })
    }

    /// Starts the actor on the current arbiter or local task set.
    pub fn launch(self) -> Cas {
        let shared = self.shared.clone();
        Cas::new(self.start(), shared)
    }

    /// Counts the messages that it handles.
    pub fn mail(&self) -> Mail {
        self.mail.clone()
    }

    /// Changes the index, or looks at its sums.
    fn change<T>(&self, change: impl FnOnce(&mut Index) -> T) -> T {
        self.shared.view.change(change)
    }

    /// Takes an upload off the books, or puts what is left of it away.
    fn end_upload(&mut self, ended: EndUpload, ctx: &Context<Self>) {
        if let Some(partial) = self.uploads.end(ended, Instant::now()) {
            self.discard(partial, ctx);
        }
        let (_, partials) = self.uploads.counts();
        if partials > settings::MAX_PARTIAL_UPLOADS {
            self.discard_excess(ctx);
        }
    }

    fn client(&self, ctx: &Context<Self>) -> Cas {
        Cas::new(ctx.address(), self.shared.clone())
    }
}

/// As many jobs compress at the same time as there are CPUs. Each takes a part of a second, so they are shared out in turns.
fn encoders() -> u64 {
    thread::available_parallelism().map_or(1, |cpus| cpus.get() as u64)
}

/// Seconds since 1970.
fn unix_seconds() -> u32 {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u32::try_from(elapsed.as_secs()).unwrap_or(u32::MAX)
}

counted!(CasActor);

impl Actor for CasActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(settings::MAILBOX_CAPACITY);
        ctx.run_interval(settings::HOUSEKEEPING_INTERVAL, Self::housekeeping);
        let over_limit = std::mem::take(&mut self.over_limit);
        self.evict(over_limit, ctx);
        self.trim(ctx);
    }
}

impl Receive<Reserve> for CasActor {
    type Answer = Reply<Result<Reservation>>;

    fn receive(&mut self, Reserve { bytes, of }: Reserve, ctx: &mut Self::Context) -> Self::Answer {
        match self.reserve(bytes, of, ctx) {
            Ok((room, free)) => Reply::when(free, Ok(room)),
            Err(error) => Reply::Now(Err(error)),
        }
    }
}

impl Receive<Commit> for CasActor {
    type Answer = ();

    fn receive(&mut self, message: Commit, ctx: &mut Self::Context) {
        let mut rest = message.room.disarm();
        let now = unix_seconds();
        let (mut superfluous, mut stored) = (Vec::new(), Vec::with_capacity(message.files.len()));
        self.change(|index| {
            for WrittenFile { file, bytes, stamp } in message.files {
                rest = rest.saturating_sub(bytes);
                superfluous.extend(index.commit(file, bytes, stamp, now));
                stored.push(file.key);
            }
            index.unreserve(rest);
        });
        if let Some(ended) = message.upload {
            self.end_upload(ended, ctx);
        }
        stored.iter().for_each(|blob| self.uploads.supersede(blob));
        self.delete(superfluous, ctx);
        self.trim(ctx);
        let _ = message.reply.send(());
    }
}

impl Receive<BeginUpload> for CasActor {
    type Answer = MessageResult<BeginUpload>;

    fn receive(&mut self, message: BeginUpload, ctx: &mut Self::Context) -> Self::Answer {
        let BeginUpload { name, blob, offset, .. } = message;
        if self.renew(&blob).is_some() {
            return MessageResult(Ok(Began::Present));
        }
        match self.uploads.begin(name, blob, offset) {
            Begin::Busy(progress) => MessageResult(Ok(Began::Busy(progress))),
            Begin::Elsewhere(committed) => MessageResult(Err(Error::Invalid(format!(
                "the upload of blob {} stands at {committed}; write_offset {offset} does not go on from there",
                blob.digest
            )))),
            Begin::Resume(entered, Partial { sink, room }) => {
                let mut attempt = Attempt::new(ctx.address(), name, blob, entered, room);
                attempt.sink = Some(sink);
                MessageResult(Ok(Began::Start(Box::new(attempt))))
            }
            Begin::Fresh(entered, leftover) => {
                if let Some(partial) = leftover {
                    self.discard(partial, ctx);
                }
                // What cannot fit is refused before the first byte; what can gets its room as its bytes come.
                let twin = self.uploads.twin(&blob, &entered).filter(|_| !message.beside);
                let size = self.shared.volume.charge(blob.digest.size());
                let of_twin = twin
                    .as_ref()
                    .map_or(0, |twin| size.saturating_sub(twin.accepted.load(Ordering::Relaxed)));
                let wanted = size.saturating_add(of_twin);
                let fits = self.change(|index| index.check_fit(wanted, self.uploads.parked_bytes()));
                let attempt = Attempt::new(ctx.address(), name, blob, entered, Room::none(ctx.address()));
                MessageResult(match (fits, twin) {
                    (Ok(()), _) => Ok(Began::Start(Box::new(attempt))),
                    (Err(_), Some(twin)) => Ok(Began::NoRoomBeside(twin)),
                    (Err(shortage), None) => Err(shortage.into()),
                })
            }
        }
    }
}

impl Receive<DiscardPartials> for CasActor {
    type Answer = ();

    fn receive(&mut self, message: DiscardPartials, ctx: &mut Self::Context) {
        let DiscardPartials { caller, bound, bytes } = message;
        let mut freed = 0;
        while freed < bytes
            && let Some(partial) = self.uploads.pop_oldest_of(caller, bound)
        {
            freed += partial.room.bytes();
            self.discard(partial, ctx);
        }
    }
}

impl Receive<EndUpload> for CasActor {
    type Answer = ();

    fn receive(&mut self, ended: EndUpload, ctx: &mut Self::Context) {
        self.end_upload(ended, ctx);
    }
}

impl Receive<Unreserve> for CasActor {
    type Answer = ();

    fn receive(&mut self, Unreserve(bytes): Unreserve, _: &mut Self::Context) {
        self.change(|index| index.unreserve(bytes));
    }
}

impl Receive<Deleted> for CasActor {
    type Answer = ();

    fn receive(&mut self, Deleted(bytes): Deleted, ctx: &mut Self::Context) {
        let deleted = self.change(|index| {
            index.deleted(bytes);
            index.bytes_deleted()
        });
        self.deleted.send_replace(deleted);
        self.trim(ctx);
    }
}

impl Receive<Verified> for CasActor {
    type Answer = ();

    fn receive(&mut self, Verified { at, stamp }: Verified, _: &mut Self::Context) {
        self.change(|index| index.trust(at, stamp));
    }
}

impl Receive<Touched> for CasActor {
    type Answer = ();

    fn receive(&mut self, Touched(touches): Touched, _: &mut Self::Context) {
        self.change(|index| {
            for Touch { at, before, after } in touches {
                index.follow(at, before, after);
            }
        });
    }
}

impl Receive<Damaged> for CasActor {
    type Answer = ();

    fn receive(&mut self, Damaged { at, reason }: Damaged, ctx: &mut Self::Context) {
        // A file that was evicted under its reader is not damaged: its entry is stale and nothing happens.
        let removed = self.change(|index| index.remove(at));
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
        let totals = self.change(|index| index.totals());
        MessageResult(StoreInspection { totals, running_uploads, partial_uploads })
    }
}

impl Receive<CloseStore> for CasActor {
    type Answer = Reply<()>;

    fn receive(&mut self, _: CloseStore, ctx: &mut Self::Context) -> Self::Answer {
        let written = self.write_touches(ctx.address());
        ctx.stop();
        // A job that panicked has written what it could.
        Reply::when(written.map(|written| written.map(drop)), ())
    }
}
