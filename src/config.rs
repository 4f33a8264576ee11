//! Configuration: one typed tree with built-in defaults.
//!
//! `gorego.toml` at the top of the project is the same tree as text, with comments; a test holds the two equal. The way
//! from sources to a running server: [`load()`] puts flags over environment over file over defaults and remembers where
//! each value came from; [`settings`] checks the result and turns it into types that cannot be wrong. [`Config`] is data
//! only and may hold nonsense; everything past this module gets [`Settings`].

pub mod load;
pub mod pools;
pub mod settings;
pub mod show;
mod source_text;

pub use load::{Flag, Loaded, Origin, Sources, load};
pub use pools::PoolSettings;
pub use settings::{ExecutionSettings, Machine, Settings};

use crate::{platform::UnknownProperties, size::Size};
use gorego_reapi::digest::DigestFunction;
use pools::PoolConfig;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, time::Duration};

/// Everything that can be set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where gRPC is served.
    pub listen_addr: SocketAddr,
    /// Serve a non-loopback address although anybody who reaches it can run commands here.
    pub allow_unauthenticated: bool,
    /// Names under which clients may ask; "" is the default of most clients.
    pub instance_names: Vec<String>,
    /// Where blobs, action results and exec directories live; empty for `gorego` in the user's cache directory.
    pub local_cache_dir: PathBuf,
    /// Bound on what the store keeps on disk, uploads in progress included.
    pub max_size_gb: Size,
    /// How long the exit may take after SIGTERM; running actions and requests under way go on meanwhile.
    #[serde(with = "humantime_serde")]
    pub shutdown_grace: Duration,
    /// Instances with a policy of their own, by name; to be named here is enough.
    pub instances: BTreeMap<String, InstanceConfig>,
    /// Logs.
    pub log: LogConfig,
    /// The store and its services.
    pub cache: CacheConfig,
    /// The scheduler and its workers.
    pub execution: ExecutionConfig,
    /// Log streams of clients.
    pub log_streams: LogStreamsConfig,
    /// The Remote Asset service.
    pub assets: AssetsConfig,
    /// The HTTP/1.1 cache.
    pub http: HttpConfig,
}

/// `[assets]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AssetsConfig {
    /// Hosts that may be downloaded from; empty for none (AST-10).
    pub allowed_hosts: Vec<String>,
    /// Address ranges that are not public but may be connected to all the same, such as "10.0.0.0/8".
    pub allowed_networks: Vec<String>,
    /// Whether clients may bind content to URIs (AST-11).
    pub push: bool,
    /// Downloads and unpackings at the same time.
    pub concurrency: usize,
    /// Largest download.
    pub max_download_gb: Size,
    /// Largest archive once it is unpacked.
    pub max_unpacked_gb: Size,
    /// Longest time that a fetch may take, all its mirrors together.
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
    /// Redirects that one download follows.
    pub max_redirects: usize,
    /// How long content that was fetched without a checksum is taken to be current.
    #[serde(with = "humantime_serde")]
    pub max_age: Duration,
}

/// `[http]`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HttpConfig {
    /// Where the HTTP/1.1 cache is served; empty for nowhere.
    pub listen_addr: String,
    /// Names that its requests may be for, beside those of this machine.
    pub allowed_hosts: Vec<String>,
}

/// `[instances."NAME"]`: what is different there; everything else is as for all instances.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct InstanceConfig {
    /// Digest functions that its clients may use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest_functions: Option<Vec<DigestFunction>>,
    /// Whether its clients may write action results.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub action_cache_updates: Option<bool>,
    /// Whether actions are run for its clients, where the server runs any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub execution: Option<bool>,
    /// The instance whose blobs it shares; it has action results and operations of its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blobs_of: Option<String>,
}

/// `[log]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    /// Levels by target, in env_logger's syntax.
    pub filter: String,
    /// How lines look.
    pub format: LogFormat,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Text on a terminal, JSON elsewhere.
    Auto,
    /// One JSON object a line.
    Json,
    /// For people.
    Text,
}

/// `[cache]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CacheConfig {
    /// Digest functions that clients may use (CAP-05).
    pub digest_functions: Vec<DigestFunction>,
    /// Whether clients may write action results (AC-12, CAP-09).
    pub action_cache_updates: bool,
    /// Largest blob that is accepted (CAP-15).
    pub max_blob_size_gb: Size,
    /// Whether SplitBlob and SpliceBlob are offered (CAP-16).
    pub chunking: bool,
    /// How long the bytes of a broken upload are kept for its client to go on.
    #[serde(with = "humantime_serde")]
    pub partial_upload_retention: Duration,
    /// How hard blobs are compressed for clients that read them compressed, 1 to 19.
    pub zstd_level: i32,
    /// What a finished compressed upload answers as `committed_size`.
    pub compressed_committed_size: CommittedSize,
}

