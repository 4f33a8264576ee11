//! [`Pools`]: starts the pools of the server, and changes them when the configuration is reloaded.
//!
//! A new pool starts at once. A pool that was removed from the configuration takes no more actions, and is removed when
//! its last action has ended. A pool with changed settings is replaced: the new one starts, and the actions of the old
//! one continue.

use super::execution_setup::{ExecutionSetup, wants_gateway};
use crate::{
    actors::{
        cas::client::Cas,
        scheduler::{
            Pool, SchedulerActor,
            messages::{AddPool, DrainPool, ListPools, RemovePool},
            slots::{PoolId, PoolSpec, PoolState, PoolStatus},
        },
        worker::{WorkerActor, WorkerSettings, staging::StagingActor, tools::Tools},
    },
    config::{ExecutionSettings, PoolSettings, Settings},
    log_streams::LogStreams,
    platform,
    reload::{PreparedChange, Reloadable},
    sandbox::settings::SandboxMode,
    telemetry::RunMetrics,
};
use actix::{Addr, SyncArbiter};
use actix_rt::System;
use gorego_reapi::error::{Error, Result};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::runtime::Handle;

/// Creates pools from their settings, at the start and by a reload.
#[derive(Clone)]
pub(super) struct PoolMaker {
    pub(super) setup: Arc<ExecutionSetup>,
    /// The settings at the start of the server. The settings of the pools may have changed since.
    pub(super) execution: Arc<ExecutionSettings>,
    pub(super) cas: Cas,
    pub(super) log_streams: LogStreams,
    pub(super) metrics: RunMetrics,
}

impl PoolMaker {
    /// Starts the workers of a pool. Must be called where there is a current [`System`].
    pub(super) fn make(&self, pool: &PoolSettings) -> Pool {
        let worker = Arc::new(self.setup.worker(
            &self.execution,
            pool,
            self.log_streams.clone(),
            self.metrics.clone(),
        ));
        let store = Arc::new(self.cas.clone());
        let stager = worker.has_layers().then(|| {
            let (worker, store) = (worker.clone(), store.clone());
            SyncArbiter::start(1, move || StagingActor::new(worker.clone(), store.clone())).recipient()
        });
        let spec = PoolSpec {
            name: pool.name.clone(),
            section: if pool.is_declared {
                format!("execution.pools.{}", pool.name)
            } else {
                "execution.platform".into()
            },
            worker: worker.name.clone(),
            slots: pool.slots,
            offers: pool.offers.clone(),
            limits: pool.limits,
            room: pool.room,
        };
        let workers = SyncArbiter::start(pool.slots, move || WorkerActor::new(worker.clone(), store.clone()));
        Pool { spec, runner: workers.recipient(), stager }
    }

    /// Pulls the images that pools name, ahead of their actions.
    pub(super) fn prefetch<'a>(&self, pools: impl Iterator<Item = &'a PoolSettings>) {
        if let Some(images) = &self.setup.images {
            let named = platform::named_images(pools.map(|pool| &pool.offers));
            images.prefetch(named.into_iter().map(str::to_owned).collect());
        }
    }
}

/// The pools of a running server, for reloads.
#[derive(Clone)]
pub(super) struct Pools {
    pub(super) maker: PoolMaker,
    pub(super) scheduler: Addr<SchedulerActor>,
    /// The system of the actors, in which workers are started.
    system: System,
    runtime: Handle,
    /// The settings of the pools that take actions.
    running: Arc<Mutex<Vec<PoolSettings>>>,
}

/// The change of one pool by a reload.
enum PoolChange {
    Add(PoolSettings),
    Replace(PoolSettings),
    Remove(String),
}

impl Pools {
    /// Takes over the pools with which the scheduler was started. Must be called on the actors' thread.
    pub(super) fn new(maker: PoolMaker, scheduler: Addr<SchedulerActor>, runtime: Handle) -> Self {
        let running = Arc::new(Mutex::new(maker.execution.pools.clone()));
        Self { maker, scheduler, system: System::current(), runtime, running }
    }

    fn running(&self) -> MutexGuard<'_, Vec<PoolSettings>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Checks that a pool could be started.
    fn check(&self, pool: &PoolSettings) -> Result<()> {
        let setup = &self.maker.setup;
        let refuse =
            |problem: &str| Err(Error::Precondition(format!("execution.pools.{}: {problem}", pool.name)));
        match (&setup.sandbox, pool.sandbox.mode) {
            (_, SandboxMode::Off) => {}
            (None, _) => {
                return refuse(
                    "sandbox.mode: no pool had a sandbox when the server was started; restart the server to find out \
                     what works here",
                );
            }
            (Some((_, report)), _) if wants_gateway(pool) && !report.on.gateway => {
                return refuse(
                    "sandbox.network = \"on\": no pool had it when the server was started; restart the server to find out \
                     whether it works here",
                );
            }
            (Some((_, report)), SandboxMode::Required)
                if !report.missing_for(wants_gateway(pool)).is_empty() =>
            {
                return refuse("sandbox.mode = \"required\": the sandbox is incomplete on this machine");
            }
            _ => {}
        }
        setup.try_root_of(pool, &WorkerSettings::own_runner(setup.open_files))
    }

