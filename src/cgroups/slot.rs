//! [`SlotGroup`]: the group of one slot. Its actions run one after the other.

use super::{Control, Controller, Version, files, tree};
use crate::limits::{Exceeded, LimitedResource, Limits};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

/// The weight of one CPU in the old hierarchy.
pub(super) const V1_SHARE: u64 = 1024;

/// The number of processes in the group that do not belong to the action: the runner, the first processes of cells, and
/// processes of ended cells that are not reaped yet.
const OWN_PROCESSES: u64 = 8;
/// The weight of one CPU in the unified hierarchy, and the largest weight.
const V2_SHARE: u64 = 100;
const V2_MOST_SHARES: u64 = 10_000;
/// The period for which CPU time is limited, in microseconds; the kernel's default.
const PERIOD_US: u64 = 100_000;
/// How long to wait until the memory of the previous action is free. The kernel takes milliseconds. Memory that is in
/// use after that belongs to something that still runs, and counts.
const SETTLING: Duration = Duration::from_millis(500);
/// Pause between two checks of the memory of a group. The kernel has no event for a decrease.
const SETTLING_ROUND: Duration = Duration::from_millis(2);
/// A peak this close to the limit has reached it, because memory is charged in batches.
const NEAR: u64 = 1 << 20;

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
struct MemoryGroup {
    control: Control,
    /// Counts the kills of the OOM killer in this group. Files that are read for each action stay open, so that a read
    /// takes 1 us.
    events: File,
    /// The memory in use, including the page cache.
    usage: File,
    peak: Option<Peak>,
    /// Memory of all actions together, in bytes.
    total: u64,
    /// The memory limit in bytes; 0 for no limit.
    limit: u64,
    before: MemoryEvents,
}

/// The peak of the memory use.
#[derive(Debug)]
struct Peak {
    file: File,
    /// The peak when the action began, if the kernel cannot reset it. In the unified hierarchy, it can since Linux
    /// 6.12.
    before: Option<u64>,
}

/// Counts since the group was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct MemoryEvents {
    /// The limit of this group was met and nothing could be reclaimed; only the unified hierarchy counts it.
    own: Option<u64>,
    /// Processes of this group that were killed for lack of memory.
    killed: u64,
}

#[derive(Debug)]
struct PidsGroup {
    control: Control,
    events: Option<File>,
    before: u64,
}

/// Why the kernel killed processes of an action for lack of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OutOfMemory {
    /// The action used too much.
    Exceeded(Exceeded),
    /// The running actions together used too much. The action used at most `used` of it.
    Shared { used: u64, total: u64 },
}