/// What a finished compressed upload answers as `committed_size`; clients disagree (BS-25).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CommittedSize {
    /// The compressed bytes, after the offset at which the upload began: Bazel, buck2, and the API's text.
    Compressed,
    /// The size of the blob: Siso, and the `cas` package of the Go SDK.
    Uncompressed,
    /// -1, which Bazel and buck2 take too.
    MinusOne,
}

/// `[execution]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExecutionConfig {
    /// Whether Execute is offered; without it this is a cache.
    pub enabled: bool,
    /// Actions that run at the same time; 0 for the number of CPUs.
    pub concurrency: usize,
    /// Where exec directories are made; empty for `build` in `local_cache_dir`. Fastest on the same file system.
    pub build_root: PathBuf,
    /// Tasks that may wait; beyond that Execute answers RESOURCE_EXHAUSTED.
    pub queue_size: usize,
    /// How long a task may wait for a slot.
    #[serde(with = "humantime_serde")]
    pub queue_timeout: Duration,
    /// Run time allowed to actions that name none.
    #[serde(with = "humantime_serde")]
    pub default_timeout: Duration,
    /// Longest run time an action may ask for.
    #[serde(with = "humantime_serde")]
    pub max_timeout: Duration,
    /// How long bringing in inputs may take, and again how long storing outputs may.
    #[serde(with = "humantime_serde")]
    pub transfer_timeout: Duration,
    /// How long finished operations are remembered.
    #[serde(with = "humantime_serde")]
    pub retention: Duration,
    /// How many finished operations are remembered at most; the oldest are forgotten first.
    pub retained_operations: usize,
    /// How long work goes on when nobody follows it any more.
    #[serde(with = "humantime_serde")]
    pub abandon_grace: Duration,
    /// How long it goes on when other work waits for its slot, or the server stops.
    #[serde(with = "humantime_serde")]
    pub contended_abandon_grace: Duration,
    /// How often a task is tried when workers die under it.
    pub max_attempts: u32,
    /// Largest file that a command may write.
    pub max_output_file_gb: Size,
    /// The most urgent priority that counts; more urgent ones count as this.
    pub min_priority: i32,
    /// The least urgent priority that counts; less urgent ones count as this.
    pub max_priority: i32,
    /// How long an action waits until it gains one step of priority.
    #[serde(with = "humantime_serde")]
    pub priority_ageing: Duration,
    /// What becomes of actions that ask for a platform property of which nothing is said here.
    pub unknown_properties: UnknownProperties,
    /// Properties of this machine's workers when there are no pools. An action that asks for another value of one of these
    /// is refused.
    pub platform: BTreeMap<String, String>,
    /// Pools by name; without any there is one, "local", made from `concurrency` and `platform`.
    pub pools: BTreeMap<String, PoolConfig>,
}

/// `[log_streams]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogStreamsConfig {
    /// Whether clients may make log streams of their own (LOG-01).
    pub enabled: bool,
    /// How many there may be; finished ones make room for new ones.
    pub max_streams: usize,
    /// Bound on the bytes of all of them.
    pub max_size_gb: Size,
    /// How long one that is finished, or that nobody writes to, is kept.
    #[serde(with = "humantime_serde")]
    pub retention: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen_addr: SocketAddr::from(([127, 0, 0, 1], 50051)),
            allow_unauthenticated: false,
            instance_names: vec![String::new()],
            instances: BTreeMap::new(),
            local_cache_dir: PathBuf::new(),
            max_size_gb: Size::from_gb(50),
            shutdown_grace: Duration::from_secs(30),
            log: LogConfig::default(),
            cache: CacheConfig::default(),
            execution: ExecutionConfig::default(),
            log_streams: LogStreamsConfig::default(),
            assets: AssetsConfig::default(),
            http: HttpConfig::default(),
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

impl Default for LogConfig {
    fn default() -> Self {
        Self { filter: "info,h2=warn,hyper=warn,tonic=warn,tower=warn".into(), format: LogFormat::Auto }
    }
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self {
            digest_functions: DigestFunction::ALL.to_vec(),
            action_cache_updates: true,
            max_blob_size_gb: Size::from_gb(16),
            chunking: true,
            partial_upload_retention: Duration::from_secs(10 * 60),
            zstd_level: 1,
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
            min_priority: -100,
            max_priority: 100,
            priority_ageing: Duration::from_secs(60),
            unknown_properties: UnknownProperties::Ignore,
            platform: [("OSFamily".to_owned(), "linux".to_owned())].into(),
            pools: BTreeMap::new(),
        }
    }
}
