//! [`Codec`]: protobuf. The memory of a message is measured before it is decoded ([`gorego_reapi::wire`]).
//!
//! An empty list entry has two bytes on the wire (fewer if compressed) and more than a hundred in memory, so a kilobyte
//! could become a gigabyte before any handler sees it. Encoding large answers does not block the threads that serve
//! other requests.

use super::request_memory::{RequestMemory, slow_work};
use bytes::{Buf as _, Bytes};
use gorego_reapi::{
    find_missing::FindMissingBlobsRequest,
    wire::{self, Limits, UNCOUNTED_BYTES},
};
use prost::{Message, Name};
use std::{any::TypeId, marker::PhantomData};
use tonic::{
    Status,
    codec::{BufferSettings, DecodeBuf, Decoder, EncodeBuf, Encoder},
};
use tonic_prost::{ProstCodec, ProstDecoder, ProstEncoder};

/// Memory limit of a decoded request: twice that of the largest FindMissingBlobs request.
pub(crate) const REQUEST_MAX_MEMORY: u64 = 64 * 1024 * 1024;
/// Messages of at least this size are checked for unused bytes.
const COMPACT_FROM_BYTES: usize = 1024;
/// Answers of at least this size may take more than a millisecond to encode.
const LARGE_ANSWER_BYTES: usize = 512 * 1024;
/// Size of the buffers of a call before its first message. Most messages fit, and the allocator keeps freed pieces of
/// this size for each thread. A stream that waits for its next message holds one of them.
const BUFFER_BYTES: usize = 1024;
/// Collected messages of a stream are sent once they have this size, which is the default of the library.
const SEND_FROM_BYTES: usize = 32 * 1024;

/// The codec of all services; see the top of this file.
#[derive(Debug)]
pub(crate) struct Codec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for Codec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> tonic::codec::Codec for Codec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Name + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = CarefulEncoder<T>;
    type Decoder = MeasuringDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        CarefulEncoder(ProstCodec::<T, U>::raw_encoder(buffers()))
    }

    fn decoder(&mut self) -> Self::Decoder {
        MeasuringDecoder(ProstCodec::<T, U>::raw_decoder(buffers()))
    }
}

fn buffers() -> BufferSettings {
    BufferSettings::new(BUFFER_BYTES, SEND_FROM_BYTES)
}

/// Decodes messages of at most [`REQUEST_MAX_MEMORY`].
#[derive(Debug)]
pub(crate) struct MeasuringDecoder<U>(ProstDecoder<U>);

impl<U: Message + Name + Default + 'static> Decoder for MeasuringDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        // This is the whole message, in one piece.
        let length = buffer.remaining();
        let taken = if TypeId::of::<U>() == TypeId::of::<FindMissingBlobsRequest>() {
            // The limit on the length bounds its memory.
            FindMissingBlobsRequest::EXPANSION_MAX.saturating_mul(length as u64)
        } else {
            measure::<U>(buffer.chunk())?
        };
        let message = self.0.decode(buffer);
        RequestMemory::settle(taken);
        Ok(message?.map(|message| compact(message, length)))
    }

    fn buffer_settings(&self) -> BufferSettings {
        self.0.buffer_settings()
    }
}

/// Decodes a whole message of a request that was read without tonic, with the errors of [`MeasuringDecoder`].
pub(super) fn decode<U: Message + Name + Default>(bytes: Bytes) -> Result<U, Status> {
    measure::<U>(&bytes)?;
    let length = bytes.len();
    let message = U::decode(bytes).map_err(|error| Status::internal(error.to_string()))?;
    Ok(compact(message, length))
}

/// The memory that a message takes once it is decoded. The result is 0 for a short message, which is not measured.
fn measure<U: Name>(bytes: &[u8]) -> Result<u64, Status> {
    if bytes.len() <= UNCOUNTED_BYTES {
        return Ok(0);
    }
    let cost = wire::cost::<U>(bytes, Limits::memory(REQUEST_MAX_MEMORY))
        .map_err(|refusal| Status::invalid_argument(format!("the {} is refused: {refusal}", U::NAME)))?;
    Ok(cost.memory.saturating_add(bytes.len() as u64))
}

/// Returns the message, or a copy if most of the received bytes are unused. The bytes fields of a decoded message refer
/// to the received buffer and keep all of it in memory, unknown fields included. A message without bytes fields does
/// not.
fn compact<U: Message + Name + Default>(message: U, length: usize) -> U {
    let is_compact =
        length < COMPACT_FROM_BYTES || !wire::has_bytes::<U>() || message.encoded_len() >= length / 2;
    if is_compact || !RequestMemory::is_present() {
        return message;
    }
    U::decode(Bytes::from(message.encode_to_vec())).unwrap_or(message)
}

/// Encodes large messages without blocking other requests.
#[derive(Debug)]
pub(crate) struct CarefulEncoder<T>(ProstEncoder<T>);

impl<T: Message + 'static> Encoder for CarefulEncoder<T> {
    type Item = T;
    type Error = Status;

    fn encode(&mut self, item: T, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        let length = item.encoded_len();
        buffer.reserve(length);
        if length < LARGE_ANSWER_BYTES {
            return self.0.encode(item, buffer);
        }
        slow_work::run(|| self.0.encode(item, buffer))
    }

    fn buffer_settings(&self) -> BufferSettings {
        self.0.buffer_settings()
    }
}
