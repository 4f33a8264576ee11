//! Checked configuration: what the rest of the server is given.
//!
//! A [`Settings`] in hand is usable: bounds hold, directories are absolute, sizes are in bytes, zero and empty have been
//! replaced by what they stand for. All problems are reported at once, each with the key, its value and who set it. No file
//! is touched here.

use super::{
    CommittedSize, Loaded, LogConfig,
    load::keys,
    pools::{PoolSettings, pools},
};
use crate::{
    action::TimeoutPolicy,
    actors::{
        asset::{AssetSettings, origins::Origins},
        scheduler::settings::Priorities,
    },
    http_cache::hosts::Hosts,
    instance::{Instances, Policy},
    log_streams::{Limits, MAX_STREAM_BYTES},
    platform::UnknownProperties,
    size::Size,
};
use gorego_reapi::{
    compression::LEVELS,
    digest::DigestFunction,
    error::{Error, Result},
};
use std::{
    fmt::Write as _,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

/// Smallest size that can be configured: anything below is a mistake in the unit.
const MIN_SIZE: Size = Size::from_bytes(1_000_000);
/// Longest duration that can be configured; keeps sums of times far from overflow.
const MAX_DURATION: Duration = Duration::from_secs(366 * 24 * 3600);
/// Most actions at a time on one machine; each slot is a thread and a process.
pub(super) const MAX_CONCURRENCY: usize = 4_096;
/// Most log streams of clients; each that has bytes holds a file open.
const MAX_LOG_STREAMS: usize = 100_000;
/// Most downloads at a time; each holds a connection, and a thread while it unpacks.
const MAX_ASSET_CONCURRENCY: usize = 256;
/// Most tasks that may wait, and most finished operations that are remembered; about 2 GB of memory.
const MAX_OPERATIONS: usize = 1_000_000;

/// Priorities farther from 0 than this cannot be configured; the cost of choosing who is next grows with their number.
const PRIORITY_MAX: i32 = 1_000;

/// What is taken from the machine and not from the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// CPUs that this process may use.
    pub cpus: usize,
    /// The user's cache directory, if there is a user with a home.
    pub cache_home: Option<PathBuf>,
    /// Where relative paths start.
    pub current_dir: PathBuf,
}

impl Machine {
    /// This machine, as this process sees it.
    pub fn this() -> Self {
        Self {
            cpus: thread::available_parallelism().map_or(1, usize::from),
            cache_home: dirs::cache_dir(),
            current_dir: std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/")),
        }
    }
}

/// Checked settings of a server.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where gRPC is served.
    pub listen_addr: SocketAddr,
    /// The namespaces.
    pub instances: Instances,
    /// Where blobs and results live; absolute.
    pub cache_dir: PathBuf,
    /// Bound on what the store keeps on disk.
    pub max_size_bytes: u64,
    /// Largest blob that is accepted; never above `max_size_bytes`.
    pub max_blob_bytes: u64,
    /// Whether blobs are split and spliced (CAP-16).
    pub chunking: bool,
    /// How long the bytes of a broken upload are kept.
    pub partial_upload_retention: Duration,
    /// How hard blobs are compressed; one of [`gorego_reapi::compression::LEVELS`].
    pub zstd_level: i32,
    /// What a finished compressed upload answers (BS-25).
    pub compressed_committed_size: CommittedSize,
    /// How long the exit may take after SIGTERM.
    pub shutdown_grace: Duration,
    /// Logs.
    pub log: LogConfig,
    /// The scheduler and its workers; `None` for a cache without execution.
    pub execution: Option<ExecutionSettings>,
    /// Whether clients may make log streams.
    pub client_log_streams: bool,
    /// Bounds on the log streams of clients.
    pub log_streams: Limits,
    /// The Remote Asset service.
    pub assets: AssetSettings,
    /// Where the HTTP/1.1 cache is served, if at all.
    pub http_addr: Option<SocketAddr>,
    /// The names that its requests may be for.
    pub http_hosts: Hosts,
    /// The file that was read, for logs.
    pub config_file: Option<PathBuf>,
    /// What an operator should know although it is allowed; to be logged once logging works.
    pub warnings: Vec<String>,
}

