//! One server process, from its settings to its exit. This module has only wiring and shutdown.
//!
//! The addresses of the ports are taken first. Then parts are created in the order store, workers, scheduler, ports,
//! and are shut down in reverse. The scheduler takes no new work and finishes its operations. Then the ports accept no
//! new connections and let the open calls finish. Then the store closes. The [`Exit`] sets one deadline for all of
//! this, even if clients keep requests open. The owner actors are watched: if one dies, the process exits, because a
//! partial server is worse than none.

pub(crate) mod execution_setup;
mod exit;
mod files_beside_store;
mod fill;
mod observer;
mod owners;
mod pools;
mod ports;
mod prerequisites;
mod reload;
mod tls;

use crate::{
    access::AccessLoader,
    actors::{
        asset::{AssetActor, client::Assets, messages::CloseAssets, origins::Origins},
        cas::{CasActor, CloseStore, client::Cas},
        scheduler::{SchedulerActor, inputs::ImageSupply, settings::SchedulerSettings},
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
    nondeterminism::NonDeterminismReports,
    quotas::Quotas,
    reload::{Reloadable, Reloader},
    sandbox::probe::Report,
    signals::{StartWatch, StopSignal, StopSignals},
    supervisor::{Supervision, Supervisor},
    telemetry::Metrics,
    tls::ServerTls,
    unfinished_requests::UnfinishedRequests,
};
use actix::{Actor as _, Addr};
use actix_rt::System;
use execution_setup::ExecutionSetup;
pub(crate) use execution_setup::check_named_paths;
use exit::{Exit, drain};
use fill::{asset_settings, log_settings, protocol_settings, scheduler_settings, store_settings};
use gorego_reapi::error::{Error, Result};
use observer::{Observer, PoolWatch};
use owners::Owners;
use pools::{PoolMaker, Pools};
use ports::{Ports, ServedPort};
use prerequisites::{Listeners, Prerequisites};
use reload::{ReloadAccess, ReloadHosts, ReloadImages, ReloadLogFilter, ReloadOrigins, ReloadQuotas};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::{mem::ManuallyDrop, net::SocketAddr, sync::Arc};
use tls::ReloadTls;
pub(crate) use tls::check_tls_files;
use tokio::{
    runtime::{Builder, Handle},
    select,
    time::timeout_at,
};

/// Target of the log lines of this file.
const LOG: &str = "gorego::server";

/// The exit code after a second interrupt: 128 + SIGINT.
const INTERRUPTED: i32 = 130;

/// The facts that are known when the server is ready for requests.
#[derive(Debug, Clone)]
pub(crate) struct Ready {
    /// The address on which gRPC is served.
    pub address: SocketAddr,
    /// Whether the port uses TLS.
    pub tls: bool,
    /// Which protections of the sandbox work; `None` without a sandbox.
    pub sandbox: Option<Report>,
    /// How the limits of actions are enforced; `None` for a cache only.
    pub limits: Option<LimitReport>,
}

/// Runs a server until it is told to stop. `load` reads the configuration again for a reload. `ready` is called once,
/// when requests are answered.
///
/// # Errors
/// The reason why it could not start, or the death of an owner actor.
pub(crate) fn run(
    (loaded, mut settings): (Loaded, Settings),
    load: impl Fn() -> Result<(Loaded, Settings)> + Send + Sync + 'static,
    mut supervision: Supervision,
    ready: impl FnOnce(Ready) + Send + 'static,
) -> Result<()> {
    let open_files = raise_open_files();
    let runtime = Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::io("start the async runtime", &error))?;
    // Dropping a runtime waits for its threads, which may be stuck in a system call. The process ends after this
    // function.
    let runtime = ManuallyDrop::new(Arc::new(runtime));
    let watch = {
        let _context = runtime.enter();
        StartWatch::begin(StopSignals::of_server()?, runtime.handle(), stop_during_start)
    };
    let sockets = std::mem::take(&mut supervision.sockets);
    let prerequisites = Prerequisites::open(&settings, sockets, runtime.handle())?;
    // Opening the store and the build root blocks, so it is done before anything asynchronous starts. Each locks its
    // directory.
    let store = CasActor::open(store_settings(&settings), &settings.instances, runtime.handle().clone())?;
    let reports = NonDeterminismReports::open(settings.cache_dir.join("v1").join("nondeterminism"));
    let setup = match &mut settings.execution {
        Some(execution) => Some(ExecutionSetup::open(execution, runtime.handle(), open_files)?),
        None => None,
    };
    let workers = runtime.handle().clone();
    let system = System::with_tokio_rt(|| Arc::clone(&runtime));
    system.block_on(async move {
        let (server, listeners) =
            Server::start(settings, supervision, prerequisites, store, reports, setup, workers)?;
        let configuration = Configuration { config: loaded.config, load: Box::new(load) };
        server.serve(listeners, configuration, watch, ready).await
    })
}

