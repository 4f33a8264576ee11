//! [`OpenFiles`]: the segments that are open for reading, a bounded number of them.

use std::{
    collections::HashMap,
    fs::File,
    io,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

/// Most segments that are open for reading.
const MAX_OPEN: u64 = 128;
/// The part of the process's descriptors that open segments may use.
const DESCRIPTORS_PART: u64 = 16;

/// Open segments by number. A file stays open until its last reader has finished.
#[derive(Debug)]
pub(super) struct OpenFiles {
    max: usize,
    files: RwLock<HashMap<u64, (Arc<File>, AtomicU64)>>,
    /// Grows with each use of a file, to find the least recently used one.
    clock: AtomicU64,
}

impl OpenFiles {
    /// Keeps as many segments open as the limit of the process allows.
    pub(super) fn new() -> Self {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let max = (limit.unwrap_or(u64::MAX) / DESCRIPTORS_PART).clamp(2, MAX_OPEN);
        Self { max: max as usize, files: RwLock::default(), clock: AtomicU64::new(0) }
    }

    /// The file of a segment. `open` opens it if it is not open. It is not kept open if the segment was removed
    /// meanwhile, because its bytes would stay on disk and count for nothing.
    pub(super) fn get(
        &self,
        number: u64,
        open: impl FnOnce() -> io::Result<File>,
        is_there: impl FnOnce() -> bool,
    ) -> io::Result<Arc<File>> {
        let now = self.clock.fetch_add(1, Relaxed);
        let files = self.files.read().unwrap_or_else(PoisonError::into_inner);
        if let Some((file, used)) = files.get(&number) {
            used.store(now, Relaxed);
            return Ok(file.clone());
        }
        drop(files);
        let file = Arc::new(open()?);
        self.add(number, file.clone());
        if !is_there() {
            self.remove(number);
        }
        Ok(file)
    }

    /// Keeps a file open, and closes the least recently used one if there are too many.
    pub(super) fn add(&self, number: u64, file: Arc<File>) {
        let now = self.clock.fetch_add(1, Relaxed);
        let mut files = self.files.write().unwrap_or_else(PoisonError::into_inner);
        if files.len() >= self.max && !files.contains_key(&number) {
            let oldest =
                files.iter().min_by_key(|(_, (_, used))| used.load(Relaxed)).map(|(number, _)| *number);
            oldest.and_then(|oldest| files.remove(&oldest));
        }
        files.insert(number, (file, AtomicU64::new(now)));
    }

    /// Forgets a segment that is removed.
    pub(super) fn remove(&self, number: u64) {
        self.files.write().unwrap_or_else(PoisonError::into_inner).remove(&number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_removed_while_it_is_opened_is_not_kept_open() {
        let files = OpenFiles::new();
        let open = || File::open("/dev/null");
        let (read, kept) = (files.get(1, open, || false).unwrap(), files.get(2, open, || true).unwrap());
        assert_eq!((Arc::strong_count(&read), Arc::strong_count(&kept)), (1, 2));
    }
}
