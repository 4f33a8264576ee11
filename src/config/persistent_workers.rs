//! `[execution.persistent_workers]`: the settings of Bazel's persistent workers, and their checks.

use super::{checker::Checker, limits::MAX_CONCURRENCY};
use crate::size::Size;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// The `[execution.persistent_workers]` section: tools that outlive an action.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PersistentWorkersConfig {
    /// Whether actions may be executed by processes that keep running for other actions.
    pub enabled: bool,
    /// Maximum number of these processes in each pool; 0 for two for each slot of the pool.
    pub max_workers: usize,
    /// How long a process is kept after its last action.
    #[serde(with = "humantime_serde")]
    pub idle_timeout: Duration,
    /// Number of actions after which a process is ended.
    pub max_requests: u64,
    /// A process that uses more resident memory than this after an action is ended.
    pub max_memory_gb: Size,
    /// How long a process may take for an action. After this time the action runs without it.
    #[serde(with = "humantime_serde")]
    pub request_timeout: Duration,
}

/// The section after all checks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PersistentWorkersSettings {
    /// Maximum number of workers in each pool; `None` for two for each slot of the pool.
    pub max_workers: Option<usize>,
    /// How long a process is kept after its last action.
    pub idle_timeout: Duration,
    /// Number of actions after which a process is ended; at least 1.
    pub max_requests: u64,
    /// A process that uses more resident memory in bytes than this after an action is ended.
    pub max_memory_bytes: u64,
    /// How long a process may take for an action.
    pub request_timeout: Duration,
}

impl Default for PersistentWorkersConfig {
    fn default() -> Self {
        Self {
            enabled: false,
            max_workers: 0,
            idle_timeout: Duration::from_secs(5 * 60),
            max_requests: 10_000,
            max_memory_gb: Size::from_gb(4),
            request_timeout: Duration::from_secs(10 * 60),
        }
    }
}

/// Checks the section; `None` if it is off.
pub(super) fn persistent_workers(check: &mut Checker<'_>) -> Option<PersistentWorkersSettings> {
    let config = &check.loaded.config.execution.persistent_workers;
    check.require(
        "execution.persistent_workers.max_workers",
        config.max_workers <= MAX_CONCURRENCY,
        &format!("must be at most {MAX_CONCURRENCY}; 0 means two for each slot"),
    );
    check.require(
        "execution.persistent_workers.max_requests",
        config.max_requests > 0,
        "must be more than 0",
    );
    check.duration("execution.persistent_workers.idle_timeout", config.idle_timeout, true);
    check.duration("execution.persistent_workers.request_timeout", config.request_timeout, false);
    let max_memory_bytes = check.size("execution.persistent_workers.max_memory_gb", config.max_memory_gb);
    config.enabled.then_some(PersistentWorkersSettings {
        max_workers: (config.max_workers > 0).then_some(config.max_workers),
        idle_timeout: config.idle_timeout,
        max_requests: config.max_requests,
        max_memory_bytes,
        request_timeout: config.request_timeout,
    })
}
