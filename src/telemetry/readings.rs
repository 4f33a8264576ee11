//! [`Readings`]: the numbers that are read at a scrape, and how they are written.

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::{Registry, Unit},
};
use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// The numbers of a scrape. The owner of each number keeps it, so nothing is counted for the scrape alone.
#[derive(Debug, Clone, Default)]
pub struct Readings {
    /// Whether the server is ready for requests.
    pub is_ready: bool,
    /// The connections of both ports.
    pub connections: ConnectionReading,
    /// The expiry of the server's certificate, in seconds since 1970; `None` without TLS.
    pub certificate_expiry: Option<i64>,
    /// The state of the store.
    pub store: StoreReading,
    /// The pools; `None` for a server that runs no actions, and before the scheduler has answered for the first time.
    pub pools: Option<PoolReadings>,
    /// Log lines that were dropped since the start.
    pub log_lines_dropped: u64,
    /// The resources of this process.
    pub process: ProcessReading,
    /// The start time of the process.
    pub started: Option<SystemTime>,
}

/// The connections of both ports.
#[derive(Debug, Clone, Default)]
pub struct ConnectionReading {
    /// The number of open connections.
    pub open: u64,
    /// The number of open requests on these connections.
    pub calls: u64,
    /// The number of connections that the server has closed or refused since the start, by reason.
    pub closed: Vec<(&'static str, u64)>,
}

/// The state of the store.
#[derive(Debug, Clone, Default)]
pub struct StoreReading {
    /// Bytes on disk of all entries.
    pub used: u64,
    /// The size limit of the store, in bytes.
    pub limit: u64,
    /// The bytes that running actions and open readers hold.
    pub held: u64,
    /// The bytes that are leased to builds.
    pub leased: u64,
    /// Bytes that are reserved for uploads.
    pub reserved: u64,
    /// The number of blobs.
    pub blobs: u64,
    /// The number of action results.
    pub results: u64,
    /// The number of zstd forms.
    pub zstd_forms: u64,
    /// The number of blobs that are kept compressed.
    pub compressed_blobs: u64,
    /// The uncompressed size of these blobs.
    pub compressed_content: u64,
    /// The size of these blobs on disk, which is a part of `used`.
    pub compressed: u64,
    /// Memory of the index of the store, in bytes.
    pub index_bytes: u64,
    /// Entries that were evicted since the start.
    pub evicted: u64,
    /// The bytes of these entries.
    pub evicted_bytes: u64,
    /// Entries that were dropped since the start because their files were damaged or gone.
    pub damaged: u64,
    /// Results that were dropped since the start because one of their blobs was evicted or dropped.
    pub followed: u64,
    /// Entries that were lost since the start while they were leased to a build.
    pub broken_promises: u64,
    /// Results that were not served since the start, because leases left no room for their blobs.
    pub refused_results: u64,
    /// How often the oldest leases were taken since the start from a build with more than its share.
    pub withdrawn_leases: u64,
    /// The time since the last use of the least recently used entry.
    pub oldest_use: Duration,
    /// Bytes that the scrub has verified since the start.
    pub scrubbed: u64,
    /// Damaged entries that the scrub has found since the start.
    pub scrub_damaged: u64,
    /// Passes of the scrub that ended since the start.
    pub scrub_passes: u64,
    /// Whether uploads and results are refused, because the file system is full.
    pub is_read_only: bool,
    /// The free bytes of the file system; `None` before the first measurement.
    pub disk_free: Option<u64>,
    /// Bytes that the store uses besides its entries, such as deleted blobs, tables and the other files of the server.
    pub overhead: u64,
    /// The size of the other files of the server on the same file system, by owner.
    pub beside: Vec<(&'static str, u64)>,
}

/// The state of the pools at the last answer of the scheduler.
#[derive(Debug, Clone, Default)]
pub struct PoolReadings {
    /// The age of that answer.
    pub age: Duration,
    /// One entry for each name.
    pub pools: Vec<PoolReading>,
}

/// The state of the pools with one name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PoolReading {
    /// The name of the pool.
    pub name: Arc<str>,
    /// Slots that could take an action now.
    pub free: usize,
    /// Slots that run an action.
    pub busy: usize,
    /// Slots that take no work: their pool is draining or has lost its workers, or their run does not end.
    pub out_of_service: usize,
    /// Actions that wait for a slot.
    pub waiting: usize,
    /// How long ago the oldest of them was submitted.
    pub oldest: Option<Duration>,
    /// The number of slots that would be busy if there were enough.
    pub desired: usize,
}

impl PoolReading {
    /// Adds up pools with the same name: a draining pool may have a successor with its name.
    pub fn by_name(pools: impl IntoIterator<Item = Self>) -> Vec<Self> {
        let mut by_name: BTreeMap<Arc<str>, Self> = BTreeMap::new();
        for pool in pools {
            let sum = by_name.entry(pool.name.clone()).or_default();
            *sum = Self {
                free: sum.free.saturating_add(pool.free),
                busy: sum.busy.saturating_add(pool.busy),
                out_of_service: sum.out_of_service.saturating_add(pool.out_of_service),
                waiting: sum.waiting.saturating_add(pool.waiting),
                oldest: sum.oldest.max(pool.oldest),
                desired: sum.desired.saturating_add(pool.desired),
                name: pool.name,
            };
        }
        by_name.into_values().collect()
    }
}

/// Numbers of the process, from the system.
#[derive(Debug, Clone, Copy, Default)]
pub struct ProcessReading {
    /// Memory that is resident.
    pub resident_bytes: u64,
    /// The CPU time of its threads.
    pub cpu: Duration,
    /// Number of descriptors that are open.
    pub open_descriptors: u64,
    /// The limit on open descriptors, if there is one.
    pub max_descriptors: Option<u64>,
}

/// The readings of the latest scrape as a collector of the registry. Clones share them.
#[derive(Debug, Clone, Default)]
pub(super) struct ReadAtScrape(Arc<Mutex<Readings>>);

impl ReadAtScrape {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let read = Self::default();
        registry.register_collector(Box::new(read.clone()));
        read
    }

