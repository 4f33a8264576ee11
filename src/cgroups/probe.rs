//! [`Groups`]: tries which controllers work on this machine, and makes the groups that use them.

use super::{
    Control, Controller, Version, files,
    find::{OwnGroups, find},
    slot::{SlotGroup, V1_SHARE},
    tree::{self, GroupTree},
};
use rustix::io::Errno;
use std::{
    collections::BTreeMap,
    fmt, fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

/// How to start a server that may make groups.
const DELEGATE: &str =
    "start the server as a service with Delegate=yes, or with systemd-run --user --scope -p Delegate=yes";
/// The name of a resource in reports.
const PROCESSES: &str = "processes";
/// The memory that is left to the rest of the machine: a tenth, within these bounds.
const RESERVE_PART: u64 = 10;
const MIN_RESERVE: u64 = 256_000_000;
const MAX_RESERVE: u64 = 4_000_000_000;
/// The largest value that `cpu.shares` accepts.
const V1_MOST_SHARES: u64 = 262_144;

/// The groups of this server's actions. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Groups(Arc<GroupsState>);

#[derive(Debug)]
struct GroupsState {
    controls: BTreeMap<Controller, Control>,
    /// Memory of all actions together, in bytes.
    total: u64,
    next: AtomicUsize,
    /// Removed when the server ends.
    made: Mutex<MadeGroups>,
}

/// The groups that were made in the hierarchies.
#[derive(Debug, Default)]
struct MadeGroups {
    /// The group of all actions in each hierarchy.
    trees: Vec<GroupTree>,
    /// The group of this process, if it had to leave its own.
    refuge: Option<Refuge>,
}

/// A group that has only this process, beside the group of its actions.
#[derive(Debug)]
struct Refuge {
    _tree: GroupTree,
    /// The group that the process was in before.
    own: PathBuf,
    /// The controllers that were enabled there.
    controllers: Vec<Controller>,
}

impl Drop for Refuge {
    /// Restores the group that the process was in before, so that it can have processes again.
    fn drop(&mut self) {
        for controller in &self.controllers {
            let _ = files::write(&self.own, "cgroup.subtree_control", format!("-{}", controller.name()));
        }
        let _ = files::write(&self.own, "cgroup.procs", 0);
    }
}

/// The way in which a resource is bounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Means {
    /// By a control group.
    Group(Version),
    /// By this server, which checks the use at intervals.
    Watchdog,
    /// By a limit of each process's user (RLIMIT_NPROC).
    UserLimit,
    /// The resource is not bounded.
    Nothing,
}

/// How one resource is bounded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ResourceReport {
    /// Name of the resource, for messages.
    pub resource: &'static str,
    /// The way in which it is bounded.
    pub means: Means,
    /// Why no control group bounds it, and what helps.
    pub missing: Option<(String, Option<String>)>,
}

/// How the resources of actions are bounded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LimitReport {
    /// Memory, CPU, processes, IO and disk.
    pub resources: Vec<ResourceReport>,
    /// Memory of all actions together, in bytes.
    pub total_memory: u64,
}

/// Resources that no control group bounds, for one reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MissingLimits {
    /// The resources, and how each is bounded instead.
    pub resources: String,
    /// Why no control group bounds them.
    pub reason: String,
    /// What helps, if it is known.
    pub remedy: Option<String>,
}

impl fmt::Display for MissingLimits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.resources, self.reason)?;
        match &self.remedy {
            Some(remedy) => write!(f, "; to enable control groups: {remedy}"),
            None => Ok(()),
        }
    }
}

impl LimitReport {
    /// The resources that no control group bounds, grouped by reason.
    pub(crate) fn missing(&self) -> Vec<MissingLimits> {
        let mut missing: Vec<MissingLimits> = Vec::new();
        for one in &self.resources {
            let Some((reason, remedy)) = &one.missing else { continue };
            let resource = format!("{}: {}", one.resource, one.means.words());
            match missing.iter_mut().find(|other| other.reason == *reason) {
                Some(other) => other.resources = format!("{}, {resource}", other.resources),
                None => missing.push(MissingLimits {
                    resources: resource,
                    reason: reason.clone(),
                    remedy: remedy.clone(),
                }),
            }
        }
        missing
    }

    /// Whether a control group bounds the number of processes.
    pub(crate) fn counts_processes(&self) -> bool {
        let mut groups = self.resources.iter().filter(|one| matches!(one.means, Means::Group(_)));
        groups.any(|one| one.resource == PROCESSES)
    }

    /// Sets how the number of processes is bounded, unless a control group does it.
    pub(crate) fn bound_processes(&mut self, means: Means) {
        let others = self.resources.iter_mut().filter(|one| !matches!(one.means, Means::Group(_)));
        others.filter(|one| one.resource == PROCESSES).for_each(|one| one.means = means);
    }

    /// A summary in one line, for people and logs.
    pub(crate) fn summary(&self) -> String {
        let words = self.resources.iter().map(|one| format!("{}: {}", one.resource, one.means.words()));
        words.collect::<Vec<_>>().join(", ")
    }
}

