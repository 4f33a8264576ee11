//! The clocks of the store in tests: both of them can be moved for the current thread.

use std::cell::Cell;

thread_local! {
    static SYSTEM: Cell<i32> = const { Cell::new(0) };
    static UPTIME: Cell<u32> = const { Cell::new(0) };
}

/// The system time, as far as it was set ahead or back.
pub(in super::super) fn system_time(seconds: u32) -> u32 {
    seconds.saturating_add_signed(SYSTEM.get())
}

/// The uptime, with the time that was let pass.
pub(in super::super) fn uptime(seconds: u32) -> u32 {
    seconds.saturating_add(UPTIME.get())
}

/// Sets the system time ahead of the real one by this many seconds, or behind it.
pub(super) fn set_ahead(seconds: i32) {
    SYSTEM.set(seconds);
}

/// Lets time pass.
pub(super) fn pass(seconds: u32) {
    UPTIME.set(UPTIME.get() + seconds);
}
