//! Keeps the memory of the process close to what is in use.
//!
//! The allocator of glibc keeps freed memory in arenas and returns only what is free at the end of one. By default
//! there are up to eight arenas per core, so that threads seldom share one. [`limit_arenas`] allows one per core,
//! because more threads than that do not run at once.
//!
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

/// Fewest arenas that are allowed.
#[cfg(target_env = "gnu")]
const ARENAS_MIN: usize = 2;

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

/// Limits the arenas of the allocator. Must be called before threads are started, because existing arenas stay. The
/// user's own setting has precedence.
#[cfg(target_env = "gnu")]
pub(crate) fn limit_arenas() {
    let tunables = std::env::var_os("GLIBC_TUNABLES").unwrap_or_default();
    if std::env::var_os("MALLOC_ARENA_MAX").is_some() || sets_arenas(&tunables.to_string_lossy()) {
        return;
    }
    let cores = std::thread::available_parallelism().map_or(ARENAS_MIN, std::num::NonZero::get);
    let arenas = i32::try_from(cores.max(ARENAS_MIN)).unwrap_or(i32::MAX);
    // SAFETY: mallopt takes no pointers. If it fails, the default stays.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, arenas) };
}

/// Whether a value of `GLIBC_TUNABLES` sets a number of arenas.
#[cfg(target_env = "gnu")]
fn sets_arenas(tunables: &str) -> bool {
    tunables.split(':').any(|tunable| tunable.starts_with("glibc.malloc.arena_"))
}

/// Other allocators have no arenas.
#[cfg(not(target_env = "gnu"))]
pub(crate) fn limit_arenas() {}

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

#[cfg(all(test, target_env = "gnu"))]
mod tests {
    use super::*;

    #[test]
    fn only_a_setting_of_arenas_has_precedence() {
        assert!(sets_arenas("glibc.malloc.hugetlb=1:glibc.malloc.arena_max=4"));
        assert!(!sets_arenas("glibc.malloc.hugetlb=1") && !sets_arenas(""));
    }
}
