//! Room to decode stored messages in: what all of them take together has a bound.
//!
//! What a message takes is known only once it was read, so room is taken for the worst that its size allows, before it is read,
//! and held until it was made into something else. Whoever holds room never waits for more of it, so nobody waits for ever.
//! Small messages need none.

use super::{Shared, client::Cas, settings::SMALL_TREE_BYTES};
use crate::{budget::Share, caller::Caller, memory};
use bytes::Bytes;
use gorego_reapi::{
    error::{Error, Result},
    wire::{self, UNCOUNTED_BYTES},
};
use prost::{Message, Name};
use tokio::sync::SemaphorePermit;

/// What a message of this many bytes takes at worst, when it is read and decoded within a bound.
pub(super) fn worst_case(bytes: u64, most: u64) -> u64 {
    if bytes <= UNCOUNTED_BYTES as u64 { 0 } else { bytes.saturating_add(wire::worst_case(bytes, most)) }
}

/// Room that is held until it is dropped.
#[derive(Debug)]
pub struct Room(Share);

impl Drop for Room {
    fn drop(&mut self) {
        memory::freed(self.0.amount());
    }
}

impl Cas {
    /// Waits for room for this many bytes; for none, if it is none.
    pub(super) async fn room_to_decode(&self, bytes: u64) -> Result<Option<Room>> {
        if bytes == 0 {
            return Ok(None);
        }
        // Work of many callers shares one answer here, so it is charged to none of them.
        Ok(Some(Room(self.shared().decoded.wait_for(Caller::default(), bytes).await?)))
    }

    /// Decodes a message that was received, a large one on a blocking thread. The room is to be kept as long as the message.
    ///
    /// # Errors
    /// As [`wire::decode`].
    pub async fn decode<M>(&self, bytes: Bytes, most: u64, what: &'static str) -> Result<(M, Option<Room>)>
    where
        M: Message + Name + Default + 'static,
    {
        let room = self.room_to_decode(worst_case(bytes.len() as u64, most)).await?;
        let decode = move || wire::decode(bytes, most, what);
        let message = if room.is_some() { self.blocking(decode).await? } else { decode() }?;
        Ok((message, room))
    }
}

/// Permission to hold the directories of one tree in memory. A tree above `SMALL_TREE_BYTES` takes one of `LARGE_TREES_MAX`
/// permits; a holder never waits for a second.
#[derive(Debug)]
pub(super) struct TreeRoom<'a> {
    shared: &'a Shared,
    bytes: usize,
    place: Option<SemaphorePermit<'a>>,
}

impl<'a> TreeRoom<'a> {
    pub(super) fn new(shared: &'a Shared) -> Self {
        Self { shared, bytes: 0, place: None }
    }

    /// Waits for the right to hold this much more.
    pub(super) async fn grow(&mut self, bytes: usize) -> Result<()> {
        self.bytes = self.bytes.saturating_add(bytes);
        if self.bytes > SMALL_TREE_BYTES && self.place.is_none() {
            self.place = Some(self.shared.large_trees.acquire().await.map_err(Error::internal)?);
        }
        Ok(())
    }
}
