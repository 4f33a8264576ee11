//! The checked configuration, as the rest of the server uses it.
//!
//! A [`Settings`] is valid by construction: limits hold, directories are absolute, sizes are in bytes, and values such
//! as zero or empty are replaced by their meaning. All problems are reported together, each with its key, value and
//! source. Nothing here accesses a file.

use super::{
    ClientResults, CommittedSize, Compress, Config, Durability, Loaded, LogConfig, Machine,
    access::access,
    checker::Checker,
    execution::{ExecutionSettings, execution},
    load::{Sources, finish, merge},
    log_filter::check_filter,
    quotas::quotas,
    tls::{ClientAuth, TlsSettings, tls},
};
use crate::{
    access::settings::AccessSettings,
    host::{HostPortRule, HostRule, Network},
    instance::{InstancePolicy, Instances},
    node::NodeName,
    quotas::limits::QuotaRules,
};
use gorego_reapi::{
    compression::LEVELS,
    digest::DigestFunction,
    error::{Error, Result},
};
use std::{
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

/// Maximum number of client log streams. Each stream with bytes keeps a file open.
const MAX_LOG_STREAMS: usize = 100_000;
/// Maximum number of concurrent downloads. Each has a connection, and a thread while it is unpacked.
const MAX_ASSET_CONCURRENCY: usize = 256;

/// Smaller blobs share files with others and are not compressed.
const COMPRESSED_FROM_BYTES: u64 = 64 << 10;

/// The checked settings of a server.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Address on which gRPC is served.
    pub listen_addr: SocketAddr,
    /// The name of this server among several; empty for a single server.
    pub node: NodeName,
    /// The instances that clients may name.
    pub instances: Instances,
    /// Absolute directory for blobs and results.
    pub cache_dir: PathBuf,
    /// Limit on the size of the store on disk.
    pub max_size_bytes: u64,
    /// Size limit of one blob; never above `max_size_bytes`.
    pub max_blob_bytes: u64,
    /// Whether SplitBlob and SpliceBlob are offered (CAP-16).
    pub chunking: bool,
    /// How long the bytes of a broken upload are kept.
    pub partial_upload_retention: Duration,
    /// How long blobs and results that a build has used are not evicted after its last request; zero if they may be
    /// evicted at once.
    pub build_lease: Duration,
    /// The same for requests that name no build.
    pub unnamed_build_lease: Duration,
    /// Memory for the links of results to their blobs.
    pub result_links_bytes: u64,
    /// Whether what is stored survives a power cut.
    pub durability: Durability,
    /// How fast the scrub of the store reads; 0 for no scrub.
    pub scrub_bytes_per_second: u64,
    /// zstd level for stored blobs; one of [`gorego_reapi::compression::LEVELS`].
    pub zstd_level: i32,
    /// Which blobs are kept compressed; `None` for none.
    pub compression: Option<CompressionSettings>,
    /// The `committed_size` after a compressed upload (BS-25).
    pub compressed_committed_size: CommittedSize,
    /// Time limit of a shutdown after SIGTERM.
    pub shutdown_grace: Duration,
    /// TLS for both ports; `None` without it.
    pub tls: Option<TlsSettings>,
    /// Log filter and format.
    pub log: LogConfig,
    /// The scheduler and its workers; `None` for a cache without execution.
    pub execution: Option<ExecutionSettings>,
    /// The log streams of clients.
    pub log_streams: LogStreamsSettings,
    /// The Remote Asset service.
    pub assets: AssetsSettings,
    /// Address of the HTTP/1.1 cache, if it is enabled.
    pub http_addr: Option<SocketAddr>,
    /// Host names that HTTP requests may use, in addition to the names of this machine.
    pub http_hosts: Vec<HostRule>,
    /// The permissions of clients.
    pub access: AccessSettings,
    /// The limits of each principal.
    pub quotas: QuotaRules,
    /// The file that was read, for logs.
    pub config_file: Option<PathBuf>,
    /// Valid settings that deserve a warning; logged once logging is installed.
    pub warnings: Vec<String>,
}

/// The checked settings of compression at rest; see [`super::CacheConfig`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CompressionSettings {
    /// How long a blob must not have been used before it is compressed.
    pub after: Duration,
    /// Smaller blobs are not compressed.
    pub min_bytes: u64,
    /// Blobs that get smaller by less are not compressed; below 100.
    pub min_saving_percent: u32,
    /// Bound on the CPU time, in percent of one core; 1 to 100.
    pub cpu_percent: u32,
}