/// Checked settings of the scheduler and the workers; see [`super::ExecutionConfig`] for each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecutionSettings {
    /// Actions that run at the same time, in all pools together; at least 1.
    pub slots: usize,
    /// The pools, by preference; at least one.
    pub pools: Vec<PoolSettings>,
    /// What becomes of actions that ask for a property of which no pool says anything.
    pub unknown_properties: UnknownProperties,
    /// The priorities that count.
    pub priorities: Priorities,
    /// How long an action waits until it gains one step of priority.
    pub priority_ageing: Duration,
    /// Where exec directories are made; absolute.
    pub build_root: PathBuf,
    /// Tasks that may wait; at least 1.
    pub queue_size: usize,
    /// How long a task may wait for a slot.
    pub queue_timeout: Duration,
    /// Run times.
    pub timeouts: TimeoutPolicy,
    /// How long bringing in inputs, and again storing outputs, may take.
    pub transfer_timeout: Duration,
    /// How long finished operations are remembered.
    pub retention: Duration,
    /// How many finished operations are remembered; at least 1.
    pub retained_operations: usize,
    /// How long work goes on when nobody follows it any more.
    pub abandon_grace: Duration,
    /// The same when other work waits for its slot, or the server stops.
    pub contended_abandon_grace: Duration,
    /// How often a task is tried when workers die under it; at least 1.
    pub max_attempts: u32,
    /// Largest file that a command may write.
    pub max_output_file_bytes: u64,
}

/// Collects problems, so that all are shown at once.
pub(super) struct Check<'a> {
    pub(super) loaded: &'a Loaded,
    pub(super) problems: Vec<String>,
}

impl Check<'_> {
    fn refuse(&mut self, key: &str, problem: &str) {
        let value = keys(&self.loaded.config).into_iter().find(|(name, _)| name == key);
        let value = value.map(|(_, value)| value.to_string()).unwrap_or_default();
        self.problems.push(format!("{key} = {value} ({}): {problem}", self.loaded.origin(key)));
    }

    pub(super) fn require(&mut self, key: &str, holds: bool, problem: &str) {
        if !holds {
            self.refuse(key, problem);
        }
    }

    /// A size, as bytes.
    fn size(&mut self, key: &str, size: Size) -> u64 {
        self.require(key, size >= MIN_SIZE, &format!("must be between {MIN_SIZE} and {}", Size::MAX));
        size.bytes()
    }

    fn count(&mut self, key: &str, count: usize, max: usize) {
        self.require(key, (1..=max).contains(&count), &format!("must be between 1 and {max}"));
    }

    fn duration(&mut self, key: &str, duration: Duration, zero_is_fine: bool) {
        self.require(key, zero_is_fine || !duration.is_zero(), "must be more than 0");
        self.require(key, duration <= MAX_DURATION, "must not be longer than 366 days");
    }

    /// An absolute path from a configured one, which is not empty.
    fn directory(&mut self, key: &str, path: &Path, machine: &Machine) -> PathBuf {
        let text = path.to_string_lossy();
        self.require(
            key,
            text != "~" && !text.starts_with("~/"),
            "\"~\" is not expanded here; write the whole path",
        );
        self.require(key, !text.contains('\0'), "contains a NUL");
        machine.current_dir.join(path)
    }
}

impl Settings {
    /// Checks a configuration and fills in what depends on the machine.
    ///
    /// # Errors
    /// [`Error::Invalid`] that lists every problem, one a line.
    pub fn new(loaded: &Loaded, machine: &Machine) -> Result<Self> {
        let config = &loaded.config;
        let mut check = Check { loaded, problems: Vec::new() };
        let mut warnings = Vec::new();
        check_exposure(&mut check, &mut warnings, "listen_addr", config.listen_addr);
        let http_addr = http_address(&mut check, &mut warnings);
        let http_hosts = http_hosts(&mut check);
        let instances = instances(&mut check);
        let cache_dir = if !config.local_cache_dir.as_os_str().is_empty() {
            check.directory("local_cache_dir", &config.local_cache_dir, machine)
        } else {
            if machine.cache_home.is_none() {
                check.refuse(
                    "local_cache_dir",
                    "this user has no cache directory ($XDG_CACHE_HOME or $HOME is needed); name a directory",
                );
            }
            machine.cache_home.as_deref().unwrap_or(Path::new("/")).join("gorego")
        };
        let max_size_bytes = check.size("max_size_gb", config.max_size_gb);
        let max_blob_bytes = check.size("cache.max_blob_size_gb", config.cache.max_blob_size_gb);
        check.duration("shutdown_grace", config.shutdown_grace, true);
        check.duration("cache.partial_upload_retention", config.cache.partial_upload_retention, true);
        check.require(
            "cache.zstd_level",
            LEVELS.contains(&config.cache.zstd_level),
            "must be between 1 and 19",
        );
        if let Err(problem) = crate::logging::check_filter(&config.log.filter) {
            check.refuse("log.filter", &problem);
        }
        let execution = execution(&mut check, &cache_dir, machine);
        let log_streams = log_streams(&mut check);
        let assets = assets(&mut check, &cache_dir);
        match (instances, check.problems.is_empty()) {
            (Some(instances), true) => Ok(Self {
                listen_addr: config.listen_addr,
                instances,
                cache_dir,
                max_size_bytes,
                max_blob_bytes: max_blob_bytes.min(max_size_bytes),
                chunking: config.cache.chunking,
                partial_upload_retention: config.cache.partial_upload_retention,
                zstd_level: config.cache.zstd_level,
                compressed_committed_size: config.cache.compressed_committed_size,
                shutdown_grace: config.shutdown_grace,
                log: config.log.clone(),
                execution: config.execution.enabled.then_some(execution),
                client_log_streams: config.log_streams.enabled,
                log_streams,
                assets,
                http_addr,
                http_hosts,
                config_file: loaded.file.clone(),
                warnings,
            }),
            _ => Err(Error::Invalid(check.problems.iter().fold(
                String::from("the configuration cannot be used:"),
                |mut text, problem| {
                    let _ = write!(text, "\n  {problem}");
                    text
                },
            ))),
        }
    }
}

