//! Returns memory to the system after large requests.
//!
//! The allocator keeps freed memory in about one arena per thread and returns only what is free at the end of an arena.
//! A large message consists of many small allocations, so a burst of them used to keep hundreds of megabytes resident.
//! Code that frees large amounts reports them to [`freed`], and a task then calls malloc_trim.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};
use tokio::{runtime::Handle, time::sleep};

/// How much must be freed before a trim is worthwhile. It scans all arenas, which takes some milliseconds.
const WORTH_BYTES: u64 = 32 * 1024 * 1024;
/// Interval between checks of the amount.
const INTERVAL: Duration = Duration::from_secs(3);

/// Overhead of one allocation.
const ALLOCATION_BYTES: usize = 8;

/// Number of bytes freed since the last trim.
static FREED: AtomicU64 = AtomicU64::new(0);

/// The approximate memory of a string of this length: its handle, and its buffer, which the allocator rounds up.
pub(crate) fn of_text(length: usize) -> usize {
    size_of::<String>() + of_buffer(length)
}

/// The approximate memory of a buffer of this length.
pub(crate) fn of_buffer(length: usize) -> usize {
    if length == 0 { 0 } else { length.saturating_add(ALLOCATION_BYTES).next_multiple_of(16).max(32) }
}

/// Counts memory that was or will be freed.
pub(crate) fn freed(bytes: u64) {
    FREED.fetch_add(bytes, Ordering::Relaxed);
}

/// Trims the allocator's arenas whenever enough was freed. Never returns.
pub(crate) async fn give_back() {
    loop {
        sleep(INTERVAL).await;
        if FREED.load(Ordering::Relaxed) >= WORTH_BYTES {
            FREED.store(0, Ordering::Relaxed);
            // An error means that the runtime is shutting down.
            let _ = Handle::current().spawn_blocking(trim).await;
        }
    }
}

#[cfg(target_env = "gnu")]
fn trim() {
    // SAFETY: malloc_trim takes no pointers and may be called at any time from any thread.
    unsafe { libc::malloc_trim(0) };
}

/// Other allocators return memory without a call.
#[cfg(not(target_env = "gnu"))]
fn trim() {}
