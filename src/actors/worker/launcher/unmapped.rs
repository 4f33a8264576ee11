//! Measures files in memory, whether or not a process maps them: the private /tmp and /dev/shm of a cell, including
//! files that were removed while they are open, and anonymous files (memfd).

use rustix::fs::{AtFlags, RawDir, SeekFrom, readlinkat, seek, stat, statat, statfs};
use std::{
    collections::HashMap,
    ffi::OsStr,
    fs::{self, File},
    mem::MaybeUninit,
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    path::PathBuf,
};

/// The measurement is skipped if all files in the memory of the machine together take less than the limit divided by
/// this.
const UNNOTICED: u64 = 4;
/// Maximum number of open files that one measurement looks at. The next one continues after them, so a command with
/// many open files does not slow the measurements down.
const MAX_LOOKED_AT: usize = 1_000;
/// Maximum number of anonymous files that are remembered.
const MAX_FOUND: usize = 20_000;
/// File system type of a tmpfs.
const TMPFS: i64 = 0x0102_1994;
/// The unit of `st_blocks` in bytes.
const BLOCK: u64 = 512;
/// How the kernel names an anonymous file in memory.
const MEMFD: &[u8] = b"/memfd:";

/// The files in memory that the processes of a command have.
#[derive(Debug, Default)]
pub(super) struct FilesInMemory {
    /// The bytes in the private /tmp and /dev/shm.
    mounted: u64,
    /// The anonymous files that were open in this or the previous round, by device and inode. A round looks at
    /// each open file once.
    anonymous: HashMap<(u64, u64), Found>,
    round: u64,
    next: SearchPosition,
}

#[derive(Debug)]
struct Found {
    /// An open file in /proc that leads to it.
    link: PathBuf,
    bytes: u64,
    round: u64,
}

/// A process, and a position in its directory of open files. The processes are in the order of their ids.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct SearchPosition {
    process: u32,
    cookie: u64,
}

impl FilesInMemory {
    /// Measures the files that `processes` have. Those of them that are in a cell are also in `in_cell`. `limit` is the
    /// limit of the memory in bytes; files of up to a quarter of it may go unnoticed.
    pub(super) fn measure(&mut self, processes: &[u32], in_cell: &[u32], limit: u64) {
        let all = fs::read_to_string("/proc/meminfo").ok().and_then(|text| shared(&text));
        if all.is_some_and(|all| all < limit / UNNOTICED) {
            *self = Self::default();
            return;
        }
        let mounts = ["tmp", "dev/shm"].iter();
        // All processes of a cell see the same mounts. The first of them may have ended.
        let used = mounts.filter_map(|mount| in_cell.iter().find_map(|process| used(*process, mount)));
        self.mounted = used.fold(0, u64::saturating_add);
        self.search(processes, MAX_LOOKED_AT);
    }

    /// The bytes of these files. Some anonymous files may have been closed since they were found.
    pub(super) fn bytes(&self) -> u64 {
        self.anonymous.values().map(|file| file.bytes).fold(self.mounted, u64::saturating_add)
    }

    /// Forgets anonymous files that were closed since they were found.
    pub(super) fn forget_closed(&mut self) {
        self.anonymous.retain(|id, file| {
            let now = fs::metadata(&file.link).ok().filter(|now| (now.dev(), now.ino()) == *id);
            file.bytes = now.as_ref().map_or(0, |now| now.blocks().saturating_mul(BLOCK));
            now.is_some()
        });
    }

    /// Looks at the next `most` open files of these processes.
    fn search(&mut self, processes: &[u32], most: usize) {
        let mut processes = processes.to_vec();
        processes.sort_unstable();
        let mut left = most;
        let start = self.next;
        for process in processes.into_iter().skip_while(|process| *process < start.process) {
            let cookie = if process == start.process { start.cookie } else { 0 };
            if let Some(next) = self.search_in(SearchPosition { process, cookie }, &mut left) {
                self.next = next;
                return;
            }
        }
        self.anonymous.retain(|_, file| file.round == self.round);
        self.round += 1;
        self.next = SearchPosition::default();
    }

