//! [`Cas`]: the way to the store for RPC handlers and worker threads.
//!
//! Each call is a look-up in the index (`lookup`), or one or two messages to the actor, with file work on a blocking thread.
//! The rooms of the store add their own calls: `results` for the action cache, `trees` for directories and input roots, `forms`
//! for compressed blobs and chunks, `uploads` and `outputs` for workers and downloads.

use super::{
    CasActor, StoreShared,
    blob::{BlobReader, BlobWriter, is_sound, not_found, read_whole},
    guards::{Reservation, UploadRoom},
    index::{EntryKind, FoundEntry, Key, Stamp},
    lookup::Purpose,
    new_files::{NewFiles, Visible},
    requests::*,
    settings::{PARK_WAIT, ROOM_STEP_BYTES, SMALL_BLOB_BYTES, SOUND_TRIES, TWIN_WAIT},
    uploads::sink::{WHOLE_BYTES, check_item, check_stream, failed},
    uploads::unwritten::UnwrittenPieces,
};
use crate::{
    budget::{Budget, Share},
    caller::Caller,
    instance::Instance,
};
use actix::{Addr, Handler, Message, dev::ToEnvelope};
use bytes::Bytes;
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    error::{Error, Result},
};
use std::{collections::HashSet, sync::Arc};
use tokio::time::Instant;

pub use super::uploads::sink::Payload;

/// The answer to [`Cas::begin_upload`].
#[derive(Debug)]
pub enum Upload {
    /// The blob is already stored, so nothing needs to be sent (BS-24).
    Present,
    /// The client sends the bytes from [`BlobWriter::committed`] on.
    Writer(Box<BlobWriter>),
}

/// The progress of an upload (BS-31, BS-32).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UploadStatus {
    /// Bytes that need not be sent again.
    pub committed: u64,
    /// Whether the blob is stored.
    pub complete: bool,
}

/// The origin of a result, stored with it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Provenance {
    /// The worker that ran the action; empty when a client uploaded the result.
    pub worker: String,
    /// The tool invocation that asked for it; empty when unknown.
    pub tool_invocation_id: String,
    /// Network address of the client that uploaded it; empty when a worker made it.
    pub peer: String,
}

/// A handle to the store. It is cheap to clone and can be used from any thread. Methods that do file work and are not `async`
/// block and are for worker threads only: they panic on a thread that runs an async runtime.
///
/// A tier, such as a backing cache or a cluster node that holds a blob, would stand in front of it. Handlers and workers use
/// only this type and what it returns, so a tier would implement these methods and leave the rest as it is:
///
/// - presence: [`Cas::find_missing`], [`Cas::blob_by_hash`];
/// - reading: [`Cas::open`], [`Cas::read_many`], and [`Cas::directories`] where a walk reaches a directory that is not stored
///   here;
/// - writing: [`Cas::write_many`], [`Cas::begin_upload`] and [`Cas::new_blob`];
/// - results: [`Cas::get_result`] and [`Cas::put_result`].
///
/// The tier would fetch a missing blob and write it to this store before handing it out, so that leases and checks keep
/// working. Staging, outputs, compressed reads, splits and splices are built on these calls.
#[derive(Clone)]
pub struct Cas {
    store: Addr<CasActor>,
    shared: Arc<StoreShared>,
    /// The caller that is charged: what is read, decoded and hashed counts against its bounds and those of its peer.
    caller: Caller,
    /// Whether stored bytes are charged too. They are not when the server itself stores them.
    is_client: bool,
    /// Set for the handle of a worker thread, which may block: file work is done on that thread.
    blocks: bool,
}

/// The error of a store whose actor has stopped.
pub(super) fn going_down() -> Error {
    Error::Unavailable("the store of this server is shutting down".into())
}

/// The error for an upload whose stored copy was found damaged on every try.
pub(super) fn spoilt() -> Error {
    Error::Unavailable("the stored file of this blob changes again and again; try again".into())
}

impl Cas {
    pub(super) fn new(store: Addr<CasActor>, shared: Arc<StoreShared>) -> Self {
        Self { store, shared, caller: Caller::default(), is_client: false, blocks: false }
    }

    /// The actor's address, for messages such as [`super::InspectStore`].
    pub fn actor(&self) -> &Addr<CasActor> {
        &self.store
    }

