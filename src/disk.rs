//! The free space of a file system, and when it counts as full. Pure, except for [`Space::of`], [`Space::of_file`] and
//! [`Space::from_kernel`].
//!
//! The server cannot observe that a write of another process failed for lack of space. It can only sample how much
//! space is free. A disk with less free space than its [`Reserve`] counts as full. Two cases are missed: a write that
//! fails although more than the reserve is free (a large allocation, a quota), and a disk that is full only between two
//! samples.

use crate::size::Size;
use std::{io, path::Path, time::Duration};

/// The reserve is the disk size divided by this, within the limits below.
const RESERVE_PART: u64 = 1_024;
/// A write that does not fit fills the disk before it fails, so a larger reserve would not detect more failures.
const MAX_RESERVE_BYTES: u64 = 4 << 20;
/// A failed write may leave a few blocks free.
const MIN_RESERVE_BYTES: u64 = 16 << 10;
/// Largest reserve of inodes.
const MAX_RESERVE_INODES: u64 = 1_024;
/// Smallest reserve of inodes.
const MIN_RESERVE_INODES: u64 = 8;
/// With this many reserves free, new work may start.
const ROOM: u64 = 2;
/// With fewer reserves free, the store evicts before writes fail.
const LOW: u64 = 64;
/// The number of reserves that an eviction frees, if the disk is low or full.
const RELIEF: u64 = 256;
/// The space to free is at most the disk size divided by this, and so is the margin of a store.
const RELIEF_DISK_PART: u64 = 4;
/// The number of reserves that the limit of a store leaves free: more than [`LOW`], so that a store at its limit does
/// not make the disk low, although the space that others take changes a little.
const STORE_MARGIN: u64 = 2 * LOW;
/// One eviction frees at most the store's size divided by this, unless less than [`ROOM`] would then be free.
const RELIEF_PART: u64 = 4;

/// With less free space, the disk could fill up between two slow samples.
const NEAR_BYTES: u64 = 1 << 30;
/// The same threshold for inodes.
const NEAR_INODES: u64 = 100_000;
/// Sampling intervals for a disk that is nearly full, could soon be full, or has plenty of space. A sample takes some
/// microseconds. Compilers delete the files that they could not finish, so a full disk may have free space again very
/// soon.
const PACE_LOW: Duration = Duration::from_millis(1);
const PACE_NEAR: Duration = Duration::from_millis(5);
const PACE_FAR: Duration = Duration::from_millis(100);

/// The `f_type` of ext2, ext3 and ext4.
const EXT4: i64 = 0xEF53;
/// Blocks that ext4 reserves even from root, unless two per cent of the disk is less.
const EXT4_KEPT_BLOCKS: u64 = 4_096;

/// How much of a budget things on disk take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BudgetUse {
    /// How many there are.
    pub count: u64,
    /// The bytes that they take.
    pub bytes: u64,
    /// The most bytes that they may take.
    pub max_bytes: u64,
}

/// The free space of a file system at one moment, for this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Bytes that this process can write.
    pub free_bytes: u64,
    /// Size of the file system in bytes; 0 if unknown.
    pub total_bytes: u64,
    /// Number of files that can be created.
    pub free_inodes: u64,
    /// Largest number of files; 0 if the file system has no limit.
    pub total_inodes: u64,
}

/// The free space below which a disk counts as full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reserve {
    pub bytes: u64,
    pub inodes: u64,
}

/// Whether a call failed because a disk is full, or because of a quota.
pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// The content of a store on a file system, as far as it can be evicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Evictable {
    /// Total size of the evictable entries in bytes.
    pub bytes: u64,
    /// Number of evictable entries.
    pub entries: u64,
    /// Total size of the files that are already being deleted.
    pub deleting: u64,
}

/// The amount that a store should evict.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Relief {
    /// Smallest number of bytes to evict.
    pub bytes: u64,
    /// Smallest number of entries to evict.
    pub entries: u64,
}

impl Space {
    /// Samples the file system that contains `path`. Blocks.
    ///
    /// # Errors
    /// The errors of statfs(2).
    pub fn of(path: &Path) -> io::Result<Self> {
        Ok(Self::from_kernel(&rustix::fs::statfs(path)?))
    }

    /// Samples the file system that contains an open file. Blocks.
    ///
    /// # Errors
    /// The errors of fstatfs(2).
    pub fn of_file(file: &std::fs::File) -> io::Result<Self> {
        Ok(Self::from_kernel(&rustix::fs::fstatfs(file)?))
    }

    #[allow(clippy::unnecessary_cast, clippy::useless_conversion)]
    fn from_kernel(stat: &rustix::fs::StatFs) -> Self {
        let block = if stat.f_frsize > 0 { stat.f_frsize as u64 } else { stat.f_bsize as u64 };
        let (total, free, available) = (stat.f_blocks as u64, stat.f_bfree as u64, stat.f_bavail as u64);
        let blocks = if stat.f_type as i64 == EXT4 && rustix::process::geteuid().is_root() {
            available_to_root(total, free, available)
        } else {
            available
        };
        Self {
            free_bytes: blocks.saturating_mul(block),
            total_bytes: total.saturating_mul(block),
            free_inodes: stat.f_ffree as u64,
            total_inodes: stat.f_files as u64,
        }
    }

