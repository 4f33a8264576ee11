//! Room to decode stored messages in: what all of them take together has a bound, which peers share.
//!
//! What a message takes is known only once it was read, so room is taken for the worst that its size allows, before it is read,
//! and held until it was made into something else. A request that holds room never waits for more of it, so no two wait for one
//! another. Small messages need none.
//!
//! Room is charged to the caller for whom the store works. Messages of half a MiB may take as much as the largest, so there is room
//! for two of the largest, and a peer that holds some leaves room for one to the others.

use super::client::Cas;
use crate::{budget::Share, memory};
use bytes::Bytes;
use gorego_reapi::{
    error::Result,
    wire::{self, UNCOUNTED_BYTES},
};
use prost::{Message, Name};

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
        Ok(Some(Room(self.shared().decoded.wait_for(self.caller(), bytes).await?)))
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
