//! [`Encoder`]: compresses pieces of a blob to frames.
//!
//! Each frame holds at most [`CHUNK_BYTES`] of the blob, states its content size, and does not depend on earlier
//! frames. Its window is its content, far below what decoders grant by default (BS-13). Incompressible content is
//! stored uncompressed in its frame, which costs 10 bytes and no decoding time.

use super::{CHUNK_BYTES, saves};
use crate::error::{Error, Result};

/// Compresses at one level. It is reused, because its tables take megabytes.
pub struct Encoder {
    context: zstd::bulk::Compressor<'static>,
    scratch: Vec<u8>,
}

impl Encoder {
    /// Creates an encoder for one of the levels in [`super::LEVELS`].
    ///
    /// # Errors
    /// `Internal` when the library cannot allocate memory.
    pub fn new(level: i32) -> Result<Self> {
        let context = zstd::bulk::Compressor::new(level).map_err(Error::internal)?;
        Ok(Self { context, scratch: Vec::new() })
    }

    /// Appends the frames of `plain` to `out`. Empty input becomes one empty frame, because decoders expect a frame.
    ///
    /// # Errors
    /// `Internal` when the library fails, which is a fault of this server.
    pub fn frames(&mut self, plain: &[u8], out: &mut Vec<u8>) -> Result<()> {
        if plain.is_empty() {
            stored_frame(plain, out);
        }
        plain.chunks(CHUNK_BYTES).try_for_each(|chunk| self.frame(chunk, out))
    }

    fn frame(&mut self, chunk: &[u8], out: &mut Vec<u8>) -> Result<()> {
        self.scratch.clear();
        self.scratch.reserve(zstd::zstd_safe::compress_bound(chunk.len()));
        let packed = self.context.compress_to_buffer(chunk, &mut self.scratch).map_err(Error::internal)?;
        if saves(chunk.len() as u64, packed as u64) {
            out.extend_from_slice(&self.scratch);
        } else {
            stored_frame(chunk, out);
        }
        Ok(())
    }
}

impl std::fmt::Debug for Encoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Encoder").finish_non_exhaustive()
    }
}

/// Largest content of one block.
const BLOCK_BYTES: usize = 128 * 1024;

/// Appends frames that hold `plain` uncompressed.
pub fn stored_frame(plain: &[u8], out: &mut Vec<u8>) {
    // Empty input becomes one frame too.
    let (first, rest) = plain.split_at(plain.len().min(CHUNK_BYTES));
    for chunk in std::iter::once(first).chain(rest.chunks(CHUNK_BYTES)) {
        // Magic number; descriptor: one segment, size in four bytes; size.
        out.extend(0xFD2F_B528u32.to_le_bytes());
        out.push(0b1010_0000);
        out.extend((chunk.len() as u32).to_le_bytes());
        let (first, rest) = chunk.split_at(chunk.len().min(BLOCK_BYTES));
        let mut blocks = std::iter::once(first).chain(rest.chunks(BLOCK_BYTES)).peekable();
        while let Some(block) = blocks.next() {
            // Last-block flag; type 0: raw; size.
            let header = u32::from(blocks.peek().is_none()) | (block.len() as u32) << 3;
            out.extend(header.to_le_bytes().into_iter().take(3));
            out.extend_from_slice(block);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The result of decoding with the default settings, as clients do.
    fn default_decoder(stream: &[u8]) -> Vec<u8> {
        zstd::decode_all(stream).unwrap()
    }

    #[test]
    fn frames_decode_with_a_default_decoder_whatever_they_hold() {
        let noise = crate::compression::test_bytes(700_000, 1);
        let runs: Vec<u8> = noise.iter().flat_map(|byte| [*byte & 3; 9]).collect();
        for plain in [&noise, &runs] {
            for length in [
                0,
                1,
                BLOCK_BYTES - 1,
                BLOCK_BYTES,
                BLOCK_BYTES + 1,
                CHUNK_BYTES,
                CHUNK_BYTES + 1,
                plain.len(),
            ] {
                let (mut packed, mut stored) = (vec![], vec![]);
                Encoder::new(1).unwrap().frames(&plain[..length], &mut packed).unwrap();
                stored_frame(&plain[..length], &mut stored);
                assert_eq!(default_decoder(&packed), plain[..length]);
                assert_eq!(default_decoder(&stored), plain[..length]);
                assert!(packed.len() <= stored.len());
                assert!(stored.len() <= length + 9 + 3 + length / 10_000, "{length}: {}", stored.len());
            }
        }
    }

    proptest! {
        #[test]
        fn every_level_decodes(level in 1i32..=19, plain in proptest::collection::vec(0u8..4, 0..5_000)) {
            let mut packed = vec![];
            Encoder::new(level).unwrap().frames(&plain, &mut packed).unwrap();
            prop_assert_eq!(default_decoder(&packed), plain);
        }
    }
}
