//! Removes exec directories: off the hot path where possible, and never through a link or into another mount.
//!
//! One background thread does it; when that is behind, the worker removes its directory itself. What cannot be removed (an
//! immutable file, a mount) is logged, left, and tried again by the sweep of the next start. A [`Ticket`] is held for each
//! directory of a run that is not gone yet, so that a shutdown can wait for all of them.

use super::Place;
use crate::{actors::worker::dir, logging::Event};
use rustix::{
    fs::{self as rfs, AtFlags, FileType},
    io::Errno,
};
use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        mpsc::{SyncSender, TrySendError, sync_channel},
    },
    thread,
    time::Duration,
};

/// How many directories may wait for removal; more would mean that removing is slower than running, and the disk fills.
const REMOVAL_BACKLOG: usize = 64;
/// How many directories of a tree are open at the same time: more than most trees are deep.
const MAX_OPEN: usize = 16;
/// How often one directory is read again because entries turned up while it was emptied.
const EMPTYING_ROUNDS: usize = 3;

const DIRECTORY_NOT_REMOVED: &str = "exec_directory_not_removed";

/// The way to the thread, which ends when this is dropped.
#[derive(Debug)]
pub(super) struct Remover {
    /// `None` when the thread could not be started; then everything is removed in line.
    queue: Option<SyncSender<Job>>,
    pending: Arc<Pending>,
}

/// A directory to be removed.
#[derive(Debug)]
pub(super) struct Job {
    /// The directory that it is in.
    pub place: Arc<Place>,
    /// Its name there.
    pub name: OsString,
    /// `None` for what an earlier run left.
    pub ticket: Option<Ticket>,
}

impl Job {
    /// Removes it here and now.
    pub(super) fn remove(self) {
        let Self { place, name, ticket } = self;
        if let Err(error) = remove(&place.handle, &name) {
            Event::warn("gorego::worker", DIRECTORY_NOT_REMOVED)
                .with_shown("name", &name.display())
                .with_shown("error", &error)
                .log(format_args!("an exec directory could not be removed; the next start tries again"));
        }
        // Whoever waits for the ticket may open the build root again.
        drop((place, ticket));
    }
}

/// How many directories of runs are there.
#[derive(Debug, Default)]
struct Pending {
    count: Mutex<usize>,
    fewer: Condvar,
}

impl Pending {
    fn count(&self) -> MutexGuard<'_, usize> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Stands for one directory that is not gone yet.
#[derive(Debug)]
pub(super) struct Ticket(Arc<Pending>);

impl Drop for Ticket {
    fn drop(&mut self) {
        *self.0.count() -= 1;
        self.0.fewer.notify_all();
    }
}

impl Remover {
    /// Starts the thread, which first removes `leftovers`.
    pub(super) fn start(leftovers: Vec<Job>) -> Self {
        let (sender, jobs) = sync_channel::<Job>(REMOVAL_BACKLOG);
        let spawned = thread::Builder::new()
            .name("gorego-remover".into())
            .spawn(move || leftovers.into_iter().chain(jobs).for_each(Job::remove));
        Self { queue: spawned.ok().map(|_| sender), pending: Arc::default() }
    }

    /// A directory is about to be made.
    pub(super) fn ticket(&self) -> Ticket {
        *self.pending.count() += 1;
        Ticket(self.pending.clone())
    }

    /// Has a directory removed, in the background unless that is behind.
    pub(super) fn remove(&self, job: Job) {
        let refused = match &self.queue {
            Some(queue) => queue
                .try_send(job)
                .err()
                .map(|(TrySendError::Full(job) | TrySendError::Disconnected(job))| job),
            None => Some(job),
        };
        if let Some(job) = refused {
            job.remove();
        }
    }