    /// Returns a handle for the requests of a client. Both what the client sends and what it reads count against the bounds of
    /// its connection and its peer.
    pub fn on_behalf_of(&self, caller: Caller) -> Self {
        Self { caller, is_client: true, ..self.clone() }
    }

    /// Returns a handle for work that the server does for a client, such as an action or a download. What is read is charged to
    /// the client, and what is stored is not.
    pub fn working_for(&self, caller: Caller) -> Self {
        Self { caller, is_client: false, ..self.clone() }
    }

    /// The caller that is charged.
    pub(super) fn caller(&self) -> Caller {
        self.caller
    }

    fn client(&self) -> Option<Caller> {
        self.is_client.then_some(self.caller)
    }

    /// Empty room for an upload through this handle.
    pub(super) fn new_room(&self) -> Result<UploadRoom> {
        let mut room = UploadRoom::none(self.store.clone());
        self.pay_for(&mut room)?;
        Ok(room)
    }

    fn pay_for(&self, room: &mut UploadRoom) -> Result<()> {
        match self.client() {
            Some(caller) => room.charge_to(self.shared.upload_budget.take(caller, 0)?),
            None => Ok(()),
        }
    }

    /// A buffer for bytes that arrive through this handle and are not written yet.
    pub(super) fn received(&self) -> UnwrittenPieces {
        UnwrittenPieces::new(self.client().map(|caller| (self.shared.received.clone(), caller)))
    }

    /// Charges a caller for bytes that are collected in memory, until the share is dropped.
    ///
    /// # Errors
    /// `Exhausted` when a bound is reached.
    pub fn hold(&self, caller: Caller, bytes: u64) -> Result<Share> {
        Ok(self.shared.received.take(caller, bytes)?)
    }

    pub(super) fn shared(&self) -> &Arc<StoreShared> {
        &self.shared
    }

    /// Opens a blob.
    ///
    /// # Errors
    /// `NotFound` when it is not stored. A damaged file counts as not stored, and its entry is dropped.
    pub async fn open(&self, instance: &Instance, digest: Digest) -> Result<BlobReader> {
        let mut located = self.locate(instance, &[digest], Purpose::Read).await?;
        let Some(found) = located.found.pop().flatten() else {
            return if digest.is_empty() {
                Ok(BlobReader::whole(Bytes::new()))
            } else {
                Err(not_found(digest))
            };
        };
        if let Some(bytes) = self.shared.recent.get(&(instance.blobs(), digest)) {
            return Ok(BlobReader::whole(bytes));
        }
        let place = self.place_to_hash([&found]).await?;
        let cas = self.clone();
        self.blocking(move || {
            let _place = place;
            BlobReader::open(cas, found, Arc::new(located.lease))
        })
        .await?
    }

    /// If one of these blobs is large and has to be hashed before it is read, waits for a place.
    pub(super) async fn place_to_hash(
        &self,
        found: impl IntoIterator<Item = &FoundEntry>,
    ) -> Result<Option<Share>> {
        let is_laborious = |found: &FoundEntry| {
            found.stamp == Stamp::UNTRUSTED && found.file.key.digest.size() > SMALL_BLOB_BYTES
        };
        if !found.into_iter().any(is_laborious) {
            return Ok(None);
        }
        Ok(Some(self.shared.cold_reads.wait_for(self.caller, 1).await?))
    }

    /// The memory budget for decoders of compressed uploads; see [`super::uploads::decoders`].
    pub fn decoders(&self) -> &Budget {
        &self.shared.decoders
    }

    /// Reads whole blobs, in the order of the digests; duplicates are allowed. It is meant for small blobs: the caller bounds
    /// their total size.
    ///
    /// # Errors
    /// Each blob has its own result. The call fails when the server is shutting down.
    pub async fn read_many(&self, instance: &Instance, digests: Vec<Digest>) -> Result<Vec<Result<Bytes>>> {
        let located = self.locate(instance, &digests, Purpose::Look).await?;
        let at_hand = |(digest, found): (&Digest, &Option<FoundEntry>)| match found {
            Some(_) => self.shared.recent.get(&(instance.blobs(), *digest)).map(Ok),
            None if digest.is_empty() => Some(Ok(Bytes::new())),
            None => Some(Err(not_found(*digest))),
        };
        let known: Vec<Option<Result<Bytes>>> = digests.iter().zip(&located.found).map(at_hand).collect();
        if known.iter().all(Option::is_some) {
            return Ok(known.into_iter().flatten().collect());
        }
        let cas = self.clone();
        self.blocking(move || {
            let read = |(known, found): (Option<Result<Bytes>>, Option<FoundEntry>)| match (known, found) {
                (Some(known), _) => Some(known),
                (None, found) => found.map(|found| read_whole(&cas, &found)),
            };
            known.into_iter().zip(located.found).filter_map(read).collect()
        })
        .await
    }

