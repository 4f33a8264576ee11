//! Configuration: one typed tree with built-in defaults.
//!
//! `gorego.toml` at the top of the project is the same tree as text, with comments; a test keeps the two equal.
//! [`load()`] merges flags over environment over file over defaults and records the source of each value. [`settings`]
//! checks the result and converts it to types that are valid by construction. A [`Config`] is plain data and may be
//! invalid; the rest of the server only sees [`Settings`].

mod access;
mod checker;
mod execution;
mod images;
mod jwt;
mod limits;
pub mod load;
mod log_filter;
mod machine;
mod mismatch;
mod persistent_workers;
mod pools;
mod quotas;
mod sandbox;
mod settings;
pub mod show;
mod source_text;
mod suggestion;
mod tls;

pub use execution::ExecutionSettings;
pub use images::{ImagesSettings, Tags};
pub(crate) use limits::MAX_CONCURRENCY;
pub use load::{Flag, Loaded, Origin, SocketAddress, Sources, load};
pub use machine::Machine;
pub use persistent_workers::PersistentWorkersSettings;
pub use pools::PoolSettings;
pub use settings::{AssetsSettings, LogStreamsSettings, Settings, check_reload, load_checked};
pub use tls::{ClientAuth, TlsSettings};

pub use crate::logging::{LogConfig, LogFormat};

use crate::{platform::UnknownProperties, size::Size};
use access::AccessConfig;
use gorego_reapi::digest::DigestFunction;
use images::ImagesConfig;
use limits::LimitsConfig;
use persistent_workers::PersistentWorkersConfig;
use pools::PoolConfig;
use quotas::QuotasConfig;
use sandbox::SandboxConfig;
use serde::{Deserialize, Deserializer, Serialize, de::Error as _};
use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, time::Duration};
use tls::TlsConfig;

/// Prefix of the environment variables that set keys.
const ENV_PREFIX: &str = "GOREGO_";

/// The whole configuration, one field for each key or section.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Address on which gRPC is served.
    #[serde(deserialize_with = "address")]
    pub listen_addr: SocketAddr,
    /// Listen on a non-loopback address although everyone who can reach it can run commands here.
    pub allow_unauthenticated: bool,
    /// Name of this server among several that serve the same clients; empty for a single server.
    pub node_name: String,
    /// Instance names that clients may use; "" is the default of most clients.
    pub instance_names: Vec<String>,
    /// Directory for blobs, action results and exec directories; empty for `gorego` in the user's cache directory.
    pub local_cache_dir: PathBuf,
    /// Limit on the size of the store on disk, including unfinished uploads.
    pub max_size_gb: Size,
    /// Time limit of a shutdown after SIGTERM. Running actions and open requests continue meanwhile.
    #[serde(with = "humantime_serde")]
    pub shutdown_grace: Duration,
    /// Instances with their own policy, by name. An instance listed here need not be in `instance_names`.
    pub instances: BTreeMap<String, InstanceConfig>,
    /// TLS for both ports.
    pub tls: TlsConfig,
    /// Log filter and format.
    pub log: LogConfig,
    /// The store and the services that use it.
    pub cache: CacheConfig,
    /// The scheduler and its workers.
    pub execution: ExecutionConfig,
    /// Log streams that clients create.
    pub log_streams: LogStreamsConfig,
    /// The Remote Asset service.
    pub assets: AssetsConfig,
    /// The cache for tools that speak HTTP/1.1.
    pub http: HttpConfig,
    /// The permissions of clients.
    pub access: AccessConfig,
    /// The limits of each principal.
    pub quotas: QuotasConfig,
}

