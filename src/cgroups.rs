//! Control groups (cgroups): how the kernel is told what one action may use.
//!
//! [`Groups`] finds out at the start which controllers this process may use below its own group: those of the unified
//! hierarchy (v2) where they are delegated to it, else those of the old hierarchies (v1). It makes one group for all
//! actions, and one below it for each slot. A [`SlotGroup`] holds the runner of its slot, so everything that the runner
//! starts is in it from its first instruction on, without a move on the hot path.
//!
//! A group is used for one action after the other, because a group for each action would not go away as long as the
//! page cache has a page that the action read or wrote; thousands of such groups slow the kernel down.
//!
//! The group of all actions is locked (flock) by its server. The lock ends with the process, whatever ends it, so a
//! group that is not locked is left over, and the next server that starts beside it kills what is in it and removes it.
//!
//! This room knows nothing of actions, commands and workers.

mod files;
mod find;
mod probe;
mod slot;
mod tree;

pub(crate) use probe::{Groups, LimitReport};
pub(crate) use slot::{OutOfMemory, SlotGroup};

use std::{fmt, path::PathBuf};

/// What a group can bound, one controller of the kernel each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Controller {
    /// Bytes of memory.
    Memory,
    /// Time of the CPUs.
    Cpu,
    /// Processes and threads.
    Pids,
    /// Time of the disks. Only the unified hierarchy is used for it: the old one cannot tell who wrote to a file.
    Io,
}

impl Controller {
    const ALL: [Self; 4] = [Self::Memory, Self::Cpu, Self::Pids, Self::Io];

    /// The kernel's name of it.
    fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Cpu => "cpu",
            Self::Pids => "pids",
            Self::Io => "io",
        }
    }
}

/// Which of the kernel's interfaces a controller has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Version {
    /// A hierarchy of its own.
    V1,
    /// The unified hierarchy.
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
