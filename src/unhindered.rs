//! Work that takes long, on a thread that serves others too.

use tokio::runtime::{Handle, RuntimeFlavor};

/// Does work that takes long while other tasks go on elsewhere, where the runtime can do that.
pub(crate) fn unhindered<T>(work: impl FnOnce() -> T) -> T {
    let can_move =
        Handle::try_current().is_ok_and(|here| here.runtime_flavor() == RuntimeFlavor::MultiThread);
    if can_move { tokio::task::block_in_place(work) } else { work() }
}
