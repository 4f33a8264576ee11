//! Removes exec directories: in the background where possible, and never through a link or into another mount.
//!
//! One background thread removes them. If its queue is full, the worker removes its directory itself. If a directory
//! cannot be removed (an immutable file, a mount, a file system that needs free space to remove a file), this is
//! logged. The removal is retried every [`RETRY_AFTER`], and by the sweep of the next start. A [`RemovalTicket`] exists
//! for each directory of a run whose removal was not attempted yet, so that a shutdown can wait for all of them. It
//! does not wait for retries.

use super::{
    RootDirectory,
    names::{EntryOwner, owner},
};
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
        mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

/// Maximum number of directories that wait for removal. If more are waiting, removal is slower than running actions,
/// and the disk would fill up.
const REMOVAL_BACKLOG: usize = 64;
/// Time between a failed removal and the retry.
const RETRY_AFTER: Duration = Duration::from_secs(10);
/// Maximum number of directories whose removal is retried. The next start removes all others.
const MAX_FAILED: usize = 256;
/// Maximum number of directories of one tree that are open at the same time. Most trees are less deep.
const MAX_OPEN: usize = 16;
/// Maximum number of names of subdirectories of one directory that are in memory. A command may make any number of
/// them. When these are removed, the directory is read again.
const MAX_NAMES: usize = 4_096;
/// How often a directory with more names is read again.
const MAX_PASSES: usize = 100_000;
/// How often a directory is read again because new entries appeared while it was emptied.
const EMPTYING_ROUNDS: usize = 3;

const DIRECTORY_NOT_REMOVED: &str = "exec_directory_not_removed";

/// The handle of the thread, which ends when this is dropped.
#[derive(Debug)]
pub(super) struct Remover {
    /// `None` if the thread could not be started. Then workers remove their directories themselves.
    queue: Option<SyncSender<Job>>,
    attempts: Arc<Attempts>,
    pending: Arc<Pending>,
}

/// Removes directories, and remembers those that could not be removed.
#[derive(Debug)]
struct Attempts {
    remove: fn(&File, &OsStr) -> io::Result<()>,
    failed: Mutex<Vec<Job>>,
}

/// A directory to be removed.
#[derive(Debug)]
pub(super) struct Job {
    /// The build root that contains it.
    pub place: Arc<RootDirectory>,
    /// Its name in the build root.
    pub name: OsString,
    /// `None` for leftovers of an earlier server process.
    pub ticket: Option<RemovalTicket>,
}

impl Attempts {
    /// Removes a directory on this thread. Keeps it for later if that fails.
    fn remove(&self, job: Job) {
        let Job { place, name, ticket } = job;
        if let Err(error) = (self.remove)(&place.handle, &name) {
            let is_kept = self.keep(&place, &name);
            let next = if is_kept { "it is tried again" } else { "the next start tries again" };
            Event::warn("gorego::worker", DIRECTORY_NOT_REMOVED)
                .with_shown("name", &name.display())
                .with_shown("error", &error)
                .log(format_args!("an exec directory could not be removed; {next}"));
        }
        // `place` is dropped first, because a waiter for the ticket may open the build root again.
        drop((place, ticket));
    }

    /// Keeps a directory for a retry. A name that is derived from an action is not kept, because another run may use it
    /// by then. All other names are numbered, and no number is used twice.
    fn keep(&self, place: &Arc<RootDirectory>, name: &OsStr) -> bool {
        let mut failed = self.failed();
        let is_kept =
            matches!(owner(name), Some(EntryOwner::Run | EntryOwner::Tree)) && failed.len() < MAX_FAILED;
        if is_kept {
            failed.push(Job { place: place.clone(), name: name.to_owned(), ticket: None });
        }
        is_kept
    }

    /// Retries all failed removals.
    fn retry(&self) {
        let failed = std::mem::take(&mut *self.failed());
        for Job { place, name, .. } in failed {
            if (self.remove)(&place.handle, &name).is_err() {
                self.keep(&place, &name);
            }
        }
    }

