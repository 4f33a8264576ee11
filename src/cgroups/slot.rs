//! [`SlotGroup`]: the group of one slot. Its actions run one after the other.

mod memory;

use super::{Control, Controller, Version, files, tree};
use crate::limits::Limits;
use memory::MemoryGroup;
pub(crate) use memory::OutOfMemory;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

/// The weight of one CPU in the old hierarchy.
pub(super) const V1_SHARE: u64 = 1024;

/// The most cells of a slot: one at work, two that are ready, and four that have ended and are not reaped yet.
const CELLS: u64 = 1 + 2 + 4;
/// The number of processes of a cell that do not belong to the action: its first process.
const OF_CELL: u64 = 1;
/// The number of processes of a cell's gateway.
const OF_GATEWAY: u64 = 2;
/// The weight of one CPU in the unified hierarchy, and the largest weight.
const V2_SHARE: u64 = 100;
const V2_MOST_SHARES: u64 = 10_000;
/// The period for which CPU time is limited, in microseconds; the kernel's default.
const PERIOD_US: u64 = 100_000;

/// The group of one slot; removed when dropped.
#[derive(Debug)]
pub(crate) struct SlotGroup {
    directories: BTreeSet<PathBuf>,
    memory: Option<MemoryGroup>,
    cpu: Option<Control>,
    pids: Option<PidsGroup>,
    io: Option<Control>,
    /// The limits that are in force.
    applied: Option<Limits>,
}

#[derive(Debug)]
struct PidsGroup {
    control: Control,
    events: Option<File>,
    /// The most processes in the group that do not belong to the action.
    own: u64,
    before: u64,
}

impl SlotGroup {
    pub(super) fn new(
        controls: &BTreeMap<Controller, Control>,
        name: &str,
        total: u64,
        has_gateways: bool,
    ) -> io::Result<Self> {
        let mut group = Self {
            directories: BTreeSet::new(),
            memory: None,
            cpu: None,
            pids: None,
            io: None,
            applied: None,
        };
        for (controller, control) in controls {
            let directory = control.directory.join(name);
            if group.directories.insert(directory.clone()) {
                fs::create_dir(&directory)?;
            }
            let control = Control { version: control.version, directory };
            match controller {
                Controller::Memory => group.memory = Some(MemoryGroup::new(control, total)?),
                Controller::Cpu => group.cpu = Some(control),
                Controller::Pids => group.pids = Some(PidsGroup::new(control, has_gateways)),
                Controller::Io => group.io = Some(control),
            }
        }
        Ok(group)
    }

    /// Moves a process, which starts all others, into the group.
    ///
    /// # Errors
    /// The errors of the kernel.
    pub(crate) fn admit(&self, process: u32) -> io::Result<()> {
        self.directories.iter().try_for_each(|group| files::write(group, "cgroup.procs", process))
    }

    /// Whether the kernel bounds the memory.
    pub(crate) fn bounds_memory(&self) -> bool {
        self.memory.is_some()
    }

    /// Prepares the group for an action with these limits.
    ///
    /// # Errors
    /// The errors of the kernel.
    pub(crate) fn begin(&mut self, limits: &Limits) -> io::Result<()> {
        let is_new = self.applied.as_ref() != Some(limits);
        if is_new {
            self.applied = None;
            if let Some(cpu) = &self.cpu {
                bound_cpu(cpu, limits)?;
            }
            if let Some(io) = &self.io {
                weigh_io(io, limits)?;
            }
        }
        if let Some(memory) = &mut self.memory {
            memory.begin(limits, is_new)?;
        }
        if let Some(pids) = &mut self.pids {
            pids.begin(limits, is_new)?;
        }
        self.applied = Some(*limits);
        Ok(())
    }

    /// Whether the kernel killed something for lack of memory since [`SlotGroup::begin`].
    pub(crate) fn out_of_memory(&self) -> Option<OutOfMemory> {
        self.memory.as_ref()?.out_of_memory()
    }

    /// Whether the group limits the number of processes.
    pub(crate) fn counts_processes(&self) -> bool {
        self.pids.is_some()
    }

    /// Whether the kernel refused to start a process since [`SlotGroup::begin`], because there were too many.
    pub(crate) fn refused_processes(&self) -> bool {
        self.pids.as_ref().is_some_and(|pids| pids.refusals() > pids.before)
    }
}

impl Drop for SlotGroup {
    fn drop(&mut self) {
        self.directories.iter().for_each(|group| tree::remove(group));
    }
}

fn bound_cpu(cpu: &Control, limits: &Limits) -> io::Result<()> {
    let quota = limits.cores.saturating_mul(PERIOD_US);
    let at = &cpu.directory;
    match cpu.version {
        Version::V1 => {
            files::write(at, "cpu.shares", limits.share.max(1).saturating_mul(V1_SHARE))?;
            // Kernels without this file support only shares.
            let quota = if quota == 0 { "-1".into() } else { quota.to_string() };
            match files::write(at, "cpu.cfs_quota_us", quota) {
                Err(error) if error.kind() == io::ErrorKind::NotFound && limits.cores == 0 => Ok(()),
                written => written,
            }
        }
        Version::V2 => {
            files::write(at, "cpu.weight", weight(limits))?;
            let quota = if quota == 0 { "max".into() } else { quota.to_string() };
            files::write(at, "cpu.max", format!("{quota} {PERIOD_US}"))
        }
    }
}