/// The `[assets]` section: remote assets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AssetsConfig {
    /// Hosts from which assets may be downloaded; empty for none (AST-10).
    pub allowed_hosts: Vec<String>,
    /// Non-public address ranges to which connections are allowed, such as "10.0.0.0/8".
    pub allowed_networks: Vec<String>,
    /// Whether clients may bind content to URIs (AST-11).
    pub push: bool,
    /// Number of concurrent downloads and unpackings.
    pub concurrency: usize,
    /// Size limit of one download.
    pub max_download_gb: Size,
    /// Size limit of one archive after unpacking.
    pub max_unpacked_gb: Size,
    /// Time limit of one fetch, including all of its mirrors.
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
    /// Number of redirects that one download follows.
    pub max_redirects: usize,
    /// Age up to which content that was fetched without a checksum counts as current.
    #[serde(with = "humantime_serde")]
    pub max_age: Duration,
}

/// The `[http]` section: the port of the HTTP cache, metrics and health.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HttpConfig {
    /// Address of the HTTP/1.1 cache; empty to disable it.
    pub listen_addr: String,
    /// Host names that requests may use, in addition to the names of this machine.
    pub allowed_hosts: Vec<String>,
}

/// An `[instances."NAME"]` section. It lists the differences from the other instances.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct InstanceConfig {
    /// Digest functions that clients of the instance may use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest_functions: Option<Vec<DigestFunction>>,
    /// Whether clients of the instance may write action results.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub action_cache_updates: Option<bool>,
    /// Which clients get the action results that clients of the instance write.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client_results: Option<ClientResults>,
    /// Whether clients of the instance may execute actions, if the server executes any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub execution: Option<bool>,
    /// The instance with which it shares blobs. Action results and operations are never shared.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blobs_of: Option<String>,
}

/// The `[cache]` section: the store and the action cache.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CacheConfig {
    /// Digest functions that clients may use (CAP-05).
    pub digest_functions: Vec<DigestFunction>,
    /// Whether clients may write action results (AC-12, CAP-09).
    pub action_cache_updates: bool,
    /// Which clients get the action results that clients write.
    pub client_results: ClientResults,
    /// Size limit of one blob (CAP-15).
    pub max_blob_size_gb: Size,
    /// Whether SplitBlob and SpliceBlob are offered (CAP-16).
    pub chunking: bool,
    /// How long the bytes of a broken upload are kept, so that its client can resume it.
    #[serde(with = "humantime_serde")]
    pub partial_upload_retention: Duration,
    /// How long blobs and results that a build has used are not evicted after the last request of the build.
    #[serde(with = "humantime_serde")]
    pub build_lease: Duration,
    /// The same for requests that do not name a build.
    #[serde(with = "humantime_serde")]
    pub unnamed_build_lease: Duration,
    /// Memory for the index that records which blobs each action result needs.
    pub result_links_gb: Size,
    /// Whether what is stored survives a power cut.
    pub durability: Durability,
    /// How fast the scrub of the store reads, in MB/s; 0 for no scrub.
    pub scrub_mb_per_second: u32,
    /// zstd level for blobs that clients read compressed, 1 to 19.
    pub zstd_level: i32,
    /// Which blobs are kept compressed.
    pub compress: Compress,
    /// How long a blob must not have been used before it is compressed.
    #[serde(with = "humantime_serde")]
    pub compress_after: Duration,
    /// Smaller blobs are not compressed.
    pub compress_min_size_gb: Size,
    /// Blobs that get smaller by less are not compressed.
    pub compress_min_saving_percent: u32,
    /// Bound on the CPU time for compressing, in percent of one core.
    pub compress_cpu_percent: u32,
    /// The `committed_size` in the response to a finished compressed upload.
    pub compressed_committed_size: CommittedSize,
}

/// Which blobs are kept compressed on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compress {
    /// No blobs, except those that are already compressed.
    Off,
    /// Blobs that were not used for a while.
    Cold,
}

/// Which clients get the action results that clients write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClientResults {
    /// All clients of the instance get them.
    Shared,
    /// Only the principal that wrote a result gets it.
    Private,
    /// Clients may not write results.
    Refused,
}

