//! Remote assets: content by URI, fetched or pushed (AST-01..11).
//!
//! [`AssetActor`] owns the [`bindings::Bindings`] (which content an asset stands for) and the flights (downloads under way). It
//! decides and never waits: a flight is a task of its own on the runtime, and tells the actor when it has landed. Everybody asks
//! through [`client::Assets`], which also asks the store whether what is bound still exists.
//!
//! Invariants: an asset has at most one flight, shared by all who want it meanwhile. A flight ends by itself, at the latest
//! deadline of those who joined it, whether or not anybody still waits. Content is bound only once it is stored and its
//! checksum was right. Bindings survive a restart; what was bound in the last seconds before a kill may be lost, which costs a
//! download. Waits go grpc > asset > cas.

pub mod bindings;
pub mod client;
mod download;
mod flight;
pub mod integrity;
pub mod layout;
pub mod messages;
pub mod origins;
pub mod outcome;
mod persist;
pub mod request;
pub mod unpack;

use crate::{actors::cas::client::Cas, error::Error};
use actix::{Actor, ActorContext as _, AsyncContext as _, Context, Handler, MessageResult};
use bindings::{Binding, Bindings};
use client::Assets;
use download::Downloader;
use flight::Outcome;
use messages::{BindAsset, CloseAssets, JoinFlight, Joined, Landed, LookUpAsset};
use origins::Origins;
use outcome::Fetched;
use persist::BindingsFile;
use request::AssetKey;
use std::{
    collections::HashMap,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::{
    runtime::Handle,
    sync::{Semaphore, watch},
    time::Instant,
};

/// Target of this room's log lines.
const LOG: &str = "gorego::asset";
/// Flights under way or waiting for their turn; more are refused.
const MAX_FLIGHTS: usize = 10_000;
/// Bytes of the requests of all these flights. Most are a kilobyte, but one may have megabytes of qualifiers, and outlives the
/// call that made it.
const MAX_FLIGHT_BYTES: usize = 64 * 1024 * 1024;
/// How long a client should wait before it tries a full house again.
const FULL_RETRY: Duration = Duration::from_secs(5);
/// How often bindings that changed are written down.
const SAVE_INTERVAL: Duration = Duration::from_secs(5);
/// Messages that may wait for the actor before senders have to wait too.
const MAILBOX_CAPACITY: usize = 1_024;

/// What the service is told at start; see [`crate::config::AssetsConfig`] for each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AssetSettings {
    /// What may be contacted.
    pub origins: Origins,
    /// Whether clients may bind content to URIs.
    pub push: bool,
    /// Flights at the same time.
    pub concurrency: usize,
    /// Largest download.
    pub max_download_bytes: u64,
    /// What an archive may unpack to.
    pub max_unpacked_bytes: u64,
    /// Longest flight.
    pub timeout: Duration,
    /// Redirects that one download follows.
    pub max_redirects: usize,
    /// How long content without a checksum is taken to be current.
    pub max_age: Duration,
    /// Where bindings survive a restart; its directory is the store's.
    pub file: PathBuf,
}

/// What the actor, its flights and the handles to it have in common.
#[derive(Debug)]
pub(crate) struct Shared {
    settings: Arc<AssetSettings>,
    cas: Cas,
    runtime: Handle,
    downloader: Downloader,
    /// One permit for each flight that may be in the air.
    runway: Semaphore,
    file: BindingsFile,
}

/// A download under way.
#[derive(Debug)]
struct Flight {
    outcome: watch::Sender<Option<Outcome>>,
    /// When it has to end.
    deadline: watch::Sender<Instant>,
    /// Bytes of its request.
    size: usize,
}

/// The owner of bindings and flights.
#[derive(Debug)]
pub struct AssetActor {
    bindings: Bindings,
    /// Whether they differ from what is on disk.
    unsaved: bool,
    /// Whether a write is under way; one at a time.
    saving: bool,
    /// How many writes were begun.
    saves: u64,
    flights: HashMap<AssetKey, Flight>,
    /// Bytes of the requests of all flights.
    flight_bytes: usize,
    shared: Arc<Shared>,
}

impl AssetActor {
    /// Reads what an earlier run has bound. Blocks. The store's directory must be this process's already.
    pub fn open(settings: AssetSettings, cas: Cas, runtime: Handle) -> Self {
        let settings = Arc::new(settings);
        let shared = Shared {
            downloader: Downloader::new(settings.clone()),
            runway: Semaphore::new(settings.concurrency),
            file: BindingsFile::new(settings.file.clone()),
            cas,
            runtime,
            settings,
        };
        Self {
            bindings: shared.file.load(),
            unsaved: false,
            saving: false,
            saves: 0,
            flights: HashMap::new(),
            flight_bytes: 0,
            shared: Arc::new(shared),
        }
    }

