//! `[execution.limits]`, and `limits` of a pool: the limits of one action, and their checks.

use super::checker::{Checker, MIN_SIZE};
use crate::{
    limits::{LimitRange, LimitSettings},
    size::Size,
};
use serde::{Deserialize, Serialize};

/// Maximum number of concurrent actions on one machine. Each slot is a thread and a process.
pub(crate) const MAX_CONCURRENCY: usize = 4_096;
/// The section, for messages.
const SECTION: &str = "execution.limits";

/// The `[execution.limits]` section. 0 means no limit, unless it says otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LimitsConfig {
    /// Memory of an action.
    pub memory_gb: Size,
    /// Maximum memory that an action may request; 0 if it cannot request any.
    pub max_memory_gb: Size,
    /// Memory of all actions together; 0 for the memory of the machine, less a reserve.
    pub total_memory_gb: Size,
    /// Swap of an action.
    pub swap_gb: Size,
    /// CPUs that an action can keep busy.
    pub cores: u64,
    /// Maximum number of CPUs that an action may request; 0 if it cannot request any.
    pub max_cores: u64,
    /// Maximum number of processes that an action may request; 0 if it cannot request any.
    pub max_processes: u64,
    /// Bytes that an action may write to its input root.
    pub disk_gb: Size,
    /// Maximum number of such bytes that an action may request; 0 if it cannot request any.
    pub max_disk_gb: Size,
    /// Files and directories that an action may create in its input root.
    pub files: u64,
    /// Whether the server refuses to start where the kernel's control groups cannot enforce the limits.
    pub required: bool,
}

/// `limits` of a pool: the differences from `[execution.limits]`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PoolLimitsConfig {
    /// The keys are the same as in [`LimitsConfig`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_gb: Option<Size>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_memory_gb: Option<Size>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap_gb: Option<Size>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cores: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_cores: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_processes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_gb: Option<Size>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_disk_gb: Option<Size>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub files: Option<u64>,
}

impl Default for LimitsConfig {
    fn default() -> Self {
        let none = Size::from_bytes(0);
        Self {
            memory_gb: none,
            max_memory_gb: none,
            total_memory_gb: none,
            swap_gb: none,
            cores: 0,
            max_cores: 0,
            max_processes: 0,
            disk_gb: none,
            max_disk_gb: none,
            files: 0,
            required: false,
        }
    }
}

impl LimitsConfig {
    /// These limits with the differences of a pool.
    fn with(&self, pool: &PoolLimitsConfig) -> Self {
        Self {
            memory_gb: pool.memory_gb.unwrap_or(self.memory_gb),
            max_memory_gb: pool.max_memory_gb.unwrap_or(self.max_memory_gb),
            swap_gb: pool.swap_gb.unwrap_or(self.swap_gb),
            cores: pool.cores.unwrap_or(self.cores),
            max_cores: pool.max_cores.unwrap_or(self.max_cores),
            max_processes: pool.max_processes.unwrap_or(self.max_processes),
            disk_gb: pool.disk_gb.unwrap_or(self.disk_gb),
            max_disk_gb: pool.max_disk_gb.unwrap_or(self.max_disk_gb),
            files: pool.files.unwrap_or(self.files),
            ..self.clone()
        }
    }

    fn problems(&self) -> Vec<(&'static str, String)> {
        let mut problems = Vec::new();
        for (key, size) in [
            ("memory_gb", self.memory_gb),
            ("max_memory_gb", self.max_memory_gb),
            ("total_memory_gb", self.total_memory_gb),
            ("swap_gb", self.swap_gb),
            ("disk_gb", self.disk_gb),
            ("max_disk_gb", self.max_disk_gb),
        ] {
            if size.bytes() > 0 && size < MIN_SIZE {
                problems.push((key, format!("must be 0, or between {MIN_SIZE} and {}", Size::MAX)));
            }
        }
        let above = |default: u64, max: u64| max > 0 && default > max;
        for (key, is_above, max) in [
            ("memory_gb", above(self.memory_gb.bytes(), self.max_memory_gb.bytes()), "max_memory_gb"),
            ("cores", above(self.cores, self.max_cores), "max_cores"),
            ("disk_gb", above(self.disk_gb.bytes(), self.max_disk_gb.bytes()), "max_disk_gb"),
        ] {
            if is_above {
                problems.push((key, format!("is above {max}; raise {max} too")));
            }
        }
        for (key, cores) in [("cores", self.cores), ("max_cores", self.max_cores)] {
            if cores > MAX_CONCURRENCY as u64 {
                problems.push((key, format!("must be at most {MAX_CONCURRENCY}")));
            }
        }
        problems
    }

