//! A second protection of the file system: Landlock rules allow an action to write only where the mounts are meant to
//! be writable.

use super::SetupFailure;
use ::landlock::{
    ABI, Access as _, AccessFs, CompatLevel, Compatible as _, PathBeneath, PathFd, Ruleset, RulesetAttr as _,
    RulesetCreated, RulesetCreatedAttr as _, RulesetStatus, Scope,
};
use std::{io, path::PathBuf};

/// The Landlock version that is requested. The kernel enforces the part of it that it supports.
const WANTED: ABI = ABI::V6;

type LandlockError = Box<dyn std::error::Error + Send + Sync>;

/// Rules that are not in force yet.
#[derive(Debug)]
pub(crate) struct Rules(RulesetCreated);

impl Rules {
    /// Makes rules under which a process and its children can read everything, but can write only below these paths,
    /// and rename and link files only among them. They cannot make device files, signal processes outside the rules, or
    /// connect to an abstract socket of such a process.
    pub(crate) fn new(writable: impl IntoIterator<Item = PathBuf>) -> Result<Self, SetupFailure> {
        let rules = || -> Result<RulesetCreated, LandlockError> {
            let rules = Ruleset::default()
                // Before Linux 5.19, Landlock refuses every rename and link between two directories.
                .set_compatibility(CompatLevel::HardRequirement)
                .handle_access(AccessFs::Refer)?
                .set_compatibility(CompatLevel::BestEffort)
                .handle_access(AccessFs::from_all(WANTED))?
                .scope(Scope::from_all(WANTED))?
                .create()?
                .add_rule(PathBeneath::new(PathFd::new("/")?, AccessFs::from_read(WANTED)))?;
            writable.into_iter().try_fold(rules, open)
        };
        rules().map(Self).map_err(in_words)
    }

    /// Applies the rules to this process and its children, which may also write below `path`.
    pub(crate) fn restrict(self, path: PathBuf) -> Result<(), SetupFailure> {
        let restrict = || -> Result<(), LandlockError> {
            match open(self.0, path)?.restrict_self()?.ruleset {
                RulesetStatus::NotEnforced => Err("the kernel has no Landlock".into()),
                RulesetStatus::PartiallyEnforced | RulesetStatus::FullyEnforced => Ok(()),
            }
        };
        restrict().map_err(in_words)
    }
}

fn open(rules: RulesetCreated, path: PathBuf) -> Result<RulesetCreated, LandlockError> {
    let all_but_devices = AccessFs::from_all(WANTED) & !(AccessFs::MakeChar | AccessFs::MakeBlock);
    Ok(rules.add_rule(PathBeneath::new(PathFd::new(path)?, all_but_devices))?)
}

fn in_words(problem: LandlockError) -> SetupFailure {
    SetupFailure { step: "restrict the file system (Landlock)".into(), error: io::Error::other(problem) }
}