    /// Waits until every directory of a run is gone, for `limit` at most; says how many are left.
    pub(super) fn wait(&self, limit: Duration) -> usize {
        let left = self.pending.fewer.wait_timeout_while(self.pending.count(), limit, |count| *count > 0);
        *left.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// Removes a directory and all below it, however deep, without following a link or crossing into another mount. Goes on after
/// a failure and reports the first. What somebody else has removed meanwhile is no failure.
///
/// # Errors
/// When anything is left.
pub fn remove(parent: &File, name: &OsStr) -> io::Result<()> {
    let mut removal = Removal::default();
    removal.remove(parent, name);
    removal.failure.map_or(Ok(()), Err)
}

/// The removal of one tree.
///
/// At most [`MAX_OPEN`] directories are open at a time. A subdirectory of the deepest of them is moved to the top of the tree
/// and removed from there. So each directory is opened once, and no step depends on how deep the tree is. Going back through
/// ".." would: in a bind mount the kernel then walks up to the root of the mount.
#[derive(Debug, Default)]
struct Removal {
    failure: Option<io::Error>,
    opened: u64,
    /// Names tried for directories that are moved to the top.
    names: u64,
}

/// An open directory of the tree that is removed.
#[derive(Debug)]
struct Level {
    name: OsString,
    open: File,
    /// Its subdirectories, as far as they are not removed yet. Nothing else is in it.
    below: Vec<OsString>,
    /// How often it was found to be not empty after all.
    rounds: usize,
}

impl Removal {
    fn remove(&mut self, parent: &File, name: &OsStr) {
        let mut levels: Vec<Level> = self.enter(parent, name.to_owned()).into_iter().collect();
        while let Some(level) = levels.last_mut() {
            if let Some(child) = level.below.pop() {
                if levels.len() < MAX_OPEN {
                    let entered = levels.last().and_then(|level| self.enter(&level.open, child));
                    levels.extend(entered);
                } else {
                    self.move_up(&mut levels, &child);
                }
            } else if let Some(emptied) = levels.pop() {
                let above = levels.last().map_or(parent, |level| &level.open);
                levels.extend(self.leave(above, emptied));
            }
        }
    }

    /// Opens a directory and removes all that is in it but its subdirectories.
    fn enter(&mut self, above: &File, name: OsString) -> Option<Level> {
        let (open, _) = self.note(dir::open_accessible(above, &name))?;
        self.opened += 1;
        let mut level = Level { name, open, below: Vec::new(), rounds: 0 };
        self.empty(&mut level);
        Some(level)
    }

    fn empty(&mut self, level: &mut Level) {
        let Some(entries) = self.note(dir::entries(&level.open)) else { return };
        for entry in entries {
            let Some(entry) = self.note(entry) else { return };
            let name = dir::entry_name(&entry);
            let kind = match entry.file_type() {
                FileType::Unknown => {
                    self.note(dir::stat_at(&level.open, name)).map(|stat| dir::file_type(&stat))
                }
                known => Some(known),
            };
            match kind {
                Some(FileType::Directory) => level.below.push(name.to_owned()),
                Some(_) => {
                    self.note(rfs::unlinkat(&level.open, name, AtFlags::empty()));
                }
                None => {}
            }
        }
    }

    /// Moves a subdirectory of the deepest level to the top of the tree.
    fn move_up(&mut self, levels: &mut [Level], child: &OsStr) {
        let [top, .., deepest] = levels else { return };
        let mut granted = false;
        let moved = loop {
            let name = OsString::from(self.names.to_string());
            self.names += 1;
            match rfs::renameat(&deepest.open, child, &top.open, &name) {
                Ok(()) => break Ok(name),
                // Something has that name. An empty directory would have been replaced.
                Err(Errno::EXIST | Errno::NOTEMPTY | Errno::NOTDIR) => {}
                // To move a directory takes the right to write in it.
                Err(Errno::ACCESS) if !granted => {
                    granted = true;
                    let _ = dir::open_accessible(&deepest.open, child);
                }
                Err(error) => break Err(error),
            }
        };
        top.below.extend(self.note(moved));
    }

    /// Removes a directory that should be empty; gives it back when something has turned up in it.
    fn leave(&mut self, above: &File, mut emptied: Level) -> Option<Level> {
        match rfs::unlinkat(above, &*emptied.name, AtFlags::REMOVEDIR) {
            Err(Errno::NOTEMPTY) if self.failure.is_none() && emptied.rounds < EMPTYING_ROUNDS => {
                emptied.rounds += 1;
                self.empty(&mut emptied);
                Some(emptied)
            }
            removed => {
                self.note(removed);
                None
            }
        }
    }

    /// The value of a step, or else the failure is kept if it is the first. What is gone needs no removal.
    fn note<T>(&mut self, step: Result<T, impl Into<io::Error>>) -> Option<T> {
        match step.map_err(Into::into) {
            Ok(value) => Some(value),
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    self.failure.get_or_insert(error);
                }
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::Mode;
    use std::{fs, os::unix::fs::symlink};

    /// A chain of so many directories in `top`, each with a file; its first one.
    fn chain(top: &File, levels: usize) -> &'static OsStr {
        let name = OsStr::new("d");
        let mut here = top.try_clone().unwrap();
        for _ in 0..levels {
            rfs::mkdirat(&here, name, Mode::RWXU).unwrap();
            here = dir::open_dir(&here, name).unwrap();
            rfs::openat(&here, "file", rfs::OFlags::CREATE | rfs::OFlags::WRONLY, Mode::RUSR).unwrap();
        }
        name
    }

    /// Counted, since a path walk for each level would not show on a fast machine.
    #[test]
    fn the_work_for_a_deep_tree_is_proportional_to_its_depth() {
        // In memory where that is possible: some disks take milliseconds for each directory.
        let directory = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let top = File::open(directory.path()).unwrap();
        for levels in [1, MAX_OPEN, MAX_OPEN + 1, 20_000] {
            let name = chain(&top, levels);
            let mut removal = Removal::default();
            removal.remove(&top, name);
            assert!(removal.failure.is_none(), "{levels}: {:?}", removal.failure);
            assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0, "{levels}");
            assert_eq!(removal.opened, levels as u64, "each directory is opened once");
            assert!(removal.names <= (levels / (MAX_OPEN - 1)) as u64, "{levels}: {} moves", removal.names);
        }
    }

    #[test]
    fn names_that_are_taken_at_the_top_are_not_in_the_way_of_a_deep_tree() {
        let directory = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("kept"), "").unwrap();
        let exec = directory.path().join("exec");
        fs::create_dir_all(exec.join("0/not/empty")).unwrap();
        fs::create_dir(exec.join("1")).unwrap();
        fs::write(exec.join("2"), "").unwrap();
        symlink(outside.path(), exec.join("3")).unwrap();
        chain(&File::open(&exec).unwrap(), 100);
        symlink(outside.path(), exec.join("d/d/link")).unwrap();
        let parent = File::open(directory.path()).unwrap();
        remove(&parent, OsStr::new("exec")).unwrap();
        assert!(!exec.exists() && outside.path().join("kept").exists());
    }

    /// The build root may be removed by hand while runs go on.
    #[test]
    fn what_is_gone_already_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let parent = File::open(directory.path()).unwrap();
        remove(&parent, OsStr::new("exec")).unwrap();
        drop(directory);
        remove(&parent, OsStr::new("exec")).unwrap();
    }
}
