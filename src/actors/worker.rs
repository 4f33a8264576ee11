//! The worker pool: each actor of the SyncArbiter runs one action at a time.

pub mod cancel;
pub mod messages;