    pub(super) fn set(&self, readings: Readings) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = readings;
    }
}

impl Collector for ReadAtScrape {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let readings = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut out = Encoder(encoder);
        out.gauge(
            "ready",
            None,
            "1 if /readyz says yes, 0 if it says no",
            f64::from(u8::from(readings.is_ready)),
        )?;
        readings.connections.encode(&mut out)?;
        if let Some(expiry) = readings.certificate_expiry {
            let help = "When the TLS certificate of the server expires, in seconds since 1970";
            out.gauge("tls_certificate_expiry", Some(Unit::Seconds), help, expiry as f64)?;
        }
        readings.store.encode(&mut out)?;
        if let Some(pools) = &readings.pools {
            pools.encode(&mut out)?;
        }
        let help = "Log lines that were dropped, because standard error accepted them too slowly";
        out.counter("log_lines_dropped", None, help, readings.log_lines_dropped)?;
        readings.process.encode(&mut out)?;
        let started = readings.started.and_then(|at| at.duration_since(UNIX_EPOCH).ok());
        let help = "When the process started, in seconds since 1970";
        out.gauge("process_start_time", Some(Unit::Seconds), help, started.unwrap_or_default().as_secs_f64())
    }
}

impl ConnectionReading {
    fn encode(&self, out: &mut Encoder<'_>) -> fmt::Result {
        out.gauge("connections", None, "Open connections of both ports", self.open as f64)?;
        out.gauge("requests_open", None, "Open requests of both ports", self.calls as f64)?;
        let help = "Connections that this server closed or refused, by reason";
        out.family("connections_closed", None, help, MetricType::Counter, |mut family| {
            self.closed.iter().try_for_each(|(reason, count)| {
                ConstCounter::new(*count).encode(family.encode_family(&[("reason", *reason)])?)
            })
        })
    }
}

