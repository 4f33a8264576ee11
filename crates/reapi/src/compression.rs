//! zstd as this API uses it: a sequence of frames that represents a blob.
//!
//! Pure. Compression and decompression block while they compute, so callers run them on blocking threads. The parts:
//!
//! - [`Decoder`]: decodes the stream of a client, in any pieces, to at most the size of the blob.
//! - [`Encoder`]: compresses pieces of a blob to independent frames, so that a stream can start at any frame.
//! - [`FrameDecoder`]: decodes single frames of a stream that this server made.
//! - [`SeekTable`]: the positions of the frames of a stored stream.
//!
//! It computes no digests: the code that hashes the bytes verifies them. zstd is the only compressor; names and
//! messages that ask for another one are refused when they are parsed.

mod decoder;
mod encoder;
mod frame_decoder;
mod frame_head;
mod seek_table;

pub use decoder::{DECODER_BYTES, Decoder, Room, decode_all};
pub use encoder::{Encoder, stored_frame};
pub use frame_decoder::FrameDecoder;
pub use frame_head::{WINDOW_MAX_LOG, is_frame_magic};
pub use seek_table::{SeekTable, TABLE_END_BYTES};

/// Number of blob bytes in one frame that this server makes. A read at an offset decodes half a frame too much on
/// average, and a slow reader makes the server hold one frame. Larger frames save little: on a shared library, 1 MiB is
/// 2 % smaller at level 3 and no smaller at level 1.
pub const CHUNK_BYTES: usize = 256 * 1024;

/// The compression levels that can be configured. Higher levels need more memory than decoders grant by default.
pub const LEVELS: std::ops::RangeInclusive<i32> = 1..=19;

/// Number of blob bytes that a [`Decoder`] yields in one piece. Equal to [`CHUNK_BYTES`], so that a frame of this
/// server is decoded without an intermediate copy.
pub const PIECE_BYTES: usize = CHUNK_BYTES;

/// Whether compression from `plain` to `packed` bytes is worth a decompression at the other end: it must save a
/// sixteenth.
pub fn saves(plain: u64, packed: u64) -> bool {
    packed < plain - plain / 16
}

/// Incompressible bytes, determined by the seed.
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
