//! [`SeekTable`]: which bytes of the blob each frame of a stored stream holds.
//!
//! On disk the table is the last frame of the stream: a skippable frame in zstd's seekable format, so any tool can read
//! a stored stream as a `.zst` file. When a table is read back, only its arithmetic is checked. A mismatch with the
//! frames shows when they are decoded.

use crate::error::{Error, Result};
use std::ops::Range;

/// Length of the end of a table: number of frames, descriptor, magic number.
pub const TABLE_END_BYTES: usize = 9;
const ENTRY_BYTES: usize = 8;
const HEADER_BYTES: usize = 8;
const HEADER_MAGIC: u32 = 0x184D_2A5E;
const END_MAGIC: u32 = 0x8F92_EAB1;
/// This descriptor means that entries have no checksums.
const DESCRIPTOR: u8 = 0;
/// Largest number of frames in a stream. A 16 TiB blob would have as many, and a table of 512 MiB.
const FRAMES_MAX: usize = 1 << 26;

/// The positions of the frames of a stream; see the top of this file.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SeekTable {
    /// End of each frame, in the blob and in the stream.
    ends: Vec<(u64, u64)>,
}

impl SeekTable {
    /// Adds a frame that holds `plain` bytes of the blob in `packed` bytes of the stream.
    ///
    /// # Errors
    /// `Internal` for a frame whose sizes or number the format cannot represent.
    pub fn push(&mut self, plain: u64, packed: u64) -> Result<()> {
        if plain > u32::MAX.into() || packed > u32::MAX.into() || self.ends.len() >= FRAMES_MAX {
            return Err(Error::internal("a frame does not fit in the table of its stream"));
        }
        let (plain_end, packed_end) = self.sizes();
        self.ends.push((plain_end.saturating_add(plain), packed_end.saturating_add(packed)));
        Ok(())
    }

    /// Size of the blob and of all frames (without the table), in bytes.
    pub fn sizes(&self) -> (u64, u64) {
        self.ends.last().copied().unwrap_or_default()
    }

    /// The first frame that starts at or after `offset` of the blob, as its positions in the blob and in the stream. If
    /// there is none, the ends of the blob and of the stream.
    pub fn frame_from(&self, offset: u64) -> (u64, u64) {
        if offset == 0 {
            return (0, 0);
        }
        // A frame starts where the previous one ends.
        let at = self.ends.partition_point(|(plain, _)| *plain < offset);
        self.ends.get(at).copied().unwrap_or_else(|| self.sizes())
    }

    /// The size of each frame in the blob and in the stream.
    pub fn frames(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let starts = std::iter::once(&(0, 0)).chain(&self.ends);
        self.ends.iter().zip(starts).map(|(end, start)| (end.0 - start.0, end.1 - start.1))
    }

    /// The number of frames.
    pub fn count(&self) -> usize {
        self.ends.len()
    }

    /// Where a frame lies, in the blob and in the stream; `None` if there are fewer frames.
    pub fn frame(&self, number: usize) -> Option<(Range<u64>, Range<u64>)> {
        let end = self.ends.get(number)?;
        let start =
            number.checked_sub(1).and_then(|before| self.ends.get(before)).copied().unwrap_or_default();
        Some((start.0..end.0, start.1..end.1))
    }

    /// The number of the frame that holds the byte at `offset` of the blob; `None` at its end.
    pub fn holding(&self, offset: u64) -> Option<usize> {
        let number = self.ends.partition_point(|(plain, _)| *plain <= offset);
        (number < self.ends.len()).then_some(number)
    }

    /// The number of the frame that has the byte at `offset` of the stream; `None` at the end of all frames.
    pub fn covering(&self, offset: u64) -> Option<usize> {
        let number = self.ends.partition_point(|(_, packed)| *packed <= offset);
        (number < self.ends.len()).then_some(number)
    }