    fn checked(&self, processes: u64) -> LimitSettings {
        let sizes = |default: Size, max: Size| LimitRange { default: default.bytes(), max: max.bytes() };
        LimitSettings {
            memory: sizes(self.memory_gb, self.max_memory_gb),
            swap: self.swap_gb.bytes(),
            cores: LimitRange { default: self.cores, max: self.max_cores },
            processes: LimitRange { default: processes, max: self.max_processes },
            disk: sizes(self.disk_gb, self.max_disk_gb),
            files: self.files,
        }
    }
}

/// Checks the section. Returns the limits of an action.
pub(super) fn limits(check: &mut Checker<'_>) -> LimitSettings {
    let config = check.loaded.config.execution.limits.clone();
    for (key, problem) in config.problems() {
        check.require(&format!("{SECTION}.{key}"), false, &problem);
    }
    config.checked(check.loaded.config.execution.sandbox.processes)
}

/// The limits of a pool, and their problems.
pub(super) fn pool_limits(check: &Checker<'_>, pool: &PoolLimitsConfig) -> (LimitSettings, Vec<String>) {
    let execution = &check.loaded.config.execution;
    let of_all = execution.limits.problems();
    let merged = execution.limits.with(pool);
    let own = merged.problems().into_iter().filter(|problem| !of_all.contains(problem));
    let problems = own.map(|(key, problem)| format!("limits.{key} {problem}")).collect();
    (merged.checked(execution.sandbox.processes), problems)
}

#[cfg(test)]
mod tests {
    use crate::{
        config::{Config, Loaded, Machine, Settings},
        limits::LimitRange,
        size::Size,
    };
    use gorego_reapi::error::Result;

    fn checked(toml: &str) -> Result<Settings> {
        let mut loaded = Loaded::defaults();
        loaded.config = toml::from_str::<Config>(toml).unwrap();
        let machine = Machine { cpus: 1, cache_home: Some("/var/cache".into()), current_dir: "/".into() };
        Settings::new(&loaded, &machine)
    }

    #[test]
    fn a_pool_has_the_limits_of_all_but_for_its_own() {
        let settings = checked(
            "[execution.limits]\nmemory_gb = 2\nmax_memory_gb = 4\n\
             [execution.pools.a]\nslots = 1\n\
             [execution.pools.b]\nslots = 1\nlimits = { max_memory_gb = 16, cores = 3 }\n",
        );
        let execution = settings.unwrap().execution.unwrap();
        let limits = |name: &str| execution.pools.iter().find(|pool| pool.name == name).unwrap().limits;
        let gb = |size| Size::from_gb(size).bytes();
        assert_eq!(limits("a").memory, LimitRange { default: gb(2), max: gb(4) });
        assert_eq!(limits("b").memory, LimitRange { default: gb(2), max: gb(16) });
        assert_eq!((limits("a").cores.default, limits("b").cores.default), (0, 3));
        assert_eq!(execution.pools[0].name, "a", "the pool with less memory is used first");
    }

    #[test]
    fn invalid_limits_are_refused_with_their_key() {
        for (toml, part) in [
            ("[execution.limits]\nmemory_gb = \"1 kB\"", "execution.limits.memory_gb"),
            ("[execution.limits]\nmemory_gb = 8\nmax_memory_gb = 4", "above max_memory_gb"),
            ("[execution.limits]\nmax_cores = 100000", "execution.limits.max_cores"),
            (
                "[execution.pools.a]\nslots = 1\nlimits = { cores = 4, max_cores = 2 }",
                "limits.cores is above",
            ),
        ] {
            let error = checked(toml).unwrap_err().to_string();
            assert!(error.contains(part), "{part} in {error}");
        }
    }
}