    /// Looks at up to `left` open files of one process. Returns where it stopped if there may be more.
    fn search_in(&mut self, from: SearchPosition, left: &mut usize) -> Option<SearchPosition> {
        let path = PathBuf::from(format!("/proc/{}/fd", from.process));
        let mut at = from;
        // To open the directory counts too, because there may be many processes.
        let Some(fewer) = left.checked_sub(1) else { return Some(at) };
        *left = fewer;
        let directory = File::open(&path).ok()?;
        seek(&directory, SeekFrom::Start(from.cookie)).ok()?;
        let mut space = [MaybeUninit::uninit(); 8192];
        let mut entries = RawDir::new(&directory, &mut space);
        while let Some(Ok(entry)) = entries.next() {
            let Some(fewer) = left.checked_sub(1) else { return Some(at) };
            *left = fewer;
            at.cookie = entry.next_entry_cookie();
            let name = entry.file_name();
            let target = readlinkat(&directory, name, Vec::new());
            if !target.is_ok_and(|target| target.as_bytes().starts_with(MEMFD)) {
                continue;
            }
            let Ok(file) = statat(&directory, name, AtFlags::empty()) else { continue };
            let id = (file.st_dev, file.st_ino);
            if self.anonymous.len() < MAX_FOUND || self.anonymous.contains_key(&id) {
                let bytes = u64::try_from(file.st_blocks).unwrap_or(0).saturating_mul(BLOCK);
                let link = path.join(OsStr::from_bytes(name.to_bytes()));
                self.anonymous.insert(id, Found { link, bytes, round: self.round });
            }
        }
        None
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, memfd_create};
    use std::{io::Write as _, sync::Mutex};

    /// A test with a large file.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

    /// Other tests of this process may have such files too, but no large ones.
    const LARGE: u64 = 32 << 20;

    fn large() -> File {
        let mut file = File::from(memfd_create("bomb", MemfdFlags::CLOEXEC).unwrap());
        file.write_all(&vec![1; 32 << 20]).unwrap();
        file
    }

    #[test]
    fn an_anonymous_file_counts_once_however_often_it_is_open() {
        let _one_at_a_time = ONE_AT_A_TIME.lock();
        let own = std::process::id();
        let file = large();
        let _again = file.try_clone().unwrap();
        let mut files = FilesInMemory::default();
        files.search(&[own, own], usize::MAX);
        assert!((LARGE..LARGE * 2).contains(&files.bytes()), "{}", files.bytes());
        files.measure(&[own], &[own], u64::MAX);
        assert_eq!(files.bytes(), 0, "too little to matter");
        while files.round == 0 {
            files.measure(&[own], &[own], 0);
        }
        assert!(files.bytes() >= LARGE, "{}", files.bytes());
        assert_eq!(used(own, "tmp"), None, "this process is in no cell");
    }

    #[test]
    fn a_search_is_bounded_and_the_next_one_continues() {
        let _one_at_a_time = ONE_AT_A_TIME.lock();
        let own = std::process::id();
        // The large file has the last descriptor.
        let _others: Vec<File> = (0..100).map(|_| File::open("/dev/null").unwrap()).collect();
        let file = large();
        let mut files = FilesInMemory::default();
        let mut searches = 0;
        while files.round == 0 {
            files.search(&[own], 10);
            searches += 1;
            assert!(searches < 1_000, "the search makes no progress");
        }
        assert!(searches >= 10 && files.bytes() >= LARGE, "{searches}: {}", files.bytes());
        files.search(&[own], 10);
        assert!(files.bytes() >= LARGE, "it still counts while the next round has not come to it");
        drop(file);
        files.forget_closed();
        assert!(files.bytes() < LARGE, "it was closed");
    }

    #[test]
    fn the_files_in_the_memory_of_the_machine_are_known() {
        assert_eq!(shared("MemTotal:  9 kB\nShmem:      12 kB\nShmemHugePages: 1 kB\n"), Some(12 * 1024));
        assert!(shared(&fs::read_to_string("/proc/meminfo").unwrap()).is_some());
    }
}