    /// Encodes the table as the last frame of its stream.
    pub fn encode(&self) -> Vec<u8> {
        let content = self.ends.len() * ENTRY_BYTES + TABLE_END_BYTES;
        let mut frame = Vec::with_capacity(HEADER_BYTES + content);
        frame.extend(HEADER_MAGIC.to_le_bytes());
        frame.extend((content as u32).to_le_bytes());
        for (plain, packed) in self.frames() {
            frame.extend((packed as u32).to_le_bytes());
            frame.extend((plain as u32).to_le_bytes());
        }
        frame.extend((self.ends.len() as u32).to_le_bytes());
        frame.push(DESCRIPTOR);
        frame.extend(END_MAGIC.to_le_bytes());
        frame
    }

    /// The length of the table of this many frames.
    pub fn length_for(frames: usize) -> usize {
        HEADER_BYTES + frames * ENTRY_BYTES + TABLE_END_BYTES
    }

    /// The length of the whole table, from its last bytes; `None` if they are not the end of a table.
    pub fn length(end: &[u8; TABLE_END_BYTES]) -> Option<usize> {
        let [a, b, c, d, DESCRIPTOR, magic @ ..] = *end else { return None };
        let frames = usize::try_from(u32::from_le_bytes([a, b, c, d])).ok()?;
        let ours = u32::from_le_bytes(magic) == END_MAGIC && frames <= FRAMES_MAX;
        ours.then(|| Self::length_for(frames))
    }

    /// Reads a whole table; `None` for anything that [`SeekTable::encode`] does not write.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let length = Self::length(bytes.last_chunk()?)?;
        let (header, rest) = bytes.split_first_chunk::<HEADER_BYTES>()?;
        let content = u32::try_from(length - HEADER_BYTES).ok()?;
        if bytes.len() != length
            || header[..4] != HEADER_MAGIC.to_le_bytes()
            || header[4..] != content.to_le_bytes()
        {
            return None;
        }
        let entries = rest.get(..rest.len().checked_sub(TABLE_END_BYTES)?)?;
        let mut table = Self { ends: Vec::with_capacity(entries.len() / ENTRY_BYTES) };
        for entry in entries.chunks_exact(ENTRY_BYTES) {
            let [a, b, c, d, e, f, g, h] = *entry.first_chunk()?;
            let (packed, plain) = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]));
            table.push(plain.into(), packed.into()).ok()?;
        }
        Some(table)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_table_is_read_back_and_finds_frames(frames in proptest::collection::vec((1u32.., 1u32..), 0..50), at in any::<prop::sample::Index>()) {
            let mut table = SeekTable::default();
            for (plain, packed) in &frames {
                table.push((*plain).into(), (*packed).into()).unwrap();
            }
            let bytes = table.encode();
            prop_assert_eq!(SeekTable::decode(&bytes), Some(table.clone()));
            prop_assert_eq!(SeekTable::length(bytes.last_chunk().unwrap()), Some(bytes.len()));
            // A decoder skips the table.
            prop_assert_eq!(crate::compression::decode_all(&bytes, 0), Ok(vec![]));
            let offset = at.index(table.sizes().0 as usize + 1) as u64;
            let mut start = (0, 0);
            for (plain, packed) in table.frames() {
                if start.0 >= offset { break }
                start = (start.0 + plain, start.1 + packed);
            }
            prop_assert_eq!(table.frame_from(offset), start);
            let holding = table.holding(offset).and_then(|number| table.frame(number));
            prop_assert_eq!(holding.is_some(), offset < table.sizes().0);
            if let Some((plain, packed)) = holding {
                prop_assert!(plain.contains(&offset));
                let number = table.holding(offset);
                prop_assert_eq!((table.covering(packed.start), table.covering(packed.end - 1)), (number, number));
            }
            prop_assert_eq!((table.frame(frames.len()), table.covering(table.sizes().1)), (None, None));
        }

        #[test]
        fn other_bytes_are_no_table(mut bytes in proptest::collection::vec(any::<u8>(), 0..100), frames in 0u32..20) {
            prop_assert_eq!(SeekTable::decode(&bytes), None);
            bytes.extend(frames.to_le_bytes());
            bytes.push(0);
            bytes.extend(END_MAGIC.to_le_bytes());
            prop_assert_eq!(SeekTable::decode(&bytes), None);
        }
    }
}
