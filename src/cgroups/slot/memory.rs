//! [`MemoryGroup`]: the memory of one slot, and whose memory was too much when the kernel killed a process.

use super::super::{Control, Version, files};
use crate::limits::{Exceeded, LimitedResource, Limits};
use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt as _,
    path::Path,
    thread,
    time::{Duration, Instant},
};

/// How long to wait until the memory of the previous action is free. The kernel takes milliseconds. Memory that is in
/// use after that belongs to something that still runs, and counts.
const SETTLING: Duration = Duration::from_millis(500);
/// Pause between two checks of the memory of a group. The kernel has no event for a decrease.
const SETTLING_ROUND: Duration = Duration::from_millis(2);
/// A peak this close to the limit has reached it, because memory is charged in batches.
const NEAR: u64 = 1 << 20;

/// The memory controller of a slot.
#[derive(Debug)]
pub(super) struct MemoryGroup {
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

/// Why the kernel killed processes of an action for lack of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OutOfMemory {
    /// The action used too much.
    Exceeded(Exceeded),
    /// The running actions together used too much. The action used at most `used` of it.
    Shared { used: u64, total: u64 },
}

impl MemoryGroup {
    pub(super) fn new(control: Control, total: u64) -> io::Result<Self> {
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

    pub(super) fn begin(&mut self, limits: &Limits, is_new: bool) -> io::Result<()> {
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

    pub(super) fn out_of_memory(&self) -> Option<OutOfMemory> {
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
}
