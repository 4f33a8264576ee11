//! [`Observer`]: the state of the server for metrics, readiness and health checks.
//!
//! It asks the owner of each number. The store and the connections have numbers that can be read at any time. The
//! scheduler is asked with one message at a time, whose answer costs O(pools), and is waited for at most
//! [`POOLS_WAIT`]. If its answer is late, the numbers of the previous answer are used, together with their age.

use super::owners::Owners;
use crate::{
    actors::{
        cas::{DiskSight, StoreMeasurement},
        scheduler::{
            messages::{Measure, PoolMeasurement},
            slots::PoolState,
        },
    },
    connections::Connections,
    grpc::health::Health,
    http::operations::Observe,
    logging,
    telemetry::{Metrics, PoolReading, PoolReadings, Readings, StoreReading, process},
    tls::ServerTls,
};
use actix::Recipient;
use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt as _};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio::{
    sync::{Mutex, watch},
    time::{Instant, interval, timeout},
};

/// How long a scrape waits for the scheduler. A scrape takes at most twice as long.
const POOLS_WAIT: Duration = Duration::from_millis(10);
/// A server whose scheduler has not answered for this long is not ready.
const POOLS_MAX_AGE: Duration = Duration::from_secs(5);
/// Scrapes within this time get the same text, so that frequent scrapes cannot keep the server busy.
const TEXT_MAX_AGE: Duration = Duration::from_millis(100);
/// How often the health service is updated.
const TELL_INTERVAL: Duration = Duration::from_secs(1);

/// The observer; see the top of this file.
pub(super) struct Observer {
    metrics: Arc<Metrics>,
    owners: Owners,
    connections: Connections,
    tls: Option<ServerTls>,
    /// `None` for a server that runs no actions.
    pools: Option<PoolWatch>,
    is_draining: AtomicBool,
    started: SystemTime,
    /// The text of the last scrape.
    text: Mutex<Option<(Instant, Bytes)>>,
}

impl Observer {
    pub(super) fn new(
        metrics: Arc<Metrics>,
        owners: Owners,
        (connections, tls): (Connections, Option<ServerTls>),
        pools: Option<PoolWatch>,
    ) -> Self {
        Self {
            metrics,
            owners,
            connections,
            tls,
            pools,
            is_draining: AtomicBool::new(false),
            started: SystemTime::now(),
            text: Mutex::default(),
        }
    }

    /// From now on, the server is not ready.
    pub(super) fn drain(&self) {
        self.is_draining.store(true, SeqCst);
    }

    /// Updates the health service with whether actions can be executed. Runs as long as the server.
    pub(super) async fn tell(self: Arc<Self>, health: Health) {
        let Some(pools) = &self.pools else { return health.set_can_execute(false).await };
        let mut ticks = interval(TELL_INTERVAL);
        loop {
            ticks.tick().await;
            health.set_can_execute(can_execute(pools.look().await.as_ref())).await;
        }
    }

    fn is_ready_with(&self, pools: Option<&PoolSight>) -> bool {
        let workers_live = self.pools.is_none() || can_execute(pools);
        let is_writable = !self.owners.cas.is_read_only();
        self.owners.check().is_ok() && workers_live && is_writable && !self.is_draining.load(SeqCst)
    }

    async fn read(&self) -> Readings {
        let seen = match &self.pools {
            Some(pools) => pools.look().await,
            None => None,
        };
        let is_ready = self.is_ready_with(seen.as_ref());
        Readings {
            is_ready,
            connections: self.connections.measure(),
            certificate_expiry: self.tls.as_ref().map(ServerTls::certificate_expiry),
            store: store_reading(self.owners.cas.measure(), self.owners.cas.disk_sight(), SystemTime::now()),
            pools: seen.map(pool_readings),
            log_lines_dropped: logging::lines_dropped(),
            process: process::read(),
            started: Some(self.started),
        }
    }
}

impl std::fmt::Debug for Observer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Observer").field("pools", &self.pools).finish_non_exhaustive()
    }
}

impl Observe for Observer {
    fn is_ready(&self) -> BoxFuture<'_, bool> {
        async {
            let seen = match &self.pools {
                Some(pools) => pools.look().await,
                None => None,
            };
            self.is_ready_with(seen.as_ref())
        }
        .boxed()
    }

    fn metrics(&self) -> BoxFuture<'_, Bytes> {
        async {
            // Concurrent requests wait here and get the same text.
            let mut text = self.text.lock().await;
            if let Some((_, text)) = text.as_ref().filter(|(at, _)| at.elapsed() < TEXT_MAX_AGE) {
                return text.clone();
            }
            let readings = self.read().await;
            let new = Bytes::from(self.metrics.text(readings));
            *text = Some((Instant::now(), new.clone()));
            new
        }
        .boxed()
    }
}

