//! The restrictions of a cell's /proc. Pure.

use super::Host;
use std::path::Path;

/// Files of /proc that are hidden because they reveal more about the kernel than an action needs. Only root can read
/// most of them, but without a separate user for each slot an action of a root server is root of the host, though
/// without capabilities.
const HIDDEN_PROC_FILES: &[&str] = &[
    "/proc/kcore",
    "/proc/keys",
    "/proc/key-users",
    "/proc/kallsyms",
    "/proc/timer_list",
    "/proc/sysrq-trigger",
    "/proc/sched_debug",
    "/proc/latency_stats",
    "/proc/kmsg",
    "/proc/kpagecgroup",
    "/proc/kpagecount",
    "/proc/kpageflags",
    "/proc/mtrr",
    "/proc/pagetypeinfo",
    "/proc/slabinfo",
    "/proc/vmallocinfo",
    "/proc/vmcore",
];

/// Settings of the kernel and of devices, which are made read-only.
const READ_ONLY_PROC_FILES: &[&str] = &[
    "/proc/sys",
    "/proc/irq",
    "/proc/bus",
    "/proc/fs",
    "/proc/acpi",
    "/proc/asound",
    "/proc/driver",
    "/proc/dynamic_debug",
    "/proc/scsi",
];

/// Changes to a freshly mounted /proc.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ProcPlan {
    /// Paths to cover, so that their content is hidden.
    pub hidden: Vec<&'static str>,
    /// Paths to make read-only.
    pub fixed: Vec<&'static str>,
}

/// Plans the changes to a fresh /proc. `is_root` means that actions are root of the host. All files there belong to
/// root, so those that only root may read need not be hidden from another user.
pub(crate) fn proc_plan(host: &dyn Host, is_root: bool) -> ProcPlan {
    const GROUP_AND_OTHERS: u32 = 0o077;
    let is_reachable = |path: &&&str| {
        host.permissions(Path::new(path))
            .is_some_and(|permissions| is_root || permissions & GROUP_AND_OTHERS != 0)
    };
    let exists = |path: &&&str| host.permissions(Path::new(path)).is_some();
    ProcPlan {
        hidden: HIDDEN_PROC_FILES.iter().filter(is_reachable).copied().collect(),
        fixed: READ_ONLY_PROC_FILES.iter().filter(exists).copied().collect(),
    }
}