    /// The reserve of this disk; zero where the file system has no limit.
    pub fn reserve(&self) -> Reserve {
        let part = |total: u64, min: u64, max: u64| match total {
            0 => 0,
            total => (total / RESERVE_PART).clamp(min, max),
        };
        Reserve {
            bytes: part(self.total_bytes, MIN_RESERVE_BYTES, MAX_RESERVE_BYTES),
            inodes: part(self.total_inodes, MIN_RESERVE_INODES, MAX_RESERVE_INODES),
        }
    }

    /// Bytes that the limit of a store leaves free; zero if the size of the file system is unknown.
    pub(crate) fn store_margin(&self) -> u64 {
        (self.reserve().bytes * STORE_MARGIN).min(self.total_bytes / RELIEF_DISK_PART)
    }

    /// The most bytes that a store could take on this disk if nothing else were there; `u64::MAX` if its size is not
    /// known.
    pub(crate) fn most_for_store(&self) -> u64 {
        if self.total_bytes == 0 { u64::MAX } else { self.total_bytes.saturating_sub(self.store_margin()) }
    }

    /// Whether the disk counts as full.
    pub fn is_exhausted(&self) -> bool {
        !self.has(1)
    }

    /// Whether there is enough space to start new work. The threshold is higher than that of [`Space::is_exhausted`],
    /// so that the two do not alternate.
    pub fn has_room(&self) -> bool {
        self.has(ROOM)
    }

    /// Whether the store should evict to keep space free.
    pub fn is_low(&self) -> bool {
        !self.has(LOW)
    }

    /// Whether so much more space is free than `before` that a failed write may now succeed.
    pub fn has_more_than(&self, before: &Self) -> bool {
        let Reserve { bytes, inodes } = self.reserve();
        let has_more =
            |now: u64, then: u64, reserve: u64| reserve > 0 && now >= then.saturating_add(reserve * ROOM);
        has_more(self.free_bytes, before.free_bytes, bytes)
            || has_more(self.free_inodes, before.free_inodes, inodes)
    }

    /// The interval until the next sample.
    pub fn pace(&self) -> Duration {
        let few_inodes = self.total_inodes > 0 && self.free_inodes < NEAR_INODES;
        if self.is_low() {
            PACE_LOW
        } else if self.free_bytes < NEAR_BYTES || few_inodes {
            PACE_NEAR
        } else {
            PACE_FAR
        }
    }

    /// What a store on this disk should evict so that [`RELIEF`] reserves are free. It is at most a fraction of the
    /// store, unless new work still could not start. `None` when nothing is needed, or when even half of the store
    /// would not help, because then something else fills the disk.
    pub fn relief(&self, store: &Evictable) -> Option<Relief> {
        let Reserve { bytes, inodes } = self.reserve();
        let free = self.free_bytes.saturating_add(store.deleting);
        let share = |reserve: u64, total: u64, free: u64, held: u64| {
            let short_of = (reserve * RELIEF).min(total / RELIEF_DISK_PART).saturating_sub(free);
            let needed = (reserve * ROOM).saturating_sub(free);
            let share = short_of.min(held / RELIEF_PART);
            // An eviction that makes no difference is not worth the lost entries.
            let share = if share < reserve * ROOM { 0 } else { share };
            (needed <= held / 2).then(|| needed.max(share))
        };
        let relief = Relief {
            bytes: share(bytes, self.total_bytes, free, store.bytes)?,
            entries: share(inodes, self.total_inodes, self.free_inodes, store.entries)?,
        };
        (relief.bytes > 0 || relief.entries > 0).then_some(relief)
    }

    fn has(&self, reserves: u64) -> bool {
        let Reserve { bytes, inodes } = self.reserve();
        self.free_bytes >= bytes * reserves && self.free_inodes >= inodes * reserves
    }
}

impl std::fmt::Display for Space {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [free, total] =
            [self.free_bytes, self.total_bytes].map(|bytes| Size::from_bytes(bytes).rounded());
        write!(f, "{free} of {total}")?;
        if self.total_inodes > 0 {
            write!(f, " and {} of {} inodes", self.free_inodes, self.total_inodes)?;
        }
        f.write_str(" were free")
    }
}