/// The checked settings of the log streams of clients; see [`super::LogStreamsConfig`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogStreamsSettings {
    /// Whether clients may create them.
    pub enabled: bool,
    /// Maximum number of streams; at least 1.
    pub max_streams: usize,
    /// Limit on the total size of all streams.
    pub max_bytes: u64,
    /// How long a stream is kept after it is finished, or after the last write to it.
    pub retention: Duration,
}

/// The checked settings of the Remote Asset service; see [`super::AssetsConfig`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AssetsSettings {
    /// Hosts from which assets may be downloaded.
    pub hosts: Vec<HostPortRule>,
    /// Non-public address ranges to which connections are allowed.
    pub networks: Vec<Network>,
    /// Whether clients may bind content to URIs.
    pub push: bool,
    /// Number of concurrent downloads and unpackings; at least 1.
    pub concurrency: usize,
    /// Size limit of one download.
    pub max_download_bytes: u64,
    /// Size limit of one archive after unpacking.
    pub max_unpacked_bytes: u64,
    /// Time limit of one fetch.
    pub timeout: Duration,
    /// Number of redirects that one download follows.
    pub max_redirects: usize,
    /// Age up to which content that was fetched without a checksum counts as current.
    pub max_age: Duration,
}

impl Settings {
    /// The keys and credentials of the server that a reload may move.
    pub(crate) fn secrets(&self) -> Vec<&PathBuf> {
        self.tls.iter().flat_map(TlsSettings::files).chain(self.access.files()).collect()
    }

    /// Checks a configuration and fills in values that depend on the machine.
    ///
    /// # Errors
    /// [`Error::Invalid`] that lists every problem on its own line.
    pub fn new(loaded: &Loaded, machine: &Machine) -> Result<Self> {
        let config = &loaded.config;
        let mut check = Checker::new(loaded);
        let mut warnings = Vec::new();
        check_exposure(&mut check, &mut warnings, "listen_addr", config.listen_addr);
        let http_addr = http_address(&mut check, &mut warnings);
        let http_hosts = http_hosts(&mut check);
        let node = node_name(&mut check);
        let instances = instances(&mut check);
        let cache_dir = cache_dir(&mut check, machine);
        let max_size_bytes = check.size("max_size_gb", config.max_size_gb);
        let max_blob_bytes = check.size("cache.max_blob_size_gb", config.cache.max_blob_size_gb);
        check_values(&mut check);
        let compression = compression(&mut check);
        let log_streams = log_streams(&mut check);
        let assets = assets(&mut check);
        let quotas = quotas(&mut check);
        let tls = tls(&mut check, machine);
        let is_exposed = [Some(config.listen_addr), http_addr].into_iter().flatten().any(|a| !is_loopback(a));
        let access = access(&mut check, is_exposed, machine);
        let secrets = tls.iter().flat_map(TlsSettings::files).chain(access.files());
        let own: Vec<&Path> = secrets.chain([&cache_dir]).chain(&loaded.file).map(PathBuf::as_path).collect();
        let execution = execution(&mut check, &mut warnings, &cache_dir, &own, machine);
        let result_links_bytes = check.size("cache.result_links_gb", config.cache.result_links_gb);
        match (instances, check.problems.is_empty()) {
            (Some(instances), true) => Ok(Self {
                listen_addr: config.listen_addr,
                node,
                instances,
                cache_dir,
                max_size_bytes,
                max_blob_bytes: max_blob_bytes.min(max_size_bytes),
                chunking: config.cache.chunking,
                partial_upload_retention: config.cache.partial_upload_retention,
                build_lease: config.cache.build_lease,
                unnamed_build_lease: config.cache.unnamed_build_lease,
                result_links_bytes,
                durability: config.cache.durability,
                scrub_bytes_per_second: u64::from(config.cache.scrub_mb_per_second) * 1_000_000,
                zstd_level: config.cache.zstd_level,
                compression,
                compressed_committed_size: config.cache.compressed_committed_size,
                shutdown_grace: config.shutdown_grace,
                tls,
                log: config.log.clone(),
                execution: config.execution.enabled.then_some(execution),
                log_streams,
                assets,
                http_addr,
                http_hosts,
                access,
                quotas,
                config_file: loaded.file.clone(),
                warnings,
            }),
            _ => Err(check.error()),
        }
    }
}