    /// Stores whole blobs, each checked against its digest (CAS-09..13); duplicates are allowed.
    ///
    /// # Errors
    /// Each blob has its own result. The call fails when the server is shutting down.
    pub async fn write_many(
        &self,
        instance: &Instance,
        blobs: Vec<(Digest, impl Into<Payload>)>,
    ) -> Result<Vec<Result<()>>> {
        let blobs: Arc<[(Digest, Payload)]> =
            blobs.into_iter().map(|(digest, bytes)| (digest, bytes.into())).collect();
        let mut outcomes = vec![Ok(()); blobs.len()];
        let mut all_visible = Vec::new();
        for step in in_steps(&blobs) {
            if let [at] = step[..]
                && let Some((digest, Payload::Zstd(stream))) = blobs.get(at)
                && digest.size() > WHOLE_BYTES
            {
                outcomes[at] = self.write_stream(instance, *digest, stream.clone()).await;
                continue;
            }
            let (stored, visible) = self.write_step(instance, blobs.clone(), step.clone()).await?;
            for (at, outcome) in step.into_iter().zip(stored) {
                outcomes[at] = outcome;
            }
            all_visible.extend(visible);
        }
        for visible in all_visible {
            visible.wait().await?;
        }
        Ok(outcomes)
    }

    /// Stores the items of a batch that share one reservation.
    async fn write_step(
        &self,
        instance: &Instance,
        blobs: Arc<[(Digest, Payload)]>,
        step: Vec<usize>,
    ) -> Result<(Vec<Result<()>>, Option<Visible>)> {
        let fits = |digest: &Digest, payload: &Payload| match payload {
            Payload::Plain(bytes) => digest.size() == bytes.len() as u64 && !digest.is_empty(),
            Payload::Zstd(_) => !digest.is_empty(),
        };
        let items = step.iter().filter_map(|&at| blobs.get(at));
        let digests: HashSet<Digest> =
            items.filter(|(digest, bytes)| fits(digest, bytes)).map(|(digest, _)| *digest).collect();
        let prepared = self.prepare(instance, digests.into_iter().collect()).await?;
        let (cas, id) = (self.clone(), instance.blobs());
        self.blocking(move || {
            let items: Vec<_> = step.iter().filter_map(|&at| blobs.get(at)).collect();
            cas.write_batch(id, &items, prepared)
        })
        .await
    }

    /// Stores one large compressed item, as an upload that cannot be resumed.
    async fn write_stream(&self, instance: &Instance, digest: Digest, stream: Bytes) -> Result<()> {
        let name = format!("batch/{:x}", self.shared.volume.next_generation());
        match self.begin_upload(instance, &name, digest, 0).await? {
            Upload::Present => self.blocking(move || check_stream(digest, &stream)).await?,
            Upload::Writer(writer) => {
                let mut writer = writer.decoding().unresumable();
                writer.write(stream).await?;
                writer.finish().await.map(drop)
            }
        }
    }

    /// Reserves room for the blobs that are not stored. The files of stored blobs are checked, so a damaged blob is dropped and
    /// counts as not stored.
    pub(super) async fn prepare(&self, instance: &Instance, digests: Vec<Digest>) -> Result<Prepared> {
        for _ in 0..SOUND_TRIES {
            let absent = self.find_missing(instance, &digests).await?;
            if absent.len() < digests.len() {
                let absent: HashSet<&Digest> = absent.iter().collect();
                let present = digests.iter().filter(|digest| !absent.contains(digest)).copied().collect();
                if !self.are_sound(instance, present).await? {
                    continue;
                }
            }
            let room = self.reserve_for(&absent).await?;
            return Ok(Prepared { absent, room });
        }
        Err(spoilt())
    }

