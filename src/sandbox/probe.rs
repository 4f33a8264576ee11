//! Finds out which protections work on this machine, and what would enable the others. Pure. The caller makes the
//! attempts.

use super::settings::Protections;
use std::fmt;

/// Prefix of the error of every failed attempt.
const NOT_SET_UP: &str = "could not set up the sandbox: ";
/// The reason for a protection that was not tried because it needs the namespaces.
const NEEDS_NAMESPACES: &str = "it needs the namespaces";

/// The error if pasta is not installed.
pub(crate) const NO_PASTA: &str = "pasta is not installed";
/// The error of an attempt with the gateway when there is no network namespace.
pub(crate) const NEEDS_NETWORK: &str = "it needs the network namespaces";

/// A protection, with the name that users know it by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protection {
    /// Separate mount, pid, IPC and UTS namespaces.
    Namespaces,
    /// A separate network namespace.
    Network,
    /// A host user for each slot.
    Identity,
    /// The filter of system calls.
    Filter,
    /// Landlock rules, which protect files in addition to the mounts.
    Landlock,
    /// Networks of their own for actions that may use one. Tried only if a pool wants it.
    Gateway,
}

impl Protection {
    /// The protections that are tried out in any case.
    const ALL: [Self; 5] = [Self::Namespaces, Self::Network, Self::Identity, Self::Filter, Self::Landlock];

    /// The name in messages.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Namespaces => "namespaces",
            Self::Network => "network",
            Self::Identity => "identity",
            Self::Filter => "filter",
            Self::Landlock => "landlock",
            Self::Gateway => "gateway",
        }
    }

    /// The effect on actions if this protection is missing.
    pub(crate) fn consequence(self) -> &'static str {
        match self {
            Self::Namespaces => "actions see this machine and run as the user of the server",
            Self::Network => "actions use the network of this machine",
            Self::Identity => "actions are root of this machine, without capabilities",
            Self::Filter => "actions may use every system call",
            Self::Landlock => "there is no second layer behind the mounts and permissions",
            Self::Gateway => "actions that ask for a network (network=on) are refused",
        }
    }

    fn set(self, on: &mut Protections) {
        match self {
            Self::Namespaces => on.namespaces = true,
            Self::Network => on.network = true,
            Self::Identity => on.identity = true,
            Self::Filter => on.filter = true,
            Self::Landlock => on.landlock = true,
            Self::Gateway => on.gateway = true,
        }
    }
}

/// A protection that does not work on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MissingProtection {
    pub protection: Protection,
    /// The reason, with the step that failed.
    pub reason: String,
    /// What would enable it, if that is known.
    pub remedy: Option<String>,
}

/// The result of the probe.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Report {
    /// The protections that work.
    pub on: Protections,
    /// The protections that do not work although they were wanted.
    pub missing: Vec<MissingProtection>,
}

impl Report {
    /// Whether no protection works.
    pub(crate) fn is_empty(&self) -> bool {
        self.on == Protections::default()
    }

    /// The names of the protections that work.
    pub(crate) fn names(&self) -> Vec<&'static str> {
        let is_on = |protection: &Protection| {
            let mut with = self.on;
            protection.set(&mut with);
            with == self.on
        };
        let all = Protection::ALL.into_iter().chain([Protection::Gateway]);
        all.filter(is_on).map(Protection::name).collect()
    }

    /// The missing protections of a pool. The gateway is one of them only if the pool wants it.
    pub(crate) fn missing_for(&self, wants_gateway: bool) -> Vec<&MissingProtection> {
        let is_needed = |one: &&MissingProtection| wants_gateway || one.protection != Protection::Gateway;
        self.missing.iter().filter(is_needed).collect()
    }

    /// Whether the gateway was tried out and does not work.
    pub(crate) fn lacks_gateway(&self) -> bool {
        self.missing.iter().any(|missing| missing.protection == Protection::Gateway)
    }

    /// Adds the outcome of trying out the gateway. The error says what did not work.
    pub(crate) fn add_gateway(&mut self, machine: &KernelFacts, outcome: Result<(), String>) {
        match outcome {
            Ok(()) => self.on.gateway = true,
            Err(error) => self.missing.push(explained(Protection::Gateway, machine, &error)),
        }
    }
}

