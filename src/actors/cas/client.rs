//! [`Cas`]: the handle to the store for RPC handlers and worker threads.
//!
//! Each call is a look-up in the index (`lookup`), or one or two messages to the actor, with file work on a blocking
//! thread. The other modules of the store add their own calls: `batches` for several blobs at once, `uploads`
//! for single blobs and downloads, `outputs` for workers, `results` for the action cache, `trees` for directories and
//! input roots, `forms` for compressed blobs and chunks.

use super::{
    CasActor, StoreShared,
    numbers::{InspectStore, StoreInspection, StoreMeasurement},
    settings::StoreSettings,
};
use crate::{
    budget::{Budget, Share},
    caller::{Build, Caller, Owner},
    nondeterminism::NonDeterminismReports,
};
use actix::{Addr, Handler, Message, dev::ToEnvelope};
use gorego_reapi::error::{Error, Result};
use std::{collections::HashSet, sync::Arc};

/// The origin of a result, stored with it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Provenance {
    /// The worker that ran the action; empty when a client uploaded the result.
    pub worker: String,
    /// The tool invocation that caused the run; empty when unknown.
    pub tool_invocation_id: String,
    /// Network address of the client that uploaded it; empty when a worker made it.
    pub peer: String,
    /// Name of the principal that uploaded it or was the first to request the run that made it.
    pub principal: String,
}

/// A handle to the store. It is cheap to clone and can be used from any thread. Methods that do file work and are not
/// `async` block and are for worker threads only: they panic on a thread that runs an async runtime.
///
/// A tier, such as a backing cache or a cluster node that holds a blob, would stand in front of this handle. Handlers
/// and workers use only this type and the types that it returns. So a tier would implement these methods and leave the
/// rest unchanged:
///
/// - presence: [`Cas::find_missing`], [`Cas::blob_by_hash`];
/// - reading: [`Cas::open`], [`Cas::read_many`], and [`Cas::directories`] where a walk reaches a directory that is not
///   stored here;
/// - writing: [`Cas::write_many`], [`Cas::begin_upload`] and [`Cas::new_blob`];
/// - results: [`Cas::get_result`] and [`Cas::put_result`].
///
/// The tier would fetch a missing blob and write it to this store before handing it out, so that holds and checks keep
/// working. Staging, outputs, compressed reads, splits and splices are built on these calls.
#[derive(Clone)]
pub struct Cas {
    /// Shared, because a clone of an address takes two allocations.
    store: Arc<Addr<CasActor>>,
    shared: Arc<StoreShared>,
    /// The caller that is charged. Reading, decoding and hashing count against its bounds and the bounds of its peer.
    caller: Caller,
    /// The build to which all entries that are looked up or stored are leased; `None` for work of the server itself.
    lessee: Option<Owner>,
    /// Whether stored bytes are charged, too. They are not when the server itself stores them.
    is_client: bool,
    /// Whether the handle belongs to a worker thread, which may block. File work is then done on that thread.
    blocks: bool,
}

/// The error of a store whose actor has stopped.
pub(super) fn going_down() -> Error {
    Error::Unavailable("the store of this server is shutting down".into())
}

/// The error for an upload whose stored copy was found damaged on every try.
pub(super) fn spoilt() -> Error {
    Error::Unavailable("the stored file of this blob keeps changing; try again".into())
}

impl Cas {
    pub(super) fn new(store: Addr<CasActor>, shared: Arc<StoreShared>) -> Self {
        Self {
            store: Arc::new(store),
            shared,
            caller: Caller::default(),
            lessee: None,
            is_client: false,
            blocks: false,
        }
    }

    /// The actor's address, for messages such as [`super::InspectStore`].
    pub fn actor(&self) -> &Addr<CasActor> {
        &self.store
    }

    /// The numbers of the store.
    ///
    /// # Errors
    /// `Unavailable` when the server is shutting down.
    pub(crate) async fn inspect(&self) -> Result<StoreInspection> {
        self.ask(InspectStore).await
    }

    /// From now on, `reports` receives a report when a result replaces a different one. Only the first call has an
    /// effect.
    pub(crate) fn report_to(&self, reports: NonDeterminismReports) {
        let _ = self.shared.reports.set(reports);
    }

