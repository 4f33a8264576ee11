//! Runs slow work on a thread that also serves other tasks.

use tokio::runtime::{Handle, RuntimeFlavor};

/// Runs blocking work without stalling other tasks; on a multi-threaded runtime they move to other threads.
pub(crate) fn run<T>(work: impl FnOnce() -> T) -> T {
    let can_move =
        Handle::try_current().is_ok_and(|here| here.runtime_flavor() == RuntimeFlavor::MultiThread);
    if can_move { tokio::task::block_in_place(work) } else { work() }
}
