//! [`Codec`]: protobuf, with the entries of a message counted before it is decoded.
//!
//! An empty entry takes two bytes on the wire, less when compressed, and a hundred and more in memory: a kilobyte could become
//! a gigabyte before any handler has seen it.

use crate::{proto::reapi::UpdateActionResultRequest, tree::count_entries};
use bytes::Buf as _;
use prost::Message;
use std::{any::TypeId, marker::PhantomData};
use tonic::{
    Status,
    codec::{DecodeBuf, Decoder},
};
use tonic_prost::{ProstCodec, ProstDecoder, ProstEncoder};

/// Entries of a message; four times the digests of which the largest request has room.
pub const MESSAGE_MAX_ENTRIES: u64 = 1_000_000;

/// The codec of all our services and clients; see the top of this file.
#[derive(Debug)]
pub struct Codec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for Codec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> tonic::codec::Codec for Codec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = CountingDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstCodec::<T, U>::default().encoder()
    }

    fn decoder(&mut self) -> Self::Decoder {
        CountingDecoder(ProstCodec::<T, U>::default().decoder())
    }
}

/// Decodes messages of at most [`MESSAGE_MAX_ENTRIES`] entries.
#[derive(Debug)]
pub struct CountingDecoder<U>(ProstDecoder<U>);

impl<U: Message + Default + 'static> Decoder for CountingDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        // The one request that has its lists in a message of its own. Elsewhere what is inside may be content.
        let levels = if TypeId::of::<U>() == TypeId::of::<UpdateActionResultRequest>() { 2 } else { 1 };
        // All of the message: it lies in one piece.
        if count_entries(buffer.chunk(), levels) > MESSAGE_MAX_ENTRIES {
            let problem = format!("the message has more than {MESSAGE_MAX_ENTRIES} entries");
            return Err(Status::invalid_argument(problem));
        }
        self.0.decode(buffer)
    }
}
