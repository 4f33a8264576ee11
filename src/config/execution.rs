//! The checked `[execution]` section.

use super::{
    ExecutionConfig, Machine,
    checker::Checker,
    images::{self, ImagesSettings},
    limits::MAX_CONCURRENCY,
    persistent_workers::{PersistentWorkersSettings, persistent_workers},
    pools::{PoolSettings, pools},
    sandbox::sandbox,
};
use crate::{
    action::{Priorities, TimeoutPolicy},
    platform::{self, UnknownProperties},
    sandbox::settings::{SandboxMode, SandboxSettings},
};
use std::{
    path::{Path, PathBuf},
    time::Duration,
};

/// Maximum number of queued tasks, and of retained operations. They take about 2 GB of memory.
const MAX_OPERATIONS: usize = 1_000_000;
/// Maximum absolute value of a priority. The cost of scheduling decisions grows with the number of priorities.
const PRIORITY_MAX: i32 = 1_000;

/// The checked settings of the scheduler and the workers; see [`super::ExecutionConfig`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecutionSettings {
    /// Number of concurrent actions in all pools together; at least 1.
    pub slots: usize,
    /// The pools in order of preference; at least one.
    pub pools: Vec<PoolSettings>,
    /// The treatment of platform properties that no pool configures.
    pub unknown_properties: UnknownProperties,
    /// The range of effective priorities.
    pub priorities: Priorities,
    /// Waiting time after which an action gains one step of priority.
    pub priority_ageing: Duration,
    /// Absolute directory for exec directories.
    pub build_root: PathBuf,
    /// Maximum number of queued tasks; at least 1.
    pub queue_size: usize,
    /// Maximum time that a task may wait for a slot.
    pub queue_timeout: Duration,
    /// The allowed timeouts of actions.
    pub timeouts: TimeoutPolicy,
    /// Time limit for fetching inputs, and again for storing outputs.
    pub transfer_timeout: Duration,
    /// How long finished operations are kept.
    pub retention: Duration,
    /// Maximum number of finished operations that are kept; at least 1.
    pub retained_operations: usize,
    /// How long a task continues after its last client left.
    pub abandon_grace: Duration,
    /// The same if other work waits for its slot, or the server shuts down.
    pub contended_abandon_grace: Duration,
    /// How often a task is attempted if its worker fails; at least 1.
    pub max_attempts: u32,
    /// Size limit of a file that a command writes.
    pub max_output_file_bytes: u64,
    /// The sandbox of actions.
    pub sandbox: SandboxSettings,
    /// Container images; `None` if actions cannot name any.
    pub images: Option<ImagesSettings>,
    /// Bazel's persistent workers; `None` if each action runs in a process of its own.
    pub persistent_workers: Option<PersistentWorkersSettings>,
    /// Maximum number of bytes of all staged input trees together; 0 for no staging.
    pub max_staged_bytes: u64,
    /// Memory of all actions together; 0 for a part of the machine's memory.
    pub total_memory_bytes: u64,
    /// Whether control groups must be able to enforce the limits of actions.
    pub limits_required: bool,
}

/// Checks the section. `cache_dir` is the directory of the store. `own` are the paths of other sections that no action
/// may see.
pub(super) fn execution(
    check: &mut Checker<'_>,
    warnings: &mut Vec<String>,
    cache_dir: &Path,
    own: &[&Path],
    machine: &Machine,
) -> ExecutionSettings {
    let config = &check.loaded.config.execution;
    check_values(check, config);
    let build_root = if config.build_root.as_os_str().is_empty() {
        cache_dir.join("build")
    } else {
        check.directory("execution.build_root", &config.build_root, machine)
    };
    let credentials = images::credentials(check, machine);
    let own: Vec<&Path> =
        own.iter().copied().chain([build_root.as_path()]).chain(credentials.as_deref()).collect();
    let sandbox = sandbox(check, warnings, &own, machine);
    let mut pools = pools(check, machine, &sandbox);
    let is_sandboxed = |pool: &PoolSettings| pool.sandbox.mode != SandboxMode::Off;
    let images = images::images(check, credentials.clone(), pools.iter().any(is_sandboxed));
    if images.is_some() {
        // An image is a root file system, which needs a sandbox.
        let pools = pools.iter_mut().filter(|pool| is_sandboxed(pool));
        platform::offer_images(pools.map(|pool| &mut pool.offers));
    }
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
        sandbox,
        images,
        persistent_workers: persistent_workers(check),
        max_staged_bytes: match config.staged_inputs_gb.bytes() {
            0 => 0,
            _ => check.size("execution.staged_inputs_gb", config.staged_inputs_gb),
        },
        total_memory_bytes: config.limits.total_memory_gb.bytes(),
        limits_required: config.limits.required,
    }
}

/// Checks the values that do not depend on others.
fn check_values(check: &mut Checker<'_>, config: &ExecutionConfig) {
    check.require(
        "execution.concurrency",
        config.concurrency <= MAX_CONCURRENCY,
        &format!("must be at most {MAX_CONCURRENCY}; 0 means the number of CPUs"),
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
    check.require_with(
        "execution.default_timeout",
        &["execution.max_timeout"],
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
}