impl MissingProtection {
    /// Says that the protection is off. Adds the consequence, unless it follows from the missing namespaces.
    pub(crate) fn headline(&self) -> String {
        let name = self.protection.name();
        match &*self.reason {
            NEEDS_NAMESPACES => format!("{name} is off"),
            _ => format!("{name} is off, so {}", self.protection.consequence()),
        }
    }
}

impl fmt::Display for MissingProtection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.headline(), self.reason)?;
        match &self.remedy {
            Some(remedy) => write!(f, "; to enable it: {remedy}"),
            None => Ok(()),
        }
    }
}

/// Facts about the machine that can explain a failure.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct KernelFacts {
    /// The value of user.max_user_namespaces; `None` if it cannot be read.
    pub max_user_namespaces: Option<u64>,
    /// The value of user.max_net_namespaces; `None` if it cannot be read.
    pub max_net_namespaces: Option<u64>,
    /// The value of kernel.unprivileged_userns_clone, which only some kernels have.
    pub unprivileged_userns_clone: Option<u64>,
    /// The value of kernel.apparmor_restrict_unprivileged_userns, which only some kernels have.
    pub apparmor_restrict_unprivileged_userns: Option<u64>,
    /// Whether there is a /dev/net/tun.
    pub has_tun: bool,
    /// Major and minor version of the kernel.
    pub kernel: (u32, u32),
}

/// Finds out which protections work. `attempt` starts a sandbox with some of them and returns the error, if any. A
/// protection is used only if it works together with the ones before it.
pub(crate) fn find(
    is_root: bool,
    machine: &KernelFacts,
    mut attempt: impl FnMut(Protections) -> Result<(), String>,
) -> Report {
    let wanted: Vec<_> =
        Protection::ALL.into_iter().filter(|one| is_root || *one != Protection::Identity).collect();
    let all = wanted.iter().fold(Protections::default(), |mut on, one| {
        one.set(&mut on);
        on
    });
    if attempt(all).is_ok() {
        return Report { on: all, missing: Vec::new() };
    }
    let mut report = Report::default();
    for protection in wanted {
        let mut with = report.on;
        protection.set(&mut with);
        let needs_namespaces =
            matches!(protection, Protection::Network | Protection::Identity) && !report.on.namespaces;
        let outcome = if needs_namespaces { Err(NEEDS_NAMESPACES.to_owned()) } else { attempt(with) };
        match outcome {
            Ok(()) => report.on = with,
            Err(reason) if needs_namespaces => {
                report.missing.push(MissingProtection { protection, reason, remedy: None });
            }
            Err(error) => report.missing.push(explained(protection, machine, &error)),
        }
    }
    report
}

