//! The second layer over the file system: with Landlock, an action can write only where the mounts are meant to let it write.

use super::Failure;
use ::landlock::{
    ABI, Access as _, AccessFs, BitFlags, CompatLevel, Compatible as _, PathBeneath, PathFd, Ruleset,
    RulesetAttr as _, RulesetCreatedAttr as _, RulesetStatus, Scope,
};
use std::{io, path::PathBuf};

/// What is asked for; the kernel takes what it knows of that.
const WANTED: ABI = ABI::V6;

/// Lets this process and its children write only below these paths, rename and link among them, and neither signal a
/// process nor connect to an abstract socket that does not share the restriction. Everything can be read.
pub(crate) fn restrict(writable: impl IntoIterator<Item = PathBuf>) -> Result<(), Failure> {
    build(writable).map_err(|error| Failure {
        step: "restrict the file system (Landlock)".into(),
        error: io::Error::other(error),
    })
}

fn build(
    writable: impl IntoIterator<Item = PathBuf>,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let all: BitFlags<AccessFs> = AccessFs::from_all(WANTED);
    let read: BitFlags<AccessFs> = AccessFs::from_read(WANTED);
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(all)?
        .scope(Scope::from_all(WANTED))?
        .create()?
        .add_rule(PathBeneath::new(PathFd::new("/")?, read))?;
    for path in writable {
        rules = rules.add_rule(PathBeneath::new(PathFd::new(&path)?, all))?;
    }
    match rules.restrict_self()?.ruleset {
        RulesetStatus::NotEnforced => Err("the kernel has no Landlock".into()),
        RulesetStatus::PartiallyEnforced | RulesetStatus::FullyEnforced => Ok(()),
    }
}