    async fn apply(self, change: PoolChange) -> Result<()> {
        match change {
            PoolChange::Add(pool) => self.start(pool, None).await,
            // The scheduler changes from the old pool to the new one in one step, so there is no time without a pool.
            // If the new one cannot be started, the old one continues.
            PoolChange::Replace(pool) => {
                let (old, tools) = self.find(&pool.name).await?;
                self.start(pool, old).await?;
                self.retire(old, tools);
                Ok(())
            }
            PoolChange::Remove(name) => {
                let (old, tools) = self.find(&name).await?;
                self.running().retain(|pool| pool.name != name);
                self.retire(old, tools);
                Ok(())
            }
        }
    }

    /// The pool with this name that is not draining, and its persistent workers.
    async fn find(&self, name: &str) -> Result<(Option<PoolId>, Option<Arc<Tools>>)> {
        let all = self.scheduler.send(ListPools).await.map_err(|_| scheduler_gone())?;
        let is_it = |pool: &&PoolStatus| *pool.name == *name && pool.state != PoolState::Draining;
        Ok((all.iter().find(is_it).map(|pool| pool.id), self.maker.setup.tools(name)))
    }

    /// Starts a pool, and makes the scheduler use it in place of another one.
    async fn start(&self, settings: PoolSettings, replaces: Option<PoolId>) -> Result<()> {
        let setup = self.maker.setup.clone();
        let tools = setup.add_tools(&self.maker.execution, &settings);
        let started = async {
            let pool = self.make(&settings).await?;
            self.scheduler.send(AddPool { pool, replaces }).await.map_err(|_| scheduler_gone())?
        };
        if let Err(error) = started.await {
            self.runtime.spawn_blocking(move || setup.close_tools(&tools));
            return Err(error);
        }
        let mut running = self.running();
        running.retain(|pool| pool.name != settings.name);
        running.push(settings);
        Ok(())
    }

    /// Starts the workers of a pool.
    async fn make(&self, pool: &PoolSettings) -> Result<Pool> {
        let (maker, system, settings) = (self.maker.clone(), self.system.clone(), pool.clone());
        maker.prefetch([pool].into_iter());
        // Starting many threads takes time, so it is done on a thread for blocking work.
        let made = self.runtime.spawn_blocking(move || {
            System::set_current(system);
            maker.make(&settings)
        });
        made.await.map_err(|_| Error::internal("the workers of a pool could not be started"))
    }

    /// Stops a pool with these tools from taking actions, and removes it when its last action has ended.
    fn retire(&self, pool: Option<PoolId>, tools: Option<Arc<Tools>>) {
        let Some(id) = pool else { return };
        // The message is in the mailbox before the next message.
        let drained = self.scheduler.send(DrainPool { id });
        let (scheduler, setup) = (self.scheduler.clone(), self.maker.setup.clone());
        self.runtime.spawn(async move {
            // Both fail only if the pool or the scheduler is gone.
            let _ = drained.await;
            let _ = scheduler.send(RemovePool { id }).await;
            tokio::task::spawn_blocking(move || setup.close_tools(&tools));
        });
    }
}

fn scheduler_gone() -> Error {
    Error::Unavailable("the scheduler has stopped".into())
}

/// The changes that turn the running pools into the next ones, each with its description. Pure.
fn changes(running: &[PoolSettings], next: &[PoolSettings]) -> Vec<(PoolChange, String)> {
    let mut changes = Vec::new();
    for pool in next {
        match running.iter().find(|other| other.name == pool.name) {
            Some(before) if is_same(before, pool) => {}
            Some(before) => {
                let description =
                    format!("replaced: {}; its running actions continue", differences(before, pool));
                changes.push((PoolChange::Replace(pool.clone()), description));
            }
            None => {
                changes.push((PoolChange::Add(pool.clone()), format!("added with {} slots", pool.slots)));
            }
        }
    }
    for gone in running.iter().filter(|pool| next.iter().all(|other| other.name != pool.name)) {
        let description = "removed; its running actions continue".to_owned();
        changes.push((PoolChange::Remove(gone.name.clone()), description));
    }
    changes
}

/// Whether an action could not tell the two pools apart.
fn is_same(before: &PoolSettings, after: &PoolSettings) -> bool {
    let of = |pool: &PoolSettings| {
        let sandbox = &pool.sandbox;
        (pool.slots, pool.room, pool.limits, sandbox.mode, sandbox.root.clone(), sandbox.network)
    };
    of(before) == of(after) && before.offers == after.offers && before.is_declared == after.is_declared
}

/// A short description of the differences.
fn differences(before: &PoolSettings, after: &PoolSettings) -> String {
    let mut words = Vec::new();
    if before.slots != after.slots {
        words.push(format!("slots {} -> {}", before.slots, after.slots));
    }
    let others = [
        ("properties", before.offers != after.offers),
        ("limits", before.limits != after.limits),
        ("cores and memory", before.room != after.room),
        ("sandbox", before.sandbox != after.sandbox),
    ];
    words.extend(others.iter().filter(|(_, differs)| *differs).map(|(what, _)| (*what).to_owned()));
    words.join(", ")
}