    /// Starts the actor on the current arbiter or local task set.
    pub fn launch(self) -> Assets {
        let shared = self.shared.clone();
        Assets::new(self.start(), shared)
    }

    /// Writes the bindings down in the background, if they changed.
    fn save(&mut self, ctx: &mut Context<Self>) {
        if !self.unsaved || self.saving {
            return;
        }
        (self.unsaved, self.saving) = (false, true);
        let (save, shared) = (self.next_save(), self.shared.clone());
        let written = self.shared.runtime.spawn_blocking(move || save(&shared.file));
        let done = actix::fut::wrap_future::<_, Self>(written);
        ctx.spawn(actix::fut::ActorFutureExt::map(done, |written, actor, _| {
            actor.saving = false;
            // What could not be written is tried again.
            actor.unsaved |= !written.unwrap_or(false);
        }));
    }

    /// Writes down what is bound now, and says whether that worked. Blocks.
    fn next_save(&mut self) -> impl FnOnce(&BindingsFile) -> bool + Send + 'static {
        self.saves += 1;
        let (number, bytes) = (self.saves, self.bindings.encode());
        move |file| file.write(number, &bytes)
    }
}

impl Actor for AssetActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(MAILBOX_CAPACITY);
        ctx.run_interval(SAVE_INTERVAL, Self::save);
    }
}

impl Handler<LookUpAsset> for AssetActor {
    type Result = MessageResult<LookUpAsset>;

    fn handle(&mut self, LookUpAsset { keys, oldest }: LookUpAsset, _: &mut Self::Context) -> Self::Result {
        let now = SystemTime::now();
        MessageResult(keys.iter().map(|key| self.bindings.look_up(key, oldest, now)).collect())
    }
}

impl Handler<BindAsset> for AssetActor {
    type Result = ();

    fn handle(&mut self, BindAsset { keys, binding }: BindAsset, _: &mut Self::Context) {
        for key in keys {
            self.bindings.bind(key, binding.clone());
        }
        self.unsaved = true;
    }
}

impl Handler<JoinFlight> for AssetActor {
    type Result = MessageResult<JoinFlight>;

    fn handle(
        &mut self,
        JoinFlight { request, known, oldest, deadline }: JoinFlight,
        ctx: &mut Self::Context,
    ) -> Self::Result {
        let key = request.flight_key();
        if let Some(flight) = self.flights.get(&key) {
            flight.deadline.send_if_modified(|latest| {
                let later = deadline > *latest;
                *latest = deadline.max(*latest);
                later
            });
            return MessageResult(Ok(Joined(flight.outcome.subscribe())));
        }
        let newer = self.bindings.newer(&request.keys(), &known, oldest, SystemTime::now());
        if let Some((index, Binding { digest, expires_at, .. })) = newer
            && let Some(uri) = request.uris.get(index).cloned()
        {
            let fetched = Fetched { uri, digest, expires_at };
            return MessageResult(Ok(Joined(watch::channel(Some(Ok(fetched))).1)));
        }
        let size = request.size();
        if self.flights.len() >= MAX_FLIGHTS || self.flight_bytes.saturating_add(size) > MAX_FLIGHT_BYTES {
            return MessageResult(Err(Error::Exhausted {
                message: format!("{} fetches are under way or waiting; try again", self.flights.len()),
                retry_after: Some(FULL_RETRY),
            }));
        }
        let (outcome, landing) = watch::channel(None);
        let (deadline, latest) = watch::channel(deadline);
        self.flight_bytes = self.flight_bytes.saturating_add(size);
        self.flights.insert(key, Flight { outcome, deadline, size });
        flight::launch(self.shared.clone(), ctx.address(), request, latest);
        MessageResult(Ok(Joined(landing)))
    }
}

impl Handler<Landed> for AssetActor {
    type Result = ();

    fn handle(&mut self, Landed { flight, bind, outcome }: Landed, _: &mut Self::Context) {
        if let Some((key, binding)) = bind {
            self.bindings.bind(key, binding);
            self.unsaved = true;
        }
        if let Some(flight) = self.flights.remove(&flight) {
            self.flight_bytes = self.flight_bytes.saturating_sub(flight.size);
            flight.outcome.send_replace(Some(outcome));
        }
    }
}

impl Handler<CloseAssets> for AssetActor {
    type Result = ();

    fn handle(&mut self, _: CloseAssets, ctx: &mut Self::Context) {
        if self.unsaved || self.saving {
            // The last thing that this actor does; nobody waits for it but the end of the process.
            let save = self.next_save();
            save(&self.shared.file);
        }
        ctx.stop();
    }
}
