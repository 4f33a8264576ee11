//! Gives the blocks of dead records back to the file system.

use rustix::fs::{FallocateFlags, fallocate};
use std::{fs::OpenOptions, io, ops::Range, os::unix::fs::OpenOptionsExt as _, path::Path};

/// The size of a hole is a multiple of this. Most file systems have blocks of this size.
pub(super) const HOLE_BYTES: u64 = 4_096;

/// Gives the blocks of these ranges of a file back to the file system. The ranges contain only dead records, which are
/// not read. A full disk may have no other space for the note that these records are dead.
pub(super) fn punch(path: &Path, mut ranges: Vec<Range<u64>>) -> io::Result<()> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = OpenOptions::new().write(true).custom_flags(flags).open(path)?;
    ranges.sort_unstable_by_key(|range| range.start);
    for adjacent in ranges.chunk_by(|one, next| one.end == next.start) {
        let (Some(first), Some(last)) = (adjacent.first(), adjacent.last()) else { continue };
        let (start, end) = (first.start.next_multiple_of(HOLE_BYTES), last.end / HOLE_BYTES * HOLE_BYTES);
        if start < end {
            fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, start, end - start)?;
        }
    }
    Ok(())
}
