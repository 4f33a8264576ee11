//! Measures files in memory, whether or not a process maps them: the private /tmp and /dev/shm of a cell, including
//! files that were removed while they are open, and anonymous files (memfd).

use rustix::fs::{stat, statfs};
use std::{collections::HashSet, fs, os::unix::fs::MetadataExt as _};

/// The measurement is skipped if all files in the memory of the machine together take less than the limit divided by
/// this.
const UNNOTICED: u64 = 4;
/// Maximum number of open files that are inspected in one measurement.
const MAX_INSPECTED: usize = 20_000;
/// File system type of a tmpfs.
const TMPFS: i64 = 0x0102_1994;
/// The unit of `st_blocks` in bytes.
const BLOCK: u64 = 512;
/// How the kernel names an anonymous file in memory.
const MEMFD: &[u8] = b"/memfd:";

/// The bytes of the files in memory that `processes` have. Those of them that are in a cell are also in `in_cell`.
/// `limit` is the limit of the memory in bytes; a small part of it may go unnoticed.
pub(super) fn files_in_memory(processes: &[u32], in_cell: &[u32], limit: u64) -> u64 {
    let all = fs::read_to_string("/proc/meminfo").ok().and_then(|text| shared(&text));
    if all.is_some_and(|all| all < limit / UNNOTICED) {
        return 0;
    }
    ["tmp", "dev/shm"]
        .iter()
        // All processes of a cell see the same mounts. The first of them may have ended.
        .filter_map(|mount| in_cell.iter().find_map(|process| used(*process, mount)))
        .fold(anonymous(processes), u64::saturating_add)
}

/// The bytes in `/proc/meminfo` that all files in memory together take.
fn shared(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("Shmem:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib.saturating_mul(1024))
}

/// The bytes in use in a tmpfs that a process sees at a path; `None` if there is none, or if it is also the host's.
fn used(process: u32, mount: &str) -> Option<u64> {
    let path = format!("/proc/{process}/root/{mount}");
    let (own, host) = (stat(&*path).ok()?, stat(format!("/{mount}")));
    let found = statfs(&*path).ok()?;
    let is_private = host.map_or(true, |host| host.st_dev != own.st_dev);
    let blocks = found.f_blocks.saturating_sub(found.f_bfree);
    let size = u64::try_from(found.f_bsize).unwrap_or(0);
    (is_private && found.f_type == TMPFS).then_some(blocks.saturating_mul(size))
}

/// The bytes of the anonymous files that these processes have open.
fn anonymous(processes: &[u32]) -> u64 {
    let open = processes.iter().filter_map(|process| fs::read_dir(format!("/proc/{process}/fd")).ok());
    let files = open.flatten().flatten().take(MAX_INSPECTED).map(|entry| entry.path());
    let is_anonymous = |path: &std::path::PathBuf| {
        fs::read_link(path).is_ok_and(|name| name.as_os_str().as_encoded_bytes().starts_with(MEMFD))
    };
    let mut seen = HashSet::new();
    let found = files.filter(is_anonymous).filter_map(|path| fs::metadata(path).ok());
    let once = found.filter(|file| seen.insert((file.dev(), file.ino())));
    once.map(|file| file.blocks().saturating_mul(BLOCK)).fold(0, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, memfd_create};
    use std::{fs::File, io::Write as _};

    #[test]
    fn an_anonymous_file_counts_once_however_often_it_is_open() {
        let own = std::process::id();
        let mut file = File::from(memfd_create("bomb", MemfdFlags::CLOEXEC).unwrap());
        file.write_all(&vec![1; 8 << 20]).unwrap();
        let _again = file.try_clone().unwrap();
        let found = anonymous(&[own, own]);
        // Other tests of this process may have such files too.
        assert!(((8 << 20)..(16 << 20)).contains(&found), "{found}");
        assert_eq!(files_in_memory(&[own], &[own], u64::MAX), 0, "too little to matter");
        assert!(files_in_memory(&[own], &[own], 0) >= 8 << 20);
        assert_eq!(used(own, "tmp"), None, "this process is in no cell");
    }

    #[test]
    fn the_files_in_the_memory_of_the_machine_are_known() {
        assert_eq!(shared("MemTotal:  9 kB\nShmem:      12 kB\nShmemHugePages: 1 kB\n"), Some(12 * 1024));
        assert!(shared(&fs::read_to_string("/proc/meminfo").unwrap()).is_some());
    }
}
