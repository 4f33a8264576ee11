//! Which protections work on this machine, and what enables those that do not. Pure: the caller tries them.

use super::settings::Protections;
use std::fmt;

/// A protection, as users know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protection {
    /// Own mounts, processes, IPC and names.
    Namespaces,
    /// An own network.
    Network,
    /// A user of the host for each slot.
    Identity,
    /// The filter of system calls.
    Filter,
    /// Landlock.
    Landlock,
}

impl Protection {
    const ALL: [Self; 5] = [Self::Namespaces, Self::Network, Self::Identity, Self::Filter, Self::Landlock];

    /// Its name in messages.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Namespaces => "namespaces",
            Self::Network => "network",
            Self::Identity => "identity",
            Self::Filter => "filter",
            Self::Landlock => "landlock",
        }
    }

    fn set(self, on: &mut Protections) {
        match self {
            Self::Namespaces => on.namespaces = true,
            Self::Network => on.network = true,
            Self::Identity => on.identity = true,
            Self::Filter => on.filter = true,
            Self::Landlock => on.landlock = true,
        }
    }
}

/// A protection that does not work here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MissingProtection {
    /// Which.
    pub protection: Protection,
    /// The step that failed, and why.
    pub reason: String,
    /// What enables it, if that is known.
    pub remedy: Option<String>,
}

/// What works, and what does not.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Report {
    /// What is on.
    pub on: Protections,
    /// What is not, although it could be.
    pub missing: Vec<MissingProtection>,
}

impl Report {
    /// Whether nothing works.
    pub(crate) fn is_empty(&self) -> bool {
        self.on == Protections::default()
    }

    /// The names of what is on.
    pub(crate) fn names(&self) -> Vec<&'static str> {
        let is_on = |protection: &Protection| {
            let mut with = self.on;
            protection.set(&mut with);
            with == self.on
        };
        Protection::ALL.into_iter().filter(is_on).map(Protection::name).collect()
    }
}

impl fmt::Display for MissingProtection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is off: {}", self.protection.name(), self.reason)?;
        match &self.remedy {
            Some(remedy) => write!(f, "; to enable it: {remedy}"),
            None => Ok(()),
        }
    }
}

/// What the machine says of itself that explains a failure.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct KernelFacts {
    /// user.max_user_namespaces
    pub max_user_namespaces: Option<u64>,
    /// user.max_net_namespaces
    pub max_net_namespaces: Option<u64>,
    /// kernel.unprivileged_userns_clone
    pub unprivileged_userns_clone: Option<u64>,
    /// kernel.apparmor_restrict_unprivileged_userns
    pub apparmor_restrict_unprivileged_userns: Option<u64>,
    /// The version of the kernel.
    pub kernel: (u32, u32),
}

/// Finds out which protections work. `attempt` starts a sandbox with some of them and says what went wrong. What works
/// alone is used only if it works together.
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
        let outcome =
            if needs_namespaces { Err("it needs the namespaces".to_owned()) } else { attempt(with) };
        match outcome {
            Ok(()) => report.on = with,
            Err(reason) => {
                let remedy = if needs_namespaces { None } else { remedy(protection, machine) };
                report.missing.push(MissingProtection { protection, reason, remedy });
            }
        }
    }
    report
}

/// The one change to the machine that makes a protection work.
fn remedy(protection: Protection, machine: &KernelFacts) -> Option<String> {
    let sysctl = |name: &str, value: u64| Some(format!("sysctl -w {name}={value}"));
    match protection {
        Protection::Namespaces if machine.max_user_namespaces == Some(0) => {
            sysctl("user.max_user_namespaces", 15_000)
        }
        Protection::Namespaces if machine.unprivileged_userns_clone == Some(0) => {
            sysctl("kernel.unprivileged_userns_clone", 1)
        }
        Protection::Namespaces if machine.apparmor_restrict_unprivileged_userns == Some(1) => {
            sysctl("kernel.apparmor_restrict_unprivileged_userns", 0)
        }
        Protection::Namespaces | Protection::Identity if machine.kernel < (5, 12) => {
            Some("use Linux 5.12 or later".into())
        }
        Protection::Namespaces => Some(
            "in a container, start it with --security-opt seccomp=unconfined --security-opt systempaths=unconfined"
                .into(),
        ),
        Protection::Network if machine.max_net_namespaces == Some(0) => {
            sysctl("user.max_net_namespaces", 15_000)
        }
        Protection::Identity => {
            Some("put execution.build_root on ext4, xfs, btrfs or tmpfs, which can map user ids".into())
        }
        Protection::Landlock => Some("start Linux 5.19 or later with landlock in its lsm= parameter".into()),
        Protection::Network | Protection::Filter => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> KernelFacts {
        KernelFacts { kernel: (6, 1), ..KernelFacts::default() }
    }

    #[test]
    fn where_everything_works_one_attempt_is_enough() {
        let mut attempts = 0;
        let report = find(true, &machine(), |_| {
            attempts += 1;
            Ok(())
        });
        assert_eq!((attempts, report.missing.len()), (1, 0));
        assert_eq!(report.names(), ["namespaces", "network", "identity", "filter", "landlock"]);
        // An ordinary user has one user id, and misses nothing.
        assert!(!find(false, &machine(), |_| Ok(())).on.identity);
    }

    #[test]
    fn what_fails_is_left_out_alone_and_the_rest_is_on() {
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
        assert!(report.missing[0].to_string().contains("sysctl -w user.max_user_namespaces=15000"));
        let debian = KernelFacts { unprivileged_userns_clone: Some(0), ..machine() };
        assert!(find(false, &debian, none).missing[0].to_string().contains("unprivileged_userns_clone=1"));
    }
}