impl StoreReading {
    fn encode(&self, out: &mut Encoder<'_>) -> fmt::Result {
        let bytes = || Some(Unit::Bytes);
        out.gauge("store_used", bytes(), "Bytes on disk of all stored entries", self.used as f64)?;
        out.gauge("store_limit", bytes(), "The size limit of the store", self.limit as f64)?;
        let help = "Bytes of entries that running actions and open readers keep from eviction";
        out.gauge("store_held", bytes(), help, self.held as f64)?;
        let help =
            "Bytes of entries that are leased to builds, and that are not evicted until the leases end";
        out.gauge("store_leased", bytes(), help, self.leased as f64)?;
        out.gauge("store_reserved", bytes(), "Bytes that are reserved for uploads", self.reserved as f64)?;
        let help = "Entries of the store, by kind";
        let entries = [("blob", self.blobs), ("result", self.results), ("zstd_form", self.zstd_forms)];
        out.family("store_entries", None, help, MetricType::Gauge, |mut family| {
            entries.iter().try_for_each(|(kind, count)| {
                ConstGauge::new(*count as f64).encode(family.encode_family(&[("kind", *kind)])?)
            })
        })?;
        let help = "Blobs that are kept compressed";
        out.gauge("store_compressed_blobs", None, help, self.compressed_blobs as f64)?;
        let help = "Uncompressed bytes of the blobs that are kept compressed";
        out.gauge("store_compressed_content", bytes(), help, self.compressed_content as f64)?;
        let help = "Bytes on disk of the blobs that are kept compressed";
        out.gauge("store_compressed", bytes(), help, self.compressed as f64)?;
        let help = "Memory of the index of the store";
        out.gauge("store_index_memory", bytes(), help, self.index_bytes as f64)?;
        out.counter("store_evicted_entries", None, "Entries that were evicted", self.evicted)?;
        out.counter("store_evicted", bytes(), "Bytes of entries that were evicted", self.evicted_bytes)?;
        let help = "Entries that were dropped because their files were damaged or gone";
        out.counter("store_damaged_entries", None, help, self.damaged)?;
        let help = "Results that were dropped because one of their blobs was evicted or dropped";
        out.counter("store_dropped_results", None, help, self.followed)?;
        let help = "Entries that were lost although they were leased to a build";
        out.counter("broken_promises", None, help, self.broken_promises)?;
        let help = "Results that were not served because leases left no room for their blobs";
        out.counter("store_refused_results", None, help, self.refused_results)?;
        let help = "How often the oldest leases were taken from a build with more than its share";
        out.counter("store_withdrawn_leases", None, help, self.withdrawn_leases)?;
        out.counter("store_scrubbed", bytes(), "Bytes that the scrub has verified", self.scrubbed)?;
        let help = "Damaged entries that the scrub has found";
        out.counter("store_scrub_damaged_entries", None, help, self.scrub_damaged)?;
        let help = "Completed passes of the scrub over the whole store";
        out.counter("store_scrub_passes", None, help, self.scrub_passes)?;
        let help = "Time since the last use of the entry that would be evicted next, to within an hour";
        out.gauge("store_oldest_use", Some(Unit::Seconds), help, self.oldest_use.as_secs_f64())?;
        let help = "Bytes that count against the limit besides the entries: deleted blobs, tables and files beside the store";
        out.gauge("store_overhead", bytes(), help, self.overhead as f64)?;
        let help =
            "Bytes of the files that the server keeps beside the store on the same file system, by owner";
        out.family("store_beside", bytes(), help, MetricType::Gauge, |mut family| {
            self.beside.iter().try_for_each(|(owner, taken)| {
                ConstGauge::new(*taken as f64).encode(family.encode_family(&[("owner", *owner)])?)
            })
        })?;
        if let Some(free) = self.disk_free {
            out.gauge("store_disk_free", bytes(), "Free bytes of the file system of the store", free as f64)?;
        }
        let help = "1 while uploads and results are refused because the file system of the store is full";
        out.gauge("store_read_only", None, help, f64::from(u8::from(self.is_read_only)))
    }
}

