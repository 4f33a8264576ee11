//! Writes that survive a power cut: [`GroupCommit`], and the system calls that wait for the disk.
//!
//! With [`SyncPolicy::BeforeAnswer`], the content of a file is on disk before its name, and the name before the index
//! knows the file. One writer at a time syncs for a group of writers. Writers that arrive meanwhile form the next
//! group, so a thousand small uploads at once wait for a few syncs. The content of a large file is synced by its own
//! writer, so that no other writer waits for it.
//!
//! The calls that wait for the disk go through [`sync_file`] and [`sync_directory`]. Tests observe these calls to know
//! what a disk certainly has when its power fails (`simulation`).

use crate::regular_file;
use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError},
};

/// When the store waits for the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SyncPolicy {
    /// Never. Acknowledged entries survive the death of the process. A power cut may lose entries of about the last
    /// half minute, which are then misses.
    #[default]
    Never,
    /// Before it acknowledges an entry. Acknowledged entries survive a power cut as well, if the disk keeps the bytes
    /// that it has reported as written.
    BeforeAnswer,
}

/// Waits until the content of a file is on disk, and its length.
#[expect(clippy::disallowed_methods, reason = "the one place that waits for the content of a file")]
pub(super) fn sync_file(file: &File) -> io::Result<()> {
    #[cfg(test)]
    super::simulation::before_sync_of_file(file)?;
    file.sync_data()
}

/// Replaces a small file as a whole: after a power cut, it has its old content or the new one.
pub(super) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    regular_file::write(&new, bytes)?;
    sync_file(&File::open(&new)?)?;
    fs::rename(&new, path)?;
    path.parent().map_or(Ok(()), sync_directory)
}

/// Waits until everything that was written to the file system of a directory is on disk.
pub(super) fn sync_file_system(path: &Path) -> io::Result<()> {
    #[cfg(test)]
    super::simulation::before_sync_of_all(path)?;
    Ok(rustix::fs::syncfs(File::open(path)?)?)
}

/// Waits until the names in a directory are on disk.
#[expect(clippy::disallowed_methods, reason = "the one place that waits for the names in a directory")]
pub(super) fn sync_directory(path: &Path) -> io::Result<()> {
    #[cfg(test)]
    super::simulation::before_sync_of_directory(path)?;
    File::open(path)?.sync_all()
}

/// The segments and directories that a group syncs.
#[derive(Debug, Default)]
pub(super) struct SyncGroup {
    /// Numbers of the segments to sync.
    pub segments: BTreeSet<u64>,
    /// Directories in which files got their names.
    pub directories: BTreeSet<PathBuf>,
    outcome: Arc<OnceLock<Result<(), Arc<io::Error>>>>,
}

#[derive(Debug, Default)]
struct SyncState {
    /// The group that is being formed.
    next: SyncGroup,
    /// Whether a writer is syncing for an earlier group.
    is_busy: bool,
}

/// Lets writers share their syncs.
#[derive(Debug, Default)]
pub(super) struct GroupCommit {
    state: Mutex<SyncState>,
    ended: Condvar,
}

/// The right to sync for a group. When it is dropped, also by a panic, the next group begins.
struct SyncTurn<'a> {
    commit: &'a GroupCommit,
    outcome: Arc<OnceLock<Result<(), Arc<io::Error>>>>,
}

impl GroupCommit {
    /// Adds to the next group with `add`, and returns once `sync` was called for that group. Blocks.
    ///
    /// # Errors
    /// The errors of `sync`, for each member of the group.
    pub(super) fn join(
        &self,
        add: impl FnOnce(&mut SyncGroup),
        sync: impl Fn(&SyncGroup) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut state = self.state();
        add(&mut state.next);
        let outcome = state.next.outcome.clone();
        loop {
            if let Some(outcome) = outcome.get() {
                return outcome.clone().map_err(|error| io::Error::new(error.kind(), error));
            }
            if state.is_busy {
                state = self.ended.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            state.is_busy = true;
            let group = std::mem::take(&mut state.next);
            drop(state);
            let turn = SyncTurn { commit: self, outcome: group.outcome.clone() };
            let _ = turn.outcome.set(sync(&group).map_err(Arc::new));
            drop(turn);
            state = self.state();
        }
    }

    fn state(&self) -> MutexGuard<'_, SyncState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for SyncTurn<'_> {
    fn drop(&mut self) {
        let _ = self.outcome.set(Err(Arc::new(io::Error::other("the sync did not end"))));
        self.commit.state().is_busy = false;
        self.commit.ended.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        thread,
        time::{Duration, Instant},
    };

    /// Each writer returns only after a sync that began after it had joined.
    #[test]
    fn each_writer_waits_for_a_sync_that_covers_it() {
        let (commit, begun) = (GroupCommit::default(), Mutex::new(BTreeSet::<u64>::new()));
        let sync = |group: &SyncGroup| {
            begun.lock().unwrap().extend(&group.segments);
            Ok(())
        };
        thread::scope(|scope| {
            for writer in 0..16u64 {
                let (commit, begun) = (&commit, &begun);
                scope.spawn(move || {
                    for n in 0..20 {
                        let number = writer * 100 + n;
                        let add = |group: &mut SyncGroup| assert!(group.segments.insert(number));
                        commit.join(add, sync).unwrap();
                        assert!(begun.lock().unwrap().contains(&number));
                    }
                });
            }
        });
    }

    #[test]
    fn writers_that_arrive_during_a_sync_share_the_next_one() {
        const WRITERS: u64 = 16;
        let (commit, groups) = (GroupCommit::default(), Mutex::new(Vec::new()));
        let sync = |group: &SyncGroup| {
            let is_first = groups.lock().unwrap().is_empty();
            let size = group.segments.len() as u64;
            groups.lock().unwrap().push(size);
            // The first sync ends when all other writers wait in the next group.
            let end = Instant::now() + Duration::from_secs(30);
            while is_first && size + (commit.state().next.segments.len() as u64) < WRITERS {
                assert!(Instant::now() < end, "the other writers do not wait");
                thread::yield_now();
            }
            Ok(())
        };
        thread::scope(|scope| {
            for writer in 0..WRITERS {
                let (commit, sync) = (&commit, &sync);
                let add = move |group: &mut SyncGroup| assert!(group.segments.insert(writer));
                scope.spawn(move || commit.join(add, sync).unwrap());
            }
        });
        let groups = groups.into_inner().unwrap();
        assert!(groups.len() <= 2 && groups.iter().sum::<u64>() == WRITERS, "{groups:?}");
    }

    #[test]
    fn a_failed_sync_fails_for_its_group_and_a_panic_blocks_nobody() {
        let commit = GroupCommit::default();
        let error = commit.join(|_| {}, |_| Err(io::ErrorKind::StorageFull.into())).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        let panicked =
            thread::scope(|scope| scope.spawn(|| commit.join(|_| {}, |_| panic!("on purpose"))).join());
        assert!(panicked.is_err());
        commit.join(|_| {}, |_| Ok(())).unwrap();
    }
}