/// Explains why a protection is missing, and names one change to the machine that makes it work.
fn explained(protection: Protection, machine: &KernelFacts, error: &str) -> MissingProtection {
    let error = error.strip_prefix(NOT_SET_UP).unwrap_or(error);
    if let Some((name, value, better)) = setting_in_the_way(protection, machine) {
        return MissingProtection {
            protection,
            reason: format!("{name} is {value} ({error})"),
            remedy: Some(format!("sysctl -w {name}={better}")),
        };
    }
    let remedy = match protection {
        Protection::Namespaces | Protection::Identity if machine.kernel < (5, 12) => {
            Some("use Linux 5.12 or later")
        }
        Protection::Namespaces => Some(
            "in a container, start it with --security-opt seccomp=unconfined --security-opt systempaths=unconfined",
        ),
        // A container may have only few user ids of the machine.
        Protection::Identity if error.contains("uid_map") => Some(
            "set execution.sandbox.first_user to a user id that this container has, with all slots after it",
        ),
        Protection::Identity => {
            Some("put execution.build_root on ext4, xfs, btrfs or tmpfs, which can map user ids")
        }
        Protection::Landlock => Some("start Linux 5.19 or later with landlock in its lsm= parameter"),
        // pasta words this message differently in different versions.
        Protection::Gateway if error == NO_PASTA => {
            Some("apt-get install passt, or the package of your distribution with pasta")
        }
        Protection::Gateway if !machine.has_tun => {
            Some("modprobe tun; in a container, start it with --device /dev/net/tun")
        }
        Protection::Gateway if error.contains("tun") || error.contains("tap") => {
            Some("chmod 666 /dev/net/tun")
        }
        Protection::Gateway if error.contains("routable") => Some("give this machine a default route"),
        Protection::Network | Protection::Filter | Protection::Gateway => None,
    };
    MissingProtection { protection, reason: error.to_owned(), remedy: remedy.map(str::to_owned) }
}

/// A kernel setting that forbids a protection: its name, its value, and a value that allows it.
fn setting_in_the_way(protection: Protection, machine: &KernelFacts) -> Option<(&'static str, u64, u64)> {
    match protection {
        Protection::Namespaces if machine.max_user_namespaces == Some(0) => {
            Some(("user.max_user_namespaces", 0, 15_000))
        }
        Protection::Namespaces if machine.unprivileged_userns_clone == Some(0) => {
            Some(("kernel.unprivileged_userns_clone", 0, 1))
        }
        Protection::Namespaces if machine.apparmor_restrict_unprivileged_userns == Some(1) => {
            Some(("kernel.apparmor_restrict_unprivileged_userns", 1, 0))
        }
        Protection::Network if machine.max_net_namespaces == Some(0) => {
            Some(("user.max_net_namespaces", 0, 15_000))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> KernelFacts {
        KernelFacts { kernel: (6, 1), ..KernelFacts::default() }
    }

    #[test]
    fn one_attempt_is_enough_if_everything_works() {
        let mut attempts = 0;
        let report = find(true, &machine(), |_| {
            attempts += 1;
            Ok(())
        });
        assert_eq!((attempts, report.missing.len()), (1, 0));
        assert_eq!(report.names(), ["namespaces", "network", "identity", "filter", "landlock"]);
        // An ordinary user has one user id, so `identity` does not count as missing.
        assert!(!find(false, &machine(), |_| Ok(())).on.identity);
    }

    #[test]
    fn a_protection_that_fails_is_left_out_and_the_others_stay_on() {
        let no_landlock = |on: Protections| if on.landlock { Err("ENOSYS".into()) } else { Ok(()) };
        let report = find(true, &machine(), no_landlock);
        assert_eq!(report.names(), ["namespaces", "network", "identity", "filter"]);
        assert_eq!(report.missing.len(), 1);
        assert!(report.missing[0].to_string().contains("ENOSYS"), "{}", report.missing[0]);
    }

    #[test]
    fn a_sysctl_that_forbids_namespaces_is_named() {
        let none = |on: Protections| if on.namespaces { Err("ENOSPC".into()) } else { Ok(()) };
        let closed = KernelFacts { max_user_namespaces: Some(0), ..machine() };
        let report = find(false, &closed, none);
        assert_eq!(report.names(), ["filter", "landlock"]);
        let said = report.missing[0].to_string();
        for part in ["so actions see this machine", "user.max_user_namespaces is 0 (ENOSPC)"] {
            assert!(said.contains(part), "{part} in {said}");
        }
        assert!(said.ends_with("sysctl -w user.max_user_namespaces=15000"), "{said}");
        let debian = KernelFacts { unprivileged_userns_clone: Some(0), ..machine() };
        assert!(find(false, &debian, none).missing[0].to_string().contains("unprivileged_userns_clone=1"));
    }
}