impl SlotGroup {
    pub(super) fn new(controls: &BTreeMap<Controller, Control>, name: &str, total: u64) -> io::Result<Self> {
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
                Controller::Pids => group.pids = Some(PidsGroup::new(control)),
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

impl MemoryGroup {
    fn new(control: Control, total: u64) -> io::Result<Self> {
        let at = &control.directory;
        let (events, usage, peak) = match control.version {
            Version::V1 => ("memory.oom_control", "memory.usage_in_bytes", "memory.max_usage_in_bytes"),
            Version::V2 => ("memory.events", "memory.current", "memory.peak"),
        };
        let (events, usage) = (File::open(at.join(events))?, File::open(at.join(usage))?);
        Ok(Self {
            events,
            usage,
            peak: Peak::open(&at.join(peak)),
            control,
            total,
            limit: 0,
            before: MemoryEvents::default(),
        })
    }

    fn begin(&mut self, limits: &Limits, is_new: bool) -> io::Result<()> {
        let least = if limits.memory == 0 { self.total } else { limits.memory.min(self.total) };
        self.settle(least);
        if is_new {
            self.bound(limits)?;
            self.limit = limits.memory;
        }
        if let Some(peak) = &mut self.peak {
            peak.begin()?;
        }
        self.before = self.count()?;
        Ok(())
    }

    /// Waits until the memory of the previous action, such as its /tmp, is free, if it could affect this action.
    fn settle(&self, limit: u64) {
        let end = Instant::now() + SETTLING;
        while self.current() > limit / 2 && self.held() > limit / 2 && Instant::now() < end {
            thread::sleep(SETTLING_ROUND);
        }
    }

    fn bound(&self, limits: &Limits) -> io::Result<()> {
        let at = &self.control.directory;
        let memory = limits.memory;
        let both = memory.saturating_add(limits.swap);
        match (self.control.version, memory) {
            (Version::V1, 0) => {
                // The sum with the swap can never be below the memory. Without accounting of swap, there is no such
                // file.
                let _ = files::write(at, "memory.memsw.limit_in_bytes", -1);
                files::write(at, "memory.limit_in_bytes", -1)
            }
            (Version::V1, _) => {
                let _ = files::write(at, "memory.memsw.limit_in_bytes", -1);
                files::write(at, "memory.limit_in_bytes", memory)?;
                let _ = files::write(at, "memory.memsw.limit_in_bytes", both);
                Ok(())
            }
            (Version::V2, 0) => {
                let _ = files::write(at, "memory.swap.max", "max");
                files::write(at, "memory.max", "max")
            }
            (Version::V2, _) => {
                let _ = files::write(at, "memory.swap.max", limits.swap);
                files::write(at, "memory.max", memory)
            }
        }
    }

    fn count(&self) -> io::Result<MemoryEvents> {
        let text = files::text(&self.events)?;
        let own = match self.control.version {
            Version::V1 => None,
            Version::V2 => Some(files::field(&text, "oom").unwrap_or(0)),
        };
        Ok(MemoryEvents { own, killed: files::field(&text, "oom_kill").unwrap_or(0) })
    }

    fn current(&self) -> u64 {
        files::text(&self.usage).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    }

    /// The memory in use that cannot be reclaimed: the memory of processes, and files in memory.
    fn held(&self) -> u64 {
        let text = fs::read_to_string(self.control.directory.join("memory.stat")).unwrap_or_default();
        let anonymous = match self.control.version {
            Version::V1 => "rss",
            Version::V2 => "anon",
        };
        let field = |name| files::field(&text, name).unwrap_or(0);
        field(anonymous).saturating_add(field("shmem"))
    }

    fn out_of_memory(&self) -> Option<OutOfMemory> {
        let now = self.count().ok()?;
        if now.killed <= self.before.killed {
            return None;
        }
        let peak = self.peak.as_ref().and_then(Peak::reached);
        let has_met = |limit: u64| peak.is_some_and(|peak: u64| peak.saturating_add(NEAR) >= limit);
        let is_own = match (now.own, self.before.own) {
            (Some(now), Some(before)) => now > before,
            _ => has_met(self.limit),
        };
        Some(verdict(self.limit > 0 && is_own, peak, self.limit, self.total))
    }
}

impl Peak {
    fn open(path: &Path) -> Option<Self> {
        let writable = File::options().read(true).write(true).open(path).ok();
        match writable.filter(|file| file.write_all_at(b"0", 0).is_ok()) {
            Some(file) => Some(Self { file, before: None }),
            None => Some(Self { file: File::open(path).ok()?, before: Some(0) }),
        }
    }

    fn begin(&mut self) -> io::Result<()> {
        match self.before {
            None => self.file.write_all_at(b"0", 0),
            Some(_) => {
                self.before = Some(self.read().unwrap_or(u64::MAX));
                Ok(())
            }
        }
    }

    /// The peak memory of this action, if it is known.
    fn reached(&self) -> Option<u64> {
        let peak = self.read()?;
        self.before.is_none_or(|before| peak > before).then_some(peak)
    }

    fn read(&self) -> Option<u64> {
        files::text(&self.file).ok()?.trim().parse().ok()
    }
}

/// Decides why the kernel killed a process of this action. An action has used too much if its own limit was reached, or
/// if it used more than half of the memory of all actions. Otherwise all actions together used too much.
fn verdict(is_own: bool, peak: Option<u64>, limit: u64, total: u64) -> OutOfMemory {
    if is_own {
        let used = peak.unwrap_or(limit);
        return OutOfMemory::Exceeded(Exceeded { resource: LimitedResource::Memory, used, limit });
    }
    let used = peak.unwrap_or(0);
    if used > total / 2 {
        return OutOfMemory::Exceeded(Exceeded { resource: LimitedResource::AllMemory, used, limit: total });
    }
    OutOfMemory::Shared { used, total }
}

impl PidsGroup {
    fn new(control: Control) -> Self {
        let events = File::open(control.directory.join("pids.events")).ok();
        Self { control, events, before: 0 }
    }

    fn begin(&mut self, limits: &Limits, is_new: bool) -> io::Result<()> {
        if is_new {
            let most = match limits.processes {
                0 => "max".to_owned(),
                processes => processes.saturating_add(OWN_PROCESSES).to_string(),
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

    const GB: u64 = 1 << 30;

    #[test]
    fn an_action_is_to_blame_for_its_own_limit_and_for_most_of_what_all_have() {
        let exceeded = |resource, used, limit| OutOfMemory::Exceeded(Exceeded { resource, used, limit });
        assert_eq!(verdict(true, Some(GB - 5), GB, 8 * GB), exceeded(LimitedResource::Memory, GB - 5, GB));
        assert_eq!(verdict(true, None, GB, 8 * GB), exceeded(LimitedResource::Memory, GB, GB));
        assert_eq!(
            verdict(false, Some(7 * GB), 0, 8 * GB),
            exceeded(LimitedResource::AllMemory, 7 * GB, 8 * GB)
        );
        assert_eq!(verdict(false, Some(GB), 0, 8 * GB), OutOfMemory::Shared { used: GB, total: 8 * GB });
    }

    #[test]
    fn a_peak_that_cannot_be_reset_is_known_once_it_has_risen() {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path().join("memory.peak");
        fs::write(&at, "100").unwrap();
        let mut peak = Peak { file: File::open(&at).unwrap(), before: Some(0) };
        peak.begin().unwrap();
        assert_eq!(peak.reached(), None);
        fs::write(&at, "200").unwrap();
        assert_eq!(peak.reached(), Some(200));
        peak.begin().unwrap();
        assert_eq!(peak.reached(), None);
    }

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
                pids: Some(PidsGroup::new(control)),
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