/// The listed names, and those that have a policy of their own.
fn instances(check: &mut Check<'_>) -> Option<Instances> {
    let config = &check.loaded.config;
    let functions = |check: &mut Check<'_>, key: &str, listed: &[DigestFunction]| {
        check.require(key, !listed.is_empty(), "is empty; at least one digest function is needed");
        DigestFunction::ALL.iter().copied().filter(|function| listed.contains(function)).collect()
    };
    let common = Policy {
        digest_functions: functions(check, "cache.digest_functions", &config.cache.digest_functions),
        action_cache_updates: config.cache.action_cache_updates,
        execution: true,
        blobs_of: None,
    };
    let mut policies: Vec<(String, Policy)> =
        config.instance_names.iter().map(|name| (name.clone(), common.clone())).collect();
    for (name, own) in &config.instances {
        let own = Policy {
            digest_functions: match &own.digest_functions {
                Some(listed) => functions(check, "instances", listed),
                None => common.digest_functions.clone(),
            },
            action_cache_updates: own.action_cache_updates.unwrap_or(common.action_cache_updates),
            execution: own.execution.unwrap_or(common.execution),
            blobs_of: own.blobs_of.clone(),
        };
        match policies.iter_mut().find(|(listed, _)| listed == name) {
            Some((_, policy)) => *policy = own,
            None => policies.push((name.clone(), own)),
        }
    }
    let shared = policies.iter().any(|(_, policy)| policy.blobs_of.is_some());
    match Instances::with_policies(policies) {
        Ok(instances) => Some(instances),
        Err(error) => {
            check.refuse(if shared { "instances" } else { "instance_names" }, &error.to_string());
            None
        }
    }
}

/// Whoever can reach an endpoint without authentication can run commands on this machine.
fn check_exposure(check: &mut Check<'_>, warnings: &mut Vec<String>, key: &str, address: SocketAddr) {
    let allowed = check.loaded.config.allow_unauthenticated;
    let loopback = match address.ip() {
        IpAddr::V6(ip) => ip.to_ipv4_mapped().map_or(ip.is_loopback(), |ip| ip.is_loopback()),
        IpAddr::V4(ip) => ip.is_loopback(),
    };
    if loopback {
        return;
    }
    if allowed {
        warnings.push(format!(
            "{address} is not a loopback address and there is no authentication: everybody who can reach it can run \
             commands on this machine and change what the cache answers"
        ));
    } else {
        check.refuse(
            key,
            "is not a loopback address. There is no authentication, so everybody who can reach it could run commands on \
             this machine and change what the cache answers. Listen on 127.0.0.1 (and reach it through an SSH tunnel, \
             say) or, on a network where everybody is trusted that far, set allow_unauthenticated = true",
        );
    }
}

fn log_streams(check: &mut Check<'_>) -> Limits {
    let config = &check.loaded.config.log_streams;
    check.count("log_streams.max_streams", config.max_streams, MAX_LOG_STREAMS);
    check.duration("log_streams.retention", config.retention, false);
    Limits {
        streams: config.max_streams,
        bytes: check.size("log_streams.max_size_gb", config.max_size_gb),
        stream_bytes: MAX_STREAM_BYTES,
        idle: Some(config.retention),
        kept: config.retention,
    }
}

