//! The memory budget for decoding stored messages, shared among peers.
//!
//! The memory of a message is known only once it is read. So room is reserved for the worst case of its size before it
//! is read, and held until the message is converted to something else. A request that holds room never waits for more,
//! so no two requests wait for each other. Small messages need no room.
//!
//! Room is charged to the caller of the handle. A message of half a MiB may take as much as the largest, so the budget
//! is enough for two of the largest, and one peer leaves room for one message of the others.

use super::client::Cas;
use crate::{budget::Share, memory};
use bytes::Bytes;
use gorego_reapi::{
    error::Result,
    wire::{self, UNCOUNTED_BYTES},
};
use prost::{Message, Name};

/// The most memory that a message of `bytes` bytes takes when it is read and decoded within the bound `most`.
pub(super) fn worst_case(bytes: u64, most: u64) -> u64 {
    if bytes <= UNCOUNTED_BYTES as u64 { 0 } else { bytes.saturating_add(wire::worst_case(bytes, most)) }
}

/// Reserved memory, until it is dropped.
#[derive(Debug)]
pub struct DecodingRoom(Share);

impl Drop for DecodingRoom {
    fn drop(&mut self) {
        memory::freed(self.0.amount());
    }
}

impl Cas {
    /// Waits for room for this many bytes; 0 bytes need none.
    pub(super) async fn room_to_decode(&self, bytes: u64) -> Result<Option<DecodingRoom>> {
        if bytes == 0 {
            return Ok(None);
        }
        Ok(Some(DecodingRoom(self.shared().decoded.wait_for(self.caller(), bytes).await?)))
    }

    /// Runs work on a message: on a blocking thread if the message has room, because it is large, and otherwise on this
    /// thread. Returns the room when the work is done.
    pub(super) async fn in_room<T: Send + 'static>(
        &self,
        room: Option<DecodingRoom>,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<(T, Option<DecodingRoom>)> {
        if room.is_none() {
            return Ok((work(), None));
        }
        self.blocking_with(room, work).await
    }

    /// Decodes a received message, a large one on a blocking thread. The room has to be kept as long as the message.
    ///
    /// # Errors
    /// The errors of [`wire::decode`].
    pub async fn decode<M>(
        &self,
        bytes: Bytes,
        most: u64,
        what: &'static str,
    ) -> Result<(M, Option<DecodingRoom>)>
    where
        M: Message + Name + Default + 'static,
    {
        let room = self.room_to_decode(worst_case(bytes.len() as u64, most)).await?;
        let (message, room) = self.in_room(room, move || wire::decode(bytes, most, what)).await?;
        Ok((message?, room))
    }
}