/// Whether what is stored survives a power cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// It survives the death of the server; a power cut loses what was stored last.
    Process,
    /// It survives a power cut: an upload is acknowledged when it is on disk.
    Disk,
}

/// The `committed_size` in the response to a finished compressed upload. Clients expect different values (BS-25).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CommittedSize {
    /// The number of compressed bytes after the offset at which the upload began. Bazel, buck2 and the text of the API
    /// expect this value.
    Compressed,
    /// The size of the blob. Siso and the `cas` package of the Go SDK expect this value.
    Uncompressed,
    /// -1, which Bazel and buck2 accept too.
    MinusOne,
}

/// The `[execution]` section: queue, pools and how actions run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExecutionConfig {
    /// Whether Execute is offered. Otherwise the server is only a cache.
    pub enabled: bool,
    /// Number of actions that run at the same time; 0 for the number of CPUs.
    pub concurrency: usize,
    /// Directory for exec directories; empty for `build` in `local_cache_dir`. It is fastest on the same file system.
    pub build_root: PathBuf,
    /// Maximum number of queued tasks. Beyond it, Execute answers RESOURCE_EXHAUSTED.
    pub queue_size: usize,
    /// Maximum time that a task may wait for a slot.
    #[serde(with = "humantime_serde")]
    pub queue_timeout: Duration,
    /// Timeout of actions that set none.
    #[serde(with = "humantime_serde")]
    pub default_timeout: Duration,
    /// Maximum timeout that an action may set.
    #[serde(with = "humantime_serde")]
    pub max_timeout: Duration,
    /// Time limit for fetching the inputs of an action, and again for storing its outputs.
    #[serde(with = "humantime_serde")]
    pub transfer_timeout: Duration,
    /// How long finished operations are kept.
    #[serde(with = "humantime_serde")]
    pub retention: Duration,
    /// Maximum number of finished operations that are kept. The oldest are forgotten first.
    pub retained_operations: usize,
    /// How long a task continues after its last client left.
    #[serde(with = "humantime_serde")]
    pub abandon_grace: Duration,
    /// How long it continues if other work waits for its slot, or the server shuts down.
    #[serde(with = "humantime_serde")]
    pub contended_abandon_grace: Duration,
    /// How often a task is attempted if its worker fails.
    pub max_attempts: u32,
    /// Size limit of a file that a command writes.
    pub max_output_file_gb: Size,
    /// Size limit of all staged input trees together.
    pub staged_inputs_gb: Size,
    /// The most urgent priority. More urgent values are raised to it.
    pub min_priority: i32,
    /// The least urgent priority. Less urgent values are lowered to it.
    pub max_priority: i32,
    /// Waiting time after which an action gains one step of priority.
    #[serde(with = "humantime_serde")]
    pub priority_ageing: Duration,
    /// The treatment of platform properties that no pool configures.
    pub unknown_properties: UnknownProperties,
    /// Platform properties of this machine's workers, if no pools are configured. An action that requires another value
    /// of one of them is refused.
    pub platform: BTreeMap<String, String>,
    /// Pools by name. Without any, there is one pool "local", with the slots of `concurrency` and the properties of
    /// `platform`.
    pub pools: BTreeMap<String, PoolConfig>,
    /// The sandbox of actions.
    pub sandbox: SandboxConfig,
    /// The limits of one action.
    pub limits: LimitsConfig,
    /// Container images as root file systems of actions.
    pub images: ImagesConfig,
    /// The use of Bazel's persistent workers.
    pub persistent_workers: PersistentWorkersConfig,
}

/// The `[log_streams]` section: log streams of clients.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogStreamsConfig {
    /// Whether clients may create log streams (LOG-01).
    pub enabled: bool,
    /// Maximum number of streams. Finished ones are removed to make room for new ones.
    pub max_streams: usize,
    /// Limit on the total size of all streams.
    pub max_size_gb: Size,
    /// How long a stream is kept after it is finished, or after the last write to it.
    #[serde(with = "humantime_serde")]
    pub retention: Duration,
}