/// Merges all sources into one configuration and checks its values.
///
/// # Errors
/// [`Error::Invalid`] with all problems that [`load`](super::load()) and [`Settings::new`] find.
pub fn load_checked(sources: &Sources, machine: &Machine) -> Result<(Loaded, Settings)> {
    let (loaded, mut problems) = merge(sources)?;
    match Settings::new(&loaded, machine) {
        Ok(settings) => Ok((finish((loaded, problems))?, settings)),
        Err(error) => {
            problems.push(error.to_string());
            Err(Error::Invalid(problems.join("\n")))
        }
    }
}

/// The directory of the store.
fn cache_dir(check: &mut Checker<'_>, machine: &Machine) -> PathBuf {
    let configured = &check.loaded.config.local_cache_dir;
    if !configured.as_os_str().is_empty() {
        return check.directory("local_cache_dir", configured, machine);
    }
    if machine.cache_home.is_none() {
        check.refuse(
            "local_cache_dir",
            "this user has no cache directory ($XDG_CACHE_HOME or $HOME is needed); name a directory",
        );
    }
    machine.cache_home.as_deref().unwrap_or(Path::new("/")).join("gorego")
}

/// Checks the values that do not depend on others.
fn check_values(check: &mut Checker<'_>) {
    let config = &check.loaded.config;
    check.duration("shutdown_grace", config.shutdown_grace, true);
    check.duration("cache.partial_upload_retention", config.cache.partial_upload_retention, true);
    check.duration("cache.build_lease", config.cache.build_lease, true);
    check.duration("cache.unnamed_build_lease", config.cache.unnamed_build_lease, true);
    check.require("cache.zstd_level", LEVELS.contains(&config.cache.zstd_level), "must be between 1 and 19");
    if let Err(problem) = check_filter(&config.log.filter) {
        check.refuse("log.filter", &problem);
    }
}

fn compression(check: &mut Checker<'_>) -> Option<CompressionSettings> {
    let config = &check.loaded.config.cache;
    let (after, saving, cpu) =
        (config.compress_after, config.compress_min_saving_percent, config.compress_cpu_percent);
    check.duration("cache.compress_after", after, true);
    let min_bytes = config.compress_min_size_gb.bytes();
    check.require(
        "cache.compress_min_size_gb",
        min_bytes >= COMPRESSED_FROM_BYTES,
        "must be at least 64 KiB: smaller blobs share files with others and are not compressed",
    );
    check.require(
        "cache.compress_min_saving_percent",
        (1..=99).contains(&saving),
        "must be between 1 and 99",
    );
    check.require("cache.compress_cpu_percent", (1..=100).contains(&cpu), "must be between 1 and 100");
    let settings = CompressionSettings { after, min_bytes, min_saving_percent: saving, cpu_percent: cpu };
    (config.compress == Compress::Cold).then_some(settings)
}

fn node_name(check: &mut Checker<'_>) -> NodeName {
    check.loaded.config.node_name.parse().unwrap_or_else(|error: Error| {
        check.refuse("node_name", &error.to_string());
        NodeName::default()
    })
}

/// The instances in `instance_names` and the instances with their own policy.
fn instances(check: &mut Checker<'_>) -> Option<Instances> {
    let config = &check.loaded.config;
    let functions = |check: &mut Checker<'_>, (key, what): (&str, &str), listed: &[DigestFunction]| {
        check.require(key, !listed.is_empty(), &format!("{what} needs at least one digest function"));
        DigestFunction::ALL.iter().copied().filter(|function| listed.contains(function)).collect()
    };
    let common = InstancePolicy {
        digest_functions: functions(
            check,
            ("cache.digest_functions", "the list"),
            &config.cache.digest_functions,
        ),
        action_cache_updates: config.cache.action_cache_updates,
        private_results: false,
        execution: true,
        blobs_of: None,
    };
    let common = with_client_results(common, config.cache.client_results);
    let mut policies: Vec<(String, InstancePolicy)> =
        config.instance_names.iter().map(|name| (name.clone(), common.clone())).collect();
    for (name, own) in &config.instances {
        let client_results = own.client_results.unwrap_or(config.cache.client_results);
        let own = InstancePolicy {
            digest_functions: match &own.digest_functions {
                Some(listed) => {
                    let what = format!("the list of instance \"{}\"", name.escape_debug());
                    functions(check, ("instances", &what), listed)
                }
                None => common.digest_functions.clone(),
            },
            action_cache_updates: own.action_cache_updates.unwrap_or(config.cache.action_cache_updates),
            private_results: false,
            execution: own.execution.unwrap_or(common.execution),
            blobs_of: own.blobs_of.clone(),
        };
        let own = with_client_results(own, client_results);
        match policies.iter_mut().find(|(listed, _)| listed == name) {
            Some((_, policy)) => *policy = own,
            None => policies.push((name.clone(), own)),
        }
    }
    let shared = policies.iter().any(|(_, policy)| policy.blobs_of.is_some());
    match Instances::with_policies(policies) {
        Ok(instances) => Some(instances),
        Err(_) if !check.are_usable(&["instances", "instance_names"]) => Instances::new([""]).ok(),
        Err(error) => {
            check.refuse(if shared { "instances" } else { "instance_names" }, &error.to_string());
            None
        }
    }
}

