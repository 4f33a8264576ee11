//! What one action may use: memory, CPUs, processes, disk. Pure.
//!
//! A pool has a default for each resource, and a maximum that an action may ask for with a platform property
//! ([`LimitSettings::of`]). If there is such a maximum, the pool offers the property ([`LimitSettings::offers`]). So an
//! action that asks for more is refused like an action that requires any other property which no pool offers. The
//! worker enforces the limits.

use crate::{
    platform::{Offer, Offers, parse_size},
    size::Size,
};
use std::fmt;

/// The platform properties with which an action asks for a resource.
pub(crate) const MEMORY: &str = "memory";
/// The property for the number of CPUs.
pub(crate) const CORES: &str = "cores";
/// The property for the number of processes and threads.
pub(crate) const PIDS: &str = "pids";
/// The property for the bytes on disk.
pub(crate) const DISK: &str = "disk";

/// The default of a limit, and the maximum that an action may ask for. 0 means no limit, or that actions cannot ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LimitRange {
    /// The limit of an action that does not ask for one.
    pub default: u64,
    /// The maximum that an action may ask for.
    pub max: u64,
}

/// The resources that a pool has for all of its running actions, or the part that one action takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Room {
    /// Number of CPU cores.
    pub cores: u64,
    /// The amount of memory in bytes.
    pub memory: u64,
}

impl Room {
    /// Whether there is room for this much.
    pub fn holds(&self, need: &Self) -> bool {
        need.cores <= self.cores && need.memory <= self.memory
    }

    /// Subtracts `need`, saturating at zero.
    pub fn without(&self, need: &Self) -> Self {
        Self { cores: self.cores.saturating_sub(need.cores), memory: self.memory.saturating_sub(need.memory) }
    }

    /// Adds `need`, saturating at the largest number.
    pub fn with(&self, need: &Self) -> Self {
        Self { cores: self.cores.saturating_add(need.cores), memory: self.memory.saturating_add(need.memory) }
    }
}

/// The text for people.
impl fmt::Display for Room {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cores = if self.cores == 1 { "core" } else { "cores" };
        write!(f, "{} {cores} and {} of memory", self.cores, Size::from_bytes(self.memory).rounded())
    }
}

/// The limits of the actions of one pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LimitSettings {
    /// Memory of all processes of an action, in bytes.
    pub memory: LimitRange,
    /// Swap in bytes that an action may use besides its memory.
    pub swap: u64,
    /// CPUs. An action that asks for CPUs gets a proportional share of the machine; the default is an upper bound.
    pub cores: LimitRange,
    /// Processes and threads at a time.
    pub processes: LimitRange,
    /// Bytes that an action may have on disk.
    pub disk: LimitRange,
    /// Files and directories on disk; 0 for no limit.
    pub files: u64,
}

/// The limits of one action. 0 means none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    /// Memory of all processes, in bytes.
    pub memory: u64,
    /// Swap in bytes besides the memory.
    pub swap: u64,
    /// The share of the machine, in CPUs; at least 1.
    pub share: u64,
    /// CPUs that it can keep busy at most.
    pub cores: u64,
    /// Processes and threads at a time.
    pub processes: u64,
    /// Bytes that the action may have on disk.
    pub disk: u64,
    /// Files and directories on disk.
    pub files: u64,
}

/// The smallest memory limit that an action can ask for, in bytes. A smaller one would limit the runner rather than the
/// action.
const LEAST_MEMORY: u64 = 16_000_000;

impl LimitSettings {
    /// The limits of an action with these platform properties. The pool must have accepted them.
    pub fn of(&self, platform: &[(String, String)]) -> Limits {
        let cores = number(platform, CORES).filter(|_| self.cores.max > 0);
        Limits {
            memory: self.memory.of(size(platform, MEMORY).map(|asked| asked.max(LEAST_MEMORY))),
            swap: self.swap,
            share: cores.map_or(1, |cores| cores.clamp(1, self.cores.max)),
            cores: match (self.cores.default, cores) {
                (0, _) => 0,
                (_, Some(cores)) => cores.max(1),
                (default, None) => default,
            },
            processes: self.processes.of(number(platform, PIDS)),
            disk: self.disk.of(size(platform, DISK)),
            files: self.files,
        }
    }

    /// The part of the pool's resources that an action with these platform properties takes.
    pub fn need(&self, platform: &[(String, String)]) -> Room {
        let Limits { share, memory, .. } = self.of(platform);
        Room { cores: share, memory }
    }