fn http_address(check: &mut Check<'_>, warnings: &mut Vec<String>) -> Option<SocketAddr> {
    const KEY: &str = "http.listen_addr";
    let text = &check.loaded.config.http.listen_addr;
    if text.is_empty() {
        return None;
    }
    match text.parse() {
        Ok(address) => {
            check_exposure(check, warnings, KEY, address);
            Some(address)
        }
        Err(_) => {
            check.refuse(KEY, "is no address with a port, such as 127.0.0.1:50052");
            None
        }
    }
}

fn http_hosts(check: &mut Check<'_>) -> Hosts {
    Hosts::parse(&check.loaded.config.http.allowed_hosts).unwrap_or_else(|problem| {
        check.refuse("http.allowed_hosts", &problem);
        Hosts::default()
    })
}

fn assets(check: &mut Check<'_>, cache_dir: &Path) -> AssetSettings {
    let config = &check.loaded.config.assets;
    let origins = Origins::parse(&config.allowed_hosts, &config.allowed_networks);
    if let Err(problem) = &origins {
        check.refuse(problem.key, &problem.text);
    }
    check.count("assets.concurrency", config.concurrency, MAX_ASSET_CONCURRENCY);
    check.require("assets.max_redirects", config.max_redirects <= 100, "must be at most 100");
    check.duration("assets.timeout", config.timeout, false);
    check.duration("assets.max_age", config.max_age, true);
    AssetSettings {
        origins: origins.unwrap_or_default(),
        push: config.push,
        concurrency: config.concurrency,
        max_download_bytes: check.size("assets.max_download_gb", config.max_download_gb),
        max_unpacked_bytes: check.size("assets.max_unpacked_gb", config.max_unpacked_gb),
        timeout: config.timeout,
        max_redirects: config.max_redirects,
        max_age: config.max_age,
        file: cache_dir.join("v1").join("assets"),
    }
}

fn execution(check: &mut Check<'_>, cache_dir: &Path, machine: &Machine) -> ExecutionSettings {
    let config = &check.loaded.config.execution;
    check.require(
        "execution.concurrency",
        config.concurrency <= MAX_CONCURRENCY,
        &format!("must be at most {MAX_CONCURRENCY}; 0 stands for the number of CPUs"),
    );
    check.count("execution.queue_size", config.queue_size, MAX_OPERATIONS);
    check.count("execution.retained_operations", config.retained_operations, MAX_OPERATIONS);
    check.count("execution.max_attempts", config.max_attempts as usize, 100);
    for (key, duration) in [
        ("execution.queue_timeout", config.queue_timeout),
        ("execution.default_timeout", config.default_timeout),
        ("execution.max_timeout", config.max_timeout),
        ("execution.transfer_timeout", config.transfer_timeout),
        ("execution.retention", config.retention),
        ("execution.priority_ageing", config.priority_ageing),
    ] {
        check.duration(key, duration, false);
    }
    check.duration("execution.abandon_grace", config.abandon_grace, true);
    check.duration("execution.contended_abandon_grace", config.contended_abandon_grace, true);
    check.require(
        "execution.default_timeout",
        config.default_timeout <= config.max_timeout,
        "is above execution.max_timeout; lower it too",
    );
    check.require(
        "execution.min_priority",
        (-PRIORITY_MAX..=0).contains(&config.min_priority),
        &format!("must be between -{PRIORITY_MAX} and 0"),
    );
    check.require(
        "execution.max_priority",
        (0..=PRIORITY_MAX).contains(&config.max_priority),
        &format!("must be between 0 and {PRIORITY_MAX}"),
    );
    let pools = pools(check, machine);
    let build_root = if config.build_root.as_os_str().is_empty() {
        cache_dir.join("build")
    } else {
        check.directory("execution.build_root", &config.build_root, machine)
    };
    ExecutionSettings {
        slots: pools.iter().fold(0, |sum: usize, pool| sum.saturating_add(pool.slots)),
        pools,
        unknown_properties: config.unknown_properties,
        priorities: Priorities { min: config.min_priority, max: config.max_priority },
        priority_ageing: config.priority_ageing,
        build_root,
        queue_size: config.queue_size,
        queue_timeout: config.queue_timeout,
        timeouts: TimeoutPolicy { default: config.default_timeout, max: config.max_timeout },
        transfer_timeout: config.transfer_timeout,
        retention: config.retention,
        retained_operations: config.retained_operations,
        abandon_grace: config.abandon_grace,
        contended_abandon_grace: config.contended_abandon_grace,
        max_attempts: config.max_attempts,
        max_output_file_bytes: check.size("execution.max_output_file_gb", config.max_output_file_gb),
    }
}