/// The policy with this setting for the results of clients.
fn with_client_results(policy: InstancePolicy, results: ClientResults) -> InstancePolicy {
    InstancePolicy {
        action_cache_updates: policy.action_cache_updates && results != ClientResults::Refused,
        private_results: results == ClientResults::Private,
        ..policy
    }
}

/// Whether only this machine can reach an address.
fn is_loopback(address: SocketAddr) -> bool {
    match address.ip() {
        IpAddr::V6(ip) => ip.to_ipv4_mapped().map_or(ip.is_loopback(), |ip| ip.is_loopback()),
        IpAddr::V4(ip) => ip.is_loopback(),
    }
}

/// Whether two sockets cannot listen on these addresses. An IPv6 socket for all addresses is one for IPv4 too.
fn overlap(one: SocketAddr, other: SocketAddr) -> bool {
    let (first, second) = (one.ip().to_canonical(), other.ip().to_canonical());
    let contains = |all: IpAddr, ip: IpAddr| all.is_unspecified() && (all.is_ipv6() || ip.is_ipv4());
    let same_ip = first == second || contains(first, second) || contains(second, first);
    one.port() == other.port() && one.port() != 0 && same_ip
}

/// The keys that allow an address which other machines can reach.
const EXPOSURE: &[&str] = &[
    "allow_unauthenticated",
    "tls.cert",
    "tls.client_ca",
    "tls.client_auth",
    "access.tokens",
    "access.passwords",
    "access.certificates",
    "access.jwt",
];

/// Whether only some of those who can reach the server can use it.
fn has_credentials(config: &Config) -> bool {
    // A required client certificate of a CA restricts who can connect, even if it does not change the permissions of a
    // client.
    let needs_certificate =
        !config.tls.client_ca.as_os_str().is_empty() && config.tls.client_auth == ClientAuth::Required;
    config.access.has_credentials() || needs_certificate
}

/// Checks that a reload does not remove the credentials of a server that other machines can reach until its restart.
///
/// # Errors
/// [`Error::Precondition`] if it does.
pub fn check_reload(next: &Config, running: &Config) -> Result<()> {
    let addresses = [Some(running.listen_addr), running.http.listen_addr.parse().ok()];
    let reachable = addresses.into_iter().flatten().find(|address| !is_loopback(*address));
    match reachable {
        Some(address)
            if !has_credentials(next) && !next.allow_unauthenticated && !running.allow_unauthenticated =>
        {
            Err(Error::Precondition(format!(
                "without credentials ([access]), everyone who can reach {address}, where the server listens until it is \
                 restarted, could run commands on this machine; restart the server to use this configuration"
            )))
        }
        _ => Ok(()),
    }
}

/// Without authentication, everyone who can reach the endpoint can run commands on this machine. Without TLS, everyone
/// who can read the traffic can steal credentials.
fn check_exposure(check: &mut Checker<'_>, warnings: &mut Vec<String>, key: &str, address: SocketAddr) {
    let config = &check.loaded.config;
    let has_tls = !config.tls.cert.as_os_str().is_empty();
    let has_credentials = has_credentials(config);
    if is_loopback(address) || has_tls && has_credentials {
        return;
    }
    let (lack, danger) = if has_credentials {
        ("there is no TLS", "everyone who can read the network traffic can steal credentials and use them")
    } else {
        (
            "there is no authentication",
            "everyone who can reach it can run commands on this machine and change the content of the cache",
        )
    };
    if config.allow_unauthenticated {
        warnings.push(format!("{address} is not a loopback address and {lack}: {danger}"));
    } else {
        check.require_with(
            key,
            EXPOSURE,
            false,
            &format!(
                "is not a loopback address, and {lack}, so {danger}. Configure [tls] and [access] (docs/securing.md), or listen \
                 on 127.0.0.1 (and reach it through an SSH tunnel, say) or, on a network where every user is trusted \
                 with this, set allow_unauthenticated = true"
            ),
        );
    }
}