impl Means {
    /// The text for people and logs.
    pub(crate) fn words(self) -> String {
        match self {
            Self::Group(version) => version.to_string(),
            Self::Watchdog => "best effort".into(),
            Self::UserLimit => "rlimit".into(),
            Self::Nothing => "none".into(),
        }
    }
}

/// Why a controller cannot be used.
type Missing = (String, Option<String>);

impl Groups {
    /// Makes the groups that this process may make, and returns how each resource is bounded. `total_memory` is the
    /// memory of all actions together in bytes; 0 means most of the memory of the machine. `slots` is the maximum
    /// number of actions that run at the same time.
    pub(crate) fn open(total_memory: u64, slots: usize) -> (Self, LimitReport) {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let own = find(&read("/proc/self/cgroup"), &read("/proc/self/mountinfo"));
        let total = if total_memory > 0 { total_memory } else { without_reserve(available(&own)) };
        let mut opening = Opening::default();
        opening.unified(&own);
        opening.old(&own);
        opening.bound_all(total, slots);
        let report = opening.report(total);
        let Opening { controls, made, .. } = opening;
        let state = GroupsState { controls, total, next: AtomicUsize::new(0), made: Mutex::new(made) };
        (Self(Arc::new(state)), report)
    }

    /// Makes the group of a slot, whose cells may have gateways.
    ///
    /// # Errors
    /// The errors of the file system.
    pub(crate) fn slot(&self, has_gateways: bool) -> io::Result<SlotGroup> {
        let number = self.0.next.fetch_add(1, Ordering::Relaxed);
        SlotGroup::new(&self.0.controls, &format!("slot-{number}"), self.0.total, has_gateways)
    }

    /// Memory of all actions together, in bytes.
    pub(crate) fn total_memory(&self) -> u64 {
        self.0.total
    }

    /// Kills the processes that are left in the groups and removes the groups. Called when the server ends.
    pub(crate) fn remove(&self) {
        let MadeGroups { trees, refuge } =
            std::mem::take(&mut *self.0.made.lock().unwrap_or_else(PoisonError::into_inner));
        drop(trees);
        // The group that this process was in can have processes only if no groups with controllers are below it.
        drop(refuge);
    }
}

#[derive(Default)]
struct Opening {
    controls: BTreeMap<Controller, Control>,
    missing: BTreeMap<Controller, Missing>,
    made: MadeGroups,
}

impl Opening {
    /// Uses the controllers that the unified hierarchy has for this process.
    fn unified(&mut self, own: &OwnGroups) {
        let Some(own) = &own.v2 else { return };
        tree::sweep(own);
        let listed = fs::read_to_string(own.join("cgroup.controllers")).unwrap_or_default();
        let offered: Vec<_> = Controller::ALL
            .into_iter()
            .filter(|controller| listed.split_whitespace().any(|name| name == controller.name()))
            .collect();
        if offered.is_empty() {
            return;
        }
        match open_unified(own, &offered) {
            Ok((tree, refuge, enabled)) => {
                for controller in enabled {
                    let directory = tree.directory().to_owned();
                    self.controls.insert(controller, Control { version: Version::V2, directory });
                }
                self.made.trees.push(tree);
                self.made.refuge = refuge;
            }
            Err(error) => {
                let reason = explain(own, &error);
                self.missing.extend(offered.into_iter().map(|controller| (controller, reason.clone())));
            }
        }
    }

    /// Uses the controllers of the old hierarchies that the unified one does not have.
    fn old(&mut self, own: &OwnGroups) {
        let mut made: BTreeMap<&Path, io::Result<PathBuf>> = BTreeMap::new();
        for controller in Controller::ALL {
            let Some(own) = own.v1.get(&controller) else { continue };
            if self.controls.contains_key(&controller) {
                continue;
            }
            let made = made.entry(own).or_insert_with(|| {
                tree::sweep(own);
                let tree = GroupTree::new(own)?;
                let directory = tree.directory().to_owned();
                self.made.trees.push(tree);
                Ok(directory)
            });
            match made {
                Ok(directory) => {
                    let control = Control { version: Version::V1, directory: directory.clone() };
                    self.controls.insert(controller, control);
                }
                Err(error) => {
                    self.missing.insert(controller, explain(own, error));
                }
            }
        }
    }

    /// Bounds all actions together. A controller that cannot be set is not used.
    fn bound_all(&mut self, total: u64, slots: usize) {
        let slots = slots as u64;
        self.controls.retain(|controller, control| {
            let at = &control.directory;
            let bounded = match (controller, control.version) {
                (Controller::Memory, Version::V1) => {
                    // This is off only in old kernels.
                    let _ = files::write(at, "memory.use_hierarchy", 1);
                    files::write(at, "memory.limit_in_bytes", total)
                }
                (Controller::Memory, Version::V2) => files::write(at, "memory.max", total),
                // The group competes with each process beside it, including the server.
                (Controller::Cpu, Version::V1) => {
                    files::write(at, "cpu.shares", (V1_SHARE * slots).clamp(V1_SHARE, V1_MOST_SHARES))
                }
                // The group competes only with the server, which gets half if it needs that much.
                (Controller::Cpu, Version::V2) | (Controller::Pids | Controller::Io, _) => Ok(()),
            };
            match bounded {
                Ok(()) => true,
                Err(error) => {
                    self.missing.insert(*controller, explain(at, &error));
                    false
                }
            }
        });
    }