fn address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SocketAddr, D::Error> {
    parse_address(&String::deserialize(deserializer)?).map_err(D::Error::custom)
}

/// Parses an IP address with a port. The error says what was expected.
pub(crate) fn parse_address(text: &str) -> Result<SocketAddr, &'static str> {
    text.parse().map_err(|_| "expected an IP address and a port, such as \"127.0.0.1:50051\"")
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen_addr: SocketAddr::from(([127, 0, 0, 1], 50051)),
            allow_unauthenticated: false,
            node_name: String::new(),
            instance_names: vec![String::new()],
            instances: BTreeMap::new(),
            local_cache_dir: PathBuf::new(),
            max_size_gb: Size::from_gb(50),
            shutdown_grace: Duration::from_secs(30),
            tls: TlsConfig::default(),
            log: LogConfig::default(),
            cache: CacheConfig::default(),
            execution: ExecutionConfig::default(),
            log_streams: LogStreamsConfig::default(),
            assets: AssetsConfig::default(),
            http: HttpConfig::default(),
            access: AccessConfig::default(),
            quotas: QuotasConfig::default(),
        }
    }
}

impl Default for AssetsConfig {
    fn default() -> Self {
        Self {
            allowed_hosts: Vec::new(),
            allowed_networks: Vec::new(),
            push: true,
            concurrency: 8,
            max_download_gb: Size::from_gb(4),
            max_unpacked_gb: Size::from_gb(16),
            timeout: Duration::from_secs(10 * 60),
            max_redirects: 10,
            max_age: Duration::from_secs(24 * 3600),
        }
    }
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self {
            digest_functions: DigestFunction::ALL.to_vec(),
            action_cache_updates: true,
            client_results: ClientResults::Shared,
            max_blob_size_gb: Size::from_gb(16),
            chunking: true,
            partial_upload_retention: Duration::from_secs(10 * 60),
            build_lease: Duration::from_secs(3 * 60 * 60),
            unnamed_build_lease: Duration::from_secs(15 * 60),
            result_links_gb: Size::from_bytes(64_000_000),
            durability: Durability::Process,
            scrub_mb_per_second: 20,
            zstd_level: 1,
            compress: Compress::Cold,
            compress_after: Duration::from_secs(24 * 60 * 60),
            compress_min_size_gb: Size::from_bytes(64 << 10),
            compress_min_saving_percent: 20,
            compress_cpu_percent: 25,
            compressed_committed_size: CommittedSize::Compressed,
        }
    }
}

impl Default for LogStreamsConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            max_streams: 4_000,
            max_size_gb: Size::from_gb(1),
            retention: Duration::from_secs(10 * 60),
        }
    }
}

impl Default for ExecutionConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            concurrency: 0,
            build_root: PathBuf::new(),
            queue_size: 20_000,
            queue_timeout: Duration::from_secs(12 * 3600),
            default_timeout: Duration::from_secs(3600),
            max_timeout: Duration::from_secs(24 * 3600),
            transfer_timeout: Duration::from_secs(30 * 60),
            retention: Duration::from_secs(600),
            retained_operations: 20_000,
            abandon_grace: Duration::from_secs(60),
            contended_abandon_grace: Duration::from_secs(2),
            max_attempts: 3,
            max_output_file_gb: Size::from_gb(16),
            staged_inputs_gb: Size::from_gb(5),
            min_priority: -100,
            max_priority: 100,
            priority_ageing: Duration::from_secs(60),
            unknown_properties: UnknownProperties::Ignore,
            platform: [("OSFamily".to_owned(), "linux".to_owned())].into(),
            pools: BTreeMap::new(),
            sandbox: SandboxConfig::default(),
            limits: LimitsConfig::default(),
            images: ImagesConfig::default(),
            persistent_workers: PersistentWorkersConfig::default(),
        }
    }
}