fn log_streams(check: &mut Checker<'_>) -> LogStreamsSettings {
    let config = &check.loaded.config.log_streams;
    check.count("log_streams.max_streams", config.max_streams, MAX_LOG_STREAMS);
    check.duration("log_streams.retention", config.retention, false);
    LogStreamsSettings {
        enabled: config.enabled,
        max_streams: config.max_streams,
        max_bytes: check.size("log_streams.max_size_gb", config.max_size_gb),
        retention: config.retention,
    }
}

fn http_address(check: &mut Checker<'_>, warnings: &mut Vec<String>) -> Option<SocketAddr> {
    const KEY: &str = "http.listen_addr";
    let text = &check.loaded.config.http.listen_addr;
    if text.is_empty() {
        return None;
    }
    match text.parse() {
        Ok(address) => {
            let holds = !overlap(address, check.loaded.config.listen_addr);
            check.require_with(
                KEY,
                &["listen_addr"],
                holds,
                "has the same port as listen_addr; choose another",
            );
            check_exposure(check, warnings, KEY, address);
            Some(address)
        }
        Err(_) => {
            check.refuse(KEY, "is not an address with a port, such as 127.0.0.1:50052");
            None
        }
    }
}

fn http_hosts(check: &mut Checker<'_>) -> Vec<HostRule> {
    let form = "a host without a port, such as \"cache.example.com\", \"*.example.com\" or \"*\"";
    let hosts = &check.loaded.config.http.allowed_hosts;
    check.rules("http.allowed_hosts", hosts, form, HostRule::parse)
}

fn assets(check: &mut Checker<'_>) -> AssetsSettings {
    let config = &check.loaded.config.assets;
    let form = "a host, such as \"example.com\", \"example.com:8443\", \"*.example.com\" or \"*\"";
    let hosts = check.rules("assets.allowed_hosts", &config.allowed_hosts, form, HostPortRule::parse);
    let form = "an address range, such as \"10.0.0.0/8\"";
    let networks = check.rules("assets.allowed_networks", &config.allowed_networks, form, Network::parse);
    check.count("assets.concurrency", config.concurrency, MAX_ASSET_CONCURRENCY);
    check.require("assets.max_redirects", config.max_redirects <= 100, "must be at most 100");
    check.duration("assets.timeout", config.timeout, false);
    check.duration("assets.max_age", config.max_age, true);
    AssetsSettings {
        hosts,
        networks,
        push: config.push,
        concurrency: config.concurrency,
        max_download_bytes: check.size("assets.max_download_gb", config.max_download_gb),
        max_unpacked_bytes: check.size("assets.max_unpacked_gb", config.max_unpacked_gb),
        timeout: config.timeout,
        max_redirects: config.max_redirects,
        max_age: config.max_age,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reload_does_not_open_a_server_that_listens_beyond_loopback_until_its_restart() {
        let with = |listen: &str, tokens: &str, allow: bool| {
            let mut config = Config { listen_addr: listen.parse().unwrap(), ..Config::default() };
            (config.access.tokens, config.allow_unauthenticated) = (tokens.into(), allow);
            config
        };
        let (inside, outside) = ("127.0.0.1:50051", "0.0.0.0:50051");
        let running = with(outside, "tokens", false);
        let error = check_reload(&with(inside, "", false), &running).unwrap_err();
        assert!(matches!(error, Error::Precondition(_)) && error.to_string().contains(outside), "{error}");
        check_reload(&with(inside, "other", false), &running).unwrap();
        check_reload(&with(outside, "", true), &running).unwrap();
        check_reload(&with(inside, "", false), &with(inside, "tokens", false)).unwrap();
        let mut both = with(inside, "tokens", false);
        both.http.listen_addr = "0.0.0.0:80".into();
        check_reload(&with(inside, "", false), &both).unwrap_err();
    }
}
