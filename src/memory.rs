//! Memory that goes back to the system after large requests.
//!
//! The allocator keeps what was freed, in an arena for about each thread, and gives back only what lies at the end of one. A
//! large message is many small pieces, so after a storm of them hundreds of megabytes stayed resident. Code that frees large
//! amounts reports it with [`freed`]; a task then calls malloc_trim.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};
use tokio::{runtime::Handle, time::sleep};

/// How much has to be freed before it is worth the look through all arenas, which takes some milliseconds.
const WORTH_BYTES: u64 = 32 * 1024 * 1024;
/// How often the task checks how much that is.
const INTERVAL: Duration = Duration::from_secs(3);

/// What was freed since the last time.
static FREED: AtomicU64 = AtomicU64::new(0);

/// Counts memory that was freed, or is about to be.
pub fn freed(bytes: u64) {
    FREED.fetch_add(bytes, Ordering::Relaxed);
}

/// Gives memory back from time to time; never ends.
pub async fn give_back() {
    loop {
        sleep(INTERVAL).await;
        if FREED.load(Ordering::Relaxed) >= WORTH_BYTES {
            FREED.store(0, Ordering::Relaxed);
            // An error means that the runtime is going down.
            let _ = Handle::current().spawn_blocking(trim).await;
        }
    }
}

#[cfg(target_env = "gnu")]
fn trim() {
    // SAFETY: it takes no pointer and may be called at any time from any thread.
    unsafe { libc::malloc_trim(0) };
}

/// Other allocators give back by themselves.
#[cfg(not(target_env = "gnu"))]
fn trim() {}
