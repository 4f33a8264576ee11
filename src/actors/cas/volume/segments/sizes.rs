//! [`Sizes`]: the bounds of segments, for the limit of a store. Pure.

/// Larger files are kept as files of their own. Creating a file costs about as much as copying and checking this many
/// bytes.
const LARGEST_FILE_BYTES: u64 = 64 << 10;
/// Smaller stores have no segments, because a few segments would be a large part of them.
const SEGMENTS_FROM_BYTES: u64 = 256 << 20;
/// A segment takes at most this part of the store.
const SEGMENT_PART: u64 = 256;
const MIN_SEGMENT_BYTES: u64 = 1 << 20;
const MAX_SEGMENT_BYTES: u64 = 64 << 20;
/// The part of the store, and of the bytes in segments, that may be dead.
const WASTE_PART_OF_STORE: u64 = 10;
const WASTE_PART_OF_SEGMENTS: u64 = 5;

/// The bounds of the segments of a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sizes {
    /// The largest file that is kept in a segment.
    pub(super) largest_file: u64,
    /// Most bytes of the records of a segment, unless a single file is larger.
    pub(super) segment: u64,
    /// The most bytes that may be dead.
    pub(super) waste: u64,
}

impl Sizes {
    /// The bounds in a store with this limit in bytes.
    pub(crate) fn of(max_bytes: u64) -> Self {
        let largest_file = if max_bytes < SEGMENTS_FROM_BYTES { 0 } else { LARGEST_FILE_BYTES };
        let segment = (max_bytes / SEGMENT_PART).clamp(MIN_SEGMENT_BYTES, MAX_SEGMENT_BYTES);
        Self { largest_file, segment, waste: max_bytes / WASTE_PART_OF_STORE }
    }

    /// Small bounds, so that a test fills, closes and compacts many segments.
    #[cfg(test)]
    pub(in crate::actors::cas) fn for_tests(segment: u64, waste: u64) -> Self {
        Self { largest_file: LARGEST_FILE_BYTES, segment, waste }
    }

    /// Whether a file of this size is kept in a segment.
    pub(super) fn fits(&self, size: u64) -> bool {
        self.largest_file > 0 && size <= self.largest_file
    }

    /// Bytes that may be dead while segments take this much.
    pub(super) fn waste_allowed(&self, disk: u64) -> u64 {
        self.waste.min(disk / WASTE_PART_OF_SEGMENTS)
    }

    /// Whether the dead bytes should be reclaimed in the background, and whether that is urgent.
    pub(super) fn verdict(&self, disk: u64, dead: u64) -> Verdict {
        let allowed = self.waste_allowed(disk);
        match dead {
            // A copy takes room before the original is removed.
            dead if dead.saturating_add(self.segment) > allowed.max(2 * self.segment) => Verdict::Urgent,
            dead if dead > allowed / 2 => Verdict::Worthwhile,
            _ => Verdict::Fine,
        }
    }
}

/// The action that the dead bytes require.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Verdict {
    Fine,
    Worthwhile,
    Urgent,
}