    /// Reserves room for blobs that are not stored.
    async fn reserve_for(&self, absent: &[Digest]) -> Result<Result<Reservation>> {
        let charge = |digest: &Digest| self.shared.volume.charge(digest.size());
        let bytes = absent.iter().map(charge).fold(0, u64::saturating_add);
        match self.take_room(bytes).await {
            Err(error @ Error::Unavailable(_)) => Err(error),
            room => Ok(room),
        }
    }

    /// Whether these blobs are stored and their files are intact. Files whose state is not known are hashed. Damaged blobs are
    /// dropped.
    ///
    /// # Errors
    /// `Unavailable` when the server is shutting down.
    pub(super) async fn are_sound(&self, instance: &Instance, digests: Vec<Digest>) -> Result<bool> {
        let located = self.locate(instance, &digests, Purpose::Read).await?;
        let place = self.place_to_hash(located.found.iter().flatten()).await?;
        let cas = self.clone();
        self.blocking(move || {
            let _place = place;
            let mut all = true;
            for found in &located.found {
                all &= match found {
                    Some(found) => is_sound(&cas, found)?,
                    None => false,
                };
            }
            Ok(all)
        })
        .await?
    }

    /// Checks and writes items; the written files are handed to the actor before this returns. Blocks.
    fn write_batch(
        &self,
        instance: crate::instance::InstanceId,
        blobs: &[&(Digest, Payload)],
        prepared: Prepared,
    ) -> (Vec<Result<()>>, Option<Visible>) {
        let mut absent: HashSet<Digest> = prepared.absent.into_iter().collect();
        let mut files = prepared.room.map(|room| self.new_files(room));
        let outcomes = blobs.iter().map(|(digest, payload)| {
            self.check_blob_size(digest.size(), &digest.to_string())?;
            let bytes = check_item(*digest, payload)?;
            if !absent.contains(digest) {
                return Ok(());
            }
            let files = files.as_mut().map_err(|error| error.clone())?;
            let key = Key { digest: *digest, instance, kind: EntryKind::Blob };
            files.write(key, std::slice::from_ref(&bytes)).map_err(|error| failed(*digest, &error))?;
            self.shared.remember(instance, *digest, &[bytes]);
            absent.remove(digest);
            Ok(())
        });
        let outcomes = outcomes.collect();
        (outcomes, files.ok().and_then(NewFiles::commit))
    }

    /// Starts an upload, or resumes one that broke: `name` is the whole resource name (BS-06), `offset` the first
    /// `write_offset`. Offset 0 discards the bytes of an earlier attempt (BS-20).
    ///
    /// # Errors
    /// `Invalid` when the blob is too large or `offset` is not the position of that upload; `Exhausted` when there is no room;
    /// `Unavailable` when an earlier stream of this upload does not end.
    pub async fn begin_upload(
        &self,
        instance: &Instance,
        name: &str,
        digest: Digest,
        offset: u64,
    ) -> Result<Upload> {
        self.check_blob_size(digest.size(), &digest.to_string())?;
        if digest.is_empty() {
            return Ok(Upload::Present);
        }
        let blob = Key { digest, instance: instance.blobs(), kind: EntryKind::Blob };
        let name = upload_name(instance, name);
        let patience = Instant::now() + TWIN_WAIT;
        let (mut was_busy, mut looks, mut beside) = (false, 0, false);
        loop {
            match self.ask(BeginUpload { name, blob, offset, beside }).await?? {
                // A stored blob that turns out to be damaged is dropped, and this upload replaces it.
                Began::Present if self.are_sound(instance, vec![digest]).await? => {
                    return Ok(Upload::Present);
                }
                Began::Present if looks < SOUND_TRIES => looks += 1,
                Began::Present => return Err(spoilt()),
                Began::Start(mut attempt) => {
                    if let Some(room) = &mut attempt.room
                        && let Err(error) = self.pay_for(room)
                    {
                        // A partial upload without a share would be charged to nobody, so it is not kept.
                        attempt.keep = false;
                        return Err(error);
                    }
                    return Ok(Upload::Writer(Box::new(BlobWriter::new(
                        attempt,
                        self.received(),
                        self.clone(),
                    ))));
                }
                // A client that resumes at once may find its own broken stream still being saved.
                Began::Busy(progress) if !was_busy => {
                    was_busy = true;
                    let _ = tokio::time::timeout(PARK_WAIT, progress.ended()).await;
                }
                Began::Busy(_) => {
                    let problem = format!("another stream still uploads blob {digest} under this name");
                    return Err(Error::Unavailable(problem));
                }
                // BS-28: if the other stream stores the blob, this one is done too.
                Began::NoRoomBeside(twin) => beside = !twin.ends_before(patience).await,
            }
        }
    }

