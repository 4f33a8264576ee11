//! Remote assets: content by URI, fetched or pushed (AST-01..11).
//!
//! [`AssetActor`] owns the [`bindings::Bindings`] (which content an asset stands for) and the flights (downloads under way). It
//! decides and never waits: a flight is a task of its own on the runtime, and tells the actor when it has landed. Everybody
//! asks through [`client::Assets`], which also asks the store whether what is bound still exists.
//!
//! Invariants: who wants an asset shares the flight that is under way, unless it began too long ago for them ([`flights`]). A
//! flight ends by itself, at the latest deadline of those who joined it and at most `assets.timeout` after its start, whether
//! or not anybody still waits. Content is bound only once it is stored and its checksum was right, and never in place of newer
//! content. Bindings survive a restart; what was bound in the last seconds before a kill may be lost, which costs a download.
//! Waits go grpc > asset > cas.

pub mod bindings;
pub mod client;
mod download;
mod flight;
mod flights;
pub mod integrity;
pub mod layout;
pub mod messages;
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
use flights::{Flights, Plan};
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

/// Target of this room's log lines.
const LOG: &str = "gorego::asset";
/// How often bindings that changed are written down.
const SAVE_INTERVAL: Duration = Duration::from_secs(5);
/// Bindings that are copied in one turn, in about 0.1 ms.
const COPIED_PER_TURN: usize = 1_000;
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
    /// A place for each flight that may be in the air. A peer gets all but the last ones, and so does a connection of
    /// what its peer gets.
    runway: Budget,
    file: BindingsFile,
}

/// Room for so many flights in the air.
fn runway(concurrency: usize) -> Budget {
    Budget::new(Bounds::shared("downloads", concurrency as u64))
}

/// The owner of bindings and flights.
#[derive(Debug)]
pub struct AssetActor {
    mail: Mail,
    bindings: Bindings,
    /// Whether they differ from what is on disk.
    unsaved: bool,
    /// Whether a write is under way; one at a time.
    saving: bool,
    /// How many writes were begun.
    saves: u64,
    flights: Flights,
    shared: Arc<Shared>,
}

impl AssetActor {
    /// Reads what an earlier run has bound. Blocks. The store's directory must be this process's already.
    pub fn open(settings: AssetSettings, cas: Cas, runtime: Handle) -> Self {
        let settings = Arc::new(settings);
        let shared = Shared {
            downloader: Downloader::new(settings.clone()),
            runway: runway(settings.concurrency),
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

    /// Counts the messages that it handles.
    pub fn mail(&self) -> Mail {
        self.mail.clone()
    }

    /// Starts the actor on the current arbiter or local task set.
    pub fn launch(self) -> Assets {
        let shared = self.shared.clone();
        Assets::new(self.start(), shared)
    }

    /// Writes the bindings down in the background, if they changed. They are copied in turns, between which other messages are
    /// handled, and encoded elsewhere.
    fn save(&mut self, ctx: &mut Context<Self>) {
        if self.unsaved && !self.saving {
            (self.unsaved, self.saving) = (false, true);
            ctx.notify(CopyBindings { copied: Vec::new(), after: 0 });
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
            // What could not be written is tried again.
            actor.unsaved |= !written.unwrap_or(false);
        }));
    }
}

/// Goes on to copy the bindings.
#[derive(Message)]
#[rtype(result = "()")]
struct CopyBindings {
    copied: Vec<(AssetKey, Binding)>,
    /// [`Bindings::copy`].
    after: u64,
}

impl Receive<CopyBindings> for AssetActor {
    type Answer = ();

    fn receive(&mut self, CopyBindings { mut copied, after }: CopyBindings, ctx: &mut Self::Context) {
        match self.bindings.copy(&mut copied, after, COPIED_PER_TURN) {
            Some(after) => ctx.notify(CopyBindings { copied, after }),
            None => self.write(copied, ctx),
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
        let begun = self.flights.begin(key, Plan { asked_at, deadline, end, size: request.size(), caller });
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
            // The last thing that this actor does; nobody waits for it but the end of the process.
            self.saves += 1;
            self.shared.file.write(self.saves, &self.bindings.encode());
        }
        ctx.stop();
    }
}