/// The weight of an action in the unified hierarchy, for CPU time and disk time.
fn weight(limits: &Limits) -> u64 {
    limits.share.max(1).saturating_mul(V2_SHARE).min(V2_MOST_SHARES)
}

/// Lets actions share the disks in proportion to their weights, where the kernel has a scheduler or cost model for
/// that.
fn weigh_io(io: &Control, limits: &Limits) -> io::Result<()> {
    match files::write(&io.directory, "io.weight", weight(limits)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        written => written,
    }
}

impl PidsGroup {
    fn new(control: Control, has_gateways: bool) -> Self {
        let events = File::open(control.directory.join("pids.events")).ok();
        let of_cell = if has_gateways { OF_CELL + OF_GATEWAY } else { OF_CELL };
        // The runner is one more process.
        Self { control, events, own: 1 + CELLS * of_cell, before: 0 }
    }

    fn begin(&mut self, limits: &Limits, is_new: bool) -> io::Result<()> {
        if is_new {
            let most = match limits.processes {
                0 => "max".to_owned(),
                processes => processes.saturating_add(self.own).to_string(),
            };
            files::write(Path::new(&self.control.directory), "pids.max", most)?;
        }
        self.before = self.refusals();
        Ok(())
    }

    fn refusals(&self) -> u64 {
        let text = self.events.as_ref().and_then(|events| files::text(events).ok());
        text.and_then(|text| files::field(&text, "max")).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::LimitedResource;

    const GB: u64 = 1 << 30;

    /// Uses plain files to test what is written to which file, for each interface of the kernel.
    #[test]
    fn limits_are_written_as_each_interface_wants_them() {
        for version in [Version::V1, Version::V2] {
            let directory = tempfile::tempdir().unwrap();
            let at = directory.path().to_owned();
            let files: &[&str] = match version {
                Version::V1 => &[
                    "memory.oom_control",
                    "memory.usage_in_bytes",
                    "memory.max_usage_in_bytes",
                    "memory.limit_in_bytes",
                    "memory.memsw.limit_in_bytes",
                    "cpu.shares",
                    "cpu.cfs_quota_us",
                    "pids.max",
                    "pids.events",
                ],
                Version::V2 => &[
                    "memory.events",
                    "memory.current",
                    "memory.peak",
                    "memory.max",
                    "memory.swap.max",
                    "cpu.weight",
                    "cpu.max",
                    "pids.max",
                    "pids.events",
                ],
            };
            files.iter().for_each(|name| fs::write(at.join(name), "").unwrap());
            let control = Control { version, directory: at.clone() };
            let mut group = SlotGroup {
                directories: BTreeSet::new(),
                memory: Some(MemoryGroup::new(control.clone(), 8 * GB).unwrap()),
                cpu: Some(control.clone()),
                pids: Some(PidsGroup::new(control, false)),
                io: None,
                applied: None,
            };
            let limits =
                Limits { memory: GB, swap: 5, share: 2, cores: 3, processes: 100, ..Limits::default() };
            group.begin(&limits).unwrap();
            let text = |name: &str| fs::read_to_string(at.join(name)).unwrap();
            let expected: &[(&str, &str)] = match version {
                Version::V1 => &[
                    ("memory.limit_in_bytes", "1073741824"),
                    ("memory.memsw.limit_in_bytes", "1073741829"),
                    ("cpu.shares", "2048"),
                    ("cpu.cfs_quota_us", "300000"),
                    ("pids.max", "108"),
                ],
                Version::V2 => &[
                    ("memory.max", "1073741824"),
                    ("memory.swap.max", "5"),
                    ("cpu.weight", "200"),
                    ("cpu.max", "300000 100000"),
                    ("pids.max", "108"),
                ],
            };
            for (name, value) in expected {
                assert_eq!(text(name), *value, "{name}");
            }
            assert_eq!((group.out_of_memory(), group.refused_processes()), (None, false));
            // The kernel counts.
            let (events, own) = match version {
                Version::V1 => ("memory.oom_control", LimitedResource::AllMemory),
                Version::V2 => ("memory.events", LimitedResource::Memory),
            };
            fs::write(at.join(events), "oom 1\noom_kill 1\n").unwrap();
            fs::write(at.join("pids.events"), "max 4\n").unwrap();
            assert!(group.refused_processes());
            if own == LimitedResource::Memory {
                assert!(
                    matches!(group.out_of_memory(), Some(OutOfMemory::Exceeded(of)) if of.resource == own)
                );
            }
            // The kill does not count for the next action.
            group.begin(&limits).unwrap();
            assert_eq!((group.out_of_memory(), group.refused_processes()), (None, false));
        }
    }
}
