//! One server process, from settings to exit. Only wiring and shutdown are here.
//!
//! Parts are created in the order store, workers, scheduler, edge, and shut down in reverse. The scheduler takes no new
//! work and finishes its operations; then the edge takes no new connections and lets the open calls finish; then the store
//! closes. All of this has one deadline, the [`Exit`], whatever clients keep open. The owner actors are watched: if one
//! dies, the process exits, because a partial server is worse than none.

mod exit;
mod fill;
mod listen;
mod observer;
mod owners;
pub(crate) mod place;
mod pools;
mod reload;
mod tls;

use crate::{
    access::AccessLoader,
    actors::{
        asset::{AssetActor, client::Assets, messages::CloseAssets, origins::Origins},
        cas::{CasActor, CloseStore, client::Cas},
        scheduler::{
            SchedulerActor,
            inputs::ImageSupply,
            settings::{Priorities, SchedulerSettings},
        },
    },
    administration::Administration,
    cgroups::LimitReport,
    config::{Config, Loaded, Settings},
    connections::Connections,
    gate::Gate,
    grpc::{self, Edge, ask::Scheduler},
    http::{self, cache::Cache, hosts::Hosts, operations::Operations},
    log_streams::LogStreams,
    logging::{self, Event},
    memory,
    quotas::Quotas,
    reload::{Reloadable, Reloader},
    sandbox::probe::Report,
    signals::{StopSignal, StopSignals},
    supervisor::{InheritedSockets, Supervision, Supervisor},
    telemetry::Metrics,
    tls::ServerTls,
    under_way::UnderWay,
};
use actix::{Actor as _, Addr};
use actix_rt::System;
use exit::{Exit, drain};
use fill::{asset_settings, log_settings, scheduler_settings, store_settings};
use futures::{FutureExt as _, future::BoxFuture};
use gorego_reapi::error::{Error, Result};
use listen::listen;
use observer::{Observer, PoolWatch};
use owners::Owners;
use place::Place;
use pools::{PoolMaker, Pools};
use reload::{ReloadHosts, ReloadImages, ReloadLogFilter, ReloadOrigins, ReloadQuotas};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::{net::SocketAddr, sync::Arc, time::Duration};
use tls::ReloadTls;
use tokio::{
    net::TcpListener,
    runtime::{Builder, Handle, Runtime},
    select,
    sync::oneshot,
    time::{Instant, timeout_at},
};

/// Target of the log lines of this file.
const LOG: &str = "gorego::server";

/// How long a client may be inactive, once the server only waits for clients, before its connection is closed.
const QUIET: Duration = Duration::from_secs(2);

/// The exit code after a second interrupt: 128 + SIGINT.
const INTERRUPTED: i32 = 130;

/// What is known when requests are answered.
#[derive(Debug, Clone)]
pub(crate) struct Ready {
    /// The listening address.
    pub address: SocketAddr,
    /// Whether it speaks TLS.
    pub tls: bool,
    /// Which protections of the sandbox work; `None` without a sandbox.
    pub sandbox: Option<Report>,
    /// How the limits of actions are enforced; `None` for a cache only.
    pub limits: Option<LimitReport>,
}

/// Runs a server until it is told to stop. `load` reads the configuration again for a reload. `ready` is called once, as soon as
/// requests are answered.
///
/// # Errors
/// The reason why it could not start, or the death of an owner actor.
pub(crate) fn run(
    (loaded, settings): (Loaded, Settings),
    load: impl Fn() -> Result<(Loaded, Settings)> + Send + Sync + 'static,
    supervision: Supervision,
    ready: impl FnOnce(Ready) + Send + 'static,
) -> Result<()> {
    let open_files = raise_open_files();
    let runtime = Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::io("start the async runtime", &error))?;
    // Both block, so they precede anything asynchronous. Each locks its directory.
    let store = CasActor::open(store_settings(&settings), &settings.instances, runtime.handle().clone())?;
    let place = match &settings.execution {
        Some(execution) => Some(Place::open(execution, runtime.handle(), open_files)?),
        None => None,
    };
    let runtime: Arc<Runtime> = Arc::new(runtime);
    let workers = runtime.handle().clone();
    // Dropping a runtime waits for its threads, which may be stuck in a system call. The process ends after this function.
    let _kept = std::mem::ManuallyDrop::new(runtime.clone());
    let system = System::with_tokio_rt(move || runtime);
    system.block_on(async move {
        let server = Server::start(settings, supervision, store, place, workers).await?;
        server.serve(Configuration { config: loaded.config, load: Box::new(load) }, ready).await
    })
}

