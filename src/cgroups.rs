//! Control groups (cgroups): enforces the resource limits of actions.
//!
//! [`Groups`] finds out at the start which controllers this process may use below its own group: the controllers of the
//! unified hierarchy (v2) that are delegated to it, and otherwise the controllers of the old hierarchies (v1). It makes
//! one group for all actions, and one below it for each slot. A [`SlotGroup`] holds the runner of its slot, so
//! everything that the runner starts is in it from its first instruction on, without a move on the hot path.
//!
//! The actions of a slot use the same group one after the other. A group for each action would persist in the kernel as
//! long as the page cache has a page that the action read or wrote, and thousands of such groups slow the kernel down.
//!
//! The group of all actions is locked (flock) by its server. The lock ends with the process in every case. So a group
//! that is not locked is left over, and the next server that starts beside it kills the processes in it and removes it.
//!
//! This module does not know actions, commands or workers.

mod files;
mod find;
mod probe;
mod slot;
mod tree;

pub(crate) use probe::{Groups, LimitReport, Means};
pub(crate) use slot::{OutOfMemory, SlotGroup};

use std::{fmt, path::PathBuf};

/// A resource that a group can bound. The kernel has one controller for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Controller {
    Memory,
    Cpu,
    /// Number of processes and threads.
    Pids,
    /// Disk time. Only the unified hierarchy is used for it, because the old one does not know which group wrote to a
    /// file.
    Io,
}

impl Controller {
    const ALL: [Self; 4] = [Self::Memory, Self::Cpu, Self::Pids, Self::Io];

    /// The name that the kernel has for the controller.
    fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Cpu => "cpu",
            Self::Pids => "pids",
            Self::Io => "io",
        }
    }
}

/// The kernel interface of a controller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Version {
    /// A separate hierarchy (v1).
    V1,
    /// The unified hierarchy (v2).
    V2,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V1 => "cgroup v1",
            Self::V2 => "cgroup v2",
        })
    }
}

/// A controller that works, in the group of all actions.
#[derive(Debug, Clone)]
struct Control {
    version: Version,
    /// The directory of the group.
    directory: PathBuf,
}
