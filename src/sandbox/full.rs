//! Finds the private file systems of a cell that are full. If a write fails because of that, the kernel tells only the
//! program that wrote.

use prost::Message;
use rustix::fs::{StatVfs, statvfs};

/// A file system counts as full if at most one part in this many of its bytes or files is free. A program that finds no
/// room for the rest of a file may leave a little.
const FULL_IF_FREE: u64 = 64;

/// A limit of a private file system that is used up.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct FullMount {
    /// Whether it is /dev/shm; otherwise it is /tmp.
    #[prost(bool, tag = "1")]
    pub is_shm: bool,
    /// Whether the number of files and directories is used up; otherwise it is the bytes.
    #[prost(bool, tag = "2")]
    pub is_files: bool,
    /// How much is in use.
    #[prost(uint64, tag = "3")]
    pub used: u64,
    /// How much there may be.
    #[prost(uint64, tag = "4")]
    pub limit: u64,
}

/// The limits that are used up in the cell of this process.
pub(crate) fn full_mounts() -> Vec<FullMount> {
    let mounts = [("/tmp", false), ("/dev/shm", true)];
    mounts
        .into_iter()
        .filter_map(|(path, is_shm)| Some((is_shm, statvfs(path).ok()?)))
        .flat_map(full)
        .collect()
}

fn full((is_shm, stat): (bool, StatVfs)) -> impl Iterator<Item = FullMount> {
    let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
    // The root directory is not a file of the action.
    let files = |inodes: u64| inodes.saturating_sub(1);
    let of = |is_files, total: u64, free: u64, amount: &dyn Fn(u64) -> u64| {
        // A total of 0 means that there is no limit.
        let is_full = total > 0 && free <= total / FULL_IF_FREE;
        let (used, limit) = (amount(total.saturating_sub(free)), amount(total));
        is_full.then_some(FullMount { is_shm, is_files, used, limit })
    };
    let found =
        [of(false, stat.f_blocks, stat.f_bavail, &bytes), of(true, stat.f_files, stat.f_favail, &files)];
    found.into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::StatVfsMountFlags;

    fn stat(blocks: (u64, u64), files: (u64, u64)) -> StatVfs {
        StatVfs {
            f_bsize: 4096,
            f_frsize: 4096,
            f_blocks: blocks.0,
            f_bfree: blocks.1,
            f_bavail: blocks.1,
            f_files: files.0,
            f_ffree: files.1,
            f_favail: files.1,
            f_fsid: 0,
            f_flag: StatVfsMountFlags::empty(),
            f_namemax: 255,
        }
    }

    #[test]
    fn bytes_and_files_are_used_up_if_hardly_any_are_free() {
        let found = |stat| full((true, stat)).collect::<Vec<_>>();
        let bytes = FullMount { is_shm: true, is_files: false, used: 985 * 4096, limit: 1000 * 4096 };
        assert_eq!(found(stat((1000, 15), (1001, 16))), [bytes]);
        let files = FullMount { is_shm: true, is_files: true, used: 1000, limit: 1000 };
        assert_eq!(found(stat((1000, 16), (1001, 0))), [files]);
        assert_eq!(found(stat((1000, 0), (1001, 0))).len(), 2);
        assert_eq!(found(stat((1000, 16), (1001, 16))), []);
        assert_eq!(found(stat((0, 0), (0, 0))), [], "no limit");
    }
}
