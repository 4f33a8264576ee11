//! Remote assets: content by URI, fetched or pushed (AST-01..11).
//!
//! [`AssetActor`] owns the [`bindings::Bindings`] (which content an asset stands for) and the flights (running
//! downloads). It decides and never waits: a flight is a separate task on the runtime, and reports to the actor when it
//! has ended. All requests go through [`client::Assets`], which also checks that bound content is still stored.
//!
//! Invariants: callers that want the same asset share one flight, unless it began too long ago for them ([`flights`]).
//! A flight ends at the latest deadline of its callers, and at most `assets.timeout` after its start, whether or not a
//! caller still waits. Content is bound only once it is stored and its checksum is verified, and it never replaces
//! newer content. Bindings survive a restart. Bindings from the last seconds before a kill may be lost, which costs a
//! download. Waits go grpc > asset > cas.

pub(crate) mod bindings;
pub(crate) mod client;
mod download;
mod flight;
mod flights;
pub mod integrity;
pub mod layout;
pub(crate) mod messages;
pub mod origins;
pub mod outcome;
mod patience;
mod persist;
pub mod request;
pub mod unpack;

use crate::{
    actors::{
        cas::client::Cas,
        mail::{Mail, Receive, counted},
    },
    budget::{Bounds, Budget},
};
use actix::{Actor, ActorContext as _, AsyncContext as _, Context, Message, MessageResult};
use bindings::{Binding, Bindings};
use client::Assets;
use download::Downloader;
use flights::{FlightPlan, Flights};
use messages::{BindAsset, CloseAssets, JoinFlight, Joined, Landed, LookUpAsset};
use origins::Origins;
use outcome::Fetched;
use persist::BindingsFile;
use request::AssetKey;
use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::{runtime::Handle, sync::watch, time::Instant};

/// Target of the log lines of this module.
const LOG: &str = "gorego::asset";
/// How often changed bindings are saved.
const SAVE_INTERVAL: Duration = Duration::from_secs(5);
/// Bindings that are copied by one message, in about 0.1 ms.
const COPIED_PER_TURN: usize = 1_000;
/// Messages that may wait for the actor before senders have to wait.
const MAILBOX_CAPACITY: usize = 1_024;

/// The settings of the service; [`crate::config::AssetsConfig`] documents each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AssetSettings {
    /// The hosts and networks that may be contacted.
    pub origins: Origins,
    /// Whether clients may bind content to URIs.
    pub push: bool,
    /// Maximum number of flights at the same time.
    pub concurrency: usize,
    /// Maximum size of one download.
    pub max_download_bytes: u64,
    /// Maximum size of the unpacked content of an archive.
    pub max_unpacked_bytes: u64,
    /// The longest duration of a flight.
    pub timeout: Duration,
    /// Redirects that one download follows.
    pub max_redirects: usize,
    /// How long content without a checksum counts as current.
    pub max_age: Duration,
    /// The file in which bindings survive a restart. It is in the store's directory.
    pub file: PathBuf,
}

/// State shared by the actor, its flights and its handles.
#[derive(Debug)]
pub(crate) struct AssetShared {
    settings: Arc<AssetSettings>,
    cas: Cas,
    runtime: Handle,
    downloader: Downloader,
    /// Limits the flights that download at the same time. A few of the places are not available to a single peer, and a
    /// few more are not available to a single connection.
    runway: Budget,
    /// Memory for the decoders of archives that are unpacked.
    unpacking: Budget,
    file: BindingsFile,
}

/// The budget for `concurrency` flights.
fn runway(concurrency: usize) -> Budget {
    Budget::new(Bounds::shared("downloads", concurrency as u64))
}

/// The owner of bindings and flights.
#[derive(Debug)]
pub struct AssetActor {
    mail: Mail,
    bindings: Bindings,
    /// Whether the bindings differ from those on disk.
    unsaved: bool,
    /// Whether a save is running; there is at most one.
    saving: bool,
    /// The number of saves that were begun.
    saves: u64,
    flights: Flights,
    shared: Arc<AssetShared>,
}

impl AssetActor {
    /// Reads the bindings of an earlier run. Blocks. This process must already hold the lock on the store's directory.
    pub fn open(settings: AssetSettings, cas: Cas, runtime: Handle) -> Self {
        let settings = Arc::new(settings);
        let shared = AssetShared {
            downloader: Downloader::new(settings.clone()),
            runway: runway(settings.concurrency),
            unpacking: Budget::keeping_free(unpack::UNPACKING, unpack::LARGEST_BYTES),
            file: BindingsFile::new(settings.file.clone()),
            cas,
            runtime,
            settings,
        };
        Self {
            mail: Mail::default(),
            bindings: shared.file.load(),
            unsaved: false,
            saving: false,
            saves: 0,
            flights: Flights::default(),
            shared: Arc::new(shared),
        }
    }