/// An answer of the scheduler, with the time of its arrival.
#[derive(Debug, Clone)]
pub(super) struct PoolSight {
    at: Instant,
    pools: Arc<[PoolMeasurement]>,
}

/// Requests the numbers of the pools from the scheduler, and keeps its last answer.
pub(super) struct PoolWatch {
    scheduler: Recipient<Measure>,
    state: Arc<PoolWatchState>,
}

#[derive(Debug, Default)]
struct PoolWatchState {
    /// Whether a request is pending.
    is_asking: AtomicBool,
    last: watch::Sender<Option<PoolSight>>,
}

impl PoolWatch {
    pub(super) fn new(scheduler: Recipient<Measure>) -> Self {
        Self { scheduler, state: Arc::default() }
    }

    /// The current numbers. If the scheduler does not answer in time, the numbers of its last answer.
    async fn look(&self) -> Option<PoolSight> {
        let mut last = self.state.last.subscribe();
        if !self.state.is_asking.swap(true, SeqCst) {
            let (question, state) = (self.scheduler.send(Measure), self.state.clone());
            tokio::spawn(async move {
                // If there is no answer, the scheduler has stopped, and its last answer gets older.
                if let Ok(pools) = question.await {
                    state.last.send_replace(Some(PoolSight { at: Instant::now(), pools: pools.into() }));
                }
                state.is_asking.store(false, SeqCst);
            });
        }
        let _ = timeout(POOLS_WAIT, last.changed()).await;
        self.state.last.borrow().clone()
    }
}

impl std::fmt::Debug for PoolWatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PoolWatch").field("state", &self.state).finish_non_exhaustive()
    }
}

/// Whether the scheduler is alive and no pool has lost its workers.
fn can_execute(seen: Option<&PoolSight>) -> bool {
    seen.is_some_and(|seen| {
        let has_lost = |pool: &PoolMeasurement| pool.status.state == PoolState::Closed;
        seen.at.elapsed() <= POOLS_MAX_AGE && !seen.pools.iter().any(has_lost)
    })
}

fn pool_readings(seen: PoolSight) -> PoolReadings {
    let reading = |pool: &PoolMeasurement| {
        let status = &pool.status;
        let unused = status.slots.saturating_sub(status.busy);
        let (free, unused) = if status.state == PoolState::Open { (unused, 0) } else { (0, unused) };
        PoolReading {
            name: status.name.clone(),
            free,
            busy: status.busy.saturating_sub(status.stuck),
            out_of_service: unused.saturating_add(status.stuck),
            waiting: pool.waiting,
            oldest: pool.oldest,
            desired: pool.desired,
        }
    };
    PoolReadings { age: seen.at.elapsed(), pools: PoolReading::by_name(seen.pools.iter().map(reading)) }
}

fn store_reading(measured: StoreMeasurement, disk: DiskSight, now: SystemTime) -> StoreReading {
    let StoreMeasurement { totals, tally, oldest_use, index_bytes, scrub } = measured;
    let used_at = oldest_use.map(|seconds| UNIX_EPOCH + Duration::from_secs(seconds.into()));
    StoreReading {
        used: totals.used,
        limit: totals.limit,
        held: totals.held,
        leased: totals.leased,
        reserved: totals.reserved,
        blobs: totals.blobs,
        results: totals.results,
        zstd_forms: totals.zstd_forms,
        compressed_blobs: totals.packed_blobs,
        compressed_content: totals.packed_content,
        compressed: totals.packed_used,
        index_bytes,
        evicted: tally.evicted,
        evicted_bytes: tally.evicted_bytes,
        damaged: tally.damaged,
        followed: tally.followed,
        broken_promises: tally.broken_promises,
        refused_results: tally.refused_results,
        withdrawn_leases: tally.withdrawn_leases,
        oldest_use: used_at.and_then(|at| now.duration_since(at).ok()).unwrap_or_default(),
        scrubbed: scrub.bytes,
        scrub_damaged: scrub.damaged,
        scrub_passes: scrub.passes,
        is_read_only: disk.is_full,
        disk_free: disk.space.map(|space| space.free_bytes),
        overhead: totals.overhead,
        beside: disk.beside,
    }
}

#[cfg(test)]
mod tests;