/// Raises the limit of open files to the maximum, because every connection and every broken upload holds one. Returns
/// the previous soft limit, which commands inherit.
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
    quotas: Quotas,
    tls: Option<ServerTls>,
    cas: Cas,
    assets: Assets,
    scheduler: Option<Addr<SchedulerActor>>,
    setup: Option<Arc<ExecutionSetup>>,
    pools: Option<Pools>,
    origins: Origins,
    reports: NonDeterminismReports,
    log_streams: LogStreams,
    metrics: Arc<Metrics>,
    /// The runtime that serves connections. The actors run on another thread.
    workers: Handle,
    supervision: Supervision,
}

/// The configuration at the start, and the function that reads it again.
struct Configuration {
    config: Config,
    load: Box<dyn Fn() -> Result<(Loaded, Settings)> + Send + Sync>,
}

impl Server {
    fn start(
        settings: Settings,
        supervision: Supervision,
        prerequisites: Prerequisites,
        store: CasActor,
        reports: NonDeterminismReports,
        setup: Option<ExecutionSetup>,
        workers: Handle,
    ) -> Result<(Self, Listeners)> {
        let (listeners, tls, access) = prerequisites.listen()?;
        let cas = store.launch();
        cas.report_to(reports.clone());
        workers.spawn(reports.clone().keep_saved());
        let setup = setup.map(Arc::new);
        let asset_settings = asset_settings(&settings);
        let origins = asset_settings.origins.clone();
        let assets = AssetActor::open(asset_settings, cas.clone(), workers.clone()).launch();
        let log_streams = LogStreams::new(log_settings(&settings));
        let metrics = Arc::new(Metrics::new(grpc::rpcs()));
        workers.spawn(log_streams.clone().sweep());
        workers.spawn(memory::give_back());
        if let Some(setup) = &setup {
            let build_root = setup.build_root.clone();
            cas.relieve_first(move || build_root.relieve_disk());
            setup.scrub(settings.scrub_bytes_per_second);
        }
        files_beside_store::count(&cas, &settings, setup.as_ref(), &log_streams);
        let pools = settings.execution.as_ref().zip(setup.as_ref()).map(|(execution, setup)| {
            let bounds = scheduler_settings(settings.node, execution);
            let (setup, execution, cas) = (setup.clone(), Arc::new(execution.clone()), cas.clone());
            let (log_streams, metrics) = (log_streams.clone(), metrics.runs.clone());
            start_scheduler(bounds, PoolMaker { setup, execution, cas, log_streams, metrics }, &workers)
        });
        let scheduler = pools.as_ref().map(|pools| pools.scheduler.clone());
        let quotas = Quotas::new(settings.quotas.clone());
        let server = Self {
            settings,
            access,
            quotas,
            tls,
            cas,
            assets,
            scheduler,
            setup,
            pools,
            origins,
            reports,
            log_streams,
            metrics,
            workers,
            supervision,
        };
        Ok((server, listeners))
    }

    /// Serves until a signal or fault, then shuts down.
    async fn serve(
        mut self,
        listeners: Listeners,
        configuration: Configuration,
        watch: StartWatch,
        ready: impl FnOnce(Ready),
    ) -> Result<()> {
        let supervision = std::mem::take(&mut self.supervision);
        let supervisor = supervision.supervisor.clone();
        let owners =
            Owners { cas: self.cas.clone(), assets: self.assets.clone(), scheduler: self.scheduler.clone() };
        let hosts = Hosts::new(self.settings.http_hosts.clone());
        let reloader = self.reloader(configuration, &hosts);
        let mut ports = self.open_ports(listeners, hosts, &owners, &reloader).await?;
        let mut signals = watch.end().await?;
        ready(self.ready(ports.address));
        supervisor.ready();
        // The reports run on the actors' thread. If that thread is stuck, no report is sent.
        actix_rt::spawn(owners.clone().report(
            supervision,
            self.settings.max_size_bytes,
            self.workers.clone(),
        ));
        let signal = select! {
            signal = stop_signal(&mut signals, &reloader, &supervisor) => signal,
            error = owners.died() => return Err(error),
            error = ports.failed() => return Err(error),
        };
        supervisor.stopping();
        Event::info(LOG, "server_stopping")
            .with("signal", signal.name())
            .with("grace_ms", self.settings.shutdown_grace.as_millis() as u64)
            .log(format_args!(
                "shutting down: finishing running work and open requests; a second interrupt exits at once"
            ));
        let exit = Exit::within(self.settings.shutdown_grace);
        let connections = ports.connections.clone();
        select! {
            () = self.finish(ports, exit) => {}
            signal = second_stop_signal(&mut signals) => exit_at_once(signal),
        }
        owners.check()?;
        self.close_store(exit).await;
        connections.tell_counted();
        Event::info(LOG, "server_stopped").log(format_args!("stopped"));
        Ok(())
    }

