//! [`FrameDecoder`]: decodes single frames of a stream that this server made, in any order.
//!
//! The frames are in memory and their content has a known size, so no window is kept between calls. The input may be
//! damaged. Then the result is an error, or wrong bytes of the right length, which the caller detects by a checksum or
//! digest.

use crate::error::{Error, Result};

/// Decodes frames. It is reused, because its tables take about 100 KiB.
pub struct FrameDecoder {
    context: zstd::bulk::Decompressor<'static>,
}

impl FrameDecoder {
    /// Creates a decoder.
    ///
    /// # Errors
    /// `Internal` when the library cannot allocate memory.
    pub fn new() -> Result<Self> {
        Ok(Self { context: zstd::bulk::Decompressor::new().map_err(Error::internal)? })
    }

    /// The content of one or several consecutive frames, which must have `plain` bytes.
    ///
    /// # Errors
    /// `Invalid` when the bytes are not frames with a content of this size.
    pub fn decode(&mut self, frames: &[u8], plain: usize) -> Result<Vec<u8>> {
        let wrong = |problem: &dyn std::fmt::Display| Error::Invalid(format!("as a zstd frame, {problem}"));
        let mut content = Vec::with_capacity(plain);
        let decoded =
            self.context.decompress_to_buffer(frames, &mut content).map_err(|error| wrong(&error))?;
        if decoded == plain {
            Ok(content)
        } else {
            Err(wrong(&format!("it has {decoded} bytes, not {plain}")))
        }
    }
}

impl std::fmt::Debug for FrameDecoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FrameDecoder").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compression::{CHUNK_BYTES, Encoder, stored_frame, test_bytes};

    #[test]
    fn a_frame_decodes_to_its_content_and_to_nothing_else() {
        let mut decoder = FrameDecoder::new().unwrap();
        let noise = test_bytes(CHUNK_BYTES, 3);
        let text: Vec<u8> = noise.iter().map(|byte| byte % 5).collect();
        for plain in [&noise[..], &text, &text[..1], &[]] {
            let (mut packed, mut stored) = (vec![], vec![]);
            Encoder::new(3).unwrap().frames(plain, &mut packed).unwrap();
            stored_frame(plain, &mut stored);
            for frame in [&packed, &stored] {
                assert_eq!(decoder.decode(frame, plain.len()).unwrap(), plain);
                assert!(decoder.decode(frame, plain.len() + 1).is_err());
                assert!(decoder.decode(&frame[..frame.len() - 1], plain.len()).is_err());
            }
            assert!(plain.is_empty() || decoder.decode(&packed, plain.len() - 1).is_err());
        }
        assert!(decoder.decode(b"garbage", 7).is_err());
    }
}