    /// The progress of an upload; an unknown upload is at 0 (BS-32).
    ///
    /// # Errors
    /// `Unavailable` when the server is shutting down.
    pub async fn query_upload(
        &self,
        instance: &Instance,
        name: &str,
        digest: Digest,
    ) -> Result<UploadStatus> {
        if digest.is_empty() {
            return Ok(UploadStatus { committed: 0, complete: true });
        }
        let blob = Key { digest, instance: instance.blobs(), kind: EntryKind::Blob };
        let name = upload_name(instance, name);
        let status = self.ask(QueryUpload { name, blob }).await?;
        if !status.complete || self.are_sound(instance, vec![digest]).await? {
            return Ok(status);
        }
        self.ask(QueryUpload { name, blob }).await
    }

    pub(super) fn check_blob_size(&self, size: u64, what: &str) -> Result<()> {
        let max = self.shared.settings.max_blob_bytes;
        if size <= max {
            return Ok(());
        }
        Err(Error::Invalid(format!(
            "{} has {size} bytes; this server stores blobs of at most {max} (cache.max_blob_size_gb)",
            what.escape_debug()
        )))
    }

    pub(super) async fn ask<M>(&self, message: M) -> Result<M::Result>
    where
        M: Message<Result: Send> + Send + 'static,
        CasActor: Handler<M>,
        <CasActor as actix::Actor>::Context: ToEnvelope<CasActor, M>,
    {
        self.store.send(message).await.map_err(|_| going_down())
    }

    /// Runs file work on a blocking thread, or right here if this is one. It runs to its end even if nobody waits for it any
    /// more.
    pub(super) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T> {
        if self.blocks {
            return Ok(work());
        }
        self.shared.runtime.spawn_blocking(work).await.map_err(|error| {
            if error.is_panic() { Error::internal("file work of the store panicked") } else { going_down() }
        })
    }

    /// Blocks a worker thread on a call. The handle that `ask` gets does its file work on this thread.
    pub(super) fn block_on<T>(&self, ask: impl AsyncFnOnce(Self) -> T) -> T {
        let here = Self { blocks: true, ..self.clone() };
        self.shared.runtime.block_on(ask(here))
    }
}

/// Groups the items of a batch, by position, into steps that share one reservation. Plain items form one step, because their
/// bytes are already there. Compressed items declare their size only in the digest, so a step reserves at most
/// [`ROOM_STEP_BYTES`] for them; a larger item is a step of its own.
fn in_steps(blobs: &[(Digest, Payload)]) -> Vec<Vec<usize>> {
    let (mut plain, mut steps): (Vec<usize>, Vec<Vec<usize>>) = (Vec::new(), Vec::new());
    let mut left = 0;
    for (at, (digest, payload)) in blobs.iter().enumerate() {
        let size = digest.size().max(1);
        match (payload, steps.last_mut()) {
            (Payload::Plain(_), _) => plain.push(at),
            (Payload::Zstd(_), Some(step)) if size <= left => {
                step.push(at);
                left -= size;
            }
            (Payload::Zstd(_), _) => {
                steps.push(vec![at]);
                left = ROOM_STEP_BYTES.saturating_sub(size);
            }
        }
    }
    if !plain.is_empty() {
        steps.insert(0, plain);
    }
    steps
}

/// A key of constant length for an upload name of any length.
fn upload_name(instance: &Instance, name: &str) -> Digest {
    DigestFunction::Sha256.digest(format!("{}\0{name}", instance.id().0).as_bytes())
}

impl std::fmt::Debug for Cas {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cas").field("root", &self.shared.settings.root).finish_non_exhaustive()
    }
}