    /// The parts that can be reloaded, and the function that reads the configuration.
    fn reloader(&mut self, Configuration { config, load }: Configuration, hosts: &Hosts) -> Reloader {
        let settings = &self.settings;
        let mut parts: Vec<Box<dyn Reloadable>> = vec![
            Box::new(ReloadQuotas::new(self.quotas.clone(), settings)),
            Box::new(ReloadLogFilter::new(&settings.log)),
            Box::new(ReloadHosts::new(hosts.clone(), settings)),
            Box::new(ReloadOrigins::new(self.origins.clone(), &settings.assets)),
            Box::new(ReloadTls(self.tls.clone())),
            Box::new(ReloadAccess(self.access.clone())),
        ];
        let images = self.setup.as_ref().and_then(|setup| setup.images.as_ref());
        parts.extend(ReloadImages::new(images, settings).map(|part| Box::new(part) as _));
        parts.extend(self.pools.take().map(|pools| Box::new(pools) as _));
        Reloader::new(load, &config, parts, self.workers.clone())
    }

    /// The facts about the server when the gRPC port is open at this address.
    fn ready(&self, address: SocketAddr) -> Ready {
        let setup = self.setup.as_ref();
        Ready {
            address,
            tls: self.tls.is_some(),
            sandbox: setup.and_then(|setup| Some(setup.sandbox.as_ref()?.1.clone())),
            limits: setup.map(|setup| setup.limits.clone()),
        }
    }

    /// Opens both ports, and starts the background tasks.
    async fn open_ports(
        &self,
        Listeners { grpc, http }: Listeners,
        hosts: Hosts,
        owners: &Owners,
        reloader: &Reloader,
    ) -> Result<Ports> {
        let address =
            grpc.local_addr().map_err(|error| Error::io("learn the port that is listened on", &error))?;
        let health = grpc::health::Health::serving().await;
        let shared = http::PortContext {
            gate: Gate::counting(
                self.settings.instances.clone(),
                self.access.authenticator().clone(),
                self.quotas.clone(),
                self.metrics.authentication.clone(),
            ),
            hosts,
            unfinished_requests: UnfinishedRequests::default(),
            connections: Connections::new(descriptors()),
            metrics: self.metrics.clone(),
        };
        let (unfinished_requests, connections) =
            (shared.unfinished_requests.clone(), shared.connections.clone());
        let watch = self.scheduler.clone().map(|scheduler| PoolWatch::new(scheduler.recipient()));
        let observer = Arc::new(Observer::new(
            self.metrics.clone(),
            owners.clone(),
            (connections.clone(), self.tls.clone()),
            watch,
        ));
        self.workers.spawn(observer.clone().tell(health.clone()));
        self.workers.spawn(connections.clone().sweep());
        self.workers.spawn(self.access.clone().watch());
        if let Some(tls) = self.tls.clone() {
            self.workers.spawn(tls.watch(connections.clone()));
        }
        let tls = self.tls.as_ref();
        let grpc = ServedPort::grpc((self.edge(&shared, reloader), health.clone()), grpc, tls, &self.workers);
        let max_blob_bytes = self.settings.max_blob_bytes;
        let cache = Cache { gate: shared.gate.clone(), cas: self.cas.clone(), max_blob_bytes };
        let port = http::Port::new(cache, Operations { observer: observer.clone() }, shared);
        let http = ServedPort::http(port, http, tls, &self.workers)?;
        Ok(Ports { address, connections, unfinished_requests, observer, health, grpc, http })
    }

    /// The dependencies of the gRPC services.
    fn edge(&self, shared: &http::PortContext, reloader: &Reloader) -> Arc<Edge> {
        let settings = &self.settings;
        let scheduler = self.scheduler.clone();
        Arc::new(Edge {
            gate: shared.gate.clone(),
            cas: self.cas.clone(),
            scheduler: scheduler.map(|scheduler| Scheduler::new(scheduler, settings.node)),
            assets: Some(self.assets.clone()),
            log_streams: self.log_streams.clone(),
            unfinished_requests: shared.unfinished_requests.clone(),
            connections: shared.connections.clone(),
            administration: Administration {
                access: Some(self.access.clone()),
                ..administration(self.setup.as_deref(), self.reports.clone(), reloader.clone())
            },
            metrics: self.metrics.clone(),
            settings: protocol_settings(settings),
        })
    }