    fn report(&mut self, total_memory: u64) -> LimitReport {
        let without = |controller| match controller {
            Controller::Memory => Means::Watchdog,
            Controller::Cpu | Controller::Pids | Controller::Io => Means::Nothing,
        };
        let mut resources: Vec<_> =
            [("memory", Controller::Memory), ("cpu", Controller::Cpu), (PROCESSES, Controller::Pids)]
                .into_iter()
                .map(|(resource, controller)| match self.controls.get(&controller) {
                    Some(control) => {
                        ResourceReport { resource, means: Means::Group(control.version), missing: None }
                    }
                    None => ResourceReport {
                        resource,
                        means: without(controller),
                        missing: Some(self.missing.remove(&controller).unwrap_or_else(|| {
                            (
                                "no control group controllers are available to this process".into(),
                                Some(DELEGATE.into()),
                            )
                        })),
                    },
                })
                .collect();
        // No protection depends on the controller for IO, so its absence is not reported as missing.
        let io = self.controls.get(&Controller::Io).map_or(Means::Nothing, |io| Means::Group(io.version));
        resources.push(ResourceReport { resource: "io", means: io, missing: None });
        resources.push(ResourceReport { resource: "disk", means: Means::Watchdog, missing: None });
        LimitReport { resources, total_memory }
    }
}

/// Makes the group of all actions below `own`, and enables these controllers for it and for the groups of the slots.
/// Moves this process out of `own` if it has to.
fn open_unified(
    own: &Path,
    offered: &[Controller],
) -> io::Result<(GroupTree, Option<Refuge>, Vec<Controller>)> {
    let tree = GroupTree::new(own)?;
    let (refuge, enabled) = match enable(own, offered) {
        // A group with processes of its own cannot have groups with controllers below it.
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            let beside = GroupTree::new(own)?;
            files::write(beside.directory(), "cgroup.procs", 0)?;
            let controllers = offered.to_vec();
            let refuge = Refuge { _tree: beside, own: own.to_owned(), controllers };
            // If there are other processes, this one goes back.
            let enabled = enable(own, offered)?;
            (Some(refuge), enabled)
        }
        enabled => (None, enabled?),
    };
    let enabled = enable(tree.directory(), &enabled)?;
    Ok((tree, refuge, enabled))
}

/// Enables controllers for the groups below a group, and says which. An error if there are none.
fn enable(group: &Path, controllers: &[Controller]) -> io::Result<Vec<Controller>> {
    let mut failed = None;
    let mut enabled = Vec::new();
    for controller in controllers {
        match files::write(group, "cgroup.subtree_control", format!("+{}", controller.name())) {
            Ok(()) => enabled.push(*controller),
            // Memory is tried first. If another controller is busy, memory is busy too.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => return Err(error),
            Err(error) => failed = Some(error),
        }
    }
    match failed {
        Some(error) if enabled.is_empty() => Err(error),
        _ => Ok(enabled),
    }
}

/// Why groups cannot be made below this one, and what helps.
fn explain(own: &Path, error: &io::Error) -> Missing {
    let reason = format!("cannot make groups below {}: {error}", own.display());
    let remedy = match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::BUSY) => format!("{DELEGATE}; other processes are in its group"),
        Some(Errno::ROFS) => "mount /sys/fs/cgroup writable into the container".to_owned(),
        _ => DELEGATE.to_owned(),
    };
    (reason, Some(remedy))
}

/// The memory that this process can use: the memory of the machine, or the limit of a group that the process is in.
fn available(own: &OwnGroups) -> u64 {
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    });
    let machine = machine.map_or(u64::MAX, |kib| kib.saturating_mul(1024));
    let of_v1 = own.v1.get(&Controller::Memory).and_then(|own| {
        let text = fs::read_to_string(own.join("memory.stat")).ok()?;
        files::field(&text, "hierarchical_memory_limit")
    });
    let of_v2 = own.v2.iter().flat_map(|own| own.ancestors());
    let of_v2 = of_v2.filter_map(|group| files::number(group, "memory.max")).min();
    [of_v1, of_v2].into_iter().flatten().fold(machine, u64::min)
}

fn without_reserve(memory: u64) -> u64 {
    let reserve = (memory / RESERVE_PART).clamp(MIN_RESERVE, MAX_RESERVE);
    memory.saturating_sub(reserve).max(memory / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenth_of_the_memory_is_left_within_bounds() {
        assert_eq!(without_reserve(10_000_000_000), 9_000_000_000);
        assert_eq!(without_reserve(1_000_000_000), 744_000_000);
        assert_eq!(without_reserve(100_000_000_000), 96_000_000_000);
        assert_eq!(without_reserve(100_000_000), 50_000_000);
    }
}
