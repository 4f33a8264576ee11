//! [`Codec`]: a protobuf codec that measures the memory of each response before it is decoded ([`gorego_reapi::wire`]).
//!
//! A malicious server could send 16 MiB that take gigabytes once they are decoded.

use bytes::Buf as _;
use gorego_reapi::wire::{self, Limits, UNCOUNTED_BYTES};
use prost::{Message, Name};
use std::marker::PhantomData;
use tonic::{
    Status,
    codec::{DecodeBuf, Decoder},
};
use tonic_prost::{ProstCodec, ProstDecoder, ProstEncoder};

/// Maximum memory of a decoded response: a GetTree page with the largest Directory.
pub(crate) const ANSWER_MAX_MEMORY: u64 = 1024 * 1024 * 1024;

/// The codec of all clients in [`crate::stubs`].
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
    type Encoder = ProstEncoder<T>;
    type Decoder = MeasuringDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstCodec::<T, U>::default().encoder()
    }

    fn decoder(&mut self) -> Self::Decoder {
        MeasuringDecoder(ProstCodec::<T, U>::default().decoder())
    }
}

/// A decoder for messages that take at most [`ANSWER_MAX_MEMORY`].
#[derive(Debug)]
pub(crate) struct MeasuringDecoder<U>(ProstDecoder<U>);

impl<U: Message + Name + Default + 'static> Decoder for MeasuringDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        // The buffer holds the whole message in one piece.
        if buffer.remaining() > UNCOUNTED_BYTES {
            wire::cost::<U>(buffer.chunk(), Limits::memory(ANSWER_MAX_MEMORY)).map_err(|refusal| {
                Status::invalid_argument(format!("the {} is refused: {refusal}", U::NAME))
            })?;
        }
        self.0.decode(buffer)
    }
}