    /// Finishes the running actions, and then the open requests.
    async fn finish(&self, ports: Ports, exit: Exit) {
        ports.drain().await;
        if let Some(scheduler) = &self.scheduler {
            drain(scheduler, exit).await;
        }
        // Actions that were just cancelled may have left large directories. Time for closing the store is reserved.
        let until = exit.last_messages_sent();
        let setup = self.setup.clone();
        let removal = setup.map(|setup| self.workers.spawn_blocking(move || setup.empty(until.into())));
        // Clients that wait for a stream receive its end.
        self.log_streams.close();
        ports.close(until).await;
        // Persistent workers and control groups can take longer to end.
        if let Some(removal) = removal
            && timeout_at(exit.removed(), removal).await.is_err()
        {
            Event::warn(LOG, "workers_not_ended").log(format_args!(
                "some persistent workers or control groups did not end in time; runners kill their processes when the \
                 server has exited, and the next start removes the groups"
            ));
        }
    }

    /// Saves the asset bindings, the reports, and the recent uses, which determine the order of eviction after the next
    /// start.
    async fn close_store(&self, exit: Exit) {
        let reports = self.reports.clone();
        let saving = self.workers.spawn_blocking(move || reports.save());
        let closing =
            async { tokio::join!(self.assets.actor().send(CloseAssets), self.cas.actor().send(CloseStore)) };
        if timeout_at(exit.end, closing).await.is_err() {
            Event::warn(LOG, "store_not_closed").log(format_args!(
                "the store closes slowly; the order of eviction may be outdated after the next start"
            ));
        }
        let _ = timeout_at(exit.end, saving).await;
    }
}

/// Ends the process during its start. The store can be opened again after that, as after a crash.
fn stop_during_start(signal: StopSignal) {
    Event::info(LOG, "server_stopped")
        .with("signal", signal.name())
        .log(format_args!("stopped during the start"));
    logging::flush();
    std::process::exit(0)
}

/// Ends the process without waiting for anything.
fn exit_at_once(signal: StopSignal) -> ! {
    Event::warn(LOG, "server_interrupted").with("signal", signal.name()).log(format_args!("exiting at once"));
    logging::flush();
    // The runners notice that their sockets are closed, and kill their processes.
    std::process::exit(INTERRUPTED)
}

/// Waits for a signal that ends a shutdown. Requests for a reload are ignored, because the server is stopping.
async fn second_stop_signal(signals: &mut StopSignals) -> StopSignal {
    loop {
        match signals.next().await {
            StopSignal::Reload => Event::info(LOG, "reload_ignored").log(format_args!(
                "the configuration is not read again, because the server is shutting down"
            )),
            stop => return stop,
        }
    }
}

/// Waits for the next signal that stops the server. A hangup reloads the configuration instead.
async fn stop_signal(signals: &mut StopSignals, reloader: &Reloader, supervisor: &Supervisor) -> StopSignal {
    loop {
        match signals.next().await {
            StopSignal::Reload => {
                let (reloader, supervisor) = (reloader.clone(), supervisor.clone());
                // The outcome is logged. A signal that arrives meanwhile causes another reload afterwards.
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

fn administration(
    setup: Option<&ExecutionSetup>,
    reports: NonDeterminismReports,
    reloader: Reloader,
) -> Administration {
    let staged_trees = setup.map(|setup| {
        let build_root = setup.build_root.clone();
        Arc::new(move || build_root.staged_usage()) as _
    });
    let images = setup.and_then(|setup| setup.images.clone());
    let images = images.map(|images| Arc::new(move || images.usage()) as _);
    Administration { staged_trees, images, reports, reloader: Some(reloader), ..Administration::default() }
}

fn start_scheduler(bounds: SchedulerSettings, maker: PoolMaker, workers: &Handle) -> Pools {
    maker.prefetch(maker.execution.pools.iter());
    let pools = maker.execution.pools.iter().map(|pool| maker.make(pool)).collect();
    let images = maker.setup.images.clone().map(|images| Arc::new(images) as Arc<dyn ImageSupply>);
    let scheduler = SchedulerActor::new(bounds, pools, maker.cas.clone()).with_images(images).start();
    Pools::new(maker, scheduler, workers.clone())
}