impl Reloadable for Pools {
    fn keys(&self) -> &'static [&'static str] {
        // The other keys in execution.limits are about the whole machine, and need a restart.
        &[
            "execution.pools",
            "execution.concurrency",
            "execution.platform",
            "execution.limits.memory_gb",
            "execution.limits.max_memory_gb",
            "execution.limits.swap_gb",
            "execution.limits.cores",
            "execution.limits.max_cores",
            "execution.limits.max_processes",
            "execution.limits.disk_gb",
            "execution.limits.max_disk_gb",
            "execution.limits.files",
        ]
    }

    fn prepare(&self, next: &Settings) -> Result<Vec<PreparedChange>> {
        let secrets = next.secrets();
        // The sandboxes that run hide only what was secret at the start. They go on until the restart, also if
        // execution is switched off.
        if let Some((sandbox, _)) = &self.maker.setup.sandbox
            && let Some(path) = secrets.iter().find(|path| sandbox.settings.exposes(path))
        {
            return Err(Error::Precondition(format!(
                "actions could read {} until the server is restarted; use a directory that they cannot see, or restart \
                 the server",
                path.display()
            )));
        }
        // Switching execution off is a separate change, which needs a restart.
        let Some(next) = &next.execution else { return Ok(Vec::new()) };
        let at_start = &self.maker.execution;
        // These settings are part of every pool, but they apply to parts that are created at the start.
        let is_bound = !next.sandbox.is_same_for_actions(&at_start.sandbox)
            || next.images.is_some() != at_start.images.is_some();
        let mut prepared = Vec::new();
        let mut pools = next.pools.clone();
        pools.iter_mut().for_each(|pool| self.maker.setup.withdraw_network(pool));
        let changes = changes(&self.running(), &pools);
        for (change, description) in changes {
            let name = match &change {
                PoolChange::Add(pool) | PoolChange::Replace(pool) => &pool.name,
                PoolChange::Remove(name) => name,
            };
            let key = format!("execution.pools.{name}");
            if is_bound {
                let description = format!(
                    "{description}; not now, because execution.sandbox or execution.images has changed too"
                );
                prepared.push(PreparedChange { key, description, apply: None });
                continue;
            }
            if let PoolChange::Add(pool) | PoolChange::Replace(pool) = &change {
                self.check(pool)?;
            }
            let apply = Box::pin(self.clone().apply(change));
            prepared.push(PreparedChange { key, description, apply: Some(apply) });
        }
        Ok(prepared)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Machine, load::from_text};
    use std::path::Path;

    fn pools(text: &str) -> Vec<PoolSettings> {
        let loaded = from_text(Path::new("gorego.toml"), text).unwrap();
        let machine = Machine { cpus: 8, cache_home: Some("/cache".into()), current_dir: "/".into() };
        Settings::new(&loaded, &machine).unwrap().execution.unwrap().pools
    }

    fn described(before: &str, after: &str) -> Vec<String> {
        let described =
            changes(&pools(before), &pools(after)).into_iter().map(|(change, description)| match change {
                PoolChange::Add(pool) => format!("+{} {description}", pool.name),
                PoolChange::Replace(pool) => format!("={} {description}", pool.name),
                PoolChange::Remove(name) => format!("-{name} {description}"),
            });
        described.collect()
    }

    #[test]
    fn a_pool_is_replaced_if_its_actions_would_notice_a_difference() {
        const POOL: &str = "[execution.pools.a]\nslots = 2\nproperties = { Arch = \"one\" }\n";
        assert!(described(POOL, POOL).is_empty());
        assert!(described(POOL, &format!("shutdown_grace = \"7s\"\n{POOL}")).is_empty());
        for (after, differences) in [
            (POOL.replace('2', "3"), "slots 2 -> 3"),
            (POOL.replace("one", "two"), "properties"),
            (format!("{POOL}limits = {{ cores = 1 }}\n"), "limits"),
            (format!("{POOL}sandbox = {{ mode = \"off\" }}\n"), "sandbox"),
            (POOL.replace("slots = 2", "cores = 2\nmemory_gb = 1"), "cores and memory"),
        ] {
            let described = described(POOL, &after);
            let [only] = &described[..] else { panic!("{after}: {described:?}") };
            assert!(only.starts_with("=a replaced: ") && only.contains(differences), "{after}: {only}");
        }
    }

    #[test]
    fn pools_that_are_new_or_gone_are_added_and_removed() {
        let pool = |name: &str| format!("[execution.pools.{name}]\nslots = 1\n");
        assert_eq!(
            described(&(pool("a") + &pool("b")), &(pool("b") + &pool("c"))),
            ["+c added with 1 slots", "-a removed; its running actions continue"]
        );
        assert_eq!(
            described("", &pool("a")),
            ["+a added with 1 slots", "-local removed; its running actions continue"]
        );
    }
}
