//! The store in numbers, for metrics, logs and health checks.

use super::index::{Tally, Totals};
use actix::Message;

/// Asks for the totals of the store, for logs and health checks.
#[derive(Debug, Clone, Copy, Message)]
#[rtype(result = "StoreInspection")]
pub struct InspectStore;

/// The answer to [`InspectStore`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StoreInspection {
    /// Counts and bytes of the entries.
    pub totals: Totals,
    /// Uploads with an open stream.
    pub running_uploads: usize,
    /// Broken uploads that can be resumed.
    pub partial_uploads: usize,
    /// Counts of events since the start.
    pub tally: Tally,
    /// The last recorded use of the entry that would be evicted first, in seconds since 1970; `None` for an empty
    /// store.
    pub oldest_use: Option<u32>,
}

/// Counts of the scrub since the start of the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ScrubTally {
    /// Bytes that were verified.
    pub bytes: u64,
    /// Entries that were damaged.
    pub damaged: u64,
    /// Completed passes over the whole store.
    pub passes: u64,
}

/// The store in numbers, without a message: see [`super::client::Cas::measure`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StoreMeasurement {
    /// Counts and bytes of the entries.
    pub totals: Totals,
    /// Counts of events since the start.
    pub tally: Tally,
    /// The last recorded use of the least recently used entry, in seconds since 1970; `None` for an empty store.
    pub oldest_use: Option<u32>,
    /// Memory that the index takes, in bytes, without the links of results to blobs.
    pub index_bytes: u64,
    /// Counts of the scrub since the start.
    pub scrub: ScrubTally,
}