impl PoolReadings {
    fn encode(&self, out: &mut Encoder<'_>) -> fmt::Result {
        let help = "How old the numbers of pools are; more than a second means that the scheduler does not answer in time";
        out.gauge("pools_age", Some(Unit::Seconds), help, self.age.as_secs_f64())?;
        let help = "Slots of each pool, by state";
        out.family("slots", None, help, MetricType::Gauge, |mut family| {
            self.pools.iter().try_for_each(|pool| {
                let states =
                    [("free", pool.free), ("busy", pool.busy), ("out_of_service", pool.out_of_service)];
                states.iter().try_for_each(|(state, count)| {
                    let labels = [("pool", &*pool.name), ("state", state)];
                    ConstGauge::new(*count as f64).encode(family.encode_family(&labels)?)
                })
            })
        })?;
        let help = "Actions that wait for a slot, each in the pool that it would be given first";
        self.each(out, "queue_tasks", None, help, |pool| pool.waiting as f64)?;
        let help = "How long ago the oldest waiting action of each pool was submitted";
        let age = |pool: &PoolReading| pool.oldest.unwrap_or_default().as_secs_f64();
        self.each(out, "queue_oldest", Some(Unit::Seconds), help, age)?;
        let help = "Slots that would be busy now if each pool had enough: running and waiting actions";
        self.each(out, "desired_slots", None, help, |pool| pool.desired as f64)
    }

    /// A gauge with a value for each pool.
    fn each(
        &self,
        out: &mut Encoder<'_>,
        name: &str,
        unit: Option<Unit>,
        help: &str,
        value: impl Fn(&PoolReading) -> f64,
    ) -> fmt::Result {
        out.family(name, unit, help, MetricType::Gauge, |mut family| {
            self.pools.iter().try_for_each(|pool| {
                ConstGauge::new(value(pool)).encode(family.encode_family(&[("pool", &*pool.name)])?)
            })
        })
    }
}

impl ProcessReading {
    fn encode(&self, out: &mut Encoder<'_>) -> fmt::Result {
        let help = "Resident memory of the process";
        out.gauge("process_resident", Some(Unit::Bytes), help, self.resident_bytes as f64)?;
        let help = "Processor time of the process, without the actions that it runs";
        let cpu = ConstCounter::new(self.cpu.as_secs_f64());
        out.family("process_cpu", Some(Unit::Seconds), help, MetricType::Counter, |metric| {
            cpu.encode(metric)
        })?;
        let open = self.open_descriptors as f64;
        out.gauge("process_open_descriptors", None, "Open descriptors of the process", open)?;
        let max = self.max_descriptors.map_or(f64::INFINITY, |max| max as f64);
        out.gauge("process_max_descriptors", None, "The limit on open descriptors", max)
    }
}

/// Writes metrics that have no handles.
struct Encoder<'a>(DescriptorEncoder<'a>);

impl Encoder<'_> {
    fn family(
        &mut self,
        name: &str,
        unit: Option<Unit>,
        help: &str,
        kind: MetricType,
        values: impl FnOnce(MetricEncoder<'_>) -> fmt::Result,
    ) -> fmt::Result {
        values(self.0.encode_descriptor(name, &format!("{help}."), unit.as_ref(), kind)?)
    }

    fn gauge(&mut self, name: &str, unit: Option<Unit>, help: &str, value: f64) -> fmt::Result {
        let value = ConstGauge::new(value);
        self.family(name, unit, help, MetricType::Gauge, |metric| value.encode(metric))
    }

    fn counter(&mut self, name: &str, unit: Option<Unit>, help: &str, value: u64) -> fmt::Result {
        let value = ConstCounter::new(value);
        self.family(name, unit, help, MetricType::Counter, |metric| value.encode(metric))
    }
}