    /// Removes queued directories until the queue is closed, and retries failed removals every `retry_after`.
    fn run(&self, jobs: &Receiver<Job>, retry_after: Duration) {
        let mut next_retry = Instant::now() + retry_after;
        loop {
            match jobs.recv_timeout(next_retry.saturating_duration_since(Instant::now())) {
                Ok(job) => self.remove(job),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if Instant::now() >= next_retry {
                self.retry();
                next_retry = Instant::now() + retry_after;
            }
        }
    }

    fn failed(&self) -> MutexGuard<'_, Vec<Job>> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The number of directories of runs that exist.
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

/// Counts one directory that is not removed yet.
#[derive(Debug)]
pub(super) struct RemovalTicket(Arc<Pending>);

impl Drop for RemovalTicket {
    fn drop(&mut self) {
        *self.0.count() -= 1;
        self.0.fewer.notify_all();
    }
}

impl Remover {
    /// Starts the thread, which first removes `leftovers`.
    pub(super) fn start(leftovers: Vec<Job>) -> Self {
        Self::with(leftovers, remove, RETRY_AFTER)
    }

    fn with(leftovers: Vec<Job>, remove: fn(&File, &OsStr) -> io::Result<()>, retry_after: Duration) -> Self {
        let (sender, jobs) = sync_channel::<Job>(REMOVAL_BACKLOG);
        let attempts = Arc::new(Attempts { remove, failed: Mutex::default() });
        let of_thread = attempts.clone();
        let spawned = thread::Builder::new().name("gorego-remover".into()).spawn(move || {
            leftovers.into_iter().for_each(|job| of_thread.remove(job));
            of_thread.run(&jobs, retry_after);
        });
        Self { queue: spawned.ok().map(|_| sender), attempts, pending: Arc::default() }
    }

    /// Counts a directory that is about to be created.
    pub(super) fn ticket(&self) -> RemovalTicket {
        *self.pending.count() += 1;
        RemovalTicket(self.pending.clone())
    }

    /// Removes a directory in the background, or on this thread if the queue is full.
    pub(super) fn remove(&self, job: Job) {
        let refused = match &self.queue {
            Some(queue) => queue
                .try_send(job)
                .err()
                .map(|(TrySendError::Full(job) | TrySendError::Disconnected(job))| job),
            None => Some(job),
        };
        if let Some(job) = refused {
            self.remove_here(job);
        }
    }

    /// Removes a directory on this thread.
    pub(super) fn remove_here(&self, job: Job) {
        self.attempts.remove(job);
    }

    /// Waits until the removal of every directory of a run has succeeded or failed, for at most `limit`. Returns how
    /// many are left.
    pub(super) fn wait(&self, limit: Duration) -> usize {
        let left = self.pending.fewer.wait_timeout_while(self.pending.count(), limit, |count| *count > 0);
        *left.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// Removes a directory and everything below it, however deep, without following a link or crossing into another mount.
/// Continues after a failure and reports the first one. An entry that is already gone is no failure.
///
/// # Errors
/// If anything is left.
pub fn remove(parent: &File, name: &OsStr) -> io::Result<()> {
    remove_while(parent, name, &|| true)
}

/// Like [`remove`], but ends as soon as `may_continue` returns false. A process may otherwise create entries as fast as
/// they are removed.
///
/// # Errors
/// If anything is left.
pub(in crate::actors::worker) fn remove_while(
    parent: &File,
    name: &OsStr,
    may_continue: &dyn Fn() -> bool,
) -> io::Result<()> {
    let mut removal = Removal::new(may_continue);
    removal.remove(parent, name);
    removal.failure.map_or(Ok(()), Err)
}

/// The removal of one tree.
///
/// At most [`MAX_OPEN`] directories are open at a time. A subdirectory of the deepest one is moved to the top of the
/// tree and removed from there. So each directory is opened once, and the cost of a step does not depend on the depth
/// of the tree. Going back through ".." would depend on it: in a bind mount the kernel walks up to the root of the
/// mount.
struct Removal<'a> {
    may_continue: &'a dyn Fn() -> bool,
    failure: Option<io::Error>,
    opened: u64,
    /// The number of names tried for directories that are moved to the top.
    names: u64,
}

/// An open directory of the tree.
#[derive(Debug)]
struct OpenLevel {
    name: OsString,
    open: File,
    /// Its subdirectories that are not removed yet.
    below: Vec<OsString>,
    /// Whether there is more in it than these.
    has_more: bool,
    /// How often it had more names.
    passes: usize,
    /// How often it turned out not to be empty.
    rounds: usize,
}

impl<'a> Removal<'a> {
    fn new(may_continue: &'a dyn Fn() -> bool) -> Self {
        Self { may_continue, failure: None, opened: 0, names: 0 }
    }

    fn remove(&mut self, parent: &File, name: &OsStr) {
        let mut levels: Vec<OpenLevel> = self.enter(parent, name.to_owned()).into_iter().collect();
        while self.continues()
            && let Some(level) = levels.last_mut()
        {
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

    /// Whether the removal goes on. It is a failure if it does not.
    fn continues(&mut self) -> bool {
        let continues = (self.may_continue)();
        if !continues {
            self.failure.get_or_insert(Errno::CANCELED.into());
        }
        continues
    }

    /// Opens a directory and removes everything in it except its subdirectories.
    fn enter(&mut self, above: &File, name: OsString) -> Option<OpenLevel> {
        let (open, _) = self.note(dir::open_accessible(above, &name))?;
        self.opened += 1;
        let mut level = OpenLevel { name, open, below: Vec::new(), has_more: false, passes: 0, rounds: 0 };
        self.empty(&mut level);
        Some(level)
    }

    fn empty(&mut self, level: &mut OpenLevel) {
        level.has_more = false;
        let Some(entries) = self.note(dir::entries(&level.open)) else { return };
        for entry in entries {
            if level.below.len() >= MAX_NAMES {
                level.has_more = true;
                return;
            }
            if !self.continues() {
                return;
            }
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
    fn move_up(&mut self, levels: &mut [OpenLevel], child: &OsStr) {
        let [top, .., deepest] = levels else { return };
        let mut granted = false;
        let moved = loop {
            let name = OsString::from(self.names.to_string());
            self.names += 1;
            match rfs::renameat(&deepest.open, child, &top.open, &name) {
                Ok(()) => break Ok(name),
                // The name is taken. An empty directory would have been replaced.
                Err(Errno::EXIST | Errno::NOTEMPTY | Errno::NOTDIR) => {}
                // Moving a directory needs write permission on it.
                Err(Errno::ACCESS) if !granted => {
                    granted = true;
                    let _ = dir::open_accessible(&deepest.open, child);
                }
                Err(error) => break Err(error),
            }
        };
        if top.below.len() < MAX_NAMES {
            top.below.extend(self.note(moved));
        } else {
            top.has_more |= self.note(moved).is_some();
        }
    }

    /// Removes a directory that should be empty. Returns it if new entries have appeared in it.
    fn leave(&mut self, above: &File, mut emptied: OpenLevel) -> Option<OpenLevel> {
        match rfs::unlinkat(above, &*emptied.name, AtFlags::REMOVEDIR) {
            Err(Errno::NOTEMPTY)
                if self.failure.is_none()
                    && emptied.passes < MAX_PASSES
                    && (emptied.has_more || emptied.rounds < EMPTYING_ROUNDS) =>
            {
                emptied.passes += 1;
                emptied.rounds += usize::from(!emptied.has_more);
                self.empty(&mut emptied);
                Some(emptied)
            }
            removed => {
                self.note(removed);
                None
            }
        }
    }

    /// Returns the value of a step. The first failure is kept; a missing entry is no failure.
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
    use crate::actors::worker::build_root::staged_trees::StagingLimits;
    use rustix::fs::Mode;
    use std::{
        fs,
        os::unix::fs::symlink,
        sync::atomic::{AtomicUsize, Ordering::SeqCst},
    };

    /// Creates a chain of `levels` directories in `top`, each with a file. Returns the name of the first.
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

    /// The work is counted, because the extra path walk for each level would take too little time to measure on a fast
    /// machine.
    #[test]
    fn the_work_for_a_deep_tree_is_proportional_to_its_depth() {
        // In memory if possible: some disks take milliseconds per directory.
        let directory = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let top = File::open(directory.path()).unwrap();
        for levels in [1, MAX_OPEN, MAX_OPEN + 1, 20_000] {
            let name = chain(&top, levels);
            let mut removal = Removal::new(&|| true);
            removal.remove(&top, name);
            assert!(removal.failure.is_none(), "{levels}: {:?}", removal.failure);
            assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0, "{levels}");
            assert_eq!(removal.opened, levels as u64, "each directory is opened once");
            assert!(removal.names <= (levels / (MAX_OPEN - 1)) as u64, "{levels}: {} moves", removal.names);
        }
    }

    #[test]
    fn a_removal_ends_when_it_may_not_continue() {
        let directory = tempfile::tempdir().unwrap();
        let top = File::open(directory.path()).unwrap();
        let name = chain(&top, MAX_OPEN + 5);
        let asked = AtomicUsize::new(0);
        let error = remove_while(&top, name, &|| asked.fetch_add(1, SeqCst) < 10).unwrap_err();
        assert_eq!(Errno::from_io_error(&error), Some(Errno::CANCELED));
        assert!(asked.load(SeqCst) <= 12, "it ends at once");
        assert!(directory.path().join(name).exists());
        remove(&top, name).unwrap();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    /// A command may make any number of directories in one directory.
    #[test]
    fn a_directory_with_many_subdirectories_is_removed_with_few_names_in_memory() {
        let directory = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let exec = directory.path().join("exec");
        for n in 0..2 * MAX_NAMES + 10 {
            fs::create_dir_all(exec.join(n.to_string())).unwrap();
        }
        fs::write(exec.join("file"), "").unwrap();
        // These are moved to the top before they are removed.
        let deep = exec.join("d/".repeat(MAX_OPEN));
        for n in 0..MAX_NAMES + 10 {
            fs::create_dir_all(deep.join(n.to_string())).unwrap();
        }
        let mut removal = Removal::new(&|| true);
        let parent = File::open(directory.path()).unwrap();
        let mut level = removal.enter(&parent, "exec".into()).unwrap();
        assert_eq!((level.below.len(), level.has_more), (MAX_NAMES, true));
        level.below.clear();
        removal.remove(&parent, OsStr::new("exec"));
        assert!(removal.failure.is_none() && !exec.exists(), "{:?}", removal.failure);
    }

    #[test]
    fn names_that_are_taken_at_the_top_do_not_prevent_the_removal_of_a_deep_tree() {
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

    /// The removals fail at first, as on a full file system that needs free space to remove a file.
    #[test]
    fn a_failed_removal_is_retried_unless_another_run_may_use_the_name_by_then() {
        static FULL_FOR: AtomicUsize = AtomicUsize::new(6);
        fn remove_or_fail(parent: &File, name: &OsStr) -> io::Result<()> {
            let is_full = FULL_FOR.fetch_update(SeqCst, SeqCst, |times| times.checked_sub(1)).is_ok();
            if is_full { Err(Errno::NOSPC.into()) } else { remove(parent, name) }
        }
        let directory = tempfile::tempdir().unwrap();
        let place = Arc::new(RootDirectory::open(directory.path(), StagingLimits::default()).unwrap());
        let paths = ["a-89abcdef", "0-1", "0-2", "t-3"].map(|name| directory.path().join(name));
        paths.iter().for_each(|path| fs::create_dir_all(path.join("root")).unwrap());
        let remover = Remover::with(Vec::new(), remove_or_fail, Duration::from_millis(1));
        for path in &paths {
            let (name, ticket) = (path.file_name().unwrap().to_owned(), Some(remover.ticket()));
            remover.remove(Job { place: place.clone(), name, ticket });
        }
        assert_eq!(remover.wait(Duration::from_secs(60)), 0, "nobody waits for the next attempt");
        let deadline = Instant::now() + Duration::from_secs(60);
        while paths[1..].iter().any(|path| path.exists()) {
            assert!(Instant::now() < deadline, "it was not tried again");
            thread::yield_now();
        }
        assert!(paths[0].exists());
        assert!(remover.attempts.failed().is_empty());
    }

    /// The build root may be removed by hand during runs.
    #[test]
    fn removing_a_missing_directory_succeeds() {
        let directory = tempfile::tempdir().unwrap();
        let parent = File::open(directory.path()).unwrap();
        remove(&parent, OsStr::new("exec")).unwrap();
        drop(directory);
        remove(&parent, OsStr::new("exec")).unwrap();
    }
}