    /// These limits in a pool with these resources for all of its actions. No action gets more than that, and an action
    /// that asks for no memory gets the memory that belongs to one core.
    pub fn within(self, room: &Room) -> Self {
        let at_most = |value: u64, most: u64| if value == 0 { most } else { value.min(most) };
        let max = at_most(self.memory.max, room.memory);
        let of_a_core = room.memory / room.cores.max(1);
        let memory = LimitRange { default: at_most(self.memory.default, of_a_core.max(1)).min(max), max };
        let cores = LimitRange { max: at_most(self.cores.max, room.cores), ..self.cores };
        Self { memory, cores, ..self }
    }

    /// The properties that a pool with these limits offers. A value that it already offers under one of these names
    /// stays.
    pub fn offers(&self, mut offers: Offers) -> Offers {
        for (name, max, offer) in [
            (MEMORY, self.memory.max, Offer::Size as fn(u64) -> Offer),
            (CORES, self.cores.max, Offer::Minimum),
            (PIDS, self.processes.max, Offer::Minimum),
            (DISK, self.disk.max, Offer::Size),
        ] {
            if max > 0 {
                offers.entry(name.to_owned()).or_insert_with(|| offer(max));
            }
        }
        offers
    }
}

impl LimitRange {
    /// The limit of an action that asks for this much.
    fn of(self, asked: Option<u64>) -> u64 {
        match asked {
            Some(asked) if self.max > 0 => asked.clamp(1, self.max),
            _ => self.default,
        }
    }
}

/// The largest value of a property that is a number.
fn number(platform: &[(String, String)], name: &str) -> Option<u64> {
    values(platform, name).filter_map(|value| value.parse().ok()).max()
}

/// The largest value of a property that is a size.
fn size(platform: &[(String, String)], name: &str) -> Option<u64> {
    values(platform, name).filter_map(parse_size).max()
}

fn values<'a>(platform: &'a [(String, String)], name: &'a str) -> impl Iterator<Item = &'a str> {
    platform.iter().filter(move |(other, _)| other == name).map(|(_, value)| &**value)
}

/// A resource with a limit. Crossing one of the first four ends a command; the others make its system calls fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LimitedResource {
    /// The memory of one action.
    Memory,
    /// The memory of all actions together.
    AllMemory,
    /// The bytes of one action on disk.
    Disk,
    /// Files and directories on disk.
    Files,
    /// Processes and threads at a time.
    Processes,
    /// The bytes in the private /tmp.
    Tmp,
    /// Files and directories in the private /tmp.
    TmpFiles,
    /// The bytes in the private /dev/shm.
    Shm,
    /// Files and directories in the private /dev/shm.
    ShmFiles,
}

/// A limit that was reached or exceeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exceeded {
    /// The resource that was used up.
    pub resource: LimitedResource,
    /// The highest amount that was used.
    pub used: u64,
    /// The amount that was allowed.
    pub limit: u64,
}