/// Blocks that root can write on ext4. It reserves some from everyone and, usually, five per cent from other users.
fn available_to_root(total: u64, free: u64, available: u64) -> u64 {
    if free == available { free } else { free.saturating_sub(EXT4_KEPT_BLOCKS.min(total / 50)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn disk(total_bytes: u64, free_bytes: u64) -> Space {
        Space { free_bytes, total_bytes, free_inodes: 1_000_000, total_inodes: 2_000_000 }
    }

    #[test]
    fn a_disk_is_full_below_its_reserve_of_bytes_or_inodes() {
        for (total, reserve) in [(24 * MIB, 24 * 1024), (1 << 40, 4 * MIB)] {
            assert_eq!(disk(total, 0).reserve().bytes, reserve);
            assert!(disk(total, reserve - 1).is_exhausted());
            assert!(!disk(total, reserve).is_exhausted() && !disk(total, reserve).has_room());
            assert!(disk(total, 2 * reserve).has_room() && disk(total, 2 * reserve).is_low());
            assert!(!disk(total, 64 * reserve).is_low());
        }
        let inodes =
            |free_inodes, total_inodes| Space { free_inodes, total_inodes, ..disk(1 << 40, 1 << 39) };
        assert!(inodes(0, 1_000_000).is_exhausted() && inodes(975, 1_000_000).is_exhausted());
        assert!(!inodes(976, 1_000_000).is_exhausted());
        assert!(!inodes(0, 0).is_exhausted(), "no limit, as on btrfs");
        assert!(inodes(7, 100).is_exhausted() && disk(1 << 20, 8_192).is_exhausted(), "however small it is");
        assert!(!disk(0, 0).is_exhausted(), "nothing is known, as on some FUSE file systems");
    }

    #[test]
    fn a_disk_that_could_fill_up_soon_is_looked_at_more_often() {
        let paces = [MIB, 300 * MIB, 1 << 39].map(|free| disk(1 << 40, free).pace());
        assert!(paces[0] < paces[1] && paces[1] < paces[2], "{paces:?}");
        assert!(Space { free_inodes: 10, ..disk(1 << 40, 1 << 39) }.pace() < disk(1 << 40, 1 << 39).pace());
    }

    #[test]
    fn a_store_gives_what_helps_and_nothing_where_nothing_helps() {
        let large = Evictable { bytes: 1 << 36, entries: 1_000_000, deleting: 0 };
        let full = disk(1 << 40, 0);
        assert_eq!(full.relief(&large), Some(Relief { bytes: 1024 * MIB, entries: 0 }));
        let deleting = Evictable { deleting: 1000 * MIB, ..large };
        assert_eq!(full.relief(&deleting), Some(Relief { bytes: 24 * MIB, entries: 0 }));
        assert_eq!(disk(1 << 40, 1 << 30).relief(&large), None, "there is enough");
        // At most a quarter of a small store is evicted, or what is needed to start new work.
        let small = |bytes| Evictable { bytes, entries: 100, deleting: 0 };
        assert_eq!(full.relief(&small(80 * MIB)), Some(Relief { bytes: 20 * MIB, entries: 0 }));
        assert_eq!(full.relief(&small(16 * MIB)), Some(Relief { bytes: 8 * MIB, entries: 0 }));
        assert_eq!(full.relief(&small(15 * MIB)), None, "the store is not what fills the disk");
        let some = disk(1 << 40, 500 * MIB);
        assert_eq!(some.relief(&small(400 * MIB)), Some(Relief { bytes: 100 * MIB, entries: 0 }));
        assert_eq!(some.relief(&small(20 * MIB)), None, "what it has makes no difference");
        let few = Space { free_inodes: 0, ..disk(1 << 40, 1 << 39) };
        assert_eq!(few.relief(&large), Some(Relief { bytes: 0, entries: 250_000 }));
        assert_eq!(few.relief(&small(MIB)), None);
    }

    #[test]
    fn people_are_told_of_a_disk_in_units() {
        assert_eq!(
            disk(1_500_000_000_000, 2_345_678).to_string(),
            "2.3 MB of 1.5 TB and 1000000 of 2000000 inodes were free"
        );
        let without_inodes = Space { total_inodes: 0, ..disk(10_000_000_000, 0) };
        assert_eq!(without_inodes.to_string(), "0 B of 10 GB were free");
    }

    #[test]
    fn more_room_is_more_than_a_little_more() {
        let before = disk(1 << 40, MIB);
        assert!(!disk(1 << 40, 8 * MIB).has_more_than(&before));
        assert!(disk(1 << 40, 9 * MIB).has_more_than(&before));
        let inodes = |free_inodes, total_inodes| Space { free_inodes, total_inodes, ..before };
        assert!(inodes(10_000, 1 << 20).has_more_than(&inodes(0, 1 << 20)));
        assert!(!inodes(0, 0).has_more_than(&inodes(0, 0)));
    }

    #[test]
    fn root_may_write_what_ext4_keeps_from_others_but_not_all() {
        assert_eq!(available_to_root(10_000_000, 600_000, 95_904), 595_904);
        assert_eq!(available_to_root(10_000_000, 4_096, 0), 0);
        assert_eq!(available_to_root(10_000, 200, 0), 0);
        assert_eq!(available_to_root(10_000, 0, 0), 0);
    }
}
