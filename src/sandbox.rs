//! The sandbox: the file system, processes and network that one action sees, and the code that moves a process into it.
//!
//! This module knows nothing of actions, commands and workers. A runner process makes one [`World`](world::World): the
//! files of the host that every action may see, assembled as one tree of mounts. For each action the runner starts a
//! *cell* from the world. A cell is a set of new namespaces with a copy of that tree; when its first process ends, the
//! kernel kills every other process in it. A cell is never used twice.
//!
//! Each protection can be switched on separately ([`settings::Protections`]), so a protection that the kernel refuses
//! does not disable the others. [`probe`] finds out which ones work by starting a cell that runs nothing. The [`view`]
//! and the [`filter`] are plain values, made without a system call.

mod assemble;
pub(crate) mod confine;
pub(crate) mod filter;
pub(crate) mod full;
pub(crate) mod identity;
pub(crate) mod kind;
pub(crate) mod landlock;
pub(crate) mod layers;
mod mounts;
pub(crate) mod namespaces;
pub(crate) mod network;
pub(crate) mod probe;
pub(crate) mod settings;
mod sys;
pub(crate) mod view;
pub(crate) mod world;

use std::{fmt, io};

/// Path of the input root in every action. It is fixed so that outputs that contain the path are reproducible.
pub(crate) const EXEC_ROOT: &str = "/build";

/// A step of the setup that failed. It is never the action's fault.
#[derive(Debug)]
pub(crate) struct SetupFailure {
    /// The step that was tried, such as "mount /proc".
    pub step: String,
    /// The error that the kernel returned.
    pub error: io::Error,
}

impl SetupFailure {
    /// Returns a copy of this failure. `io::Error` cannot be cloned, and several callers may need the same failure.
    pub(crate) fn duplicate(&self) -> Self {
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
    /// `step` describes what was tried.
    fn step(self, step: impl fmt::Display) -> Result<T, SetupFailure>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step(self, step: impl fmt::Display) -> Result<T, SetupFailure> {
        self.map_err(|error| SetupFailure { step: step.to_string(), error: error.into() })
    }
}