impl fmt::Display for Exceeded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { resource, used, limit } = self;
        let bytes = |bytes: u64| Size::from_bytes(bytes).rounded();
        match resource {
            LimitedResource::Memory => write!(
                f,
                "it ran out of memory: its processes used {} of the {} allowed (execution.limits.memory_gb, or the platform \
                 property \"{MEMORY}\" up to execution.limits.max_memory_gb)",
                bytes(*used),
                bytes(*limit)
            ),
            LimitedResource::AllMemory => write!(
                f,
                "it ran out of memory: its processes used {} of the {} allowed for all actions together \
                 (execution.limits.total_memory_gb)",
                bytes(*used),
                bytes(*limit)
            ),
            LimitedResource::Disk => write!(
                f,
                "it wrote {} to its input root, more than the {} allowed (execution.limits.disk_gb, or the platform property \
                 \"{DISK}\" up to execution.limits.max_disk_gb)",
                bytes(*used),
                bytes(*limit)
            ),
            LimitedResource::Files => write!(
                f,
                "it made {used} files and directories in its input root, more than the {limit} allowed \
                 (execution.limits.files)"
            ),
            LimitedResource::Processes => write!(
                f,
                "it {}reached its limit of processes: it had {used} of the {limit} processes and threads allowed at a time \
                 (execution.sandbox.processes, or the platform property \"{PIDS}\" up to execution.limits.max_processes)",
                if used < limit { "nearly " } else { "" }
            ),
            LimitedResource::Tmp => write!(
                f,
                "its /tmp was full: {} of the {} allowed were in use (execution.sandbox.tmp_size_gb)",
                bytes(*used),
                bytes(*limit)
            ),
            LimitedResource::Shm => write!(
                f,
                "its /dev/shm was full: {} of the {} allowed were in use (execution.sandbox.shm_size_gb)",
                bytes(*used),
                bytes(*limit)
            ),
            LimitedResource::TmpFiles => write!(
                f,
                "its /tmp was full: it had {used} of the {limit} files and directories allowed \
                 (execution.sandbox.tmp_files)"
            ),
            LimitedResource::ShmFiles => write!(
                f,
                "its /dev/shm was full: it had {used} of the {limit} files and directories allowed \
                 (execution.sandbox.tmp_files)"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::{Known, UnknownProperties};

    fn asked(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect()
    }

    fn settings() -> LimitSettings {
        LimitSettings {
            memory: LimitRange { default: 1 << 30, max: 4 << 30 },
            cores: LimitRange { default: 2, max: 8 },
            processes: LimitRange { default: 100, max: 0 },
            ..LimitSettings::default()
        }
    }

    #[test]
    fn an_action_gets_what_it_asks_for_and_else_the_default() {
        let limits = settings().of(&asked(&[]));
        assert_eq!((limits.memory, limits.share, limits.cores, limits.processes), (1 << 30, 1, 2, 100));
        let limits = settings().of(&asked(&[("memory", "2GiB"), ("cores", "4"), ("pids", "5000")]));
        assert_eq!((limits.memory, limits.share, limits.cores), (2 << 30, 4, 4));
        assert_eq!(limits.processes, 100, "it cannot ask for more processes where there is no max_processes");
        assert_eq!(settings().of(&asked(&[("memory", "much")])).memory, 1 << 30);
        let several = asked(&[("memory", "100MiB"), ("memory", "200MiB")]);
        assert_eq!(settings().of(&several).memory, 200 << 20);
        assert_eq!(
            settings().of(&asked(&[("memory", "1")])).memory,
            LEAST_MEMORY,
            "the runner needs some too"
        );
    }

    #[test]
    fn a_pool_with_room_for_all_bounds_what_one_takes() {
        let gb = 1 << 30;
        let room = Room { cores: 4, memory: 16 * gb };
        let limits = LimitSettings::default().within(&room);
        assert_eq!(limits.need(&asked(&[])), Room { cores: 1, memory: 4 * gb });
        assert_eq!(limits.need(&asked(&[("cores", "3"), ("memory", "1Gi")])), Room { cores: 3, memory: gb });
        assert_eq!(
            limits.need(&asked(&[("cores", "99"), ("memory", "99Gi")])),
            room,
            "never more than there is"
        );
        let limits = settings().within(&room);
        assert_eq!(limits.need(&asked(&[])), Room { cores: 1, memory: gb });
        assert_eq!((limits.memory.max, limits.cores.max), (4 * gb, 4));
        assert!(room.holds(&room) && !room.without(&Room { cores: 1, memory: 0 }).holds(&room));
    }

    /// EXE-31.
    #[test]
    fn more_than_the_most_is_a_difference_that_names_the_most() {
        let offers = settings().offers(Offers::new());
        let mut known = Known::new(UnknownProperties::Ignore);
        known.learn(&offers);
        let differences = |list: &[(&str, &str)]| -> Vec<String> {
            let asked = asked(list);
            known.differences(&offers, &asked).map(|difference| difference.to_string()).collect()
        };
        assert!(
            differences(&[("memory", "4Gi"), ("cores", "8"), ("pids", "many"), ("disk", "9 PB")]).is_empty()
        );
        assert_eq!(
            differences(&[("memory", "5Gi"), ("cores", "9")]),
            [
                "memory (asked for \"5Gi\", offered up to 4 GiB)",
                "cores (asked for \"9\", offered up to 8, as a whole number)"
            ]
        );
        assert_eq!(differences(&[("memory", "much")]).len(), 1);
    }

    #[test]
    fn a_limit_of_processes_that_was_not_quite_reached_is_not_called_reached() {
        let had = |used| Exceeded { resource: LimitedResource::Processes, used, limit: 40 }.to_string();
        assert!(had(40).starts_with("it reached its limit of processes: it had 40 of the 40 "));
        assert!(had(38).starts_with("it nearly reached its limit of processes: it had 38 of the 40 "));
    }

    #[test]
    fn a_property_of_the_pool_is_not_replaced() {
        let own = Offers::from([("memory".to_owned(), Offer::Exact("large".into()))]);
        assert_eq!(settings().offers(own.clone()).get("memory"), own.get("memory"));
    }
}
