//! The memory budget for decoders of compressed uploads, shared by the gRPC and the HTTP port.
//!
//! A few bytes from a client can make a decoder allocate a window of up to 8 MiB, and keep it for as long as the client
//! is silent. So memory is reserved before a decoder gets its first bytes, as much as the header of its first frame
//! demands ([`Decoder::memory`]), and is released with the decoder. A later frame with a larger window reserves more
//! memory at once or fails, because a decoder that holds memory must not wait for more. Small decoders are served
//! before large ones of the same connection.

use crate::{
    budget::{Bounds, Budget, Share},
    caller::Caller,
    memory,
};
use gorego_reapi::{
    compression::{DECODER_BYTES, Decoder, Room},
    error::{Error, Result},
};
use std::time::Duration;
use tokio::time::timeout;

/// Most clients compress with windows of 2 MiB, of which 85 fit; some use windows of 8 MiB. Each decoder takes at least
/// [`DECODER_BYTES`], so there are at most 256. This leaves some blocking threads free when all of them wait for the
/// disk.
pub(crate) const DECODERS: Bounds = Bounds {
    what: "bytes of memory to decompress uploads",
    total: 256 * DECODER_BYTES,
    connection: 160 * DECODER_BYTES,
};
/// Decoders up to this size are served before larger ones.
const SMALL_BYTES: u64 = 2 * DECODER_BYTES;
/// How long a compressed upload waits for its turn to be decoded.
const WAIT: Duration = Duration::from_secs(30);

/// The share of [`DECODERS`] that one decoder holds.
#[derive(Debug)]
pub struct DecoderRoom(Share);

impl Room for DecoderRoom {
    fn amount(&self) -> u64 {
        self.0.amount()
    }

    fn grow(&mut self, more: u64) -> Result<()> {
        Ok(self.0.grow(more)?)
    }
}

impl Drop for DecoderRoom {
    fn drop(&mut self) {
        memory::freed(self.0.amount());
    }
}

/// Waits for memory to decode a stream that begins with `head` and yields at most `limit` bytes.
///
/// # Errors
/// `Exhausted` when none becomes free within [`WAIT`].
pub(crate) async fn room(decoders: &Budget, caller: Caller, head: &[u8], limit: u64) -> Result<DecoderRoom> {
    let bytes = Decoder::memory(head, limit);
    let room = async {
        match bytes <= SMALL_BYTES {
            true => decoders.wait_for_small(caller, bytes).await,
            false => decoders.wait_for(caller, bytes).await,
        }
    };
    match timeout(WAIT, room).await {
        Ok(room) => Ok(DecoderRoom(room?)),
        Err(_) => Err(Error::Exhausted {
            message: "too many compressed uploads are going on at the same time; try again".into(),
            retry_after: Some(WAIT),
        }),
    }
}