    /// The counter of the messages that the actor handles.
    pub fn mail(&self) -> Mail {
        self.mail.clone()
    }

    /// Starts the actor on the current arbiter or local task set.
    pub fn launch(self) -> Assets {
        let shared = self.shared.clone();
        Assets::new(self.start(), shared)
    }

    /// Saves the bindings in the background, if they changed. They are copied in parts, between which other messages
    /// are handled, and encoded on another thread.
    fn save(&mut self, ctx: &mut Context<Self>) {
        if self.unsaved && !self.saving {
            (self.unsaved, self.saving) = (false, true);
            self.bindings.begin_copy();
            ctx.notify(CopyBindings { copied: Vec::new() });
        }
    }

    fn write(&mut self, copied: Vec<(AssetKey, Binding)>, ctx: &mut Context<Self>) {
        self.saves += 1;
        let (number, shared) = (self.saves, self.shared.clone());
        let written =
            self.shared.runtime.spawn_blocking(move || shared.file.write(number, &bindings::encode(&copied)));
        let done = actix::fut::wrap_future::<_, Self>(written);
        ctx.spawn(actix::fut::ActorFutureExt::map(done, |written, actor, _| {
            actor.saving = false;
            // A failed write is tried again.
            actor.unsaved |= !written.unwrap_or(false);
        }));
    }
}

/// Copies the next part of the bindings.
#[derive(Message)]
#[rtype(result = "()")]
struct CopyBindings {
    copied: Vec<(AssetKey, Binding)>,
}

impl Receive<CopyBindings> for AssetActor {
    type Answer = ();

    fn receive(&mut self, CopyBindings { mut copied }: CopyBindings, ctx: &mut Self::Context) {
        if self.bindings.copy(&mut copied, COPIED_PER_TURN) {
            ctx.notify(CopyBindings { copied });
        } else {
            self.write(copied, ctx);
        }
    }
}

counted!(AssetActor);

impl Actor for AssetActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(MAILBOX_CAPACITY);
        ctx.run_interval(SAVE_INTERVAL, Self::save);
    }
}

impl Receive<LookUpAsset> for AssetActor {
    type Answer = MessageResult<LookUpAsset>;

    fn receive(&mut self, LookUpAsset { keys, oldest }: LookUpAsset, _: &mut Self::Context) -> Self::Answer {
        let now = SystemTime::now();
        MessageResult(keys.iter().map(|key| self.bindings.look_up(key, oldest, now)).collect())
    }
}

impl Receive<BindAsset> for AssetActor {
    type Answer = ();

    fn receive(&mut self, BindAsset { keys, binding }: BindAsset, _: &mut Self::Context) {
        for key in keys {
            self.bindings.bind(key, binding.clone());
        }
        self.unsaved = true;
    }
}

impl Receive<JoinFlight> for AssetActor {
    type Answer = MessageResult<JoinFlight>;

    fn receive(
        &mut self,
        JoinFlight { request, known, oldest, deadline, caller }: JoinFlight,
        ctx: &mut Self::Context,
    ) -> Self::Answer {
        let (now, asked_at) = (Instant::now(), SystemTime::now());
        let newer = self.bindings.newer(&request.keys(), &known, oldest, asked_at);
        if let Some((index, Binding { digest, expires_at, .. })) = newer
            && let Some(uri) = request.uris.get(index).cloned()
        {
            let fetched = Fetched { uri, digest, expires_at };
            return MessageResult(Ok(Joined(watch::channel(Some(Ok(fetched))).1)));
        }
        let key = request.flight_key();
        if let Some(outcome) = self.flights.join(key, oldest, deadline, caller) {
            return MessageResult(Ok(Joined(outcome)));
        }
        let end = now + self.shared.settings.timeout;
        let begun =
            self.flights.begin(key, FlightPlan { asked_at, deadline, end, size: request.size(), caller });
        MessageResult(begun.map(|begun| {
            let joined = Joined(begun.outcome.clone());
            flight::launch(self.shared.clone(), ctx.address(), begun, request, asked_at);
            joined
        }))
    }
}

impl Receive<Landed> for AssetActor {
    type Answer = ();

    fn receive(&mut self, Landed { flight, bind, outcome }: Landed, _: &mut Self::Context) {
        if let Some((key, binding)) = bind {
            self.bindings.bind_unless_newer(key, binding, SystemTime::now());
            self.unsaved = true;
        }
        self.flights.end(flight, outcome);
    }
}

impl Receive<CloseAssets> for AssetActor {
    type Answer = ();

    fn receive(&mut self, _: CloseAssets, ctx: &mut Self::Context) {
        if self.unsaved || self.saving {
            // Blocking is fine: this is the last thing that the actor does, and only the end of the process waits for
            // it.
            self.saves += 1;
            self.shared.file.write(self.saves, &self.bindings.encode());
        }
        ctx.stop();
    }
}
