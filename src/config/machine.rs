//! [`Machine`]: what the settings depend on besides the configuration.

use std::{path::PathBuf, thread};

/// Properties of the machine that the settings depend on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// Number of CPUs that this process may use.
    pub cpus: usize,
    /// The user's cache directory; `None` for a user without a home.
    pub cache_home: Option<PathBuf>,
    /// The directory to which relative paths refer.
    pub current_dir: PathBuf,
}

impl Machine {
    /// The properties of this machine, as this process sees them.
    pub fn this() -> Self {
        Self {
            cpus: thread::available_parallelism().map_or(1, usize::from),
            cache_home: dirs::cache_dir(),
            current_dir: std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/")),
        }
    }
}