/// Raises the limit of open files to the maximum, because every connection and every broken upload holds one. Returns the
/// previous soft limit, which commands inherit.
fn raise_open_files() -> Option<u64> {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).ok()?;
    limit.current
}

/// The current limit of open files.
fn descriptors() -> u64 {
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// The running parts of the server.
struct Server {
    settings: Settings,
    access: Arc<AccessLoader>,
    listener: TcpListener,
    /// The listener of the HTTP/1.1 cache, if it is enabled.
    http: Option<TcpListener>,
    tls: Option<ServerTls>,
    cas: Cas,
    assets: Assets,
    scheduler: Option<Addr<SchedulerActor>>,
    place: Option<Arc<Place>>,
    pools: Option<Pools>,
    origins: Origins,
    log_streams: LogStreams,
    metrics: Arc<Metrics>,
    /// The runtime that serves connections. The actors run on another thread.
    workers: Handle,
    supervision: Supervision,
}

/// The configuration of the start, and the way to read it again.
struct Configuration {
    config: Config,
    load: Box<dyn Fn() -> Result<(Loaded, Settings)> + Send + Sync>,
}

/// The reason for a shutdown.
enum Stop {
    /// A signal.
    Signal(&'static str),
    /// A fault of the server.
    Fault(Error),
}

impl Server {
    async fn start(
        settings: Settings,
        mut supervision: Supervision,
        store: CasActor,
        place: Option<Place>,
        workers: Handle,
    ) -> Result<Self> {
        let tls = tls::open(&settings)?;
        let access = Arc::new(AccessLoader::open(settings.access.clone(), &workers)?);
        let InheritedSockets { grpc, http } = std::mem::take(&mut supervision.sockets);
        let listener = listen(grpc, settings.listen_addr, "listen_addr").await?;
        let http = match settings.http_addr {
            Some(address) => Some(listen(http, address, "http.listen_addr").await?),
            None => None,
        };
        let cas = store.launch();
        let place = place.map(Arc::new);
        let asset_settings = asset_settings(&settings);
        let origins = asset_settings.origins.clone();
        let assets = AssetActor::open(asset_settings, cas.clone(), workers.clone()).launch();
        let log_streams = LogStreams::new(log_settings(&settings));
        let metrics = Arc::new(Metrics::new(grpc::rpcs()));
        workers.spawn(log_streams.clone().sweep());
        workers.spawn(memory::give_back());
        if let Some(place) = &place {
            let build_root = place.build_root.clone();
            cas.relieve_first(move || build_root.relieve_disk());
        }
        let pools = settings.execution.as_ref().zip(place.as_ref()).map(|(execution, place)| {
            let bounds = scheduler_settings(settings.node, execution);
            let (place, execution, cas) = (place.clone(), Arc::new(execution.clone()), cas.clone());
            let (log_streams, metrics) = (log_streams.clone(), metrics.runs.clone());
            start_scheduler(bounds, PoolMaker { place, execution, cas, log_streams, metrics }, &workers)
        });
        let scheduler = pools.as_ref().map(|pools| pools.scheduler.clone());
        Ok(Self {
            settings,
            access,
            listener,
            http,
            tls,
            cas,
            assets,
            scheduler,
            place,
            pools,
            origins,
            log_streams,
            metrics,
            workers,
            supervision,
        })
    }

    /// Serves until a signal or fault, then shuts down.
    async fn serve(self, configuration: Configuration, ready: impl FnOnce(Ready)) -> Result<()> {
        let Self {
            settings,
            access,
            listener,
            http,
            tls,
            cas,
            assets,
            scheduler,
            place,
            pools,
            origins,
            log_streams,
            metrics,
            workers,
            supervision,
        } = self;
        let supervisor = supervision.supervisor.clone();
        let owners = Owners { cas: cas.clone(), assets: assets.clone(), scheduler: scheduler.clone() };
        let hosts = Hosts::new(settings.http_hosts.clone());
        let quotas = Quotas::new(settings.quotas.clone());
        let mut parts: Vec<Box<dyn Reloadable>> = vec![
            Box::new(ReloadQuotas::new(quotas.clone(), &settings)),
            Box::new(ReloadLogFilter::new(&settings.log)),
            Box::new(ReloadHosts::new(hosts.clone(), &settings)),
            Box::new(ReloadOrigins::new(origins, &settings.assets)),
            Box::new(ReloadTls(tls.clone())),
        ];
        let images = place.as_ref().and_then(|place| place.images.as_ref());
        parts.extend(ReloadImages::new(images, &settings).map(|part| Box::new(part) as _));
        parts.extend(pools.map(|pools| Box::new(pools) as _));
        let Configuration { config, load } = configuration;
        let reloader = Reloader::new(load, &config, parts, workers.clone());
        let mut signals = StopSignals::of_server()?;
        let address =
            listener.local_addr().map_err(|error| Error::io("learn the port that is listened on", &error))?;
        let health = grpc::health::Health::serving().await;
        let under_way = UnderWay::default();
        let connections = Connections::new(descriptors());
        workers.spawn(connections.clone().sweep());
        let watch = scheduler.clone().map(|scheduler| PoolWatch::new(scheduler.recipient()));
        let observer = Arc::new(Observer::new(
            metrics.clone(),
            owners.clone(),
            (connections.clone(), tls.clone()),
            watch,
        ));
        workers.spawn(observer.clone().tell(health.clone()));
        let gate = Gate::with_quotas(settings.instances.clone(), access.authenticator().clone(), quotas);
        workers.spawn(access.watch());
        if let Some(tls) = tls.clone() {
            workers.spawn(tls.watch(connections.clone()));
        }
        let edge = Arc::new(Edge {
            gate: gate.clone(),
            cas: cas.clone(),
            scheduler: scheduler.clone().map(|scheduler| Scheduler::new(scheduler, settings.node)),
            assets: Some(assets.clone()),
            log_streams: log_streams.clone(),
            under_way: under_way.clone(),
            connections: connections.clone(),
            administration: administration(place.as_deref(), reloader.clone()),
            metrics: metrics.clone(),
            settings: grpc::ProtocolSettings {
                max_blob_bytes: settings.max_blob_bytes,
                compressed_committed_size: settings.compressed_committed_size,
                chunking: settings.chunking,
                priorities: settings
                    .execution
                    .as_ref()
                    .map_or(Priorities { min: 0, max: 0 }, |e| e.priorities),
            },
        });
        let (close, closed) = oneshot::channel::<()>();
        let mut serving = workers.spawn({
            let health = health.clone();
            let tls = tls.as_ref().map(ServerTls::grpc_port);
            async move {
                // Also completes when the sender is dropped.
                let shutdown = async move { drop(closed.await) };
                grpc::serve_with(edge, &health, listener, tls, shutdown).await
            }
        });
        let shared = http::PortContext {
            gate: gate.clone(),
            hosts,
            under_way: under_way.clone(),
            connections: connections.clone(),
            metrics,
        };
        let cache = Cache { gate, cas: cas.clone(), max_blob_bytes: settings.max_blob_bytes };
        let port = http::Port::new(cache, Operations { observer: observer.clone() }, shared);
        let (http_close, mut http_serving) = serve_http(http, port, tls.as_ref(), &workers)?;
        let sandbox = place.as_ref().and_then(|place| Some(place.sandbox.as_ref()?.1.clone()));
        let limits = place.as_ref().map(|place| place.limits.clone());
        ready(Ready { address, tls: tls.is_some(), sandbox, limits });
        supervisor.ready();
        // On the actors' thread, so that a thread that is stuck sends no sign of life.
        actix_rt::spawn(owners.clone().report(supervision, settings.max_size_bytes, workers.clone()));

        let stop = select! {
            signal = stop_signal(&mut signals, &reloader, &supervisor) => Stop::Signal(signal.name()),
            error = owners.died() => Stop::Fault(error),
            error = &mut http_serving => Stop::Fault(error),
            ended = &mut serving => Stop::Fault(match ended {
                Ok(Ok(())) => Error::internal("the gRPC server stopped by itself"),
                Ok(Err(error)) => error,
                Err(panic) => Error::Internal(format!("the gRPC server panicked: {panic}")),
            }),
        };
        let signal = match stop {
            Stop::Signal(signal) => signal,
            Stop::Fault(error) => return Err(error),
        };
        supervisor.stopping();
        Event::info(LOG, "server_stopping")
            .with("signal", signal)
            .with("grace_ms", settings.shutdown_grace.as_millis() as u64)
            .log(format_args!(
                "shutting down: finishing running work and open requests; a second interrupt exits at once"
            ));
        let exit = Exit::within(settings.shutdown_grace);
        let orderly = async {
            observer.drain();
            health.drain().await;
            if let Some(scheduler) = &scheduler {
                drain(scheduler, exit).await;
            }
            // Actions that were just cancelled may have left large directories. Time for closing the store is reserved.
            let left = exit.told().saturating_duration_since(Instant::now());
            let removal = place.map(|place| workers.spawn_blocking(move || place.empty(left)));
            log_streams.close();
            // Clients that wait for a stream receive its end now. Idle connections are closed gracefully.
            let _ = close.send(());
            drop(http_close);
            select! {
                _ = async { tokio::join!(serving, http_serving) } => {}
                _ = timeout_at(exit.told(), under_way.finished(QUIET)) => {
                    Event::warn(LOG, "connections_cut")
                        .log(format_args!("closing connections that clients keep open"));
                }
            }
            if let Some(removal) = removal {
                let _ = removal.await;
            }
        };
        select! {
            () = orderly => {}
            signal = signals.next() => {
                Event::warn(LOG, "server_interrupted")
                    .with("signal", signal.name())
                    .log(format_args!("exiting at once"));
                logging::flush();
                // The runners see their sockets close and kill their processes.
                std::process::exit(INTERRUPTED);
            }
        }
        owners.check()?;
        // Saves the asset bindings and the recent uses, which determine the order of eviction after the next start.
        let closing = async { tokio::join!(assets.actor().send(CloseAssets), cas.actor().send(CloseStore)) };
        if timeout_at(exit.end, closing).await.is_err() {
            Event::warn(LOG, "store_not_closed").log(format_args!(
                "the store closes slowly; the order of eviction may be outdated after the next start"
            ));
        }
        connections.tell_counted();
        Event::info(LOG, "server_stopped").log(format_args!("stopped"));
        Ok(())
    }
}

/// Waits for the next signal that stops the server. A hangup reloads the configuration instead.
async fn stop_signal(signals: &mut StopSignals, reloader: &Reloader, supervisor: &Supervisor) -> StopSignal {
    loop {
        match signals.next().await {
            StopSignal::Reload => {
                let (reloader, supervisor) = (reloader.clone(), supervisor.clone());
                // The outcome is logged. A second signal meanwhile is one more reload after this one.
                tokio::spawn(async move {
                    supervisor.reloading();
                    let _ = reloader.reload(false).await;
                    supervisor.ready();
                });
            }
            stop => return stop,
        }
    }
}

fn administration(place: Option<&Place>, reloader: Reloader) -> Administration {
    let staged_trees = place.map(|place| {
        let build_root = place.build_root.clone();
        Arc::new(move || build_root.staged_usage()) as _
    });
    let images = place.and_then(|place| place.images.clone());
    let images = images.map(|images| Arc::new(move || images.usage()) as _);
    Administration { staged_trees, images, reloader: Some(reloader), ..Administration::default() }
}

/// Serves the HTTP/1.1 cache, if it has a listener, until the sender is dropped. The future yields the error that ended it.
fn serve_http(
    listener: Option<TcpListener>,
    port: http::Port,
    tls: Option<&ServerTls>,
    workers: &Handle,
) -> Result<(oneshot::Sender<()>, BoxFuture<'static, Error>)> {
    let (close, closed) = oneshot::channel::<()>();
    // Without a listener, the future must not complete before the shutdown.
    let Some(listener) = listener else {
        let ended = closed.map(|_| Error::internal("there is no HTTP server"));
        return Ok((close, ended.boxed()));
    };
    let address =
        listener.local_addr().map_err(|error| Error::io("learn the port of the HTTP cache", &error))?;
    Event::info(LOG, "http_started")
        .with_shown("listen_addr", &address)
        .log(format_args!("serving the HTTP cache on {address}"));
    let serving = workers
        .spawn(http::serve(port, listener, tls.map(ServerTls::http_port), async move { drop(closed.await) }));
    let ended = async move {
        match serving.await {
            Ok(()) => Error::internal("the HTTP server stopped by itself"),
            Err(panic) => Error::Internal(format!("the HTTP server panicked: {panic}")),
        }
    };
    Ok((close, ended.boxed()))
}

fn start_scheduler(bounds: SchedulerSettings, maker: PoolMaker, workers: &Handle) -> Pools {
    maker.prefetch(maker.execution.pools.iter());
    let pools = maker.execution.pools.iter().map(|pool| maker.make(pool)).collect();
    let images = maker.place.images.clone().map(|images| Arc::new(images) as Arc<dyn ImageSupply>);
    let scheduler = SchedulerActor::new(bounds, pools, maker.cas.clone()).with_images(images).start();
    Pools::new(maker, scheduler, workers.clone())
}