    /// The free bytes of the disk of the store, if they can be found out. Blocks.
    pub(crate) fn disk_free(&self) -> Option<u64> {
        self.shared.volume.space().ok().map(|space| space.free_bytes)
    }

    /// The counters of the index. Holds the lock that look-ups share once.
    pub fn measure(&self) -> StoreMeasurement {
        StoreMeasurement { scrub: self.shared.scrubbed.tally(), ..self.shared.view.measure() }
    }

    /// Returns a handle for the requests of a client. Bytes that the client sends or reads count against the bounds of
    /// its connection and its peer.
    pub fn on_behalf_of(&self, caller: Caller) -> Self {
        let lessee = Some(Owner { peer: caller.peer, build: Build::UNNAMED });
        Self { caller, lessee, is_client: true, ..self.clone() }
    }

    /// Returns a handle for work that the server does for a client, such as an action or a download. Bytes that are
    /// read are charged to the client, and bytes that are stored are not.
    pub fn working_for(&self, caller: Caller) -> Self {
        let lessee = Some(Owner { peer: caller.peer, build: Build::UNNAMED });
        Self { caller, lessee, is_client: false, ..self.clone() }
    }

    /// Returns this handle for a request of a build. Entries that are looked up or stored through it are leased to the
    /// build. Without a build, they are leased to the peer of the caller, for a shorter time.
    pub fn for_build(self, build: Owner) -> Self {
        Self { lessee: Some(build), ..self }
    }

    /// Extends the leases of builds that are active although they send no requests. Does not block.
    pub(crate) fn keep_active(&self, builds: HashSet<Owner>) {
        let shared = self.shared.clone();
        self.shared.runtime.spawn(async move {
            for build in builds {
                shared.view.read(Some(build), |_| ());
            }
        });
    }

    /// Returns a handle without leases, for reads before it is known whether anything may be leased.
    pub(super) fn without_leases(&self) -> Self {
        Self { lessee: None, ..self.clone() }
    }

    /// The build to which all entries that are looked up or stored are leased.
    pub(super) fn lessee(&self) -> Option<Owner> {
        self.lessee
    }

    /// The caller that is charged.
    pub(super) fn caller(&self) -> Caller {
        self.caller
    }

    pub(super) fn client(&self) -> Option<Caller> {
        self.is_client.then_some(self.caller)
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

    /// The memory budget for decoders of compressed uploads; see [`super::uploads::decoders`].
    pub fn decoders(&self) -> &Budget {
        &self.shared.decoders
    }

    pub(super) fn check_blob_size(&self, size: u64, what: impl ToString) -> Result<()> {
        let StoreSettings { max_blob_bytes, max_bytes, .. } = self.shared.settings;
        if size <= max_blob_bytes {
            return Ok(());
        }
        // The setting that has to be raised.
        let key = if max_blob_bytes < max_bytes { "cache.max_blob_size_gb" } else { "max_size_gb" };
        Err(Error::Invalid(format!(
            "{} has {size} bytes; this server stores blobs of at most {max_blob_bytes} ({key})",
            what.to_string().escape_debug()
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

    /// Runs file work on a blocking thread, or on this thread if the handle belongs to a worker. The work runs to its
    /// end even if the caller does not wait for it.
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

    /// Like [`Cas::blocking`], for work for which room was taken: a share of a budget, or a place. The room moves into
    /// the job and comes back with its answer. So if the caller does not wait, the room is given back when the work
    /// ends, and not before.
    pub(super) async fn blocking_with<R: Send + 'static, T: Send + 'static>(
        &self,
        room: R,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<(T, R)> {
        self.blocking(move || (work(), room)).await
    }

    /// Blocks a worker thread on a call. The handle that `ask` gets does its file work on this thread.
    pub(super) fn block_on<T>(&self, ask: impl AsyncFnOnce(Self) -> T) -> T {
        let here = Self { blocks: true, ..self.clone() };
        self.shared.runtime.block_on(ask(here))
    }
}

impl std::fmt::Debug for Cas {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cas").field("root", &self.shared.settings.root).finish_non_exhaustive()
    }
}
