//! The header of a zstd frame: its magic number, and the window that decoding the frame needs (RFC 8878, 3.1.1.1).

/// Logarithm of the largest window: 8 MiB, which every decoder must grant and which is the most that clients' levels
/// use.
pub const WINDOW_MAX_LOG: u32 = 23;

/// The largest window in bytes.
pub(super) const WINDOW_MAX_BYTES: u64 = 1 << WINDOW_MAX_LOG;

/// Longest frame header, without the optional content size where the window is known without it: magic number,
/// descriptor, dictionary, size.
pub(super) const HEAD_MAX_BYTES: usize = 4 + 1 + 4 + 8;

/// Magic number of a frame, in wire order.
pub(super) const FRAME_MAGIC: [u8; 4] = 0xFD2F_B528u32.to_le_bytes();
/// Magic number of a skippable frame; the lower four bits of the first byte are free.
pub(super) const SKIPPABLE_MAGIC: [u8; 4] = 0x184D_2A50u32.to_le_bytes();

/// Whether an accepted frame starts with these bytes.
pub fn is_frame_magic(magic: [u8; 4]) -> bool {
    let [first, rest @ ..] = magic;
    let [skippable, after @ ..] = SKIPPABLE_MAGIC;
    magic == FRAME_MAGIC || (first & 0xF0 == skippable && rest == after)
}

/// The window of the frame that starts with these bytes. `None` if the bytes are too few to tell or start a skippable
/// frame (RFC 8878, 3.1.1.1).
pub(super) fn window(head: &[u8]) -> Option<u64> {
    let (magic, head) = head.split_first_chunk::<4>()?;
    let (&descriptor, head) = head.split_first()?;
    if *magic != FRAME_MAGIC {
        return None;
    }
    let is_single_segment = descriptor & 0x20 != 0;
    if !is_single_segment {
        let &window = head.first()?;
        let (exponent, mantissa) = (window >> 3, u64::from(window & 7));
        let base = 1u64 << (10 + exponent);
        return Some(base + base / 8 * mantissa);
    }
    // In a single-segment frame the content is the window. Its size follows the dictionary id.
    let dictionary = [0, 1, 2, 4].get(usize::from(descriptor & 3))?;
    let length = 1 << (descriptor >> 6);
    let size = head.get(*dictionary..*dictionary + length)?;
    let value = size.iter().rev().fold(0u64, |value, &byte| value << 8 | u64::from(byte));
    Some(if length == 2 { value + 256 } else { value })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_of_a_frame_is_read_from_its_header() {
        for size in [0, 1, 255, 256, 257, 65_791, 65_792, 1_000_000] {
            let frame = zstd::bulk::compress(&vec![7; size], 1).unwrap();
            let is_single_segment = frame[4] & 0x20 != 0;
            assert!(!is_single_segment || window(&frame) == Some(size as u64), "{size}");
            assert!(window(&frame).is_some_and(|window| window >= 1 << 10 || is_single_segment));
        }
        // The largest window that a header can express, and a single segment larger than 2^63 bytes.
        assert_eq!(window(&[&FRAME_MAGIC[..], &[0, 0xFF]].concat()), Some((1 << 41) / 8 * 15));
        assert_eq!(window(&[&FRAME_MAGIC[..], &[0xE0], &[0xFF; 8]].concat()), Some(u64::MAX));
    }
}
