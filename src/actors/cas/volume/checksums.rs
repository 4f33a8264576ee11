//! [`Checksums`]: a CRC-32C of each block of a file. Pure.
//!
//! They are made from the same bytes as the full digest, so they replace it as long as the disk makes only accidental
//! errors. They are checked at many GB/s, while a thread computes SHA-256 at 1 to 2 GB/s.

use std::io;

/// Each block of this many bytes has a checksum. The last block of a file may be shorter.
pub(crate) const BLOCK_BYTES: usize = 64 * 1024;

/// The checksums of the blocks of one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Checksums {
    size: u64,
    blocks: Vec<u32>,
}

impl Checksums {
    /// The checksums of a file of this size. `None` if their number is not the number of blocks.
    pub(super) fn new(size: u64, blocks: Vec<u32>) -> Option<Self> {
        (blocks.len() as u64 == size.div_ceil(BLOCK_BYTES as u64)).then_some(Self { size, blocks })
    }

    /// The checksums of bytes in memory.
    pub(super) fn of(pieces: &[impl AsRef<[u8]>]) -> Self {
        let mut builder = ChecksumBuilder::default();
        pieces.iter().for_each(|piece| builder.update(piece.as_ref()));
        builder.finish()
    }

    /// The bytes of the file.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// The checksum of each block, in order.
    pub(super) fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Checks whole blocks of the file, beginning with the block at `offset`. The last one may be the shorter block at
    /// the end of the file.
    ///
    /// # Errors
    /// `InvalidData`, which names the first bad block. The file counts as lost.
    pub(super) fn check(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let first = offset / BLOCK_BYTES as u64;
        let sums = usize::try_from(first).ok().and_then(|first| self.blocks.get(first..)).unwrap_or_default();
        let blocks = bytes.chunks(BLOCK_BYTES);
        let bad = if sums.len() < blocks.len() {
            Some(sums.len())
        } else {
            blocks.zip(sums).position(|(block, sum)| crc32c::crc32c(block) != *sum)
        };
        match bad {
            None => Ok(()),
            Some(bad) => {
                let at = (first + bad as u64) * BLOCK_BYTES as u64;
                Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("the checksum of its block at byte {at} is wrong"),
                ))
            }
        }
    }
}

/// Computes the [`Checksums`] of bytes that arrive in pieces.
#[derive(Debug, Clone, Default)]
pub(crate) struct ChecksumBuilder {
    size: u64,
    blocks: Vec<u32>,
    /// The checksum of the last block, which is not full.
    sum: u32,
    filled: usize,
}

impl ChecksumBuilder {
    /// Adds the next bytes.
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.size += bytes.len() as u64;
        let mut rest = bytes;
        while !rest.is_empty() {
            let (part, after) = rest.split_at(rest.len().min(BLOCK_BYTES - self.filled));
            self.sum = crc32c::crc32c_append(self.sum, part);
            self.filled += part.len();
            rest = after;
            if self.filled == BLOCK_BYTES {
                self.blocks.push(std::mem::take(&mut self.sum));
                self.filled = 0;
            }
        }
    }

    /// The checksums of all bytes.
    pub(crate) fn finish(mut self) -> Checksums {
        if self.filled > 0 {
            self.blocks.push(self.sum);
        }
        Checksums { size: self.size, blocks: self.blocks }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_do_not_depend_on_the_pieces_and_find_every_changed_block() {
        let bytes: Vec<u8> = (0..3 * BLOCK_BYTES as u32 + 5).map(|at| (at % 251) as u8).collect();
        let sums = Checksums::of(&[&bytes]);
        assert_eq!((sums.size(), sums.blocks().len()), (bytes.len() as u64, 4));
        for pieces in [1_000, BLOCK_BYTES - 1, BLOCK_BYTES, 2 * BLOCK_BYTES + 1] {
            assert_eq!(Checksums::of(&bytes.chunks(pieces).collect::<Vec<_>>()), sums);
        }
        assert!(sums.check(0, &bytes).is_ok());
        assert!(sums.check(2 * BLOCK_BYTES as u64, &bytes[2 * BLOCK_BYTES..]).is_ok());
        for (at, block) in [(0, 0), (BLOCK_BYTES, 1), (3 * BLOCK_BYTES + 4, 3)] {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            let error = sums.check(0, &changed).unwrap_err();
            assert!(error.to_string().contains(&(block * BLOCK_BYTES).to_string()), "{error}");
        }
        assert!(sums.check(0, &bytes[..bytes.len() - 1]).is_err(), "the last block is too short");
        assert!(
            sums.check(0, &[&bytes[..], &[0; BLOCK_BYTES]].concat()).is_err(),
            "there are too many blocks"
        );
        assert_eq!(Checksums::of(&[b""; 0]).blocks(), [0u32; 0]);
    }
}
