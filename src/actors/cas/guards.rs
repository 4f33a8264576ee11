//! Promises of the actor that end when they are dropped: [`Lease`] keeps blobs, [`Reservation`] keeps room.
//!
//! The end is told to the actor by a message that no mailbox bound can refuse, so none is lost while the actor lives.

use super::{
    CasActor,
    index::EntryRef,
    requests::{Release, Unreserve},
};
use actix::Addr;

/// Entries that are not evicted while this is held.
pub struct Lease {
    store: Addr<CasActor>,
    entries: Vec<EntryRef>,
}

impl Lease {
    /// A lease on entries that the index has counted.
    pub fn new(store: Addr<CasActor>, entries: Vec<EntryRef>) -> Self {
        Self { store, entries }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if !self.entries.is_empty() {
            self.store.do_send(Release(std::mem::take(&mut self.entries)));
        }
    }
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Lease({} entries)", self.entries.len())
    }
}

/// Room on disk that nobody else gets while this is held.
pub struct Reservation {
    store: Addr<CasActor>,
    bytes: u64,
}

impl Reservation {
    /// A reservation that the index has counted.
    pub fn new(store: Addr<CasActor>, bytes: u64) -> Self {
        Self { store, bytes }
    }

    /// How much room.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Ends it without telling the actor; for the actor itself. Returns how much room it was.
    pub fn disarm(mut self) -> u64 {
        std::mem::take(&mut self.bytes)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.store.do_send(Unreserve(self.bytes));
        }
    }
}

impl std::fmt::Debug for Reservation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Reservation({} bytes)", self.bytes)
    }
}
