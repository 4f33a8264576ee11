//! EXE: running actions. One file for each section of the rules.

pub(crate) mod cache;
pub(crate) mod inputs;
pub(crate) mod logs;
pub(crate) mod outputs;
pub(crate) mod refusals;
pub(crate) mod running;
pub(crate) mod stream;
pub(crate) mod trees;

use super::Beyond;

/// Rules that need the help of an operator.
pub(super) const BEYOND: &[Beyond] =
    &[("EXE-62", "needs a worker to be killed in the middle of an action, which this suite cannot do")];

/// A script whose output is different each time.
const UNIQUE: &str = "date +%s%N; echo $$; cat /proc/sys/kernel/random/uuid 2>/dev/null; exit ";
