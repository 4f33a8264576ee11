//! Content for blobs: pseudo-random bytes that depend only on a seed.

use bytes::Bytes;

/// A generator of pseudo-random numbers (SplitMix64).
#[derive(Debug, Clone)]
pub(crate) struct Noise(u64);

impl Noise {
    /// A generator whose numbers depend only on this seed.
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// Bytes that do not compress.
    pub(crate) fn bytes(&mut self, length: usize) -> Bytes {
        let mut bytes = Vec::with_capacity(length + 8);
        while bytes.len() < length {
            bytes.extend_from_slice(&self.number().to_le_bytes());
        }
        bytes.truncate(length);
        bytes.into()
    }

    /// Text that zstd compresses to about a third, like source code and object files.
    pub(crate) fn text(&mut self, length: usize) -> Bytes {
        let mut bytes = Vec::with_capacity(length + 32);
        while bytes.len() < length {
            let number = self.number();
            // Two of eight bytes are random, the others are always the same.
            bytes.extend_from_slice(b"struct ");
            bytes.extend_from_slice(format!("{:05x} ", number & 0xF_FFFF).as_bytes());
        }
        bytes.truncate(length);
        bytes.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_depends_on_the_seed_alone() {
        assert_eq!(Noise::new(1).bytes(1000), Noise::new(1).bytes(1000));
        assert_ne!(Noise::new(1).bytes(1000), Noise::new(2).bytes(1000));
        assert_eq!(Noise::new(1).bytes(13).len(), 13);
    }

    #[test]
    fn bytes_do_not_compress_and_text_does() {
        let ratio =
            |content: &[u8]| zstd::bulk::compress(content, 1).unwrap().len() as f64 / content.len() as f64;
        assert!(ratio(&Noise::new(1).bytes(100_000)) > 0.99);
        let text = ratio(&Noise::new(1).text(100_000));
        assert!((0.2..0.5).contains(&text), "{text}");
    }
}
