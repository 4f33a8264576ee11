//! The sandbox: the world that one action sees, and how a process of ours gets into it.
//!
//! This room knows nothing of actions, commands and workers. A runner process makes a [`World`](world::World) once: the files
//! of the host that every action may see, assembled as one tree of mounts. For each action it starts a *cell* from the world:
//! new namespaces with a copy of that tree, whose first process ends with everything in them. A cell is never used twice.
//!
//! Each protection is one small piece ([`settings::Protections`]), and what the kernel refuses is left out alone. [`probe`] finds that
//! out with a cell that runs nothing. The [`view`] and the [`filter`] are values, made without a system call.

mod assemble;
pub(crate) mod confine;
pub(crate) mod filter;
pub(crate) mod identity;
pub(crate) mod kind;
pub(crate) mod landlock;
pub(crate) mod layers;
mod mounts;
pub(crate) mod namespaces;
pub(crate) mod probe;
pub(crate) mod settings;
mod sys;
pub(crate) mod view;
pub(crate) mod world;

use std::{fmt, io};

/// Where the input root of every action is, so that outputs that contain the path are reproducible.
pub(crate) const EXEC_ROOT: &str = "/build";

/// A step that could not be taken. It is never the action's fault.
#[derive(Debug)]
pub(crate) struct SetupFailure {
    /// What was tried: "mount /proc".
    pub step: String,
    /// What the kernel said.
    pub error: io::Error,
}

impl SetupFailure {
    /// The same failure, for another one who needs what could not be set up.
    pub(crate) fn again(&self) -> Self {
        let error = match self.error.raw_os_error() {
            Some(errno) => io::Error::from_raw_os_error(errno),
            None => io::Error::other(self.error.to_string()),
        };
        Self { step: self.step.clone(), error }
    }
}

impl fmt::Display for SetupFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.step, self.error)
    }
}

/// Adds the step to an error.
pub(crate) trait Step<T> {
    /// `step` says what was tried.
    fn step(self, step: impl fmt::Display) -> Result<T, SetupFailure>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step(self, step: impl fmt::Display) -> Result<T, SetupFailure> {
        self.map_err(|error| SetupFailure { step: step.to_string(), error: error.into() })
    }
}
