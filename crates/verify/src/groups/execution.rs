//! EXE: running actions. One file for each section of the rules.

pub mod cache;
pub mod inputs;
pub mod logs;
pub mod outputs;
pub mod refusals;
pub mod running;
pub mod stream;
pub mod trees;

use super::Beyond;

/// Rules of this group that need an operator's hands.
pub const BEYOND: &[Beyond] =
    &[("EXE-62", "needs a worker to be killed in the middle of an action, which this suite cannot do")];

/// A script whose output is never the same twice.
const UNIQUE: &str = "date +%s%N; echo $$; cat /proc/sys/kernel/random/uuid 2>/dev/null; exit ";
