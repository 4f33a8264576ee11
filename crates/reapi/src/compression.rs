//! zstd, as this API uses it: a stream of frames that stand for a blob.
//!
//! Pure: bytes in, bytes out; where they come from and go to is the caller's affair. What compresses and what decompresses
//! blocks for as long as it computes, so callers run it on blocking threads. The parts:
//!
//! - [`Decoder`]: whatever a client sends, in any pieces, into at most as many bytes as its blob has.
//! - [`Encoder`]: pieces of a blob into frames that stand alone, so that a stream may begin at any of them.
//! - [`SeekTable`]: where the frames of a stored stream begin.
//!
//! It knows no digests: whether the bytes are the right ones is for whoever hashes them to say. It offers one compressor;
//! the others of the API are refused where names and messages are read.

mod decoder;
mod encoder;
mod seek_table;

pub use decoder::{DECODER_BYTES, Decoder, Room, WINDOW_MAX_LOG, decode_all, is_frame_magic};
pub use encoder::{Encoder, stored_frame};
pub use seek_table::{SeekTable, TABLE_END_BYTES};

/// Bytes of a blob in one frame of ours. An offset costs half a frame on average, and a frame is all that a slow reader
/// makes us hold. Larger ones gain little: on a shared library, 1 MiB is 2 % smaller at level 3 and not at all at level 1.
pub const CHUNK_BYTES: usize = 256 * 1024;

/// Levels that can be configured. Those above need more than the memory that decoders grant by default.
pub const LEVELS: std::ops::RangeInclusive<i32> = 1..=19;

/// Bytes of a blob that come out of a [`Decoder`] in one go; also what a frame of ours holds, so that it is decoded without
/// a copy in between.
pub const PIECE_BYTES: usize = CHUNK_BYTES;

/// Whether `packed` bytes instead of `plain` are worth a decompression at the other end: a sixteenth less.
pub fn saves(plain: u64, packed: u64) -> bool {
    packed < plain - plain / 16
}

/// Bytes without any order, always the same for a seed.
#[cfg(test)]
fn test_bytes(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    std::iter::repeat_with(next).take(length).collect()
}
